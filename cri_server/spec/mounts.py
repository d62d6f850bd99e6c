# SPDX-License-Identifier: Apache-2.0
"""The mount list of a container: our defaults, the pod's files, what CRI asks for.

Pure. That sources exist and targets are safe is looked at elsewhere (`cri_server.sources`,
`cri_server.rootfs`).
"""

from collections.abc import Iterable, Mapping

from cri_server import errors
from cri_server.pb import api_pb2 as api
from cri_server.spec import checks, devices, imagevolumes, oci, types, userns, why

SHM = "/dev/shm"
RESOLV_CONF = "/etc/resolv.conf"
_REASONS = {
    "/proc": "Linux programs expect it (OCI spec, default filesystems)",
    "/dev": "room for the default devices and nothing else",
    "/dev/pts": "terminals of its own (OCI spec, default filesystems)",
    SHM: "POSIX shared memory (OCI spec, default filesystems)",
    "/dev/mqueue": "the POSIX queues of its IPC namespace",
    "/sys": "Linux programs expect it; read-only unless privileged",
    "/sys/fs/cgroup": "its own limits and usage; read-only unless privileged",
}
_Propagation = api.MountPropagation
_OPTIONS = {
    _Propagation.PROPAGATION_PRIVATE: "rprivate",
    _Propagation.PROPAGATION_HOST_TO_CONTAINER: "rslave",
    _Propagation.PROPAGATION_BIDIRECTIONAL: "rshared",
}
_FLAGLESS = {"bind", "rbind", "rw", "rro", *_OPTIONS.values()}


def mounts(wanted: types.ContainerInput) -> list[oci.Mount]:
    """Return all mounts in the order to make them: by depth, otherwise as listed.

    A CRI mount replaces the defaults at and below its target: who mounts the host's /sys wants all
    of it, the node's cgroups too, and not our mount of the container's own on top.
    """
    base, shared = _defaults(wanted), list(_pod_files(wanted))
    requested = [_requested(n, m, wanted) for n, m in enumerate(wanted.config.mounts)]
    requested += devices.binds(wanted)
    taken = {m["destination"] for m in requested}
    base = [m for m in base if not _replaced(m["destination"], taken)]
    shared = [m for m in shared if m["destination"] not in taken]
    targets = {m["destination"] for m in shared}
    base = [m for m in base if m["destination"] not in targets]
    return in_order([kept(m, wanted.locked) for m in (*base, *shared, *requested)])


def kept(mount: oci.Mount, locked: Mapping[str, tuple[str, ...]]) -> oci.Mount:
    """Return the mount with the flags that it has from its source and that a user namespace cannot
    take off: to set any flag, as "ro", an OCI runtime sets all anew (mount_namespaces(7)).
    """
    if not locked or set(mount["options"]) <= _FLAGLESS:
        return mount
    more = [word for word in locked.get(mount["source"], ()) if word not in mount["options"]]
    return oci.Mount(**{**mount, "options": [*mount["options"], *more]})


def _requested(n: int, mount: api.Mount, wanted: types.ContainerInput) -> oci.Mount:
    made = bind(mount, wanted.sources)
    if userns.mapped(mount):
        made["source"] = wanted.mapped.get(mount.container_path, made["source"])
    why.cri(f"mounts[{made['destination']}]", f"mounts[{n}]", _whence(mount, made["source"]))
    return made


def _whence(mount: api.Mount, source: str) -> str:
    if mount.HasField("image"):
        return "the image, mounted once for the pod; without set-id programs and devices"
    if userns.mapped(mount):
        return "our id-mapped copy of the source: OCI runtimes may ignore mappings"
    return "" if source == mount.host_path else "the source without its symlinks"


def _replaced(destination: str, taken: set[str]) -> bool:
    over = next((t for t in taken if checks.below(destination, t)), "")
    if over and destination not in taken:
        why.cri(f"mounts[{destination}]", "mounts", f"left out: {over} is mounted over")
    return bool(over)


def in_order(mounts: Iterable[oci.Mount]) -> list[oci.Mount]:
    """Return the mounts in the order to make them: by depth, otherwise as they are."""
    return sorted(mounts, key=_depth)


def _depth(mount: oci.Mount) -> int:
    return mount["destination"].rstrip("/").count("/")


# -- defaults --------------------------------------------------------------------------------------


def _defaults(wanted: types.ContainerInput) -> list[oci.Mount]:
    mode = "rw" if wanted.security.privileged else "ro"
    writable = "rw" if wanted.defaults.cgroup_writable_key else mode
    defaults = [
        _mount("/proc", "proc", "nosuid", "noexec", "nodev"),
        _mount("/dev", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
        _mount(
            "/dev/pts",
            "devpts",
            "nosuid",
            "noexec",
            "newinstance",
            "ptmxmode=0666",
            "mode=0620",
            *(["gid=5"] if wanted.ids is None or wanted.ids.gids > 5 else []),
        ),
        _mount(SHM, "tmpfs", "nosuid", "noexec", "nodev", "mode=1777", "size=65536k"),
        _mount("/dev/mqueue", "mqueue", "nosuid", "noexec", "nodev"),
        _sysfs(wanted, mode),
        _cgroups(wanted, writable),
    ]
    if writable != mode:
        why.handler("mounts[/sys/fs/cgroup]", wanted.defaults.cgroup_writable_key, "writable")
    return defaults


def _sysfs(wanted: types.ContainerInput, mode: str) -> oci.Mount:
    """Return /sys: new, or the host's, which only the owner of its network may mount anew."""
    options = ("nosuid", "noexec", "nodev", mode)
    if not wanted.sysfs:
        return _mount("/sys", "sysfs", *options)
    why.pod(
        "mounts[/sys]",
        "linux.security_context.namespace_options.network",
        "the host's: nobody else may mount one of the host's network",
    )
    return oci.Mount(
        destination="/sys",
        type="bind",
        source=wanted.sysfs,
        options=["rbind", "rprivate", *options],
    )


def _cgroups(wanted: types.ContainerInput, mode: str) -> oci.Mount:
    """Return /sys/fs/cgroup. A privileged container is in the host's cgroup namespace, and from
    there every new mount of cgroup v2 sets the options of all: it would take nsdelegate and
    memory_recursiveprot off the host's. It sees the same tree in a bind mount of that.
    """
    options = ("nosuid", "noexec", "nodev", "relatime", mode)
    made = _mount("/sys/fs/cgroup", "cgroup", *options)
    if not wanted.security.privileged or wanted.ids or not wanted.host.cgroup_mount:
        return made
    why.cri(f"mounts[{made['destination']}]", "linux.security_context.privileged", "the host's")
    bind = ["rbind", "rprivate", *options]
    return oci.Mount(
        **{**made, "type": "bind", "source": wanted.host.cgroup_mount, "options": bind}
    )


def _mount(destination: str, kind: str, *options: str) -> oci.Mount:
    why.default(f"mounts[{destination}]", _REASONS[destination])
    return oci.Mount(destination=destination, type=kind, source=kind, options=list(options))


def minimal() -> list[oci.Mount]:
    """Return what the OCI runtimes need to start any process at all: for the sandbox container."""
    return [
        _mount("/proc", "proc", "nosuid", "noexec", "nodev"),
        _mount("/dev", "tmpfs", "nosuid", "noexec", "strictatime", "mode=755", "size=64k"),
    ]


def of_machine(files: types.PodFiles) -> Iterable[oci.Mount]:
    """Yield what kata looks for in its sandbox, and containerd has there: it sizes the /dev/shm
    that the containers share by the first (getShmSize), and takes its name servers from the other.
    """
    options = ("rbind", "ro", "nosuid", "nodev", "noexec")
    for target, source in ((SHM, files.shm), (RESOLV_CONF, files.resolv_conf)):
        if source:
            why.default(f"mounts[{target}]", "the pod's, for a virtual machine to be made like it")
            yield oci.Mount(destination=target, type="bind", source=source, options=[*options])


def _pod_files(wanted: types.ContainerInput) -> Iterable[oci.Mount]:
    files = wanted.pod_files
    mode = "ro" if wanted.security.readonly_rootfs else "rw"
    shared = (
        (RESOLV_CONF, files.resolv_conf, mode),
        ("/etc/hostname", files.hostname, mode),
        ("/etc/hosts", files.hosts, mode),
        (SHM, files.shm, "rw"),
    )
    for target, source, access in shared:
        if source:
            why.default(f"mounts[{target}]", "the pod's, which its containers share")
            options = ["rbind", "rprivate", access]
            yield oci.Mount(destination=target, type="bind", source=source, options=options)


# -- what CRI asks for -----------------------------------------------------------------------------


def check(config: api.ContainerConfig, host: types.HostFacts) -> None:
    """Refuse mounts that can never be made or that we do not honour; the message names the target.

    Sources for recursive read-only and propagation: KEP-3857 and behaviour.md §1.6.
    """
    for mount in config.mounts:
        with imagevolumes.explained_where_image(mount):
            _check(mount, host)
            bind(mount, {})


def _check(mount: api.Mount, host: types.HostFacts) -> None:
    where = f"mount {mount.container_path[:200]!r}"
    if mount.HasField("image"):
        imagevolumes.check(mount)
    checks.unsupported(
        bool(mount.image_sub_path) and not mount.HasField("image"),
        where,
        "image_sub_path needs image",
    )
    if mount.recursive_read_only:
        _check_recursive(mount, where, host)


def _check_recursive(mount: api.Mount, where: str, host: types.HostFacts) -> None:
    private = mount.propagation == _Propagation.PROPAGATION_PRIVATE
    checks.unsupported(not mount.readonly, where, "recursive_read_only needs readonly")
    checks.unsupported(not private, where, "recursive_read_only needs propagation PRIVATE")
    if not host.recursive_read_only:
        raise errors.InvalidArgument(
            f"RROUnsupported: {where}: recursive_read_only is not possible here"
        )


def bind(mount: api.Mount, sources: Mapping[str, str]) -> oci.Mount:
    """Return the bind mount for a CRI mount; `sources` as in ContainerInput.

    Raises InvalidArgument for one that cannot be.
    """
    target = checks.absolute(mount.container_path, "mount container_path")
    checks.unsupported(target == "/", "mount container_path", "the root cannot be a mount target")
    source = _source(mount, target, sources)
    # A volume there would stand in for the kernel's answers, AppArmor's label files among them
    # (CVE-2019-16884).
    checks.unsupported(
        target == "/proc" and source != "/proc",
        "mount '/proc'",
        "only the host's /proc can be here",
    )
    propagation = _OPTIONS.get(mount.propagation)
    if propagation is None:
        raise errors.InvalidArgument(
            f"mount {target!r}: propagation {int(mount.propagation)} is not known"
        )
    return oci.Mount(
        destination=target,
        type="bind",
        source=source,
        options=["rbind", propagation, _access(mount), *_restrictions(mount)],
    )


def _source(mount: api.Mount, target: str, sources: Mapping[str, str]) -> str:
    key = imagevolumes.key(mount)
    if mount.HasField("image"):
        return sources.get(key, "")
    checks.unsupported(not mount.host_path, f"mount {target!r}", "host_path is empty")
    return sources.get(key, checks.absolute(mount.host_path, f"mount {target!r}: host_path"))


def _restrictions(mount: api.Mount) -> tuple[str, ...]:
    return imagevolumes.OPTIONS if mount.HasField("image") else ()


def _access(mount: api.Mount) -> str:
    if mount.recursive_read_only:
        return "rro"
    return "ro" if mount.readonly else "rw"


def rootfs_propagation(config: api.ContainerConfig) -> str:
    """Return what the root needs so that mounts pass it: "rshared", "rslave", "" for default."""
    asked = {m.propagation for m in config.mounts}
    for propagation in (
        _Propagation.PROPAGATION_BIDIRECTIONAL,
        _Propagation.PROPAGATION_HOST_TO_CONTAINER,
    ):
        if propagation in asked:
            why.cri("linux.rootfsPropagation", "mounts", "as a mount's propagation needs it")
            return _OPTIONS[propagation]
    return ""


# -- image volumes ---------------------------------------------------------------------------------


def image_volumes(config: api.ContainerConfig, image: types.ImageConfig) -> tuple[str, ...]:
    """Return the image's VOLUMEs at or above which the request mounts nothing.

    What is mounted there is the request's: to put a fresh folder on a part of it would hide, or
    lose, what the pod keeps there. A relative one is taken from the root, and none leaves it
    (CVE-2022-23648). Raises InvalidArgument for the root itself.
    """
    asked = [checks.absolute(m.container_path, "mount container_path") for m in config.mounts]
    paths = [checks.absolute("/" + v, "image VOLUME") for v in image.volumes]
    checks.unsupported("/" in paths, "image VOLUME", "the root cannot be a volume")
    return tuple(p for p in dict.fromkeys(paths) if not any(checks.below(p, a) for a in asked))


def with_volumes(mounts: list[oci.Mount], volumes: Mapping[str, str]) -> list[oci.Mount]:
    """Return the mounts and those of the image's VOLUMEs, sources by target, in order."""
    for target in volumes:
        why.image(f"mounts[{target}]", "config.Volumes", "writable, a copy of what is there")
    options = ["rbind", "rprivate", "rw"]
    made = [
        oci.Mount(destination=target, type="bind", source=source, options=[*options])
        for target, source in volumes.items()
    ]
    return in_order([*made, *mounts])
