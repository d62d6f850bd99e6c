# SPDX-License-Identifier: Apache-2.0
"""A client that speaks WebSocket: one socket, read by one task, with a mailbox for each channel."""

import asyncio
import contextlib
from collections.abc import Collection, Mapping

from cri_server.streaming import peer, websocket, wire

CHANNELS = {"stdin": 0, "stdout": 1, "stderr": 2, "error": 3, "resize": 4}


class Link:
    """The connection. What comes on channels that nobody reads is dropped."""

    def __init__(
        self,
        frames: websocket.Connection,
        below: wire.Wire,
        *,
        read: Collection[int],
        received: bytes = b"",
    ) -> None:
        self.frames = frames
        self.closed = asyncio.Event()
        room = peer.Room()
        self.mailboxes: Mapping[int, peer.Mailbox] = {
            n: peer.Mailbox(room, below.look) for n in read
        }
        self._wire, self._received = below, received
        self._task = asyncio.create_task(self._run(), name="websocket")

    async def send(self, data: bytes) -> None:
        """Send what `frames` made; returns when the client takes it. Raises Gone."""
        if self.closed.is_set():
            raise peer.Gone
        await self._wire.write(data)

    async def close(self) -> None:
        """Say goodbye and wait for the answer, so that nothing that was sent is lost; some seconds
        where the client has it all and does not answer.
        """
        with contextlib.suppress(peer.Gone):
            await self.send(self.frames.close())
        for mailbox in self.mailboxes.values():
            mailbox.drop()
        await wire.linger(self._wire, self._task)
        await self.abort()

    async def abort(self) -> None:
        """End the connection now."""
        self._task.cancel()
        await asyncio.wait([self._task])
        self._wire.abort()

    def pending(self) -> bool:
        """Say whether the client's machine has not yet taken all that was sent."""
        return self._wire.pending()

    def cut(self) -> None:
        """End the connection now, without waiting for the task that reads it."""
        self._task.cancel()

    async def _run(self) -> None:
        try:
            with contextlib.suppress(websocket.ProtocolError, OSError, TimeoutError, peer.Gone):
                await self._handle(self._received)
                while data := await self._wire.read():
                    await self._handle(data)
        finally:
            self.closed.set()
            for mailbox in self.mailboxes.values():
                mailbox.end()
            self._wire.abort()

    async def _handle(self, data: bytes) -> None:
        async for event in wire.in_turns(self.frames.receive(data)):
            match event:
                case websocket.Data():
                    if mailbox := self.mailboxes.get(event.channel):
                        await mailbox.put(event.data)
                case websocket.Finished():
                    if mailbox := self.mailboxes.get(event.channel):
                        mailbox.end()
                case websocket.Answer():
                    await self.send(event.data)
                case websocket.Closed():
                    raise peer.Gone


class WsPeer:
    """A client of exec or attach. Implements `peer.Peer`."""

    def __init__(self, link: Link) -> None:
        self.version = link.frames.protocol.version
        self.closed = link.closed
        self._link = link

    async def read(self, stream: str) -> bytes:
        mailbox = self._link.mailboxes.get(CHANNELS[stream])
        return await mailbox.get() if mailbox else b""

    async def write(self, stream: str, data: bytes) -> None:
        await self._link.send(self._link.frames.send(CHANNELS[stream], data))

    async def close(self) -> None:
        await self._link.close()


class Tunnel:
    """SPDY inside a WebSocket: each message is some of its bytes. Implements `wire.Wire`."""

    CHANNEL = 0  # of the one mailbox; the messages have no channels

    def __init__(self, link: Link) -> None:
        self._link = link

    async def read(self) -> bytes:
        return await self._link.mailboxes[self.CHANNEL].get()

    async def write(self, data: bytes) -> None:
        await self._link.send(self._link.frames.send(self.CHANNEL, data))

    async def finish(self) -> None:
        with contextlib.suppress(peer.Gone):
            await self._link.send(self._link.frames.close())

    def pending(self) -> bool:
        return self._link.pending()

    def look(self) -> None:
        if self._link.closed.is_set():
            raise peer.Gone

    def abort(self) -> None:
        self._link.cut()
