# SPDX-License-Identifier: Apache-2.0
"""A tar stream, read once, front to back, in bounded memory.

Layers come from strangers, and the archive reader of the standard library is a steady source of
escapes and endless loops. This one only reads: it turns headers into `Entry` values and hands out
file data. It never touches a file system, never seeks, and has a bound for everything whose length
the archive chooses. Old, ustar, GNU and pax headers are understood, GNU and pax sparse files too.
Where archives are ambiguous the reading is that of Go's archive/tar, which the other runtimes and
the registries' scanners use: a pax size wins over the header's, links and folders have no data,
global pax headers mean nothing.

    header (512) [x, L, K: about the next entry] ──► Entry ──► data ──► padding to 512 ──► ...
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from cri_server.images import tarheader

BLOCK = 512
MAX_EXTENSION = 1 << 20  # bytes of one pax header, as in Go
MAX_SPARSE_SEGMENTS = 1 << 16
MAX_SIZE = 1 << 62

Malformed = tarheader.Malformed


class TooBig(Exception):
    """A bound of ours was reached."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Bounds for one layer: entries, and bytes of the tar and of any file in it."""

    entries: int = 1_000_000
    bytes: int = 64 << 30


class Kind(StrEnum):
    FILE = "file"
    LINK = "hard link"
    SYMLINK = "symlink"
    CHAR = "character device"
    BLOCK_DEVICE = "block device"
    DIR = "folder"
    FIFO = "fifo"


_KINDS = {
    b"0": Kind.FILE,
    b"\0": Kind.FILE,
    b"7": Kind.FILE,
    b"S": Kind.FILE,
    b"1": Kind.LINK,
    b"2": Kind.SYMLINK,
    b"3": Kind.CHAR,
    b"4": Kind.BLOCK_DEVICE,
    b"5": Kind.DIR,
    b"6": Kind.FIFO,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One member. `name` and `target` are as the archive has them: not normalised, not trusted."""

    name: str
    kind: Kind
    target: str = ""
    mode: int
    uid: int
    gid: int
    size: int  # of the file; what the archive holds of it is the sum of the segments
    mtime: int  # nanoseconds since the epoch
    device: tuple[int, int] = (0, 0)
    xattrs: Mapping[str, bytes]
    segments: Sequence[tuple[int, int]] = ()  # (offset, length) of the data that the archive holds


class Source(Protocol):
    """Uncompressed bytes. All raise Malformed when they end too early."""

    def take(self, size: int) -> bytes:
        """Return exactly `size` bytes, or b"" at the very end."""

    def pieces(self, size: int) -> Iterator[memoryview]:
        """Yield exactly `size` bytes in pieces that are valid until the next one."""

    def skip(self, size: int) -> None:
        """Pass over exactly `size` bytes."""


class Reader:
    """Iterate over the entries; `data` gives the file data of the one that came last."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._unread = 0  # data of the current entry
        self._padding = 0

    def __iter__(self) -> Iterator[Entry]:
        """Yield entries until the end mark. Raises Malformed."""
        while (block := self._header()) is not None:
            yield self._entry(block)
            self._skip(self._unread + self._padding)

    def data(self, size: int) -> Iterator[memoryview]:
        """Yield the next `size` bytes of the current entry's data."""
        if size > self._unread:
            raise Malformed("data beyond the end of an entry")
        self._unread -= size
        return self._source.pieces(size)

    def _header(self) -> bytes | None:
        block = self._source.take(BLOCK)
        if not block:
            return None
        if block.count(0) == BLOCK:
            second = self._source.take(BLOCK)
            if second.count(0) != len(second):
                raise Malformed("a block of zeros in the middle")
            return None
        return block

    def _entry(self, block: bytes) -> Entry:
        """Read a header together with those that say more about it."""
        pax: dict[str, bytes] = {}
        while (flag := block[156:157]) in (b"x", b"g", b"L", b"K"):
            body = self._extension(block)
            if flag == b"x":
                pax = tarheader.parse_pax(body)
            elif flag in (b"L", b"K"):
                pax["path" if flag == b"L" else "linkpath"] = body.split(b"\0", 1)[0]
            following = self._header()
            if following is None:
                raise Malformed("the archive ends after an extended header")
            block = following
        return self._describe(tarheader.parse_header(block), pax, block)

    def _extension(self, block: bytes) -> bytes:
        size = tarheader.parse_header(block).size
        if size > MAX_EXTENSION:
            raise Malformed(f"extended header of {size} bytes")
        body = self._source.take(size) if size else b""
        if len(body) != size:
            raise Malformed("the archive ends in an extended header")
        self._skip(-size % BLOCK)
        return body

    def _skip(self, size: int) -> None:
        self._unread = self._padding = 0
        self._source.skip(size)

    def _describe(self, header: tarheader.Header, pax: Mapping[str, bytes], block: bytes) -> Entry:
        kind = _kind(header, pax)
        stored = tarheader.decimal(pax["size"]) if pax.get("size") else header.size
        if kind is not Kind.FILE:
            stored = 0
        if stored > MAX_SIZE:
            raise Malformed(f"a size of {stored}")
        self._unread, self._padding = stored, -stored % BLOCK
        size, segments = self._layout(header, pax, block, stored)
        return Entry(
            name=tarheader.text(pax.get("GNU.sparse.name") or pax.get("path") or header.name),
            kind=kind,
            target=tarheader.text(pax.get("linkpath") or header.target),
            mode=header.mode & 0o7777,
            uid=tarheader.decimal(pax["uid"]) if pax.get("uid") else header.uid,
            gid=tarheader.decimal(pax["gid"]) if pax.get("gid") else header.gid,
            size=size,
            mtime=_mtime(header, pax),
            device=header.device,
            xattrs={
                k[len(tarheader.XATTR) :]: v
                for k, v in pax.items()
                if k.startswith(tarheader.XATTR)
            },
            segments=segments,
        )

    def _layout(
        self, header: tarheader.Header, pax: Mapping[str, bytes], block: bytes, stored: int
    ) -> tuple[int, Sequence[tuple[int, int]]]:
        """Return the real size of a file and where its stored data goes."""
        if header.flag not in b"\x0007S":
            return 0, ()
        if header.flag == b"S":
            return self._old_sparse(block)
        if "GNU.sparse.major" in pax:
            return self._sparse_1_0(pax)
        if "GNU.sparse.map" in pax:
            numbers = [tarheader.decimal(n) for n in pax["GNU.sparse.map"].split(b",")]
            return self._sparse(numbers, tarheader.decimal(pax.get("GNU.sparse.size", b"")))
        if any(k.startswith("GNU.sparse.") for k in pax):
            raise Malformed("a sparse file without a map")
        return stored, ((0, stored),) if stored else ()

    def _old_sparse(self, block: bytes) -> tuple[int, Sequence[tuple[int, int]]]:
        """Read the map in the header and the blocks after it (GNU tar, "Old GNU Format")."""
        numbers = tarheader.octal_pairs(block[386:482])
        more, real = block[482], tarheader.number(block[483:495])
        while more:
            extension = self._source.take(BLOCK)
            numbers += tarheader.octal_pairs(extension[:504]) if extension else [0]
            more = extension[504] if extension else 0
            _check_segments(numbers)
        return self._sparse(numbers, real)

    def _sparse_1_0(self, pax: Mapping[str, bytes]) -> tuple[int, Sequence[tuple[int, int]]]:
        """Read the map in front of the data: decimal lines, padded to a block."""
        if (pax["GNU.sparse.major"], pax.get("GNU.sparse.minor")) != (b"1", b"0"):
            raise Malformed("sparse file of an unknown version")
        text, wanted = b"", 1
        while text.count(b"\n") < wanted:
            text += b"".join(bytes(p) for p in self.data(BLOCK))
            if wanted == 1 and b"\n" in text:
                wanted = 1 + 2 * tarheader.decimal(text.split(b"\n", 1)[0])
            if wanted > 2 * MAX_SPARSE_SEGMENTS or len(text) > MAX_EXTENSION:
                raise Malformed("too many segments in a sparse file")
        numbers = [tarheader.decimal(n) for n in text.split(b"\n")[1:wanted]]
        return self._sparse(numbers, tarheader.decimal(pax.get("GNU.sparse.realsize", b"")))

    def _sparse(self, numbers: list[int], real: int) -> tuple[int, Sequence[tuple[int, int]]]:
        _check_segments(numbers)
        segments = list(zip(numbers[::2], numbers[1::2], strict=True))
        end = 0
        for offset, length in segments:
            if offset < end or length < 0 or offset + length > real:
                raise Malformed("the segments of a sparse file overlap or leave it")
            end = offset + length
        if real > MAX_SIZE or sum(length for _, length in segments) != self._unread:
            raise Malformed("a sparse file whose data does not match its map")
        return real, segments


def _kind(header: tarheader.Header, pax: Mapping[str, bytes]) -> Kind:
    kind = _KINDS.get(header.flag)
    if kind is None:
        raise Malformed(f"an entry of unknown type {header.flag!r}")
    if header.flag == b"\0" and (pax.get("path") or header.name).endswith(b"/"):
        return Kind.DIR  # before POSIX there was no type for it
    return kind


def _mtime(header: tarheader.Header, pax: Mapping[str, bytes]) -> int:
    """Return nanoseconds; a time that 64 bits of them cannot say is the epoch, as in containerd."""
    said = pax.get("mtime")
    mtime = tarheader.nanoseconds(said) if said else header.mtime * 10**9
    return mtime if -(1 << 63) <= mtime < 1 << 63 else 0


def _check_segments(numbers: Sequence[int]) -> None:
    if len(numbers) % 2 or len(numbers) > 2 * MAX_SPARSE_SEGMENTS:
        raise Malformed("an odd number of values, or too many, in the map of a sparse file")
