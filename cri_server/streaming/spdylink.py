# SPDX-License-Identifier: Apache-2.0
"""One SPDY connection: its socket read by one task, its streams for whoever opened them.

A stream belongs to the task that accepts it; what arrives on it waits in its mailbox. The
connection ends when the client leaves, when it is silent for too long or sends what is no SPDY, and
when `close` is called; a stream's reader then sees the end, its writer `Gone`.
"""

import asyncio
import contextlib
from collections.abc import Mapping

from cri_server.streaming import peer, spdy, wire


class Stream:
    """One stream, in both directions. `closed` is set when the client has given it up."""

    def __init__(self, link: "Link", number: int, headers: Mapping[str, str]) -> None:
        self.headers = headers
        self.number = number
        self.mailbox = peer.Mailbox(link.room, link.look)
        self.closed = asyncio.Event()
        self._link = link

    async def read(self) -> bytes:
        """Return what the client sent next, b"" at the end."""
        return await self.mailbox.get()

    async def write(self, data: bytes) -> None:
        """Send; returns when the client takes it. Raises Gone."""
        await self._link.send(self._link.frames.send(self.number, data))

    async def finish(self) -> None:
        """Say that we send no more on this stream. Raises Gone."""
        await self._link.send(self._link.frames.send(self.number, b"", fin=True))

    def drop(self) -> None:
        """Forget what the client has sent and will send: nobody reads any more."""
        self._link.forget(self)

    async def reset(self, status: spdy.Status = spdy.Status.CANCEL) -> None:
        """Give the stream up, in both directions. Raises Gone."""
        self._link.forget(self)
        await self._link.send(self._link.frames.reset(self.number, status))


class Link:
    """The connection. `received` is what came before it was one."""

    def __init__(self, below: wire.Wire, *, received: bytes = b"") -> None:
        self.frames = spdy.Connection()
        self.closed = asyncio.Event()
        self.room, self.look = peer.Room(), below.look
        self._wire, self._received = below, received
        self._complete = False
        self._streams: dict[int, Stream] = {}
        self._opened: asyncio.Queue[Stream | None] = asyncio.Queue()
        self._task = asyncio.create_task(self._run(), name="spdy")

    async def accept(self) -> Stream | None:
        """Return the next stream that the client opens, None when it opens no more."""
        return None if self.closed.is_set() and self._opened.empty() else await self._opened.get()

    def refuse(self) -> None:
        """Refuse what the client opens from now on."""
        self._complete = True

    async def send(self, frames: bytes) -> None:
        """Send frames; returns when the client takes them. Raises Gone."""
        if self.closed.is_set():
            raise peer.Gone
        await self._wire.write(frames)

    def forget(self, stream: Stream) -> None:
        """Drop what comes for a stream from now on."""
        stream.mailbox.drop()
        self._streams.pop(stream.number, None)

    async def close(self) -> None:
        """End the connection, once the client has what was sent and leaves or some seconds are
        over.
        """
        with contextlib.suppress(peer.Gone):
            await self.send(self.frames.go_away())
            await self._wire.finish()
        for stream in self._streams.values():
            stream.mailbox.drop()
        await wire.linger(self._wire, self._task)
        await self.abort()

    async def abort(self) -> None:
        """End the connection now."""
        self._task.cancel()
        await asyncio.wait([self._task])
        self._wire.abort()

    async def _run(self) -> None:
        """Read until the end, whatever it is."""
        try:
            with contextlib.suppress(spdy.ProtocolError, OSError, TimeoutError, peer.Gone):
                await self._handle(self._received)
                while data := await self._wire.read():
                    await self._handle(data)
        finally:
            self._end()

    async def _handle(self, data: bytes) -> None:
        async for event in wire.in_turns(self.frames.receive(data)):
            match event:
                case spdy.Opened():
                    await self._open(event)
                case spdy.Data():
                    if stream := self._streams.get(event.stream):
                        await stream.mailbox.put(event.data)
                case spdy.Finished():
                    if stream := self._streams.get(event.stream):
                        stream.mailbox.end()
                case spdy.Reset():
                    if stream := self._streams.pop(event.stream, None):
                        stream.mailbox.end()
                        stream.closed.set()
                case spdy.Pinged():
                    await self._answer(self.frames.pong(event.number))
                case spdy.Refused():
                    await self._answer(self.frames.reset(event.stream, event.status))
                case spdy.GoneAway() if not self._complete:
                    self.refuse()
                    self._opened.put_nowait(None)

    async def _open(self, event: spdy.Opened) -> None:
        stream = Stream(self, event.stream, event.headers)
        self._streams[event.stream] = stream
        if self._complete or self._opened.qsize() >= spdy.MAX_STREAMS:
            await self._answer(self.frames.reset(event.stream, spdy.Status.REFUSED_STREAM))
            self.forget(stream)
            return
        await self._answer(self.frames.reply(event.stream))
        self._opened.put_nowait(stream)

    async def _answer(self, frames: bytes) -> None:
        with contextlib.suppress(peer.Gone):
            await self.send(frames)

    def _end(self) -> None:
        self.closed.set()
        for stream in self._streams.values():
            stream.mailbox.end()
            stream.closed.set()
        self._opened.put_nowait(None)
        self._wire.abort()
