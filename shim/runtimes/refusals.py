# SPDX-License-Identifier: Apache-2.0
"""containerd's gRPC socket as shims may want it: there, and without any service.

    containerd-shim-x ──gRPC: any call──► Conversation ──► UNIMPLEMENTED

A shim is told its address (`-address`, GRPC_ADDRESS). Those of runwasi connect before they make a
container and give up if nobody listens; that nothing can be asked there is no loss to them (they
want precompiled layers from containerd's content store, else they take the files of the image).

HTTP/2 (RFC 9113) as far as that goes: frames are read, headers are not. Every request gets the same
answer, which begins no table of HPACK (RFC 7541), and so nothing has to be remembered of a client.
"""

import os
import socket
import struct

from shim import loop
from shim.ttrpc import server

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_HEAD = struct.Struct(">BHBBI")  # a length of three bytes, type, flags, stream
_MAX_FRAME = 1 << 14  # of a peer that has not been told otherwise
_CHUNK = 1 << 16
_STREAM = (1 << 31) - 1  # the bit above is reserved

DATA, HEADERS, SETTINGS, PING, WINDOW_UPDATE, CONTINUATION = 0, 1, 4, 6, 8, 9
ACK, END_STREAM, END_HEADERS = 0x1, 0x1, 0x4


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Return the bytes of a frame."""
    high, low = divmod(len(payload), 1 << 16)
    return _HEAD.pack(high, low, kind, flags, stream) + payload


def _literal(name: bytes, value: bytes) -> bytes:
    return bytes((0, len(name))) + name + bytes((len(value),)) + value


# :status 200 is number 8 of HPACK's static table.
UNIMPLEMENTED = (
    b"\x88"
    + _literal(b"content-type", b"application/grpc")
    + _literal(b"grpc-status", b"12")
    + _literal(b"grpc-message", b"no containerd here: a pod's shim listens")
)


class Garbage(ValueError):
    """The peer does not speak HTTP/2; the connection is of no more use."""


class Conversation:
    """One connection, as bytes: give `receive` what came, and send what it returns."""

    def __init__(self) -> None:
        self._buffer = b""
        self._begun = False
        self._last = 0  # the newest stream that was answered

    def receive(self, data: bytes) -> bytes:
        """Take bytes of any number and return the answer. Raises Garbage."""
        self._buffer += data
        answer = self._begin()
        while self._begun and (found := self._next()):
            answer += self._answer(*found)
        return answer

    def _begin(self) -> bytes:
        if self._begun:
            return b""
        if self._buffer[: len(_PREFACE)] != _PREFACE[: len(self._buffer)]:
            raise Garbage(f"{self._buffer[:24]!r} is no preface")
        if len(self._buffer) < len(_PREFACE):
            return b""
        self._buffer = self._buffer[len(_PREFACE) :]
        self._begun = True
        return frame(SETTINGS, 0, 0)

    def _next(self) -> tuple[int, int, int, bytes] | None:
        """Return type, flags, stream and payload of the next frame, None when more must come."""
        if len(self._buffer) < _HEAD.size:
            return None
        high, low, kind, flags, stream = _HEAD.unpack_from(self._buffer)
        length = (high << 16) + low
        if length > _MAX_FRAME:
            raise Garbage(f"a frame of {length} bytes")
        end = _HEAD.size + length
        if len(self._buffer) < end:
            return None
        payload, self._buffer = self._buffer[_HEAD.size : end], self._buffer[end:]
        return kind, flags, stream & _STREAM, payload

    def _answer(self, kind: int, flags: int, stream: int, payload: bytes) -> bytes:
        if kind in (SETTINGS, PING) and not flags & ACK:
            return frame(kind, ACK, 0, payload if kind == PING else b"")
        if kind == DATA and payload:  # let it send as much again
            return frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", len(payload)))
        if kind in (HEADERS, CONTINUATION) and flags & END_HEADERS and stream > self._last:
            self._last = stream
            return frame(HEADERS, END_HEADERS | END_STREAM, stream, UNIMPLEMENTED)
        return b""


async def serve(listener: socket.socket) -> None:
    """Refuse whatever is asked on a listening socket until cancelled, and close it."""
    with listener:
        await server.accept(listener, _connect)


def _connect(accepted: int) -> None:
    os.set_blocking(accepted, False)
    loop.spawn(_converse(accepted), name="gRPC connection")


async def _converse(fd: int) -> None:
    conversation = Conversation()
    try:
        while data := await _receive(fd):
            await _send(fd, conversation.receive(data))
    except (Garbage, ConnectionError):
        return
    finally:
        loop.close(fd)


async def _receive(fd: int) -> bytes:
    await loop.readable(fd)
    return os.read(fd, _CHUNK)


async def _send(fd: int, data: bytes) -> None:
    unsent = memoryview(data)
    while unsent:
        try:
            unsent = unsent[os.write(fd, unsent) :]
        except BlockingIOError:
            await loop.writable(fd)
