# SPDX-License-Identifier: Apache-2.0
"""The metrics of containers and pods: names, help, labels, and where each value comes from.

Names, groups and extra labels are cAdvisor's, so that dashboards and alerts go on working
(cAdvisor, docs/storage/prometheus.md); which of them a CRI runtime serves is as in CRI-O and
containerd. A value that is not known gives no metric, and not a zero.

The tables name values by where they are in a `Sample`; tests/unit/test_metrics.py looks all of them
up. A metric of CRI is a whole number (UInt64Value), and a kubelet passes it on as it is: so what is
called seconds is in whole seconds, rounded down, as in CRI-O and containerd.
"""

import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from cri_server import accounts, config, processes, state, trees, usage
from cri_server.pb import api_pb2 as api

BASE = ("id", "name", "image", "namespace", "pod", "container")
COUNTER, GAUGE = api.MetricType.COUNTER, api.MetricType.GAUGE
NS = 1_000_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Disk:
    """The file system that writable layers are on."""

    device: str
    bytes: int
    inodes: int
    inodes_free: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """All that was read of a container at one moment; `now` in nanoseconds."""

    now: int
    container: state.Container
    resources: api.LinuxContainerResources
    used: usage.Usage
    account: accounts.Account
    layer: trees.Usage
    disk: Disk
    processes: processes.Processes | None  # None: not asked for, or not to be told


Value = tuple[tuple[str, ...], int | None]  # values of the extra labels, and the figure
Values = Callable[[Sample], Iterable[Value]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """One metric of containers. `labels` come after those of BASE."""

    group: config.MetricGroup | None  # None: always there
    name: str
    help: str
    type: "api.MetricType.ValueType"
    values: Values
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkMetric:
    """One metric of a pod's interfaces, of a field of Counters; its extra label is `interface`."""

    name: str
    help: str
    field: str


Row = tuple[str, str, Values]


def _value(path: str) -> Values:
    """Give the figure at this place of a sample."""
    read = operator.attrgetter(path)
    return lambda s: (((), read(s)),)


def _at_least_zero(path: str, *, where: str) -> Values:
    """Give 0 for what has no limit, and nothing where the controller itself is missing."""
    read, known = operator.attrgetter(path), operator.attrgetter(where)
    return lambda s: (((), None if known(s) is None else read(s) or 0),)


def _seconds(path: str, *labels: str) -> Values:
    """Give nanoseconds as whole seconds."""
    read = operator.attrgetter(path)

    def values(s: Sample) -> Iterator[Value]:
        found = read(s)
        yield labels, None if found is None else found // NS

    return values


def _make(
    group: config.MetricGroup,
    kind: "api.MetricType.ValueType",
    *rows: Row,
    labels: tuple[str, ...] = (),
) -> tuple[Metric, ...]:
    return tuple(
        Metric(
            group=group,
            name=f"container_{name}",
            help=text,
            type=kind,
            values=values,
            labels=labels,
        )
        for name, text, values in rows
    )


# -- cpu, pressure --------------------------------------------------------------------------------

_CPU_USAGE = ("cpu_usage_seconds_total", "CPU time used", _seconds("used.cpu", "total"))
_CPU = (
    *_make("cpu", COUNTER, _CPU_USAGE, labels=("cpu",)),
    *_make(
        "cpu",
        COUNTER,
        ("cpu_user_seconds_total", "CPU time in user mode", _seconds("account.cpu.user")),
        ("cpu_system_seconds_total", "CPU time in kernel mode", _seconds("account.cpu.system")),
        ("cpu_cfs_periods_total", "Periods with a CPU limit", _value("account.cpu.periods")),
        (
            "cpu_cfs_throttled_periods_total",
            "Periods in which the CPU limit was reached",
            _value("account.cpu.throttled_periods"),
        ),
        ("cpu_cfs_throttled_seconds_total", "Time throttled", _seconds("account.cpu.throttled")),
        ("cpu_cfs_burst_periods_total", "Periods with a burst", _value("account.cpu.bursts")),
        ("cpu_cfs_burst_seconds_total", "CPU time in bursts", _seconds("account.cpu.burst")),
    ),
)


def _pressure(resource: str, kind: str) -> Values:
    def values(s: Sample) -> Iterator[Value]:
        lines = (s.used.pressure or {}).get(resource)
        line: usage.Pressure | None = getattr(lines, kind, None)
        yield (), None if line is None else line.total // NS

    return values


_PRESSURE = _make(
    "pressure",
    COUNTER,
    *(
        (
            f"pressure_{resource}_{word}_seconds_total",
            f"Time in which {who} waited for {resource}",
            _pressure(resource, kind),
        )
        for resource in ("cpu", "memory", "io")
        for word, kind, who in (("waiting", "some", "some tasks"), ("stalled", "full", "all tasks"))
    ),
)

# -- memory, OOM, huge pages ----------------------------------------------------------------------


def _stat(name: str) -> Values:
    """Give a value of memory.stat, of the whole tree where v1 tells both."""

    def values(s: Sample) -> Iterator[Value]:
        found = s.used.memory_stat
        yield (), found.get(f"total_{name}", found.get(name))

    return values


def _failures(s: Sample) -> Iterator[Value]:
    yield ("pgfault", "container"), s.account.memory.own_faults
    yield ("pgfault", "hierarchy"), s.used.faults
    yield ("pgmajfault", "container"), s.account.memory.own_major_faults
    yield ("pgmajfault", "hierarchy"), s.used.major_faults


_MEMORY = (
    *_make(
        "memory",
        GAUGE,
        ("memory_usage_bytes", "Memory in use, caches included", _value("used.memory")),
        ("memory_working_set_bytes", "Memory in use and needed", _value("used.working_set")),
        ("memory_rss", "Anonymous memory in bytes", _value("used.rss")),
        ("memory_cache", "Page cache in bytes", _value("used.cache")),
        ("memory_swap", "Swapped out memory in bytes", _value("used.swap")),
        ("memory_mapped_file", "Mapped page cache in bytes", _value("account.memory.mapped")),
        ("memory_kernel_usage", "Kernel memory in bytes", _value("account.memory.kernel")),
        ("memory_max_usage_bytes", "The most memory ever in use", _value("account.memory.peak")),
        (
            "memory_total_active_file_bytes",
            "Page cache used lately",
            _value("account.memory.active_file"),
        ),
        (
            "memory_total_inactive_file_bytes",
            "Page cache not used lately",
            _value("account.memory.inactive_file"),
        ),
        ("memory_file_dirty_bytes", "Page cache to be written", _value("account.memory.dirty")),
        (
            "memory_file_writeback_bytes",
            "Page cache being written",
            _value("account.memory.writeback"),
        ),
    ),
    *_make(
        "memory",
        COUNTER,
        ("memory_failcnt", "How often the limit was reached", _value("account.memory.at_limit")),
        ("memory_pgscan_total", "Pages scanned to reclaim memory", _stat("pgscan")),
        ("memory_pgsteal_total", "Pages reclaimed", _stat("pgsteal")),
        (
            "memory_workingset_refault_anon_total",
            "Anonymous pages read back after they were evicted",
            _stat("workingset_refault_anon"),
        ),
        (
            "memory_workingset_refault_file_total",
            "File pages read back after they were evicted",
            _stat("workingset_refault_file"),
        ),
    ),
    *_make(
        "memory",
        COUNTER,
        ("memory_failures_total", "Page faults", _failures),
        labels=("failure_type", "scope"),
    ),
)

_OOM = _make(
    "oom",
    COUNTER,
    ("oom_events_total", "Processes killed for want of memory", _value("account.memory.oom_kills")),
)


def _huge(field: str) -> Values:
    read = operator.attrgetter(field)
    return lambda s: [((h.size,), read(h)) for h in s.account.huge_pages]


_HUGETLB = (
    *_make(
        "hugetlb",
        GAUGE,
        ("hugetlb_usage_bytes", "Huge pages in use", _huge("used")),
        ("hugetlb_max_usage_bytes", "The most huge pages in use", _huge("peak")),
        labels=("pagesize",),
    ),
    *_make(
        "hugetlb",
        COUNTER,
        ("hugetlb_failcnt", "How often the limit was reached", _huge("at_limit")),
        labels=("pagesize",),
    ),
)

# -- disk -----------------------------------------------------------------------------------------


def _on_disk(path: str) -> Values:
    read = operator.attrgetter(path)
    return lambda s: (((s.disk.device,), read(s)),)


_DISK = _make(
    "disk",
    GAUGE,
    ("fs_usage_bytes", "Size of the writable layer", _on_disk("layer.bytes")),
    ("fs_limit_bytes", "Size of the file system", _on_disk("disk.bytes")),
    ("fs_inodes_total", "Inodes of the file system", _on_disk("disk.inodes")),
    ("fs_inodes_free", "Free inodes of the file system", _on_disk("disk.inodes_free")),
    labels=("device",),
)


def _device(field: str, operation: str) -> Values:
    read = operator.attrgetter(field)
    return lambda s: [((d.name,), read(d).get(operation)) for d in s.account.devices]


def _block_io(s: Sample) -> Iterator[Value]:
    for device in s.account.devices:
        numbers = (device.name, str(device.major), str(device.minor))
        yield from (((*numbers, op), value) for op, value in device.bytes.items())


_DISK_IO = (
    *_make(
        "diskIO",
        COUNTER,
        ("fs_reads_bytes_total", "Bytes read from the device", _device("bytes", "Read")),
        ("fs_writes_bytes_total", "Bytes written to the device", _device("bytes", "Write")),
        ("fs_reads_total", "Reads from the device", _device("operations", "Read")),
        ("fs_writes_total", "Writes to the device", _device("operations", "Write")),
        labels=("device",),
    ),
    *_make(
        "diskIO",
        COUNTER,
        ("blkio_device_usage_total", "Bytes by device and operation", _block_io),
        labels=("device", "major", "minor", "operation"),
    ),
)

# -- processes, limits, times ---------------------------------------------------------------------


def _look(field: str) -> Values:
    read = operator.attrgetter(field)
    return lambda s: (((), None if s.processes is None else read(s.processes)),)


def _ulimits(s: Sample) -> Iterator[Value]:
    yield ("max_open_files",), s.processes.open_files_limit if s.processes else None


_PROCESS = (
    *_make(
        "process",
        GAUGE,
        ("processes", "Processes in the container", _look("number")),
        ("threads", "Threads in the container", _value("account.tasks")),
        (
            "threads_max",
            "The most threads that are allowed; 0 means any number",
            _at_least_zero("account.most_tasks", where="account.tasks"),
        ),
        ("file_descriptors", "Open file descriptors", _look("descriptors")),
        ("sockets", "Open sockets", _look("sockets")),
    ),
    *_make(
        "process",
        GAUGE,
        ("ulimits_soft", "Soft limits of the first process, where it has them", _ulimits),
        labels=("ulimit",),
    ),
)


def _shares(s: Sample) -> Iterator[Value]:
    yield (), s.resources.cpu_shares or None


_SPEC = _make(
    "spec",
    GAUGE,
    ("spec_cpu_period", "Period of the CPU limit in microseconds", _value("account.cpu.period")),
    ("spec_cpu_quota", "CPU limit in microseconds per period", _value("account.cpu.quota")),
    ("spec_cpu_shares", "CPU shares", _shares),
    (
        "spec_memory_limit_bytes",
        "Memory limit; 0 means none",
        _at_least_zero("used.limit", where="used.memory"),
    ),
    (
        "spec_memory_reservation_limit_bytes",
        "Memory that is kept for the container; 0 means none",
        _at_least_zero("account.memory.reservation", where="used.memory"),
    ),
    (
        "spec_memory_swap_limit_bytes",
        "Limit of swap, on cgroup v1 of memory and swap together; 0 means none",
        _at_least_zero("account.memory.swap_limit", where="used.swap"),
    ),
    ("start_time_seconds", "Start, in seconds since the epoch", _seconds("container.started_at")),
)

_LAST_SEEN = Metric(
    group=None,
    name="container_last_seen",
    help="When the container was looked at, in seconds since the epoch",
    type=GAUGE,
    values=_seconds("now"),
)

CONTAINERS = (
    _LAST_SEEN,
    *_CPU,
    *_PRESSURE,
    *_MEMORY,
    *_OOM,
    *_HUGETLB,
    *_DISK,
    *_DISK_IO,
    *_PROCESS,
    *_SPEC,
)

NETWORK = tuple(
    NetworkMetric(name=f"container_network_{name}_total", help=text, field=field)
    for name, text, field in (
        ("receive_bytes", "Bytes received", "rx_bytes"),
        ("receive_packets", "Packets received", "rx_packets"),
        ("receive_packets_dropped", "Received packets dropped", "rx_dropped"),
        ("receive_errors", "Errors while receiving", "rx_errors"),
        ("transmit_bytes", "Bytes sent", "tx_bytes"),
        ("transmit_packets", "Packets sent", "tx_packets"),
        ("transmit_packets_dropped", "Packets dropped before sending", "tx_dropped"),
        ("transmit_errors", "Errors while sending", "tx_errors"),
    )
)
