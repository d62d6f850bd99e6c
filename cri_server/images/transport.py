# SPDX-License-Identifier: Apache-2.0
"""One HTTP/1.1 exchange with one host: a request out, a response head and body back.

    send(Request) ─► connection (kept from before, or new) ─► Response ─► receive() ─► close()

h11 reads and writes the heads and undoes chunking; a body of known length passes it by, which is
three times as fast. No redirects, no credentials, no content decoding, no buffer sized by what a
peer claims: a body is the bytes that were sent. Every wait has a limit. Which hosts to ask, and
what their answers mean, is left to `session` and `registry`.
"""

import contextlib
import os
import urllib.parse
from dataclasses import dataclass, field

import h11

from cri_server.images import hosts, proxy, wire

IDLE_SECONDS = 10.0  # how long an unused connection is kept
MAX_IDLE = 8  # all hosts together
USER_AGENT = "cri-server"


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What to send. `url` is absolute; limits are in seconds, `body_timeout` between two pieces.

    `public_only` refuses this machine and its link as the peer.
    """

    url: str = field(repr=False)
    method: str = "GET"
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    body: bytes = field(default=b"", repr=False)
    tls: hosts.Tls = hosts.SYSTEM_TRUST
    dial_timeout: float = hosts.DIAL_TIMEOUT
    head_timeout: float = 60.0
    body_timeout: float = 60.0
    public_only: bool = False


class Transport:
    """Connections to registries, kept for a moment between requests. Belongs to one event loop."""

    def __init__(self) -> None:
        self._dialer = wire.Dialer()
        self._idle: list[tuple[wire.Target, wire.Wire]] = []

    async def send(self, request: Request) -> "Response":
        """Return the response once its head is there; the caller closes it.

        Raises any wire.Failure. A kept connection that the host has closed meanwhile is no failure.
        """
        target = _target(request)
        kept = self._take(target) if request.method in {"GET", "HEAD"} else None
        if kept is not None:
            try:
                return await self._exchange(kept, target, request)
            except wire.Broken:
                pass
        fresh = await self._dialer.dial(target, request.dial_timeout)
        return await self._exchange(fresh, target, request)

    def keep(self, target: wire.Target, connection: wire.Wire) -> None:
        """Keep a connection for the next request to the same place, for a moment."""
        if len(self._idle) >= MAX_IDLE or not connection.usable:
            connection.abort()
            return
        entry = (target, connection)
        self._idle.append(entry)
        connection.expire(IDLE_SECONDS, lambda: self._drop(entry))

    def close(self) -> None:
        """Close the connections that nobody uses; no others are made afterwards."""
        for entry in list(self._idle):
            self._drop(entry)
        self._dialer.close()

    def _take(self, target: wire.Target) -> wire.Wire | None:
        for entry in [each for each in self._idle if each[0] == target]:
            if entry[1].usable:
                self._idle.remove(entry)
                entry[1].stay()
                return entry[1]
            self._drop(entry)
        return None

    def _drop(self, entry: tuple[wire.Target, wire.Wire]) -> None:
        self._idle.remove(entry)
        entry[1].abort()

    async def _exchange(
        self, connection: wire.Wire, target: wire.Target, request: Request
    ) -> "Response":
        codec = h11.Connection(h11.CLIENT)
        try:
            connection.write(_encode(codec, request, target))
            async with wire.limit(request.head_timeout, f"{target.name} did not answer"):
                head = await _read_head(codec, connection, target.name)
            return Response(head, codec, connection, target, self, request)
        except BaseException:
            connection.abort()
            raise


class Response:
    """A status, headers, and a body that is read once, or not at all."""

    def __init__(
        self,
        head: h11.Response,
        codec: h11.Connection,
        connection: wire.Wire,
        target: wire.Target,
        transport: Transport,
        request: Request,
    ) -> None:
        self.status = head.status_code
        self.host = target.name
        self._fields = [
            (name.decode("latin-1"), value.decode("latin-1")) for name, value in head.headers
        ]
        self._codec, self._wire, self._target = codec, connection, target
        self._transport, self._timeout = transport, request.body_timeout
        self._closed = False
        self._read = request.method == "HEAD" or self.status in {204, 304}
        self._reusable = (
            head.http_version == b"1.1" and self.header("connection").lower() != "close"
        )
        self._chunked = bool(self.header("transfer-encoding"))
        length = self.header("content-length")
        self.length = int(length) if length and not self._chunked else None
        self._left = self.length or 0
        self._read = self._read or self.length == 0
        if self.length is not None:
            connection.unread(codec.trailing_data[0])

    def header(self, name: str) -> str:
        """Return the first value of a header by its lower-case name, or ""."""
        return next(iter(self.headers(name)), "")

    def headers(self, name: str) -> list[str]:
        """Return every value of a header by its lower-case name."""
        return [value for each, value in self._fields if each == name]

    async def receive(self) -> bytes:
        """Return the next piece of the body, up to 256 KiB; b"" at its end.

        Raises Stalled, Broken or Invalid.
        """
        if self._read:
            return b""
        return await (self._framed() if self.length is None else self._counted())

    async def read(self, limit: int) -> bytes:
        """Return the whole body; raises Invalid when it is larger than `limit` bytes."""
        if (self.length or 0) > limit:
            raise wire.Invalid(f"{self.host} wants to send more than {limit} bytes")
        whole = bytearray()
        while data := await self.receive():
            whole += data
            if len(whole) > limit:
                raise wire.Invalid(f"{self.host} sent more than {limit} bytes")
        return bytes(whole)

    def close(self) -> None:
        """Give the connection back when the body was read to its end, else drop it. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._read and self._reusable:
            self._transport.keep(self._target, self._wire)
        else:
            self._wire.abort()

    async def _counted(self) -> bytes:
        data = await self._piece()
        if not data:
            raise wire.Broken(f"{self.host} closed the connection {self._left} bytes early")
        self._wire.unread(data[self._left :])
        data = data[: self._left]
        self._left -= len(data)
        self._read = self._left == 0
        return data

    async def _framed(self) -> bytes:
        """Read a body whose end is a last chunk, or the end of the connection."""
        try:
            while not isinstance(event := self._codec.next_event(), h11.EndOfMessage):
                if isinstance(event, h11.Data):
                    return bytes(event.data)
                data = await self._piece()
                if not data and self._chunked:
                    raise wire.Broken(f"{self.host} closed the connection early")
                self._codec.receive_data(data)
        except h11.RemoteProtocolError as error:
            raise wire.Invalid(f"{self.host} broke the rules of HTTP/1.1") from error
        self._read = True
        self._reusable = self._reusable and self._chunked and not self._codec.trailing_data[0]
        return b""

    async def _piece(self) -> bytes:
        if data := self._wire.take():
            return data
        async with wire.limit(self._timeout, f"{self.host} sent nothing"):
            return await self._wire.read()


def _target(request: Request) -> wire.Target:
    try:
        parts = urllib.parse.urlsplit(request.url)
        port = parts.port
    except ValueError:  # its text may hold a part of the URL
        raise wire.Invalid("unusable URL") from None
    try:
        via = proxy.choose(os.environ, parts)
    except proxy.Unusable as error:
        raise wire.Invalid(str(error)) from None
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise wire.Invalid("refused a URL that is not http or https")
    secure = parts.scheme == "https"
    return wire.Target(
        secure=secure,
        host=parts.hostname,
        port=port or (443 if secure else 80),
        tls=request.tls if secure else hosts.SYSTEM_TRUST,
        via=via,
        public_only=request.public_only,
    )


def _encode(codec: h11.Connection, request: Request, target: wire.Target) -> bytes:
    """Return the bytes of a request; through a proxy a plain one names the whole URL.

    Source of that rule: RFC 9112, 3.2.2.
    """
    parts = urllib.parse.urlsplit(request.url)
    path = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
    usual = {"Host": parts.netloc, "User-Agent": USER_AGENT, "Accept-Encoding": "identity"}
    said = {name.lower() for name, _ in request.headers}
    headers = [pair for pair in usual.items() if pair[0].lower() not in said]
    headers += request.headers
    if request.body:
        headers.append(("Content-Length", str(len(request.body))))
    if target.via and not target.secure:
        path = f"{parts.scheme}://{parts.netloc}{path}"
        if target.via.authorization:
            headers.append(("Proxy-Authorization", target.via.authorization))
    with contextlib.suppress(h11.LocalProtocolError, UnicodeError):  # their text has the header
        data = codec.send(h11.Request(method=request.method, target=path, headers=headers)) or b""
        data += (codec.send(h11.Data(data=request.body)) or b"") if request.body else b""
        return data + (codec.send(h11.EndOfMessage()) or b"")
    raise wire.Invalid(f"a header or path for {target.name} has characters that HTTP forbids")


async def _read_head(codec: h11.Connection, connection: wire.Wire, host: str) -> h11.Response:
    try:
        while not isinstance(event := codec.next_event(), h11.Response):
            if event is h11.NEED_DATA:
                data = await connection.read()
                if not data:
                    raise wire.Broken(f"{host} closed the connection without an answer")
                codec.receive_data(data)
    except h11.RemoteProtocolError as error:
        raise wire.Invalid(f"{host} broke the rules of HTTP/1.1") from error
    return event
