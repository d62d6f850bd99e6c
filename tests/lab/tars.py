# SPDX-License-Identifier: Apache-2.0
"""Layers byte by byte: honest ones, and those that no tool would write.

`tarfile` refuses or repairs most of what a hostile layer needs, so headers are made by hand here.
"""

import hashlib
from collections.abc import Mapping

BLOCK = 512
END = bytes(2 * BLOCK)


def header(
    name: str,
    kind: bytes = b"0",
    *,
    size: int = 0,
    target: str = "",
    mode: int = 0o644,
    uid: int = 0,
    gid: int = 0,
    mtime: int = 0,
    device: tuple[int, int] = (0, 0),
    raw: Mapping[int, bytes] | None = None,
) -> bytes:
    """Return a ustar header with a right checksum; `raw` is laid over it first."""
    block = bytearray(BLOCK)
    fields = (
        (0, name.encode("utf-8", "surrogateescape")[:100]),
        (100, b"%07o\0" % mode),
        (108, number(uid, 8)),
        (116, number(gid, 8)),
        (124, number(size, 12)),
        (136, number(mtime, 12)),
        (156, kind),
        (157, target.encode()[:100]),
        (257, b"ustar\x0000"),
        (329, number(device[0], 8)),
        (337, number(device[1], 8)),
    )
    for at, value in (*fields, *(raw or {}).items()):
        block[at : at + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def number(value: int, width: int) -> bytes:
    """Return octal digits, or the base-256 form of GNU for what does not fit."""
    if 0 <= value < 8 ** (width - 1):
        return b"%0*o\0" % (width - 1, value)
    bits = (value + (1 << 8 * width)) % (1 << 8 * width) | 0x80 << 8 * (width - 1)
    return bits.to_bytes(width, "big")


def padded(data: bytes) -> bytes:
    """Return data as it stands in an archive."""
    return data + bytes(-len(data) % BLOCK)


def file(name: str, data: bytes = b"", **fields: object) -> bytes:
    """Return a regular file."""
    return header(name, size=len(data), **fields) + padded(data)  # type: ignore[arg-type]


def folder(name: str, mode: int = 0o755, **fields: object) -> bytes:
    return header(name, b"5", mode=mode, **fields)  # type: ignore[arg-type]


def symlink(name: str, target: str) -> bytes:
    return header(name, b"2", target=target, mode=0o777)


def link(name: str, target: str) -> bytes:
    return header(name, b"1", target=target)


def whiteout(name: str) -> bytes:
    parent, slash, base = name.rpartition("/")
    return file(f"{parent}{slash}.wh.{base}")


def opaque(name: str) -> bytes:
    return file(f"{name}/.wh..wh..opq" if name else ".wh..wh..opq")


def pax(records: Mapping[str, bytes | str], entry: bytes) -> bytes:
    """Return an entry with a pax header in front of it."""
    body = b"".join(_record(k.encode(), v) for k, v in records.items())
    return header("pax", b"x", size=len(body)) + padded(body) + entry


def _record(key: bytes, value: bytes | str) -> bytes:
    text = b" " + key + b"=" + (value.encode() if isinstance(value, str) else value) + b"\n"
    length = len(text) + 1
    while len(str(length)) + len(text) != length:
        length += 1
    return str(length).encode() + text


def archive(*entries: bytes) -> bytes:
    """Return a whole archive."""
    return b"".join(entries) + END


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"
