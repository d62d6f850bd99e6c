# SPDX-License-Identifier: Apache-2.0
"""What an update of resources makes of those that are in force (CRI UpdateContainerResources).

Pure. CPU and memory managers send one field and leave the rest zero, every ten seconds if need be;
so zero is "unchanged", never "none" (behaviour.md §1.3). The way back to "none" is -1, for the
quota and the memory limits.
"""

from cri_server import errors
from cri_server.pb import api_pb2 as api
from cri_server.spec import checks, linux, oci, types

_BY_KEY = ("unified", "hugepage_limits")


def check(request: api.UpdateContainerResourcesRequest) -> None:
    """Refuse what an update cannot bring about: InvalidArgument that names the field."""
    checks.unsupported(bool(request.annotations), "annotations", "an update has none to act on")
    checks.unsupported(request.HasField("windows"), "windows", "this is Linux")


def check_pod(request: api.UpdatePodSandboxResourcesRequest, host: types.HostFacts) -> None:
    """Refuse limits that no pod can have (CRI UpdatePodSandboxResources), naming the field."""
    check_limits("overhead", request.overhead, host)
    check_limits("resources", request.resources, host)


def check_limits(where: str, asked: api.LinuxContainerResources, host: types.HostFacts) -> None:
    """Refuse limits that cannot be set; the message begins with `where`."""
    try:
        linux.resources(asked, host)
        linux.oom_score_adj(asked, host)
    except errors.InvalidArgument as e:
        raise errors.InvalidArgument(f"{where}.{e.message}") from e


def merged(
    now: api.LinuxContainerResources, asked: api.LinuxContainerResources
) -> api.LinuxContainerResources:
    """Return `now` with what is set in `asked`; `unified` by key, hugepage limits by page size.

    A memory limit that comes without a swap limit takes away an earlier one that it leaves no room
    to, and one that allowed no swap: unset means "as much as memory".
    """
    result = api.LinuxContainerResources()
    result.CopyFrom(now)
    if asked.memory_limit_in_bytes and not _swaps_still(now, asked.memory_limit_in_bytes):
        result.ClearField("memory_swap_limit_in_bytes")
    for field, value in asked.ListFields():
        if field.name not in _BY_KEY:
            setattr(result, field.name, value)
    result.unified.update(asked.unified)
    _merge_pages(result, asked)
    return result


def _swaps_still(now: api.LinuxContainerResources, limit: int) -> bool:
    """Say whether the swap limit, which is of memory and swap together, goes with a new `limit`."""
    swap = now.memory_swap_limit_in_bytes
    return swap == -1 or (swap > now.memory_limit_in_bytes and 0 < limit < swap)


def _merge_pages(result: api.LinuxContainerResources, asked: api.LinuxContainerResources) -> None:
    """Take each size that is listed: here zero is a limit. The order of the first list stays."""
    limits = {p.page_size: p.limit for p in (*result.hugepage_limits, *asked.hugepage_limits)}
    del result.hugepage_limits[:]
    for size, limit in limits.items():
        result.hugepage_limits.add(page_size=size, limit=limit)


def restored(before: oci.Resources, after: oci.Resources) -> oci.Resources:
    """Return what undoes a change from `before` to `after` that went wrong half-way.

    What was not limited before gets the kernel's own defaults, but for the sets of processors and
    nodes, whose default only the kernel knows.
    """
    result = oci.Resources(**before)
    if "cpu" in after:
        result["cpu"] = {"shares": 1024, "quota": -1, "period": 100000, **before.get("cpu", {})}
    if "memory" in after:
        swap: oci.Memory = {"swap": -1} if "swap" in after["memory"] else {}
        result["memory"] = {"limit": -1, **swap, **before.get("memory", {})}
    return result
