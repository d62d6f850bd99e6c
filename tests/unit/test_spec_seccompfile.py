# SPDX-License-Identifier: Apache-2.0
"""Profiles of the administrator's own: what is a profile, and what is refused where."""

import pytest

from cri_server import errors
from cri_server.spec import seccompfile

RULE = {"names": ["mkdir"], "action": "SCMP_ACT_ALLOW"}
WHOLE = {
    "defaultAction": "SCMP_ACT_ERRNO",
    "defaultErrnoRet": 1,
    "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X32"],
    "flags": ["SECCOMP_FILTER_FLAG_LOG"],
    "syscalls": [
        RULE,
        {
            "names": ["personality"],
            "action": "SCMP_ACT_ERRNO",
            "errnoRet": 38,
            "args": [{"index": 0, "value": 2**64 - 1, "valueTwo": 0, "op": "SCMP_CMP_EQ"}],
            "comment": "why",
        },
        {"names": ["bpf"], "action": "SCMP_ACT_LOG", "args": None},
    ],
}
MAPPED = {"defaultAction": "SCMP_ACT_ERRNO"}


@pytest.mark.parametrize(
    "profile", [WHOLE, {"defaultAction": "SCMP_ACT_ALLOW"}, {**WHOLE, "syscalls": None}]
)
def test_a_profile_is_passed_on_as_it_is(profile: object) -> None:
    assert seccompfile.checked(profile, "/p.json") is profile


@pytest.mark.parametrize(
    ("profile", "place"),
    [
        (None, "does not hold a profile"),
        ([], "does not hold a profile"),
        ({}, "defaultAction: is missing"),
        ({"defaultAction": ""}, "defaultAction: ''"),
        ({"defaultAction": "SCMP_ACT_NOTIFY"}, "defaultAction: 'SCMP_ACT_NOTIFY'"),
        ({**WHOLE, "defaultErrnoRet": "1"}, "defaultErrnoRet: '1'"),
        ({**WHOLE, "defaultErrnoRet": True}, "defaultErrnoRet: 'True'"),
        ({**WHOLE, "architectures": "x86"}, "architectures: is not a list"),
        ({**WHOLE, "architectures": ["x86"]}, r"architectures\[0\]: 'x86'"),
        ({**WHOLE, "arches": []}, "'arches' is not a known field"),
        ({**WHOLE, "archMap": [{"architecture": "SCMP_ARCH_ARM"}]}, "archMap: there are"),
        ({**MAPPED, "archMap": [{"architecture": "arm"}]}, r"archMap\[0\]: architecture: 'arm'"),
        ({**MAPPED, "archMap": [{}]}, r"archMap\[0\]: architecture: is missing"),
        ({**MAPPED, "defaultErrno": "EVIL"}, "defaultErrno: 'EVIL'"),
        ({**MAPPED, "syscalls": [{**RULE, "errno": 1}]}, "errno: '1' is not known"),
        ({**MAPPED, "syscalls": [{**RULE, "includes": {"cap": []}}]}, "'cap' is not a known"),
        ({**MAPPED, "syscalls": [{**RULE, "excludes": {"minKernel": "new"}}]}, "a version as 4.8"),
        ({**WHOLE, "flags": ["LOG"]}, r"flags\[0\]: 'LOG'"),
        ({**WHOLE, "listenerPath": "sock"}, "listenerPath: 'sock'"),
        ({**WHOLE, "syscalls": {}}, "syscalls: is not a list"),
        ({**WHOLE, "syscalls": [RULE, 1]}, r"syscalls\[1\]: is not an object"),
        ({**WHOLE, "syscalls": [{**RULE, "names": []}]}, r"syscalls\[0\]: names: is not a list"),
        ({**WHOLE, "syscalls": [{**RULE, "names": [""]}]}, r"names\[0\]: ''"),
        ({**WHOLE, "syscalls": [{**RULE, "name": "x"}]}, "names: is missing, or"),
        ({**WHOLE, "syscalls": [{"action": "SCMP_ACT_ALLOW"}]}, "names: is missing, or"),
        ({**WHOLE, "syscalls": [{"names": ["a"]}]}, "action: is missing"),
        ({**WHOLE, "syscalls": [{**RULE, "action": "ALLOW"}]}, "action: 'ALLOW'"),
        ({**WHOLE, "syscalls": [{**RULE, "args": [{"index": 1}]}]}, r"args\[0\]: op: is missing"),
        (
            {**WHOLE, "syscalls": [{**RULE, "args": [{"index": 6, "op": "SCMP_CMP_EQ"}]}]},
            r"args\[0\]: index: '6'",
        ),
        (
            {**WHOLE, "syscalls": [{**RULE, "args": [{"index": 1, "op": "=="}]}]},
            r"args\[0\]: op: '=='",
        ),
        (
            {
                "defaultAction": "SCMP_ACT_ALLOW",
                "syscalls": [{**RULE, "action": "SCMP_ACT_NOTIFY"}],
            },
            "listenerPath: SCMP_ACT_NOTIFY",
        ),
    ],
)
def test_what_is_malformed_is_refused_with_its_place(profile: object, place: str) -> None:
    with pytest.raises(errors.InvalidArgument, match=f"^seccomp: /p.json: .*{place}"):
        seccompfile.checked(profile, "/p.json")
