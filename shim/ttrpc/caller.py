# SPDX-License-Identifier: Apache-2.0
"""A ttrpc client on `shim.loop`, for what a shim asks of a containerd shim: unary calls.

Any number of tasks share a `Connection`. When it is lost every call in progress ends with
Unavailable and `closed` is set; it is never opened again by itself. An answer that nobody waits for
any more is dropped.
"""

import contextlib
import errno
import itertools
import os
import socket
from collections.abc import Mapping
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from shim import errors, loop
from shim.pb import ttrpc_pb2
from shim.ttrpc import address, frames

R = TypeVar("R", bound=Message)

_CHUNK = 65536
_RETRY_SECONDS = 0.02
_NOT_YET = (errno.ENOENT, errno.ECONNREFUSED, errno.EAGAIN)


class Garbage(errors.Internal):
    """An answer that is none."""


class Connection:
    """A connection to one server; `metadata` goes with every call. `closed` is set when it is
    lost.
    """

    def __init__(self, fd: int, metadata: Mapping[str, str]) -> None:
        self.closed = loop.Event()
        self._fd = fd
        self._metadata = [ttrpc_pb2.KeyValue(key=k, value=v) for k, v in metadata.items()]
        self._numbers = itertools.count(1, 2)  # clients have the odd ones
        self._calls: dict[int, _Call] = {}
        self._sending = loop.Lock()
        self._reader = loop.spawn(self._read(), name="ttrpc answers")

    async def call(
        self,
        service: str,
        method: str,
        request: Message,
        response: type[R],
        *,
        timeout: float | None,
    ) -> R:
        """Make a call. Raises the ShimError that came back, DeadlineExceeded after `timeout`
        seconds (None: never), Unavailable when the connection is lost.
        """
        envelope = ttrpc_pb2.Request(
            service=service,
            method=method,
            payload=request.SerializeToString(),
            timeout_nano=int((timeout or 0) * 1e9),
            metadata=self._metadata,
        )
        number, call = next(self._numbers), _Call()
        self._calls[number] = call
        try:
            async with loop.timeout(timeout):
                await self._send(
                    frames.encode(number, frames.REQUEST, 0, envelope.SerializeToString())
                )
                await call.done.wait()
        except TimeoutError:
            raise errors.DeadlineExceeded(f"no answer to {method} within {timeout:g} s") from None
        finally:
            del self._calls[number]
        return _result(call.answer, method, response)

    def close(self) -> None:
        """Close at once; what is in progress gets Unavailable."""
        self._reader.cancel()

    async def _send(self, data: bytes) -> None:
        """Give a frame to the socket, whole. What a cancelled sender left would garble the rest, so
        that ends the connection.
        """
        async with self._sending:
            view = memoryview(data)
            try:
                while view:
                    view = await self._send_some(view)
            except BaseException as error:
                if isinstance(error, OSError) or len(view) != len(data):
                    self.close()
                if isinstance(error, OSError):
                    raise errors.Unavailable(f"connection lost: {error}") from error
                raise

    async def _send_some(self, view: memoryview) -> memoryview:
        if self._fd < 0:
            raise BrokenPipeError(errno.EPIPE, "connection closed")
        try:
            return view[os.write(self._fd, view) :]
        except BlockingIOError:
            await loop.writable(self._fd)
            return view

    async def _read(self) -> None:
        """Hand out answers until there will be no more."""
        decoder = frames.Decoder()
        try:
            while data := await self._receive():
                decoder.receive(data)
                while frame := decoder.next():
                    self._deliver(frame)
        except loop.Cancelled:
            return  # by `close`
        finally:
            self._lose()

    async def _receive(self) -> bytes:
        await loop.readable(self._fd)
        try:
            return os.read(self._fd, _CHUNK)
        except ConnectionError:
            return b""

    def _deliver(self, frame: frames.Frame | frames.Oversized) -> None:
        call = self._calls.get(frame.stream)
        if call is not None:
            call.answer = frame
            call.done.set()

    def _lose(self) -> None:
        fd, self._fd = self._fd, -1
        loop.close(fd)
        self.closed.set()
        for call in self._calls.values():
            call.done.set()


class _Call:
    """A call in progress. Done without an answer: the connection is lost."""

    __slots__ = ("answer", "done")

    def __init__(self) -> None:
        self.done = loop.Event()
        self.answer: frames.Frame | frames.Oversized | None = None


async def connect(
    name: str, *, timeout: float, metadata: Mapping[str, str] | None = None
) -> Connection:
    """Connect to a unix socket; a name that begins with NUL is abstract. Raises Unavailable.

    The server may be slow to listen: it is tried again until `timeout` seconds are over.
    """
    deadline = loop.now() + timeout
    while True:
        try:
            return Connection(_open(name), metadata or {})
        except OSError as error:
            if error.errno not in _NOT_YET or loop.now() >= deadline:
                shown = name.replace("\0", "@")
                raise errors.Unavailable(f"cannot connect to {shown}: {error.strerror}") from error
        await loop.sleep(_RETRY_SECONDS)


def _open(name: str) -> int:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as made, contextlib.ExitStack() as stack:
        made.setblocking(False)
        made.connect(name if name[:1] == "\0" else stack.enter_context(address.usable(name)))
        return made.detach()


def _result(frame: frames.Frame | frames.Oversized | None, method: str, response: type[R]) -> R:
    if frame is None:
        raise errors.Unavailable(f"connection lost before {method} was answered")
    if isinstance(frame, frames.Oversized):
        raise Garbage(f"{method} was answered with {frame.length} bytes, over the limit")
    try:
        answer = ttrpc_pb2.Response.FromString(frame.payload)
        if answer.status.code:
            raise errors.from_code(answer.status.code, answer.status.message)
        return response.FromString(answer.payload)
    except DecodeError as error:
        raise Garbage(f"{method} was answered with garbage") from error
