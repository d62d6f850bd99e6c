# SPDX-License-Identifier: Apache-2.0
"""The CRI log of one container: lines cut, tagged, stamped and appended to a file.

    2026-01-02T03:04:05.678901234Z stdout F a whole line
    2026-01-02T03:04:05.678901234Z stderr P the first 16 KiB of a long one

What was passed to `write` is in the file when `write` returns; nothing but the unfinished last line
of a stream (16 KiB at most) is held in memory, so a killed shim loses no more than that. A full
disk never stops a container: what cannot be written is dropped, counted and reported. Rotation is
the kubelet's; it renames and calls `reopen`.
"""

import os
import stat
import time

from shim import diagnostics, errors

LINE_LIMIT = 16384
_FULL, _PART = b"F", b"P"
_OPEN = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class Splitter:
    """Cuts a byte stream into tagged pieces; one per stream.

    A piece is `(tag, content)`: tag is `b"F"` where a line ends and `b"P"` where it goes on;
    content is at most 16384 bytes, without the newline and without a carriage return before it.
    """

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[tuple[bytes, bytes]]:
        """Take the next bytes and return the pieces that are complete with them."""
        lines = (self._rest + data if self._rest else data).split(b"\n")
        self._rest = lines.pop()
        if b"\r" in data or (lines and lines[0].endswith(b"\r")):
            lines = [line[:-1] if line.endswith(b"\r") else line for line in lines]
        if lines and len(max(lines, key=len)) > LINE_LIMIT:
            pieces = [piece for line in lines for piece in _whole(line)]
        else:
            pieces = [(_FULL, line) for line in lines]
        # One byte more than the limit is kept, for it may be the carriage return before a newline.
        while len(self._rest) > LINE_LIMIT + 1:
            head, self._rest = _cut(self._rest)
            pieces.append((_PART, head))
        return pieces

    def finish(self) -> list[tuple[bytes, bytes]]:
        """Return the unterminated tail, as the kubelet expects it: tagged `P`."""
        pieces = []
        while self._rest:
            head, self._rest = _cut(self._rest)
            pieces.append((_PART, head))
        return pieces


def _whole(line: bytes) -> list[tuple[bytes, bytes]]:
    pieces = []
    while len(line) > LINE_LIMIT:
        head, line = _cut(line)
        pieces.append((_PART, head))
    pieces.append((_FULL, line))
    return pieces


def _cut(line: bytes) -> tuple[bytes, bytes]:
    """Cut at the limit, or up to three bytes before it where a UTF-8 character would be torn."""
    end = LINE_LIMIT
    if len(line) > end:
        start = end
        while end - start < 3 and line[start] & 0xC0 == 0x80:
            start -= 1
        if line[start] >= 0xC0:
            end = start
    return line[:end], line[end:]


class LogFile:
    """The open log of a container. `path` may be empty: then everything is discarded.

    Raises InvalidArgument where the path names something that is not a plain file, or cannot be
    opened.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.dropped = 0
        self._fd = _open(path) if path else -1
        self._splitters = {"stdout": Splitter(), "stderr": Splitter()}
        self._last = 0
        self._second = -1
        self._stamp = ""

    def write(self, stream: str, data: bytes) -> None:
        """Append what has become complete in `stream` ("stdout" or "stderr") with these bytes."""
        if self._fd >= 0:
            self._append(stream, self._splitters[stream].feed(data))

    def finish(self, stream: str) -> None:
        """Append the unterminated tail of a stream that has ended."""
        if self._fd >= 0:
            self._append(stream, self._splitters[stream].finish())

    def reopen(self) -> None:
        """Write to a new file at the same path from now on; the old one has its last byte.

        When that fails nothing has changed and no file has been made (the kubelet renames the old
        one back).
        """
        if self._fd >= 0:
            new = _open(self.path)
            self._fd, old = new, self._fd
            os.close(old)

    def close(self) -> None:
        for stream in self._splitters:
            self.finish(stream)
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
        if self.dropped:
            diagnostics.report("log lines lost", path=self.path, dropped=self.dropped)

    def _append(self, stream: str, pieces: list[tuple[bytes, bytes]]) -> None:
        if not pieces:
            return
        head = f"{self._now()} {stream} "
        whole, partial = (head + "F ").encode(), (head + "P ").encode()
        if all([tag is _FULL for tag, _ in pieces]):  # noqa: C419 - a list is faster than a generator
            contents = [content for _, content in pieces]
            out = b"%b%b\n" % (whole, (b"\n" + whole).join(contents))
        else:
            records = [(whole if tag is _FULL else partial) + content for tag, content in pieces]
            out = b"\n".join(records) + b"\n"
        self._write(out, len(pieces))

    def _write(self, out: bytes, pieces: int) -> None:
        try:
            written = os.write(self._fd, out)
        except OSError as error:
            self._lose(pieces, error.strerror)
            return
        if written < len(out):
            self._heal(out, written)

    def _heal(self, out: bytes, written: int) -> None:
        """Go on after a short write: once more with the rest, and cut off half a record if that
        fails.
        """
        end = out.rfind(b"\n", 0, written) + 1
        try:
            os.ftruncate(self._fd, os.fstat(self._fd).st_size - (written - end))
        except OSError as error:
            self._lose(out.count(b"\n", end), error.strerror)
            return
        if end:
            self._write(out[end:], out.count(b"\n", end))
        else:
            self._lose(out.count(b"\n"), "not even one record fits")

    def _lose(self, pieces: int, why: str | None) -> None:
        if not self.dropped:
            diagnostics.report(
                "cannot write to a log; lines are dropped", path=self.path, error=why
            )
        self.dropped += pieces

    def _now(self) -> str:
        """Return the time with nine digits, never earlier than the last one given."""
        self._last = max(self._last, time.time_ns())
        second, nanosecond = divmod(self._last, 1_000_000_000)
        if second != self._second:
            self._second = second
            self._stamp = time.strftime("%Y-%m-%dT%H:%M:%S.", time.gmtime(second))
        return f"{self._stamp}{nanosecond:09d}Z"


def _open(path: str) -> int:
    """Open a log for appending, 0640, its parent directories made with 0755."""
    try:
        os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
        fd = os.open(path, _OPEN | os.O_CREAT, 0o640)
    except OSError as error:
        raise errors.InvalidArgument(f"cannot open the log {path!r}: {error.strerror}") from error
    except RecursionError as error:  # of os.makedirs
        raise errors.InvalidArgument(f"cannot open the log {path!r}: it is too deep") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise errors.InvalidArgument(f"cannot open the log {path!r}: it is not a plain file")
    return fd
