# SPDX-License-Identifier: Apache-2.0
"""The headers of a tar archive: 512 bytes, and the pax records about the next entry. Pure.

Numbers are octal digits, or base-256 where the first bit is set (GNU, star); in pax records they
are decimal. Nothing is trusted: a number is one, or the archive is refused.
"""

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass

PATH_MAX = 4096  # path_resolution(7), the final NUL counts

_HEADER = struct.Struct("100s8s8s8s12s12s8s1s100s8s32s32s8s8s155s12x")
XATTR = "SCHILY.xattr."
_PAX_KEYS = frozenset({"path", "linkpath", "size", "uid", "gid", "mtime"})
_SPARSE_0_0 = ("GNU.sparse.offset", "GNU.sparse.numbytes")  # keys that take turns


class Malformed(Exception):
    """The archive is not one, or not one that we accept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """The 512 bytes in front of an entry, as they are."""

    flag: bytes
    name: bytes
    target: bytes
    mode: int
    uid: int
    gid: int
    size: int
    mtime: int
    device: tuple[int, int]


def parse_header(block: bytes) -> Header:
    """Parse a header block. Raises Malformed for a wrong checksum or number."""
    fields = _HEADER.unpack(block)
    name, mode, uid, gid, size, mtime, checksum, flag, target, magic = fields[:10]
    if sum(block) - sum(checksum) + 8 * 0x20 != number(checksum):
        raise Malformed("wrong checksum of a header")
    name = name.split(b"\0", 1)[0]
    if prefix := _prefix(magic, fields[14]):
        name = prefix + b"/" + name
    stored = number(size)
    if stored < 0:
        raise Malformed("a negative size")
    return Header(
        flag=flag,
        name=name,
        target=target.split(b"\0", 1)[0],
        mode=number(mode),
        uid=number(uid),
        gid=number(gid),
        size=stored,
        mtime=number(mtime),
        device=_device(fields[12], fields[13]) if flag in b"34" else (0, 0),
    )


def parse_pax(body: bytes) -> dict[str, bytes]:
    """Parse "<length> <key>=<value>\\n" records, and keep those that mean something here."""
    records: dict[str, bytes] = {}
    sparse: list[tuple[str, bytes]] = []
    position = 0
    while position < len(body):
        blank = body.find(b" ", position, position + 20)
        length = decimal(body[position:blank]) if blank > 0 else 0
        end = position + length
        if length <= blank - position + 1 or end > len(body) or body[end - 1] != 0x0A:
            raise Malformed("a pax record with a wrong length")
        key, equals, value = body[blank + 1 : end - 1].partition(b"=")
        if not equals:
            raise Malformed("a pax record without a value")
        name = text(key)
        if name in _SPARSE_0_0:
            sparse.append((name, value))
        elif name in _PAX_KEYS or name.startswith((XATTR, "GNU.sparse.")):
            records[name] = value
        position = end
    if sparse:
        records["GNU.sparse.map"] = _map(sparse)
    return records


def _map(records: Sequence[tuple[str, bytes]]) -> bytes:
    """Return the map of a sparse file in the format 0.0 as 0.1 writes it.

    Source: GNU tar, "PAX Format, Version 0.0" and "0.1".
    """
    if any(key != _SPARSE_0_0[at % 2] for at, (key, _) in enumerate(records)):
        raise Malformed("the map of a sparse file is not one")
    return b",".join(b"%d" % decimal(value) for _, value in records)


def _prefix(magic: bytes, field: bytes) -> bytes:
    """Return what stands in front of a name.

    GNU has times there; but Go wrote a prefix into such headers until 1.8, and reads it where the
    times are none.
    """
    if magic == b"ustar\x0000":
        return field.split(b"\0", 1)[0]
    if magic != b"ustar  \0":
        return b""
    try:
        number(field[:12])
        number(field[12:24])
    except Malformed:
        prefix = field.split(b"\0", 1)[0]
        return prefix if prefix.isascii() else b""
    return b""


def text(value: bytes) -> str:
    if b"\0" in value or len(value) >= PATH_MAX:
        raise Malformed("a name with NUL, or too long")
    return os.fsdecode(value)


def _device(major: bytes, minor: bytes) -> tuple[int, int]:
    numbers = number(major), number(minor)
    if not all(0 <= n < 1 << 20 for n in numbers):
        raise Malformed("a device number out of range")
    return numbers


def number(field: bytes) -> int:
    """Parse octal digits, or the base-256 form of GNU and star (first bit set)."""
    if field[0] & 0x80:
        bits = 8 * len(field) - 1
        value = int.from_bytes(field, "big") & (1 << bits) - 1
        return value - (1 << bits) if field[0] & 0x40 else value
    text = field.strip(b" \0").split(b"\0", 1)[0]
    if text.strip(b"01234567"):
        raise Malformed("a number that is not one")
    return int(text or b"0", 8)


def octal_pairs(fields: bytes) -> list[int]:
    """Return offset, length, offset, length, ... up to the first that is not used."""
    numbers: list[int] = []
    for at in range(0, len(fields) - 23, 24):
        if not fields[at]:
            break
        numbers += [number(fields[at : at + 12]), number(fields[at + 12 : at + 24])]
    return numbers


def decimal(text: bytes) -> int:
    if not text.isdigit() or len(text) > 20:
        raise Malformed("a pax number that is not one")
    return int(text)


def nanoseconds(text: bytes) -> int:
    """Parse decimal seconds without the rounding of a float."""
    whole, _, fraction = text.removeprefix(b"-").partition(b".")
    if len(fraction) > 100 or (fraction and not fraction.isdigit()):
        raise Malformed("a pax time that is not one")
    value = decimal(whole) * 10**9 + int(fraction[:9].ljust(9, b"0"))
    return -value if text.startswith(b"-") else value
