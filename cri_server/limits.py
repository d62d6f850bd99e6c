# SPDX-License-Identifier: Apache-2.0
"""Limits as people write them, in the configuration and in annotations: "nofile=1024:4096", "64Mi".

Pure. What is wrong is a ValueError with a reason; the caller knows where it stood.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

UNLIMITED = 2**64 - 1
DEFAULT = "nofile=1024:524288"  # of containers: as systemd has it for services
SHM_SIZE = "64Mi"  # of a pod's /dev/shm
_NAMES = (
    *("as", "core", "cpu", "data", "fsize", "locks", "memlock", "msgqueue", "nice", "nofile"),
    *("nproc", "rss", "rtprio", "rttime", "sigpending", "stack"),
)
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}
_SIZE = re.compile(r"([0-9]{1,18})(k|M|G|Ki|Mi|Gi)?", re.ASCII)
UNIFIED_KEY = re.compile(r"(?!cgroup\.)[a-z0-9_]+(\.[a-zA-Z0-9_]+)+")  # a controller's file
# What the request's own fields or other options set: there it would win over them.
_SET_ELSEWHERE = re.compile(
    r"cpu\.(max|weight)|cpuset\.(cpus|mems)|memory\.(swap\.)?max|pids\.max|hugetlb\..*"
)
_VALUE = re.compile(r"[0-9]{1,19}", re.ASCII)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rlimit:
    """A resource limit by its C name, "RLIMIT_NOFILE"; UNLIMITED is RLIM_INFINITY."""

    type: str
    soft: int
    hard: int


def rlimits(text: str) -> tuple[Rlimit, ...]:
    """Read "nofile=1024:4096,core=0": soft and hard limit, or one number for both; "" is none.

    Names are those of setrlimit(2) in small letters; "unlimited" is a number too.
    """
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    found = [_rlimit(part) for part in parts]
    if len({limit.type for limit in found}) < len(found):
        raise ValueError(f"{text[:100]!r} names a limit twice")
    return tuple(found)


def _rlimit(part: str) -> Rlimit:
    name, equals, value = part.partition("=")
    if not equals:
        raise ValueError(f"{part[:40]!r} is not NAME=SOFT:HARD")
    if name not in _NAMES:
        raise ValueError(f"{name[:40]!r} is not a limit (known: {', '.join(_NAMES)})")
    soft, colon, hard = value.partition(":")
    limit = Rlimit(
        type=f"RLIMIT_{name.upper()}", soft=_number(soft), hard=_number(hard if colon else soft)
    )
    if limit.soft > limit.hard:
        raise ValueError(f"{part[:60]!r}: the soft limit is above the hard one")
    return limit


def _number(text: str) -> int:
    if text == "unlimited":
        return UNLIMITED
    if not _VALUE.fullmatch(text):
        raise ValueError(f"{text[:40]!r} is neither a number nor unlimited")
    return int(text)


def unified(table: Mapping[str, str]) -> Mapping[str, str]:
    """Check files of a cgroup (v2) and what is written there: {"memory.oom.group": "1"}."""
    for key, value in table.items():
        if not UNIFIED_KEY.fullmatch(key):
            raise ValueError(f"{key[:80]!r} is not a controller's file")
        if _SET_ELSEWHERE.fullmatch(key):
            raise ValueError(f"{key[:80]!r} follows from the limits of each container")
        if not value.isprintable() or not value:
            raise ValueError(f"{key}: {value[:40]!r} cannot be written")
    return table


def size(text: str) -> int:
    """Read a number of bytes as Kubernetes writes it: "64Mi", "1Gi", "500M", "67108864"."""
    found = _SIZE.fullmatch(text)
    if found is None:
        raise ValueError(f"{text[:40]!r} is not a size such as 64Mi")
    return int(found[1]) * _UNITS[found[2] or ""]
