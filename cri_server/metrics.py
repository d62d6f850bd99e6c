# SPDX-License-Identifier: Apache-2.0
"""ListMetricDescriptors and ListPodSandboxMetrics: the stats under cAdvisor's names.

`CATALOGUE` is the one place that knows a metric: its name, help, type and where its value is in
ContainerStats. The values of a metric's labels come in the order of its descriptor's keys. A figure
that is not known gives no metric.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from cri_server import stats
from cri_server.pb import api_pb2 as api

LABELS = ("id", "name", "namespace", "pod", "container")
NETWORK_LABELS = ("id", "namespace", "pod", "interface")
COUNTER, GAUGE = api.MetricType.COUNTER, api.MetricType.GAUGE


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """One metric of a container; `value` gives None when there is none to report."""

    name: str
    help: str
    type: "api.MetricType.ValueType"
    value: Callable[[api.ContainerStats], int | None]


def _part(part: str, field: str) -> Callable[[api.ContainerStats], int | None]:
    def value(one: api.ContainerStats) -> int | None:
        message = getattr(one, part)
        return int(getattr(message, field).value) if message.HasField(field) else None

    return value


def _cpu_seconds(one: api.ContainerStats) -> int | None:
    used = _part("cpu", "usage_core_nano_seconds")(one)
    return None if used is None else used // 1_000_000_000


def _gauge(name: str, part: str, field: str, text: str) -> Metric:
    return Metric(name=f"container_{name}", help=text, type=GAUGE, value=_part(part, field))


CATALOGUE = (
    Metric(
        name="container_cpu_usage_seconds_total",
        help="CPU time used, in whole seconds",
        type=COUNTER,
        value=_cpu_seconds,
    ),
    _gauge("memory_usage_bytes", "memory", "usage_bytes", "Memory in use, caches included"),
    _gauge("memory_working_set_bytes", "memory", "working_set_bytes", "Memory that is needed"),
    _gauge("memory_rss", "memory", "rss_bytes", "Anonymous memory"),
    _gauge("memory_swap", "swap", "swap_usage_bytes", "Memory that is swapped out"),
    _gauge("fs_usage_bytes", "writable_layer", "used_bytes", "Size of the writable layer"),
    _gauge("fs_inodes_total", "writable_layer", "inodes_used", "Inodes of the writable layer"),
)
NETWORK = ("receive_bytes", "receive_errors", "transmit_bytes", "transmit_errors")
_NETWORK_FIELDS = dict(
    zip(NETWORK, ("rx_bytes", "rx_errors", "tx_bytes", "tx_errors"), strict=True)
)


class Metrics:
    """Answers the two RPCs from the stats of all ready pods."""

    def __init__(self, source: stats.Stats) -> None:
        self._stats = source

    def descriptors(self) -> list[api.MetricDescriptor]:
        """Return name, help and label keys of every metric that `pods` may report."""
        own = [api.MetricDescriptor(name=m.name, help=m.help, label_keys=LABELS) for m in CATALOGUE]
        network = [
            api.MetricDescriptor(
                name=f"container_network_{name}_total",
                help=f"Network {name.replace('_', ' ')} of the pod",
                label_keys=NETWORK_LABELS,
            )
            for name in NETWORK
        ]
        return own + network

    async def pods(self) -> list[api.PodSandboxMetrics]:
        """Return the metrics of every ready pod and its containers."""
        every = await self._stats.pods(api.PodSandboxStatsFilter())
        return [_pod(one) for one in every]


def _pod(one: api.PodSandboxStats) -> api.PodSandboxMetrics:
    return api.PodSandboxMetrics(
        pod_sandbox_id=one.attributes.id,
        metrics=list(_network(one)),
        container_metrics=[
            api.ContainerMetrics(container_id=c.attributes.id, metrics=list(_container(one, c)))
            for c in one.linux.containers
        ],
    )


def _container(pod: api.PodSandboxStats, one: api.ContainerStats) -> Iterator[api.Metric]:
    m = pod.attributes.metadata
    name = one.attributes.metadata.name
    labels = (one.attributes.id, name, m.namespace, m.name, name)
    for metric in CATALOGUE:
        value = metric.value(one)
        if value is not None:
            yield _metric(metric.name, metric.type, one.cpu.timestamp, labels, value)


def _network(pod: api.PodSandboxStats) -> Iterator[api.Metric]:
    network, m = pod.linux.network, pod.attributes.metadata
    default = [network.default_interface] if network.HasField("default_interface") else []
    for interface in (*default, *network.interfaces):
        labels = (pod.attributes.id, m.namespace, m.name, interface.name)
        for name, field in _NETWORK_FIELDS.items():
            full = f"container_network_{name}_total"
            value = getattr(interface, field).value
            yield _metric(full, COUNTER, network.timestamp, labels, value)


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
