# SPDX-License-Identifier: Apache-2.0
"""What the spec functions are given: values that others found out on the machine.

`containers` and `pods` fill ContainerInput and SandboxInput; `host` probes HostFacts; `images`
reads ImageConfig; `rootfs` resolves User; `sources` looks at host paths and devices. All values are
frozen.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from cri_server import capability, limits
from cri_server.pb import api_pb2 as api
from cri_server.spec import oci


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageConfig:
    """The `config` object of an OCI image, as the image wrote it: nothing in it is trusted."""

    user: str = ""
    env: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    working_dir: str = ""
    stop_signal: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    volumes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class UserRequest:
    """Who is to run, as asked for; numbers are checked, names are not yet looked up.

    Exactly one of `uid` and `name` is set. `gid` or `group` overrides the primary group.
    `supplemental` comes from the request; unless `strict`, the image's /etc/group adds to it
    (SupplementalGroupsPolicy).
    """

    uid: int | None = None
    name: str = ""
    gid: int | None = None
    group: str = ""
    supplemental: tuple[int, ...] = ()
    strict: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class User:
    """Who runs, in numbers. `additional_gids` contains the primary group too (CVE-2022-36109)."""

    uid: int = 0
    gid: int = 0
    additional_gids: tuple[int, ...] = ()
    home: str = "/"


@dataclass(frozen=True, kw_only=True, slots=True)
class IdMap:
    """A pod's user namespace: `uids` users from `uid` of the host are 0 and up inside; groups
    alike.
    """

    uid: int
    uids: int
    gid: int
    gids: int

    def owner(self, uid: int, gid: int) -> tuple[int, int]:
        """Return who on the host owns what belongs to these ids inside; to root if not mapped."""
        return (
            self.uid + (uid if uid < self.uids else 0),
            self.gid + (gid if gid < self.gids else 0),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceNode:
    """A device of the host as it was found. `kind` is "c" or "b", `mode` the permission bits.

    `host_path` is where the host has it, "" for the same path.
    """

    path: str  # inside the container
    host_path: str = ""
    kind: str
    major: int
    minor: int
    mode: int = 0o660
    uid: int = 0
    gid: int = 0
    access: str = "rwm"


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """A device node of a CDI device; `kind` is "c", "b" or "p", owners are None for "as the
    process", `access` is the cgroup rule's, "" for none. `host_path` as in DeviceNode.
    """

    path: str
    host_path: str = ""
    kind: str
    major: int
    minor: int
    mode: int | None
    uid: int | None
    gid: int | None
    access: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Injection:
    """All that the CDI devices of one container do to it, in the order in which it is done.

    `files` are the sources of mounts that are no folders.
    """

    devices: tuple[str, ...]
    env: tuple[str, ...] = ()
    nodes: tuple[Node, ...] = ()
    mounts: tuple[oci.Mount, ...] = ()
    hooks: tuple[tuple[str, oci.Hook], ...] = ()
    gids: tuple[int, ...] = ()
    files: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True, slots=True)
class PodFiles:
    """Host paths of what a pod's containers share; "" leaves the image's own in place."""

    resolv_conf: str = ""
    hostname: str = ""
    hosts: str = ""
    shm: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Defaults:
    """What a handler's configuration gives to each container that does not ask.

    The keys say where it is set, "[runtimes.runc] default_rlimits"; "" for what is ours. `seccomp`
    is the handler's own RuntimeDefault, None for ours; with `seccomp_audit_key` it only logs. With
    `no_host_devices_key` a privileged container has the devices of any other, with
    `cgroup_writable_key` each may write to its cgroup. `unified` are files of cgroup v2.
    """

    capabilities: tuple[str, ...] = capability.DEFAULT
    capabilities_key: str = ""
    rlimits: tuple[limits.Rlimit, ...] = limits.rlimits(limits.DEFAULT)
    rlimits_key: str = ""
    pids_limit: int = 0
    pids_key: str = ""
    unified: Mapping[str, str] = field(default_factory=dict)
    unified_key: str = ""
    cgroup_writable_key: str = ""
    no_host_devices_key: str = ""
    seccomp: Mapping[str, object] | None = None
    seccomp_key: str = ""
    seccomp_audit_key: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class SelinuxPolicy:
    """What the host's SELinux policy has for containers: the labels of their processes, of their
    files, and of files that all of them may read; and the type of those that are not confined.
    """

    process: str = "system_u:system_r:container_t:s0"
    file: str = "system_u:object_r:container_file_t:s0"
    read_only: str = "system_u:object_r:container_ro_file_t:s0"
    unconfined: str = "spc_t"


@dataclass(frozen=True, kw_only=True, slots=True)
class HostFacts:
    """What this host, and the OCI runtime that will read the spec, can do. Probed once.

    `machine` is that of `uname -m`, `kernel` the first two numbers of `uname -r`.
    `capabilities` are those of our bounding set that the OCI runtime knows too,
    `known_capabilities` those of the kernel; a request for one that is known but not ours is
    refused. `apparmor_default` is the name of our profile, "" where it cannot be loaded. `selinux`
    is None where SELinux is off. `rlimit_ceilings` holds our own hard limits where we may not raise
    them (no CAP_SYS_RESOURCE), and what the kernel allows to no one. `hugepage_sizes` are those
    with a cgroup controller, as CRI writes them:
    "2MB", "1GB". `memory` is the host's, in bytes. `no_user_namespaces` says why pods cannot have
    their own, "" where they can; `shallow_binds`, that in them the runtime leaves out what is
    mounted below a bind mount. `cgroup_mount` is where cgroup v2 is mounted, for a runtime whose
    containers share this kernel and may be shown that mount; "" otherwise.
    """

    machine: str = "x86_64"
    kernel: tuple[int, int] = (5, 6)
    capabilities: frozenset[str]
    known_capabilities: frozenset[str]
    cgroup_v2: bool
    cgroup_mount: str = ""
    oom_score_adj_floor: int = -1000
    seccomp: bool = True
    apparmor: bool = False
    apparmor_default: str = ""
    selinux: SelinuxPolicy | None = None
    swap_accounting: bool = False
    hugepage_sizes: frozenset[str] = frozenset()
    recursive_read_only: bool = False
    no_user_namespaces: str = ""
    shallow_binds: bool = False
    rlimit_ceilings: Mapping[str, int] = field(default_factory=dict)
    memory: int = 1 << 62


@dataclass(frozen=True, kw_only=True, slots=True)
class ContainerInput:
    """All that the spec of one container follows from.

    `namespaces` maps OCI types (network, ipc, uts, pid, user) to paths to join. A type that is
    missing is the host's; "pid" with an empty path is a new one of the container's own. `sources`
    maps a mount's `imagevolumes.key` to where it really is; `devices` are the nodes behind
    config.devices, `cdi` what the CDI devices do, `host_devices` all of the host's (for
    privileged). `seccomp_profile` is the parsed Localhost file that security.seccomp_path() named,
    `selinux_level` the pod's.
    `annotations` are the pod's and the container's that the handler's configuration lets through.

    In a pod with a user namespace of its own, `ids` is what it maps, `mapped` are the id-mapped
    copies of mounts that ask for one by container_path, `sysfs` is the host's /sys for a pod on the
    host's network, and `locked` maps a source to the mount flags that cannot be taken off it there.
    """

    id: str
    pod_id: str
    config: api.ContainerConfig
    sandbox: api.PodSandboxConfig
    image: ImageConfig
    user: User
    namespaces: Mapping[str, str]
    cgroups_path: str
    rootfs: str
    pod_files: PodFiles
    hostname: str
    host: HostFacts
    defaults: Defaults = field(default_factory=Defaults)
    sources: Mapping[str, str] = field(default_factory=dict)
    devices: tuple[DeviceNode, ...] = ()
    cdi: Injection | None = None
    host_devices: tuple[DeviceNode, ...] = ()
    seccomp_profile: Mapping[str, object] | None = None
    selinux_level: str = ""
    annotations: Mapping[str, str] = field(default_factory=dict)
    ids: IdMap | None = None
    mapped: Mapping[str, str] = field(default_factory=dict)
    sysfs: str = ""
    locked: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def security(self) -> api.LinuxContainerSecurityContext:
        return self.config.linux.security_context


@dataclass(frozen=True, kw_only=True, slots=True)
class SandboxInput:
    """All that the spec of a sandbox container follows from: `init` is catatonit's path on the
    host, `rootfs` a folder of ours.

    `namespaces` as in ContainerInput, without "pid": the point of this container is to hold a new
    one. `limits_pod`: all containers of the pod run in what it starts, and its limits are the
    pod's. `hostname` is for a kernel of the pod's own to tell. `machine`: that is a virtual
    machine, which sets the pod's sysctls and is made for `pod_files`, of which it wants
    `resolv_conf` and `shm`.
    `seccomp_profile` is the parsed Localhost file that security.seccomp_path() named.
    """

    id: str
    config: api.PodSandboxConfig
    rootfs: str
    init: str
    namespaces: Mapping[str, str]
    cgroups_path: str
    host: HostFacts
    defaults: Defaults = field(default_factory=Defaults)
    seccomp_profile: Mapping[str, object] | None = None
    annotations: Mapping[str, str] = field(default_factory=dict)
    limits_pod: bool = False
    machine: bool = False
    pod_files: PodFiles = field(default_factory=PodFiles)
    hostname: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExecInput:
    """A command for a running container; `process` is the one of the container's stored spec."""

    process: Mapping[str, object]
    cmd: tuple[str, ...]
    tty: bool = False
