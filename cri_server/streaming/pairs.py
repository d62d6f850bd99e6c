# SPDX-License-Identifier: Apache-2.0
"""The connections of a port-forward client, in SPDY and in WebSocket. Implements
`portforward.Pair`.

    SPDY        streams "error" and "data" with the same request id, in any order, whenever the
                client needs a connection
    WebSocket   channels 2n (data) and 2n+1 (error) for the n-th port of the request, from the start
"""

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator, Sequence

from cri_server.streaming import peer, portforward, spdylink, wspeer

PROTOCOL = "portforward.k8s.io"  # in X-Stream-Protocol-Version
_HALVES = ("error", "data")


class SpdyPair:
    """Two SPDY streams."""

    def __init__(self, port: int, data: spdylink.Stream, error: spdylink.Stream) -> None:
        self.port = port
        self.closed = data.closed
        self._data, self._error = data, error

    async def read(self) -> bytes:
        return await self._data.read()

    async def write(self, data: bytes) -> None:
        await self._data.write(data)

    async def finish(self) -> None:
        await self._data.finish()

    async def end(self, error: str) -> None:
        if error:
            await self._error.write(error.encode())
        await self._data.finish()
        await self._error.finish()
        for stream in (self._data, self._error):
            stream.drop()


class _Halves:
    """Streams that wait for their other half."""

    def __init__(self) -> None:
        self._waiting: dict[str, tuple[spdylink.Stream, asyncio.Task[None]]] = {}

    def add(self, name: str, stream: spdylink.Stream) -> spdylink.Stream | None:
        """Return the stream of that name which waits, else have this one wait."""
        other, expiry = self._waiting.pop(name, (None, None))
        if other is None or expiry is None:
            self._waiting[name] = (stream, asyncio.create_task(self._expire(name, stream)))
        else:
            expiry.cancel()
        return other

    async def _expire(self, name: str, stream: spdylink.Stream) -> None:
        """Forget the stream when its time is over, or the client gives it up."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(peer.CREATION_TIMEOUT):
                await stream.closed.wait()
        del self._waiting[name]
        if not stream.closed.is_set():
            await _reset(stream)

    def close(self) -> None:
        for _, expiry in self._waiting.values():
            expiry.cancel()


async def of_spdy(link: spdylink.Link) -> AsyncIterator[portforward.Pair]:
    """Yield each pair as it is complete; half a pair is reset after 30 s, a bad one at once."""
    halves = _Halves()
    try:
        while (stream := await link.accept()) is not None:
            if (pair := await _matched(halves, stream)) is not None:
                yield pair
    finally:
        halves.close()


async def _matched(halves: _Halves, stream: spdylink.Stream) -> SpdyPair | None:
    """Return the pair that this stream completes, if it does."""
    if stream.closed.is_set():
        return None
    kind, port = stream.headers.get("streamtype", ""), _port(stream.headers.get("port", ""))
    if kind not in _HALVES or port is None:
        await _reset(stream)
        return None
    other = halves.add(stream.headers.get("requestid") or _request(stream.number, kind), stream)
    if other is None:
        return None
    if other.headers.get("streamtype") == kind:
        await _reset(stream)
        await _reset(other)
        return None
    data, error = (stream, other) if kind == "data" else (other, stream)
    return SpdyPair(port, data, error)


def _request(number: int, kind: str) -> str:
    """Return the id that pairs the streams of a client that sends none: its error stream is the one
    before.
    """
    return str(number if kind == "error" else number - 2)


async def _reset(stream: spdylink.Stream) -> None:
    with contextlib.suppress(peer.Gone):
        await stream.reset()


def _port(text: str) -> int | None:
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 6 else 0
    return number if 0 < number < 65536 else None


class WsPair:
    """Two channels of a WebSocket. It has no half close: an end is an empty rest."""

    def __init__(self, link: wspeer.Link, number: int, port: int) -> None:
        self.port = port
        self.closed = link.closed
        self._link, self._data, self._error = link, 2 * number, 2 * number + 1

    async def read(self) -> bytes:
        return await self._link.mailboxes[self._data].get()

    async def write(self, data: bytes) -> None:
        await self._link.send(self._link.frames.send(self._data, data))

    async def finish(self) -> None:
        return

    async def end(self, error: str) -> None:
        self._link.mailboxes[self._data].drop()
        if error:
            await self._link.send(self._link.frames.send(self._error, error.encode()))


async def of_websocket(link: wspeer.Link, ports: Sequence[int]) -> AsyncIterator[portforward.Pair]:
    """Tell the client its channels, then yield a pair for each port."""
    for number, port in enumerate(ports):
        for channel in (2 * number, 2 * number + 1):
            await link.send(link.frames.send(channel, struct.pack("<H", port)))
        yield WsPair(link, number, port)
