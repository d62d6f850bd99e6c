# SPDX-License-Identifier: Apache-2.0
"""What containers and pods use: cgroup files, network counters, writable layers. No `du`, and no
process but for containers that the host's kernel cannot tell apart (`guest_stats`).

All containers of a list are read in one hop to a thread. A container that cannot be read costs its
own figures and never the list. `usage_nano_cores` needs two samples: it is absent in the first
answer, not zero.
"""

import asyncio
import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cri_server import (
    cgroups,
    containers,
    errors,
    guest_stats,
    pods,
    snapshots,
    state,
    usage,
)
from cri_server.network import counters
from cri_server.pb import api_pb2 as api
from shim import cgroup

RATE_WINDOW = 1_000_000_000  # ns: a rate over less would be noise


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sample:
    at: int
    cpu: int


class Stats:
    """Answers ContainerStats, PodSandboxStats and their lists. Each id may be a unique prefix."""

    def __init__(
        self,
        *,
        pod_host: pods.Pods,
        container_host: containers.Containers,
        groups: cgroups.Cgroups,
        layers: snapshots.Snapshots,
        guests: guest_stats.GuestStats,
    ) -> None:
        self._guests = guests
        self._pods, self._containers = pod_host, container_host
        self._groups, self._layers = groups, layers
        self._samples: dict[str, tuple[_Sample, int | None]] = {}

    # -- containers -------------------------------------------------------------------------------

    async def container(self, container_id: str) -> api.ContainerStats:
        """Return the stats of one container. Raises NotFound, FailedPrecondition once it ended."""
        container = self._containers.record(container_id)
        if container.finished_at:
            raise errors.FailedPrecondition(f"container {container.id[:13]} has ended: no stats")
        (stats,) = await self._read([container])
        if not (stats.HasField("cpu") or stats.HasField("memory")):
            raise errors.FailedPrecondition(f"container {container.id[:13]} has no stats yet")
        return stats

    async def containers(self, selector: api.ContainerStatsFilter) -> Sequence[api.ContainerStats]:
        """Return the stats of all containers that match and have not ended."""
        records = self._containers.matching(
            api.ContainerFilter(
                id=selector.id,
                pod_sandbox_id=selector.pod_sandbox_id,
                label_selector=selector.label_selector,
            )
        )
        alive = [c for c in records if not c.finished_at]
        self._forget()
        return await self._read(alive)

    async def _read(self, records: Sequence[state.Container]) -> list[api.ContainerStats]:
        inside = await self._guests.read(records)
        return await asyncio.to_thread(lambda: [self._one(c, inside) for c in records])

    def _one(
        self, container: state.Container, inside: Mapping[str, usage.Usage | None]
    ) -> api.ContainerStats:
        now = time.time_ns()
        m = container.config
        stats = api.ContainerStats(
            attributes=api.ContainerAttributes(
                id=container.id, metadata=m.metadata, labels=m.labels, annotations=m.annotations
            ),
            writable_layer=self._writable_layer(container.id, now),
        )
        used = self._usage(container, inside)
        if used is not None:
            _fill(stats, used, now, self._rate(container.id, used.cpu))
        return stats

    def _usage(
        self, container: state.Container, inside: Mapping[str, usage.Usage | None]
    ) -> usage.Usage | None:
        return inside[container.id] if container.id in inside else self._of_cgroup(container)

    def _of_cgroup(self, container: state.Container) -> usage.Usage | None:
        return usage.read(self._groups.every(container.cgroups_path)) if container.pid else None

    def _writable_layer(self, container_id: str, now: int) -> api.FilesystemUsage:
        size = self._layers.usage(container_id)
        return api.FilesystemUsage(
            timestamp=now,
            fs_id=api.FilesystemIdentifier(mountpoint=str(self._layers.mountpoint)),
            used_bytes=api.UInt64Value(value=size.bytes),
            inodes_used=api.UInt64Value(value=size.inodes),
        )

    # -- pods -------------------------------------------------------------------------------------

    async def pod(self, pod_id: str) -> api.PodSandboxStats:
        """Return the stats of one pod. Raises NotFound, Unavailable when it is not ready."""
        pod = self._pods.record(pod_id)
        if pod.state is not state.PodState.READY:
            raise errors.Unavailable(f"pod sandbox {pod.id[:13]} is not ready: no stats")
        return (await self._read_pods([pod]))[0]

    async def pods(self, selector: api.PodSandboxStatsFilter) -> Sequence[api.PodSandboxStats]:
        """Return the stats of all ready pods that match."""
        chosen = self._pods.matching(
            api.PodSandboxFilter(id=selector.id, label_selector=selector.label_selector)
        )
        self._forget()
        return await self._read_pods([p for p in chosen if p.state is state.PodState.READY])

    async def _read_pods(self, chosen: Sequence[state.Pod]) -> list[api.PodSandboxStats]:
        alive = {
            p.id: [c for c in self._containers.of_pod(p.id) if not c.finished_at] for p in chosen
        }
        used = await self._guests.read(c for of_pod in alive.values() for c in of_pod)

        def read() -> list[api.PodSandboxStats]:
            networks = counters.read(p.netns for p in chosen if p.netns)
            return [self._pod(p, alive[p.id], used, networks.get(p.netns)) for p in chosen]

        return await asyncio.to_thread(read)

    def _pod(
        self,
        pod: state.Pod,
        parts: Sequence[state.Container],
        inside: Mapping[str, usage.Usage | None],
        network: Sequence[counters.Counters] | None,
    ) -> api.PodSandboxStats:
        now = time.time_ns()
        m = pod.config
        linux = api.LinuxPodSandboxStats(containers=[self._one(c, inside) for c in parts])
        places = [self._own(pod)]
        used = usage.read(places[0])
        if used is None:
            places = [self._groups.every(c.cgroups_path) for c in parts if c.pid]
            used = usage.total(filter(None, (self._usage(c, inside) for c in parts)))
        if used is not None:
            _fill(linux, used, now, self._rate(pod.id, used.cpu))
            linux.process.timestamp = now
            count = sum(len(cgroup.Cgroup(place).processes()) for place in places)
            linux.process.process_count.value = count
        if network:  # the kubelet takes it for granted that there is a default interface
            linux.network.CopyFrom(_network(network, now))
        return api.PodSandboxStats(
            attributes=api.PodSandboxAttributes(
                id=pod.id, metadata=m.metadata, labels=m.labels, annotations=m.annotations
            ),
            linux=linux,
        )

    def _own(self, pod: state.Pod) -> Mapping[str, str]:
        """Return the pod's own cgroup, {} for a pod that has none or was made under another cgroup
        driver: its containers then count together.
        """
        try:
            return self._groups.pod_accounts(pod.id, pod.config.linux.cgroup_parent)
        except errors.InvalidArgument:
            return {}

    # -- rates ------------------------------------------------------------------------------------

    def _rate(self, key: str, cpu: int | None) -> int | None:
        """Return nanoseconds of CPU per second since the sample before, None in the beginning.

        By a clock that nobody sets: after a step back of the other no sample would be old enough.
        """
        if cpu is None:
            return None
        now = time.monotonic_ns()
        before, rate = self._samples.get(key, (None, None))
        if before is None or now - before.at >= RATE_WINDOW:
            if before is not None:
                rate = max(cpu - before.cpu, 0) * 1_000_000_000 // (now - before.at)
            self._samples[key] = (_Sample(at=now, cpu=cpu), rate)
        return rate

    def _forget(self) -> None:
        """Drop the samples of what is gone."""
        known = {c.id for c in self._containers.matching(api.ContainerFilter())}
        known |= {p.id for p in self._pods.matching(api.PodSandboxFilter())}
        for gone in self._samples.keys() - known:
            del self._samples[gone]


def _fill(
    stats: api.ContainerStats | api.LinuxPodSandboxStats,
    used: usage.Usage,
    now: int,
    rate: int | None,
) -> None:
    """Set cpu, memory, swap and io from what was read; a figure that is not known is left unset."""
    stats.cpu.timestamp = stats.memory.timestamp = now
    _set(stats.cpu, usage_core_nano_seconds=used.cpu, usage_nano_cores=rate)
    _set(
        stats.memory,
        working_set_bytes=used.working_set,
        available_bytes=_available(used.limit, used.working_set),
        usage_bytes=used.memory,
        rss_bytes=used.rss,
        page_faults=used.faults,
        major_page_faults=used.major_faults,
    )
    if used.swap is not None and isinstance(stats, api.ContainerStats):
        stats.swap.timestamp = now
        _set(
            stats.swap,
            swap_usage_bytes=used.swap,
            swap_available_bytes=_available(used.swap_limit, used.swap),
        )
    if used.pressure is not None:
        _fill_pressure(stats, used.pressure, now)


def _fill_pressure(
    stats: api.ContainerStats | api.LinuxPodSandboxStats,
    pressure: Mapping[str, usage.Pressures],
    now: int,
) -> None:
    for name, target in (("cpu", stats.cpu), ("memory", stats.memory), ("io", stats.io)):
        if name in pressure:
            target.psi.CopyFrom(_psi(pressure[name]))
    stats.io.timestamp = now


@functools.lru_cache(maxsize=usage.REMEMBERED)
def _psi(lines: usage.Pressures) -> api.PsiStats:
    """Return the message for a PSI file; shared, to be copied."""
    return api.PsiStats(Some=_psi_line(lines.some), Full=_psi_line(lines.full))


def _psi_line(line: usage.Pressure | None) -> api.PsiData | None:
    if line is None:
        return None
    return api.PsiData(Total=line.total, Avg10=line.avg10, Avg60=line.avg60, Avg300=line.avg300)


def _set(target: api.CpuUsage | api.MemoryUsage | api.SwapUsage, **values: int | None) -> None:
    for name, value in values.items():
        if value is not None:
            getattr(target, name).value = value


def _available(limit: int | None, used: int | None) -> int | None:
    return None if limit is None or used is None else max(limit - used, 0)


def _network(found: Sequence[counters.Counters], now: int) -> api.NetworkUsage:
    """Return the counters of every interface; eth0, else the first, is the default."""
    interfaces = [
        api.NetworkInterfaceUsage(
            name=c.name,
            rx_bytes=api.UInt64Value(value=c.rx_bytes),
            rx_errors=api.UInt64Value(value=c.rx_errors),
            tx_bytes=api.UInt64Value(value=c.tx_bytes),
            tx_errors=api.UInt64Value(value=c.tx_errors),
        )
        for c in found
    ]
    interfaces.sort(key=lambda i: i.name != "eth0")
    return api.NetworkUsage(
        timestamp=now,
        default_interface=interfaces[0] if interfaces else None,
        interfaces=interfaces[1:],
    )
