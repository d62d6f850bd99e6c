# SPDX-License-Identifier: Apache-2.0
"""The host inputs of a container: files, devices and images from outside its own root.

    host paths      looked at, without being stuck with one that does not answer; labelled
    images          mounted once for each pod that wants them as volumes
    copies          <bundle>/mounts/: volumes as a pod with a user namespace of its own sees them

A container that asks for none of it costs no look. What is made here goes with the bundle
(`bundles.Bundles.sweep`) or with the pod (`imagevolumes`), whatever a crash leaves of it.
"""

import dataclasses
import os
import posixpath
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from cri_server import (
    apparmor,
    cdi,
    container_plan,
    idmap,
    imagevolumes,
    own_thread,
    podfiles,
    revisions,
    selinux_host,
    selinux_relabel,
    snapshots,
    sources,
    spec,
)
from cri_server.pb import api_pb2 as api
from cri_server.spec import devices, why

LOOK_TIMEOUT = (
    30.0  # seconds to look at host paths: they may lie on dead storage (containerd#10828)
)
LABEL_TIMEOUT = 600.0  # seconds for all files of all volumes that are to be labelled
_SYSFS = "sysfs"  # among copies, whose other names are absolute paths


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class HostInputs:
    """What was found, by what the request calls it (`spec.source_key`); the fields are those of
    `spec.ContainerInput`. `copies` are by path in the container, and so is what they lack.
    """

    mounts: Mapping[str, sources.Source]
    devices: tuple[spec.DeviceNode, ...] = ()
    host_devices: tuple[spec.DeviceNode, ...] = ()
    seccomp: Mapping[str, object] | None = None
    cdi: spec.Injection | None = None
    copies: Mapping[str, idmap.Copy] = dataclasses.field(default_factory=dict)
    locked: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    shortfalls: Mapping[str, Sequence[idmap.Shortfall]] = dataclasses.field(default_factory=dict)

    @property
    def mapped(self) -> dict[str, str]:
        """Where the copies are, by path in the container."""
        return {path: copy.target for path, copy in self.copies.items()}

    @property
    def sysfs(self) -> str:
        """Where our copy of the host's /sys is, "" for none."""
        return self.mapped.get(_SYSFS, "")

    @property
    def plain(self) -> set[str]:
        """The sources that are no folders."""
        found = {source.path for source in self.mounts.values() if not source.directory}
        if self.cdi is not None:
            found |= self.cdi.files | {node.host_path for node in self.cdi.nodes}
        found |= {copy.target for copy in self.copies.values() if not os.path.isdir(copy.target)}
        return found | {node.host_path for node in self.devices}

    @property
    def trees(self) -> list[str]:
        """The sources that are to be there with all that is mounted below them."""
        of_cdi = self.cdi.mounts if self.cdi is not None else ()
        recursive = [m["source"] for m in of_cdi if "rbind" in m["options"]]
        return [*(source.path for source in self.mounts.values()), *recursive]

    @property
    def bound(self) -> list[str]:
        """The sources of all bind mounts."""
        of_cdi = self.cdi.mounts if self.cdi is not None else ()
        more = [m["source"] for m in of_cdi if m["type"] == "bind"]
        return [*(s.path for s in self.mounts.values()), *self.mapped.values(), *more]

    @property
    def images(self) -> set[str]:
        """The sources that are folders of images."""
        return {s.path for key, s in self.mounts.items() if not key.startswith("/")}

    def note_shortfalls(self) -> None:
        """Note what the copies lack, each at the mount where somebody misses it."""
        for path, shortfalls in self.shortfalls.items():
            top = posixpath.normpath(path)
            plain = [f"{s.below} ({s.because})" for s in shortfalls if not s.missing]
            if plain:
                because = f"mounted below it, but not id-mapped: {', '.join(plain)}"
                why.host(f"mounts[{top}]", because, asked="id-mapped with all below")
            for lack in (s for s in shortfalls if s.missing):
                part = f"mounts[{posixpath.join(top, lack.below)}]"
                why.host(part, f"not mounted: {lack.because}", asked="as it is on the host")


class Resolver:
    """Finds what containers get of the host, and makes what must be made for it."""

    def __init__(
        self,
        files: podfiles.PodFiles,
        image_volumes: imagevolumes.ImageVolumes,
        devices: cdi.Registry,
        profiles: apparmor.AppArmor,
    ) -> None:
        self._files, self._image_volumes = files, image_volumes
        self._devices, self._profiles = devices, profiles

    # -- from the host ----------------------------------------------------------------------------

    async def resolve(self, plan: container_plan.ContainerPlan) -> HostInputs:
        """Look at what the host is to give; load the AppArmor profile and label the volumes.

        Raises InvalidArgument, FailedPrecondition for what is not there, DeadlineExceeded when a
        host path does not answer, Unavailable when it did not before and still hangs.
        """
        await self._profiles.provide_for(plan.security, plan.facts)
        found = await self._looked(plan)
        await self._label(plan, found)
        return found

    async def _looked(self, plan: container_plan.ContainerPlan) -> HostInputs:
        """Look at the host paths in a thread of its own; without any, at once."""
        wanted, privileged = plan.config, plan.security.privileged
        asked = wanted.mounts or wanted.devices or spec.cdi_requests(wanted)
        if not (asked or privileged or spec.seccomp_path(plan.security)):
            return HostInputs(mounts={})
        what = "a mount source, device or seccomp profile"
        return await own_thread.run(lambda: self._look(plan), within=LOOK_TIMEOUT, what=what)

    def _look(self, plan: container_plan.ContainerPlan) -> HostInputs:
        wanted, bound = plan.config, plan.ids is not None
        profile, names = spec.seccomp_path(plan.security), spec.cdi_requests(wanted)
        return HostInputs(
            devices=tuple(node for r in spec.device_requests(wanted) for node in _devices(r)),
            host_devices=sources.host_devices() if plan.security.privileged else (),
            seccomp=_seccomp(profile) if profile else None,
            cdi=self._devices.resolve(names, bound=bound) if names else None,
            # Last: it makes the folders of missing sources, which a refusal must not leave.
            mounts=_sources(wanted.mounts),
        )

    async def _label(self, plan: container_plan.ContainerPlan, found: HostInputs) -> None:
        """Have SELinux let the container at what it shares with the pod and the host."""
        own, of_pod = plan.labels, plan.pod_labels
        if not own.mount:
            return

        def label() -> None:
            for part in (own.process, own.mount):
                selinux_host.check(part)
            if own.mount != of_pod.mount:
                self._files.relabel(plan.pod.id, of_pod.shared)
            for mount in plan.config.mounts if own.relabels else ():
                if mount.selinux_relabel and mount.host_path:
                    with own_thread.looking_at(mount.host_path):
                        selinux_relabel.relabel(
                            found.mounts[spec.source_key(mount)].path, own.mount
                        )

        await own_thread.run(label, within=LABEL_TIMEOUT, what="labelling the container's volumes")

    # -- from images ------------------------------------------------------------------------------

    async def add_image_volumes(
        self, plan: container_plan.ContainerPlan, found: HostInputs
    ) -> HostInputs:
        """Mount the images that are volumes, where the pod has not got them yet.

        Raises CriError with the kubelet's prefix.
        """
        places = await self._image_volumes.mount(
            plan.pod.id,
            plan.config,
            plan.volumes,
            plan.pod_labels.mount_options,
            self.mapped(plan),
        )
        added = {k: sources.Source(path=p, directory=True) for k, p in places.items()}
        return dataclasses.replace(found, mounts={**found.mounts, **added})

    def mapped(self, plan: container_plan.ContainerPlan) -> snapshots.Mapped | None:
        """Return whose ids the files of images must show, None for the host's."""
        if plan.ids is None:
            return None
        return snapshots.Mapped(userns=self._files.userns(plan.pod), ids=plan.ids)

    # -- for a pod with a user namespace of its own -----------------------------------------------

    async def add_idmapped_mounts(
        self, plan: container_plan.ContainerPlan, found: HostInputs, bundle: Path
    ) -> HostInputs:
        """Attach below the bundle what the container takes from the host in another shape.

        Raises FailedPrecondition for a volume that cannot be id-mapped, and for one with mounts in
        it where the OCI runtime would leave those out; DeadlineExceeded.
        """
        folder = bundle / "mounts"
        paths = {key: source.path for key, source in found.mounts.items()}
        copies = idmap.of_container(
            plan.config, folder, sources=paths, userns=self._files.userns(plan.pod)
        )
        if not plan.pod.own_network:
            copies[_SYSFS] = idmap.sysfs(folder)
        whole = dataclasses.replace(found, copies=copies)

        def work() -> HostInputs:
            if plan.facts.shallow_binds:
                idmap.check_flat(whole.trees, revisions.name_of(plan.pod.handler))
            shortfalls = idmap.attach(copies, folder) if copies else {}
            locked = {path: idmap.locked(path) for path in whole.bound}
            ours = idmap.locked(os.fspath(bundle))  # one file system with the pods' folders
            locked |= dict.fromkeys(self._files.paths(plan.pod.id), ours)
            return dataclasses.replace(whole, locked=locked, shortfalls=shortfalls)

        return await own_thread.run(work, within=LOOK_TIMEOUT, what="a mount source")


def _sources(wanted: Iterable[api.Mount]) -> Mapping[str, sources.Source]:
    """Look at all sources before the first that is missing is made."""
    there: dict[str, sources.Source | None] = {}
    mounts = [mount for mount in wanted if mount.host_path]
    for mount in mounts:
        with own_thread.looking_at(mount.host_path):
            there[mount.host_path] = sources.find_source(mount)
    missing = (mount for mount in mounts if there[mount.host_path] is None)
    made = {mount.host_path: _made(mount) for mount in missing}
    return {path: found or made[path] for path, found in there.items()}


def _made(mount: api.Mount) -> sources.Source:
    with own_thread.looking_at(mount.host_path):
        return sources.make_source(mount)


def _devices(request: devices.Request) -> Sequence[spec.DeviceNode]:
    with own_thread.looking_at(request.host_path):
        return sources.device_nodes([request])


async def seccomp_profile(path: str) -> Mapping[str, object]:
    """Return what a Localhost profile holds. Raises InvalidArgument, and as `Resolver.resolve`."""
    return await own_thread.run(
        lambda: _seccomp(path), within=LOOK_TIMEOUT, what="a seccomp profile"
    )


def _seccomp(path: str) -> Mapping[str, object]:
    with own_thread.looking_at(path):
        return sources.seccomp_profile(path)
