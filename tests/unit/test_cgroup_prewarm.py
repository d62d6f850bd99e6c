# SPDX-License-Identifier: Apache-2.0
"""The server writes itself into the cgroup that it is in: seen by the call, and by nothing else."""

import os
from pathlib import Path

import pytest

from cri_server import cgroup_prewarm, cgroups
from tests.lab import cgroups as lab

CGROUP = Path("/proc/self/cgroup")


@pytest.fixture
def mounts() -> dict[str, Path]:
    return cgroups.detect().mounts


@pytest.mark.needs("root")
def test_a_process_stays_where_it_is(mounts: dict[str, Path]) -> None:
    before = CGROUP.read_text()
    cgroup_prewarm.stay(mounts)
    assert CGROUP.read_text() == before


@pytest.mark.needs("root")
def test_the_place_is_where_the_process_is_now(mounts: dict[str, Path]) -> None:
    was = CGROUP.read_text()
    home = next(folder for name, folder in lab.of_process(os.getpid()).items() if name in mounts)
    place = home / f"moves-{os.getpid()}"
    place.mkdir()
    try:
        (place / "cgroup.procs").write_text(str(os.getpid()))
        there = CGROUP.read_text()
        cgroup_prewarm.stay(mounts)
        assert CGROUP.read_text() == there
        assert there != was
    finally:
        (home / "cgroup.procs").write_text(str(os.getpid()))
        place.rmdir()


def test_without_cgroups_nothing_happens(tmp_path: Path) -> None:
    cgroup_prewarm.stay({})
    cgroup_prewarm.stay({"freezer": tmp_path})


@pytest.mark.needs("root")
async def test_one_write_at_a_time(
    mounts: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[object] = []
    monkeypatch.setattr(cgroup_prewarm, "stay", written.append)
    prewarm = cgroup_prewarm.Prewarm(mounts)
    prewarm.start()
    prewarm.start()
    await prewarm.close()
    prewarm.start()
    await prewarm.close()
    assert written in ([mounts] * 2, [mounts] * 3)
