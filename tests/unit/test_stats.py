# SPDX-License-Identifier: Apache-2.0
"""Rates by a clock that nobody sets; one pod that cannot be told does not hide the others."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from cri_server import cgroups, snapshots, state, stats
from cri_server.pb import api_pb2 as api


@dataclasses.dataclass
class Records:
    """As much of pods, containers and what asks the kernels of pods as stats look at."""

    of_pods: Sequence[state.Pod] = ()
    of_containers: Sequence[state.Container] = ()

    def matching(self, wanted: api.PodSandboxFilter | api.ContainerFilter) -> Sequence[Any]:
        return self.of_pods if isinstance(wanted, api.PodSandboxFilter) else self.of_containers

    def of_pod(self, pod_id: str) -> Sequence[state.Container]:
        return [c for c in self.of_containers if c.pod_id == pod_id]

    async def read(self, records: object) -> dict[str, Any]:
        return {}


def pod(number: int, parent: str) -> state.Pod:
    config = api.PodSandboxConfig(metadata=api.PodSandboxMetadata(name=f"p{number}"))
    config.linux.cgroup_parent = parent
    config.linux.security_context.namespace_options.network = api.NamespaceMode.NODE
    made = state.new_pod(config, runtime_handler="", handler="runc", now=number)
    return dataclasses.replace(made, id=f"{number:064x}", state=state.PodState.READY)


def container(of: state.Pod, number: int, path: str) -> state.Container:
    config = api.ContainerConfig(metadata=api.ContainerMetadata(name=f"c{number}"))
    return state.Container(
        id=f"{number:064x}", pod_id=of.id, handler="runc", config=config, raw=b"", created_at=1,
        boot_id="", image_id="", image_ref="", image_name="", layers=(), log_path="",
        stop_signal=15, cgroups_path=path, pid=1, started_at=1,
    )  # fmt: skip


def host(tmp_path: Path, known: Records) -> stats.Stats:
    unified = cgroups.Hierarchy(mode="v2", unified=tmp_path / "cgroup", v1={})
    return stats.Stats(
        pod_host=cast("Any", known),
        container_host=cast("Any", known),
        groups=cgroups.Cgroups(unified, "systemd"),
        layers=snapshots.Snapshots(tmp_path / "root"),
        guests=cast("Any", known),
    )


def write(tmp_path: Path, scope: str, *, micros: int, memory: int, pids: str) -> None:
    folder = tmp_path / "cgroup/system.slice" / scope
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cpu.stat").write_text(f"usage_usec {micros}\n")
    (folder / "memory.stat").write_text("inactive_file 1\nanon 5\n")
    (folder / "memory.current").write_text(f"{memory}\n")
    (folder / "cgroup.procs").write_text(pids)


async def test_a_pod_without_a_cgroup_of_its_own_is_the_sum_of_its_containers(
    tmp_path: Path,
) -> None:
    plain, old = pod(1, ""), pod(2, "/kubepods/not-a-slice")
    inside = [container(plain, n, f"system.slice:cri-server:{n:064x}") for n in (3, 4)]
    for one in inside:
        write(tmp_path, f"cri-server-{one.id}.scope", micros=7, memory=100, pids="5\n6\n")
    answer = await host(tmp_path, Records([old, plain], inside)).pods(api.PodSandboxStatsFilter())
    assert [p.attributes.id for p in answer] == [old.id, plain.id]
    assert not answer[0].linux.HasField("cpu")
    linux = answer[1].linux
    assert linux.cpu.usage_core_nano_seconds.value == 14_000
    assert linux.memory.working_set_bytes.value == 198
    assert linux.memory.rss_bytes.value == 10
    assert linux.process.process_count.value == 4


async def test_samples_go_with_their_pods(tmp_path: Path) -> None:
    one = pod(1, "")
    inside = container(one, 3, f"system.slice:cri-server:{3:064x}")
    write(tmp_path, f"cri-server-{inside.id}.scope", micros=7, memory=100, pids="5\n")
    known = Records([one], [inside])
    asked = host(tmp_path, known)
    await asked.pods(api.PodSandboxStatsFilter())
    assert asked._samples.keys() == {one.id, inside.id}
    known.of_pods, known.of_containers = [], []
    await asked.pods(api.PodSandboxStatsFilter())
    assert not asked._samples


def test_a_clock_that_is_set_back_stops_no_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, now = host(tmp_path, Records()), time.monotonic_ns()
    monkeypatch.setattr(time, "monotonic_ns", lambda: now)
    assert asked._rate("c", 0) is None
    now += stats.RATE_WINDOW
    monkeypatch.setattr(time, "time_ns", lambda: 0)
    assert asked._rate("c", 250_000_000) == 250_000_000
