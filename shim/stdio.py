# SPDX-License-Identifier: Apache-2.0
"""The standard streams of one process: read once, written to its log and to all who are attached.

    process ──pipe or terminal──► pump ──► log file        (first, and without waiting)
                                      └──► sink, sink …    (waits for the slowest: back-pressure)

A chunk is in the log before any client sees it. A client that is gone, or that takes nothing for
half a minute, is dropped; a container never notices who listens, an exec waits for its client. At
most one chunk of 64 KiB per stream is in memory, of 256 KiB for an exec. If the shim dies the pipes
break with it, which is why `cri_server` kills the containers of a dead shim.
"""

import contextlib
import errno
import fcntl
import os
from collections.abc import Awaitable, Callable, Iterator
from typing import Protocol, TypeVar

from shim import console, errors, logfile, loop, runtimes

P = TypeVar("P", bound=runtimes.Process)

ROOT = (0, 0)
_CHUNK = 65536
_EXEC_CHUNK = 1 << 18  # where there is no log: fewer turns of three processes
_STALL_SECONDS = 30.0
_CONSOLE_SECONDS = 5.0
_WORDS_SECONDS = 0.2
_WORDS_LIMIT = 4096


class Sink(Protocol):
    """Somebody who wants output."""

    async def output(self, stream: str, data: bytes) -> None:
        """Take bytes of "stdout" or "stderr". Raises OSError or ShimError when it cannot take any
        more, ever.
        """


class Streams:
    """The streams of one process. `connect` once, then `drain`, then `close`, which may also come
    at any time.

    `owner` gets the pipes, so that it can open /dev/stdout by name; OCI runtimes can give them to
    others inside a user namespace only if they belong to one of its users. `fifos`: the pipes have
    names, and the runtime makes the terminal, see `runtimes.Stdio`. With `waits` the process waits
    for its clients as long as they are there.
    """

    def __init__(
        self,
        *,
        terminal: bool,
        stdin: bool,
        log: logfile.LogFile | None = None,
        owner: tuple[int, int] = ROOT,
        fifos: bool = False,
        waits: bool = False,
    ) -> None:
        self.withheld: set[str] = set()  # of which clients did not get the end
        self._fifos = fifos
        self._remote: runtimes.Process | None = None  # whose terminal and stdin the runtime holds
        self._owner = owner
        self._stall = None if waits else _STALL_SECONDS
        self._terminal = terminal
        self._wants_stdin = stdin
        self._log = log
        self._chunk = _CHUNK if log else _EXEC_CHUNK
        self._sinks: list[Sink] = []
        self._pumps: list[_Pump] = []
        self._input = -1
        self._input_lock = loop.Lock()
        self._input_ready = loop.Event()  # there is an input, or there will never be one
        self._size: tuple[int, int] | None = None

    async def connect(self, directory: str, launch: Callable[[runtimes.Stdio], Awaitable[P]]) -> P:
        """Let `launch` start the process with our streams and return it. Output is read from the
        start.
        """
        if self._fifos:
            return await self._connect_fifos(directory, launch)
        if self._terminal:
            return await self._connect_terminal(directory, launch)
        tail = _Tail()
        self.add(tail)
        try:
            with self._pipes() as ends:
                return await launch(ends)
        except runtimes.Silent as error:
            await self.drain(_WORDS_SECONDS, patient=False)
            raise errors.ShimError(runtimes.last_error(tail.data) or error.message) from error
        finally:
            self.remove(tail)

    async def _connect_terminal(
        self, directory: str, launch: Callable[[runtimes.Stdio], Awaitable[P]]
    ) -> P:
        with console.ConsoleSocket(directory) as listener:
            made = await launch(runtimes.Stdio(console=listener.path))
            try:
                async with loop.timeout(_CONSOLE_SECONDS):
                    self._use_terminal(await listener.receive())
            except BaseException as error:
                loop.spawn(_abandon(made), name="abandoned")
                if isinstance(error, TimeoutError):
                    raise errors.Internal("the runtime sent no terminal") from error
                raise
        return made

    async def _connect_fifos(
        self, directory: str, launch: Callable[[runtimes.Stdio], Awaitable[P]]
    ) -> P:
        with self._pipes(directory) as ends:
            self._remote = made = await launch(ends)
        if self._size:
            self.resize(*self._size)
        self._input_ready.set()
        return made

    def add(self, sink: Sink) -> None:
        """Send a copy of all output from now on to a client."""
        self._sinks.append(sink)

    def remove(self, sink: Sink) -> None:
        """Forget a client; nothing happens when it is not there."""
        if sink in self._sinks:
            self._sinks.remove(sink)

    async def write_stdin(self, data: bytes) -> None:
        """Pass bytes on; dropped when the process has no stdin (any more)."""
        view = memoryview(data)
        await self._input_ready.wait()
        async with self._input_lock:
            with contextlib.suppress(OSError):  # EBADF, EPIPE, EIO: the reader is gone.
                while view and self._input >= 0:
                    view = await _write_some(self._input, view)

    async def close_stdin(self) -> None:
        """Let the process read the end of its stdin, after what has been written.

        A terminal has no such end.
        """
        await self._input_ready.wait()
        async with self._input_lock:
            if not self._terminal:
                self._drop_input()
                if self._remote:
                    with contextlib.suppress(errors.ShimError):  # it has ended
                        await self._remote.close_stdin()

    def resize(self, width: int, height: int) -> None:
        """Set the size of the terminal, if there is one; before `connect`, what it begins with."""
        self._size = width, height
        if self._terminal and self._remote:
            loop.spawn(_resize(self._remote, width, height), name="resize")
        elif self._terminal and self._input >= 0 and not self._fifos:
            console.resize(self._input, width, height)

    async def drain(self, seconds: float, *, patient: bool) -> None:
        """Read to the end of all output, or for `seconds` where a stranger keeps the pipes open.

        What is in the pipes then is still delivered: if `patient`, to a slow client too; else only
        to the log, and the stream is `withheld`.
        """
        with contextlib.suppress(TimeoutError):
            async with loop.timeout(seconds):
                for pump in self._pumps:
                    await pump.task.join()
        for pump in self._pumps:
            await pump.finish(patient=patient)
            self.withheld |= {pump.stream} if pump.withheld else set()

    def close(self) -> None:
        """Let go of everything; the log stays open."""
        self._drop_input()
        self._input_ready.set()
        for pump in self._pumps:
            pump.task.cancel()
        self._sinks.clear()
        if self._remote:
            loop.spawn(_forget(self._remote), name="forget")
            self._remote = None

    @contextlib.contextmanager
    def _pipes(self, fifos: str = "") -> Iterator[runtimes.Stdio]:
        """Open the pipes and read from them; the process's ends are ours for the block only.

        `fifos`: a directory in which they have names, for as long.
        """
        ends: dict[str, int] = {}
        try:
            if self._wants_stdin:
                ends["stdin"], self._input = _pipe(self._chunk, fifos, "stdin")
                os.set_blocking(self._input, False)
            if not fifos:
                self._input_ready.set()
            for stream in ("stdout",) if fifos and self._terminal else ("stdout", "stderr"):
                ours, ends[stream] = _pipe(self._chunk, fifos, stream)
                self._pump(ours, stream)
            if self._owner != ROOT:
                for fd in ends.values():
                    os.fchown(fd, *self._owner)
            yield runtimes.Stdio(
                stdin=ends.get("stdin"),
                stdout=ends["stdout"],
                stderr=ends.get("stderr"),
                fifos=fifos,
                terminal=self._terminal,
                owner=self._owner,
            )
        finally:
            for stream, fd in ends.items():
                os.close(fd)
                if fifos:
                    os.unlink(os.path.join(fifos, stream))

    def _use_terminal(self, master: int) -> None:
        self._input = master
        if self._size:
            console.resize(master, *self._size)
        self._input_ready.set()
        self._pump(os.dup(master), "stdout")

    def _pump(self, fd: int, stream: str) -> None:
        os.set_blocking(fd, False)
        self._pumps.append(_Pump(fd, stream, self._log, self._deliver, self._chunk))

    async def _deliver(self, stream: str, data: bytes) -> None:
        for sink in tuple(self._sinks):
            try:
                async with loop.timeout(self._stall):
                    await sink.output(stream, data)
            except (OSError, errors.ShimError):  # TimeoutError is an OSError.
                self.remove(sink)

    def _drop_input(self) -> None:
        fd, self._input = self._input, -1
        if fd >= 0:
            loop.close(fd)


async def _forget(ended: runtimes.Process) -> None:
    with contextlib.suppress(errors.ShimError):  # it went with its shim
        await ended.forget()


async def _resize(of: runtimes.Process, width: int, height: int) -> None:
    with contextlib.suppress(errors.ShimError):  # it has ended
        await of.resize(width, height)


async def _abandon(started: runtimes.Process) -> None:
    """End a process that nobody will have."""
    await started.kill_tree()
    await started.wait()


class _Tail:
    """Keeps the last words of a runtime that may fail without logging a reason."""

    def __init__(self) -> None:
        self.data = b""

    async def output(self, stream: str, data: bytes) -> None:
        """Keep the end of stderr."""
        if stream == "stderr":
            self.data = (self.data + data)[-_WORDS_LIMIT:]


class _Pump:
    """Reads one descriptor, which it owns, to its end."""

    def __init__(
        self,
        fd: int,
        stream: str,
        log: logfile.LogFile | None,
        deliver: Callable[[str, bytes], Awaitable[None]],
        chunk: int,
    ) -> None:
        self.stream = stream
        self.withheld = False  # whether something went to the log alone
        self._fd = fd
        self._chunk = chunk
        self._log = log
        self._deliver = deliver
        self._idle = False
        self._log_only = False
        self._budget: int | None = None  # how much is still to be read, once time is up
        self.task = loop.spawn(self._run(), name=f"pump {stream}")

    async def finish(self, *, patient: bool) -> None:
        """Take what is in the pipe now and end. Unless `patient`, clients get none of it."""
        if self.task.done:
            return
        self._budget = _capacity(self._fd)
        self._log_only = not patient
        if self._idle or not patient:
            self.task.cancel()
        await self.task.join()

    async def _run(self) -> None:
        try:
            while chunk := await self._next():
                if self._log:
                    self._log.write(self.stream, chunk)
                await self._offer(chunk)
        except loop.Cancelled:
            return  # by `close`
        finally:
            if self._log:
                self._log.finish(self.stream)
            os.close(self._fd)

    async def _next(self) -> bytes:
        if self._budget is None:
            await self._wait()
        elif self._budget <= 0:
            return b""
        chunk = _read(self._fd, self._chunk)
        if self._budget is not None:
            self._budget -= len(chunk)
        return chunk

    async def _wait(self) -> None:
        self._idle = True
        try:
            await loop.readable(self._fd)
        except loop.Cancelled:
            if self._budget is None:
                raise
        finally:
            self._idle = False

    async def _offer(self, chunk: bytes) -> None:
        if self._log_only:
            self.withheld = True
            return
        try:
            await self._deliver(self.stream, chunk)
        except loop.Cancelled:
            if not self._log_only:
                raise
            self.withheld = True


def _pipe(size: int, directory: str, name: str) -> tuple[int, int]:
    """Return the read and the write end of a pipe that holds `size` bytes, or less where the host
    forbids more: pipe(7). It has a name where there is a directory.
    """
    ends = _fifo(os.path.join(directory, name)) if directory else os.pipe()
    with contextlib.suppress(OSError):
        fcntl.fcntl(ends[0], fcntl.F_SETPIPE_SZ, size)
    return ends


def _fifo(path: str) -> tuple[int, int]:
    os.mkfifo(path, 0o600)
    read = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    return read, os.open(path, os.O_WRONLY | os.O_CLOEXEC)


def _read(fd: int, size: int) -> bytes:
    """Read what is there; b"" at the end or when nothing is. EIO is how a terminal ends, see
    pty(7).
    """
    try:
        return os.read(fd, size)
    except BlockingIOError:
        return b""
    except OSError as error:
        if error.errno == errno.EIO:
            return b""
        raise


async def _write_some(fd: int, view: memoryview) -> memoryview:
    try:
        return view[os.write(fd, view) :]
    except BlockingIOError:
        await loop.writable(fd)
        return view


def _capacity(fd: int) -> int:
    """Return how many bytes a pipe holds at most; a terminal holds less than a chunk."""
    try:
        return fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ)
    except OSError:
        return _CHUNK
