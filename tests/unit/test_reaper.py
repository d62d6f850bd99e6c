# SPDX-License-Identifier: Apache-2.0
"""Exits are delivered once, to their owner; strays are buried; nobody is signalled by mistake."""

import os
import signal

import pytest

from shim import errors, loop, process, reaper
from tests.lab import driving


@pytest.fixture
def children() -> reaper.Reaper:
    return reaper.Reaper()


def spawn(script: str) -> int:
    child = process.spawn(["sh", "-c", script])
    os.close(child.pidfd)
    return child.pid


def zombie(script: str) -> int:
    pid = spawn(script)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    return pid


def exists(pid: int) -> bool:
    return os.path.exists(f"/proc/{pid}")


@pytest.mark.parametrize(
    ("script", "code"), [("exit 0", 0), ("exit 3", 3), ("kill -9 $$", 137), ("kill -15 $$", 143)]
)
def test_the_exit_code(children: reaper.Reaper, script: str, code: int) -> None:
    async def work() -> None:
        assert await children.claim(spawn(script)).wait() == code

    driving.drive(work())


def test_an_end_before_the_claim_is_not_lost(children: reaper.Reaper) -> None:
    async def work() -> None:
        with children.launching():
            pid = zombie("exit 7")
            children.sweep()
            claimed = children.claim(pid)
        assert await claimed.wait() == 7

    driving.drive(work())


def test_strays_are_buried_when_nobody_launches(children: reaper.Reaper) -> None:
    async def work() -> None:
        with children.launching():
            stray = zombie("exit 0")
            children.sweep()
            assert exists(stray)
        assert not exists(stray)

    driving.drive(work())


def test_a_claimed_one_is_left_to_its_owner(children: reaper.Reaper) -> None:
    async def work() -> None:
        claimed = children.claim(zombie("exit 5"))
        stray = zombie("exit 0")
        children.sweep()
        assert await claimed.wait() == 5
        assert not exists(stray)

    driving.drive(work())


def test_signals_go_to_the_process_and_to_nobody_after_it(children: reaper.Reaper) -> None:
    async def work() -> None:
        claimed = children.claim(spawn("exec sleep 60"))
        await claimed.signal(0)
        await claimed.signal(signal.SIGTERM)
        assert await claimed.wait() == 143
        await claimed.signal(signal.SIGKILL)
        await claimed.kill_tree()

    driving.drive(work())


@pytest.mark.parametrize("number", [65, 1000, -1])
def test_a_number_that_is_no_signal(children: reaper.Reaper, number: int) -> None:
    async def work() -> None:
        claimed = children.claim(spawn("exec sleep 60"))
        with pytest.raises(errors.InvalidArgument):
            await claimed.signal(number)
        await claimed.signal(signal.SIGKILL)
        await claimed.wait()

    driving.drive(work())


def test_a_tree_is_killed(children: reaper.Reaper) -> None:
    ours, theirs = os.pipe()

    async def work() -> None:
        script = "sleep 60 & setsid sleep 60 & wait"
        child = process.spawn(["sh", "-c", script], stdout=theirs)
        os.close(theirs)
        os.close(child.pidfd)
        claimed = children.claim(child.pid)
        while len(list(process.descendants(child.pid))) < 2:
            await loop.sleep(0.01)
        await claimed.kill_tree()
        assert await claimed.wait() == 137
        await loop.readable(ours)  # the last one has let go of the pipe
        assert os.read(ours, 1) == b""
        os.close(ours)

    driving.drive(work())


def test_a_process_that_does_not_exist(children: reaper.Reaper) -> None:
    pid = spawn("exit 0")
    os.waitpid(pid, 0)
    with pytest.raises(errors.Internal, match="was gone"):
        children.claim(pid)


@pytest.mark.parametrize("pid", [1, os.getppid(), os.getpid()])
def test_a_process_of_somebody_else_is_not_watched(children: reaper.Reaper, pid: int) -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(errors.Internal, match=f"process {pid} is not one that was started for us"):
        children.claim(pid)
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("pid", [-1, 0, 1 << 40])
def test_a_number_that_no_process_can_have(children: reaper.Reaper, pid: int) -> None:
    with pytest.raises(errors.Internal):
        children.claim(pid)


def test_an_end_that_somebody_else_took_has_no_code(children: reaper.Reaper) -> None:
    async def work() -> None:
        orphan = process.spawn(["sleep", "0.1"])
        claimed = children.claim(orphan.pid)
        process.reap(orphan)  # by somebody else
        assert await claimed.wait() == reaper.LOST

    driving.drive(work())
