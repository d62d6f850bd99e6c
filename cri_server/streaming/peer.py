# SPDX-License-Identifier: Apache-2.0
"""A client of the streaming server, whatever it speaks: named streams to read and to write.

`spdypeer` and `wspeer` implement it; `remotecommand` and `portforward` know nothing of frames. What
a client sends is kept in a `Mailbox` for each stream, which has a bound: a full one stops the
reading from the socket, and thereby the client.
"""

import asyncio
from typing import Protocol

MAILBOX = 256 << 10  # bytes that wait in one stream until the client is held back
CREATION_TIMEOUT = 30.0  # seconds within which a client opens its streams, as with the peers


class Gone(Exception):
    """The client has left, or sent what cannot be understood."""


class Mailbox:
    """What a client has sent on one stream and nobody has read yet."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._size = 0
        self._ended = False
        self._changed = asyncio.Event()

    async def put(self, data: bytes) -> None:
        """Add data; wait while there is too much. Data after the end is dropped."""
        while self._size > MAILBOX and not self._ended:
            await self._wait()
        if data and not self._ended:
            self._parts.append(data)
            self._size += len(data)
            self._changed.set()

    def end(self) -> None:
        """Say that nothing more will come."""
        self._ended = True
        self._changed.set()

    def drop(self) -> None:
        """Forget what is here, and whatever comes: nobody reads any more."""
        self._parts.clear()
        self._size = 0
        self.end()

    async def get(self) -> bytes:
        """Return all that has come, b"" at the end."""
        while not self._parts:
            if self._ended:
                return b""
            await self._wait()
        data = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts.clear()
        self._size = 0
        self._changed.set()
        return data

    async def _wait(self) -> None:
        self._changed.clear()
        await self._changed.wait()


class Peer(Protocol):
    """A client with the streams of one exec or attach: stdin, stdout, stderr, error, resize."""

    version: int  # of the remote command protocol, 1 to 5: how errors are told
    closed: asyncio.Event  # set when the client has gone

    async def read(self, stream: str) -> bytes:
        """Return what the client sent next on a stream, b"" when it has ended."""

    async def write(self, stream: str, data: bytes) -> None:
        """Send data; returns when the client takes it. Raises Gone."""

    async def close(self) -> None:
        """End all streams, once everything is sent."""
