# SPDX-License-Identifier: Apache-2.0
"""Namespaces, resources, masked paths."""

import dataclasses

import pytest

from cri_server import errors, spec
from cri_server.pb import api_pb2 as api
from tests.lab import wishes

Resources = api.LinuxContainerResources
V1 = dataclasses.replace(
    wishes.FACTS, cgroup_v2=False, swap_accounting=False, hugepage_sizes=frozenset()
)


def linux(config: api.ContainerConfig | None = None, **changes: object) -> spec.oci.Linux:
    return spec.container(wishes.given(config, **changes))["linux"]


def test_namespaces_are_joined_new_or_the_hosts() -> None:
    assert linux()["namespaces"] == [
        {"type": "mount"},
        {"type": "network", "path": "/run/netns/p1"},
        {"type": "ipc", "path": "/ns/ipc"},
        {"type": "uts", "path": "/ns/uts"},
        {"type": "pid"},
        {"type": "cgroup"},
    ]
    found = linux(namespaces={"pid": "/proc/7/ns/pid", "user": "/ns/user"}, host=V1)["namespaces"]
    assert found == [
        {"type": "mount"},
        {"type": "pid", "path": "/proc/7/ns/pid"},
        {"type": "user", "path": "/ns/user"},
    ]


def test_a_privileged_container_sees_the_hosts_cgroups() -> None:
    wish = wishes.container(security=wishes.security(privileged=True))
    assert {"type": "cgroup"} not in linux(wish)["namespaces"]


def test_masked_and_read_only_paths_are_exactly_the_requests() -> None:
    fields = {"masked_paths": ["/proc/kcore", "/sys/firmware/"], "readonly_paths": ["/proc/sys"]}
    found = linux(wishes.container(security=wishes.security(**fields)))
    assert (found["maskedPaths"], found["readonlyPaths"]) == tuple(fields.values())
    found = linux(wishes.container(security=wishes.security(**fields, privileged=True)))
    assert (found["maskedPaths"], found["readonlyPaths"]) == ([], [])
    assert linux()["maskedPaths"] == []
    with pytest.raises(errors.InvalidArgument, match="readonly_paths"):
        wishes.validate(wishes.container(security=wishes.security(readonly_paths=["proc/sys"])))


def test_the_cgroups_path_is_passed_on() -> None:
    assert linux(cgroups_path="pod.slice:cri:c1")["cgroupsPath"] == "pod.slice:cri:c1"


PAGES = [api.HugepageLimit(page_size="2MB", limit=4), api.HugepageLimit(page_size="1GB", limit=0)]


@pytest.mark.parametrize(
    ("asked", "host", "expected"),
    [
        (Resources(), wishes.FACTS, {}),
        (
            Resources(cpu_shares=2, cpu_quota=-1, cpu_period=100000),
            wishes.FACTS,
            {"cpu": {"shares": 2, "quota": -1, "period": 100000}},
        ),
        (Resources(cpu_shares=1), wishes.FACTS, {"cpu": {"shares": 2}}),
        (Resources(cpu_shares=1 << 20), wishes.FACTS, {"cpu": {"shares": 262144}}),
        (
            Resources(cpuset_cpus="0-3,7", cpuset_mems="0"),
            wishes.FACTS,
            {"cpu": {"cpus": "0-3,7", "mems": "0"}},
        ),
        (
            Resources(memory_limit_in_bytes=100),
            wishes.FACTS,
            {"memory": {"limit": 100, "swap": 100}},
        ),
        (
            Resources(memory_limit_in_bytes=100, memory_swap_limit_in_bytes=150),
            wishes.FACTS,
            {"memory": {"limit": 100, "swap": 150}},
        ),
        (
            Resources(memory_limit_in_bytes=100, memory_swap_limit_in_bytes=-1),
            wishes.FACTS,
            {"memory": {"limit": 100, "swap": -1}},
        ),
        (
            Resources(memory_limit_in_bytes=-1),
            wishes.FACTS,
            {"memory": {"limit": -1, "swap": -1}},
        ),
        (
            Resources(memory_limit_in_bytes=100, memory_swap_limit_in_bytes=150),
            V1,
            {"memory": {"limit": 100}},
        ),
        (
            Resources(hugepage_limits=PAGES),
            wishes.FACTS,
            {"hugepageLimits": [{"pageSize": "2MB", "limit": 4}]},
        ),
        (Resources(hugepage_limits=[PAGES[1]]), V1, {}),
        (
            Resources(unified={"memory.high": "1000", "io.bfq.weight": "1"}),
            wishes.FACTS,
            {"unified": {"memory.high": "1000", "io.bfq.weight": "1"}},
        ),
    ],
)
def test_resources(asked: Resources, host: spec.HostFacts, expected: spec.Resources) -> None:
    assert spec.resources(asked, host) == expected
    found = linux(wishes.container(resources=asked), host=host)["resources"]
    assert {k: v for k, v in found.items() if k != "devices"} == spec.resources_at_start(expected)


def test_a_document_has_no_quota_that_is_none() -> None:
    found = linux(wishes.container(resources=Resources(cpu_shares=2, cpu_quota=-1)))["resources"]
    assert found["cpu"] == {"shares": 2}
    found = linux(wishes.container(resources=Resources(cpu_quota=-1)))["resources"]
    assert "cpu" not in found


OOM = {"memory.oom.group": "1", "memory.high": "5"}
GIVEN = spec.Defaults(unified=OOM, unified_key="[runtimes.x] default_unified")


def test_what_the_handler_has_for_the_cgroup_gives_way_to_what_is_asked() -> None:
    asked = Resources(unified={"memory.high": "9", "io.weight": "1"})
    expected = {"memory.oom.group": "1", "memory.high": "9", "io.weight": "1"}
    assert spec.resources(asked, wishes.FACTS, GIVEN)["unified"] == expected
    found = linux(wishes.container(resources=asked), defaults=GIVEN)["resources"]
    assert found["unified"] == expected
    assert spec.resources(Resources(), wishes.FACTS, GIVEN) == {"unified": OOM}


def test_what_the_handler_has_for_cgroup_v2_is_refused_without_it_by_its_key() -> None:
    with pytest.raises(
        errors.InvalidArgument, match=r"\[runtimes.x\] default_unified: .* no cgroup"
    ):
        spec.resources(Resources(), V1, GIVEN)


@pytest.mark.parametrize(
    ("asked", "host", "message"),
    [
        (Resources(cpu_shares=-1), wishes.FACTS, "cpu_shares"),
        (Resources(cpu_quota=-2), wishes.FACTS, "cpu_quota"),
        (Resources(cpu_quota=999), wishes.FACTS, "cpu_quota"),
        (Resources(cpu_period=-1), wishes.FACTS, "cpu_period"),
        (Resources(cpu_period=999), wishes.FACTS, "cpu_period"),
        (Resources(cpu_period=1000001), wishes.FACTS, "cpu_period"),
        (Resources(cpuset_cpus="0-"), wishes.FACTS, "cpuset_cpus"),
        (Resources(cpuset_mems="all"), wishes.FACTS, "cpuset_mems"),
        (Resources(cpuset_cpus="0\n"), wishes.FACTS, "cpuset_cpus"),
        (Resources(memory_limit_in_bytes=-2), wishes.FACTS, "memory_limit"),
        (Resources(memory_swap_limit_in_bytes=-2), wishes.FACTS, "memory_swap"),
        (Resources(memory_swap_limit_in_bytes=5), wishes.FACTS, "memory_swap"),
        (
            Resources(memory_limit_in_bytes=9, memory_swap_limit_in_bytes=5),
            wishes.FACTS,
            "memory_swap",
        ),
        (Resources(hugepage_limits=PAGES), V1, "hugepage_limits"),
        (Resources(unified={"memory.high": "1"}), V1, "unified"),
        (Resources(unified={"../memory.high": "1"}), wishes.FACTS, "unified"),
        (Resources(unified={"cgroup.procs": "1"}), wishes.FACTS, "unified"),
        (Resources(unified={"memory": "1"}), wishes.FACTS, "unified"),
        (Resources(unified={"memory.high": "1\0"}), wishes.FACTS, "unified"),
        (Resources(oom_score_adj=1001), wishes.FACTS, "oom_score_adj"),
        (Resources(oom_score_adj=-1001), wishes.FACTS, "oom_score_adj"),
    ],
)
def test_resources_that_cannot_be_set_are_refused(
    asked: Resources, host: spec.HostFacts, message: str
) -> None:
    with pytest.raises(errors.InvalidArgument, match=message):
        wishes.validate(wishes.container(resources=asked), host=host)


@pytest.mark.parametrize(
    ("asked", "floor", "expected"), [(-999, -1000, -999), (-999, 0, 0), (5, 0, 5)]
)
def test_oom_score_adj_is_raised_to_what_the_host_lets_us_set(
    asked: int, floor: int, expected: int
) -> None:
    host = dataclasses.replace(wishes.FACTS, oom_score_adj_floor=floor)
    wish = wishes.container(resources=Resources(oom_score_adj=asked))
    assert spec.container(wishes.given(wish, host=host))["process"]["oomScoreAdj"] == expected
