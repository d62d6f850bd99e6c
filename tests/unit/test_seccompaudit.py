# SPDX-License-Identifier: Apache-2.0
"""spec.seccompaudit: a profile that denies nothing, and what stays as it is."""

import copy
from typing import Any

import pytest

from cri_server import errors, overlayoptions
from cri_server.pb import api_pb2 as api
from cri_server.spec import seccomp, seccompaudit, seccompfile, security, types, why

CONTEXT = api.LinuxContainerSecurityContext(
    seccomp=api.SecurityProfile(profile_type=api.SecurityProfile.RuntimeDefault)
)
HOST = types.HostFacts(capabilities=frozenset(), known_capabilities=frozenset(), cgroup_v2=True)


def rule(action: str, *names: str, **more: Any) -> dict[str, Any]:
    return {"names": list(names), "action": f"SCMP_ACT_{action}", **more}


@pytest.mark.parametrize("action", ["ERRNO", "KILL", "KILL_THREAD", "KILL_PROCESS", "TRAP"])
def test_a_denial_becomes_a_line_of_the_log(action: str) -> None:
    given = {
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [rule(action, "mkdir"), rule("TRACE", "kill")],
    }
    found = seccompaudit.audited(given)

    assert found["defaultAction"] == "SCMP_ACT_ALLOW"
    assert found["syscalls"] == [rule("LOG", "mkdir"), rule("TRACE", "kill")]


def test_a_list_of_what_is_allowed_logs_the_rest() -> None:
    given = {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": 1,
        "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [rule("ALLOW", "read"), rule("KILL", "mount"), rule("TRACE", "open")],
    }
    assert seccompaudit.audited(given) == {
        "defaultAction": "SCMP_ACT_LOG",
        "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [rule("ALLOW", "read"), rule("TRACE", "open")],
    }


def test_enosys_stays_for_programs_take_another_way() -> None:
    given = {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": 38,
        "syscalls": [rule("ERRNO", "clone3", errnoRet=38), rule("ERRNO", "mount", errnoRet=1)],
    }
    assert seccompaudit.audited(given) == {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": 38,
        "syscalls": [rule("ERRNO", "clone3", errnoRet=38), rule("LOG", "mount")],
    }


def test_the_built_in_profile_can_be_audited_and_is_not_changed() -> None:
    ours = seccomp.default(frozenset(), "x86_64")
    before = copy.deepcopy(ours)

    found = seccompaudit.audited(ours)

    assert ours == before
    assert seccompfile.checked(found, "ours")["defaultAction"] == "SCMP_ACT_LOG"
    assert {r["action"] for r in ours["syscalls"]} == {"SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO"}


@pytest.mark.parametrize("own", [None, {"defaultAction": "SCMP_ACT_ERRNO"}])
@pytest.mark.parametrize("audit", ["", "[runtimes.x] seccomp_audit"])
def test_runtime_default_is_the_handlers(own: dict[str, object] | None, audit: str) -> None:
    given = types.Defaults(
        seccomp=own, seccomp_key="[runtimes.x] seccomp_profile", seccomp_audit_key=audit
    )
    with why.recorded() as noted:
        found = security.seccomp_profile(
            CONTEXT, held=(), host=HOST, localhost=None, defaults=given
        )
    assert found is not None
    assert found["defaultAction"] == ("SCMP_ACT_LOG" if audit else "SCMP_ACT_ERRNO")
    assert ("architectures" in found) == (own is None)
    wanted = [given.seccomp_key] if own else []
    wanted += [audit] if audit else []
    assert [n.field for n in noted["linux.seccomp"] if n.source == "handler"] == wanted


def test_a_localhost_profile_is_the_pods_own() -> None:
    context = api.LinuxContainerSecurityContext()
    context.seccomp.profile_type = api.SecurityProfile.Localhost
    context.seccomp.localhost_ref = "/x.json"
    given = types.Defaults(seccomp={"defaultAction": "SCMP_ACT_ALLOW"}, seccomp_audit_key="x")
    profile = {"defaultAction": "SCMP_ACT_ERRNO"}

    assert (
        security.seccomp_profile(context, held=(), host=HOST, localhost=profile, defaults=given)
        == profile
    )
    with pytest.raises(errors.InvalidArgument):
        security.seccomp_profile(context, held=(), host=HOST, localhost={}, defaults=given)


def test_our_own_word_is_not_for_the_mount() -> None:
    words = overlayoptions.chosen(["sync", "nosuid", "index=off"])

    assert overlayoptions.of_mount(words) == ("nosuid", "index=off")
