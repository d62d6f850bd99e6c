# SPDX-License-Identifier: Apache-2.0
"""What a cgroup uses, read from its files in any cgroup mode: at most a handful of files, no
process.

    value          v1                                     v2
    cpu            cpuacct.usage                          cpu.stat usage_usec
    memory         memory.usage_in_bytes, memory.stat     memory.current, memory.stat
    limit          memory.limit_in_bytes                  memory.max
    swap           memory.memsw.* minus memory.*          memory.swap.current, memory.swap.max
    pressure       (those of v2 in hybrid mode)           cpu.pressure, memory.pressure, io.pressure

In hybrid mode every container is in the v2 hierarchy too, which has no controllers but counts
pressure. The whole of cpu.stat and memory.stat is handed on: `accounts` finds most of what metrics
need in it.

All functions block for the time of some reads of kernfs. A file that is not there leaves its value
None. What most cgroups of a node say most of the time is what they said before, since they are
idle: long files are parsed once for each text (`REMEMBERED`).
"""

import functools
import os
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

UNLIMITED = 1 << 62  # v1 says "no limit" by a number near 2^63
REMEMBERED = 512  # texts of each kind: about 2 MiB of memory.stat


class Pressure(NamedTuple):
    """One line of a PSI file: total stall in nanoseconds, averages in percent."""

    total: int
    avg10: float
    avg60: float
    avg300: float


class Pressures(NamedTuple):
    """A PSI file: the line of some tasks and that of all, which older kernels lack for cpu."""

    some: Pressure | None
    full: Pressure | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """Bytes, nanoseconds and counts; None where the kernel does not tell."""

    cpu: int | None = None
    memory: int | None = None
    working_set: int | None = None
    rss: int | None = None
    cache: int | None = None
    limit: int | None = None  # None: unlimited
    faults: int | None = None
    major_faults: int | None = None
    swap: int | None = None
    swap_limit: int | None = None
    pressure: Mapping[str, Pressures] | None = None  # of cpu, memory and io
    cpu_stat: Mapping[str, int] = field(default_factory=dict)  # v2 alone
    memory_stat: Mapping[str, int] = field(default_factory=dict)


def read(directories: Mapping[str, str]) -> Usage | None:
    """Read the usage of a cgroup given by `Cgroups.accounts`; None when it is gone."""
    if "" in directories:
        return _read_v2(directories[""])
    return _read_v1(directories)


def total(parts: Iterable[Usage]) -> Usage | None:
    """Return what several cgroups use together, None when there are none. Limits and pressure have
    no sum.
    """
    known = list(parts)
    if not known:
        return None
    return Usage(
        cpu=_sum(part.cpu for part in known),
        memory=_sum(part.memory for part in known),
        working_set=_sum(part.working_set for part in known),
        rss=_sum(part.rss for part in known),
        cache=_sum(part.cache for part in known),
        faults=_sum(part.faults for part in known),
        major_faults=_sum(part.major_faults for part in known),
    )


def _sum(values: Iterable[int | None]) -> int | None:
    told = [value for value in values if value is not None]
    return sum(told) if told else None


def _read_v2(directory: str) -> Usage | None:
    cpu = fields(directory, "cpu.stat")
    if cpu is None:
        return None
    memory = fields(directory, "memory.stat") or {}
    current = number(directory, "memory.current")
    return Usage(
        cpu=cpu.get("usage_usec", 0) * 1000,
        memory=current,
        working_set=_working_set(current, memory.get("inactive_file", 0)),
        rss=memory.get("anon"),
        cache=memory.get("file"),
        limit=number(directory, "memory.max"),
        faults=memory.get("pgfault"),
        major_faults=memory.get("pgmajfault"),
        swap=number(directory, "memory.swap.current"),
        swap_limit=number(directory, "memory.swap.max"),
        pressure=_pressures(directory),
        cpu_stat=cpu,
        memory_stat=memory,
    )


def _read_v1(directories: Mapping[str, str]) -> Usage | None:
    cpu = number(directories.get("cpuacct", ""), "cpuacct.usage")
    memory = directories.get("memory", "")
    stat = fields(memory, "memory.stat")
    if cpu is None and stat is None:
        return None
    stat = stat or {}
    current = number(memory, "memory.usage_in_bytes")
    limit = number(memory, "memory.limit_in_bytes")
    both = number(memory, "memory.memsw.usage_in_bytes")
    return Usage(
        cpu=cpu,
        memory=current,
        working_set=_working_set(current, stat.get("total_inactive_file", 0)),
        rss=stat.get("total_rss"),
        cache=stat.get("total_cache"),
        limit=limit,
        faults=stat.get("total_pgfault"),
        major_faults=stat.get("total_pgmajfault"),
        swap=None if both is None or current is None else max(both - current, 0),
        swap_limit=_v1_swap_limit(memory, limit),
        pressure=_pressures(directories["unified"]) if "unified" in directories else None,
        memory_stat=stat,
    )


def _v1_swap_limit(directory: str, limit: int | None) -> int | None:
    both = number(directory, "memory.memsw.limit_in_bytes")
    return None if both is None or limit is None else max(both - limit, 0)


def _working_set(current: int | None, inactive_file: int) -> int | None:
    return None if current is None else max(current - inactive_file, 0)


def _pressures(directory: str) -> dict[str, Pressures] | None:
    texts = {n: text(directory, f"{n}.pressure") for n in ("cpu", "memory", "io")}
    return {n: _pressure(content) for n, content in texts.items() if content} or None


@functools.lru_cache(maxsize=REMEMBERED)
def _pressure(content: str) -> Pressures:
    lines = {words[0]: _line(words) for words in map(str.split, content.splitlines())}
    return Pressures(some=lines.get("some"), full=lines.get("full"))


def _line(words: Sequence[str]) -> Pressure:
    """Parse "some avg10=0.00 avg60=0.00 avg300=0.00 total=0" (Documentation/accounting/psi.rst)."""
    return Pressure(
        avg10=float(words[1][6:]),
        avg60=float(words[2][6:]),
        avg300=float(words[3][7:]),
        total=int(words[4][6:]) * 1000,
    )


def fields(directory: str, name: str) -> Mapping[str, int] | None:
    """Return a file of "name value" lines; None if it is missing."""
    content = text(directory, name)
    return None if content is None else _fields(content)


@functools.lru_cache(maxsize=REMEMBERED)
def _fields(content: str) -> Mapping[str, int]:
    words = content.split()
    return types.MappingProxyType(dict(zip(words[::2], map(int, words[1::2]), strict=True)))


def number(directory: str, name: str) -> int | None:
    """Return a file's number; None if it is missing, "max", or so large that it means unlimited."""
    content = text(directory, name)
    if content is None or not content.strip().isdigit():
        return None
    value = int(content)
    return None if value >= UNLIMITED else value


def text(directory: str, name: str) -> str | None:
    """Return what is in a file; None if it is missing."""
    try:
        fd = os.open(f"{directory}/{name}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return os.read(fd, 65536).decode()
    except OSError:  # the cgroup was removed between open and read
        return None
    finally:
        os.close(fd)
