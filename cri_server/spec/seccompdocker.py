# SPDX-License-Identifier: Apache-2.0
"""Seccomp profiles as Docker and Podman write them, brought into the OCI runtime spec's format.

    archMap                            architectures, those of this machine
    includes, excludes of a rule       the rule or nothing, by machine, capabilities and kernel
    name of a rule                     names
    defaultErrno, errno "EPERM"        defaultErrnoRet, errnoRet

The files that the peers' own defaults come from are of this kind, and so are those that people make
from them. Pure; `seccompfile` has looked at every field before.
"""

import errno
from collections.abc import Collection, Mapping
from typing import Any

from cri_server.spec import types

ERRNOS = {name: number for number, name in errno.errorcode.items()}
_OF_PROFILE = frozenset({"archMap", "defaultErrno"})
_OF_RULE = frozenset({"name", "includes", "excludes", "errno"})
_MACHINES = {  # uname -m: the names that Go and libseccomp have for it
    "x86_64": ("amd64", "SCMP_ARCH_X86_64"),
    "i686": ("386", "SCMP_ARCH_X86"),
    "aarch64": ("arm64", "SCMP_ARCH_AARCH64"),
    "armv7l": ("arm", "SCMP_ARCH_ARM"),
    "ppc64le": ("ppc64le", "SCMP_ARCH_PPC64LE"),
    "s390x": ("s390x", "SCMP_ARCH_S390X"),
    "riscv64": ("riscv64", "SCMP_ARCH_RISCV64"),
    "loongarch64": ("loong64", "SCMP_ARCH_LOONGARCH64"),
}


def resolved(
    profile: Mapping[str, Any], *, held: Collection[str], host: types.HostFacts
) -> Mapping[str, Any]:
    """Return the profile for a container with these capabilities on this host; one in the runtime
    spec's own format as it is.
    """
    rules = profile.get("syscalls") or ()
    if not (_OF_PROFILE & profile.keys() or any(_OF_RULE & rule.keys() for rule in rules)):
        return profile
    made = {key: value for key, value in profile.items() if key not in _OF_PROFILE}
    if chosen := _architectures(profile, host):
        made["architectures"] = chosen
    if name := profile.get("defaultErrno"):
        made["defaultErrnoRet"] = ERRNOS[name]
    made["syscalls"] = [_rule(rule) for rule in rules if _applies(rule, held, host)]
    return made


def _architectures(profile: Mapping[str, Any], host: types.HostFacts) -> list[str]:
    _, native = _MACHINES.get(host.machine, ("", ""))
    for entry in profile.get("archMap") or ():
        if entry["architecture"] == native:
            return [native, *(entry.get("subArchitectures") or ())]
    return []  # the OCI runtime then takes the native one


def _rule(rule: Mapping[str, Any]) -> dict[str, Any]:
    made = {key: value for key, value in rule.items() if key not in _OF_RULE}
    if name := rule.get("name"):
        made["names"] = [name]
    if number := rule.get("errno"):
        made["errnoRet"] = ERRNOS[number]
    return made


def _applies(rule: Mapping[str, Any], held: Collection[str], host: types.HostFacts) -> bool:
    """Say whether all that it includes is here, and nothing that it excludes."""
    included, excluded = rule.get("includes") or {}, rule.get("excludes") or {}
    machine, _ = _MACHINES.get(host.machine, (host.machine, ""))
    return not (
        any(capability not in held for capability in included.get("caps") or ())
        or any(capability in held for capability in excluded.get("caps") or ())
        or (included.get("arches") and machine not in included["arches"])
        or machine in (excluded.get("arches") or ())
        or (included.get("minKernel") and host.kernel < _version(included["minKernel"]))
        or (excluded.get("minKernel") and host.kernel >= _version(excluded["minKernel"]))
    )


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")
    return int(major), int(minor)
