# SPDX-License-Identifier: Apache-2.0
"""The small HTTP server against clients that behave badly, on a real socket."""

import asyncio
import contextlib
import os
import socket
import stat
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from cri_server import errors, localhttp

GET = b"GET %s HTTP/1.1\r\nHost: x\r\n\r\n"
Say = Callable[[bytes], Awaitable[bytes]]


def answer(path: str) -> localhttp.Answer:
    if path == "/big":
        return localhttp.Answer(body=b"x" * (8 << 20))
    return localhttp.Answer(body=path.encode())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "http.sock"


@pytest.fixture
async def server(path: Path) -> AsyncIterator[localhttp.Server]:
    running = localhttp.Server(path, answer)
    await running.start()
    yield running
    await running.close()


@pytest.fixture
def say(server: localhttp.Server, path: Path) -> Say:
    """Send bytes on a connection of their own and return all that comes until it ends."""

    async def say(request: bytes) -> bytes:
        return await asyncio.to_thread(talk, path, request)

    return say


def talk(path: Path, request: bytes) -> bytes:
    found = b""
    with socket.socket(socket.AF_UNIX) as client, contextlib.suppress(ConnectionError):
        client.settimeout(5)
        client.connect(os.fspath(path))
        client.sendall(request)
        client.shutdown(socket.SHUT_WR)
        while piece := client.recv(65536):
            found += piece
    return found


def exists(path: Path) -> bool:
    return path.exists()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def status(answered: bytes) -> int:
    return int(answered.split()[1])


async def test_a_get_is_answered(say: Say) -> None:
    answered = await say(GET % b"/some/path?query=1")

    assert status(answered) == 200
    assert b"Content-Length: 10\r\n" in answered
    assert answered.endswith(b"\r\n\r\n/some/path")


async def test_a_connection_serves_many_requests(say: Say) -> None:
    answered = await say(GET % b"/a" + GET % b"/b" + GET % b"/c")

    assert answered.count(b"HTTP/1.1 200") == 3


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 405),
        (b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: nine\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"a: b\r\n" * 5000 + b"\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n", 405),
        (b"DELETE / HTTP/1.1\r\nHost: x\r\n\r\n", 405),
    ],
)
async def test_what_is_no_get_is_refused(say: Say, request_: bytes, code: int) -> None:
    assert status(await say(request_)) == code


async def test_the_socket_is_for_root_and_its_group(server: localhttp.Server, path: Path) -> None:
    assert mode(path) == 0o660


async def test_a_request_that_does_not_come_to_its_end_is_given_up(
    say: Say, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(localhttp, "IDLE_TIMEOUT", 0.05)
    reader, writer = await asyncio.open_unix_connection(os.fspath(path))
    writer.write(b"GET / HT")

    assert await asyncio.wait_for(reader.read(), 5) == b""
    writer.close()


async def test_an_answer_that_nobody_reads_is_given_up(
    server: localhttp.Server, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(localhttp, "SEND_TIMEOUT", 0.05)
    given_up = await asyncio.to_thread(starve, path)

    assert 0 < given_up < 8 << 20


def starve(path: Path) -> int:
    """Ask for much, read nothing until the server must have given up, and return what came."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(5)
        client.connect(os.fspath(path))
        client.sendall(GET % b"/big")
        time.sleep(0.5)  # nothing but time can tell that the server waits no longer
        found = 0
        with contextlib.suppress(ConnectionError):
            while piece := client.recv(65536):
                found += len(piece)
    return found


async def test_more_connections_than_a_bound_are_refused(
    say: Say, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(localhttp, "MOST_CONNECTIONS", 2)
    held = [await asyncio.open_unix_connection(os.fspath(path)) for _ in range(2)]

    assert status(await say(GET % b"/")) == 503
    for _, writer in held:
        writer.close()
        await writer.wait_closed()


async def test_a_socket_without_a_server_is_replaced(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(os.fspath(path))
    server = localhttp.Server(path, answer)
    await server.start()
    await server.close()

    assert not exists(path)


async def test_a_socket_with_a_server_is_left_alone(server: localhttp.Server, path: Path) -> None:
    with pytest.raises(errors.FailedPrecondition, match="somebody else listens"):
        await localhttp.Server(path, answer).start()

    assert exists(path)


async def test_what_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(errors.FailedPrecondition, match="no socket"):
        await localhttp.Server(tmp_path, answer).start()

    assert exists(tmp_path)


async def test_a_close_ends_what_is_open(server: localhttp.Server, path: Path) -> None:
    reader, writer = await asyncio.open_unix_connection(os.fspath(path))
    writer.write(GET % b"/a")
    await reader.readuntil(b"/a")
    await server.close()

    assert await asyncio.wait_for(reader.read(), 5) == b""
    writer.close()
