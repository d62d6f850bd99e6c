# SPDX-License-Identifier: Apache-2.0
"""An administrator's seccomp profile (Localhost), looked at field by field.

The format is that of `linux.seccomp` in the OCI runtime spec (config-linux.md), or Docker's and
Podman's, which `seccompdocker` brings into it. What the OCI runtime would refuse when the container
starts, or would leave out in silence, is refused here with its place in the file: a filter that is
weaker than it reads is worse than none. Pure.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from cri_server import errors
from cri_server.spec import seccompdocker

Check = Callable[[object, str], None]


def _prefixed(prefix: str, words: str) -> frozenset[str]:
    return frozenset(prefix + word for word in words.split())


ACTIONS = _prefixed("SCMP_ACT_", "KILL KILL_THREAD KILL_PROCESS TRAP ERRNO TRACE ALLOW LOG NOTIFY")
_ARCHITECTURES = _prefixed(
    "SCMP_ARCH_",
    """
    X86 X86_64 X32 ARM AARCH64 MIPS MIPS64 MIPS64N32 MIPSEL MIPSEL64 MIPSEL64N32 PPC PPC64 PPC64LE
    S390 S390X PARISC PARISC64 RISCV64 LOONGARCH64 M68K SH SHEB
    """,
)
_FLAGS = _prefixed("SECCOMP_FILTER_FLAG_", "TSYNC LOG SPEC_ALLOW WAIT_KILLABLE_RECV")
_KERNEL = re.compile(r"\d{1,4}\.\d{1,4}", re.ASCII)
_OPERATORS = _prefixed("SCMP_CMP_", "NE LT LE EQ GE GT MASKED_EQ")


def checked(profile: object, path: str) -> Mapping[str, object]:
    """Return the profile as it is; `path` is for the message.

    Raises InvalidArgument for what is no profile (an empty or `null` file must not mean
    "unconfined", CVE-2023-2431), for fields that are not known and for values that cannot be.
    """
    where = f"seccomp: {path[:200]}"
    if not isinstance(profile, Mapping):
        raise errors.InvalidArgument(f"{where}: does not hold a profile")
    _fields(_PROFILE, "defaultAction")(profile, where)
    if profile.get("archMap") and profile.get("architectures"):
        raise errors.InvalidArgument(f"{where}: archMap: there are architectures, too")
    rules = profile.get("syscalls") or ()
    notifies = any(rule["action"] == "SCMP_ACT_NOTIFY" for rule in rules)
    if notifies and not profile.get("listenerPath"):
        raise errors.InvalidArgument(f"{where}: listenerPath: SCMP_ACT_NOTIFY needs one")
    return profile


def _fields(known: Mapping[str, Check], *required: str) -> Check:
    """Return the check of an object; a field that is null counts as absent, as in Go's JSON."""

    def check(value: object, where: str) -> None:
        if not isinstance(value, Mapping):
            raise errors.InvalidArgument(f"{where}: is not an object")
        for name in required:
            if value.get(name) is None:
                raise errors.InvalidArgument(f"{where}: {name}: is missing")
        for name, part in value.items():
            if name not in known:
                raise errors.InvalidArgument(f"{where}: {str(name)[:80]!r} is not a known field")
            if part is not None:
                known[name](part, f"{where}: {name}")

    return check


def _each(check_one: Check, *, some: bool = False) -> Check:
    def check(value: object, where: str) -> None:
        if not isinstance(value, list) or (some and not value):
            raise errors.InvalidArgument(f"{where}: is not a list{' of some' if some else ''}")
        for number, part in enumerate(value):
            check_one(part, f"{where}[{number}]")

    return check


def _one_of(known: frozenset[str]) -> Check:
    def check(value: object, where: str) -> None:
        if not isinstance(value, str) or value not in known:
            raise errors.InvalidArgument(f"{where}: {str(value)[:80]!r} is not known")

    return check


def _number(most: int) -> Check:
    def check(value: object, where: str) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
            raise errors.InvalidArgument(
                f"{where}: {str(value)[:80]!r} is not a number from 0 to {most}"
            )

    return check


def _text(value: object, where: str) -> None:
    if not isinstance(value, str) or not value:
        raise errors.InvalidArgument(f"{where}: {str(value)[:80]!r} is not a text")


def _path(value: object, where: str) -> None:
    if not isinstance(value, str) or not value.startswith("/"):
        raise errors.InvalidArgument(f"{where}: {str(value)[:80]!r} is not an absolute path")


def _kernel(value: object, where: str) -> None:
    if not isinstance(value, str) or not _KERNEL.fullmatch(value):
        raise errors.InvalidArgument(f"{where}: {str(value)[:80]!r} is not a version as 4.8")


def _anything(value: object, where: str) -> None:
    """Let a comment be what it is."""


_ARGUMENT = _fields(
    {
        "index": _number(5),
        "value": _number(2**64 - 1),
        "valueTwo": _number(2**64 - 1),
        "op": _one_of(_OPERATORS),
    },
    "index",
    "op",
)
_ERRNO = _one_of(frozenset(seccompdocker.ERRNOS))
_WHERE = _fields({"caps": _each(_text), "arches": _each(_text), "minKernel": _kernel})
_RULE_FIELDS = _fields(
    {
        "names": _each(_text, some=True),
        "name": _text,
        "action": _one_of(ACTIONS),
        "errnoRet": _number(4095),
        "errno": _ERRNO,
        "args": _each(_ARGUMENT),
        "includes": _WHERE,
        "excludes": _WHERE,
        "comment": _anything,
    },
    "action",
)


def _rule(value: Any, where: str) -> None:
    _RULE_FIELDS(value, where)
    if (value.get("names") is None) == (value.get("name") is None):
        raise errors.InvalidArgument(f"{where}: names: is missing, or there is a name, too")


_MACHINE = _fields(
    {
        "architecture": _one_of(_ARCHITECTURES),
        "subArchitectures": _each(_one_of(_ARCHITECTURES)),
    },
    "architecture",
)
_PROFILE: Mapping[str, Check] = {
    "defaultAction": _one_of(ACTIONS - {"SCMP_ACT_NOTIFY"}),
    "defaultErrnoRet": _number(4095),
    "defaultErrno": _ERRNO,
    "archMap": _each(_MACHINE),
    "architectures": _each(_one_of(_ARCHITECTURES)),
    "flags": _each(_one_of(_FLAGS)),
    "listenerPath": _path,
    "listenerMetadata": _text,
    "syscalls": _each(_rule),
    "comment": _anything,
}
