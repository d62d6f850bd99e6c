# SPDX-License-Identifier: Apache-2.0
"""ListMetricDescriptors and ListPodSandboxMetrics: what a kubelet turns into /metrics/cadvisor.

Which metrics there are is in `catalogue`. Everything is read in one hop to a thread, each file
once; no process is started but for containers that the host's kernel cannot tell apart, which have
what their own tells of them (`guest_stats`). A container that cannot be read has no metrics, and
never costs the others theirs. The values of a metric's labels come in the order of its
descriptor's keys.
"""

import asyncio
import os
import time
from collections.abc import Iterator, Mapping, Sequence

from cri_server import (
    accounts,
    catalogue,
    cgroups,
    config,
    containers,
    guest_stats,
    names,
    pods,
    processes,
    snapshots,
    state,
    updates,
    usage,
)
from cri_server.network import counters
from cri_server.pb import api_pb2 as api


class Metrics:
    """Answers the two RPCs for all ready pods and their running containers."""

    def __init__(
        self,
        *,
        settings: config.Metrics,
        pod_host: pods.Pods,
        container_host: containers.Containers,
        groups: cgroups.Cgroups,
        layers: snapshots.Snapshots,
        guests: guest_stats.GuestStats,
    ) -> None:
        self._guests = guests
        self._pods, self._containers = pod_host, container_host
        self._groups, self._layers = groups, layers
        self._included = frozenset(settings.groups)
        self._of_containers = [m for m in catalogue.CONTAINERS if self._includes(m.group)]
        self._of_network = catalogue.NETWORK if self._includes("network") else ()

    def _includes(self, group: config.MetricGroup | None) -> bool:
        return group is None or group in self._included

    def descriptors(self) -> list[api.MetricDescriptor]:
        """Return name, help and label keys of every metric that `pods` may report."""
        own = [
            api.MetricDescriptor(name=m.name, help=m.help, label_keys=(*catalogue.BASE, *m.labels))
            for m in self._of_containers
        ]
        network = [
            api.MetricDescriptor(
                name=m.name, help=m.help, label_keys=(*catalogue.BASE, "interface")
            )
            for m in self._of_network
        ]
        return own + network

    async def pods(self) -> list[api.PodSandboxMetrics]:
        """Return the metrics of every ready pod and its running containers."""
        every = self._pods.matching(api.PodSandboxFilter())
        ready = [p for p in every if p.state is state.PodState.READY]
        running = {p.id: self._running(p.id) for p in ready}
        inside = await self._guests.read(c for of_pod in running.values() for c in of_pod)
        return await asyncio.to_thread(self._read, ready, running, inside)

    def _running(self, pod_id: str) -> list[state.Container]:
        return [c for c in self._containers.of_pod(pod_id) if c.pid and not c.finished_at]

    # -- in a thread ------------------------------------------------------------------------------

    def _read(
        self,
        ready: Sequence[state.Pod],
        running: Mapping[str, Sequence[state.Container]],
        inside: Mapping[str, usage.Usage | None],
    ) -> list[api.PodSandboxMetrics]:
        disk = self._disk()
        networks = counters.read(p.netns for p in ready if p.netns and self._of_network)
        return [
            api.PodSandboxMetrics(
                pod_sandbox_id=pod.id,
                metrics=list(self._network(pod, networks.get(pod.netns, ()))),
                container_metrics=[
                    self._container(pod, c, self._sample(c, disk, inside)) for c in running[pod.id]
                ],
            )
            for pod in ready
        ]

    def _disk(self) -> catalogue.Disk:
        root = self._layers.mountpoint
        device, whole = os.stat(root).st_dev, os.statvfs(root)
        return catalogue.Disk(
            device=accounts.device_name(os.major(device), os.minor(device)),
            bytes=whole.f_blocks * whole.f_frsize,
            inodes=whole.f_files,
            inodes_free=whole.f_ffree,
        )

    def _network(
        self, pod: state.Pod, interfaces: Sequence[counters.Counters]
    ) -> Iterator[api.Metric]:
        now, base = time.time_ns(), _labels(pod)
        for interface in interfaces:
            labels = (*base, interface.name)
            for m in self._of_network:
                yield _metric(m.name, catalogue.COUNTER, now, labels, getattr(interface, m.field))

    def _container(
        self, pod: state.Pod, container: state.Container, sample: catalogue.Sample | None
    ) -> api.ContainerMetrics:
        if sample is None:
            return api.ContainerMetrics(container_id=container.id)
        base = _labels(pod, container)
        found = (
            _metric(m.name, m.type, sample.now, (*base, *labels), value)
            for m in self._of_containers
            for labels, value in m.values(sample)
            if value is not None
        )
        return api.ContainerMetrics(container_id=container.id, metrics=found)

    def _sample(
        self,
        container: state.Container,
        disk: catalogue.Disk,
        inside: Mapping[str, usage.Usage | None],
    ) -> catalogue.Sample | None:
        own = container.id in inside  # then its cgroup is empty
        directories = {} if own else self._groups.every(container.cgroups_path)
        used = inside[container.id] if own else usage.read(directories)
        if used is None:
            return None
        look = "process" in self._included and not own
        return catalogue.Sample(
            now=time.time_ns(),
            container=container,
            resources=updates.in_force(container),
            used=used,
            account=accounts.read(directories, used),
            layer=self._layers.usage(container.id),
            disk=disk,
            processes=processes.read(directories, container.pid) if look else None,
        )


def _labels(pod: state.Pod, container: state.Container | None = None) -> tuple[str, ...]:
    """Return the values of `catalogue.BASE`; the pod's own are those of a container "POD"."""
    m = pod.config.metadata
    if container is None:
        name = names.kubernetes(names.POD, m, m.attempt)
        return (pod.id, name, "", m.namespace, m.name, names.POD)
    own = container.config.metadata
    name = names.kubernetes(own.name, m, own.attempt)
    return (container.id, name, container.image_name, m.namespace, m.name, own.name)


def _metric(
    name: str,
    kind: "api.MetricType.ValueType",
    timestamp: int,
    labels: Sequence[str],
    value: int,
) -> api.Metric:
    return api.Metric(
        name=name,
        timestamp=timestamp,
        metric_type=kind,
        label_values=labels,
        value=api.UInt64Value(value=value),
    )
