# SPDX-License-Identifier: Apache-2.0
"""What clients of the streaming server have 30 s for, with a shorter time, over a real socket; and
what those have who do not even begin.
"""

import asyncio
import contextlib
import os
import socket
import ssl
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import structlog.testing

from cri_server import config, shims
from cri_server.streaming import pairs, peer, server, spdylink, spdypeer, wire
from tests.fakes import certificates, spdy
from tests.lab import waiting

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


Door = tuple[server.Server, str, int, ssl.SSLContext]


@pytest.fixture
async def door(tmp_path: Path) -> AsyncIterator[Door]:
    """A streaming server that speaks TLS, where it listens, and the context of a client."""
    made = certificates.make(tmp_path, "server", "IP:127.0.0.1")
    settings = config.Server(
        stream_tls_cert=os.fspath(made.certificate), stream_tls_key=os.fspath(made.key)
    )
    it = server.Server(settings, shim_host=cast("shims.Shims", None))
    await it.start()
    parts = urllib.parse.urlsplit(it.url(server.Forward(find=cast("Any", None), ports=())))
    context = ssl.create_default_context(cafile=made.certificate)
    yield it, str(parts.hostname), int(parts.port or 0), context
    await it.close()


async def test_a_crowd_that_begins_no_handshake_keeps_nobody_out(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "MOST_STRANGERS", 4)
    it, host, port, context = door
    async with asyncio.timeout(5):
        crowd = [await asyncio.open_connection(host, port) for _ in range(10)]
        ends = await asyncio.gather(*(reader.read() for reader, _ in crowd[:6]))
        assert ends == 6 * [b""]
        reader, writer = await asyncio.open_connection(host, port, ssl=context)
        assert len(it._sessions) == 4
        writer.write(b"GET /nothing HTTP/1.1\r\nHost: a\r\n\r\n")
        assert b"404" in await reader.readline()
    for _, each in (*crowd, (reader, writer)):
        each.close()


async def test_the_crowd_has_a_bound_in_all(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MOST_CONNECTIONS", 2)
    _, host, port, _ = door
    async with asyncio.timeout(5):
        crowd = [await asyncio.open_connection(host, port) for _ in range(3)]
        assert await crowd[2][0].read() == b""
    for _, each in crowd:
        each.close()


def farewells(context: ssl.SSLContext) -> Iterator[tuple[str, Callable[[socket.socket], None]]]:
    """Yield ways to leave in a handshake."""

    def hello(client: socket.socket, *, goodbye: bool) -> None:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = context.wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                client.sendall(outgoing.read())
                if not goodbye:
                    return
                incoming.write(client.recv(65536))
        with contextlib.suppress(ssl.SSLWantReadError):
            tls.unwrap()
        client.sendall(outgoing.read())  # the end of the handshake, and of all

    yield "says nothing", lambda _client: None
    yield "speaks no TLS", lambda client: client.sendall(b"GET / HTTP/1.1\r\n\r\n")
    yield "leaves after its hello", lambda client: hello(client, goodbye=False)
    yield "leaves at the end of it", lambda client: hello(client, goodbye=True)


async def test_who_drops_a_handshake_is_not_in_the_log(
    door: Door, caplog: pytest.LogCaptureFixture
) -> None:
    _, host, port, context = door

    def come_and_go(leave: Callable[[socket.socket], None]) -> None:
        with socket.create_connection((host, port), timeout=5) as client:
            leave(client)

    with structlog.testing.capture_logs() as said:
        for number, (name, leave) in enumerate(farewells(context), start=1):
            await asyncio.to_thread(come_and_go, leave)
            await asyncio.to_thread(waiting.until, lambda n=number: len(said) == n, name)
            assert (said[-1]["event"], said[-1]["log_level"]) == ("streaming client lost", "debug")
            assert not caplog.records, name
