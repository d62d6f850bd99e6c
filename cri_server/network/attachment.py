# SPDX-License-Identifier: Apache-2.0
"""What a pod tells the plugins: CNI_ARGS and capability arguments. Pure.

Capability arguments are made whether or not a plugin wants them: each plugin gets those that its
configuration declares (`conf.Plugin.accepts`). The names are containerd's and libcni's, on which
plugins depend.
"""

import ipaddress
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import ROUND_CEILING, Decimal, InvalidOperation

from cri_server import errors
from cri_server.pb import api_pb2 as api

INGRESS = "kubernetes.io/ingress-bandwidth"
EGRESS = "kubernetes.io/egress-bandwidth"
LEAST_RATE, GREATEST_RATE = 1000, 10**15  # bits/s; what the kubelet accepts
# What a capability argument is made of, for those without which the pod is not as it was asked for.
ASKED_BY = {"portMappings": "port_mappings", "bandwidth": f"annotation {INGRESS} or {EGRESS}"}
BURST = 2**32 - 1  # bits; the most that the bandwidth plugin takes: not limited

_QUANTITY = re.compile(r"\+?(\d+\.?\d*|\.\d+)(?:([numkMGTPE]?|[KMGTPE]i)|[eE]([+-]?\d{1,2}))")
_SUFFIXES = {"n": "1e-9", "u": "1e-6", "m": "1e-3", "": "1", "k": "1e3"} | {
    s: f"1e{3 * i}" for i, s in enumerate("MGTPE", start=2)
}
_BINARY = {f"{s}i": 1024**i for i, s in enumerate("KMGTPE", start=1)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Attachment:
    """A pod that is on a network, or shall be. `netns` is the path of its pinned namespace,
    `result` what ADD had answered, by the pod's record: for a DEL when the cache has lost it.
    """

    pod_id: str
    netns: str
    name: str
    namespace: str
    uid: str
    port_mappings: Sequence[api.PortMapping] = ()
    dns: api.DNSConfig = field(default_factory=api.DNSConfig)
    annotations: Mapping[str, str] = field(default_factory=dict)
    cgroup_parent: str = ""
    result: Mapping[str, object] = field(default_factory=dict)

    def args(self) -> tuple[tuple[str, str], ...]:
        """Return CNI_ARGS in order. Raises InvalidArgument for a value that is more than one."""
        pairs = (
            ("IgnoreUnknown", "1"),
            ("K8S_POD_NAMESPACE", self.namespace),
            ("K8S_POD_NAME", self.name),
            ("K8S_POD_INFRA_CONTAINER_ID", self.pod_id),
            ("K8S_POD_UID", self.uid),
        )
        for key, value in pairs:
            if any(c in ";=" or c < " " for c in value):
                raise errors.InvalidArgument(
                    f"{key} {value[:80]!r} cannot be passed to CNI plugins"
                )
        return pairs

    def capabilities(self) -> dict[str, object]:
        """Return the capability arguments that there is something to say about.

        Raises InvalidArgument for a port, address or bandwidth that cannot be.
        """
        every: dict[str, object] = {
            "portMappings": [_port(m) for m in self.port_mappings if m.host_port > 0],
            "bandwidth": _bandwidth(self.annotations),
            "dns": _dns(self.dns),
            "cgroupPath": self.cgroup_parent,
            "io.kubernetes.cri.pod-annotations": dict(self.annotations),
        }
        return {name: value for name, value in every.items() if value}


def _port(mapping: api.PortMapping) -> dict[str, object]:
    for name in ("host_port", "container_port"):
        if not 0 < (port := getattr(mapping, name)) < 65536:
            raise errors.InvalidArgument(f"port_mappings.{name}: {port} is not a port")
    if mapping.host_ip:
        _check_address(mapping.host_ip)
    return {
        "hostPort": mapping.host_port,
        "containerPort": mapping.container_port,
        "protocol": _protocol(mapping.protocol),
        "hostIP": mapping.host_ip,
    }


def _check_address(address: str) -> None:
    try:
        ipaddress.ip_address(address)
    except ValueError:
        raise errors.InvalidArgument(
            f"port_mappings.host_ip: {address[:80]!r} is no address"
        ) from None


def _protocol(number: "api.Protocol.ValueType") -> str:
    try:
        return api.Protocol.Name(number).lower()
    except ValueError:
        raise errors.InvalidArgument(f"port_mappings.protocol: {number} is unknown") from None


def _dns(dns: api.DNSConfig) -> dict[str, list[str]]:
    every = {
        "servers": list(dns.servers),
        "searches": list(dns.searches),
        "options": list(dns.options),
    }
    return every if any(every.values()) else {}


def _bandwidth(annotations: Mapping[str, str]) -> dict[str, int]:
    limits: dict[str, int] = {}
    for direction, key in (("ingress", INGRESS), ("egress", EGRESS)):
        if key in annotations:
            limits |= {f"{direction}Rate": rate(key, annotations[key]), f"{direction}Burst": BURST}
    return limits


def rate(key: str, text: str) -> int:
    """Return bits per second from the annotation `key`. Raises InvalidArgument."""
    bits = quantity(text)
    if bits is None or not LEAST_RATE <= bits <= GREATEST_RATE:
        raise errors.InvalidArgument(
            f"annotation {key}: {text[:80]!r} is not a bandwidth between 1k and 1P"
        )
    return bits


def quantity(text: str) -> int | None:
    """Return a Kubernetes quantity ("10M", "1.5Gi", "2e6"), rounded up; None when it is none."""
    match = _QUANTITY.fullmatch(text.strip()) if text.isascii() else None
    if match is None or len(text) > 64:
        return None
    number, suffix, exponent = match.groups()
    factor = Decimal(f"1e{exponent}" if exponent else _SUFFIXES.get(suffix, _BINARY.get(suffix, 1)))
    try:
        return int((Decimal(number) * factor).to_integral_value(rounding=ROUND_CEILING))
    except InvalidOperation:
        return None
