# SPDX-License-Identifier: Apache-2.0
"""A ttrpc server on `shim.loop`: one task per connection and one per call.

    serve ── accept ──► _Connection.serve ── REQUEST ──► unary task  runs to its end, alone too
                             │                    └────► stream task cancelled with the connection
                             └─ DATA ──► Stream.recv

Back-pressure is the socket's, both ways: `Stream.send` returns when the socket has taken the frame,
and a connection is not read while a stream's inbox is full. ttrpc has no flow control of its own,
so a streaming call should have a connection of its own. Nothing survives the process; a client that
reconnects begins anew.
"""

import collections
import contextlib
import errno
import os
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any, NamedTuple

from google.protobuf.message import DecodeError, Message

from shim import errors, loop
from shim.pb import ttrpc_pb2
from shim.ttrpc import frames

_INBOX = 16  # frames of a stream that wait for its handler
_CHUNK = 1 << 18
_ACCEPT_PAUSE = 0.1  # seconds, when there is no descriptor for another connection
_RESOURCE_EXHAUSTED = 8
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)


class Unary(NamedTuple):
    """A method of one request and one response."""

    request: type[Message]
    handler: Callable[[Any], Awaitable[Message]]


class Streaming(NamedTuple):
    """A method that talks both ways until its handler returns."""

    request: type[Message]
    handler: Callable[["Stream"], Awaitable[None]]


Method = Unary | Streaming


class Server:
    """Serves one service on a listening socket."""

    def __init__(self, service: str, methods: Mapping[str, Method]) -> None:
        self.service = service
        self.methods = methods
        self._unary = 0
        self._idle = loop.Event()

    async def serve(self, listener: socket.socket) -> None:
        """Accept connections until cancelled. The listener stays open; its owner closes it."""
        await accept(listener, self.connect)

    def connect(self, accepted: int) -> loop.Task[None]:
        """Serve one connection, beside all others; the descriptor is ours from now on."""
        os.set_blocking(accepted, False)
        return loop.spawn(_Connection(self, accepted).serve(), name="ttrpc connection")

    async def drain(self, *, seconds: float) -> None:
        """Wait until unary calls in progress are answered: when `serve` has ended, before the loop
        does.
        """
        with contextlib.suppress(TimeoutError):
            async with loop.timeout(seconds):
                while self._unary:
                    self._idle.clear()
                    await self._idle.wait()

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Count a unary call as in progress."""
        self._unary += 1
        try:
            yield
        finally:
            self._unary -= 1
            if not self._unary:
                self._idle.set()


async def accept(listener: socket.socket, take: Callable[[int], object]) -> None:
    """Give the descriptor of each new connection to `take`, until cancelled."""
    listener.setblocking(False)
    while True:
        await loop.readable(listener.fileno())
        if not _accept_all(listener, take):
            await loop.sleep(_ACCEPT_PAUSE)


def _accept_all(listener: socket.socket, take: Callable[[int], object]) -> bool:
    """Take all that wait; False when we have no descriptor for another."""
    while True:
        try:
            # accept() would make a socket object, with enums, for what a descriptor can do.
            accepted, _ = listener._accept()  # type: ignore[attr-defined]
        except OSError as error:  # none waits, or the one client has gone meanwhile
            return error.errno not in _EXHAUSTED
        take(accepted)


def call(stream: int, service: str, method: str, payload: bytes = b"") -> bytes:
    """Return the bytes of a unary call."""
    request = ttrpc_pb2.Request(service=service, method=method, payload=payload)
    return frames.encode(stream, frames.REQUEST, frames.REMOTE_CLOSED, request.SerializeToString())


class Stream:
    """One streaming call as its handler sees it. `disconnected` is set when the client has gone."""

    def __init__(self, connection: "_Connection", number: int, request: type[Message]) -> None:
        self.disconnected = loop.Event()
        self._connection = connection
        self._number = number
        self._request = request
        self._inbox: collections.deque[bytes] = collections.deque()
        self._arrived = loop.Event()
        self._half_closed = False

    async def recv(self) -> Any:
        """Return the next message of the client, None when it will send no more.

        Raises InvalidArgument when it cannot be parsed. One task at a time.
        """
        while not self._inbox:
            if self._half_closed:
                return None
            self._arrived.clear()
            await self._arrived.wait()
        payload = self._inbox.popleft()
        self._connection.room.set()
        return _parse(self._request, payload)

    async def send(self, message: Message) -> None:
        """Send a message; returns when the socket has it. Unavailable: the client has gone."""
        payload = message.SerializeToString()
        await self._connection.send(frames.encode(self._number, frames.DATA, 0, payload))

    def full(self) -> bool:
        """Say whether the handler is behind."""
        return len(self._inbox) >= _INBOX

    def take(self, flags: int, payload: bytes) -> None:
        """Take what the client sent."""
        if not flags & frames.NO_DATA:
            self._inbox.append(payload)
        if flags & frames.REMOTE_CLOSED:
            self._half_closed = True
        self._arrived.set()


class _Connection:
    def __init__(self, server: Server, accepted: int) -> None:
        self.room = loop.Event()  # set when a handler has taken something from its inbox
        self._server = server
        self._fd = accepted
        self._decoder = frames.Decoder()
        self._streams: dict[int, tuple[Stream, loop.Task[None]]] = {}
        self._last_number = 0
        self._sending = loop.Lock()
        self._unsent = memoryview(b"")
        self._closed = False

    async def serve(self) -> None:
        """Read and dispatch until the client goes."""
        try:
            while data := await self._receive():
                self._decoder.receive(data)
                while frame := self._decoder.next():
                    self._dispatch(frame)
                await self._wait_room()
        finally:
            self._close()

    async def _receive(self) -> bytes:
        if self._closed:
            return b""
        await loop.readable(self._fd)
        try:
            return os.read(self._fd, _CHUNK)
        except ConnectionError:
            return b""

    async def _wait_room(self) -> None:
        """Do not read on while a handler is behind; its client may go away meanwhile."""
        while not self._closed and any(stream.full() for stream, _ in self._streams.values()):
            self.room.clear()
            watch = loop.spawn(self._watch_hangup(), name="ttrpc hangup")
            try:
                await self.room.wait()
            finally:
                watch.cancel()

    async def _watch_hangup(self) -> None:
        await loop.hung_up(self._fd)
        self._closed = True
        self.room.set()

    def _close(self) -> None:
        """End the streaming calls; unary ones go on and find nobody to answer."""
        self._closed = True
        for stream, task in self._streams.values():
            stream.disconnected.set()
            task.cancel()
        fd, self._fd = self._fd, -1
        loop.close(fd)

    # ---- in

    def _dispatch(self, frame: frames.Frame | frames.Oversized) -> None:
        if isinstance(frame, frames.Oversized):
            self._refuse(frame.stream, _RESOURCE_EXHAUSTED, f"message of {frame.length} bytes")
        elif frame.type == frames.REQUEST:
            self._request(frame)
        elif frame.type == frames.DATA and frame.stream in self._streams:
            self._streams[frame.stream][0].take(frame.flags, frame.payload)

    def _request(self, frame: frames.Frame) -> None:
        if frame.stream % 2 == 0 or frame.stream <= self._last_number:
            self._refuse(frame.stream, errors.InvalidArgument.code, "stream id out of order")
            return
        self._last_number = frame.stream
        try:
            request = _parse(ttrpc_pb2.Request, frame.payload)
            method = self._method(request)
        except errors.ShimError as error:
            self._refuse(frame.stream, error.code, error.message)
            return
        if isinstance(method, Unary):
            call = self._run_unary(frame.stream, method, request)
            loop.spawn(call, name=request.method)
        else:
            self._start_stream(frame, method, request)

    def _method(self, request: ttrpc_pb2.Request) -> Method:
        method = self._server.methods.get(request.method)
        if request.service != self._server.service or method is None:
            raise errors.Unimplemented(f"no method {request.service}/{request.method}")
        return method

    def _refuse(self, number: int, code: int, message: str) -> None:
        """Answer with an error; what the stream was doing ends."""
        running = self._streams.pop(number, None)
        if running is not None:
            running[1].cancel()
        response = ttrpc_pb2.Response(status=ttrpc_pb2.Status(code=code, message=message))
        loop.spawn(self._respond(number, response), name="ttrpc refusal")

    # ---- calls

    async def _run_unary(self, number: int, method: Unary, request: ttrpc_pb2.Request) -> None:
        with self._server.answering():
            response = ttrpc_pb2.Response()
            try:
                message = _parse(method.request, request.payload)
                response.payload = (await method.handler(message)).SerializeToString()
            except Exception as error:
                response.status.CopyFrom(_status(request.method, error))
            await self._respond(number, response)

    def _start_stream(
        self, frame: frames.Frame, method: Streaming, request: ttrpc_pb2.Request
    ) -> None:
        stream = Stream(self, frame.stream, method.request)
        # A client may put its first message into the request.
        stream.take(frame.flags | (0 if request.payload else frames.NO_DATA), request.payload)
        run = self._run_stream(frame.stream, method, stream, request.method)
        self._streams[frame.stream] = stream, loop.spawn(run, name=request.method)

    async def _run_stream(self, number: int, method: Streaming, stream: Stream, name: str) -> None:
        try:
            await method.handler(stream)
        except Exception as error:
            await self._respond(number, ttrpc_pb2.Response(status=_status(name, error)))
        else:
            await self._end_stream(number)
        finally:
            self._streams.pop(number, None)
            self.room.set()

    # ---- out

    async def _end_stream(self, number: int) -> None:
        flags = frames.REMOTE_CLOSED | frames.NO_DATA
        with contextlib.suppress(errors.Unavailable):
            await self.send(frames.encode(number, frames.DATA, flags, b""))

    async def _respond(self, number: int, response: ttrpc_pb2.Response) -> None:
        try:
            data = frames.encode(number, frames.RESPONSE, 0, response.SerializeToString())
        except frames.TooLarge as error:
            status = ttrpc_pb2.Status(code=_RESOURCE_EXHAUSTED, message=str(error))
            response = ttrpc_pb2.Response(status=status)
            data = frames.encode(number, frames.RESPONSE, 0, response.SerializeToString())
        with contextlib.suppress(errors.Unavailable):
            await self.send(data)

    async def send(self, data: bytes) -> None:
        """Give a frame to the socket, whole, in turn. Raises Unavailable.

        What a cancelled sender leaves unsent goes out before the next frame.
        """
        async with self._sending:
            self._unsent = memoryview(bytes(self._unsent) + data)
            while self._unsent:
                try:
                    await self._send_some()
                except OSError as error:
                    raise errors.Unavailable(f"the client has gone: {error}") from error

    async def _send_some(self) -> None:
        if self._closed:
            raise BrokenPipeError(errno.EPIPE, "connection closed")
        try:
            sent = os.write(self._fd, self._unsent)
            self._unsent = self._unsent[sent:]
        except BlockingIOError:
            await loop.writable(self._fd)


def _parse(kind: type[Message], payload: bytes) -> Any:
    try:
        return kind.FromString(payload)
    except DecodeError as error:
        raise errors.InvalidArgument(f"not a {kind.DESCRIPTOR.full_name}: {error}") from error


def _status(name: str, error: Exception) -> ttrpc_pb2.Status:
    """Translate an error; what is not ours to raise is our bug and is reported too."""
    if isinstance(error, errors.ShimError):
        return ttrpc_pb2.Status(code=error.code, message=error.message)
    if isinstance(error, TimeoutError):
        return ttrpc_pb2.Status(code=errors.DeadlineExceeded.code, message=str(error))
    loop.on_task_error(name, error)
    message = f"{type(error).__name__}: {error}"
    if isinstance(error, OSError) and error.errno in (*_EXHAUSTED, errno.ENOSPC, errno.EDQUOT):
        return ttrpc_pb2.Status(code=errors.ResourceExhausted.code, message=message)
    return ttrpc_pb2.Status(code=errors.Internal.code, message=message)
