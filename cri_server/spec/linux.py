# SPDX-License-Identifier: Apache-2.0
"""The `linux` part of a container's spec: namespaces, resources, paths, what others add.

Pure. `resources` serves UpdateContainerResources too.
"""

import re
from collections.abc import Iterable, Mapping

from cri_server import errors, limits
from cri_server.pb import api_pb2 as api
from cri_server.spec import checks, devices, mounts, oci, security, types, userns, why

NO_DEFAULTS = types.Defaults()
_SET = re.compile(r"[0-9]+(-[0-9]+)?(,[0-9]+(-[0-9]+)?)*")
_JOINED = ("network", "ipc", "uts", "pid", "user")
_POD_FIELDS = {"network": "network", "ipc": "ipc", "uts": "network", "user": "userns_options"}


def linux(wanted: types.ContainerInput, held: Iterable[str]) -> oci.Linux:
    """Return the whole part; `held` are the capabilities, which the seccomp profile follows."""
    context = wanted.security
    note_cgroup(wanted.sandbox)
    result = oci.Linux(
        namespaces=namespaces(wanted),
        devices=devices.nodes(wanted),
        cgroupsPath=wanted.cgroups_path,
        resources=_resources(wanted),
    )
    result["maskedPaths"], result["readonlyPaths"] = paths(context)
    profile = security.seccomp_profile(
        context,
        held=held,
        host=wanted.host,
        localhost=wanted.seccomp_profile,
        defaults=wanted.defaults,
    )
    if profile is not None:
        result["seccomp"] = profile
    userns.fill(result, wanted.ids)
    if propagation := mounts.rootfs_propagation(wanted.config):
        result["rootfsPropagation"] = propagation
    return result


def note_cgroup(sandbox: api.PodSandboxConfig) -> None:
    if sandbox.linux.cgroup_parent:
        why.pod("linux.cgroupsPath", "linux.cgroup_parent", "a cgroup of its own in the pod's")
    else:
        why.default("linux.cgroupsPath", "the pod names no cgroup_parent: it gets one of ours")


# -- namespaces ------------------------------------------------------------------------------------


def namespaces(wanted: types.ContainerInput) -> list[oci.Namespace]:
    """Return what is new (no path) and what is joined.

    The cgroup namespace is a new one on v2, unless privileged.
    """
    why.default("linux.namespaces[mount]", "new: a container has a root of its own")
    result = [oci.Namespace(type="mount"), *joined(wanted.namespaces)]
    if wanted.security.privileged:
        why.cri("linux.namespaces[cgroup]", "linux.security_context.privileged", "the host's")
    elif not wanted.host.cgroup_v2:
        why.host("linux.namespaces[cgroup]", "the host's: there is no cgroup v2")
    else:
        why.default("linux.namespaces[cgroup]", "new: a container sees its own cgroup as the root")
        result.append(oci.Namespace(type="cgroup"))
    return result


def joined(paths: Mapping[str, str]) -> Iterable[oci.Namespace]:
    """Yield an entry for each kind in `paths`; an empty path means a new one."""
    for kind in _JOINED:
        path = paths.get(kind)
        if kind in _POD_FIELDS:  # "pid" is explained where it is chosen
            field = f"linux.security_context.namespace_options.{_POD_FIELDS[kind]}"
            whose = "the host's" if path is None else "the pod's"
            why.pod(f"linux.namespaces[{kind}]", field, whose)
        if path is not None:
            yield oci.Namespace(type=kind, path=path) if path else oci.Namespace(type=kind)


def paths(context: api.LinuxContainerSecurityContext) -> tuple[list[str], list[str]]:
    """Return masked and read-only paths as CRI lists them; none when privileged (critest)."""
    masked = _paths(context.masked_paths, "linux.maskedPaths", "masked_paths")
    readonly = _paths(context.readonly_paths, "linux.readonlyPaths", "readonly_paths")
    if not context.privileged:
        return masked, readonly
    for part, asked in (("linux.maskedPaths", masked), ("linux.readonlyPaths", readonly)):
        why.cri(
            part, "linux.security_context.privileged", "nothing is hidden", asked=" ".join(asked)
        )
    return [], []


def _paths(paths: Iterable[str], part: str, field: str) -> list[str]:
    why.cri(part, f"linux.security_context.{field}")
    for path in paths:
        checks.absolute(path, field)
    return list(paths)


# -- resources -------------------------------------------------------------------------------------


def _resources(wanted: types.ContainerInput) -> oci.Resources:
    result = at_start(resources(wanted.config.linux.resources, wanted.host, wanted.defaults))
    result["devices"] = devices.rules(wanted)
    if limit := wanted.defaults.pids_limit:
        why.handler("linux.resources.pids.limit", wanted.defaults.pids_key)
        result["pids"] = oci.Pids(limit=limit)
    return result


def at_start(limits: oci.Resources) -> oci.Resources:
    """Return limits as a config.json has them: a quota of -1 is left out. A new cgroup has none,
    and crun 1.8 would write it as an unsigned number, which cgroup v1 refuses.
    """
    cpu = limits.get("cpu", oci.Cpu())
    if cpu.get("quota") != -1:
        return limits
    rest = oci.Resources(**limits)
    del rest["cpu"]
    if others := {name: value for name, value in cpu.items() if name != "quota"}:
        rest["cpu"] = oci.Cpu(**others)  # type: ignore[typeddict-item]
    return rest


def resources(
    asked: api.LinuxContainerResources,
    host: types.HostFacts,
    defaults: types.Defaults = NO_DEFAULTS,
) -> oci.Resources:
    """Return the limits asked for, and what `defaults` have for the cgroup where nothing is asked;
    zero and "" mean "not set".

    Raises InvalidArgument for what cannot be set. oom_score_adj is not here: it belongs to the
    process.
    """
    result = oci.Resources()
    if cpu := _cpu(asked):
        result["cpu"] = cpu
    if memory := _memory(asked, host):
        result["memory"] = memory
    if pages := _hugepages(asked, host):
        result["hugepageLimits"] = pages
    if unified := {**_defaults(defaults, host), **_unified(asked, host)}:
        result["unified"] = unified
    return result


def _cpu(asked: api.LinuxContainerResources) -> oci.Cpu:
    _at_least(asked.cpu_shares, 0, "cpu_shares")
    _at_least(asked.cpu_quota, 1000 if asked.cpu_quota > 0 else -1, "cpu_quota")
    _at_least(asked.cpu_period, 1000 if asked.cpu_period else 0, "cpu_period")
    _at_most(asked.cpu_period, 1000000, "cpu_period")
    cpu = oci.Cpu()
    if asked.cpu_shares:  # v1 does this by itself, and not every runtime does it for v2
        why.cri("linux.resources.cpu.shares", "linux.resources.cpu_shares")
        cpu["shares"] = min(max(asked.cpu_shares, 2), 262144)
        if cpu["shares"] != asked.cpu_shares:
            because = "the kernel takes 2 to 262144"
            why.host("linux.resources.cpu.shares", because, asked=asked.cpu_shares)
    if asked.cpu_quota:
        why.cri("linux.resources.cpu.quota", "linux.resources.cpu_quota")
        cpu["quota"] = asked.cpu_quota
    if asked.cpu_period:
        why.cri("linux.resources.cpu.period", "linux.resources.cpu_period")
        cpu["period"] = asked.cpu_period
    if asked.cpuset_cpus:
        why.cri("linux.resources.cpu.cpus", "linux.resources.cpuset_cpus")
        cpu["cpus"] = _set(asked.cpuset_cpus, "cpuset_cpus")
    if asked.cpuset_mems:
        why.cri("linux.resources.cpu.mems", "linux.resources.cpuset_mems")
        cpu["mems"] = _set(asked.cpuset_mems, "cpuset_mems")
    return cpu


def _set(value: str, field: str) -> str:
    if not _SET.fullmatch(value):
        raise errors.InvalidArgument(f"{field}: {value[:80]!r} is not a list of numbers")
    return value


def _at_most(value: int, most: int, field: str) -> None:
    if value > most:
        raise errors.InvalidArgument(f"{field}: {value} is more than {most}")


def _at_least(value: int, least: int, field: str) -> None:
    if value < least:
        raise errors.InvalidArgument(f"{field}: {value} is less than {least}")


def _memory(asked: api.LinuxContainerResources, host: types.HostFacts) -> oci.Memory:
    """Return the memory part; "swap" is memory plus swap, as in the OCI spec.

    Unset it equals the limit, so a container with a limit cannot swap. Where the kernel does not
    account swap it cannot be limited and is left out (behaviour.md §7).
    """
    limit, swap = asked.memory_limit_in_bytes, asked.memory_swap_limit_in_bytes
    _at_least(limit, -1, "memory_limit_in_bytes")
    _at_least(swap, -1, "memory_swap_limit_in_bytes")
    if swap > 0 and (limit <= 0 or swap < limit):
        raise errors.InvalidArgument(
            f"memory_swap_limit_in_bytes: {swap} is less than the memory limit {limit}"
        )
    memory = oci.Memory()
    if limit:
        why.cri("linux.resources.memory.limit", "linux.resources.memory_limit_in_bytes")
        memory["limit"] = limit
        why.default("linux.resources.memory.swap", "as the memory limit: no swap unless asked for")
    if swap:
        why.cri("linux.resources.memory.swap", "linux.resources.memory_swap_limit_in_bytes")
    if host.swap_accounting and (swap or limit):
        memory["swap"] = swap or limit
    elif swap:
        why.host("linux.resources.memory.swap", "the kernel does not account swap", asked=swap)
    elif limit:
        why.host("linux.resources.memory.swap", "the kernel does not account swap")
    return memory


def _hugepages(
    asked: api.LinuxContainerResources, host: types.HostFacts
) -> list[oci.HugepageLimit]:
    """Return the limits; a size without a controller can only be 0.

    The kubelet lists every size of the host, with 0 for those not asked for.
    """
    result = []
    for n, page in enumerate(asked.hugepage_limits):
        part = f"linux.resources.hugepageLimits[{page.page_size}]"
        why.cri(part, f"linux.resources.hugepage_limits[{n}]")
        if page.page_size in host.hugepage_sizes:
            result.append(oci.HugepageLimit(pageSize=page.page_size, limit=page.limit))
        elif page.limit:
            raise errors.InvalidArgument(
                f"hugepage_limits: this host cannot limit pages of {page.page_size[:20]!r}"
            )
        else:
            why.host(part, "nothing limits pages of this size here", asked=0)
    return result


def _defaults(defaults: types.Defaults, host: types.HostFacts) -> Mapping[str, str]:
    missing = bool(defaults.unified) and not host.cgroup_v2
    checks.unsupported(missing, defaults.unified_key, "this host has no cgroup v2")
    for key in defaults.unified:
        why.handler(f"linux.resources.unified[{key}]", defaults.unified_key)
    return defaults.unified


def _unified(asked: api.LinuxContainerResources, host: types.HostFacts) -> Mapping[str, str]:
    missing = bool(asked.unified) and not host.cgroup_v2
    checks.unsupported(missing, "unified", "this host has no cgroup v2")
    for key, value in asked.unified.items():
        if not limits.UNIFIED_KEY.fullmatch(key):
            raise errors.InvalidArgument(f"unified: {key[:80]!r} is not a controller's file")
        checks.text(value, f"unified[{key}]")
        why.cri(f"linux.resources.unified[{key}]", "linux.resources.unified")
    return asked.unified


def oom_score_adj(asked: api.LinuxContainerResources, host: types.HostFacts) -> int:
    """Return the value to set: raised to what this host lets us set (proc_pid_oom_score_adj(5))."""
    value = asked.oom_score_adj
    if not -1000 <= value <= 1000:
        raise errors.InvalidArgument(f"oom_score_adj: {value} is not between -1000 and 1000")
    why.cri("process.oomScoreAdj", "linux.resources.oom_score_adj")
    if value < host.oom_score_adj_floor:
        why.host("process.oomScoreAdj", "CAP_SYS_RESOURCE is missing to go lower", asked=value)
    return max(value, host.oom_score_adj_floor)
