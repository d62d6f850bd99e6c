# SPDX-License-Identifier: Apache-2.0
"""The server's view of a shim, against a stand-in that speaks the real protocol (`serve` below)."""

import asyncio
import os
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from shim import client, errors, loop, process
from shim.pb import shim_pb2 as pb
from shim.ttrpc import server

REPOSITORY = Path(__file__).resolve().parents[2]
HANGING = {"began": 0, "left": 0}


# ---- the stand-in: an exec's "command line" is its process field


async def run(stream: server.Stream) -> None:
    start = (await stream.recv()).start
    if start.process == b"missing":
        raise errors.NotFound("no such container")
    await stream.send(pb.ExecOutput(started=42))
    if start.process == b"talk":
        for _ in range(40):
            await stream.send(pb.ExecOutput(stdout=b"o" * 50_000))
            await stream.send(pb.ExecOutput(stderr=b"e" * 100))
        await stream.send(pb.ExecOutput(exit=pb.ExecExit(exit_code=7)))
    elif start.process == b"hang":
        HANGING["began"] += 1
        try:
            await stream.disconnected.wait()
        finally:
            HANGING["left"] += 1
    elif start.process == b"cat":
        while (said := await stream.recv()) is not None and not said.close_stdin:
            await stream.send(pb.ExecOutput(stdout=said.stdin))
        await stream.send(pb.ExecOutput(exit=pb.ExecExit(timed_out=True)))


async def ping(_: pb.PingRequest) -> pb.PingResponse:
    return pb.PingResponse(pod_id="stand-in", pid=HANGING["left"], version=HANGING["began"])


async def wait(request: pb.WaitRequest) -> pb.WaitResponse:
    await loop.sleep(3600 if request.id == "forever" else 0)
    return pb.WaitResponse(exit=pb.ExitRecord(exit_code=3, reason="Because"))


def serve(path: str) -> None:
    methods: dict[str, server.Method] = {
        "Ping": server.Unary(request=pb.PingRequest, handler=ping),
        "Wait": server.Unary(request=pb.WaitRequest, handler=wait),
        "Exec": server.Streaming(request=pb.ExecInput, handler=run),
    }
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        loop.run(server.Server(client.SERVICE, methods).serve(listener))


# ---- fixtures


@pytest.fixture
def stand_in(tmp_path: Path) -> Iterator[tuple[str, process.Child]]:
    path = os.fspath(tmp_path / "shim.sock")
    env = {**process.DEFAULT_ENV, "PYTHONPATH": os.fspath(REPOSITORY)}
    child = process.spawn([sys.executable, "-P", __file__, path], env=env, stderr=2)
    yield path, child
    process.kill_group(child)
    process.reap(child)


@asynccontextmanager
async def connected(path: str) -> AsyncIterator[client.ShimClient]:
    async with asyncio.timeout(10):
        while True:
            try:
                shim = await client.ShimClient.connect(path)
                break
            except errors.Unavailable:
                await asyncio.sleep(0.01)
    yield shim
    shim.close()


def start(what: bytes) -> pb.ExecStart:
    return pb.ExecStart(id="container", process=what)


async def wait_hanging(shim: client.ShimClient, *, began: int, left: int) -> None:
    """Wait until so many execs hang or have been left; the stand-in tells by its ping."""
    async with asyncio.timeout(10):
        while ((answer := await shim.ping()).version, answer.pid) != (began, left):  # noqa: ASYNC110 - it is another process
            await asyncio.sleep(0.01)


# ---- tests


async def test_verbs_carry_messages_both_ways(stand_in: tuple[str, process.Child]) -> None:
    async with connected(stand_in[0]) as shim:
        assert (await shim.ping()).pod_id == "stand-in"
        ended = await shim.wait(pb.WaitRequest(id="x"))
        assert (ended.exit.exit_code, ended.exit.reason) == (3, "Because")


async def test_a_verb_that_the_shim_does_not_know(stand_in: tuple[str, process.Child]) -> None:
    async with connected(stand_in[0]) as shim:
        with pytest.raises(errors.ShimError) as caught:
            await shim.kill(pb.KillRequest(id="x"))
        assert caught.value.code == errors.Unimplemented.code


async def test_a_shim_that_is_not_there_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(errors.Unavailable):
        await client.ShimClient.connect(os.fspath(tmp_path / "none"))


async def test_a_mute_shim_costs_its_caller_the_time_limit(
    stand_in: tuple[str, process.Child],
) -> None:
    async with connected(stand_in[0]) as shim:
        with pytest.raises(errors.DeadlineExceeded):
            await shim.wait(pb.WaitRequest(id="forever"), timeout=0.05)
        assert (await shim.ping(timeout=10)).pod_id == "stand-in"


async def test_the_death_of_a_shim_is_told(stand_in: tuple[str, process.Child]) -> None:
    async with connected(stand_in[0]) as shim:
        waiting = asyncio.create_task(shim.wait(pb.WaitRequest(id="forever")))
        await shim.ping()
        process.kill_group(stand_in[1])
        await asyncio.wait_for(asyncio.shield(shim.closed), 10)
        with pytest.raises(errors.Unavailable):
            await waiting


async def test_exec_sync_collects_both_streams_and_the_code(
    stand_in: tuple[str, process.Child],
) -> None:
    async with connected(stand_in[0]) as shim:
        done = await shim.exec_sync(start(b"talk"))
        assert (len(done.stdout), len(done.stderr)) == (2_000_000, 4000)
        assert (done.exit_code, done.timed_out) == (7, False)


async def test_exec_sync_cuts_each_stream_and_reads_on(
    stand_in: tuple[str, process.Child],
) -> None:
    async with connected(stand_in[0]) as shim:
        done = await shim.exec_sync(start(b"talk"), max_bytes=1000)
        assert (len(done.stdout), len(done.stderr), done.exit_code) == (1000, 1000, 7)


async def test_exec_sync_that_cannot_be_run_raises_why(
    stand_in: tuple[str, process.Child],
) -> None:
    async with connected(stand_in[0]) as shim:
        with pytest.raises(errors.NotFound, match="no such container"):
            await shim.exec_sync(start(b"missing"))
        with pytest.raises(errors.Internal, match="without saying how"):
            await shim.exec_sync(start(b"nothing"))


async def test_cancelling_exec_sync_closes_its_connection_and_no_other(
    stand_in: tuple[str, process.Child],
) -> None:
    async with connected(stand_in[0]) as shim:
        running = asyncio.create_task(shim.exec_sync(start(b"hang")))
        await wait_hanging(shim, began=1, left=0)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        await wait_hanging(shim, began=1, left=1)


async def test_exec_talks_both_ways(stand_in: tuple[str, process.Child]) -> None:
    async with connected(stand_in[0]) as shim, shim.exec() as stream:
        await stream.send(pb.ExecInput(start=start(b"cat")))
        first = await stream.recv()
        assert first is not None
        assert first.started == 42
        await stream.send(pb.ExecInput(stdin=b"hello"))
        echoed = await stream.recv()
        assert echoed is not None
        assert echoed.stdout == b"hello"
        await stream.send(pb.ExecInput(close_stdin=True))
        last = await stream.recv()
        assert last is not None
        assert last.exit.timed_out
        assert await stream.recv() is None


if __name__ == "__main__":
    serve(sys.argv[1])
