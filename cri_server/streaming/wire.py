# SPDX-License-Identifier: Apache-2.0
"""Bytes to and from a client: a socket, or SPDY inside the messages of a WebSocket.

`Wire` is what `spdylink` and `wspeer` stand on. Writers wait for each other and until the client
takes what it is sent; a reader that waits too long, while nothing is sent either, is ended.
"""

import asyncio
import contextlib
import select
import socket
from typing import Protocol

from cri_server.streaming import peer

READ = 256 << 10  # bytes that are read at once
_KEEPALIVE = {socket.TCP_KEEPIDLE: 60, socket.TCP_KEEPINTVL: 15, socket.TCP_KEEPCNT: 4}  # tcp(7)
_GONE = select.POLLRDHUP | select.POLLHUP | select.POLLERR


class Wire(Protocol):
    """A connection in both directions."""

    async def read(self) -> bytes:
        """Return what comes next, b"" at the end. Raises OSError, TimeoutError, Gone."""

    async def write(self, data: bytes) -> None:
        """Send; returns when the client takes it. Raises Gone."""

    async def finish(self) -> None:
        """Say that nothing more will be sent, where that can be said."""

    def look(self) -> None:
        """See whether the client is still there, while nothing is read. Raises Gone,
        TimeoutError.
        """

    def abort(self) -> None:
        """End it now; what was written and not sent is lost."""


class Socket:
    """A TCP or TLS connection; `seconds` of silence both ways end it, and a client whose machine
    has vanished within two minutes.
    """

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, seconds: float
    ) -> None:
        self._reader, self._writer, self._seconds = reader, writer, seconds
        self._writing = asyncio.Lock()
        self._loop = asyncio.get_running_loop()
        self._active = self._loop.time()
        self._timer = self._loop.call_later(seconds, self._watch)
        self._socket: socket.socket = writer.get_extra_info("socket")
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE.items():
            self._socket.setsockopt(socket.IPPROTO_TCP, option, value)

    async def read(self) -> bytes:
        self._active = self._loop.time()
        return await self._reader.read(READ)

    def _watch(self) -> None:
        """End the reading after too long a silence; else look again when that can be.

        One timer for many reads: a deadline for each would cost more than the read.
        """
        try:
            self._timer = self._loop.call_later(self._left(), self._watch)
        except TimeoutError as e:
            self._reader.set_exception(e)

    def _left(self) -> float:
        """Return the seconds that silence may still last. Raises TimeoutError when it may not."""
        left = self._active + self._seconds - self._loop.time()
        if left <= 0:
            raise TimeoutError("the client was silent for too long")
        return left

    async def write(self, data: bytes) -> None:
        async with self._writing:
            self._active = self._loop.time()
            self._writer.write(data)
            try:
                await self._writer.drain()
            except OSError as e:
                raise peer.Gone from e

    async def finish(self) -> None:
        """Half-close: closing a socket with unread input would reset it, and the client could lose
        the last of our output.
        """
        with contextlib.suppress(OSError):
            if self._writer.can_write_eof():  # TLS cannot
                self._writer.write_eof()

    def look(self) -> None:
        """Ask the kernel: a transport that does not read does not see the end either."""
        self._left()
        poll = select.poll()
        try:
            poll.register(self._socket.fileno(), _GONE)
        except ValueError as e:  # it is closed
            raise peer.Gone from e
        if poll.poll(0):
            raise peer.Gone

    def abort(self) -> None:
        self._timer.cancel()
        self._writer.transport.abort()
