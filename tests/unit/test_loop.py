# SPDX-License-Identifier: Apache-2.0
"""The scheduler of a shim: waiting, cancelling, time limits, running programs."""

import os
import resource
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

import pytest

from shim import loop, process


@contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    r, w = os.pipe()
    try:
        yield r, w
    finally:
        for fd in (r, w):
            with suppress(OSError):
                os.close(fd)


def clean() -> bool:
    """Whether nothing is registered with the running loop but the current task."""
    inner = loop._loop()
    timers = [t for t in inner.timers if t.callback is not None]
    return not inner.waiters and not timers and not inner.ready


def test_run_returns_what_main_returns_and_raises_what_it_raises() -> None:
    async def good() -> int:
        return 7

    async def bad() -> None:
        raise KeyError("x")

    assert loop.run(good()) == 7
    with pytest.raises(KeyError):
        loop.run(bad())


def test_a_loop_inside_a_loop_is_refused() -> None:
    async def inner() -> None: ...

    async def main() -> None:
        with pytest.raises(RuntimeError):
            loop.run(inner())

    loop.run(main())


def test_readable_wakes_when_a_byte_arrives() -> None:
    async def main() -> bytes:
        with pipe() as (r, w):

            async def writer() -> None:
                await loop.sleep(0.01)
                os.write(w, b"x")

            loop.spawn(writer())
            await loop.readable(r)
            assert clean()
            return os.read(r, 1)

    assert loop.run(main()) == b"x"


def test_one_descriptor_serves_a_reader_and_a_writer() -> None:
    async def main() -> None:
        a, b = socket.socketpair()
        with a, b:
            a.setblocking(False)
            reader = loop.spawn(loop.readable(a.fileno()))
            await loop.writable(a.fileno())
            assert not reader.done
            b.send(b"x")
            await reader.join()
            assert clean()

    loop.run(main())


def test_two_readers_of_one_descriptor_are_a_bug_that_is_told() -> None:
    async def main() -> None:
        with pipe() as (r, _):
            first = loop.spawn(loop.readable(r))
            await loop.sleep(0)
            with pytest.raises(RuntimeError, match="both wait"):
                await loop.readable(r)
            first.cancel()
            with pytest.raises(loop.Cancelled):
                await first.join()
            assert clean()

    loop.run(main())


def test_a_regular_file_is_always_ready() -> None:
    async def main() -> None:
        fd = os.open("/etc/passwd", os.O_RDONLY)
        try:
            await loop.readable(fd)
        finally:
            os.close(fd)

    loop.run(main())


def test_closing_a_descriptor_wakes_who_waits_for_it() -> None:
    async def main() -> None:
        r, w = os.pipe()
        task = loop.spawn(loop.readable(r))
        await loop.sleep(0)
        loop.close(r)
        with pytest.raises(OSError, match="closed"):
            await task.join()
        os.close(w)
        assert clean()

    loop.run(main())


def test_hung_up_is_seen_over_unread_data() -> None:
    async def main() -> None:
        a, b = socket.socketpair()
        with a:
            b.send(b"unread")
            task = loop.spawn(loop.hung_up(a.fileno()))
            await loop.sleep(0.01)
            assert not task.done
            b.close()
            await task.join()

    loop.run(main())


async def forever() -> None:
    await loop.sleep(3600)


async def on_event() -> None:
    await loop.Event().wait()


async def on_task() -> None:
    task = loop.spawn(forever())
    try:
        await task.join()
    finally:
        task.cancel()


async def on_descriptor() -> None:
    with pipe() as (r, _):
        await loop.readable(r)


async def on_lock() -> None:
    lock = loop.Lock()
    async with lock, lock:
        pass


@pytest.mark.parametrize("wait", [forever, on_event, on_task, on_descriptor, on_lock])
def test_a_cancelled_wait_leaves_nothing_registered(
    wait: Callable[[], Coroutine[Any, Any, None]],
) -> None:
    async def main() -> None:
        task = loop.spawn(wait())
        await loop.sleep(0)
        await loop.sleep(0)
        task.cancel()
        with pytest.raises(loop.Cancelled):
            await task.join()
        await loop.sleep(0)
        await loop.sleep(0)
        assert clean()

    loop.run(main())


def test_cancel_before_the_first_wait_arrives_at_it() -> None:
    steps: list[str] = []

    async def work() -> None:
        steps.append("began")
        try:
            await loop.sleep(0)
        finally:
            await loop.sleep(0)  # waiting while cleaning up works
            steps.append("cleaned")

    async def main() -> None:
        task = loop.spawn(work())
        task.cancel()
        with pytest.raises(loop.Cancelled):
            await task.join()

    loop.run(main())
    assert steps == ["began", "cleaned"]


def test_main_ending_cancels_and_awaits_the_others() -> None:
    cleaned: list[int] = []

    async def work() -> None:
        try:
            await forever()
        finally:
            await loop.sleep(0.01)
            cleaned.append(1)

    async def main() -> None:
        loop.spawn(work())
        await loop.sleep(0)

    loop.run(main())
    assert cleaned == [1]


def test_an_error_that_nobody_waits_for_goes_to_the_hook_and_the_loop_goes_on() -> None:
    seen: list[tuple[str, BaseException]] = []
    before = loop.on_task_error
    loop.set_error_hook(lambda name, error: seen.append((name, error)))

    async def bad() -> None:
        raise KeyError("x")

    async def main() -> str:
        loop.spawn(bad(), name="bad one")
        await loop.sleep(0.01)
        return "alive"

    try:
        assert loop.run(main()) == "alive"
    finally:
        loop.set_error_hook(before)
    assert [name for name, _ in seen] == ["bad one"]


def test_a_busy_task_does_not_starve_the_others() -> None:
    async def spin(until: Callable[[], bool]) -> int:
        turns = 0
        while not until():
            turns += 1
            await loop.sleep(0)
        return turns

    async def main() -> None:
        with pipe() as (r, w):
            os.write(w, b"x")
            done: list[int] = []
            spinner = loop.spawn(spin(lambda: bool(done)))
            for _ in range(10):
                await loop.readable(r)  # always ready; the spinner runs in between
            await loop.sleep(0.01)
            done.append(1)
            assert await spinner.join() > 10

    loop.run(main())


# ---- time


def test_timeout_ends_a_block_that_takes_too_long() -> None:
    async def main() -> None:
        began = loop.now()
        with pytest.raises(TimeoutError):
            async with loop.timeout(0.02):
                await forever()
        assert 0.02 <= loop.now() - began < 1
        assert clean()

    loop.run(main())


def test_timeout_in_time_leaves_no_timer() -> None:
    async def main() -> None:
        async with loop.timeout(100):
            await loop.sleep(0)
        assert clean()

    loop.run(main())


def test_a_limit_of_ages_is_one() -> None:
    async def main() -> bytes:
        with pipe() as (r, w):
            threading.Timer(0.05, os.write, (w, b"x")).start()
            async with loop.timeout(2.0**53):
                await loop.readable(r)
            return os.read(r, 1)

    assert loop.run(main()) == b"x"


def test_the_outer_limit_passes_through_the_inner_one() -> None:
    async def main() -> None:
        async def both() -> None:
            async with loop.timeout(0.02), loop.timeout(100):
                await forever()

        with pytest.raises(TimeoutError, match=r"0\.02"):
            await both()
        assert clean()

    loop.run(main())


def test_a_cancelled_task_does_not_report_a_timeout() -> None:
    async def work() -> None:
        async with loop.timeout(0.01):
            try:
                await forever()
            finally:
                await loop.sleep(0.05)  # the limit passes while cancelling

    async def main() -> None:
        task = loop.spawn(work())
        await loop.sleep(0)
        task.cancel()
        with pytest.raises(loop.Cancelled):
            await task.join()

    loop.run(main())


def test_a_limit_of_the_clean_up_of_a_cancelled_task_is_kept() -> None:
    async def clean_up() -> str:
        try:
            async with loop.timeout(0.01):
                await forever()
        except TimeoutError:
            return "late"
        return "done"

    async def work() -> str:
        try:
            await forever()
        finally:
            return await clean_up()  # noqa: B012 - what it says is all that this is about

    async def main() -> str:
        task = loop.spawn(work())
        await loop.sleep(0)
        task.cancel()
        return await task.join()

    assert loop.run(main()) == "late"


def test_a_limit_and_a_cancellation_in_the_same_turn_leave_no_second_interruption() -> None:
    async def work() -> str:
        try:
            async with loop.timeout(0.01):
                await forever()
        except loop.Cancelled:
            await loop.sleep(0)  # the clean-up may wait
            return "clean"
        return "not cancelled"

    async def main() -> str:
        task = loop.spawn(work())
        cancelling = loop.spawn(cancel(task))
        await loop.sleep(0)
        os.write(gone, b"x")
        time.sleep(0.05)  # noqa: ASYNC251 - as on a stalled disk: both are due in the next turn
        await cancelling.join()
        return await task.join()

    async def cancel(task: "loop.Task[str]") -> None:
        await loop.readable(client)
        task.cancel()

    client, gone = os.pipe()
    try:
        assert loop.run(main()) == "clean"
    finally:
        os.close(client)
        os.close(gone)


def test_many_limits_that_were_kept_do_not_fill_the_heap() -> None:
    async def main() -> int:
        for _ in range(1000):
            async with loop.timeout(3600):
                await loop.sleep(0)
        return len(loop._loop().timers)

    assert loop.run(main()) < 100


def test_a_lock_is_taken_in_turn() -> None:
    order: list[int] = []

    async def hold(lock: loop.Lock, number: int) -> None:
        async with lock:
            order.append(number)
            await loop.sleep(0)

    async def main() -> None:
        lock = loop.Lock()
        tasks = [loop.spawn(hold(lock, n)) for n in range(5)]
        for task in tasks:
            await task.join()

    loop.run(main())
    assert order == [0, 1, 2, 3, 4]


# ---- programs


def test_run_command_feeds_and_collects() -> None:
    script = "cat; echo err >&2; exit 4"
    done = loop.run(loop.run_command(["sh", "-c", script], stdin=b"in" * 100_000, timeout=20))
    assert done.returncode == 4
    assert done.stdout == b"in" * 100_000
    assert done.stderr == b"err\n"


def test_run_command_reads_both_streams_at_once_and_cuts_them() -> None:
    script = "for s in 1 2; do head -c 1000000 /dev/zero >&$s & done; wait"
    done = loop.run(loop.run_command(["sh", "-c", script], timeout=20, max_output=1000))
    assert (done.returncode, len(done.stdout), len(done.stderr)) == (0, 1000, 1000)


def test_run_command_passes_given_descriptors_on() -> None:
    with pipe() as (r, w):
        done = loop.run(loop.run_command(["sh", "-c", "echo hi >&5"], timeout=20, fds={5: w}))
        assert done.returncode == 0
        assert os.read(r, 10) == b"hi\n"
        done = loop.run(loop.run_command(["echo", "out"], timeout=20, stdout=w))
        assert done.stdout == b""
        assert os.read(r, 10) == b"out\n"


@asynccontextmanager
async def stubborn_tree() -> AsyncIterator[tuple[int, loop.Task[loop.Finished]]]:
    """A program that started another one which left its session; gives the other one's pid."""
    with pipe() as (r, w):
        script = "trap '' TERM; setsid sleep 1000 & echo $! >&5; sleep 1000"
        task = loop.spawn(loop.run_command(["sh", "-c", script], timeout=1, fds={5: w}))
        await loop.readable(r)
        yield int(os.read(r, 20)), task


async def wait_gone(pid: int) -> None:
    async with loop.timeout(5):
        while process.alive(pid, started(pid)):
            await loop.sleep(0.005)


def started(pid: int) -> int:
    try:
        return process.start_time(pid)
    except ProcessLookupError:
        return -1


def test_a_time_limit_kills_the_whole_tree() -> None:
    async def main() -> None:
        async with stubborn_tree() as (pid, task):
            with pytest.raises(TimeoutError, match="sleep 1000"):
                await task.join()
            await wait_gone(pid)
        assert clean()

    loop.run(main())
    with pytest.raises(ChildProcessError):  # no zombie
        os.waitpid(-1, os.WNOHANG)


def test_cancelling_kills_the_whole_tree() -> None:
    async def main() -> None:
        async with stubborn_tree() as (pid, task):
            task.cancel()
            with pytest.raises(loop.Cancelled):
                await task.join()
            await wait_gone(pid)

    loop.run(main())


def test_a_daemon_that_holds_the_pipe_delays_but_does_not_hang() -> None:
    began = time.monotonic()
    done = loop.run(loop.run_command(["sh", "-c", "sleep 3.5 & echo hi"], timeout=20))
    assert done.stdout == b"hi\n"
    assert time.monotonic() - began < 3.2


def test_a_program_that_does_not_exist_costs_no_descriptor() -> None:
    async def main() -> None:
        for _ in range(3):
            before = len(os.listdir("/proc/self/fd"))
            with pytest.raises(FileNotFoundError):
                await loop.run_command(["no-such-program"], timeout=1)
            await loop.sleep(0)
            await loop.sleep(0)
            assert len(os.listdir("/proc/self/fd")) == before

    loop.run(main())


def test_a_hundred_commands_leave_no_descriptor() -> None:
    async def main() -> None:
        before = os.listdir("/proc/self/fd")
        tasks = [loop.spawn(loop.run_command(["true"], timeout=20)) for _ in range(100)]
        for task in tasks:
            assert (await task.join()).returncode == 0
        assert os.listdir("/proc/self/fd") == before
        assert clean()

    loop.run(main())


def test_without_descriptors_a_command_fails_and_keeps_none() -> None:
    async def main() -> None:
        before = os.listdir("/proc/self/fd")
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        for room in range(7):
            resource.setrlimit(resource.RLIMIT_NOFILE, (len(before) + room, limit[1]))
            try:
                with suppress(OSError):
                    await loop.run_command(["true"], stdin=b"x", timeout=20)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limit)
            assert os.listdir("/proc/self/fd") == before

    loop.run(main())
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
