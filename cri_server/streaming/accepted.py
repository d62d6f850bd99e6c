# SPDX-License-Identifier: Apache-2.0
"""A connection before anything of it is read: TLS comes first, where there is a certificate.

asyncio's own servers shake hands before anyone hears of a client, for as many as come, with a
quarter of a MiB for each. Here whoever serves a client knows it from the beginning.
"""

import asyncio
import ssl
from collections.abc import Callable

from cri_server.streaming import head, wire


class Accepted(asyncio.Protocol):
    """Hands its transport to `serve`, which has `streams` take it over, or closes it."""

    def __init__(self, serve: Callable[[asyncio.Transport], None]) -> None:
        self._serve = serve

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - for the type checker
        transport.pause_reading()
        self._serve(transport)


async def streams(
    accepted: asyncio.Transport, context: ssl.SSLContext | None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Return what a connection is read and written by, in TLS with a context.

    Raises OSError when the handshake fails or takes too long.
    """
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=wire.READ // 2)  # twice as much is collected at most
    protocol = _Secured(reader) if context else asyncio.StreamReaderProtocol(reader)
    transport = await _secure(accepted, protocol, context) if context else accepted
    transport.set_protocol(protocol)
    protocol.connection_made(transport)
    transport.resume_reading()
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


async def _secure(
    accepted: asyncio.Transport, protocol: asyncio.Protocol, context: ssl.SSLContext
) -> asyncio.Transport:
    secured = await asyncio.get_running_loop().start_tls(
        accepted,
        protocol,
        context,
        server_side=True,
        ssl_handshake_timeout=head.TIMEOUT,
        ssl_shutdown_timeout=head.TIMEOUT,
    )
    if secured is None:  # by Python 3.11, when the connection was lost meanwhile
        raise ConnectionResetError("the client left before its handshake was done")
    return secured


class _Secured(asyncio.StreamReaderProtocol):
    """For a client whose end comes with the end of its handshake, before `connection_made`: asyncio
    does not know then that it is TLS, and warns.
    """

    def eof_received(self) -> bool:
        super().eof_received()
        return False
