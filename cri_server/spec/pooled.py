# SPDX-License-Identifier: Apache-2.0
"""Limits of one container where only its pod can be limited: in a kernel of the pod's own.

The sandbox's limits hold for that kernel with everything in it (`pod.sandbox`). A limit of a
container is kept as well when the pod's is no wider, which is so for the only container of a pod
of a kubelet's; every other is not, and that must be said. Pure functions.
"""

from collections.abc import Iterator, Mapping

from cri_server.pb import api_pb2 as api
from cri_server.spec import why

_PERIOD = 100_000  # microseconds: what the kernel takes when no period is set
_PART = "linux.resources."


def unheld(
    own: api.LinuxContainerResources, of_pod: api.LinuxContainerResources
) -> Mapping[str, str]:
    """Return the limits of a container that those of its pod do not hold, by their part of
    config.json, as they were asked for.

    Shares are no limit, and zero, -1 and "" mean none.
    """
    return {_PART + part: asked for part, asked, held in _compared(own, of_pod) if not held}


def note(found: Mapping[str, str], key: str) -> None:
    """Note each for `cri-server explain`; `key` names the handler's place in the configuration."""
    for part, asked in found.items():
        why.handler(part, key, "its limits hold for the pod, not for one container", asked=asked)


def _compared(
    own: api.LinuxContainerResources, of_pod: api.LinuxContainerResources
) -> Iterator[tuple[str, str, bool]]:
    """Yield part, value, and whether the pod's is no wider."""
    for part, name in (
        ("memory.limit", "memory_limit_in_bytes"),
        ("memory.swap", "memory_swap_limit_in_bytes"),
    ):
        asked, given = getattr(own, name), getattr(of_pod, name)
        if asked > 0:
            yield part, str(asked), 0 < given <= asked
    if own.cpu_quota > 0:
        yield "cpu.quota", str(own.cpu_quota), 0 < _cores(of_pod) <= _cores(own)
    for part, name in (("cpu.cpus", "cpuset_cpus"), ("cpu.mems", "cpuset_mems")):
        if asked := getattr(own, name):
            yield part, asked, asked == getattr(of_pod, name)
    for page in own.hugepage_limits:  # a kubelet sends zero for each size that nobody asked for
        if page.limit:
            yield f"hugepageLimits[{page.page_size}]", str(page.limit), False
    for key, value in own.unified.items():
        yield f"unified[{key}]", value, of_pod.unified.get(key) == value


def _cores(resources: api.LinuxContainerResources) -> float:
    return max(resources.cpu_quota, 0) / (resources.cpu_period or _PERIOD)
