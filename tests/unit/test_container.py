# SPDX-License-Identifier: Apache-2.0
"""The states of a container, with a runtime whose containers are plain processes."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from shim import container, errors, loop, oom, reaper
from shim.pb import shim_pb2 as pb
from tests.fakes import runtime
from tests.lab import driving

FOREVER = "exec sleep 60"


class Case:
    """A container in a folder, its runtime, and its reaper."""

    def __init__(self, folder: Path, script: str = FOREVER, **options: Any) -> None:
        self.folder = folder
        process = {"args": ["sh", "-c", script]}
        (folder / "config.json").write_text(json.dumps({"process": process}))
        self.children = reaper.Reaper()
        self.runtime = runtime.Plain(self.children)
        spec = container.Spec(
            id="c1",
            bundle=os.fspath(folder),
            log_path=os.fspath(folder / "log"),
            cgroups={},
            **options,
        )
        self.it = container.Container(spec, runtime=self.runtime, ledger=oom.Ledger())

    def record(self) -> dict[str, Any]:
        record: dict[str, Any] = json.loads((self.folder / "exit.json").read_text())
        return record

    def state(self) -> int:
        return int(self.it.describe().state)

    async def end(self) -> None:
        await self.it.delete()


def test_a_life(tmp_path: Path) -> None:
    case = Case(tmp_path, "echo hello; read x < /dev/null; exit 3")

    async def work() -> None:
        assert case.state() == pb.CREATED
        started = await case.it.start()
        assert started.pid > 0
        assert started.started_at > 0
        assert started.start_time > 0
        record = await case.it.wait()
        assert record is not None
        assert record.exit_code == 3
        assert record.finished_at >= started.started_at
        assert case.state() == pb.STOPPED
        assert case.it.describe().pid == started.pid
        assert "stdout F hello" in (tmp_path / "log").read_text()
        assert case.record() == {
            "exit_code": 3,
            "finished_at": record.finished_at,
            "oom_killed": False,
            "reason": "",
            "message": "",
        }
        assert await case.it.delete() == record

    driving.drive(work())
    assert [verb for verb, _ in case.runtime.calls] == ["run", "delete"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "log"]


def test_the_record_is_there_and_the_log_whole_before_anyone_is_told(tmp_path: Path) -> None:
    case = Case(tmp_path, "head -c 100000 /dev/zero | tr '\\0' x; exit 4")
    seen: list[tuple[int, int]] = []

    async def watch() -> None:
        await case.it.wait()
        logged = sum(len(line) - 40 for line in (tmp_path / "log").read_bytes().splitlines())
        seen.append((case.record()["exit_code"], logged))

    async def work() -> None:
        watchers = [loop.spawn(watch()) for _ in range(3)]
        await case.it.start()
        for watcher in watchers:
            await watcher.join()
        await case.end()

    driving.drive(work())
    assert seen == [(4, 100_000)] * 3


def test_a_runtime_that_is_slow_to_forget_keeps_delete_waiting_but_not_wait(
    tmp_path: Path,
) -> None:
    case = Case(tmp_path, "true")

    async def work() -> None:
        gate = case.runtime.gates["delete"] = loop.Event()
        await case.it.start()
        await case.it.wait()
        deleting = loop.spawn(case.it.delete())
        await loop.sleep(0.05)
        assert not deleting.done
        gate.set()
        await deleting.join()

    driving.drive(work())


def test_a_failed_delete_is_tried_again(tmp_path: Path) -> None:
    case = Case(tmp_path, "true")

    async def work() -> None:
        case.runtime.failures["delete"] = errors.ShimError("device busy")
        await case.it.start()
        await case.it.wait()
        with pytest.raises(errors.ShimError, match="device busy"):
            await case.it.delete()
        assert case.state() == pb.STOPPED
        del case.runtime.failures["delete"]
        await case.it.delete()

    driving.drive(work())


# -- failures to start -----------------------------------------------------------------------------


def test_a_failed_start_is_an_exit_128_with_the_reason(tmp_path: Path) -> None:
    case = Case(tmp_path)
    case.runtime.failures["run"] = errors.ShimError("the\nreason " + "x" * 5000)

    async def work() -> None:
        with pytest.raises(errors.ShimError, match="the\nreason"):
            await case.it.start()
        record = await case.it.wait()
        assert record is not None
        assert record.exit_code == 128
        assert record.reason == "StartError"
        assert record.message.startswith("the reason x")
        assert len(record.message) == 1024
        assert record.finished_at > 0
        assert case.record()["exit_code"] == 128
        with pytest.raises(errors.FailedPrecondition, match="it is stopped"):
            await case.it.start()
        await case.end()

    driving.drive(work())
    assert [verb for verb, _ in case.runtime.calls] == ["run", "delete"]


@pytest.mark.parametrize("how", ["kill", "kill everything", "delete"])
def test_a_start_that_hangs_can_be_ended(tmp_path: Path, how: str) -> None:
    case = Case(tmp_path)

    async def work() -> None:
        case.runtime.gates["run"] = loop.Event()
        starting = loop.spawn(case.it.start())
        await loop.sleep(0.01)
        assert case.state() == pb.CREATED
        match how:
            case "kill":
                await case.it.kill(signal.SIGKILL)
            case "kill everything":
                await case.it.kill(0, everything=True)
            case "delete":
                await case.it.delete()
        with pytest.raises(errors.FailedPrecondition, match="killed before it had started"):
            await starting.join()
        assert case.state() == pb.STOPPED
        await case.end()

    driving.drive(work())


def test_a_gentle_signal_waits_for_the_start(tmp_path: Path) -> None:
    case = Case(tmp_path)

    async def work() -> None:
        gate = case.runtime.gates["run"] = loop.Event()
        starting = loop.spawn(case.it.start())
        await loop.sleep(0.01)
        killing = loop.spawn(case.it.kill(signal.SIGTERM))
        await loop.sleep(0.01)
        assert not killing.done
        gate.set()
        await starting.join()
        await killing.join()
        record = await case.it.wait()
        assert record is not None
        assert record.exit_code == 143
        await case.end()

    driving.drive(work())


def test_a_log_that_cannot_be_opened_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    with pytest.raises(errors.InvalidArgument, match="log"):
        Case(tmp_path)


# -- what is allowed when --------------------------------------------------------------------------


def test_before_the_start(tmp_path: Path) -> None:
    case = Case(tmp_path)

    async def work() -> None:
        with pytest.raises(errors.FailedPrecondition, match="it is created, not running"):
            await case.it.kill(signal.SIGTERM)
        with pytest.raises(errors.FailedPrecondition, match="it is created, not running"):
            await case.it.update(b"{}")
        with pytest.raises(errors.FailedPrecondition):
            case.it.reopen_log()
        assert await case.it.delete() is None

    driving.drive(work())
    assert case.runtime.calls == []


def test_who_waits_for_one_that_never_runs_is_told_of_its_deletion(tmp_path: Path) -> None:
    case = Case(tmp_path)

    async def work() -> None:
        waiting = loop.spawn(case.it.wait())
        await loop.sleep(0)
        await case.it.delete()
        assert await waiting.join() is None

    driving.drive(work())


def test_an_end_is_told_even_if_its_clean_up_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(tmp_path, "exit 3")

    async def fail() -> bool:
        raise PermissionError(1, "not this one")

    monkeypatch.setattr(case.it.cgroup, "kill_all", fail)

    async def work() -> None:
        await case.it.start()
        record = await case.it.wait()
        assert record is not None
        assert record.exit_code == 3
        await case.end()

    driving.drive(work())


def test_while_it_runs(tmp_path: Path) -> None:
    case = Case(tmp_path)

    async def work() -> None:
        await case.it.start()
        with pytest.raises(errors.FailedPrecondition, match="it is running, not created"):
            await case.it.start()
        await case.it.update(b'{"cpu": {}}')
        os.rename(tmp_path / "log", tmp_path / "log.1")
        case.it.reopen_log()
        assert (tmp_path / "log").exists()
        record = await case.it.delete()
        assert record is not None
        assert record.exit_code == 137

    driving.drive(work())
    assert case.runtime.resources == {"cpu": {}}


def test_after_the_end(tmp_path: Path) -> None:
    case = Case(tmp_path, "true")

    async def work() -> None:
        await case.it.start()
        await case.it.wait()
        await case.it.kill(signal.SIGTERM)
        await case.it.kill(0, everything=True)
        with pytest.raises(errors.FailedPrecondition, match="it is stopped, not running"):
            case.it.reopen_log()
        with pytest.raises(errors.FailedPrecondition):
            await case.it.update(b"{}")
        await case.end()
        await case.end()

    driving.drive(work())


def test_an_end_before_start_returns_is_an_end_like_any(tmp_path: Path) -> None:
    async def work() -> None:
        for number in range(20):
            folder = tmp_path / str(number)
            folder.mkdir()
            case = Case(folder, f"exit {number}")
            await case.it.start()
            record = await case.it.wait()
            assert record is not None
            assert record.exit_code == number
            await case.end()

    driving.drive(work())


def test_an_oom_kill_is_in_the_record(tmp_path: Path) -> None:
    (tmp_path / "memory.oom_control").write_text("oom_kill 1\n")
    case = Case(tmp_path, "kill -9 $$")
    case.it.spec.cgroups["memory"] = os.fspath(tmp_path)  # type: ignore[index]

    async def work() -> None:
        await case.it.start()
        record = await case.it.wait()
        assert record is not None
        assert (record.exit_code, record.oom_killed) == (137, True)
        await case.end()

    driving.drive(work())
