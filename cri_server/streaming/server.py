# SPDX-License-Identifier: Apache-2.0
"""The streaming server: where clients of Exec, Attach and PortForward connect.

    RPC     `exec`, `attach`, `port_forward`: a token for the request, in a URL
    client  GET or POST /exec/<token>, Upgrade: SPDY/3.1 or websocket ─► the session, to its end

It listens on loopback, where every process of the host may knock, and pods on the host's network
too; only the token lets anyone in. With a certificate it speaks TLS; a certificate that was renewed
is used from the next connection on. Nothing of it survives a restart but attached containers.
"""

import asyncio
import contextlib
from dataclasses import dataclass
from http import HTTPStatus

import structlog

from cri_server import config, shims
from cri_server.streaming import (
    accepted,
    certificates,
    head,
    pairs,
    peer,
    portforward,
    remotecommand,
    spdylink,
    spdypeer,
    tokens,
    websocket,
    wire,
    wspeer,
)

log = structlog.get_logger()
MOST_CONNECTIONS = 10_000
MOST_STRANGERS = 256  # connections whose token is not known yet
_BACKLOG = 1024
_ACCEPTED = "X-Accepted-Stream-Protocol-Versions"
_CHOSEN = "X-Stream-Protocol-Version"


@dataclass(frozen=True, kw_only=True, slots=True)
class Forward:
    """A port-forward as a client was promised it. `find` tells where the pod is, while it is ready;
    `ports` are for WebSocket, which needs them.
    """

    find: portforward.Find
    ports: tuple[int, ...]


Request = remotecommand.Command | remotecommand.Attachment | Forward
_PATHS = {remotecommand.Command: "exec", remotecommand.Attachment: "attach", Forward: "portforward"}


class Server:
    """Serves from `start` to `close`."""

    def __init__(self, settings: config.Server, *, shim_host: shims.Shims) -> None:
        self._settings, self._shims = settings, shim_host
        self._tokens: tokens.Tokens[Request] = tokens.Tokens()
        self._sessions: set[asyncio.Task[None]] = set()
        self._strangers: dict[asyncio.Transport, asyncio.Task[None]] = {}  # the oldest first
        self._certificate = certificates.of(settings)
        self._base = ""
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen. Raises OSError when the address cannot be had."""
        host, _, port = self._settings.stream_address.rpartition(":")
        server = self._server = await asyncio.get_running_loop().create_server(
            lambda: accepted.Accepted(self._accept), host.strip("[]"), int(port), backlog=_BACKLOG
        )
        bound = server.sockets[0].getsockname()[1]
        self._base = f"{'https' if self._certificate else 'http'}://{host}:{bound}"
        log.info("streaming", address=self._base)

    async def close(self) -> None:
        """End all sessions; the processes of execs end with them, attached containers go on."""
        if self._server:
            self._server.close()
        for session in self._sessions:
            session.cancel()
        if self._sessions:
            await asyncio.wait(self._sessions)

    def url(self, request: Request) -> str:
        """Return where a client gets what was asked for, once, within a minute.

        Raises ResourceExhausted.
        """
        return f"{self._base}/{_PATHS[type(request)]}/{self._tokens.issue(request)}"

    # -- a connection -----------------------------------------------------------------------------

    def _accept(self, connection: asyncio.Transport) -> None:
        """Begin to serve a connection, unless there are too many."""
        if len(self._sessions) >= MOST_CONNECTIONS:
            connection.abort()
            return
        session = asyncio.create_task(self._meet(connection), name="streaming")
        self._sessions.add(session)
        session.add_done_callback(self._sessions.discard)
        self._add_stranger(connection, session)

    def _add_stranger(self, connection: asyncio.Transport, session: "asyncio.Task[None]") -> None:
        """Count a connection that has shown no token. When there are too many the oldest has to
        go: a client with a token shows it at once, so no crowd of silent ones keeps it out.
        """
        if len(self._strangers) >= MOST_STRANGERS:
            oldest = next(iter(self._strangers))
            self._strangers.pop(oldest).cancel()
            oldest.abort()
        self._strangers[connection] = session
        session.add_done_callback(lambda _: self._strangers.pop(connection, None))

    async def _meet(self, connection: asyncio.Transport) -> None:
        """Serve a connection to its end; the root of a task of its own."""
        context = self._certificate.context if self._certificate else None
        try:
            reader, writer = await accepted.streams(connection, context)
            with contextlib.closing(writer):
                await self._talk(connection, reader, writer)
        except (OSError, TimeoutError, peer.Gone, websocket.ProtocolError) as e:
            log.debug("streaming client lost", reason=str(e))
        except Exception as e:
            log.error("streaming failed", error=repr(e))

    async def _talk(
        self,
        connection: asyncio.Transport,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        try:
            asked = await head.read(reader)
            request = self._redeem(asked)
            self._strangers.pop(connection, None)
            await self._serve(request, asked, reader, writer)
        except head.Rejected as e:
            await _reject(writer, e)

    async def _serve(
        self,
        request: Request,
        asked: head.Head,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        match asked.upgrade():
            case "spdy/3.1":
                await self._spdy(request, asked, reader, writer)
            case "websocket":
                await self._websocket(request, asked, reader, writer)
            case _:
                raise head.Rejected(HTTPStatus.BAD_REQUEST, "ask for an upgrade to SPDY/3.1")

    def _redeem(self, asked: head.Head) -> Request:
        if asked.method not in ("GET", "POST"):
            raise head.Rejected(
                HTTPStatus.METHOD_NOT_ALLOWED, "GET or POST", [("Allow", "GET, POST")]
            )
        _, _, path = asked.path.partition("/")
        kind, _, token = path.partition("/")
        request = self._tokens.redeem(token) if kind in _PATHS.values() else None
        if request is None or _PATHS[type(request)] != kind:
            raise head.Rejected(HTTPStatus.NOT_FOUND, "no such session: used, expired or never was")
        return request

    # -- what it becomes --------------------------------------------------------------------------

    async def _spdy(
        self,
        request: Request,
        asked: head.Head,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        offered = [pairs.PROTOCOL] if isinstance(request, Forward) else list(spdypeer.PROTOCOLS)
        wanted = asked.all("x-stream-protocol-version") or [offered[-1]]
        chosen = next((name for name in wanted if name in offered), None)
        if chosen is None:
            accepted = [(_ACCEPTED, name) for name in offered if name]
            raise head.Rejected(HTTPStatus.FORBIDDEN, "no common stream protocol", accepted)
        headers = [("Connection", "Upgrade"), ("Upgrade", "SPDY/3.1"), (_CHOSEN, chosen)]
        writer.write(head.answer(HTTPStatus.SWITCHING_PROTOCOLS, headers))
        socket = self._socket(reader, writer)
        link = spdylink.Link(socket, received=asked.rest)
        try:
            if isinstance(request, Forward):
                await portforward.serve(pairs.of_spdy(link), request.find)
                await link.close()
                return
            version = spdypeer.PROTOCOLS[chosen]
            names = _names(request, version)
            await self._command(request, await spdypeer.accept(link, names, version=version))
        finally:
            await link.abort()

    async def _websocket(
        self,
        request: Request,
        asked: head.Head,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        frames = websocket.Connection()
        writer.write(_greeting(frames, request, asked))
        socket = self._socket(reader, writer)
        channels = _channels(request, tunnel=frames.protocol.tunnel)
        link = wspeer.Link(frames, socket, read=channels, received=asked.rest)
        try:
            if isinstance(request, Forward):
                await self._forward(request, link)
                return
            await link.send(frames.send(_lowest(request), b""))
            await self._command(request, wspeer.WsPeer(link))
        finally:
            await link.abort()

    def _socket(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> wire.Socket:
        idle, vanished = self._settings.stream_idle_timeout, self._settings.stream_vanished_timeout
        return wire.Socket(reader, writer, seconds=idle, vanished=vanished)

    async def _forward(self, request: Forward, link: wspeer.Link) -> None:
        """Forward over a WebSocket: in its channels, or in the SPDY that it carries."""
        if not link.frames.protocol.tunnel:
            await portforward.serve(pairs.of_websocket(link, request.ports), request.find)
            await link.close()
            return
        inner = spdylink.Link(wspeer.Tunnel(link))
        try:
            await portforward.serve(pairs.of_spdy(inner), request.find)
            await inner.close()
        finally:
            await inner.abort()

    async def _command(
        self, request: remotecommand.Command | remotecommand.Attachment, client: peer.Peer
    ) -> None:
        if isinstance(request, remotecommand.Attachment):
            await remotecommand.attach(client, request, self._shims)
            return
        abandoned = self._settings.exec_abandoned_timeout
        await remotecommand.exec(client, request, self._shims, abandoned=abandoned)


def _greeting(frames: websocket.Connection, request: Request, asked: head.Head) -> bytes:
    """Return what makes the connection a WebSocket. Raises Rejected."""
    forward = isinstance(request, Forward)
    try:
        greeting = frames.accept(asked.raw, websocket.FORWARD if forward else websocket.EXEC)
    except websocket.ProtocolError as e:
        raise head.Rejected(HTTPStatus.BAD_REQUEST, str(e)) from e
    if greeting is None:
        raise head.Rejected(HTTPStatus.FORBIDDEN, "no common subprotocol")
    most = frames.protocol.channels // 2
    if isinstance(request, Forward) and not frames.protocol.tunnel and len(request.ports) > most:
        raise head.Rejected(HTTPStatus.BAD_REQUEST, f"more than {most} ports: use SPDY")
    return greeting


def _names(
    request: remotecommand.Command | remotecommand.Attachment, version: int
) -> frozenset[str]:
    """Return the streams that a SPDY client opens: resize is known since version 3."""
    resize = {"resize"} if request.terminal and version >= 3 else set()
    return request.streams | {"error"} | resize


def _channels(request: Request, *, tunnel: bool) -> set[int]:
    """Return the WebSocket channels that a client may send on."""
    if tunnel:
        return {wspeer.Tunnel.CHANNEL}
    if isinstance(request, Forward):
        return {2 * number for number in range(len(request.ports))}
    wanted = request.streams & {"stdin"} | ({"resize"} if request.terminal else set())
    return {wspeer.CHANNELS[name] for name in wanted}


def _lowest(request: remotecommand.Command | remotecommand.Attachment) -> int:
    """Return the first channel that we write to; an empty message there says that we are ready."""
    return min(wspeer.CHANNELS[name] for name in (request.streams - {"stdin"}) | {"error"})


async def _reject(writer: asyncio.StreamWriter, why: head.Rejected) -> None:
    headers = [*why.headers, ("Content-Type", "text/plain; charset=utf-8"), ("Connection", "close")]
    with contextlib.suppress(OSError):
        writer.write(head.answer(why.status, headers, f"{why.why}\n"))
        await writer.drain()
