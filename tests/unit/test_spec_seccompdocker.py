# SPDX-License-Identifier: Apache-2.0
"""Docker's and Podman's profiles: which of their rules a container gets."""

from typing import Any

import pytest

from cri_server.spec import seccompdocker, seccompfile
from tests.lab import wishes

ALLOW = "SCMP_ACT_ALLOW"
PROFILE: dict[str, Any] = {
    "defaultAction": "SCMP_ACT_ERRNO",
    "defaultErrno": "ENOSYS",
    "archMap": [
        {"architecture": "SCMP_ARCH_AARCH64", "subArchitectures": ["SCMP_ARCH_ARM"]},
        {"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86"]},
        {"architecture": "SCMP_ARCH_S390X", "subArchitectures": None},
    ],
    "syscalls": [
        {"name": "read", "action": ALLOW, "args": None, "includes": {}, "excludes": {}},
        {"names": ["mount"], "action": ALLOW, "includes": {"caps": ["CAP_SYS_ADMIN"]}},
        {"names": ["clone"], "action": ALLOW, "excludes": {"caps": ["CAP_SYS_ADMIN"]}},
        {"names": ["arch_prctl"], "action": ALLOW, "includes": {"arches": ["amd64", "x32"]}},
        {"names": ["personality"], "action": ALLOW, "excludes": {"arches": ["amd64"]}},
        {"names": ["ptrace"], "action": ALLOW, "includes": {"minKernel": "4.8"}},
        {"names": ["brand_new"], "action": ALLOW, "includes": {"minKernel": "6.10"}},
        {"names": ["old"], "action": "SCMP_ACT_ERRNO", "errno": "EPERM", "errnoRet": 38},
    ],
}


def resolved(*held: str, **facts: Any) -> Any:
    checked = seccompfile.checked(PROFILE, "/p.json")
    return seccompdocker.resolved(checked, held=held, host=wishes.facts(kernel=(6, 9), **facts))


def names(profile: Any) -> list[str]:
    return [name for rule in profile["syscalls"] for name in rule["names"]]


def test_it_becomes_a_profile_of_the_runtime_spec() -> None:
    found = resolved()
    assert found["defaultErrnoRet"] == 38
    assert found["architectures"] == ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"]
    assert found["syscalls"][0] == {"names": ["read"], "action": ALLOW, "args": None}
    assert found["syscalls"][-1] == {"names": ["old"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1}
    assert seccompfile.checked(found, "/p.json") is found
    assert not {"archMap", "defaultErrno"} & found.keys()


@pytest.mark.parametrize(
    ("held", "facts", "expected"),
    [
        ((), {}, ["read", "clone", "arch_prctl", "ptrace", "old"]),
        (("CAP_SYS_ADMIN",), {}, ["read", "mount", "arch_prctl", "ptrace", "old"]),
        ((), {"machine": "aarch64"}, ["read", "clone", "personality", "ptrace", "old"]),
    ],
)
def test_a_rule_holds_where_it_says(
    held: tuple[str, ...], facts: dict[str, str], expected: list[str]
) -> None:
    assert names(resolved(*held, **facts)) == expected


@pytest.mark.parametrize(("kernel", "there"), [((4, 7), False), ((4, 8), True), ((10, 0), True)])
def test_versions_are_numbers(kernel: tuple[int, int], there: bool) -> None:
    host = wishes.facts(kernel=kernel)
    found = seccompdocker.resolved(PROFILE, held=(), host=host)
    assert ("ptrace" in names(found)) == there


def test_a_machine_that_the_file_does_not_name_is_the_runtimes_matter() -> None:
    assert "architectures" not in resolved(machine="riscv64")
    assert resolved(machine="s390x")["architectures"] == ["SCMP_ARCH_S390X"]


def test_a_profile_of_the_runtime_spec_stays_as_it_is() -> None:
    plain = {"defaultAction": ALLOW, "syscalls": [{"names": ["a"], "action": ALLOW}]}
    assert seccompdocker.resolved(plain, held=(), host=wishes.FACTS) is plain
