# SPDX-License-Identifier: Apache-2.0
"""Bytes to and from a client: a socket, or SPDY inside the messages of a WebSocket.

`Wire` is what `spdylink` and `wspeer` stand on. Writers wait for each other and until the client
takes what it is sent; a reader that waits too long, while nothing is sent either, is ended.
"""

import asyncio
import contextlib
import fcntl
import select
import socket
import struct
import sys
import termios
from collections.abc import AsyncIterator, Iterable
from typing import Protocol, TypeVar

from cri_server.streaming import peer

E = TypeVar("E")

READ = 256 << 10  # bytes that are read at once
LINGER = 5.0  # seconds for a client to leave that has all that we sent
_TURN = 64  # frames of a client that are handled until others have their turn
_PROBES = 4  # of keepalive, tcp(7)
_INFO = struct.Struct("=8x16xI28xI")  # linux/tcp.h: tcpi_unacked, tcpi_last_ack_recv
_GONE = select.POLLRDHUP | select.POLLHUP | select.POLLERR


class Wire(Protocol):
    """A connection in both directions."""

    async def read(self) -> bytes:
        """Return what comes next, b"" at the end. Raises OSError, TimeoutError, Gone."""

    async def write(self, data: bytes) -> None:
        """Send; returns when the client takes it. Raises Gone."""

    async def finish(self) -> None:
        """Say that nothing more will be sent, where that can be said."""

    def pending(self) -> bool:
        """Say whether the client's machine has not yet taken all that was written."""

    def look(self) -> None:
        """See whether the client is still there, while nothing is read. Raises Gone,
        TimeoutError.
        """

    def abort(self) -> None:
        """End it now; what was written and not sent is lost."""


class Socket:
    """A TCP or TLS connection; `seconds` of silence both ways end it, and a client whose machine
    acknowledges nothing for `vanished` seconds.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        seconds: float,
        vanished: float,
    ) -> None:
        self._reader, self._writer = reader, writer
        self._seconds, self._vanished = seconds, vanished
        self._writing = asyncio.Lock()
        self._finished = False
        self._loop = asyncio.get_running_loop()
        self._active = self._loop.time()
        self._timer = self._loop.call_later(seconds, self._watch)
        self._socket: socket.socket = writer.get_extra_info("socket")
        _keep_alive(self._socket, vanished)
        self._pulse = self._loop.call_later(vanished / 4, self._feel)

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

    def _feel(self) -> None:
        """End it when what was sent is not acknowledged. Keepalive says nothing while something is
        on its way, and the kernel alone would try for a quarter of an hour; a client that is only
        slow acknowledges.
        """
        unacknowledged, since = _acknowledgement(self._socket)
        if unacknowledged and since > self._vanished:
            self._writer.transport.abort()
        else:
            self._pulse = self._loop.call_later(self._vanished / 4, self._feel)

    def _left(self) -> float:
        """Return the seconds that silence may still last. Raises TimeoutError when it may not."""
        left = self._active + self._seconds - self._loop.time()
        if left <= 0:
            raise TimeoutError("the client was silent for too long")
        return left

    async def write(self, data: bytes) -> None:
        async with self._writing:
            if self._finished:
                raise peer.Gone
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
        self._finished = True
        with contextlib.suppress(OSError):
            if self._writer.can_write_eof():  # TLS cannot
                self._writer.write_eof()

    def pending(self) -> bool:
        return self._writer.transport.get_write_buffer_size() > 0 or _unsent(self._socket) > 0

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
        self._pulse.cancel()
        self._writer.transport.abort()


async def in_turns(events: Iterable[E]) -> AsyncIterator[E]:
    """Yield events, and let others run between: one read may hold thousands of small frames."""
    for number, event in enumerate(events, start=1):
        yield event
        if number % _TURN == 0:
            await asyncio.sleep(0)


async def linger(below: Wire, reading: "asyncio.Task[None]") -> None:
    """Wait for the client to leave, which ends `reading`: as long as it has not yet taken all that
    was sent, and then a few seconds. What was not taken would be lost with the connection.
    """
    loop = asyncio.get_running_loop()
    until = loop.time() + LINGER
    while not reading.done() and (now := loop.time()) < until:
        if below.pending():
            until = now + LINGER
        await asyncio.wait([reading], timeout=min(peer.LOOK_EVERY, until - now))


def _keep_alive(connection: socket.socket, seconds: float) -> None:
    """Have the kernel ask a silent peer, and give it up after `seconds`; whole seconds, tcp(7)."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    idle, interval = max(1, int(seconds / 2)), max(1, int(seconds / 2 / _PROBES))
    for option, value in (
        (socket.TCP_KEEPIDLE, idle),
        (socket.TCP_KEEPINTVL, interval),
        (socket.TCP_KEEPCNT, _PROBES),
    ):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)


def _acknowledgement(connection: socket.socket) -> tuple[int, float]:
    """Return how many segments are on their way, and the seconds since the peer acknowledged
    anything. (0, 0.0) for a connection that is closed.
    """
    try:
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO.size)
    except OSError:
        return 0, 0.0
    unacknowledged, milliseconds = _INFO.unpack(info)
    return unacknowledged, milliseconds / 1000


def _unsent(connection: socket.socket) -> int:
    """Return how many bytes the peer's kernel has not acknowledged: SIOCOUTQ, tcp(7). 0 for a
    connection that is closed.
    """
    try:
        left = fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, bytes(4))
    except (OSError, ValueError):
        return 0
    return int.from_bytes(left, sys.byteorder)
