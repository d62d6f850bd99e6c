# SPDX-License-Identifier: Apache-2.0
"""A client of exec or attach that speaks SPDY: one SPDY stream for each of the process's."""

import asyncio
import contextlib
from collections.abc import Set as AbstractSet

from cri_server.streaming import peer, spdylink

PROTOCOLS = {
    "v4.channel.k8s.io": 4,
    "v3.channel.k8s.io": 3,
    "v2.channel.k8s.io": 2,
    "channel.k8s.io": 1,
    "": 1,  # a client that does not ask
}


class SpdyPeer:
    """Implements `peer.Peer`."""

    def __init__(
        self, link: spdylink.Link, streams: dict[str, spdylink.Stream], *, version: int
    ) -> None:
        self.version = version
        self.closed = link.closed
        self._link, self._streams = link, streams

    async def read(self, stream: str) -> bytes:
        return await self._streams[stream].read() if stream in self._streams else b""

    async def write(self, stream: str, data: bytes) -> None:
        await self._streams[stream].write(data)

    async def close(self) -> None:
        with contextlib.suppress(peer.Gone):
            for stream in self._streams.values():
                await stream.finish()
        await self._link.close()


async def accept(link: spdylink.Link, names: AbstractSet[str], *, version: int) -> SpdyPeer:
    """Return the client once it has opened these streams, each once.

    Raises Gone when it opens others or does not open all within 30 s.
    """
    streams: dict[str, spdylink.Stream] = {}
    try:
        async with asyncio.timeout(peer.CREATION_TIMEOUT):
            while names - streams.keys():
                stream = await link.accept()
                name = stream.headers.get("streamtype", "") if stream else ""
                if stream is None or name not in names or name in streams:
                    raise peer.Gone(f"stream {name[:40]!r} was not to be opened")
                streams[name] = stream
    except TimeoutError as e:
        raise peer.Gone("the client did not open its streams in time") from e
    link.refuse()
    return SpdyPeer(link, streams, version=version)
