# SPDX-License-Identifier: Apache-2.0
"""The kernel's counters of OOM kills, as v1 and v2 write them."""

import os
import shutil
from pathlib import Path

import pytest

from shim import oom

V1 = "oom_kill_disable 0\nunder_oom 0\noom_kill {}\n"
V2 = "low 0\nhigh 0\nmax 12\noom 3\noom_kill {}\noom_group_kill 0\n"


@pytest.mark.parametrize("count", [0, 1, 80])
@pytest.mark.parametrize(
    ("controller", "name", "text"),
    [("memory", "memory.oom_control", V1), ("", "memory.events", V2)],
)
def test_kills_are_counted(
    tmp_path: Path, controller: str, name: str, text: str, count: int
) -> None:
    (tmp_path / name).write_text(text.format(count))
    assert oom.kills({controller: os.fspath(tmp_path)}) == count


def test_on_hybrid_hosts_the_v1_counter_is_the_one(tmp_path: Path) -> None:
    (tmp_path / "memory.oom_control").write_text(V1.format(2))
    unified = os.fspath(tmp_path / "unified")
    assert oom.kills({"": unified, "memory": os.fspath(tmp_path)}) == 2


@pytest.mark.parametrize("text", [None, "", "oom_kill_disable 0\n", "nonsense\n"])
def test_what_cannot_be_read_counts_nothing(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "memory.oom_control").write_text(text)
    assert oom.kills({"memory": os.fspath(tmp_path)}) == 0
    assert oom.kills({}) == 0


class Pod:
    """A v2 group with containers below it; the kernel counts in both."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ledger = folder, oom.Ledger()
        self._kills: dict[str, int] = {}
        self._write(folder, 3)  # of a sandbox that was there before

    def container(self, name: str) -> oom.Counter:
        (self.folder / name).mkdir()
        self.kill(name, 0)
        return self.ledger.open({"": os.fspath(self.folder / name)})

    def kill(self, name: str, times: int) -> None:
        self._kills[name] = self._kills.get(name, 0) + times
        self._write(self.folder / name, self._kills[name])
        self._write(self.folder, 3 + sum(self._kills.values()))

    def vanish(self, name: str) -> None:
        shutil.rmtree(self.folder / name)

    def _write(self, folder: Path, count: int) -> None:
        (folder / "memory.events").write_text(V2.format(count))


@pytest.fixture
def pod(tmp_path: Path) -> Pod:
    return Pod(tmp_path)


def test_a_group_that_is_there_tells_its_own_kills(pod: Pod) -> None:
    one, other = pod.container("one"), pod.container("other")
    pod.kill("one", 2)
    pod.kill("other", 1)
    assert (one.last(), other.last()) == (2, 1)


def test_what_the_pod_counted_and_nobody_told_is_of_the_group_that_has_gone(pod: Pod) -> None:
    one, other = pod.container("one"), pod.container("other")
    pod.kill("other", 1)
    pod.kill("one", 1)
    assert one.read() == 1
    pod.kill("one", 2)
    pod.vanish("one")
    assert one.last() == 3
    assert other.last() == 1


@pytest.mark.parametrize(
    ("limit_reached", "in_it", "told"), [(0, 0, 0), (0, 1, 1), (1, 0, 2), (1, 1, 2)]
)
def test_kills_in_groups_below_count_when_the_containers_own_limit_was_reached(
    pod: Pod, limit_reached: int, in_it: int, told: int
) -> None:
    """Two were killed in all."""
    one, other = pod.container("one"), pod.container("other")
    pod.kill("one", 2)
    local = f"max 0\noom {limit_reached}\noom_kill {in_it}\n"
    (pod.folder / "one" / "memory.events.local").write_text(local)
    assert one.read() == 2
    assert one.last() == told
    pod.vanish("other")
    assert other.last() == 0, "what was killed below the one is nobody else's"


def test_what_deleted_containers_have_told_is_not_told_again(pod: Pod) -> None:
    one, other = pod.container("one"), pod.container("other")
    pod.kill("one", 2)
    pod.vanish("one")
    assert one.last() == 2
    pod.ledger.close(one)
    pod.vanish("other")
    assert other.last() == 0
