# SPDX-License-Identifier: Apache-2.0
"""The client's side of SPDY/3.1, as moby/spdystream sends it: frames as bytes, and back."""

import struct
import zlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from cri_server.streaming import spdydict

SYN_STREAM, SYN_REPLY, RST_STREAM, SETTINGS, PING, GOAWAY, HEADERS, WINDOW_UPDATE = (
    1, 2, 3, 4, 6, 7, 8, 9,
)  # fmt: skip
FIN = 1


class Frame(NamedTuple):
    """A frame as it was received: `kind` 0 is data, whose `number` is the stream."""

    kind: int
    number: int
    flags: int
    payload: bytes


class Client:
    """Writes frames with one compressor, as a connection does."""

    def __init__(self) -> None:
        self._deflate = zlib.compressobj(zdict=spdydict.DICTIONARY)

    def block(self, headers: Mapping[str, str]) -> bytes:
        """Return a compressed header block."""
        text = struct.pack(">I", len(headers))
        for pair in headers.items():
            for word in pair:
                text += struct.pack(">I", len(word)) + word.encode("latin-1")
        return self._deflate.compress(text) + self._deflate.flush(zlib.Z_SYNC_FLUSH)

    def open(self, stream: int, headers: Mapping[str, str] | None = None, flags: int = 0) -> bytes:
        start = struct.pack(">IIBB", stream, 0, 0, 0)
        return control(SYN_STREAM, start + self.block(headers or {}), flags)


def control(kind: int, payload: bytes, flags: int = 0, *, version: int = 3) -> bytes:
    return struct.pack(">II", 1 << 31 | version << 16 | kind, flags << 24 | len(payload)) + payload


def data(stream: int, payload: bytes, flags: int = 0) -> bytes:
    return struct.pack(">II", stream, flags << 24 | len(payload)) + payload


def parse(text: bytes) -> Iterator[Frame]:
    """Split what a server has sent; it must end with a whole frame."""
    while text:
        first, second = struct.unpack_from(">II", text)
        length = second & 0xFFFFFF
        payload, text = text[8 : 8 + length], text[8 + length :]
        assert len(payload) == length
        if first >> 31:
            number = struct.unpack_from(">I", payload)[0] if len(payload) >= 4 else 0
            yield Frame(first & 0xFFFF, number, second >> 24, payload)
        else:
            yield Frame(0, first, second >> 24, payload)
