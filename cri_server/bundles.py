# SPDX-License-Identifier: Apache-2.0
"""The bundle of a container: its root file system mounted, its config.json written.

    <state>/containers/<container id>/
        config.json   rootfs/      what the OCI runtime reads
        origins.json               why config.json is as it is: for `cri-server explain`
        exit.json                  what the shim writes when the container has ended
        mounts/                    id-mapped copies of volumes, until it has started

A hostile image must not steer us or the OCI runtime (hazards.md §3): the user is resolved and the
mount targets are made here, inside the mounted root, before any runtime looks at it.

`create` and `remove` are a pair; `remove` takes away whatever is there. `bury` and `destroy` are
for what lost its shim.
"""

import asyncio
import dataclasses
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec
import structlog
from google.protobuf import json_format

from cri_server import (
    apart,
    apparmor,
    capability,
    cdi,
    cgroups,
    commands,
    config,
    errors,
    host,
    idmap,
    imagevolumes,
    labels,
    limits,
    names,
    origins,
    podfiles,
    relabel,
    rootfs,
    snapshots,
    sources,
    spec,
    state,
    steps,
    volumes,
)
from cri_server.images import store as images
from cri_server.pb import api_pb2 as api
from cri_server.spec import why
from shim import mounts, process
from shim.pb import shim_pb2

log = structlog.get_logger()
LOOK_TIMEOUT = (
    30.0  # seconds to look at host paths: they may lie on dead storage (containerd#10828)
)
LABEL_TIMEOUT = 600.0  # seconds for all files of all volumes that are to be labelled
KILL_TIMEOUT = 10.0
_SYSFS = "sysfs"  # among copies, whose other names are absolute paths


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """All that a bundle is made of. `target_pid` is whose PID namespace is joined, 0 for none;
    `volumes` are the images that the config's mounts name, by id.
    """

    pod: state.Pod
    container: state.Container
    image: images.Image
    target_pid: int = 0
    volumes: Mapping[str, images.Image] = dataclasses.field(default_factory=dict)

    @property
    def config(self) -> api.ContainerConfig:
        return self.container.config

    @property
    def ids(self) -> spec.IdMap | None:
        """What the pod's own user namespace maps."""
        return spec.ids(self.pod.config)

    @property
    def owner(self) -> tuple[int, int]:
        """Uid and gid of the container's root on the host."""
        return podfiles.root_of(self.pod)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Host:
    """What the container takes from the host, looked at."""

    mounts: Mapping[str, sources.Source]
    devices: tuple[spec.DeviceNode, ...]
    host_devices: tuple[spec.DeviceNode, ...]
    seccomp: Mapping[str, object] | None
    copies: Mapping[str, idmap.Copy] = dataclasses.field(default_factory=dict)
    locked: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    cdi: spec.Injection | None = None


class Bundles:
    """All bundle directories below `<state>/containers`."""

    def __init__(
        self,
        settings: config.Config,
        *,
        files: podfiles.PodFiles,
        groups: cgroups.Cgroups,
        layers: snapshots.Snapshots,
        image_volumes: imagevolumes.ImageVolumes,
        facts: host.Host,
    ) -> None:
        self.root = settings.server.state / "containers"
        self._settings, self._files, self._groups = settings, files, groups
        self._snapshots, self._image_volumes, self._facts = layers, image_volumes, facts
        self._apparmor = apparmor.AppArmor()
        self._cdi = cdi.Registry(settings.runtime.cdi_spec_dirs)

    def directory(self, container_id: str) -> Path:
        return self.root / container_id

    # -- create -----------------------------------------------------------------------------------

    async def create(self, wanted: Request, recipe: steps.Steps) -> state.Container:
        """Make the bundle; return the record with the user and the cgroup that it will have.

        Raises InvalidArgument for what the host or the image cannot give, DeadlineExceeded when a
        host path does not answer.
        """
        with recipe.step("host paths"):
            found = await _looked(wanted.config, self._cdi)
            await self.load_apparmor(wanted.config.linux.security_context, wanted.pod.handler)
            await self._label(wanted, found)
        if wanted.volumes:
            with recipe.step("image volumes"):
                found = await self._with_images(wanted, found)
        with recipe.step("rootfs"):
            await asyncio.to_thread(self._mount, wanted)
        if wanted.ids:
            with recipe.step("id-mapped mounts"):
                found = await self._mapped(wanted, found)
        with recipe.step("spec"):
            return await asyncio.to_thread(self._prepare, wanted, found)

    async def _with_images(self, wanted: Request, found: _Host) -> _Host:
        options = self._pod_labels(wanted.pod).mount_options
        places = await self._image_volumes.mount(
            wanted.pod.id, wanted.config, wanted.volumes, options, self._userns(wanted)
        )
        added = {k: sources.Source(path=p, directory=True) for k, p in places.items()}
        return dataclasses.replace(found, mounts={**found.mounts, **added})

    async def load_apparmor(
        self,
        context: api.LinuxContainerSecurityContext | api.LinuxSandboxSecurityContext,
        handler: str,
    ) -> None:
        """See to it that the AppArmor profile that is asked for is loaded; else InvalidArgument."""
        name = spec.apparmor_profile(context, self._facts.facts(handler))
        if name:
            await self._apparmor.provide(name)

    async def _label(self, wanted: Request, found: _Host) -> None:
        """Have SELinux let the container at what it shares with the pod and the host."""
        own, of_pod = self._labels(wanted), self._pod_labels(wanted.pod)
        if not own.mount:
            return

        def label() -> None:
            for part in (own.process, own.mount):
                labels.check(part)
            if own.mount != of_pod.mount:
                self._files.relabel(wanted.pod.id, of_pod.shared)
            for mount in wanted.config.mounts:
                if mount.selinux_relabel and mount.host_path:
                    relabel.relabel(found.mounts[spec.source_key(mount)].path, own.mount)

        await apart.call(label, within=LABEL_TIMEOUT, what="labelling the container's volumes")

    def _labels(self, wanted: Request) -> spec.Labels:
        pod, context = wanted.pod, wanted.config.linux.security_context
        facts = self._facts.facts(pod.handler)
        return spec.labels_of_container(context, pod.config, pod.selinux_level, facts)

    def _pod_labels(self, pod: state.Pod) -> spec.Labels:
        return spec.labels_of_pod(pod.config, pod.selinux_level, self._facts.facts(pod.handler))

    def _mount(self, wanted: Request) -> None:
        """Mount the root, where nobody but the container's own root can reach it."""
        container, folder = wanted.container, self.directory(wanted.container.id)
        folder.mkdir(parents=True, mode=0o700)
        podfiles.admit(folder, wanted.owner)
        root = folder / "rootfs"
        root.mkdir(mode=0o700)
        options = self._labels(wanted).mount_options
        self._snapshots.mount(
            container.id, container.layers, root, options, mapped=self._userns(wanted)
        )

    def _userns(self, wanted: Request) -> snapshots.Mapped | None:
        """Return whose ids the files of images must show, None for the host's."""
        if wanted.ids is None:
            return None
        return snapshots.Mapped(userns=self._files.userns(wanted.pod), ids=wanted.ids)

    async def _mapped(self, wanted: Request, found: _Host) -> _Host:
        """Attach what the container takes from the host in the shape in which it may have it."""
        folder = self.directory(wanted.container.id) / "mounts"
        sources = {path: source.path for path, source in found.mounts.items()}
        copies = idmap.of_container(
            wanted.config, folder, sources=sources, userns=self._files.userns(wanted.pod)
        )
        if not wanted.pod.own_network:
            copies[_SYSFS] = idmap.sysfs(folder)

        shallow = self._facts.facts(wanted.pod.handler).shallow_binds

        def work() -> dict[str, tuple[str, ...]]:
            if shallow:
                idmap.check_flat(sources.values(), wanted.pod.handler)
            if copies:
                idmap.attach(copies.values(), folder)
            paths = [*sources.values(), *(c.target for c in copies.values()), str(self.root)]
            return {path: idmap.locked(path) for path in paths}

        locked = await apart.call(work, within=LOOK_TIMEOUT, what="a mount source")
        return dataclasses.replace(found, copies=copies, locked=locked)

    def _prepare(self, wanted: Request, found: _Host) -> state.Container:
        """Make config.json and origins.json."""
        with why.recorded() as found_out:
            container = self._write(wanted, found)
        origins.write(self.directory(wanted.container.id), found_out)
        if lowered := origins.lowered(found_out):
            log.debug("the host allows less", container=container.id, asked=lowered)
        return container

    def _write(self, wanted: Request, found: _Host) -> state.Container:
        """Resolve the user, write config.json, make what the runtime will mount on."""
        root = str(self.directory(wanted.container.id) / "rootfs")
        user = rootfs.resolve_user(root, spec.user_request(wanted.config, wanted.image.config))
        spec.check_user(user, wanted.ids, "run_as_user")
        document = spec.container(self._input(wanted, found, user))
        plain = {s.path for s in found.mounts.values() if not s.directory}
        plain |= found.cdi.files if found.cdi is not None else set()
        plain |= {str(p) for p in self._pod_files(wanted.pod) if Path(p).is_file()}
        plain |= {c.target for c in found.copies.values() if not os.path.isdir(c.target)}
        plain |= {node.host_path for node in found.devices}
        images = {s.path for key, s in found.mounts.items() if not key.startswith("/")}
        owner = wanted.owner
        document["mounts"] = rootfs.make_mountpoints(
            root, document["mounts"], files=plain, images=images, owner=owner
        )
        covered = [m["destination"] for m in document["mounts"]]
        rootfs.make_workdir(root, document["process"]["cwd"], covered=covered, owner=owner)
        if asked := spec.image_volumes(wanted.config, wanted.image.config):  # last: it copies
            folder = self._snapshots.volumes(wanted.container.id)
            made = volumes.make(root, asked, folder, covered=covered, owner=owner)
            document["mounts"] = spec.with_volumes(document["mounts"], made)
            if made and (label := self._labels(wanted).mount):
                relabel.relabel(os.path.realpath(folder), label)
        path = self.directory(wanted.container.id) / "config.json"
        path.write_bytes(msgspec.json.encode(document))
        return dataclasses.replace(
            wanted.container,
            uid=user.uid,
            gid=user.gid,
            groups=tuple(document["process"]["user"]["additionalGids"]),  # with those of CDI
            cgroups_path=document["linux"]["cgroupsPath"],
        )

    def _input(self, wanted: Request, found: _Host, user: spec.User) -> spec.ContainerInput:
        pod, container = wanted.pod, wanted.container
        resolv_conf, hostname, hosts = self._pod_files(pod)
        parent = pod.config.linux.cgroup_parent
        return spec.ContainerInput(
            id=container.id,
            pod_id=pod.id,
            config=wanted.config,
            sandbox=pod.config,
            image=wanted.image.config,
            user=user,
            namespaces=self._namespaces(wanted),
            cgroups_path=self._groups.container_path(pod.id, parent, container.id),
            rootfs=str(self.directory(container.id) / "rootfs"),
            pod_files=spec.PodFiles(
                resolv_conf=resolv_conf, hostname=hostname, hosts=hosts, shm=self._files.shm(pod)
            ),
            hostname=podfiles.hostname(pod),
            host=self._facts.facts(pod.handler),
            defaults=self._defaults(pod.handler),
            sources={key: source.path for key, source in found.mounts.items()},
            devices=found.devices,
            cdi=found.cdi,
            host_devices=found.host_devices,
            seccomp_profile=found.seccomp,
            selinux_level=pod.selinux_level,
            annotations=self._annotations(wanted),
            ids=wanted.ids,
            mapped={path: copy.target for path, copy in found.copies.items()},
            sysfs="" if pod.own_network or not wanted.ids else found.copies[_SYSFS].target,
            locked=self._locked(wanted, found),
        )

    def _defaults(self, handler: str) -> spec.Defaults:
        wanted = self._settings.handler(handler)
        return spec.Defaults(
            capabilities=capability.chosen(wanted.default_capabilities),
            rlimits=limits.rlimits(wanted.default_rlimits),
        )

    def _locked(self, wanted: Request, found: _Host) -> dict[str, tuple[str, ...]]:
        """Return the flags of sources that stay, also of the pod's files, by path."""
        if not wanted.ids:
            return {}
        ours = found.locked[str(self.root)]  # one file system with the pods' folders
        return {**found.locked, **dict.fromkeys(self._pod_files(wanted.pod), ours)}

    def _annotations(self, wanted: Request) -> dict[str, str]:
        """Return the annotations that the handler's configuration lets through to the runtime."""
        handler = self._settings.handler(wanted.pod.handler)
        of_pod = handler.allowed(handler.pod_annotations, wanted.pod.config.annotations)
        own = handler.allowed(handler.container_annotations, wanted.config.annotations)
        note_annotations(of_pod, wanted.pod.handler, "pod_annotations")
        note_annotations(own, wanted.pod.handler, "container_annotations")
        return {**of_pod, **own}

    def _namespaces(self, wanted: Request) -> dict[str, str]:
        """Return the namespaces to join; "pid" with "" is a new one of the container's own."""
        joined = self._files.namespaces(wanted.pod)
        pod_init = joined.pop("pid", "")
        match spec.pid_mode(wanted.config, wanted.pod.config):
            case "own":
                return {**joined, "pid": ""}
            case "pod":
                return {**joined, "pid": pod_init}
            case "target":
                return {**joined, "pid": f"/proc/{wanted.target_pid}/ns/pid"}
            case "host":
                return joined

    def _pod_files(self, pod: state.Pod) -> tuple[str, str, str]:
        directory = self._files.directory(pod.id)
        return (
            str(directory / "resolv.conf"),
            str(directory / "hostname"),
            str(directory / "hosts"),
        )

    def request(self, container: state.Container, pod: state.Pod) -> shim_pb2.CreateRequest:
        """Return what the shim must know to run the bundle."""
        wanted = container.config
        uid, gid = podfiles.root_of(pod)
        return shim_pb2.CreateRequest(
            id=container.id,
            bundle=str(self.directory(container.id)),
            log_path=container.log_path,
            terminal=wanted.tty,
            stdin=wanted.stdin,
            stdin_once=wanted.stdin_once,
            cgroups=self._groups.directories(container.cgroups_path),
            uid=uid,
            gid=gid,
        )

    def limit(
        self,
        container_id: str,
        resources: spec.Resources,
        *,
        oom_score_adj: int | None,
        found: why.Origins,
    ) -> None:
        """Write other limits into config.json, by rename; blocks. The rest of it stays.

        `found` says where they came from; an `oom_score_adj` of None leaves it as it is.
        """
        path = self.directory(container_id) / "config.json"
        document = msgspec.json.decode(path.read_bytes())
        earlier = document["linux"]["resources"]
        kept = {k: v for k, v in earlier.items() if k not in spec.LIMITS}
        document["linux"]["resources"] = {**kept, **resources}
        if oom_score_adj is not None:
            document["process"]["oomScoreAdj"] = oom_score_adj
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(msgspec.json.encode(document))
        temporary.replace(path)
        origins.amend(path.parent, found, "as updated")

    async def let_go(self, container_id: str) -> None:
        """Unmount our copies of a container's volumes, which it does not need once it has started.

        What cannot be unmounted is logged and left to `remove`.
        """
        folder = self.directory(container_id) / "mounts"
        if folder.exists():
            try:
                await asyncio.to_thread(idmap.remove, folder)
            except OSError as e:
                log.warning("id-mapped mounts stay", container=container_id, error=str(e))

    # -- remove -----------------------------------------------------------------------------------

    async def remove(self, container: state.Container) -> None:
        """Unmount and delete whatever is there of the bundle and its writable layer. Idempotent."""
        if self._known(container.handler, container.id, container.cgroups_path):
            await self.destroy(container.handler, container.id, container.cgroups_path)
        await asyncio.to_thread(self.sweep, container.id)

    def sweep(self, container_id: str) -> None:
        """Do the work of `remove`; blocks. Needs no free space."""
        directory = self.directory(container_id)
        idmap.remove(directory / "mounts")  # nothing may be deleted while a volume is there
        for target in mounts.mounts_below(os.path.realpath(directory)):
            mounts.unmount(target)
        if directory.exists():
            shutil.rmtree(directory)
        self._snapshots.remove(container_id)

    # -- without a shim ---------------------------------------------------------------------------

    async def bury(self, container: state.Container) -> shim_pb2.ExitRecord:
        """End a container whose shim is gone; return the shim's exit record or the lost one's.

        Raises DeadlineExceeded when it cannot be killed. A runtime that fails is left to `remove`.
        """
        await self._kill(container.handler, container.id, container.cgroups_path)
        try:
            await self._forget(container.handler, container.id, container.cgroups_path)
        except errors.CriError as e:
            log.warning("runtime does not forget", container=container.id, error=e.message)
        try:
            text = (self.directory(container.id) / "exit.json").read_text()
            return json_format.Parse(text, shim_pb2.ExitRecord(), ignore_unknown_fields=True)
        except (OSError, ValueError, json_format.ParseError):
            return shim_pb2.ExitRecord(
                exit_code=255,
                finished_at=time.time_ns(),
                reason="Unknown",
                message="the exit code was lost with the shim",
            )

    async def destroy(self, handler: str, container_id: str, cgroups_path: str) -> None:
        """Kill what is in a container's cgroup and have the OCI runtime forget the container."""
        await self._kill(handler, container_id, cgroups_path)
        await self._forget(handler, container_id, cgroups_path)

    def in_runtimes(self) -> list[tuple[str, str]]:
        """Return handler and id of every container that an OCI runtime has state of."""
        places = (self._settings.server.state / "runtimes").glob("*/*")
        return [(p.parent.name, p.name) for p in places if names.is_id(p.name)]

    async def destroy_unrecorded(self, handler: str, container_id: str) -> None:
        """Do the work of `destroy` for a container of which only the bundle tells."""
        try:
            text = (self.directory(container_id) / "config.json").read_bytes()
            cgroups_path = str(msgspec.json.decode(text)["linux"]["cgroupsPath"])
        except (OSError, ValueError, TypeError, KeyError):
            cgroups_path = ""
        await self.destroy(handler, container_id, cgroups_path)

    async def _kill(self, handler: str, container_id: str, cgroups_path: str) -> None:
        """Kill an OCI runtime that is still at work on the container, and what is in its cgroup."""
        deadline = time.monotonic() + KILL_TIMEOUT
        words = self._runtime_root(handler), container_id
        while await asyncio.to_thread(
            lambda: process.kill_orphans(*words) or self._groups.kill(cgroups_path)
        ):
            if time.monotonic() > deadline:
                raise errors.DeadlineExceeded(f"container {container_id[:13]} cannot be killed")
            await asyncio.sleep(0.02)

    async def _forget(self, handler: str, container_id: str, cgroups_path: str) -> None:
        if not self._known(handler, container_id, cgroups_path):
            return
        path, root = self._settings.handler(handler).path, self._runtime_root(handler)
        argv = [path, "--root", root, "delete", "--force", container_id]
        await commands.run(argv, timeout=self._settings.runtime.runtime_timeout)
        await asyncio.to_thread(self._groups.remove_all, cgroups_path)

    def _known(self, handler: str, container_id: str, cgroups_path: str) -> bool:
        """Say whether the runtime, or a cgroup, still has something of the container."""
        places = [f"{self._runtime_root(handler)}/{container_id}"]
        places += self._groups.directories(cgroups_path).values() if cgroups_path else []
        return any(map(os.path.exists, places))

    def _runtime_root(self, handler: str) -> str:
        return str(self._settings.server.state / "runtimes" / handler)


def note_annotations(allowed: Iterable[str], handler: str, key: str) -> None:
    for name in allowed:
        why.handler(f"annotations[{name}]", f"[runtimes.{handler}] {key}", "let through")


async def _looked(wanted: api.ContainerConfig, registry: cdi.Registry) -> _Host:
    """Look at the host paths without being stuck with them; without any, at once."""
    privileged = wanted.linux.security_context.privileged
    asked = wanted.mounts or wanted.devices or spec.cdi_requests(wanted)
    if not (asked or privileged or spec.seccomp_path(wanted)):
        return _Host(mounts={}, devices=(), host_devices=(), seccomp=None)
    what = "a mount source, device or seccomp profile"
    return await apart.call(lambda: _look(wanted, registry), within=LOOK_TIMEOUT, what=what)


def _look(wanted: api.ContainerConfig, registry: cdi.Registry) -> _Host:
    profile, names = spec.seccomp_path(wanted), spec.cdi_requests(wanted)
    return _Host(
        mounts={m.host_path: sources.check_source(m) for m in wanted.mounts if m.host_path},
        devices=sources.device_nodes(spec.device_requests(wanted)),
        host_devices=sources.host_devices() if wanted.linux.security_context.privileged else (),
        seccomp=sources.seccomp_profile(profile) if profile else None,
        cdi=registry.resolve(names) if names else None,
    )
