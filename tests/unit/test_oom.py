# SPDX-License-Identifier: Apache-2.0
"""The kernel's counters of OOM kills, as v1 and v2 write them."""

import os
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
