# SPDX-License-Identifier: Apache-2.0
"""Merging the resources of an update into those in force."""

import pytest

from cri_server import errors, spec
from cri_server.pb import api_pb2 as api
from tests.lab import wishes

Resources = api.LinuxContainerResources
FULL = Resources(
    cpu_period=100000,
    cpu_quota=50000,
    cpu_shares=512,
    memory_limit_in_bytes=1000,
    memory_swap_limit_in_bytes=1500,
    oom_score_adj=5,
    cpuset_cpus="0-1",
    cpuset_mems="0",
    hugepage_limits=[api.HugepageLimit(page_size="2MB", limit=4)],
    unified={"memory.high": "900", "pids.max": "5"},
)


def changed(**fields: object) -> Resources:
    result = Resources()
    result.CopyFrom(FULL)
    for name, value in fields.items():
        setattr(result, name, value)
    return result


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (Resources(), FULL),
        (FULL, FULL),
        (Resources(cpuset_cpus="1"), changed(cpuset_cpus="1")),
        (Resources(cpu_quota=-1), changed(cpu_quota=-1)),
        (Resources(oom_score_adj=-3), changed(oom_score_adj=-3)),
        (
            Resources(memory_limit_in_bytes=2000),
            changed(memory_limit_in_bytes=2000, memory_swap_limit_in_bytes=0),
        ),
        (Resources(memory_limit_in_bytes=1200), changed(memory_limit_in_bytes=1200)),
        (
            Resources(memory_limit_in_bytes=-1),
            changed(memory_limit_in_bytes=-1, memory_swap_limit_in_bytes=0),
        ),
        (
            Resources(memory_swap_limit_in_bytes=1200),
            changed(memory_swap_limit_in_bytes=1200),
        ),
    ],
    ids=["nothing", "same", "cpuset", "quota", "oom", "memory", "room", "no limit", "swap"],
)
def test_what_is_set_replaces_and_zero_is_unchanged(asked: Resources, expected: Resources) -> None:
    assert spec.merged(FULL, asked) == expected


@pytest.mark.parametrize(("swap", "expected"), [(1000, 0), (-1, -1), (0, 0)])
def test_without_swap_there_is_none_after_a_change_of_memory(swap: int, expected: int) -> None:
    now = changed(memory_swap_limit_in_bytes=swap)
    found = spec.merged(now, Resources(memory_limit_in_bytes=500))
    assert found.memory_swap_limit_in_bytes == expected


def test_unified_is_merged_by_key_and_hugepages_by_size() -> None:
    pages = [api.HugepageLimit(page_size=s, limit=n) for s, n in (("2MB", 0), ("1GB", 7))]
    found = spec.merged(FULL, Resources(unified={"pids.max": "9"}, hugepage_limits=pages))
    assert dict(found.unified) == {"memory.high": "900", "pids.max": "9"}
    assert {p.page_size: p.limit for p in found.hugepage_limits} == {"2MB": 0, "1GB": 7}


def test_merging_leaves_its_arguments_alone() -> None:
    asked = Resources(cpu_shares=7)
    spec.merged(FULL, asked)
    assert (FULL.cpu_shares, asked) == (512, Resources(cpu_shares=7))


def test_what_is_put_back_takes_new_limits_away() -> None:
    before = spec.resources(Resources(cpu_shares=9), wishes.FACTS)
    after = spec.resources(FULL, wishes.FACTS)
    assert spec.restored(before, after) == {
        "cpu": {"shares": 9, "quota": -1, "period": 100000},
        "memory": {"limit": -1, "swap": -1},
    }
    assert spec.restored(after, before)["memory"] == after["memory"]


def test_an_update_with_what_it_cannot_bring_about_is_refused() -> None:
    with pytest.raises(errors.InvalidArgument, match="annotations"):
        spec.check_update(api.UpdateContainerResourcesRequest(annotations={"a": "b"}))
    windows = api.WindowsContainerResources(cpu_shares=1)
    with pytest.raises(errors.InvalidArgument, match="windows"):
        spec.check_update(api.UpdateContainerResourcesRequest(windows=windows))


@pytest.mark.parametrize("part", ["overhead", "resources"])
def test_limits_that_no_pod_can_have_are_refused(part: str) -> None:
    bad = Resources(cpu_shares=-1)
    request = api.UpdatePodSandboxResourcesRequest(**{part: bad})  # type: ignore[arg-type]
    with pytest.raises(errors.InvalidArgument, match=f"{part}.cpu_shares"):
        spec.check_pod_update(request, wishes.FACTS)
    config = wishes.pod()
    getattr(config.linux, part).CopyFrom(bad)
    with pytest.raises(errors.InvalidArgument, match=f"linux.{part}.cpu_shares"):
        spec.validate_sandbox(config, wishes.FACTS)
