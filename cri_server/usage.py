# SPDX-License-Identifier: Apache-2.0
"""What a cgroup uses, read from its files in any cgroup mode: at most a handful of files, no
process.

    value          v1                                     v2
    cpu            cpuacct.usage                          cpu.stat usage_usec
    memory         memory.usage_in_bytes, memory.stat     memory.current, memory.stat
    limit          memory.limit_in_bytes                  memory.max
    swap           memory.memsw.* minus memory.*          memory.swap.current, memory.swap.max
    processes      pids.current                           pids.current
    pressure       (none)                                 cpu.pressure, memory.pressure, io.pressure

All functions block for the time of some reads of kernfs. A file that is not there leaves its value
None.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

UNLIMITED = 1 << 62  # v1 says "no limit" by a number near 2^63


@dataclass(frozen=True, kw_only=True, slots=True)
class Pressure:
    """One line of a PSI file: total stall in nanoseconds, averages in percent."""

    total: int
    avg10: float
    avg60: float
    avg300: float


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
    processes: int | None = None
    pressure: Mapping[str, Mapping[str, Pressure]] | None = None  # cpu|memory|io: some|full


def read(directories: Mapping[str, str]) -> Usage | None:
    """Read the usage of a cgroup given by `Cgroups.directories`; None when it is gone."""
    if "" in directories:
        return _read_v2(directories[""])
    return _read_v1(directories)


def _read_v2(directory: str) -> Usage | None:
    cpu = _fields(directory, "cpu.stat")
    if cpu is None:
        return None
    memory = _fields(directory, "memory.stat") or {}
    current = _number(directory, "memory.current")
    return Usage(
        cpu=cpu.get("usage_usec", 0) * 1000,
        memory=current,
        working_set=_working_set(current, memory.get("inactive_file", 0)),
        rss=memory.get("anon"),
        cache=memory.get("file"),
        limit=_number(directory, "memory.max"),
        faults=memory.get("pgfault"),
        major_faults=memory.get("pgmajfault"),
        swap=_number(directory, "memory.swap.current"),
        swap_limit=_number(directory, "memory.swap.max"),
        processes=_number(directory, "pids.current"),
        pressure=_pressures(directory),
    )


def _read_v1(directories: Mapping[str, str]) -> Usage | None:
    cpu = _number(directories.get("cpuacct", ""), "cpuacct.usage")
    memory = directories.get("memory", "")
    stat = _fields(memory, "memory.stat")
    if cpu is None and stat is None:
        return None
    stat = stat or {}
    current, limit = (
        _number(memory, "memory.usage_in_bytes"),
        _number(memory, "memory.limit_in_bytes"),
    )
    both = _number(memory, "memory.memsw.usage_in_bytes")
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
        processes=_number(directories.get("pids", ""), "pids.current"),
    )


def _v1_swap_limit(directory: str, limit: int | None) -> int | None:
    both = _number(directory, "memory.memsw.limit_in_bytes")
    return None if both is None or limit is None else max(both - limit, 0)


def _working_set(current: int | None, inactive_file: int) -> int | None:
    return None if current is None else max(current - inactive_file, 0)


def _pressures(directory: str) -> dict[str, dict[str, Pressure]] | None:
    found = {n: _pressure(directory, f"{n}.pressure") for n in ("cpu", "memory", "io")}
    return {n: lines for n, lines in found.items() if lines} or None


def _pressure(directory: str, name: str) -> dict[str, Pressure]:
    text = _text(directory, name) or ""
    lines = (line.split() for line in text.splitlines())
    return {words[0]: _pressure_line(dict(w.split("=") for w in words[1:])) for words in lines}


def _pressure_line(words: Mapping[str, str]) -> Pressure:
    return Pressure(
        total=int(words["total"]) * 1000,
        avg10=float(words["avg10"]),
        avg60=float(words["avg60"]),
        avg300=float(words["avg300"]),
    )


def _fields(directory: str, name: str) -> dict[str, int] | None:
    text = _text(directory, name)
    if text is None:
        return None
    return {
        key: int(value) for key, _, value in (line.partition(" ") for line in text.splitlines())
    }


def _number(directory: str, name: str) -> int | None:
    """Return a file's number; None if it is missing, "max", or so large that it means unlimited."""
    text = _text(directory, name)
    if text is None or not text.strip().isdigit():
        return None
    value = int(text)
    return None if value >= UNLIMITED else value


def _text(directory: str, name: str) -> str | None:
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
