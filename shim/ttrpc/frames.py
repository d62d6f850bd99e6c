# SPDX-License-Identifier: Apache-2.0
"""ttrpc frames as bytes, without a socket (containerd/ttrpc, PROTOCOL.md).

     0       4        8    9    10
    ┌────────┬────────┬────┬────┬─────────────┐
    │ length │ stream │type│flag│ length bytes│     numbers are big-endian
    └────────┴────────┴────┴────┴─────────────┘

    type      flags on it                        payload
    REQUEST   none: unary                        Request
              REMOTE_OPEN: a stream, more comes
              REMOTE_CLOSED: a stream, no more
    RESPONSE  none; ends the stream              Response
    DATA      REMOTE_CLOSED: the last one        a message of the method
              NO_DATA: with the former, nothing

`Decoder` takes bytes in any pieces and gives frames. A frame over the limit comes out as
`Oversized` and its payload is thrown away as it arrives, so that one bad message does not cost the
connection.
"""

import struct
from typing import NamedTuple

HEADER_LENGTH = 10
MAX_PAYLOAD = 4 << 20

REQUEST = 1
RESPONSE = 2
DATA = 3

REMOTE_CLOSED = 0x1
REMOTE_OPEN = 0x2
NO_DATA = 0x4

_HEADER = struct.Struct(">IIBB")


class Frame(NamedTuple):
    """A whole frame."""

    stream: int
    type: int
    flags: int
    payload: bytes


class Oversized(NamedTuple):
    """A frame whose payload of `length` bytes is over the limit and is not kept."""

    stream: int
    type: int
    flags: int
    length: int


class TooLarge(ValueError):
    """We were asked to send a payload over the limit; nothing was sent."""


def encode(stream: int, kind: int, flags: int, payload: bytes) -> bytes:
    """Return the bytes of a frame. Raises TooLarge."""
    if len(payload) > MAX_PAYLOAD:
        raise TooLarge(f"message of {len(payload)} bytes is over the limit of {MAX_PAYLOAD}")
    return _HEADER.pack(len(payload), stream, kind, flags) + payload


class Decoder:
    """Feed with `receive`, then call `next` until it says None."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._discard = 0

    def receive(self, data: bytes) -> None:
        """Take bytes from the peer, of any number."""
        skipped = min(self._discard, len(data))
        self._discard -= skipped
        self._buffer += data[skipped:] if skipped else data

    def next(self) -> Frame | Oversized | None:
        """Return the next frame, None when more bytes are needed."""
        if len(self._buffer) < HEADER_LENGTH:
            return None
        length, stream, kind, flags = _HEADER.unpack_from(self._buffer)
        if length > MAX_PAYLOAD:
            self._drop(HEADER_LENGTH + length)
            return Oversized(stream, kind, flags, length)
        end = HEADER_LENGTH + length
        if len(self._buffer) < end:
            return None
        payload = bytes(memoryview(self._buffer)[HEADER_LENGTH:end])
        del self._buffer[:end]  # moves no bytes: a bytearray remembers its start
        return Frame(stream, kind, flags, payload)

    def _drop(self, count: int) -> None:
        self._discard = max(0, count - len(self._buffer))
        del self._buffer[:count]
