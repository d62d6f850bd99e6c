# SPDX-License-Identifier: Apache-2.0
"""cri_server.guest_stats: what runsc prints becomes figures."""

import msgspec
import pytest
from google.protobuf import message

from cri_server import guest_stats, usage
from shim.pb.containerd import cgroups_v1_pb2, cgroups_v2_pb2

SAID = (
    b'{"type":"stats","id":"c1","data":{"cpu":{"usage":{"total":111032606}},"memory":{"usage":'
    b'{"limit":0,"usage":4235264,"failcnt":0},"swap":{"limit":0}},"pids":{"current":5}}}\n'
)


def test_cpu_and_memory_are_read() -> None:
    assert guest_stats.parsed(SAID) == usage.Usage(
        cpu=111032606, memory=4235264, working_set=4235264
    )


@pytest.mark.parametrize("said", [b"", b"loading sandbox: no", b'{"data": {}}', b'{"data": 1}'])
def test_what_is_no_event_is_an_error(said: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        guest_stats.parsed(said)


def test_a_shims_metrics_of_cgroup_v1_are_read() -> None:
    made = cgroups_v1_pb2.Metrics()
    made.cpu.usage.total, made.memory.usage.usage, made.memory.usage.limit = 5, 100, 1 << 63
    made.memory.total_inactive_file, made.memory.total_rss, made.memory.total_cache = 30, 60, 40
    made.memory.total_pg_fault, made.memory.total_pg_maj_fault = 7, 1
    assert guest_stats.counted("io.containerd.cgroups.v1.Metrics", made.SerializeToString()) == (
        usage.Usage(cpu=5, memory=100, working_set=70, rss=60, cache=40, faults=7, major_faults=1)
    )


def test_a_shims_metrics_of_cgroup_v2_are_read() -> None:
    made = cgroups_v2_pb2.Metrics()
    made.cpu.usage_usec, made.memory.usage, made.memory.usage_limit = 5, 100, 200
    made.memory.inactive_file, made.memory.anon, made.memory.file = 130, 60, 40
    url = "types.containerd.io/io.containerd.cgroups.v2.Metrics"
    assert guest_stats.counted(url, made.SerializeToString()) == usage.Usage(
        cpu=5000, memory=100, working_set=0, rss=60, cache=40, limit=200, faults=0, major_faults=0
    )


@pytest.mark.parametrize(
    ("url", "value"), [("", b""), ("x.Metrics", b""), ("io.containerd.cgroups.v2.Metrics", b"\xff")]
)
def test_what_is_no_metrics_is_an_error(url: str, value: bytes) -> None:
    with pytest.raises(message.DecodeError):
        guest_stats.counted(url, value)
