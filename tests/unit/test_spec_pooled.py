# SPDX-License-Identifier: Apache-2.0
"""cri_server.spec.pooled: which limits of a container its pod's limits keep too."""

from typing import Any

import pytest

from cri_server.pb import api_pb2 as api
from cri_server.spec import pooled, why

MIB = 1 << 20


def unheld(own: dict[str, Any], of_pod: dict[str, Any]) -> dict[str, str]:
    wanted, given = api.LinuxContainerResources(**own), api.LinuxContainerResources(**of_pod)
    return dict(pooled.unheld(wanted, given))


@pytest.mark.parametrize(
    ("own", "of_pod", "part", "asked"),
    [
        ({"memory_limit_in_bytes": MIB}, {}, "memory.limit", "1048576"),
        ({"memory_limit_in_bytes": 1}, {"memory_limit_in_bytes": 2}, "memory.limit", "1"),
        ({"memory_limit_in_bytes": 1}, {"memory_limit_in_bytes": -1}, "memory.limit", "1"),
        ({"memory_swap_limit_in_bytes": 5}, {}, "memory.swap", "5"),
        ({"cpu_quota": 5000}, {}, "cpu.quota", "5000"),
        ({"cpu_quota": 5000}, {"cpu_quota": 5001}, "cpu.quota", "5000"),
        (
            {"cpu_quota": 5000, "cpu_period": 100000},
            {"cpu_quota": 5000, "cpu_period": 50000},
            "cpu.quota",
            "5000",
        ),
        ({"cpuset_cpus": "0"}, {"cpuset_cpus": "0-1"}, "cpu.cpus", "0"),
        ({"cpuset_mems": "0"}, {}, "cpu.mems", "0"),
        (
            {"hugepage_limits": [{"page_size": "2MB", "limit": MIB}]},
            {},
            "hugepageLimits[2MB]",
            "1048576",
        ),
        ({"unified": {"memory.high": "7"}}, {}, "unified[memory.high]", "7"),
    ],
)
def test_a_limit_that_the_pods_does_not_keep_is_told(
    own: dict[str, Any], of_pod: dict[str, Any], part: str, asked: str
) -> None:
    assert unheld(own, of_pod) == {f"linux.resources.{part}": asked}


@pytest.mark.parametrize(
    ("own", "of_pod"),
    [
        ({}, {}),
        ({"memory_limit_in_bytes": 2}, {"memory_limit_in_bytes": 2}),
        ({"memory_limit_in_bytes": -1}, {}),
        ({"cpu_quota": 10000, "cpu_period": 100000}, {"cpu_quota": 5000, "cpu_period": 50000}),
        ({"cpu_quota": 10000}, {"cpu_quota": 10000, "cpu_period": 100000}),
        ({"cpu_quota": -1}, {}),
        ({"cpuset_cpus": "0"}, {"cpuset_cpus": "0"}),
        ({"cpu_shares": 512, "oom_score_adj": 5}, {}),
        ({"hugepage_limits": [{"page_size": "2MB"}]}, {}),
        ({"unified": {"memory.high": "7"}}, {"unified": {"memory.high": "7"}}),
    ],
)
def test_what_the_pods_limits_keep_and_what_is_none_is_not(
    own: dict[str, Any], of_pod: dict[str, Any]
) -> None:
    assert unheld(own, of_pod) == {}


def test_each_is_noted_as_not_given() -> None:
    with why.recorded() as noted:
        pooled.note({"linux.resources.memory.limit": "5"}, "[runtimes.runsc] dialect")
    last = noted["linux.resources.memory.limit"][-1]
    assert (last.source, last.field, last.asked) == ("handler", "[runtimes.runsc] dialect", "5")
