# SPDX-License-Identifier: Apache-2.0
"""How a session ends: nothing that was sent is lost, however long the client takes to read it."""

import asyncio
import contextlib
import socket
import ssl
import struct
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import wsproto
from wsproto import events

from cri_server.streaming import peer, spdylink, websocket, wire, wspeer
from tests.fakes import certificates, spdy
from tests.unit.test_websocket import head

LINGER = 0.2
TAIL = bytes(range(256)) * 200  # less than asyncio holds before it has a writer wait
Work = Callable[[wire.Socket], Awaitable[None]]


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "LINGER", LINGER)
    monkeypatch.setattr(peer, "LOOK_EVERY", LINGER / 10)


async def connected(
    work: Work, tls: ssl.SSLContext | None = None
) -> tuple[asyncio.Server, socket.socket]:
    """Have `work` done for a client; return that client. The kernels of both hold little."""

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        await work(wire.Socket(reader, writer, seconds=60, vanished=60))

    server = await asyncio.start_server(accept, "127.0.0.1", 0, ssl=tls)
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.setblocking(False)
    await asyncio.get_running_loop().sock_connect(client, server.sockets[0].getsockname())
    return server, client


async def read(client: socket.socket) -> bytes:
    """Read to the end."""
    received = b""
    while data := await asyncio.get_running_loop().sock_recv(client, 65536):
        received += data
    return received


async def paused(work: Work, first: bytes, ping: bytes) -> bytes:
    """Return what a client reads that sends `first` and then, but for a ping, does nothing for a
    while. The session must not end before it reads.
    """

    async def until_closed(below: wire.Socket) -> None:
        await work(below)
        closed.set_result(None)

    loop = asyncio.get_running_loop()
    closed: asyncio.Future[None] = loop.create_future()
    server, client = await connected(until_closed)
    async with server, asyncio.timeout(20):
        with client:
            await loop.sock_sendall(client, first)
            await asyncio.sleep(LINGER * 4)
            assert not closed.done()
            await loop.sock_sendall(client, ping)
            await asyncio.sleep(LINGER * 2)
            received = await read(client)
        await closed
    return received


async def send_tail(below: wire.Socket) -> None:
    """Serve SPDY: send TAIL on the client's stream, and end."""
    link = spdylink.Link(below)
    stream = await link.accept()
    assert stream is not None
    await stream.write(TAIL)
    await stream.finish()
    await link.close()


def check_tail(received: bytes) -> None:
    """Assert that a SPDY client has read all of TAIL, and then the end."""
    frames = list(spdy.parse(received))
    assert b"".join(frame.payload for frame in frames if frame.kind == 0) == TAIL
    assert frames[-1].kind == spdy.GOAWAY


async def test_a_spdy_client_that_pauses_gets_the_last_of_it() -> None:
    ping = spdy.control(spdy.PING, struct.pack(">I", 1))
    check_tail(await paused(send_tail, spdy.Client().open(1), ping))


async def test_a_websocket_client_that_pauses_gets_the_last_of_it() -> None:
    async def work(below: wire.Socket) -> None:
        frames = websocket.Connection()
        frames.accept(head(), ())
        link = wspeer.Link(frames, below, read=())
        await link.send(frames.send(1, TAIL))
        await link.close()

    here = wsproto.connection.Connection(wsproto.ConnectionType.CLIENT)
    here.receive_data(await paused(work, b"", here.send(events.Ping())))
    found = list(here.events())
    message = b"".join(bytes(e.data) for e in found if isinstance(e, events.BytesMessage))
    assert message == b"\1" + TAIL
    assert isinstance(found[-1], events.CloseConnection)


async def test_a_client_that_pauses_gets_the_last_of_it_over_tls(tmp_path: Path) -> None:
    """Where some of it waits below asyncio's TLS, which does not tell."""

    def pausing() -> bytes:
        client.settimeout(20)
        with trusting.wrap_socket(client, server_hostname="127.0.0.1") as tls:
            tls.sendall(spdy.Client().open(1))
            threading.Event().wait(LINGER * 4)
            received = b""
            with contextlib.suppress(ConnectionResetError, ssl.SSLError):  # TLS knows no half close
                while data := tls.recv(4096):
                    received += data
            return received

    shown = certificates.make(tmp_path, "server", "IP:127.0.0.1")
    trusting = ssl.create_default_context(cafile=shown.certificate)
    server, client = await connected(send_tail, shown.server())
    async with server, asyncio.timeout(20):
        received = await asyncio.to_thread(pausing)
    check_tail(received)


async def test_a_client_that_has_all_and_stays_is_ended() -> None:
    async def work(below: wire.Socket) -> None:
        link = spdylink.Link(below)
        await link.close()

    server, client = await connected(work)
    async with server, asyncio.timeout(20):
        with client:
            [goodbye] = spdy.parse(await read(client))
            assert goodbye.kind == spdy.GOAWAY


async def test_a_thousand_connections_are_opened_in_one_write() -> None:
    async def work(below: wire.Socket) -> None:
        link = spdylink.Link(below)
        while (stream := await link.accept()) is not None:
            accepted.append(stream.number)
        await link.close()

    accepted: list[int] = []
    loop, opener = asyncio.get_running_loop(), spdy.Client()
    numbers = list(range(1, 4000, 2))  # two streams for each
    server, client = await connected(work)
    async with server, asyncio.timeout(20):
        with client:
            openings = b"".join(opener.open(number) for number in numbers)
            goodbye = spdy.control(spdy.GOAWAY, bytes(8))
            sending = asyncio.create_task(loop.sock_sendall(client, openings + goodbye))
            frames = list(spdy.parse(await read(client)))
            await sending
    assert accepted == numbers
    assert {frame.kind for frame in frames} == {spdy.SYN_REPLY, spdy.GOAWAY}


async def test_what_is_opened_after_the_goodbye_is_refused() -> None:
    async def work(below: wire.Socket) -> None:
        link = spdylink.Link(below)
        while await link.accept() is not None:
            continue
        await asyncio.wait([link._task])

    loop, opener = asyncio.get_running_loop(), spdy.Client()
    server, client = await connected(work)
    async with server, asyncio.timeout(20):
        with client:
            goodbye = spdy.control(spdy.GOAWAY, bytes(8))
            late = opener.open(1) + goodbye + goodbye + opener.open(3, flags=spdy.FIN)
            await loop.sock_sendall(client, late)
            client.shutdown(socket.SHUT_WR)
            frames = list(spdy.parse(await read(client)))
    assert [(f.kind, f.number) for f in frames] == [(spdy.SYN_REPLY, 1), (spdy.RST_STREAM, 3)]


async def test_others_have_their_turn_while_a_crowd_of_small_frames_is_read() -> None:
    async def work(below: wire.Socket) -> None:
        link = spdylink.Link(below, received=spdy.Client().open(1) + spdy.data(1, b"x") * 3000)
        stream = await link.accept()
        assert stream is not None
        while sum(parts) < 3000:
            parts.append(len(await stream.read()))
        await link.abort()

    parts: list[int] = []
    server, client = await connected(work)
    async with server, asyncio.timeout(20):
        with client:
            await read(client)
    assert max(parts) < 300
