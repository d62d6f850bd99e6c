# SPDX-License-Identifier: Apache-2.0
"""Connections to registries: dial, proxy tunnel, TLS; then a queue of received bytes.

    Target ──► dial() ──► TCP ──► peer allowed? ──► CONNECT through a proxy ──► TLS ──► Wire

What is received is passed on in the pieces that the kernel gave, uncopied, and reading pauses while
nobody takes them. All failures are of the tree below; their texts have no secrets or line breaks.

    Failure            no usable answer
    ├── Unreachable    no connection: refused, no such name, no route, TLS refused
    │   └── NotTls     the peer does not speak TLS
    ├── Stalled        the peer sent nothing for too long
    ├── Broken         the connection ended in the middle; worth another try
    └── Invalid        the peer broke the protocol or one of our bounds, or we cannot ask
"""

import asyncio
import contextlib
import functools
import ipaddress
import itertools
import os
import socket
import ssl
from asyncio import staggered
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent import futures
from dataclasses import dataclass
from typing import cast

from cri_server.images import hosts, proxy

HIGH_WATER = 1 << 20  # bytes received and not yet taken, then reading pauses
MAX_TUNNEL_HEAD = 16 << 10
MAX_CONTEXTS = 8
TLS_TIMEOUT = 10.0  # seconds for a handshake
MAX_LOOKUPS = 16  # threads; a resolver that is silent holds one for half a minute
NEXT_ADDRESS = 0.25  # seconds until the next address is tried too (RFC 8305)


_SocketAddress = tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes]
_Address = tuple[int, _SocketAddress]  # family first


class Failure(Exception):
    """See the tree above."""


class Unreachable(Failure):
    pass


class NotTls(Unreachable):
    pass


class Stalled(Failure):
    pass


class Broken(Failure):
    pass


class Invalid(Failure):
    pass


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """What a connection leads to; equal targets may share one.

    `public_only` refuses this machine and its link as the peer.
    """

    secure: bool
    host: str
    port: int
    tls: hosts.Tls
    via: proxy.Proxy | None = None
    public_only: bool = False

    @property
    def name(self) -> str:
        """Host and unusual port, for messages."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.secure else 80) else f"{host}:{self.port}"


class Wire(asyncio.Protocol):
    """An open connection."""

    def __init__(self, host: str) -> None:
        """`host` is for messages."""
        self.host = host
        self.transport: asyncio.Transport
        self._pieces: deque[bytes] = deque()
        self._size = 0
        self._ended = False
        self._paused = False
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def usable(self) -> bool:
        """Whether a new request may be written: open, and nothing came that nobody asked for."""
        return not self._ended and not self._pieces and not self.transport.is_closing()

    def write(self, data: bytes) -> None:
        """Send; requests are small, so nobody waits for the buffer to drain."""
        self.transport.write(data)

    def take(self) -> bytes:
        """Return the next piece that is there already, b"" for none."""
        if not self._pieces:
            return b""
        data = self._pieces.popleft()
        self._size -= len(data)
        if self._paused and self._size < HIGH_WATER // 2:
            self._paused = False
            self.transport.resume_reading()
        return data

    async def read(self) -> bytes:
        """Wait for the next piece; b"" at the end. Raises Broken after a reset."""
        while not self._pieces:
            if self._error is not None:
                raise Broken(
                    f"connection to {self.host} lost: {reason(self._error)}"
                ) from self._error
            if self._ended:
                return b""
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self.take()

    def unread(self, data: bytes) -> None:
        """Put back what was taken and belongs to somebody else."""
        if data:
            self._pieces.appendleft(data)
            self._size += len(data)

    def expire(self, seconds: float, then: Callable[[], None]) -> None:
        """Call `then` when nobody has called `stay` in time."""
        self._timer = asyncio.get_running_loop().call_later(seconds, then)

    def stay(self) -> None:
        """Take `expire` back."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None

    def abort(self) -> None:
        """Close at once. Idempotent."""
        self.stay()
        self.transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

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

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended = True
        self._error = exc
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Dialer:
    """Opens connections; keeps the TLS contexts, each of which costs 10 to 30 ms to build.

    Names are looked up in threads of its own: a lookup cannot be cancelled, and in the loop's few
    threads it would hold up the rest of the server.
    """

    def __init__(self) -> None:
        self._contexts: dict[tuple[object, ...], ssl.SSLContext] = {}
        self._lookups = futures.ThreadPoolExecutor(MAX_LOOKUPS, thread_name_prefix="lookup")

    def close(self) -> None:
        """Let go of the threads; a lookup that is under way ends by itself."""
        self._lookups.shutdown(wait=False, cancel_futures=True)

    async def dial(self, target: Target, seconds: float) -> Wire:
        """Connect within a time. Raises Unreachable, NotTls or Invalid."""
        context = await self._context(target.tls) if target.secure else None
        async with limit(seconds, f"no connection to {target.name}", Unreachable):
            wire = await self._connect(target)
            try:
                if target.public_only:
                    _check_public(wire, target)
                if context and target.via:
                    await _tunnel(wire, target, target.via)
                if context:
                    await _start_tls(wire, target, context)
            except BaseException:
                wire.abort()
                raise
        return wire

    async def _connect(self, target: Target) -> Wire:
        at = target.via or target
        loop = asyncio.get_running_loop()
        try:
            found = await loop.run_in_executor(self._lookups, _look_up, at.host, at.port)
            connected = await _first(found)
        except (OSError, UnicodeError) as error:
            name = f"the proxy {at.host}" if target.via else target.name
            raise Unreachable(f"no connection to {name}: {reason(error)}") from error
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        _, wire = await loop.create_connection(lambda: Wire(target.name), sock=connected)
        return wire

    async def _context(self, tls: hosts.Tls) -> ssl.SSLContext:
        """Return the context for the files as they are now: certificates are renewed in place."""
        files = (*tls.ca, *(file for pair in tls.client for file in pair if file))
        try:
            key = (tls, *(os.stat(file).st_mtime_ns for file in files))
            if key not in self._contexts:
                if len(self._contexts) >= MAX_CONTEXTS:
                    self._contexts.clear()
                self._contexts[key] = await asyncio.to_thread(_build_context, tls)
            return self._contexts[key]
        except OSError as error:  # SSLError is one too
            raise Invalid(f"cannot use the certificate files: {reason(error)}") from error


@contextlib.asynccontextmanager
async def limit(seconds: float, what: str, kind: type[Failure] = Stalled) -> AsyncIterator[None]:
    """Bound the block; past the time raise `kind`, with a text such as `{what} for 3 s`."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as error:
        raise kind(f"{what} for {seconds:g} s") from error


def reason(error: BaseException) -> str:
    """Say in a few words why the network failed."""
    match error:
        case ssl.SSLCertVerificationError():
            return f"certificate not accepted: {error.verify_message}"
        case ssl.SSLError():
            return f"TLS: {(error.reason or 'failed').replace('_', ' ').lower()}"
        case socket.gaierror():
            return "no such host name"
        case OSError(errno=int(number)):
            return os.strerror(number)
    return " ".join(str(error).split())[:200] or type(error).__name__


def _build_context(tls: hosts.Tls) -> ssl.SSLContext:
    context = ssl.create_default_context()
    # Python 3.13 sets it, and private CAs mostly lack an extension that it demands; Go does not.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    context.set_alpn_protocols(["http/1.1"])
    for file in tls.ca:
        context.load_verify_locations(file)
    for certificate, key in tls.client:
        context.load_cert_chain(certificate, key)
    if tls.skip_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _look_up(host: str, port: int) -> Sequence[_Address]:
    """Return where a host is, its families in turn, the preferred one first. Raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    families = list(dict.fromkeys(family for family, *_ in found))
    of_each = ([(f, at) for f, *_, at in found if f == family] for family in families)
    return [each for turn in itertools.zip_longest(*of_each) for each in turn if each is not None]


async def _first(found: Sequence[_Address]) -> socket.socket:
    """Return a connection to the first address that answers. Raises the last one's OSError."""
    attempts = [functools.partial(_open, family, at) for family, at in found]
    connected: socket.socket | None
    connected, _, failures = await staggered.staggered_race(attempts, NEXT_ADDRESS)
    if connected is None:
        raise next(each for each in reversed(failures) if each is not None)
    return connected


async def _open(family: int, address: _SocketAddress) -> socket.socket:
    opened = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        await asyncio.get_running_loop().sock_connect(opened, address)
    except BaseException:
        opened.close()
        raise
    return opened


def _check_public(wire: Wire, target: Target) -> None:
    """Refuse what only this machine or its link can reach: a registry must not choose those for us.

    Through a proxy the peer is the proxy, so that there the name alone can be judged.
    """
    name = target.host if target.via else wire.transport.get_extra_info("peername")[0]
    try:
        address = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        local = proxy.is_loopback(name)
    else:
        plain = getattr(address, "ipv4_mapped", None) or address
        local = (
            plain.is_loopback or plain.is_link_local or plain.is_unspecified or plain.is_multicast
        )
    if local:
        raise Invalid(
            f"refused to be sent to {target.name}: an address of this machine or its link"
        )


async def _tunnel(wire: Wire, target: Target, via: proxy.Proxy) -> None:
    host = f"[{target.host}]" if ":" in target.host else target.host
    lines = [f"CONNECT {host}:{target.port} HTTP/1.1", f"Host: {host}:{target.port}"]
    if via.authorization:
        lines.append(f"Proxy-Authorization: {via.authorization}")
    wire.write("\r\n".join([*lines, "", ""]).encode("ascii"))
    head = b""
    while b"\r\n\r\n" not in head:
        piece = await wire.read()
        head += piece
        if not piece or len(head) > MAX_TUNNEL_HEAD:
            raise Unreachable(f"the proxy {via.host} gave no answer")
    status = head.split(b" ", 2)[1:2]
    if status != [b"200"]:
        said = (
            b"".join(status).decode("latin-1") if b"".join(status).isdigit() else "nothing useful"
        )
        raise Unreachable(f"the proxy {via.host} answered {said[:3]} for {target.name}")


async def _start_tls(wire: Wire, target: Target, context: ssl.SSLContext) -> None:
    loop = asyncio.get_running_loop()
    try:
        secured = await loop.start_tls(
            wire.transport,
            wire,
            context,
            server_hostname=target.host,
            ssl_handshake_timeout=TLS_TIMEOUT,
        )
    except ssl.SSLCertVerificationError as error:
        raise Unreachable(f"{target.name}: {reason(error)}") from error
    except (OSError, EOFError) as error:
        raise NotTls(f"{target.name}: no TLS connection: {reason(error)}") from error
    wire.transport = cast("asyncio.Transport", secured)
