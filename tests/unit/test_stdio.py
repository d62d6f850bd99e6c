# SPDX-License-Identifier: Apache-2.0
"""The streams of a process: log first, clients next, and an end that nobody can put off."""

import os
import time
from pathlib import Path
from typing import Any

import pytest

from shim import errors, logfile, loop, process, runtimes, stdio
from tests.fakes import runtime
from tests.lab import driving

SIZED = 'until [ "$(stty size 2>&1)" = "40 120" ]; do sleep 0.01; done; echo sized'
HOLD = "sleep 60 & echo $!; exec 2>&-"  # a background child keeps stdout open


class Sink:
    """Collects output; waits at `gate` and raises `failure` if told to."""

    def __init__(self) -> None:
        self.data = {"stdout": b"", "stderr": b""}
        self.gate: loop.Event | None = None
        self.failure: Exception | None = None
        self.arrived = loop.Event()

    async def output(self, stream: str, data: bytes) -> None:
        self.arrived.set()
        if self.gate:
            await self.gate.wait()
        if self.failure:
            raise self.failure
        self.data[stream] += data


class Started:
    """A process that nobody asks anything of."""

    pid = start_time = 0
    oom_killed = False

    async def wait(self) -> int:
        return 0

    async def signal(self, signum: int) -> None: ...

    async def kill_tree(self) -> None: ...

    async def resize(self, width: int, height: int) -> None:
        raise errors.FailedPrecondition("it has ended")

    async def close_stdin(self) -> None: ...

    async def forget(self) -> None: ...


class Job:
    """A shell command with streams, a log and one client."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.folder = folder
        self.log = logfile.LogFile(os.fspath(folder / "log"))
        self.sink = Sink()
        settings: dict[str, Any] = {"terminal": False, "stdin": False, **options}
        self.streams = stdio.Streams(log=self.log, **settings)
        self.streams.add(self.sink)
        self.child = process.Child(pid=0, pidfd=-1)

    async def start(self, script: str) -> None:
        async def launch(ends: runtimes.Stdio) -> runtimes.Process:
            with runtime.streams(ends) as (stdin, stdout, stderr):
                argv = ["sh", "-c", script]
                self.child = process.spawn(argv, stdin=stdin, stdout=stdout, stderr=stderr)
            return Started()

        await self.streams.connect(os.fspath(self.folder), launch)

    async def wait(self) -> None:
        await loop.readable(self.child.pidfd)
        process.reap(self.child)

    def logged(self) -> list[str]:
        self.log.close()
        records = (self.folder / "log").read_text().splitlines()
        return [record.split(" ", 1)[1] for record in records]


def test_output_goes_to_the_log_and_to_the_client(tmp_path: Path) -> None:
    job = Job(tmp_path)

    async def work() -> None:
        await job.start("echo one; echo two >&2; printf tail")
        await job.wait()
        await job.streams.drain(5, patient=True)
        job.streams.close()
        assert sorted(job.logged()) == ["stderr F two", "stdout F one", "stdout P tail"]

    driving.drive(work())
    assert job.sink.data == {"stdout": b"one\ntail", "stderr": b"two\n"}


def test_a_client_may_come_and_go(tmp_path: Path) -> None:
    job = Job(tmp_path, stdin=True)
    job.streams.remove(job.sink)
    job.streams.remove(job.sink)

    async def work() -> None:
        await job.start("cat")
        await job.streams.write_stdin(b"one\n")
        while not (tmp_path / "log").stat().st_size:
            await loop.sleep(0.01)
        job.streams.add(job.sink)
        await job.streams.write_stdin(b"two\n")
        await job.sink.arrived.wait()
        job.streams.remove(job.sink)
        await job.streams.write_stdin(b"three\n")
        await job.streams.close_stdin()
        await job.wait()
        await job.streams.drain(5, patient=True)
        assert [line[9:] for line in job.logged()] == ["one", "two", "three"]

    driving.drive(work())
    assert job.sink.data["stdout"] == b"two\n"


@pytest.mark.parametrize("failure", [errors.Unavailable("gone"), BrokenPipeError()])
def test_a_client_that_fails_is_dropped(tmp_path: Path, failure: Exception) -> None:
    job = Job(tmp_path)
    job.sink.failure = failure

    async def work() -> None:
        await job.start("for i in 1 2 3; do echo $i; sleep 0.05; done")
        await job.wait()
        await job.streams.drain(5, patient=False)
        job.streams.close()

    driving.drive(work())
    assert job.logged() == ["stdout F 1", "stdout F 2", "stdout F 3"]


def test_a_client_that_takes_nothing_is_dropped_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stdio, "_STALL_SECONDS", 0.1)
    job = Job(tmp_path)

    async def work() -> None:
        job.sink.gate = loop.Event()
        await job.start("head -c 1000000 /dev/zero | tr '\\0' x")
        await job.wait()
        await job.streams.drain(5, patient=True)
        job.streams.close()

    driving.drive(work())
    assert sum(len(line) - len("stdout P ") for line in job.logged()) == 1_000_000


def test_an_exec_waits_for_a_client_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stdio, "_STALL_SECONDS", 0.05)
    job = Job(tmp_path, waits=True)

    async def work() -> None:
        gate = job.sink.gate = loop.Event()
        await job.start("head -c 1000000 /dev/zero")
        await job.sink.arrived.wait()
        await loop.sleep(0.3)  # six times as long as others may stall
        gate.set()
        await job.wait()
        await job.streams.drain(5, patient=True)
        job.streams.close()

    driving.drive(work())
    assert len(job.sink.data["stdout"]) == 1_000_000


def test_a_slow_client_slows_the_process_down(tmp_path: Path) -> None:
    job = Job(tmp_path)

    async def work() -> None:
        job.sink.gate = loop.Event()
        await job.start("head -c 5000000 /dev/zero")
        await job.sink.arrived.wait()
        with pytest.raises(TimeoutError):
            async with loop.timeout(0.2):
                await loop.readable(job.child.pidfd)
        job.sink.gate.set()
        await job.wait()
        await job.streams.drain(5, patient=True)

    driving.drive(work())
    assert len(job.sink.data["stdout"]) == 5_000_000


def test_a_stranger_with_the_pipe_is_not_waited_for(tmp_path: Path) -> None:
    job = Job(tmp_path)

    async def work() -> None:
        await job.start(HOLD)
        await job.wait()
        begin = time.monotonic()
        await job.streams.drain(0.2, patient=True)
        assert 0.2 <= time.monotonic() - begin < 1
        job.streams.close()

    driving.drive(work())
    stranger = int(job.sink.data["stdout"])
    os.kill(stranger, 9)


@pytest.mark.parametrize("patient", [True, False])
def test_what_is_in_the_pipe_is_read_even_without_time(tmp_path: Path, patient: bool) -> None:
    job = Job(tmp_path)

    async def work() -> None:
        await job.start(f"{HOLD}; head -c 60000 /dev/zero | tr '\\0' x")
        await job.wait()
        await job.streams.drain(0, patient=patient)
        job.streams.close()

    driving.drive(work())
    lines = job.logged()
    os.kill(int(lines[0].split()[2]), 9)
    assert sum(len(line) - len("stdout P ") for line in lines[1:]) == 60_000
    if patient:
        assert job.sink.data["stdout"].endswith(b"x" * 60_000)


def test_a_patient_drain_waits_for_a_slow_client(tmp_path: Path) -> None:
    job = Job(tmp_path)

    async def open_later(gate: loop.Event) -> None:
        await loop.sleep(0.3)
        gate.set()

    async def work() -> None:
        job.sink.gate = loop.Event()
        await job.start("echo; sleep 0.1; head -c 60000 /dev/zero")
        await job.wait()
        loop.spawn(open_later(job.sink.gate))
        await job.streams.drain(0.05, patient=True)
        job.streams.close()

    driving.drive(work())
    assert len(job.sink.data["stdout"]) == 60_001


def test_an_impatient_drain_leaves_a_slow_client_behind_but_not_the_log(tmp_path: Path) -> None:
    job = Job(tmp_path)

    async def work() -> None:
        job.sink.gate = loop.Event()
        await job.start("echo 1; sleep 0.1; echo 2")
        await job.wait()
        begin = time.monotonic()
        await job.streams.drain(0.1, patient=False)
        assert time.monotonic() - begin < 1
        job.streams.close()

    driving.drive(work())
    assert job.logged() == ["stdout F 1", "stdout F 2"]


# -- input -----------------------------------------------------------------------------------------


def test_without_stdin_the_process_reads_nothing(tmp_path: Path) -> None:
    job = Job(tmp_path)

    async def work() -> None:
        await job.start("cat; echo end")
        await job.streams.write_stdin(b"dropped")
        await job.wait()
        await job.streams.drain(5, patient=True)

    driving.drive(work())
    assert job.sink.data["stdout"] == b"end\n"


def test_input_that_comes_before_the_process_waits_for_it(tmp_path: Path) -> None:
    job = Job(tmp_path, stdin=True)

    async def feed() -> None:
        await job.streams.write_stdin(b"early\n")
        await job.streams.close_stdin()

    async def work() -> None:
        loop.spawn(feed())
        await loop.sleep(0)
        await job.start("cat")
        await job.wait()
        await job.streams.drain(5, patient=True)

    driving.drive(work())
    assert job.sink.data["stdout"] == b"early\n"


def test_much_input_goes_through_in_order(tmp_path: Path) -> None:
    job = Job(tmp_path, stdin=True)
    text = b"".join(b"%d\n" % number for number in range(100_000))

    async def feed() -> None:
        await job.streams.write_stdin(text)
        await job.streams.close_stdin()

    async def work() -> None:
        await job.start("cat")
        loop.spawn(feed())
        await job.wait()
        await job.streams.drain(5, patient=True)

    driving.drive(work())
    assert job.sink.data["stdout"] == text


def test_input_for_a_process_that_does_not_read_ends_with_the_streams(tmp_path: Path) -> None:
    job = Job(tmp_path, stdin=True)

    async def work() -> None:
        await job.start("sleep 60")
        writing = loop.spawn(job.streams.write_stdin(b"x" * 1_000_000))
        closing = loop.spawn(job.streams.close_stdin())
        await loop.sleep(0.05)
        assert not writing.done
        process.kill_group(job.child)
        await job.wait()
        await writing.join()
        await closing.join()
        job.streams.close()

    driving.drive(work())


# -- terminals -------------------------------------------------------------------------------------


def test_a_terminal_has_one_stream_and_a_size(tmp_path: Path) -> None:
    job = Job(tmp_path, terminal=True, stdin=True)

    async def work() -> None:
        job.streams.resize(120, 40)
        await job.start(f"{SIZED}; echo err >&2; read x; stty size; echo got $x")
        while b"err" not in job.sink.data["stdout"]:
            await loop.sleep(0.01)
        job.streams.resize(100, 30)
        await job.streams.write_stdin(b"word\n")
        await job.wait()
        await job.streams.drain(5, patient=True)
        job.streams.close()

    driving.drive(work())
    seen = job.sink.data["stdout"].decode().split("\r\n")
    assert seen == ["sized", "err", "word", "30 100", "got word", ""]
    assert job.logged() == [f"stdout F {line}" for line in seen[:-1]]


def test_a_runtime_that_sends_no_terminal_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stdio, "_CONSOLE_SECONDS", 0.1)
    job = Job(tmp_path, terminal=True)

    async def launch(_: runtimes.Stdio) -> runtimes.Process:
        return Started()

    async def work() -> None:
        with pytest.raises(errors.Internal, match="no terminal"):
            await job.streams.connect(os.fspath(tmp_path), launch)
        job.streams.close()

    driving.drive(work())
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


# -- failures of the runtime -----------------------------------------------------------------------


def test_the_last_words_of_a_runtime_that_logged_nothing(tmp_path: Path) -> None:
    job = Job(tmp_path)

    async def launch(ends: runtimes.Stdio) -> runtimes.Process:
        argv = ["sh", "-c", "echo out; echo first >&2; echo the reason >&2; exit 1"]
        await loop.run_command(argv, stdout=ends.stdout, stderr=ends.stderr, timeout=10)
        raise runtimes.Silent("said nothing")

    async def work() -> None:
        with pytest.raises(errors.ShimError, match=r"^the reason$"):
            await job.streams.connect(os.fspath(tmp_path), launch)
        job.streams.close()

    driving.drive(work())


def test_silence_is_told_as_silence(tmp_path: Path) -> None:
    job = Job(tmp_path)

    async def launch(_: runtimes.Stdio) -> runtimes.Process:
        raise runtimes.Silent("said nothing")

    async def work() -> None:
        with pytest.raises(errors.ShimError, match=r"^said nothing$"):
            await job.streams.connect(os.fspath(tmp_path), launch)
        job.streams.close()

    driving.drive(work())


@pytest.mark.needs("root")
def test_the_pipes_belong_to_the_owner(tmp_path: Path) -> None:
    """Who else may open /dev/stdout by name."""
    job = Job(tmp_path, stdin=True, owner=(4000, 5000))

    async def work() -> None:
        await job.start("for n in 0 1 2; do stat -L -c %u:%g /proc/self/fd/$n; done")
        await job.wait()
        await job.streams.drain(5, patient=True)
        job.streams.close()

    driving.drive(work())
    assert job.sink.data["stdout"] == b"4000:5000\n" * 3
