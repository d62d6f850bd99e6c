# SPDX-License-Identifier: Apache-2.0
"""What a PodSandboxConfig asks for: checks, sysctls, namespaces, and the spec of the sandbox
container.

Pure. The namespaces themselves are made by the shim; only a shared PID namespace needs a process to
hold it.
"""

import ipaddress
import re
from collections.abc import Iterable, Mapping
from typing import Literal

from cri_server import errors
from cri_server.pb import api_pb2 as api
from cri_server.spec import (
    checks,
    linux,
    mounts,
    oci,
    processes,
    security,
    selinux,
    types,
    updates,
    userns,
    why,
)

NOBODY = 65534
INIT = "/catatonit"
SUBGROUP = "run.oci.systemd.subgroup"
# The last to be killed and the first to yield, as for a pause container.
_OOM_SCORE_ADJ, _CPU_SHARES = -998, 2
_REASONS = {
    "ociVersion": "the oldest that has all we use: crun 1.8 of Debian 12 knows no newer",
    "process.args": "catatonit holds the PID namespace and reaps",
    "process.terminal": "nobody speaks with it",
    "process.env": "it reads no other",
    "process.cwd": "it opens nothing",
    "process.capabilities": "it needs none",
    "process.noNewPrivileges": "it needs none",
    "process.oomScoreAdj": "the last to be killed: the pod ends with it",
    "root": "a folder that holds nothing but what is mounted",
    f"mounts[{INIT}]": "the host's catatonit",
    "linux.namespaces[mount]": "new: it has a root of its own",
    "linux.namespaces[pid]": "new: this is what it is for",
    "linux.resources.cpu.shares": "the first to yield: it only waits",
    "linux.resources.devices": "it opens none",
}

_INIT_OPTIONS = ["bind", "ro", "nosuid", "nodev"]
_Mode = api.NamespaceMode
_OPTIONS = "linux.security_context.namespace_options"
_WHOSE = {_Mode.POD: "the pod's", _Mode.CONTAINER: "its own", _Mode.NODE: "the host's"}
_PERIOD = 100000  # microseconds: the kernel's cpu_period where none is asked for
_MOST = 2**63 - 1  # of an int64
_LONGEST_NAME = 1024  # characters; Kubernetes has at most 253
_HOSTNAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
_SYSCTL = re.compile(r"[\w@:-]+(/[\w@:-]+)*(\.[\w@:-]+(/[\w@:-]+)*)+", re.ASCII)
_IPC_SYSCTLS = re.compile(r"kernel\.(shm|msg)\w+|kernel\.sem|fs\.mqueue\.\w+", re.ASCII)


# -- checks ----------------------------------------------------------------------------------------


def validate(config: api.PodSandboxConfig, host: types.HostFacts) -> None:
    """Refuse a sandbox that can never be made as asked: InvalidArgument that names the field."""
    _check_metadata(config)
    checks.unsupported(config.HasField("windows"), "windows", "this is Linux")
    if config.hostname and (len(config.hostname) > 64 or not _HOSTNAME.fullmatch(config.hostname)):
        raise errors.InvalidArgument(f"hostname: {config.hostname[:80]!r} is not a host name")
    if config.log_directory:
        checks.line(checks.absolute(config.log_directory, "log_directory"), "log_directory")
    for entry in (
        *config.dns_config.servers,
        *config.dns_config.searches,
        *config.dns_config.options,
    ):
        checks.line(entry, "dns_config")
    for mapping in config.port_mappings:
        _check_port(mapping)
    _check_cgroup_parent(config.linux.cgroup_parent)
    updates.check_limits("linux.overhead", config.linux.overhead, host)
    updates.check_limits("linux.resources", config.linux.resources, host)
    _check_security(config.linux.security_context, host)
    sysctls(config)
    init_user(config)


def _check_metadata(config: api.PodSandboxConfig) -> None:
    if not config.HasField("metadata"):
        raise errors.InvalidArgument("config.metadata is missing")
    metadata = config.metadata
    if not metadata.name:
        raise errors.InvalidArgument("config.metadata.name is missing")
    for field in ("name", "uid", "namespace"):
        value = checks.line(getattr(metadata, field), f"metadata.{field}")
        # These become file names and the CNI_ARGS list "A=1;B=2".
        checks.unsupported(
            any(c in value for c in "/;"), f"metadata.{field}", f"{value[:80]!r} contains / or ;"
        )
        # No plugin starts, for ADD or for DEL, with a variable of more than 128 KiB (execve(2)).
        too_long = len(value) > _LONGEST_NAME
        checks.unsupported(too_long, f"metadata.{field}", f"is longer than {_LONGEST_NAME}")


def _check_port(mapping: api.PortMapping) -> None:
    if mapping.protocol not in api.Protocol.values():
        raise errors.InvalidArgument(
            f"port_mappings: protocol {int(mapping.protocol)} is not known"
        )
    # A host port of 0 or less asks for none, and is left out (behaviour.md §2.3).
    if not (0 < mapping.container_port < 65536 and mapping.host_port < 65536):
        raise errors.InvalidArgument(
            f"port_mappings: {mapping.container_port}:{mapping.host_port} are not ports"
        )
    if mapping.host_ip:
        try:
            ipaddress.ip_address(mapping.host_ip)
        except ValueError as e:
            raise errors.InvalidArgument(
                f"port_mappings: host_ip {mapping.host_ip[:80]!r} is no address"
            ) from e


def _check_cgroup_parent(parent: str) -> None:
    checks.sized(checks.line(parent, "cgroup_parent"), "cgroup_parent")
    checks.unsupported(".." in parent.split("/"), "cgroup_parent", "contains '..'")


def _check_security(context: api.LinuxSandboxSecurityContext, host: types.HostFacts) -> None:
    if context.HasField("run_as_group") and not context.HasField("run_as_user"):
        raise errors.InvalidArgument("run_as_group: needs run_as_user")
    checks.unsupported(
        bool(context.namespace_options.target_id),
        "namespace_options.target_id",
        "is for pid TARGET of a container only",
    )
    security.strict(context.supplemental_groups_policy)
    selinux.check(context.selinux_options)
    security.seccomp_request(context)
    security.profile(context.HasField("apparmor"), context.apparmor, "", "apparmor")
    options = context.namespace_options
    _one_of(options.network, (_Mode.POD, _Mode.NODE), "network")
    _one_of(options.ipc, (_Mode.POD, _Mode.NODE), "ipc")
    _one_of(options.pid, (_Mode.POD, _Mode.CONTAINER, _Mode.NODE), "pid")
    userns.validate(options, host)


def _one_of(mode: _Mode.ValueType, allowed: tuple[_Mode.ValueType, ...], field: str) -> None:
    if mode not in allowed:
        name = _Mode.Name(mode) if mode in _Mode.values() else str(int(mode))
        raise errors.InvalidArgument(f"namespace_options.{field}: {name} is not possible here")


# -- namespaces ------------------------------------------------------------------------------------


def own_network(config: api.PodSandboxConfig) -> bool:
    return config.linux.security_context.namespace_options.network != _Mode.NODE


def own_ipc(config: api.PodSandboxConfig) -> bool:
    return config.linux.security_context.namespace_options.ipc != _Mode.NODE


def pid_mode(
    config: api.ContainerConfig, sandbox: api.PodSandboxConfig
) -> Literal["own", "pod", "host", "target"]:
    """Return whose PID namespace the container lives in.

    Unset means POD in the protocol's encoding, so POD follows the pod: the host's if the pod is in
    it, the container's own if the pod shares none. Raises InvalidArgument for the host's in a pod
    that has its own, and for TARGET without an id.
    """
    options = config.linux.security_context.namespace_options
    of_pod = sandbox.linux.security_context.namespace_options.pid
    if options.pid == _Mode.TARGET:
        checks.unsupported(
            not options.target_id, "namespace_options.target_id", "is missing for pid TARGET"
        )
        why.cri("linux.namespaces[pid]", f"{_OPTIONS}.target_id", "that container's")
        return "target"
    checks.unsupported(
        bool(options.target_id), "namespace_options.target_id", "is for pid TARGET only"
    )
    _one_of(options.pid, (_Mode.POD, _Mode.CONTAINER, _Mode.NODE), "pid")
    if options.pid == _Mode.NODE and of_pod != _Mode.NODE:
        raise errors.InvalidArgument(
            "namespace_options.pid: NODE in a pod that is not in the host's namespace"
        )
    why.pod("linux.namespaces[pid]", f"{_OPTIONS}.pid", _WHOSE[of_pod])
    if options.pid == _Mode.CONTAINER:
        why.cri("linux.namespaces[pid]", f"{_OPTIONS}.pid", "its own")
    if options.pid == _Mode.CONTAINER or of_pod == _Mode.CONTAINER:
        return "own"
    return "host" if of_pod == _Mode.NODE else "pod"


def check_namespaces(config: api.ContainerConfig, sandbox: api.PodSandboxConfig) -> None:
    """Refuse namespaces that the container's pod does not give. Unset is POD: as the pod's."""
    options = config.linux.security_context.namespace_options
    for field, own in (("network", own_network(sandbox)), ("ipc", own_ipc(sandbox))):
        mode = getattr(options, field)
        _one_of(mode, (_Mode.POD,) if own else (_Mode.POD, _Mode.NODE), field)
    userns.check_container(config, sandbox)
    pid_mode(config, sandbox)


# -- sysctls ---------------------------------------------------------------------------------------


def sysctls(config: api.PodSandboxConfig, *, part: str = "sandbox.sysctls") -> dict[str, str]:
    """Return the sysctls to write in the pod's namespaces, by dotted name; they are explained as
    elements of `part`.

    A "/" inside a name's part stands for a dot in it ("eth0/100"). Refused is what would change the
    host: a name that no namespace of the pod's own contains (GHSA-w2j5-3rcx-vx7x). Added are, with
    an own network, binding low ports and ping without privilege.
    """
    result: dict[str, str] = {}
    for name, value in config.linux.sysctls.items():
        dotted = _dotted(name)
        why.pod(f"{part}[{dotted}]", f"linux.sysctls[{name}]")
        if not _namespaced(dotted, config):
            raise errors.InvalidArgument(
                f"sysctls: {name[:100]!r} is not in a namespace of the pod's own"
            )
        result[dotted] = checks.line(value.replace("\t", " "), f"sysctls: {dotted}")
    if own_network(config):
        for name, value, because in _unprivileged(config):
            if name not in result:
                why.default(f"{part}[{name}]", because)
                result[name] = value
    return result


def check_sentry_sysctls(config: api.PodSandboxConfig, *, host_stack: bool) -> None:
    """Refuse the sysctls of a gVisor pod that nobody would set: InvalidArgument that names one.

    The Sentry reads none from a spec (google/gvisor#10790). Those of the network, written in the
    namespace, count where it passes calls on to the `host_stack`.
    """
    for name in config.linux.sysctls:
        if not (host_stack and _dotted(name).startswith("net.")):
            raise errors.InvalidArgument(
                f"sysctls: {name[:100]!r}: gVisor's kernel cannot be given it"
            )


def _unprivileged(config: api.PodSandboxConfig) -> Iterable[tuple[str, str, str]]:
    """Yield what pods may do without privilege: names, values, reasons.

    No group but those of its user namespace can be given to a pod that has one.
    """
    yield (
        "net.ipv4.ip_unprivileged_port_start",
        "0",
        "low ports without privilege: all are the pod's",
    )
    mapped = userns.ids(config)
    last = min(mapped.gids if mapped else 1 << 31, 1 << 31) - 1
    yield "net.ipv4.ping_group_range", f"0 {last}", "ping without privilege"


def _dotted(name: str) -> str:
    """Return the dotted form of a/b.c/d or a.b/c.d; the first separator tells which (sysctl(8))."""
    first = next((c for c in name if c in "./"), "")
    dotted = name.translate(str.maketrans("./", "/.")) if first == "/" else name
    if not _SYSCTL.fullmatch(dotted):
        raise errors.InvalidArgument(f"sysctls: {name[:100]!r} is not a sysctl's name")
    return dotted


def _namespaced(name: str, config: api.PodSandboxConfig) -> bool:
    if name.startswith("net."):
        return own_network(config)
    return own_ipc(config) and _IPC_SYSCTLS.fullmatch(name) is not None


# -- the sandbox container -------------------------------------------------------------------------


def init_user(config: api.PodSandboxConfig) -> types.User:
    """Return who the sandbox container runs as: the sandbox's run_as_user, else nobody.

    Raises InvalidArgument, also for one whom the pod's user namespace does not have.
    """
    context, mapped = config.linux.security_context, userns.ids(config)
    why.default("process.user", "nobody: the init needs no rights")
    if context.HasField("run_as_user"):
        why.pod("process.user", "linux.security_context.run_as_user")
    nobody = min(NOBODY, mapped.uids - 1, mapped.gids - 1) if mapped else NOBODY
    uid = context.run_as_user.value if context.HasField("run_as_user") else nobody
    gid = context.run_as_group.value if context.HasField("run_as_group") else uid
    groups = tuple(checks.identity(g, "supplemental_groups") for g in context.supplemental_groups)
    user = types.User(
        uid=checks.identity(uid, "run_as_user"),
        gid=checks.identity(gid, "run_as_group"),
        additional_gids=groups,
    )
    userns.check_user(user, mapped, "run_as_user")
    return user


def sandbox(wanted: types.SandboxInput) -> oci.Spec:
    """Return the spec of the sandbox container: holds the PID namespace, reaps, can do nothing
    else.
    """
    _explain(wanted)
    nothing = oci.Capabilities(bounding=[], effective=[], permitted=[], inheritable=[], ambient=[])
    bound = [
        oci.Mount(destination=INIT, type="bind", source=source, options=_INIT_OPTIONS)
        for source in filter(None, [wanted.init])
    ]
    document = oci.Spec(
        ociVersion=oci.VERSION,
        process=oci.Process(
            terminal=False,
            user=processes.user(init_user(wanted.config)),
            args=[INIT, "-P"],
            env=[f"PATH={processes.DEFAULT_PATH}"],
            cwd="/",
            capabilities=nothing,
            noNewPrivileges=True,
            oomScoreAdj=max(_OOM_SCORE_ADJ, wanted.host.oom_score_adj_floor),
        ),
        root=oci.Root(path=wanted.rootfs, readonly=True),
        mounts=[*mounts.minimal(), *mounts.of_machine(wanted.pod_files), *bound],
        annotations={
            **wanted.annotations,
            **annotations("sandbox", wanted.id, wanted.config),
            **scope_annotations(wanted.cgroups_path),
            **_sizing(wanted.config),
        },
        linux=_linux(wanted),
    )
    if wanted.hostname:
        document["hostname"] = wanted.hostname
        why.pod("hostname", "hostname", "for the kernel of the pod's own")
    if profile := security.apparmor(wanted.config.linux.security_context, wanted.host):
        document["process"]["apparmorProfile"] = profile
    selinux.label(document, selinux.of_init(wanted.host))
    return document


def _explain(wanted: types.SandboxInput) -> None:
    """Note the origin of what is the same for each sandbox container."""
    for part, because in _REASONS.items():
        if wanted.init or part != f"mounts[{INIT}]":
            why.default(part, because)
    if wanted.host.oom_score_adj_floor > _OOM_SCORE_ADJ:
        why.host("process.oomScoreAdj", "CAP_SYS_RESOURCE is missing to go lower")
    linux.note_cgroup(wanted.config)


def _linux(wanted: types.SandboxInput) -> oci.Linux:
    paths = {kind: path for kind, path in wanted.namespaces.items() if kind != "pid"}
    result = oci.Linux(
        namespaces=[oci.Namespace(type="mount"), oci.Namespace(type="pid"), *linux.joined(paths)],
        cgroupsPath=wanted.cgroups_path,
        resources=_limits(wanted),
    )
    context, local = wanted.config.linux.security_context, wanted.seccomp_profile
    if wanted.machine and (found := sysctls(wanted.config, part="linux.sysctl")):
        result["sysctl"] = found
    profile = security.seccomp_profile(
        context, held=(), host=wanted.host, localhost=local, defaults=wanted.defaults
    )
    if profile is not None:
        result["seccomp"] = profile
    userns.fill(result, userns.ids(wanted.config))
    return result


def _limits(wanted: types.SandboxInput) -> oci.Resources:
    """Return almost nothing for an init, and what the pod may use where that limits all of its
    containers: resources and overhead together (CRI LinuxPodSandboxConfig).

    A virtual machine is no such place: kata adds up the limits of all its containers, this one too,
    so the pod's would count twice (sandbox.go, calculateSandboxMemory). It has the annotations.
    """
    if not wanted.limits_pod:
        return oci.Resources(
            cpu=oci.Cpu(shares=_CPU_SHARES), devices=[{"allow": False, "access": "rwm"}]
        )
    asked = api.LinuxContainerResources()
    asked.CopyFrom(wanted.config.linux.resources)
    more = wanted.config.linux.overhead
    why.pod("linux.resources", "linux.resources, linux.overhead", "of all containers together")
    if asked.memory_limit_in_bytes > 0:
        both = asked.memory_limit_in_bytes + max(more.memory_limit_in_bytes, 0)
        asked.memory_limit_in_bytes = min(both, _MOST)
    if asked.cpu_quota > 0 and more.cpu_quota > 0:
        asked.cpu_period = asked.cpu_period or _PERIOD
        also = more.cpu_quota * asked.cpu_period // (more.cpu_period or _PERIOD)
        asked.cpu_quota = min(asked.cpu_quota + also, _MOST)
    return linux.resources(asked, wanted.host)


def annotations(kind: str, pod_id: str, config: api.PodSandboxConfig) -> Mapping[str, str]:
    """Return containerd's annotations, which VM runtimes and hooks read (behaviour.md §6)."""
    prefix, metadata = "io.kubernetes.cri.", config.metadata
    return noted_annotations(
        {
            f"{prefix}container-type": kind,
            f"{prefix}sandbox-id": pod_id,
            f"{prefix}sandbox-name": metadata.name,
            f"{prefix}sandbox-namespace": metadata.namespace,
            f"{prefix}sandbox-uid": metadata.uid,
        }
    )


def _sizing(config: api.PodSandboxConfig) -> Mapping[str, str]:
    """Return what a VM runtime sizes its machine by, and where the pod's logs are."""
    prefix, asked = "io.kubernetes.cri.sandbox-", config.linux.resources
    known = {
        "log-directory": config.log_directory,
        "cpu-period": asked.cpu_period,
        "cpu-quota": asked.cpu_quota,
        "cpu-shares": asked.cpu_shares,
        "memory": asked.memory_limit_in_bytes,
    }
    return noted_annotations({f"{prefix}{k}": str(v) for k, v in known.items() if v})


def scope_annotations(cgroups_path: str) -> Mapping[str, str]:
    """Have crun keep a container in its scope itself, as runc does: where systemd makes cgroups v2
    it would make one more, `container`, below the scope (crun(1)).
    """
    if cgroups_path.startswith("/"):
        return {}
    why.default(f"annotations[{SUBGROUP}]", "the scope is the container's cgroup, with crun too")
    return {SUBGROUP: ""}


def noted_annotations(ours: Mapping[str, str]) -> Mapping[str, str]:
    for key in ours:
        why.default(f"annotations[{key}]", "for hooks and VM runtimes, as containerd names it")
    return ours
