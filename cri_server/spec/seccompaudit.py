# SPDX-License-Identifier: Apache-2.0
"""A seccomp profile that denies nothing and logs what it would have denied (SCMP_ACT_LOG).

The kernel writes a line for each such call: type=1326 of the audit log, with program, pid and the
call's number (seccomp(2), SECCOMP_RET_LOG). What answers ENOSYS goes on to do so: that is no
denial, programs ask and then take another way, as C libraries do from clone3 to clone, and a log
of every new thread hides the rest. Calls of another architecture's table end in SIGSYS still. Pure.
"""

from collections.abc import Mapping
from typing import Any, cast

from cri_server.spec import oci, seccomp

LOG = "SCMP_ACT_LOG"
_DENIES = frozenset(
    f"SCMP_ACT_{word}" for word in ("ERRNO", "KILL", "KILL_THREAD", "KILL_PROCESS", "TRAP")
)


def audited(profile: Mapping[str, object] | oci.Seccomp) -> Mapping[str, object]:
    """Return the profile with each denial as a line in the log; the given one stays as it is."""
    given = cast("Mapping[str, Any]", profile)
    result = dict(given)
    if _denies(given["defaultAction"], given.get("defaultErrnoRet")):
        result.pop("defaultErrnoRet", None)
        result["defaultAction"] = LOG
    rules = [_rule(rule) for rule in given.get("syscalls") or ()]
    if result["defaultAction"] == LOG:  # a rule that says what holds anyway is an error there
        rules = [rule for rule in rules if rule["action"] != LOG]
    return {**result, "syscalls": rules}


def _denies(action: str, errno: int | None) -> bool:
    return action in _DENIES and errno != seccomp.ENOSYS


def _rule(rule: Mapping[str, Any]) -> Mapping[str, Any]:
    if not _denies(rule["action"], rule.get("errnoRet")):
        return rule
    return {k: v for k, v in rule.items() if k != "errnoRet"} | {"action": LOG}
