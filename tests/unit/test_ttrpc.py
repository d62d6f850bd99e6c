# SPDX-License-Identifier: Apache-2.0
"""The asyncio client against the real server, in a process of its own (`serve` below)."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from shim import errors, loop, process
from shim.pb import shim_pb2 as pb
from shim.pb import ttrpc_pb2
from shim.ttrpc import address, client, frames, server
from tests.lab import scarcity, waiting

REPOSITORY = Path(__file__).resolve().parents[2]
SERVICE = "test.Echo"
CHUNK = b"x" * 60_000
COUNTS = {"sent": 0, "cancelled": 0, "slow": 0}


# ---- the server


async def echo(request: pb.ExecOutput) -> pb.ExecOutput:
    await loop.sleep(len(request.stdout) % 7 / 1000)  # answers come in another order
    return request


async def fail(_: pb.ExecOutput) -> pb.ExecOutput:
    raise errors.FailedPrecondition("not now")


async def bug(_: pb.ExecOutput) -> pb.ExecOutput:
    raise KeyError("oops")


async def slow(request: pb.ExecOutput) -> pb.ExecOutput:
    await loop.sleep(0.2)
    COUNTS["slow"] += 1
    return request


async def huge(_: pb.ExecOutput) -> pb.ExecOutput:
    return pb.ExecOutput(stdout=bytes(frames.MAX_PAYLOAD + 1))


async def counts(_: pb.ExecOutput) -> pb.ExecOutput:
    return pb.ExecOutput(stdout=" ".join(f"{k}={v}" for k, v in COUNTS.items()).encode())


async def cat(stream: server.Stream) -> None:
    while (message := await stream.recv()) is not None:
        if message.stdout == b"fail":
            raise errors.NotFound("asked for")
        await stream.send(message)


async def flood(stream: server.Stream) -> None:
    for number in range(200):
        await stream.send(pb.ExecOutput(stdout=b"%d " % number + CHUNK))
        COUNTS["sent"] += 1


async def hang(stream: server.Stream) -> None:
    try:
        await stream.disconnected.wait()
    finally:
        COUNTS["cancelled"] += 1


def serve(path: str) -> None:
    kind = pb.ExecOutput
    methods: dict[str, server.Method] = {
        f.__name__: server.Unary(request=kind, handler=f)
        for f in (echo, fail, bug, slow, huge, counts)
    }
    for handler in (cat, flood, hang):
        methods[handler.__name__] = server.Streaming(request=kind, handler=handler)
    loop.set_error_hook(lambda name, error: None)
    with socket.socket(socket.AF_UNIX) as listener:
        with address.usable(path) as name:
            listener.bind(name)
        listener.listen()
        loop.run(server.Server(SERVICE, methods).serve(listener))


# ---- fixtures


@pytest.fixture
def running(tmp_path: Path) -> Iterator[tuple[str, int]]:
    """A server's socket path, which is too long for the kernel, and its pid."""
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    path = str(folder / "s")
    env = {**process.DEFAULT_ENV, "PYTHONPATH": str(REPOSITORY)}
    child = process.spawn([sys.executable, "-P", __file__, path], env=env, stderr=2)
    yield path, child.pid
    process.kill_group(child)
    process.reap(child)


@asynccontextmanager
async def connected(path: str) -> AsyncIterator[client.Connection]:
    async with asyncio.timeout(10):
        while True:
            try:
                connection = await client.Connection.connect(path)
                break
            except errors.Unavailable:
                await asyncio.sleep(0.01)
    try:
        yield connection
    finally:
        connection.close()


async def call(
    connection: client.Connection, method: str, said: bytes = b"", timeout: float | None = 10
) -> bytes:
    request = pb.ExecOutput(stdout=said)
    answer = await connection.call(SERVICE, method, request, pb.ExecOutput, timeout)
    return answer.stdout


async def count(connection: client.Connection, name: str) -> int:
    said = dict(pair.split("=") for pair in (await call(connection, "counts")).decode().split())
    return int(said[name])


async def wait_count(path: str, name: str, wanted: int) -> None:
    async with asyncio.timeout(10), connected(path) as connection:
        while await count(connection, name) != wanted:  # noqa: ASYNC110 - it is another process
            await asyncio.sleep(0.01)


# ---- unary


async def test_calls_share_a_connection_and_each_gets_its_answer(running: tuple[str, int]) -> None:
    async with connected(running[0]) as connection:
        sizes = [n * 997 for n in range(100)]
        answers = await asyncio.gather(*(call(connection, "echo", b"x" * n) for n in sizes))
        assert [len(answer) for answer in answers] == sizes


@pytest.mark.parametrize(
    ("method", "kind", "text"),
    [
        ("fail", errors.FailedPrecondition, "not now"),
        ("bug", errors.Internal, "KeyError: 'oops'"),
        ("missing", errors.Unimplemented, "no method"),
        ("huge", errors.ResourceExhausted, "over the limit"),
    ],
)
async def test_errors_keep_their_kind(
    running: tuple[str, int], method: str, kind: type[errors.ShimError], text: str
) -> None:
    async with connected(running[0]) as connection:
        with pytest.raises(errors.ShimError, match=text) as caught:
            await call(connection, method)
        assert type(caught.value) is kind
        assert await call(connection, "echo", b"alive") == b"alive"


async def test_what_says_nothing_about_the_server_is_not_its_absence(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with pytest.raises(errors.Unavailable):
        await client.Connection.connect(path)
    with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as waiters:
        listener.bind(path)
        with pytest.raises(errors.Unavailable):
            await client.Connection.connect(path)
        listener.listen(0)
        with scarcity.no_descriptors(), pytest.raises(errors.ResourceExhausted):
            await client.Connection.connect(path)
        waiters.callback((await client.Connection.connect(path)).close)
        with pytest.raises(errors.DeadlineExceeded, match="queue is full"):
            await client.Connection.connect(path)
    await asyncio.sleep(0)


async def test_an_answer_that_came_while_this_process_was_stopped_counts(
    running: tuple[str, int],
) -> None:
    async with connected(running[0]) as connection:
        answering = asyncio.create_task(call(connection, "slow", timeout=0.3))
        await asyncio.sleep(0)  # it is sent
        time.sleep(1)  # noqa: ASYNC251 - the answer and the deadline are both there afterwards
        await answering


async def test_a_late_call_goes_on_and_its_answer_is_dropped(running: tuple[str, int]) -> None:
    async with connected(running[0]) as connection:
        with pytest.raises(errors.DeadlineExceeded):
            await call(connection, "slow", timeout=0.02)
        await wait_count(running[0], "slow", 1)
        assert await call(connection, "echo", b"next") == b"next"


async def test_a_unary_call_runs_to_its_end_when_the_caller_goes(running: tuple[str, int]) -> None:
    async with connected(running[0]) as connection:
        task = asyncio.create_task(call(connection, "slow"))
        await call(connection, "echo")  # by now the server has the other one too
    with pytest.raises(errors.Unavailable):
        await task
    await wait_count(running[0], "slow", 1)


async def test_a_dead_server_ends_what_is_in_progress(running: tuple[str, int]) -> None:
    async with connected(running[0]) as connection:
        task = asyncio.create_task(call(connection, "slow"))
        stream = await connection.stream(SERVICE, "hang", pb.ExecOutput)
        await call(connection, "echo")
        os.kill(running[1], signal.SIGKILL)
        with pytest.raises(errors.Unavailable):
            await task
        with pytest.raises(errors.Unavailable):
            await stream.recv()
        await asyncio.wait_for(connection.closed, 5)
        with pytest.raises(errors.Unavailable):
            await call(connection, "echo")


async def test_a_message_over_the_limit_is_refused_before_it_is_sent(
    running: tuple[str, int],
) -> None:
    async with connected(running[0]) as connection:
        with pytest.raises(errors.InvalidArgument, match="over the limit"):
            await call(connection, "echo", bytes(frames.MAX_PAYLOAD + 1))
        assert await call(connection, "echo", b"alive") == b"alive"


def raw(path: str) -> socket.socket:
    plain = socket.socket(socket.AF_UNIX)
    plain.settimeout(10)
    with address.usable(path) as name:
        plain.connect(name)
    return plain


def answer(plain: socket.socket) -> tuple[int, ttrpc_pb2.Response]:
    decoder = frames.Decoder()
    while (frame := decoder.next()) is None:
        decoder.receive(plain.recv(65536))
    assert isinstance(frame, frames.Frame)
    return frame.stream, ttrpc_pb2.Response.FromString(frame.payload)


async def test_a_connection_survives_what_a_bad_client_sends(running: tuple[str, int]) -> None:
    async with connected(running[0]):
        pass  # it is up
    with raw(running[0]) as plain:
        plain.sendall(bytes.fromhex(f"{frames.MAX_PAYLOAD + 1:08x} 00000001 01 00"))
        plain.sendall(bytes(frames.MAX_PAYLOAD + 1))
        assert answer(plain)[1].status.code == 8  # RESOURCE_EXHAUSTED, as containerd's
        plain.sendall(frames.encode(4, frames.REQUEST, 0, b""))  # an even number is the server's
        assert answer(plain)[1].status.code == errors.InvalidArgument.code
        plain.sendall(frames.encode(3, frames.REQUEST, 0, b"\xff\xff"))
        assert answer(plain)[1].status.code == errors.InvalidArgument.code
        plain.sendall(frames.encode(99, frames.DATA, 0, b"nobody's"))
        for byte in server.call(5, SERVICE, "counts"):
            plain.sendall(bytes([byte]))
        number, response = answer(plain)
        assert (number, response.status.code) == (5, 0)


# ---- streams


async def test_a_stream_talks_both_ways_until_both_ends_close(running: tuple[str, int]) -> None:
    async with connected(running[0]) as connection:
        stream = await connection.stream(SERVICE, "cat", pb.ExecOutput)
        for said in (b"one", b"", b"three"):
            await stream.send(pb.ExecOutput(stdout=said))
            heard = await stream.recv()
            assert heard is not None
            assert heard.stdout == said
        no_more = frames.REMOTE_CLOSED | frames.NO_DATA  # as other clients of ttrpc may say
        await connection.send(stream._number, frames.DATA, no_more, b"")
        assert await stream.recv() is None
        assert await stream.recv() is None


async def test_a_stream_that_fails_says_why(running: tuple[str, int]) -> None:
    async with connected(running[0]) as connection:
        stream = await connection.stream(SERVICE, "cat", pb.ExecOutput)
        await stream.send(pb.ExecOutput(stdout=b"fail"))
        with pytest.raises(errors.NotFound, match="asked for"):
            await stream.recv()


async def test_a_slow_reader_stops_the_sender_and_loses_nothing(running: tuple[str, int]) -> None:
    async with connected(running[0]) as connection, connected(running[0]) as other:
        stream = await connection.stream(SERVICE, "flood", pb.ExecOutput)
        before = -1
        while (now := await count(other, "sent")) != before or not now:
            before = now
            await asyncio.sleep(0.1)
        assert now < 100  # of 200: the socket is full, and so is the inbox
        numbers = []
        while (message := await stream.recv()) is not None:
            numbers.append(int(message.stdout.split()[0]))
        assert numbers == list(range(200))


async def test_a_handler_that_does_not_read_stops_the_client_and_sees_it_go(
    running: tuple[str, int],
) -> None:
    async with connected(running[0]) as connection:
        stream = await connection.stream(SERVICE, "hang", pb.ExecOutput)

        async def push() -> None:
            while True:
                await stream.send(pb.ExecOutput(stdout=CHUNK))

        with pytest.raises(TimeoutError):
            await asyncio.wait_for(push(), 0.5)
        async with connected(running[0]) as other:
            assert await count(other, "cancelled") == 0
    await wait_count(running[0], "cancelled", 1)


async def test_a_hundred_connections_come_and_go(running: tuple[str, int]) -> None:
    async with connected(running[0]) as connection:
        await call(connection, "echo")
        before = fds(running[1])
        for _ in range(100):
            async with connected(running[0]) as other:
                stream = await other.stream(SERVICE, "hang", pb.ExecOutput)
                assert await call(other, "echo", b"x") == b"x"
                del stream
        await wait_count(running[0], "cancelled", 100)
        closed = asyncio.to_thread(
            waiting.until, lambda: fds(running[1]) == before, "all are closed"
        )
        await closed  # in a thread, because the loop has our ends to close


def fds(pid: int) -> list[str]:
    return sorted(os.listdir(f"/proc/{pid}/fd"))


if __name__ == "__main__":
    serve(sys.argv[1])
