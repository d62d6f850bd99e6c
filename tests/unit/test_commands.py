# SPDX-License-Identifier: Apache-2.0
"""The server's runner of programs: output, limits, time, cancellation, nothing left."""

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from cri_server import commands, errors
from shim import process
from tests.lab import waiting


async def sh(script: str, *, timeout: float | None = 20, **how: object) -> commands.Finished:
    return await commands.run(["sh", "-c", script], timeout=timeout, **how)  # type: ignore[arg-type]


async def test_input_and_output_are_whole_and_apart() -> None:
    data = bytes(range(256)) * 4000
    done = await sh("cat; echo err >&2", stdin=data)
    assert (done.returncode, done.stdout, done.stderr) == (0, data, b"err\n")


async def test_without_input_stdin_is_at_its_end() -> None:
    assert (await sh("cat")).stdout == b""


async def test_output_is_cut_and_the_rest_read_away() -> None:
    script = "for s in 1 2; do head -c 1000000 /dev/zero >&$s & done; wait"
    done = await sh(script, max_output=1000)
    assert (len(done.stdout), len(done.stderr)) == (1000, 1000)


async def test_a_code_other_than_0_is_an_error_that_says_what_the_program_said() -> None:
    with pytest.raises(commands.Failed, match="sh failed with 3: no such luck") as caught:
        await sh("echo no such; echo luck; exit 3 >&2", check=True)
    assert isinstance(caught.value, errors.Internal)
    assert caught.value.finished.returncode == 3
    assert caught.value.command.startswith("sh -c '")


async def test_a_code_other_than_0_may_be_an_answer() -> None:
    assert (await sh("exit 3", check=False)).returncode == 3
    assert (await sh("kill -9 $$", check=False)).returncode == -9


@pytest.mark.parametrize(("program", "code"), [("no-such-program", 127), ("/etc/passwd", 126)])
async def test_what_cannot_be_started_fails_as_in_a_shell(program: str, code: int) -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(commands.Failed) as caught:
        await commands.run([program], timeout=1, stdin=b"x", check=False)
    assert caught.value.finished.returncode == code
    assert os.listdir("/proc/self/fd") == before


@asynccontextmanager
async def stubborn_tree(timeout: float | None) -> AsyncIterator[asyncio.Task[commands.Finished]]:
    """A program that started another one, which left its session: both are dead afterwards."""
    r, w = os.pipe()
    script = f"setsid sleep 1000 & echo $! >/proc/{os.getpid()}/fd/{w}; echo hello; sleep 1000"
    task = asyncio.create_task(sh(script, timeout=timeout))
    stray = int(await asyncio.to_thread(os.read, r, 20))
    started = process.start_time(stray)
    try:
        yield task
    finally:
        os.close(r)
        os.close(w)
    waiting.until(lambda: not process.alive(stray, started), "the stray is dead")
    check_no_zombie()


def check_no_zombie() -> None:
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


async def test_a_time_limit_kills_the_tree_and_keeps_what_it_said() -> None:
    async with stubborn_tree(0.5) as task:
        with pytest.raises(commands.TimedOut, match=r"killed after 0\.5 s") as caught:
            await task
        assert isinstance(caught.value, errors.DeadlineExceeded)
        assert caught.value.finished.stdout == b"hello\n"


async def test_cancelling_kills_the_tree() -> None:
    async with stubborn_tree(None) as task:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_a_daemon_that_holds_the_pipes_delays_but_does_not_hang() -> None:
    began = time.monotonic()
    assert (await sh("sleep 3.5 & echo hi")).stdout == b"hi\n"
    assert time.monotonic() - began < 3.2


async def test_fifty_at_once_leave_no_descriptor() -> None:
    before = os.listdir("/proc/self/fd")
    async with asyncio.TaskGroup() as group:
        for _ in range(50):
            group.create_task(sh("echo x; echo y >&2"))
    assert os.listdir("/proc/self/fd") == before
