# SPDX-License-Identifier: Apache-2.0
"""What of an update the OCI runtime is told, and what is written without it."""

import pytest

from cri_server import spec, updates

UNLIMITED: spec.Resources = {"cpu": {"period": 100000, "quota": -1}}
V1 = {"cpu": "/cg/cpu", "hugetlb": "/cg/hugetlb"}


def test_crun_is_not_told_to_lift_a_quota_on_cgroup_v1() -> None:
    told, files = updates.split(UNLIMITED, V1, "crun")

    assert told == {"cpu": {"period": 100000}}
    assert files == {"/cg/cpu/cpu.cfs_quota_us": "-1"}


@pytest.mark.parametrize(("directories", "dialect"), [(V1, "runc"), ({"": "/cg"}, "crun")])
def test_the_others_are_told_all(directories: dict[str, str], dialect: str) -> None:
    assert updates.split(UNLIMITED, directories, dialect) == (UNLIMITED, {})


def test_crun_is_told_a_period_with_the_quota_on_cgroup_v2() -> None:
    limits: spec.Resources = {"cpu": {"quota": -1, "shares": 5}}
    told, files = updates.split(limits, {"": "/cg"}, "crun")
    assert told == {"cpu": {"quota": -1, "shares": 5, "period": 100000}}
    assert not files


def test_huge_pages_are_written_without_any_runtime() -> None:
    limits: spec.Resources = {"hugepageLimits": [{"pageSize": "2MB", "limit": 4}]}

    _, files = updates.split(limits, V1, "runc")

    assert files == {
        "/cg/hugetlb/hugetlb.2MB.limit_in_bytes": "4",
        "/cg/hugetlb/hugetlb.2MB.rsvd.limit_in_bytes": "4",
    }
