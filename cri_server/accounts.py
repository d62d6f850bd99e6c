# SPDX-License-Identifier: Apache-2.0
"""What the kernel keeps account of for a cgroup beyond `usage`: the figures that only metrics tell.

    value            v1                                      v2
    user, system     cpuacct.usage_user, cpuacct.usage_sys   cpu.stat user_usec, system_usec
    periods ...      cpu.stat nr_periods, throttled_time     cpu.stat nr_periods, throttled_usec
    period, quota    cpu.cfs_period_us, cpu.cfs_quota_us     cpu.max
    kernel memory    memory.kmem.usage_in_bytes              memory.stat kernel
    peak             memory.max_usage_in_bytes               memory.peak (Linux 5.19)
    at the limit     memory.failcnt                          memory.events max
    OOM kills        memory.oom_control oom_kill             memory.events oom_kill
    reservation      memory.soft_limit_in_bytes              memory.min
    memory + swap    memory.memsw.limit_in_bytes             memory.swap.max (swap alone)
    tasks            pids.current, pids.max                  pids.current, pids.max
    huge pages       hugetlb.SIZE.usage_in_bytes ...         hugetlb.SIZE.current, .events max
    devices          blkio.throttle.*_recursive              io.stat

All functions block for the time of some reads of kernfs. A file that is not there leaves its value
None, or its list empty.
"""

import functools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from cri_server import usage

NS_PER_US = 1000
_HUGE_PAGES = "/sys/kernel/mm/hugepages"
_OPERATIONS = {"rbytes": "Read", "wbytes": "Write", "dbytes": "Discard"}
_COUNTS = {"rios": "Read", "wios": "Write", "dios": "Discard"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Cpu:
    """CPU time and what the bandwidth limit did, in nanoseconds and counts; the limit in
    microseconds.
    """

    user: int | None = None
    system: int | None = None
    periods: int | None = None
    throttled_periods: int | None = None
    throttled: int | None = None
    bursts: int | None = None
    burst: int | None = None
    period: int | None = None
    quota: int | None = None  # None: no limit


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes and counts of memory."""

    mapped: int | None = None
    active_file: int | None = None
    inactive_file: int | None = None
    dirty: int | None = None
    writeback: int | None = None
    kernel: int | None = None
    peak: int | None = None
    at_limit: int | None = None
    oom_kills: int | None = None
    own_faults: int | None = None  # without those of cgroups below
    own_major_faults: int | None = None
    reservation: int | None = None
    swap_limit: int | None = None  # v1: memory and swap together; None: unlimited


@dataclass(frozen=True, kw_only=True, slots=True)
class HugePages:
    """Huge pages of one size ("2MB"); `peak` is known on v1 alone."""

    size: str
    used: int
    peak: int | None
    at_limit: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """What went to and from a block device: by operation ("Read", "Write", ...)."""

    major: int
    minor: int
    bytes: Mapping[str, int]
    operations: Mapping[str, int]

    @property
    def name(self) -> str:
        return device_name(self.major, self.minor)


@dataclass(frozen=True, kw_only=True, slots=True)
class Account:
    """All of it."""

    cpu: Cpu
    memory: Memory
    tasks: int | None
    most_tasks: int | None  # None: unlimited
    huge_pages: tuple[HugePages, ...]
    devices: tuple[Device, ...]


def read(directories: Mapping[str, str], used: usage.Usage) -> Account:
    """Read what `used`, of the same cgroup and moment, does not have yet."""
    of_v2 = directories.get("")
    pids = of_v2 or directories.get("pids", "")
    return Account(
        cpu=_cpu_v1(directories) if of_v2 is None else _cpu_v2(of_v2, used.cpu_stat),
        memory=_memory_v1(directories.get("memory", ""), used.memory_stat)
        if of_v2 is None
        else _memory_v2(of_v2, used.memory_stat),
        tasks=usage.number(pids, "pids.current"),
        most_tasks=usage.number(pids, "pids.max"),
        huge_pages=tuple(_huge_pages(directories)),
        devices=tuple(_devices(directories)),
    )


# -- cpu ------------------------------------------------------------------------------------------


def _cpu_v1(directories: Mapping[str, str]) -> Cpu:
    cpu, time = directories.get("cpu", ""), directories.get("cpuacct", "")
    stat = usage.fields(cpu, "cpu.stat") or {}
    return Cpu(
        user=usage.number(time, "cpuacct.usage_user"),
        system=usage.number(time, "cpuacct.usage_sys"),
        periods=stat.get("nr_periods"),
        throttled_periods=stat.get("nr_throttled"),
        throttled=stat.get("throttled_time"),
        bursts=stat.get("nr_bursts"),
        burst=stat.get("burst_time"),
        period=usage.number(cpu, "cpu.cfs_period_us"),
        quota=usage.number(cpu, "cpu.cfs_quota_us"),
    )


def _cpu_v2(directory: str, stat: Mapping[str, int]) -> Cpu:
    quota, _, period = (usage.text(directory, "cpu.max") or "").partition(" ")
    return Cpu(
        user=_ns(stat.get("user_usec")),
        system=_ns(stat.get("system_usec")),
        periods=stat.get("nr_periods"),
        throttled_periods=stat.get("nr_throttled"),
        throttled=_ns(stat.get("throttled_usec")),
        bursts=stat.get("nr_bursts"),
        burst=_ns(stat.get("burst_usec")),
        period=_int(period),
        quota=_int(quota),
    )


def _ns(microseconds: int | None) -> int | None:
    return None if microseconds is None else microseconds * NS_PER_US


def _int(word: str) -> int | None:
    return int(word) if word.strip().isdigit() else None


# -- memory ---------------------------------------------------------------------------------------


def _memory_v1(directory: str, stat: Mapping[str, int]) -> Memory:
    return Memory(
        mapped=stat.get("total_mapped_file"),
        active_file=stat.get("total_active_file"),
        inactive_file=stat.get("total_inactive_file"),
        dirty=stat.get("total_dirty"),
        writeback=stat.get("total_writeback"),
        kernel=usage.number(directory, "memory.kmem.usage_in_bytes"),
        peak=usage.number(directory, "memory.max_usage_in_bytes"),
        at_limit=usage.number(directory, "memory.failcnt"),
        oom_kills=(usage.fields(directory, "memory.oom_control") or {}).get("oom_kill"),
        own_faults=stat.get("pgfault"),
        own_major_faults=stat.get("pgmajfault"),
        reservation=usage.number(directory, "memory.soft_limit_in_bytes"),
        swap_limit=usage.number(directory, "memory.memsw.limit_in_bytes"),
    )


def _memory_v2(directory: str, stat: Mapping[str, int]) -> Memory:
    events = usage.fields(directory, "memory.events") or {}
    return Memory(
        mapped=stat.get("file_mapped"),
        active_file=stat.get("active_file"),
        inactive_file=stat.get("inactive_file"),
        dirty=stat.get("file_dirty"),
        writeback=stat.get("file_writeback"),
        kernel=stat.get("kernel"),
        peak=usage.number(directory, "memory.peak"),
        at_limit=events.get("max"),
        oom_kills=events.get("oom_kill"),
        own_faults=stat.get("pgfault"),  # v2 does not tell them apart, and neither does cAdvisor
        own_major_faults=stat.get("pgmajfault"),
        reservation=usage.number(directory, "memory.min"),
        swap_limit=usage.number(directory, "memory.swap.max"),
    )


# -- huge pages -----------------------------------------------------------------------------------


def _huge_pages(directories: Mapping[str, str]) -> Iterator[HugePages]:
    one = _huge_pages_v2 if "" in directories else _huge_pages_v1
    directory = directories.get("", directories.get("hugetlb", ""))
    for size in huge_page_sizes() if directory else ():
        found = one(directory, size)
        if found is not None:
            yield found


def _huge_pages_v1(directory: str, size: str) -> HugePages | None:
    used = _huge(directory, size, "usage_in_bytes")
    if used is None:
        return None
    peak, at_limit = (_huge(directory, size, name) for name in ("max_usage_in_bytes", "failcnt"))
    return HugePages(size=size, used=used, peak=peak, at_limit=at_limit)


def _huge_pages_v2(directory: str, size: str) -> HugePages | None:
    used = _huge(directory, size, "current")
    if used is None:
        return None
    events = usage.fields(directory, f"hugetlb.{size}.events") or {}
    return HugePages(size=size, used=used, peak=None, at_limit=events.get("max"))


def _huge(directory: str, size: str, name: str) -> int | None:
    """Return a figure with the pages that are reserved and not touched yet, as cAdvisor does: they
    are as lost to others. Kernels before 5.7 only count those in use.
    """
    reserved = usage.number(directory, f"hugetlb.{size}.rsvd.{name}")
    return usage.number(directory, f"hugetlb.{size}.{name}") if reserved is None else reserved


@functools.cache
def huge_page_sizes() -> tuple[str, ...]:
    """Return the sizes of the host, as cgroup files call them: "2MB", "1GB"."""
    try:
        found = os.listdir(_HUGE_PAGES)
    except OSError:  # a kernel without huge pages
        return ()
    return tuple(_size(int(n.removeprefix("hugepages-").removesuffix("kB"))) for n in sorted(found))


def _size(kib: int) -> str:
    if kib >= 1 << 20:
        return f"{kib >> 20}GB"
    return f"{kib >> 10}MB" if kib >= 1 << 10 else f"{kib}KB"


# -- block devices --------------------------------------------------------------------------------


def _devices(directories: Mapping[str, str]) -> Iterator[Device]:
    found = _devices_v2(directories[""]) if "" in directories else _devices_v1(directories)
    for (major, minor), (sizes, counts) in found.items():
        yield Device(major=major, minor=minor, bytes=sizes, operations=counts)


_Found = dict[tuple[int, int], tuple[dict[str, int], dict[str, int]]]


def _devices_v1(directories: Mapping[str, str]) -> _Found:
    """Parse lines of "MAJOR:MINOR OPERATION VALUE"; the last one is the total of all devices."""
    found: _Found = {}
    directory = directories.get("blkio", "")
    for place, name in enumerate(("io_service_bytes", "io_serviced")):
        content = usage.text(directory, f"blkio.throttle.{name}_recursive") or ""
        for words in map(str.split, content.splitlines()):
            if len(words) == 3:
                found.setdefault(_numbers(words[0]), ({}, {}))[place][words[1]] = int(words[2])
    return found


def _devices_v2(directory: str) -> _Found:
    """Parse lines of "MAJOR:MINOR rbytes=N wbytes=N rios=N ..."; a device may have no figures."""
    found: _Found = {}
    for words in map(str.split, (usage.text(directory, "io.stat") or "").splitlines()):
        pairs = dict(word.split("=", 1) for word in words[1:] if "=" in word)
        sizes = {op: int(pairs[key]) for key, op in _OPERATIONS.items() if key in pairs}
        counts = {op: int(pairs[key]) for key, op in _COUNTS.items() if key in pairs}
        if sizes or counts:
            found[_numbers(words[0])] = (sizes, counts)
    return found


def _numbers(device: str) -> tuple[int, int]:
    major, _, minor = device.partition(":")
    return int(major), int(minor)


@functools.lru_cache(maxsize=1024)
def device_name(major: int, minor: int) -> str:
    """Return "/dev/vda" for a device's numbers; "MAJOR:MINOR" for one without a name."""
    try:
        return "/dev/" + os.path.basename(os.readlink(f"/sys/dev/block/{major}:{minor}"))
    except OSError:
        return f"{major}:{minor}"
