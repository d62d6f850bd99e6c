# SPDX-License-Identifier: Apache-2.0
"""A ttrpc client on asyncio, for the server's side; a shim never imports it.

Any number of calls share a `Connection`. A lost connection ends them all with Unavailable and sets
`closed`; it is never opened again by itself. A stream should have a connection of its own: when its
reader is slow the connection is not read, which is all the flow control that ttrpc has.
"""

import asyncio
import itertools
import socket
from collections import deque
from typing import Generic, TypeVar

from google.protobuf.message import DecodeError, Message

from shim import errors
from shim.pb import ttrpc_pb2
from shim.ttrpc import address, frames

R = TypeVar("R", bound=Message)

_INBOX = 16  # messages of a stream that wait for their reader


class Connection:
    """A connection to one server. `closed` is done when it is lost or was closed."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.closed: asyncio.Future[None] = loop.create_future()
        self._numbers = itertools.count(1, 2)  # clients have the odd ones
        self._calls: dict[int, asyncio.Future[ttrpc_pb2.Response]] = {}
        self._streams: dict[int, _Inbox] = {}
        self._wire = _Wire(self)

    @classmethod
    async def connect(cls, path: str) -> "Connection":
        """Connect to a unix socket. Raises Unavailable when nobody serves it; ResourceExhausted and
        DeadlineExceeded say nothing about that.
        """
        connection = cls()
        loop = asyncio.get_running_loop()
        try:
            connected = _connect(path)
            await loop.create_unix_connection(lambda: connection._wire, sock=connected)
        except OSError as error:
            raise errors.of_the_other(error, path) from error
        return connection

    async def call(
        self,
        service: str,
        method: str,
        request: Message,
        response: type[R],
        timeout: float | None = None,
    ) -> R:
        """Make a unary call; `timeout` in seconds. Raises ShimError of the code that came back.

        A call that is cancelled or late goes on in the server; its answer is dropped.
        """
        future: asyncio.Future[ttrpc_pb2.Response] = asyncio.get_running_loop().create_future()
        envelope = ttrpc_pb2.Request(
            service=service,
            method=method,
            payload=request.SerializeToString(),
            timeout_nano=int((timeout or 0) * 1e9),
        )
        number = next(self._numbers)
        self._calls[number] = future
        try:
            async with asyncio.timeout(timeout):
                await self.send(number, frames.REQUEST, 0, envelope.SerializeToString())
                answer = await future
        except TimeoutError:
            if future.cancelled() or not future.done():  # else both came while we were stopped
                raise errors.DeadlineExceeded(f"{method}: no answer in {timeout} s") from None
            answer = future.result()
        finally:
            del self._calls[number]
        _raise_for(answer)
        return _parse(response, answer.payload)

    async def stream(self, service: str, method: str, response: type[R]) -> "Stream[R]":
        """Start a streaming call."""
        number = next(self._numbers)
        inbox = self._streams[number] = _Inbox(self._wire)
        envelope = ttrpc_pb2.Request(service=service, method=method)
        payload = envelope.SerializeToString()
        await self.send(number, frames.REQUEST, frames.REMOTE_OPEN, payload)
        return Stream(self, number, inbox, response)

    def close(self) -> None:
        """Close at once; what is in progress gets Unavailable."""
        self._wire.abort()

    async def send(self, number: int, kind: int, flags: int, payload: bytes) -> None:
        """Send a frame and wait while the socket is full. Raises InvalidArgument over the limit."""
        try:
            data = frames.encode(number, kind, flags, payload)
        except frames.TooLarge as error:
            raise errors.InvalidArgument(str(error)) from error
        await self._wire.write(data)

    def forget(self, number: int) -> None:
        """Drop what still comes for a stream."""
        self._streams.pop(number, None)

    def deliver(self, frame: frames.Frame | frames.Oversized) -> None:
        """Hand an incoming frame to whom it belongs; one that nobody waits for is dropped."""
        call = self._calls.get(frame.stream)
        inbox = self._streams.get(frame.stream)
        if call is not None and not call.done():
            call.set_result(_response(frame))
        elif inbox is not None:
            inbox.put(frame)

    def lost(self, error: Exception | None) -> None:
        """End everything that is in progress."""
        reason = f"connection to the shim lost: {error or 'closed'}"
        for call in self._calls.values():
            if not call.done():
                call.set_exception(errors.Unavailable(reason))
        for inbox in self._streams.values():
            inbox.put(errors.Unavailable(reason))
        if not self.closed.done():
            self.closed.set_result(None)


class Stream(Generic[R]):
    """A streaming call. One task sends and one receives; closing its connection ends it."""

    def __init__(
        self, connection: Connection, number: int, inbox: "_Inbox", response: type[R]
    ) -> None:
        self._connection = connection
        self._number = number
        self._inbox = inbox
        self._response = response

    async def send(self, message: Message) -> None:
        """Send a message; waits while the shim does not read. Raises Unavailable."""
        payload = message.SerializeToString()
        await self._connection.send(self._number, frames.DATA, 0, payload)

    async def finish(self) -> None:
        """Say that no more will be sent; what was is received before. Raises Unavailable."""
        flags = frames.REMOTE_CLOSED | frames.NO_DATA
        await self._connection.send(self._number, frames.DATA, flags, b"")

    async def recv(self) -> R | None:
        """Return the next message, None at the end. Raises ShimError when the call failed."""
        item = await self._inbox.get()
        if isinstance(item, bytes):
            return _parse(self._response, item)
        self._connection.forget(self._number)
        if item is not None:
            raise item
        return None


class _Inbox:
    """What came for a stream: payloads, then None or an error for the end, which stays."""

    def __init__(self, wire: "_Wire") -> None:
        self._wire = wire
        self._items: deque[bytes | Exception | None] = deque()
        self._arrived = asyncio.Event()

    def put(self, item: "frames.Frame | frames.Oversized | Exception") -> None:
        if isinstance(item, Exception):
            self._items.append(item)
        elif isinstance(item, frames.Oversized) or item.type == frames.RESPONSE:
            self._items.append(_outcome(_response(item)))
        else:
            if not item.flags & frames.NO_DATA:
                self._items.append(item.payload)
            if item.flags & frames.REMOTE_CLOSED:
                self._items.append(None)
        self._arrived.set()
        if len(self._items) >= _INBOX:
            self._wire.pause()

    async def get(self) -> bytes | Exception | None:
        while not self._items:
            self._arrived.clear()
            await self._arrived.wait()
        if not isinstance(self._items[0], bytes):
            return self._items[0]
        if len(self._items) <= _INBOX:
            self._wire.resume()
        return self._items.popleft()


class _Wire(asyncio.Protocol):
    """The socket: bytes to frames, and asyncio's two signals of back-pressure to one each."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._decoder = frames.Decoder()
        self._transport: asyncio.Transport | None = None
        self._writable = asyncio.Event()
        self._writable.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - for the type checker
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._decoder.receive(data)
        while frame := self._decoder.next():
            self._connection.deliver(frame)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._writable.set()
        self._connection.lost(exc)

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    async def write(self, data: bytes) -> None:
        """Write a whole frame; returns when the buffer is low again."""
        if self._transport is None:
            raise errors.Unavailable("connection to the shim lost")
        self._transport.write(data)
        await self._writable.wait()

    def pause(self) -> None:
        if self._transport is not None:
            self._transport.pause_reading()

    def resume(self) -> None:
        if self._transport is not None:
            self._transport.resume_reading()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()


def _connect(path: str) -> socket.socket:
    """Return a connected socket. Not by asyncio, which takes a full queue (EAGAIN, unix(7)) for a
    connection in progress, and then for one that was lost.
    """
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        with address.usable(path) as name:
            made.connect(name)
    except BaseException:
        made.close()
        raise
    return made


def _response(frame: frames.Frame | frames.Oversized) -> ttrpc_pb2.Response:
    """Return the response in a frame; one that cannot be had becomes an error response."""
    if isinstance(frame, frames.Oversized):
        message = f"the shim sent {frame.length} bytes, over the limit"
        status = ttrpc_pb2.Status(code=errors.ResourceExhausted.code, message=message)
        return ttrpc_pb2.Response(status=status)
    try:
        return _parse(ttrpc_pb2.Response, frame.payload)
    except errors.Internal as error:
        status = ttrpc_pb2.Status(code=error.code, message=error.message)
        return ttrpc_pb2.Response(status=status)


def _outcome(response: ttrpc_pb2.Response) -> errors.ShimError | None:
    if response.status.code:
        return errors.from_code(response.status.code, response.status.message)
    return None


def _raise_for(response: ttrpc_pb2.Response) -> None:
    failure = _outcome(response)
    if failure is not None:
        raise failure


def _parse(kind: type[R], payload: bytes) -> R:
    try:
        return kind.FromString(payload)
    except DecodeError as error:
        raise errors.Internal(f"the shim sent no {kind.DESCRIPTOR.full_name}") from error
