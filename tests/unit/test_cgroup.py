# SPDX-License-Identifier: Apache-2.0
"""The cgroup of a container: its tree is killed whole, parts of it come and go."""

import os
import signal
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from cri_server import cgroups as find
from shim import cgroup, loop, process
from tests.lab import bundle, cgroups, scarcity, waiting

pytestmark = pytest.mark.needs("root")

FORKER = "f() { sleep 60 & f; }; f"  # a new child all the time, until it is killed


@pytest.fixture
def group() -> Iterator[cgroup.Cgroup]:
    """Return a group with real directories."""
    found = cgroup.Cgroup(bundle.directories(f"{bundle.PARENT}/group"))
    for directory in found.directories.values():
        os.makedirs(directory)
    yield found
    found.thaw()
    waiting.until(lambda: not found.kill(), "the group is empty")
    waiting.until(found.remove, "the group is removed")
    cgroups.remove(bundle.PARENT)


@pytest.fixture
def spawn(group: cgroup.Cgroup) -> Iterator[Any]:
    """Return a function that starts a shell command inside a group; all are reaped in the end."""
    children: list[process.Child] = []

    def start(script: str, where: cgroup.Cgroup = group) -> process.Child:
        entries = " ".join(f"{d}/cgroup.procs" for d in where.directories.values())
        enter = f"for f in {entries}; do echo $$ > $f; done"
        children.append(process.spawn(["sh", "-c", f"{enter}; {script}"]))
        waiting.until(lambda: children[-1].pid in where.processes(), "the child is in the group")
        return children[-1]

    yield start
    for child in children:
        process.kill_group(child)
        process.reap(child)


def run(work: Coroutine[Any, Any, bool]) -> bool:
    return loop.run(work)


def test_an_empty_group(group: cgroup.Cgroup) -> None:
    assert group.processes() == []
    assert not group.kill()
    assert run(group.kill_all())


def test_everything_inside_is_killed_and_nothing_outside(group: cgroup.Cgroup, spawn: Any) -> None:
    outside = process.spawn(["sleep", "60"])
    spawn("setsid sleep 60 & exec sleep 60")
    waiting.until(lambda: len(group.processes()) == 2, "two processes")
    assert run(group.kill_all())
    assert group.processes() == []
    assert process.alive(outside.pid, process.start_time(outside.pid))
    process.kill_group(outside)
    process.reap(outside)


def test_who_forks_all_the_time_is_killed(group: cgroup.Cgroup, spawn: Any) -> None:
    spawn(FORKER)
    waiting.until(lambda: len(group.processes()) > 20, "many processes")
    assert run(group.kill_all())


def test_a_paused_group_is_killed(group: cgroup.Cgroup, spawn: Any) -> None:
    child = spawn("exec sleep 60")
    pause(group)
    assert run(group.kill_all())
    waiting.until(lambda: os.waitid(os.P_PIDFD, child.pidfd, os.WEXITED | os.WNOWAIT), "its end")


def test_thaw_lets_a_signal_through(group: cgroup.Cgroup, spawn: Any) -> None:
    child = spawn("exec sleep 60")
    pause(group)
    os.kill(child.pid, signal.SIGKILL)
    group.thaw()
    waiting.until(lambda: group.processes() == [], "it is dead")


def test_a_v2_group_is_thawed(tmp_path: Path) -> None:
    (tmp_path / "cgroup.freeze").write_text("1")
    cgroup.Cgroup({"": str(tmp_path)}).thaw()
    assert (tmp_path / "cgroup.freeze").read_text() == "0"


def test_a_part_is_killed_alone(group: cgroup.Cgroup, spawn: Any) -> None:
    whole = spawn("exec sleep 60")
    part = group.part("exec-1")
    assert part.create() == group.controller
    spawn("sleep 60 & exec sleep 60", part)
    waiting.until(lambda: len(part.processes()) == 2, "two processes in the part")
    assert len(group.processes()) == 3
    assert not part.remove()
    assert run(part.kill_all())
    waiting.until(part.remove, "the part is removed")
    assert group.processes() == [whole.pid]


def test_the_group_goes_with_its_parts(group: cgroup.Cgroup, spawn: Any) -> None:
    part = group.part("exec-1")
    part.create()
    spawn("exec sleep 60", part)
    assert run(group.kill_all())
    waiting.until(group.remove, "all is removed")
    assert group.remove()


def test_directories_that_are_not_there_are_empty(tmp_path: Path) -> None:
    for group in (cgroup.Cgroup({}), cgroup.Cgroup({"freezer": os.fspath(tmp_path / "no")})):
        assert group.processes() == []
        assert run(group.kill_all())
        assert group.remove()
    assert cgroup.Cgroup({}).part("x").directories == {}


def test_what_cannot_be_seen_is_not_empty(group: cgroup.Cgroup, spawn: Any) -> None:
    spawn("exec sleep 60")
    with scarcity.no_descriptors():
        with pytest.raises(OSError, match="Too many open files"):
            group.processes()
        with pytest.raises(OSError, match="Too many open files"):
            group.kill()
    assert run(blindly(group))
    assert run(group.kill_all())


async def blindly(group: cgroup.Cgroup) -> bool:
    """Return whether `kill_all` does not say that a group is empty which it cannot see."""
    with scarcity.no_descriptors():
        return not await group.kill_all()


def test_who_hides_in_threaded_groups_is_seen() -> None:
    """Their cgroup.procs cannot be read (EOPNOTSUPP), see cgroups(7)."""
    hierarchy = find.detect().unified
    if hierarchy is None:
        pytest.skip("no cgroup v2")
    top = hierarchy / f"threaded-{os.getpid()}"
    inner = top / "inner"
    inner.mkdir(parents=True)
    (inner / "cgroup.type").write_text("threaded")
    child = process.spawn(["sleep", "60"])
    try:
        (top / "cgroup.procs").write_text(str(child.pid))
        (inner / "cgroup.threads").write_text(str(child.pid))
        assert cgroup.Cgroup({"": os.fspath(inner)}).processes() == [child.pid]
        assert cgroup.Cgroup({"": os.fspath(inner)}).kill()
    finally:
        process.kill_group(child)
        process.reap(child)
        waiting.until(cgroup.Cgroup({"": os.fspath(top)}).remove, "the groups are removed")


def test_what_cannot_be_killed_is_not_waited_for(
    group: cgroup.Cgroup, spawn: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    spawn("exec sleep 60")
    monkeypatch.setattr(cgroup.Cgroup, "kill", lambda _: True)
    begin = time.monotonic()
    assert not run(group.kill_all())
    assert time.monotonic() - begin < 2


def test_groups_that_are_nested_deeper_than_recursion_goes(
    group: cgroup.Cgroup, spawn: Callable[..., process.Child]
) -> None:
    inner = group.directories[group.controller]
    for _ in range(1100):
        inner += "/d"
        os.mkdir(inner)
    child = spawn("sleep 60")
    assert child.pid in group.processes()
    assert run(group.kill_all())
    waiting.until(group.remove, "the groups are removed")
    for directory in group.directories.values():
        os.mkdir(directory)  # for the fixture


def pause(group: cgroup.Cgroup) -> None:
    """Pause a group as `runc pause` does."""
    directory = Path(group.directories[group.controller])
    if group.controller == "freezer":
        (directory / "freezer.state").write_text("FROZEN")
        waiting.until(lambda: "FROZEN" in (directory / "freezer.state").read_text(), "the frost")
    else:
        (directory / "cgroup.freeze").write_text("1")
        frozen = directory / "cgroup.events"
        waiting.until(lambda: "frozen 1" in frozen.read_text(), "the frost")
