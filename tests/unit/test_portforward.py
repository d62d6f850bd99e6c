# SPDX-License-Identifier: Apache-2.0
"""Port-forward through a real streaming server, to servers of the test on loopback: what the pods
of test_portforward.py in tests/integration cannot show, or not as quickly.
"""

import asyncio
import contextlib
import socket
import threading
import urllib.parse
from collections.abc import AsyncIterator, Callable
from typing import Any, cast

import pytest

from cri_server import config, errors, shims
from cri_server.streaming import peer, portforward, server, wire
from tests.fakes import forwards, streams
from tests.lab.listening import echo, listening, silent

HERE = portforward.Place(netns="")
KINDS = [forwards.Spdy, forwards.Tunnel, forwards.Channels]
Kind = Callable[..., Any]


@contextlib.asynccontextmanager
async def serving(
    *ports: int, find: portforward.Find = lambda: HERE, **settings: Any
) -> AsyncIterator[str]:
    """Have a streaming server; give the URL of a port-forward."""
    wanted = config.Server(**settings)
    made = server.Server(wanted, shim_host=cast("shims.Shims", None))  # of no use to a port-forward
    await made.start()
    try:
        yield made.url(server.Forward(find=find, ports=ports))
    finally:
        await made.close()


@pytest.mark.parametrize("kind", KINDS)
async def test_a_network_stack_of_its_own_is_reached_at_its_address(kind: Kind) -> None:
    def session(url: str, port: int) -> None:
        with kind(url, [port]) as client:
            client.send("data0", b"hello")
            streams.until(client, "data0", b"hello")

    place = portforward.Place(netns="", addresses=("127.0.0.3", "127.0.0.2"))
    with listening("", echo, address="127.0.0.2") as port:
        async with serving(port, find=lambda: place) as url:
            await asyncio.to_thread(session, url, port)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_pod_that_is_not_ready_any_more(kind: Kind) -> None:
    def find() -> portforward.Place:
        raise errors.FailedPrecondition("pod sandbox x is not ready")

    def session(url: str) -> None:
        with kind(url, [80]) as client:
            streams.until(client, "error0", b"pod sandbox x is not ready")

    async with serving(80, find=find) as url:
        await asyncio.to_thread(session, url)


async def test_a_pod_that_ends_during_a_session() -> None:
    def find() -> portforward.Place:
        if stopped:
            raise errors.NotFound("pod sandbox 'x' not found")
        return HERE

    def session(url: str) -> None:
        with forwards.Spdy(url, [port]) as client:
            client.send("data0", b"one")
            streams.until(client, "data0", b"one")
            stopped.append(True)
            client.pair(1, port)
            streams.until(client, "error1", b"not found")

    stopped: list[bool] = []
    with listening("", echo) as port:
        async with serving(find=find) as url:
            await asyncio.to_thread(session, url)


@pytest.mark.parametrize("kind", KINDS[:2])
async def test_who_ends_his_half_waits_for_the_answer(
    kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(portforward, "_LINGER", 0.1)

    def slow(connection: socket.socket) -> None:
        while connection.recv(65536):
            continue
        threading.Event().wait(0.5)  # longer than the time that is for who goes on
        connection.sendall(b"answer")

    def session(url: str, port: int) -> bytes:
        with kind(url, [port]) as client:
            client.send("data0", b"request")
            client.finish("data0")
            while "error0" not in client.ended:
                assert client.step()
            return bytes(client.received["data0"])

    with listening("", slow) as port:
        async with serving() as url:
            assert await asyncio.to_thread(session, url, port) == b"answer"


def tight(url: str) -> socket.socket:
    """Return a connection to the server of a URL that holds little of what comes."""
    parts = urllib.parse.urlsplit(url)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(streams.TIMEOUT)
    connection.connect((parts.hostname, parts.port))
    return connection


@pytest.mark.parametrize("kind", KINDS[:2])
async def test_a_client_that_has_said_goodbye_and_pauses_gets_the_last_of_it(
    kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "connected", tight)
    monkeypatch.setattr(wire, "LINGER", 0.2)
    monkeypatch.setattr(peer, "LOOK_EVERY", 0.02)
    size = 200_000

    def session(url: str, port: int) -> int:
        with kind(url, [port]) as client:
            client.finish("data0")
            client.say_goodbye()
            for number in (1, 3):
                threading.Event().wait(0.5)  # longer than who has it all may take to leave
                client.ping(number)  # a closed socket would answer with a reset
            while client.step():
                continue
            return len(client.received["data0"])

    with listening("", lambda connection: connection.sendall(bytes(size))) as port:
        async with serving() as url:
            assert await asyncio.to_thread(session, url, port) == size


@pytest.mark.parametrize("kind", KINDS)
async def test_silence_ends_a_session(kind: Kind) -> None:
    def session(url: str, port: int) -> None:
        with kind(url, [port]) as client, contextlib.suppress(ConnectionResetError):
            while client.step():
                continue

    with listening("", silent) as port:
        async with serving(port, stream_idle_timeout=0.3) as url, asyncio.timeout(20):
            await asyncio.to_thread(session, url, port)
