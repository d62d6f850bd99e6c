# SPDX-License-Identifier: Apache-2.0
"""What clients of the streaming server have 30 s for, with a shorter time, over a real socket."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from cri_server.streaming import pairs, peer, spdylink, spdypeer, wire
from tests.fakes import spdy

Work = Callable[[spdylink.Link], Awaitable[None]]
NAMES = frozenset({"stdout", "error"})


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer, "CREATION_TIMEOUT", 0.1)


async def serving(work: Work) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, asyncio.Server]:
    """Have `work` done with the link of the first client; return that client."""

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = spdylink.Link(wire.Socket(reader, writer, seconds=60, vanished=60))
        await work(link)
        await link.abort()
        writer.close()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    return *await asyncio.open_connection(*server.sockets[0].getsockname()), server


@pytest.fixture
async def outcome() -> "asyncio.Future[str]":
    return asyncio.get_running_loop().create_future()


@pytest.mark.parametrize("opened", [[], ["stdout"]])
async def test_a_client_that_does_not_open_its_streams(
    hurry: None, outcome: "asyncio.Future[str]", opened: list[str]
) -> None:
    async def work(link: spdylink.Link) -> None:
        try:
            await spdypeer.accept(link, NAMES, version=4)
        except peer.Gone as e:
            outcome.set_result(str(e))

    reader, writer, server = await serving(work)
    async with server, asyncio.timeout(5):
        client = spdy.Client()
        for number, name in enumerate(opened):
            writer.write(client.open(2 * number + 1, {"streamtype": name}))
        assert await outcome == "the client did not open its streams in time"
        await reader.read()
        writer.close()


async def test_half_a_pair_is_reset_and_a_whole_one_lives(
    hurry: None, outcome: "asyncio.Future[str]"
) -> None:
    async def work(link: spdylink.Link) -> None:
        async for pair in pairs.of_spdy(link):
            outcome.set_result(str(pair.port))

    reader, writer, server = await serving(work)
    async with server, asyncio.timeout(5):
        client, received = spdy.Client(), b""
        for number, kind, request in ((1, "data", "a"), (3, "data", "b"), (5, "error", "b")):
            headers = {"streamtype": kind, "requestid": request, "port": "80"}
            writer.write(client.open(number, headers))
        assert await outcome == "80"
        reset = spdy.control(spdy.RST_STREAM, bytes((0, 0, 0, 1, 0, 0, 0, 5)))
        while reset not in received:
            received += await reader.read(4096)
        frames = [(f.kind, f.number) for f in spdy.parse(received)]
        assert [number for kind, number in frames if kind == spdy.RST_STREAM] == [1]
        writer.close()


async def test_half_a_pair_that_is_given_up_is_forgotten(outcome: "asyncio.Future[str]") -> None:
    async def work(link: spdylink.Link) -> None:
        async for pair in pairs.of_spdy(link):
            outcome.set_result(f"{pair.port}, {len(asyncio.all_tasks()) - before}")
            return

    before = len(asyncio.all_tasks())
    reader, writer, server = await serving(work)
    async with server, asyncio.timeout(5):
        client = spdy.Client()
        for number in range(1, 1000, 2):
            headers = {"streamtype": "data", "requestid": str(number), "port": "80"}
            writer.write(client.open(number, headers))
            reset = bytes((0, 0, *number.to_bytes(2, "big"), 0, 0, 0, 5))
            writer.write(spdy.control(spdy.RST_STREAM, reset))
        for number, kind in ((1001, "data"), (1003, "error")):
            headers = {"streamtype": kind, "requestid": "x", "port": "80"}
            writer.write(client.open(number, headers))
        port, tasks = (await outcome).split(", ")
        assert (port, int(tasks) < 100) == ("80", True)  # those of the last turn, at most
        await reader.read()
        writer.close()


async def test_streams_together_have_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer, "ROOM", 1000)
    room = peer.Room()
    boxes = [peer.Mailbox(room) for _ in range(3)]
    for box in boxes[:2]:
        await box.put(bytes(600))
    late = asyncio.create_task(boxes[2].put(b"late"))
    await asyncio.sleep(0)
    assert not late.done()
    assert len(await boxes[0].get()) == 600
    await late
    boxes[1].drop()
    assert await boxes[2].get() == b"late"
    assert room.used == 0


async def test_who_is_held_back_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    def look() -> None:
        looks.append(1)
        if len(looks) == 3:
            raise peer.Gone

    looks: list[int] = []
    monkeypatch.setattr(peer, "LOOK_EVERY", 0.01)
    box = peer.Mailbox(look=look)
    await box.put(bytes(peer.MAILBOX + 1))
    with pytest.raises(peer.Gone):
        await box.put(b"more")
