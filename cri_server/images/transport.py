# SPDX-License-Identifier: Apache-2.0
"""One HTTP/1.1 exchange with one host: dial, TLS, proxy, request, response head, body.

    send(Request) ─► connection (kept from before, or new) ─► Response ─► body() ─► close()

h11 reads and writes the heads and undoes chunking; a body of known length passes it by, which is twice as
fast. No redirects, no credentials, no content decoding, no buffer sized by what a peer claims: a
response is what was sent. Every wait has a limit. Nothing here survives a crash; which hosts to ask, and
what their answers mean, is left to `session` and `registry`.
"""

import asyncio
import ipaddress
import os
import socket
import ssl
import urllib.parse
from collections import deque
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field

import h11

from cri_server.images import hosts, proxy

IDLE_SECONDS = 10.0                         # how long an unused connection is kept
HIGH_WATER = 1 << 20                        # bytes received and not yet asked for
MAX_KEPT = 8                                # idle connections, all hosts together


class Failure(Exception):
    """An exchange that gave no usable answer; the text has no secrets and no line breaks."""


class Unreachable(Failure):
    """No connection: refused, no such name, no route, TLS refused."""


class NotTls(Unreachable):
    """The peer does not speak TLS."""


class Stalled(Failure):
    """The peer sent nothing for too long."""


class Broken(Failure):
    """The connection ended in the middle; worth another try."""


class Invalid(Failure):
    """The peer broke the protocol, or one of our bounds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What to send; `url` is absolute. `public_only` refuses peers on this machine or link."""

    url: str = field(repr=False)
    method: str = "GET"
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    body: bytes = field(default=b"", repr=False)
    tls: hosts.Tls = hosts.Tls()
    dial_timeout: float = hosts.DIAL_TIMEOUT
    head_timeout: float = 60.0
    body_timeout: float = 60.0
    public_only: bool = False


class Transport:
    """Connections to registries, kept for a moment between requests. Belongs to one event loop."""

    def __init__(self) -> None:
        self._idle: dict[_Key, list[_Wire]] = {}
        self._contexts: dict[tuple[object, ...], ssl.SSLContext] = {}

    async def send(self, request: Request) -> "Response":
        """Return the response once its head is there; the caller closes it.

        Raises Unreachable, Stalled, Broken or Invalid.
        """
        key = _Key.of(request)
        wire = self._take(key) if request.method in {"GET", "HEAD"} else None
        if wire is not None:
            try:
                return await self._exchange(wire, key, request)
            except Broken:                  # closed by the host while it lay here: not a failure
                pass
        return await self._exchange(await self._dial(key, request), key, request)

    def close(self) -> None:
        """Close the connections that nobody uses."""
        for wires in self._idle.values():
            for wire in wires:
                wire.abort()
        self._idle.clear()

    def keep(self, key: "_Key", wire: "_Wire") -> None:
        """Keep a connection for the next request to the same place."""
        if sum(map(len, self._idle.values())) >= MAX_KEPT or not wire.usable:
            wire.abort()
            return
        self._idle.setdefault(key, []).append(wire)
        wire.expire(IDLE_SECONDS, lambda: self._forget(key, wire))

    def _take(self, key: "_Key") -> "_Wire | None":
        while wires := self._idle.get(key):
            wire = wires.pop()
            wire.expire(None)
            if wire.usable:
                return wire
            wire.abort()
        self._idle.pop(key, None)
        return None

    def _forget(self, key: "_Key", wire: "_Wire") -> None:
        self._idle[key].remove(wire)
        if not self._idle[key]:
            del self._idle[key]
        wire.abort()

    async def _exchange(self, wire: "_Wire", key: "_Key", request: Request) -> "Response":
        try:
            connection = h11.Connection(h11.CLIENT)
            wire.write(_head(connection, request))
            async with _limit(request.head_timeout, f"{key.host} did not answer"):
                head = await _read_head(connection, wire)
        except h11.ProtocolError as error:
            wire.abort()
            raise Invalid(f"{key.host} broke HTTP: {error}") from error
        except BaseException:
            wire.abort()
            raise
        return Response(head, connection, wire, key, self, request)

    async def _dial(self, key: "_Key", request: Request) -> "_Wire":
        what = f"no connection to {key.host}"
        async with _limit(request.dial_timeout, what, Unreachable):
            wire = await _connect(key)
            try:
                _check_peer(wire, key, request)
                if key.proxy and key.secure:
                    await _tunnel(wire, key)
                if key.secure:
                    await _start_tls(wire, key, self._context(key.tls))
            except BaseException:
                wire.abort()
                raise
        return wire

    def _context(self, tls: hosts.Tls) -> ssl.SSLContext:
        """Return the context for the files as they are now; building one costs 10 to 30 ms."""
        files = (*tls.ca, *(file for pair in tls.client for file in pair if file))
        try:
            key = (tls, *(os.stat(file).st_mtime_ns for file in files))
            if key not in self._contexts:
                if len(self._contexts) >= MAX_KEPT:
                    self._contexts.clear()
                self._contexts[key] = _tls_context(tls)
            return self._contexts[key]
        except OSError as error:            # SSLError is one too
            raise Invalid(f"cannot use the TLS files of hosts.toml: {_reason(error)}") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class _Key:
    """Which connections may serve a request."""

    secure: bool
    host: str
    port: int
    tls: hosts.Tls
    proxy: proxy.Proxy | None
    public_only: bool

    @classmethod
    def of(cls, request: Request) -> "_Key":
        try:
            parts = urllib.parse.urlsplit(request.url)
            port = parts.port
            via = proxy.choose(os.environ, parts)
        except ValueError as error:
            raise Invalid(f"unusable URL or proxy: {error}") from error
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise Invalid("a URL that is not http or https")
        return cls(
            secure=parts.scheme == "https",
            host=parts.hostname,
            port=port or (443 if parts.scheme == "https" else 80),
            tls=request.tls,
            proxy=via,
            public_only=request.public_only,
        )


class Response:
    """A status, headers by lower-case name, and a body that is read once, or not at all."""

    def __init__(
        self,
        head: h11.Response,
        connection: h11.Connection,
        wire: "_Wire",
        key: _Key,
        transport: Transport,
        request: Request,
    ) -> None:
        self.status = head.status_code
        self._fields = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in head.headers]
        self._connection, self._wire, self._key = connection, wire, key
        self._transport = transport
        self._timeout = request.body_timeout
        self._whole = request.method == "HEAD" or self.status in {204, 304}
        self._reusable = head.http_version == b"1.1" and "close" not in self.header("connection").lower()
        self.length = 0 if self._whole else _length(self.header("content-length"))
        if self.header("transfer-encoding"):
            self.length = None

    @property
    def host(self) -> str:
        """The host that answered, for messages."""
        return self._key.host

    def header(self, name: str) -> str:
        """Return the first value of a header, or ""."""
        return next(iter(self.all(name)), "")

    def all(self, name: str) -> list[str]:
        """Return every value of a header."""
        return [value for each, value in self._fields if each == name]

    async def body(self) -> AsyncIterator[bytes]:
        """Yield the body in pieces of up to 256 KiB; raises Stalled, Broken or Invalid."""
        pieces = self._chunked() if self.length is None else self._counted(self.length)
        async for data in pieces:
            yield data
        self._whole = True

    async def read(self, limit: int) -> bytes:
        """Return the whole body; Invalid when it is larger than `limit` bytes."""
        pieces, size = [], self.length or 0
        if size <= limit:
            size = 0
            async for data in self.body():
                pieces.append(data)
                size += len(data)
                if size > limit:
                    break
        if size > limit:
            raise Invalid(f"{self.host} sent more than {limit} bytes")
        return b"".join(pieces)

    def close(self) -> None:
        """Give the connection back when the body was read to its end, else drop it. Idempotent."""
        if self._whole and self._reusable:
            self._reusable = False
            self._transport.keep(self._key, self._wire)
        elif self._reusable or not self._whole:
            self._reusable, self._whole = False, True
            self._wire.abort()
        else:
            self._wire.abort()

    async def _counted(self, left: int) -> AsyncIterator[bytes]:
        early = self._connection.trailing_data[0]
        if early:
            self._wire.unread(early)
        while left > 0:
            data = await self._receive()
            if not data:
                raise Broken(f"{self.host} closed the connection {left} bytes early")
            if len(data) > left:
                self._wire.unread(data[left:])
                data = data[:left]
            left -= len(data)
            yield data

    async def _chunked(self) -> AsyncIterator[bytes]:
        try:
            while not isinstance(event := self._connection.next_event(), h11.EndOfMessage):
                if event is h11.NEED_DATA:
                    self._connection.receive_data(await self._receive())
                elif isinstance(event, h11.Data):
                    yield bytes(event.data)
                elif isinstance(event, h11.ConnectionClosed):
                    raise Broken(f"{self.host} closed the connection early")
        except h11.RemoteProtocolError as error:
            raise _protocol(self.host, error) from error
        self._reusable = self._reusable and self._connection.their_state is h11.DONE

    async def _receive(self) -> bytes:
        if data := self._wire.ready():
            return data
        async with _limit(self._timeout, f"{self.host} sent nothing"):
            return await self._wire.read(self.host)


class _Wire(asyncio.Protocol):
    """A socket as a queue of received pieces, passed on without copying them."""

    def __init__(self) -> None:
        self._pieces: deque[bytes] = deque()
        self._size = 0
        self._ended = False
        self._paused = False
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.transport: asyncio.Transport

    @property
    def usable(self) -> bool:
        """Whether a new request may be written: open, and nothing came that nobody asked for."""
        return not self._ended and not self._pieces and not self.transport.is_closing()

    def write(self, data: bytes) -> None:
        self.transport.write(data)

    def ready(self) -> bytes:
        """Return what is there already, b"" for nothing."""
        if not self._pieces:
            return b""
        data = self._pieces.popleft()
        self._size -= len(data)
        if self._paused and self._size < HIGH_WATER // 2:
            self._paused = False
            self.transport.resume_reading()
        return data

    async def read(self, host: str) -> bytes:
        """Wait for the next piece; b"" at the end. Raises Broken after a reset."""
        while not self._pieces:
            if self._error is not None:
                raise Broken(f"connection to {host} lost: {_reason(self._error)}")
            if self._ended:
                return b""
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self.ready()

    def unread(self, data: bytes) -> None:
        self._pieces.appendleft(data)
        self._size += len(data)

    def expire(self, seconds: float | None, then: object = None) -> None:
        """Call `then` after a time; None as the time takes that back."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        if seconds is not None and callable(then):
            self._timer = asyncio.get_running_loop().call_later(seconds, then)

    def abort(self) -> None:
        self.expire(None)
        self.transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self._pieces.append(data)
        self._size += len(data)
        if self._size > HIGH_WATER and not self._paused:
            self._paused = True
            self.transport.pause_reading()
        self._wake()

    def eof_received(self) -> None:
        self._ended = True
        self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        self._ended = True
        self._error = self._error or error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
