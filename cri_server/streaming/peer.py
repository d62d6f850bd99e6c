# SPDX-License-Identifier: Apache-2.0
"""A client of the streaming server, whatever it speaks: named streams to read and to write.

`spdypeer` and `wspeer` implement it; `remotecommand` and `portforward` know nothing of frames. What
a client sends is kept in a `Mailbox` for each stream, which has a bound: a full one stops the
reading from the socket, and thereby the client.
"""

import asyncio
from collections.abc import Callable
from typing import Protocol

MAILBOX = 256 << 10  # bytes that wait in one stream until the client is held back
ROOM = 4 << 20  # bytes that wait in all streams of a connection
LOOK_EVERY = 1.0  # seconds between looks whether a client that is held back is still there
_PART = 64  # bytes that a part takes besides its data: many small ones fill a mailbox, too
CREATION_TIMEOUT = 30.0  # seconds within which a client opens its streams, as with the peers


class Gone(Exception):
    """The client has left, or sent what cannot be understood."""


class Room:
    """What all mailboxes of a connection hold together."""

    def __init__(self) -> None:
        self.used = 0
        self._freed = asyncio.Event()

    def take(self, size: int) -> None:
        self.used += size

    def free(self, size: int) -> None:
        self.used -= size
        self._freed.set()

    async def wait(self) -> None:
        """Return when something was freed, or after a second."""
        self._freed.clear()
        try:
            async with asyncio.timeout(LOOK_EVERY):
                await self._freed.wait()
        except TimeoutError:
            return


class Mailbox:
    """What a client has sent on one stream and nobody has read yet. `look` is called each second
    while the client is held back, and may raise: nobody reads from its socket then, so nobody would
    see it leave.
    """

    def __init__(self, room: Room | None = None, look: Callable[[], None] | None = None) -> None:
        self._room, self._look = room or Room(), look
        self._parts: list[bytes] = []
        self._size = 0
        self._ended = False
        self._changed = asyncio.Event()

    async def put(self, data: bytes) -> None:
        """Add data; wait while there is too much. Data after the end is dropped."""
        while (self._size > MAILBOX or self._room.used > ROOM) and not self._ended:
            if self._look:
                self._look()
            await self._room.wait()
        if data and not self._ended:
            self._parts.append(data)
            self._count(len(data) + _PART)
            self._changed.set()

    def end(self) -> None:
        """Say that nothing more will come."""
        self._ended = True
        self._changed.set()
        self._room.free(0)

    def drop(self) -> None:
        """Forget what is here, and whatever comes: nobody reads any more."""
        self._parts.clear()
        self._count(-self._size)
        self.end()

    async def get(self) -> bytes:
        """Return all that has come, b"" at the end."""
        while not self._parts:
            if self._ended:
                return b""
            self._changed.clear()
            await self._changed.wait()
        data = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts.clear()
        self._count(-self._size)
        return data

    def _count(self, size: int) -> None:
        self._size += size
        if size > 0:
            self._room.take(size)
        else:
            self._room.free(-size)


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
