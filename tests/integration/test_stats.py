# SPDX-License-Identifier: Apache-2.0
"""Stats and metrics of real containers, field by field against the kernel's own files.

In every cgroup mode: what a test compares with is read from where /proc/PID/cgroup says that the
container is. A figure that moves is read before and after, and what we are told must lie between.
"""

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from cri_server import usage
from cri_server.pb import api_pb2 as api
from tests.fakes.kubelet import Kubelet, Pod, refusal
from tests.integration.conftest import SLEEP
from tests.lab import cgroups, waiting

pytestmark = [
    pytest.mark.needs("root", "netns", "overlay", "cni", "runc", "docker-registry"),
    pytest.mark.ours,
]
MIB = 1 << 20
TREMOR = (os.cpu_count() or 1) * 64 * 4096 + 65536  # what CPUs may have charged in advance
V2 = cgroups.is_v2()
BUSY = "dd if=/dev/zero of=/file bs=1M count=8 conv=fsync 2>/dev/null; cat /file > /dev/null; "


@dataclass(frozen=True, kw_only=True, slots=True)
class Lab:
    """A container with limits, in a pod, that has read and written and is quiet now."""

    kubelet: Kubelet
    pod: Pod
    id: str
    pid: int

    def file(self, of_v1: str, of_v2: str) -> str:
        """Read "controller/name" on v1 and hybrid, or "name" on v2."""
        groups = cgroups.of_process(self.pid)
        if V2:
            return (groups[""] / of_v2).read_text()
        controller, _, name = of_v1.partition("/")
        return (groups[controller] / name).read_text()

    def stat(self, of_v1: str, of_v2: str) -> int:
        """Read one value of memory.stat."""
        lines = self.file("memory/memory.stat", "memory.stat").splitlines()
        return int(dict(line.split() for line in lines)[of_v2 if V2 else of_v1])

    def stats(self) -> api.ContainerStats:
        request = api.ContainerStatsRequest(container_id=self.id)
        return self.kubelet.runtime.ContainerStats(request).stats

    def metrics(self) -> list[api.Metric]:
        return metrics_of(self.kubelet, self.pod, self.id)

    def metric(self, name: str) -> int | None:
        """Return the value of a metric without extra labels, None when it is not told."""
        found = [m.value.value for m in self.metrics() if m.name == f"container_{name}"]
        return found[0] if found else None


def metrics_of(kubelet: Kubelet, pod: Pod, container: str = "") -> list[api.Metric]:
    """Return the metrics of a container, or the pod's own."""
    answer = kubelet.runtime.ListPodSandboxMetrics(api.ListPodSandboxMetricsRequest())
    (mine,) = (p for p in answer.pod_metrics if p.pod_sandbox_id == pod.id)
    if not container:
        return list(mine.metrics)
    return [m for c in mine.container_metrics if c.container_id == container for m in c.metrics]


def pid_of(kubelet: Kubelet, container: str) -> int:
    return int(json.loads(kubelet.status_response(container, verbose=True).info["info"])["pid"])


def limited(**resources: Any) -> api.LinuxContainerConfig:
    return api.LinuxContainerConfig(resources=api.LinuxContainerResources(**resources))


@pytest.fixture
def lab(kubelet: Kubelet, pod: Pod, pulled: str) -> Lab:
    linux = limited(memory_limit_in_bytes=64 * MIB, cpu_period=100_000, cpu_quota=50_000)
    linux.resources.cpu_shares = 512
    command = ("sh", "-c", BUSY + "sleep 1000 & sleep 1000 & echo quiet; wait")
    container = kubelet.run(pod, pulled, command, linux=linux)
    kubelet.wait_log(container, "quiet")
    return Lab(kubelet=kubelet, pod=pod, id=container, pid=pid_of(kubelet, container))


# -- ContainerStats against the files --------------------------------------------------------------

Read = Callable[[Lab], int]


def cpu(lab: Lab) -> int:
    if V2:
        lines = lab.file("", "cpu.stat").splitlines()
        return int(dict(line.split() for line in lines)["usage_usec"]) * 1000
    return int(lab.file("cpuacct/cpuacct.usage", ""))


def memory(lab: Lab) -> int:
    return int(lab.file("memory/memory.usage_in_bytes", "memory.current"))


def working_set(lab: Lab) -> int:
    return memory(lab) - lab.stat("total_inactive_file", "inactive_file")


FIELDS: dict[str, tuple[Callable[[api.ContainerStats], api.UInt64Value], Read]] = {
    "cpu": (lambda s: s.cpu.usage_core_nano_seconds, cpu),
    "usage": (lambda s: s.memory.usage_bytes, memory),
    "working set": (lambda s: s.memory.working_set_bytes, working_set),
    "available": (lambda s: s.memory.available_bytes, lambda lab: 64 * MIB - working_set(lab)),
    "rss": (lambda s: s.memory.rss_bytes, lambda lab: lab.stat("total_rss", "anon")),
    "faults": (lambda s: s.memory.page_faults, lambda lab: lab.stat("total_pgfault", "pgfault")),
    "major faults": (
        lambda s: s.memory.major_page_faults,
        lambda lab: lab.stat("total_pgmajfault", "pgmajfault"),
    ),
}


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_of_the_stats_is_what_the_kernel_says(lab: Lab, field: str) -> None:
    of_stats, of_kernel = FIELDS[field]

    before = of_kernel(lab)
    told = of_stats(lab.stats()).value
    after = of_kernel(lab)

    slack = 0 if field in ("cpu", "faults", "major faults") else TREMOR
    assert min(before, after) - slack <= told <= max(before, after) + slack
    assert told > 0 or field == "major faults"


def test_swap_is_told_where_the_kernel_counts_it(lab: Lab) -> None:
    try:
        lab.file("memory/memory.memsw.usage_in_bytes", "memory.swap.current")
    except FileNotFoundError:
        assert not lab.stats().HasField("swap")
        return
    assert lab.stats().swap.swap_usage_bytes.value <= TREMOR


def test_pressure_is_told_where_the_kernel_counts_it(lab: Lab) -> None:
    folder = cgroups.of_process(lab.pid).get("")
    stats = lab.stats()
    if folder is None or not (folder / "cpu.pressure").exists() or folder == Path("/"):
        assert not stats.cpu.HasField("psi")
        return
    for name, told in (("cpu", stats.cpu), ("memory", stats.memory), ("io", stats.io)):
        lines = (folder / f"{name}.pressure").read_text().splitlines()
        totals = {w[0]: int(w[-1].split("=")[1]) * 1000 for w in map(str.split, lines)}
        assert told.psi.Some.Total <= totals["some"]
        assert told.psi.Some.Total >= totals["some"] * 0.5
        assert told.psi.Full.Total <= totals["full"]
    assert stats.cpu.psi.Some.Total > 0, "it was throttled while it was busy"


@pytest.mark.needs("cgroup2")
def test_the_v2_reader_reads_a_bare_v2_hierarchy_too(lab: Lab) -> None:
    folder = cgroups.of_process(lab.pid)[""]
    found = usage.read({"": os.fspath(folder)})
    assert found is not None
    assert found.cpu is not None
    assert abs(found.cpu - cpu(lab)) < 50_000_000
    if not (folder / "memory.current").exists():
        assert (found.memory, found.limit, found.swap) == (None, None, None)


def test_one_that_has_not_started_has_none(kubelet: Kubelet, pod: Pod, pulled: str) -> None:
    created = kubelet.create(pod, kubelet.container_config(pulled, SLEEP))
    request = api.ContainerStatsRequest(container_id=created)
    code, text = refusal(lambda: kubelet.runtime.ContainerStats(request))
    assert (code, "no stats yet" in text) == (grpc.StatusCode.FAILED_PRECONDITION, True)
    listed = kubelet.runtime.ListContainerStats(api.ListContainerStatsRequest()).stats
    assert [each.attributes.id for each in listed] == [created]


def test_the_rate_of_cpu_use_needs_two_looks(kubelet: Kubelet, pod: Pod, pulled: str) -> None:
    container = kubelet.run(pod, pulled, ("sh", "-c", "while :; do :; done"))

    def look() -> api.CpuUsage:
        request = api.ContainerStatsRequest(container_id=container)
        return kubelet.runtime.ContainerStats(request).stats.cpu

    assert not look().HasField("usage_nano_cores")
    rate = waiting.until(lambda: look().usage_nano_cores.value, "a rate")
    assert 10_000_000 < rate < 1_100_000_000


# -- pods ------------------------------------------------------------------------------------------


def test_a_pod_has_the_sum_of_its_containers(lab: Lab, pulled: str) -> None:
    second = lab.kubelet.run(lab.pod, pulled, SLEEP, name="second")
    request = api.PodSandboxStatsRequest(pod_sandbox_id=lab.pod.id)
    linux = lab.kubelet.runtime.PodSandboxStats(request).stats.linux

    assert {c.attributes.id for c in linux.containers} == {lab.id, second}
    assert linux.process.process_count.value == 4, "a shell and three sleeps"
    total = sum(c.memory.usage_bytes.value for c in linux.containers)
    assert abs(linux.memory.usage_bytes.value - total) < 8 * MIB
    used = sum(c.cpu.usage_core_nano_seconds.value for c in linux.containers)
    assert linux.cpu.usage_core_nano_seconds.value >= used


@pytest.fixture
def wired(lab: Lab) -> Lab:
    """The pod with more interfaces than eth0."""
    subprocess.run(
        ["ip", "-n", lab.pod.id, "link", "add", "extra0", "type", "veth", "peer", "name", "extra1"],
        check=True,
    )
    return lab


def traffic(lab: Lab) -> Mapping[str, list[int]]:
    """Return the columns of /proc/net/dev by interface, as the container sees them."""
    lines = Path(f"/proc/{lab.pid}/net/dev").read_text().splitlines()[2:]
    return {n.strip(): [int(w) for w in r.split()] for n, _, r in (x.partition(":") for x in lines)}


def test_every_interface_has_its_own_traffic(wired: Lab) -> None:
    def same() -> bool:
        before = traffic(wired)
        request = api.PodSandboxStatsRequest(pod_sandbox_id=wired.pod.id)
        network = wired.kubelet.runtime.PodSandboxStats(request).stats.linux.network
        assert network.default_interface.name == "eth0"
        assert {i.name for i in network.interfaces} == {"extra0", "extra1"}
        eth0, columns = network.default_interface, before["eth0"]
        told = [eth0.rx_bytes, eth0.rx_errors, eth0.tx_bytes, eth0.tx_errors]
        return [v.value for v in told] == [columns[n] for n in (0, 2, 8, 10)]

    waiting.until(same, "the counters of eth0 between two packets")


def test_a_pod_without_an_interface_has_no_network_to_tell_of(lab: Lab) -> None:
    request = api.PodSandboxStatsRequest(pod_sandbox_id=lab.pod.id)
    with without_eth0(lab):
        stats = lab.kubelet.runtime.PodSandboxStats(request).stats
    assert stats.linux.HasField("cpu")
    assert not stats.linux.HasField("network")


@contextlib.contextmanager
def without_eth0(lab: Lab) -> Iterator[None]:
    """Take the pod's interface away for the block. Another with its address is there afterwards:
    by that the bridge plugin knows which rules to remove.
    """
    address = lab.kubelet.pod_status(lab.pod.id).status.network.ip
    inside = ["ip", "-n", lab.pod.id]
    subprocess.run([*inside, "link", "del", "eth0"], check=True)
    yield
    subprocess.run([*inside, "link", "add", "eth0", "type", "veth"], check=True)
    subprocess.run([*inside, "addr", "add", f"{address}/16", "dev", "eth0"], check=True)


NETWORK = (
    ("receive_bytes", 0),
    ("receive_packets", 1),
    ("receive_errors", 2),
    ("receive_packets_dropped", 3),
    ("transmit_bytes", 8),
    ("transmit_packets", 9),
    ("transmit_errors", 10),
    ("transmit_packets_dropped", 11),
)


def test_every_interface_has_its_own_metrics(wired: Lab) -> None:
    def same() -> bool:
        before = traffic(wired)
        told = {
            (m.label_values[-1], m.name): m.value.value
            for m in metrics_of(wired.kubelet, wired.pod)
        }
        return told == {
            (interface, f"container_network_{name}_total"): before[interface][column]
            for interface in ("eth0", "extra0", "extra1")
            for name, column in NETWORK
        }

    waiting.until(same, "the metrics of both interfaces between two packets")


# -- metrics ---------------------------------------------------------------------------------------


def descriptors(kubelet: Kubelet) -> Mapping[str, api.MetricDescriptor]:
    answer = kubelet.runtime.ListMetricDescriptors(api.ListMetricDescriptorsRequest())
    assert len({d.name for d in answer.descriptors}) == len(answer.descriptors)
    return {d.name: d for d in answer.descriptors}


def test_a_kubelet_can_register_what_it_is_told(lab: Lab) -> None:
    known = descriptors(lab.kubelet)
    told = [*lab.metrics(), *metrics_of(lab.kubelet, lab.pod)]

    assert all(len(known[m.name].label_keys) == len(m.label_values) for m in told)
    series = [(m.name, *m.label_values) for m in told]
    assert len(set(series)) == len(series), "Prometheus refuses a series that comes twice"
    assert all(abs(m.timestamp - time.time_ns()) < 60_000_000_000 for m in told)
    assert {"container_cpu_usage_seconds_total", "container_memory_working_set_bytes"} <= {
        m.name for m in told
    }


def test_labels_say_whose_a_metric_is(lab: Lab) -> None:
    m = lab.pod.config.metadata
    (cpu_used,) = (x for x in lab.metrics() if x.name == "container_cpu_usage_seconds_total")
    keys = descriptors(lab.kubelet)[cpu_used.name].label_keys
    labels = dict(zip(keys, cpu_used.label_values, strict=True))
    assert labels.pop("image").endswith("busybox:latest")
    assert labels == {
        "id": lab.id,
        "name": f"k8s_main_{m.name}_{m.namespace}_{m.uid}_0",
        "namespace": m.namespace,
        "pod": m.name,
        "container": "main",
        "cpu": "total",
    }
    network = metrics_of(lab.kubelet, lab.pod)[0]
    assert network.label_values[3:] == [m.namespace, m.name, "POD", "eth0"]


def limit_of_open_files(lab: Lab) -> int:
    lines = Path(f"/proc/{lab.pid}/limits").read_text().splitlines()
    (line,) = (x for x in lines if x.startswith("Max open files"))
    return int(line.split()[3])


def descriptors_of(lab: Lab) -> int:
    pids = lab.file("pids/cgroup.procs", "cgroup.procs").split()
    return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids)


FIGURES: dict[str, Read] = {
    "spec_memory_limit_bytes": lambda lab: 64 * MIB,
    "spec_cpu_period": lambda lab: 100_000,
    "spec_cpu_quota": lambda lab: 50_000,
    "spec_cpu_shares": lambda lab: 512,
    "processes": lambda lab: 3,
    "threads": lambda lab: int(lab.file("pids/pids.current", "pids.current")),
    "file_descriptors": descriptors_of,
    "sockets": lambda lab: 0,
    "ulimits_soft": limit_of_open_files,
    "memory_usage_bytes": memory,
    "memory_working_set_bytes": working_set,
    "memory_rss": lambda lab: lab.stat("total_rss", "anon"),
    "memory_cache": lambda lab: lab.stat("total_cache", "file"),
    "memory_mapped_file": lambda lab: lab.stat("total_mapped_file", "file_mapped"),
    "memory_total_active_file_bytes": lambda lab: lab.stat("total_active_file", "active_file"),
    "memory_total_inactive_file_bytes": lambda lab: lab.stat(
        "total_inactive_file", "inactive_file"
    ),
    "oom_events_total": lambda lab: 0,
    "fs_limit_bytes": lambda lab: os.statvfs("/tmp").f_blocks * os.statvfs("/tmp").f_frsize,
    "fs_inodes_total": lambda lab: os.statvfs("/tmp").f_files,
}


@pytest.mark.parametrize("name", FIGURES)
def test_a_metric_is_what_the_kernel_says(lab: Lab, name: str) -> None:
    expected, told = FIGURES[name](lab), lab.metric(name)

    assert told is not None
    assert abs(told - expected) <= (TREMOR if name.startswith("memory_") else 0)


def test_times_are_in_seconds(lab: Lab) -> None:
    assert abs((lab.metric("start_time_seconds") or 0) - time.time()) < 60
    assert abs((lab.metric("last_seen") or 0) - time.time()) < 60


def test_reads_and_writes_are_counted_for_each_device(lab: Lab) -> None:
    lines = lab.file("blkio/blkio.throttle.io_service_bytes_recursive", "io.stat").splitlines()
    mark = "wbytes=" if V2 else " Write "  # on v1 there is nothing where no device has a throttle
    written = {
        line.split()[0]: int(line.partition(mark)[2].split()[0]) for line in lines if mark in line
    }

    told = {
        ":".join(m.label_values[-3:-1]): m.value.value
        for m in lab.metrics()
        if m.name == "container_blkio_device_usage_total" and m.label_values[-1] == "Write"
    }
    assert told == written
    if told:
        assert lab.metric("fs_writes_bytes_total") in told.values()


def test_a_busy_container_is_throttled(kubelet: Kubelet, pod: Pod, pulled: str) -> None:
    linux = limited(cpu_period=100_000, cpu_quota=5_000)
    busy = kubelet.run(pod, pulled, ("sh", "-c", "while :; do :; done"), linux=linux)

    def told(name: str) -> int:
        return next(m.value.value for m in metrics_of(kubelet, pod, busy) if m.name.endswith(name))

    waiting.until(lambda: told("cpu_cfs_throttled_periods_total") > 5, "throttled periods")
    throttled = told("cpu_cfs_throttled_periods_total")  # first: both grow
    assert told("cpu_cfs_periods_total") >= throttled
    waiting.until(lambda: told("cpu_cfs_throttled_seconds_total") >= 1, "a second of throttling")


def test_an_oom_kill_of_a_child_is_counted(kubelet: Kubelet, pod: Pod, pulled: str) -> None:
    command = ("sh", "-c", "tail /dev/zero; echo survived; sleep 1000")
    container = kubelet.run(pod, pulled, command, linux=limited(memory_limit_in_bytes=16 * MIB))
    kubelet.wait_log(container, "survived", seconds=30)

    told = {m.name: m.value.value for m in metrics_of(kubelet, pod, container)}
    assert told["container_oom_events_total"] == 1
    assert told.get("container_memory_max_usage_bytes", 16 * MIB) >= 15 * MIB


def test_only_what_runs_has_metrics(kubelet: Kubelet, pod: Pod, pulled: str) -> None:
    kubelet.create(pod, kubelet.container_config(pulled, SLEEP, name="created"))
    ended = kubelet.run(pod, pulled, ("true",), name="ended")
    kubelet.wait_exit(ended)
    running = kubelet.run(pod, pulled, SLEEP, name="running")

    answer = kubelet.runtime.ListPodSandboxMetrics(api.ListPodSandboxMetricsRequest())
    (mine,) = (p for p in answer.pod_metrics if p.pod_sandbox_id == pod.id)
    assert [c.container_id for c in mine.container_metrics] == [running]


def test_groups_are_chosen_by_configuration(
    make_site: Callable[..., Iterator[object]], client_of: Callable[..., Kubelet]
) -> None:
    client = client_of(make_site(metrics={"groups": ["oom"]}))

    assert set(descriptors(client)) == {"container_last_seen", "container_oom_events_total"}
