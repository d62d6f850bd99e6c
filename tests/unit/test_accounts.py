# SPDX-License-Identifier: Apache-2.0
"""Accounts of a cgroup, and the metrics made of them, from files as Linux writes them."""

import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cri_server import accounts, catalogue, processes, trees, usage
from cri_server.pb import api_pb2 as api
from tests.unit import test_state

PRESSURE = (
    "some avg10=0.00 avg60=0.00 avg300=0.00 total={}\nfull avg10=0 avg60=0 avg300=0 total={}\n"
)
V2 = {  # as Linux 6.8 writes them, where they matter
    "cpu.stat": "usage_usec 4000000\nuser_usec 3000000\nsystem_usec 1000000\nnr_periods 9\n"
    "nr_throttled 4\nthrottled_usec 2500000\nnr_bursts 1\nburst_usec 1500000\n",
    "cpu.max": "50000 100000\n",
    "memory.current": "1000\n",
    "memory.stat": "anon 600\nfile 300\nkernel 70\nfile_mapped 50\nfile_dirty 5\nfile_writeback 6\n"
    "inactive_file 100\nactive_file 200\npgfault 7\npgmajfault 1\npgscan 11\npgsteal 12\n"
    "workingset_refault_anon 13\nworkingset_refault_file 14\n",
    "memory.max": "2000\n",
    "memory.min": "128\n",
    "memory.peak": "1900\n",
    "memory.events": "low 0\nhigh 0\nmax 21\noom 3\noom_kill 2\n",
    "memory.swap.current": "10\n",
    "memory.swap.max": "100\n",
    "pids.current": "8\n",
    "pids.max": "max\n",
    "io.stat": "254:0 rbytes=4096 wbytes=8192 rios=1 wios=2 dbytes=0 dios=0\n7:0 \n",
    "hugetlb.2MB.current": "2097152\n",
    "hugetlb.2MB.events": "max 5\n",
    "cpu.pressure": PRESSURE.format(3000000, 1000000),
    "memory.pressure": PRESSURE.format(0, 0),
    "io.pressure": PRESSURE.format(5999999, 0),
}
V1 = {
    "cpuacct.usage": "4000000000\n",
    "cpuacct.usage_user": "3000000000\n",
    "cpuacct.usage_sys": "1000000000\n",
    "cpu.stat": "nr_periods 9\nnr_throttled 4\nthrottled_time 2500000000\nnr_bursts 1\n"
    "burst_time 1500000000\n",
    "cpu.cfs_period_us": "100000\n",
    "cpu.cfs_quota_us": "50000\n",
    "memory.usage_in_bytes": "1000\n",
    "memory.stat": "pgfault 6\npgmajfault 1\ntotal_cache 300\ntotal_rss 600\ntotal_mapped_file 50\n"
    "total_dirty 5\ntotal_writeback 6\ntotal_pgfault 7\ntotal_pgmajfault 1\n"
    "total_inactive_file 100\ntotal_active_file 200\nworkingset_refault_anon 1\n"
    "total_workingset_refault_anon 13\ntotal_workingset_refault_file 14\n",
    "memory.limit_in_bytes": "2000\n",
    "memory.soft_limit_in_bytes": "128\n",
    "memory.kmem.usage_in_bytes": "70\n",
    "memory.max_usage_in_bytes": "1900\n",
    "memory.failcnt": "21\n",
    "memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
    "memory.memsw.usage_in_bytes": "1010\n",
    "memory.memsw.limit_in_bytes": "2100\n",
    "pids.current": "8\n",
    "pids.max": "max\n",
    "blkio.throttle.io_service_bytes_recursive": "254:0 Read 4096\n254:0 Write 8192\n"
    "254:0 Discard 0\nTotal 12288\n",
    "blkio.throttle.io_serviced_recursive": "254:0 Read 1\n254:0 Write 2\nTotal 3\n",
    "hugetlb.2MB.usage_in_bytes": "2097152\n",
    "hugetlb.2MB.max_usage_in_bytes": "4194304\n",
    "hugetlb.2MB.failcnt": "5\n",
}
RESERVED = {  # 4 MiB more than is in use
    "v1": {"hugetlb.2MB.rsvd.usage_in_bytes": "6291456\n"},
    "v2": {"hugetlb.2MB.rsvd.current": "6291456\n"},
}
V1_ONLY = {"container_hugetlb_max_usage_bytes"}
V2_ONLY = {"container_memory_pgscan_total", "container_memory_pgsteal_total"} | {
    m.name for m in catalogue.CONTAINERS if m.group == "pressure"
}


@pytest.fixture(autouse=True)
def one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounts, "huge_page_sizes", lambda: ("2MB",))


def tree(folder: Path, mode: str) -> dict[str, str]:
    for name, text in (V2 if mode == "v2" else V1).items():
        (folder / name).write_text(text)
    names = ("cpu", "cpuacct", "memory", "pids", "blkio", "hugetlb")
    return {"": str(folder)} if mode == "v2" else dict.fromkeys(names, str(folder))


def sample(folder: Path, mode: str) -> catalogue.Sample:
    directories = tree(folder, mode)
    used = usage.read(directories)
    assert used is not None
    container = test_state.container(test_state.pod())
    return catalogue.Sample(
        now=5_900_000_000,
        container=dataclasses.replace(container, started_at=3_500_000_000),
        resources=api.LinuxContainerResources(cpu_shares=512),
        used=used,
        account=accounts.read(directories, used),
        layer=trees.Usage(bytes=17, inodes=2),
        disk=catalogue.Disk(device="/dev/vda", bytes=1000, inodes=100, inodes_free=60),
        processes=processes.Processes(number=3, descriptors=9, sockets=1, open_files_limit=1024),
    )


def told(of: catalogue.Sample) -> dict[tuple[str, ...], int]:
    """Return every figure by name and extra labels, without the prefix that all have."""
    found: dict[tuple[str, ...], int] = {}
    for metric in catalogue.CONTAINERS:
        for labels, value in metric.values(of):
            assert len(labels) == len(metric.labels), metric.name
            if value is not None:
                found[(metric.name.removeprefix("container_"), *labels)] = value
    return found


@pytest.mark.parametrize("mode", ["v1", "v2"])
def test_huge_pages_count_when_they_are_reserved(tmp_path: Path, mode: str) -> None:
    for name, text in RESERVED[mode].items():
        (tmp_path / name).write_text(text)
    assert told(sample(tmp_path, mode))["hugetlb_usage_bytes", "2MB"] == 6 << 20


BOTH = {
    ("last_seen",): 5,
    ("start_time_seconds",): 3,
    ("cpu_usage_seconds_total", "total"): 4,
    ("cpu_user_seconds_total",): 3,
    ("cpu_system_seconds_total",): 1,
    ("cpu_cfs_periods_total",): 9,
    ("cpu_cfs_throttled_periods_total",): 4,
    ("cpu_cfs_throttled_seconds_total",): 2,
    ("cpu_cfs_burst_periods_total",): 1,
    ("cpu_cfs_burst_seconds_total",): 1,
    ("memory_usage_bytes",): 1000,
    ("memory_working_set_bytes",): 900,
    ("memory_rss",): 600,
    ("memory_cache",): 300,
    ("memory_swap",): 10,
    ("memory_mapped_file",): 50,
    ("memory_kernel_usage",): 70,
    ("memory_max_usage_bytes",): 1900,
    ("memory_total_active_file_bytes",): 200,
    ("memory_total_inactive_file_bytes",): 100,
    ("memory_file_dirty_bytes",): 5,
    ("memory_file_writeback_bytes",): 6,
    ("memory_failcnt",): 21,
    ("memory_workingset_refault_anon_total",): 13,
    ("memory_workingset_refault_file_total",): 14,
    ("memory_failures_total", "pgfault", "hierarchy"): 7,
    ("memory_failures_total", "pgmajfault", "container"): 1,
    ("memory_failures_total", "pgmajfault", "hierarchy"): 1,
    ("oom_events_total",): 2,
    ("hugetlb_usage_bytes", "2MB"): 2 << 20,
    ("hugetlb_failcnt", "2MB"): 5,
    ("fs_usage_bytes", "/dev/vda"): 17,
    ("fs_limit_bytes", "/dev/vda"): 1000,
    ("fs_inodes_total", "/dev/vda"): 100,
    ("fs_inodes_free", "/dev/vda"): 60,
    ("fs_reads_bytes_total", "DEV"): 4096,
    ("fs_writes_bytes_total", "DEV"): 8192,
    ("fs_reads_total", "DEV"): 1,
    ("fs_writes_total", "DEV"): 2,
    ("blkio_device_usage_total", "DEV", "254", "0", "Read"): 4096,
    ("blkio_device_usage_total", "DEV", "254", "0", "Write"): 8192,
    ("blkio_device_usage_total", "DEV", "254", "0", "Discard"): 0,
    ("processes",): 3,
    ("threads",): 8,
    ("threads_max",): 0,
    ("file_descriptors",): 9,
    ("sockets",): 1,
    ("ulimits_soft", "max_open_files"): 1024,
    ("spec_cpu_period",): 100000,
    ("spec_cpu_quota",): 50000,
    ("spec_cpu_shares",): 512,
    ("spec_memory_limit_bytes",): 2000,
    ("spec_memory_reservation_limit_bytes",): 128,
}


def test_v2_tells_all_of_the_catalogue(tmp_path: Path) -> None:
    device = accounts.device_name(254, 0)
    both = {tuple(device if w == "DEV" else w for w in k): v for k, v in BOTH.items()}

    assert told(sample(tmp_path, "v2")) == both | {
        ("memory_failures_total", "pgfault", "container"): 7,
        ("memory_pgscan_total",): 11,
        ("memory_pgsteal_total",): 12,
        ("spec_memory_swap_limit_bytes",): 100,
        ("pressure_cpu_waiting_seconds_total",): 3,
        ("pressure_cpu_stalled_seconds_total",): 1,
        ("pressure_memory_waiting_seconds_total",): 0,
        ("pressure_memory_stalled_seconds_total",): 0,
        ("pressure_io_waiting_seconds_total",): 5,
        ("pressure_io_stalled_seconds_total",): 0,
    }


def test_v1_tells_all_but_pressure(tmp_path: Path) -> None:
    device = accounts.device_name(254, 0)
    both = {tuple(device if w == "DEV" else w for w in k): v for k, v in BOTH.items()}

    assert told(sample(tmp_path, "v1")) == both | {
        ("memory_failures_total", "pgfault", "container"): 6,
        ("spec_memory_swap_limit_bytes",): 2100,
        ("hugetlb_max_usage_bytes", "2MB"): 4 << 20,
    }


@pytest.mark.parametrize(("mode", "lacks"), [("v1", V2_ONLY), ("v2", V1_ONLY)])
def test_every_metric_of_the_catalogue_has_a_source(
    tmp_path: Path, mode: str, lacks: set[str]
) -> None:
    names = {f"container_{key[0]}" for key in told(sample(tmp_path, mode))}

    assert {m.name for m in catalogue.CONTAINERS} - names == lacks


def test_what_the_kernel_does_not_tell_is_left_out(tmp_path: Path) -> None:
    whole = sample(tmp_path, "v2")
    for name in V2:
        if name != "cpu.stat":
            (tmp_path / name).unlink()
    directories = {"": str(tmp_path)}
    used = usage.read(directories)
    assert used is not None
    bare = dataclasses.replace(
        whole, used=used, account=accounts.read(directories, used), processes=None
    )

    groups = {m.group for m in catalogue.CONTAINERS for _, v in m.values(bare) if v is not None}
    assert groups == {None, "cpu", "disk", "spec"}
    assert ("spec_memory_limit_bytes",) not in told(bare), "nobody knows whether there is one"


def test_processes_are_counted_with_what_they_have_open(tmp_path: Path) -> None:
    with socket.socket() as one:
        child = subprocess.Popen(
            [sys.executable, "-c", "import sys; print(1, flush=True); sys.stdin.read()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[one.fileno()],
        )
        assert child.stdout is not None
        child.stdout.readline()
        (tmp_path / "part").mkdir()
        (tmp_path / "part" / "cgroup.procs").write_text(f"{child.pid}\n")
        found = processes.read({"": str(tmp_path)}, child.pid)
        opened = len(os.listdir(f"/proc/{child.pid}/fd"))
        child.communicate()

    assert (found.number, found.sockets, found.descriptors) == (1, 1, opened)
    assert found.open_files_limit


def test_more_descriptors_than_a_bound_are_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "MOST_LOOKED_AT", 1)
    (tmp_path / "cgroup.procs").write_text(f"{os.getpid()}\n")
    found = processes.read({"": str(tmp_path)}, os.getpid())

    assert (found.number, found.descriptors, found.sockets) == (1, None, None)


def test_a_process_that_is_gone_counts_as_nothing(tmp_path: Path) -> None:
    (tmp_path / "cgroup.procs").write_text("4194305\n")  # above the highest pid there can be
    found = processes.read({"": str(tmp_path)}, 4194305)

    assert (found.descriptors, found.open_files_limit) == (0, None)
