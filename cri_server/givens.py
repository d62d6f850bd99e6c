# SPDX-License-Identifier: Apache-2.0
"""What a container is given: files, devices and images from outside its own root.

    host paths      looked at, without being stuck with one that does not answer; labelled
    images          mounted once for each pod that wants them as volumes
    copies          <bundle>/mounts/: volumes as a pod with a user namespace of its own sees them

A container that asks for none of it costs no look. What is made here goes with the bundle
(`bundles.Bundles.sweep`) or with the pod (`imagevolumes`), whatever a crash leaves of it.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

from cri_server import (
    apart,
    apparmor,
    cdi,
    idmap,
    imagevolumes,
    labels,
    orders,
    podfiles,
    relabel,
    snapshots,
    sources,
    spec,
)
from cri_server.pb import api_pb2 as api

LOOK_TIMEOUT = (
    30.0  # seconds to look at host paths: they may lie on dead storage (containerd#10828)
)
LABEL_TIMEOUT = 600.0  # seconds for all files of all volumes that are to be labelled
_SYSFS = "sysfs"  # among copies, whose other names are absolute paths


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Givens:
    """What was found, by what the request calls it (`spec.source_key`); the fields are those of
    `spec.ContainerInput`. `copies` are by path in the container.
    """

    mounts: Mapping[str, sources.Source]
    devices: tuple[spec.DeviceNode, ...] = ()
    host_devices: tuple[spec.DeviceNode, ...] = ()
    seccomp: Mapping[str, object] | None = None
    cdi: spec.Injection | None = None
    copies: Mapping[str, idmap.Copy] = dataclasses.field(default_factory=dict)
    locked: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

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
        found |= self.cdi.files if self.cdi is not None else set()
        found |= {copy.target for copy in self.copies.values() if not os.path.isdir(copy.target)}
        return found | {node.host_path for node in self.devices}

    @property
    def images(self) -> set[str]:
        """The sources that are folders of images."""
        return {s.path for key, s in self.mounts.items() if not key.startswith("/")}


class Giver:
    """Finds what containers are given, and makes what must be made for it."""

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

    async def look(self, order: orders.Order) -> Givens:
        """Look at what the host is to give; load the AppArmor profile and label the volumes.

        Raises InvalidArgument, FailedPrecondition for what is not there, DeadlineExceeded when a
        host path does not answer.
        """
        found = await self._looked(order.config)
        await self._profiles.provide_for(order.security, order.facts)
        await self._label(order, found)
        return found

    async def _looked(self, wanted: api.ContainerConfig) -> Givens:
        """Look at the host paths in a thread of its own; without any, at once."""
        privileged = wanted.linux.security_context.privileged
        asked = wanted.mounts or wanted.devices or spec.cdi_requests(wanted)
        if not (asked or privileged or spec.seccomp_path(wanted)):
            return Givens(mounts={})
        what = "a mount source, device or seccomp profile"
        return await apart.call(lambda: self._look(wanted), within=LOOK_TIMEOUT, what=what)

    def _look(self, wanted: api.ContainerConfig) -> Givens:
        profile, names = spec.seccomp_path(wanted), spec.cdi_requests(wanted)
        privileged = wanted.linux.security_context.privileged
        return Givens(
            mounts={m.host_path: sources.check_source(m) for m in wanted.mounts if m.host_path},
            devices=sources.device_nodes(spec.device_requests(wanted)),
            host_devices=sources.host_devices() if privileged else (),
            seccomp=sources.seccomp_profile(profile) if profile else None,
            cdi=self._devices.resolve(names) if names else None,
        )

    async def _label(self, order: orders.Order, found: Givens) -> None:
        """Have SELinux let the container at what it shares with the pod and the host."""
        own, of_pod = order.labels, order.pod_labels
        if not own.mount:
            return

        def label() -> None:
            for part in (own.process, own.mount):
                labels.check(part)
            if own.mount != of_pod.mount:
                self._files.relabel(order.pod.id, of_pod.shared)
            for mount in order.config.mounts:
                if mount.selinux_relabel and mount.host_path:
                    relabel.relabel(found.mounts[spec.source_key(mount)].path, own.mount)

        await apart.call(label, within=LABEL_TIMEOUT, what="labelling the container's volumes")

    # -- from images ------------------------------------------------------------------------------

    async def with_images(self, order: orders.Order, found: Givens) -> Givens:
        """Mount the images that are volumes, where the pod has not got them yet.

        Raises CriError with the kubelet's prefix.
        """
        places = await self._image_volumes.mount(
            order.pod.id,
            order.config,
            order.volumes,
            order.pod_labels.mount_options,
            self.mapped(order),
        )
        added = {k: sources.Source(path=p, directory=True) for k, p in places.items()}
        return dataclasses.replace(found, mounts={**found.mounts, **added})

    def mapped(self, order: orders.Order) -> snapshots.Mapped | None:
        """Return whose ids the files of images must show, None for the host's."""
        if order.ids is None:
            return None
        return snapshots.Mapped(userns=self._files.userns(order.pod), ids=order.ids)

    # -- for a pod with a user namespace of its own -----------------------------------------------

    async def with_copies(self, order: orders.Order, found: Givens, bundle: Path) -> Givens:
        """Attach below the bundle what the container takes from the host in another shape.

        Raises FailedPrecondition for a volume that cannot be id-mapped, and for one with mounts in
        it where the OCI runtime would leave those out; DeadlineExceeded.
        """
        folder = bundle / "mounts"
        paths = {path: source.path for path, source in found.mounts.items()}
        copies = idmap.of_container(
            order.config, folder, sources=paths, userns=self._files.userns(order.pod)
        )
        if not order.pod.own_network:
            copies[_SYSFS] = idmap.sysfs(folder)

        def work() -> dict[str, tuple[str, ...]]:
            if order.facts.shallow_binds:
                idmap.check_flat(paths.values(), order.pod.handler)
            if copies:
                idmap.attach(copies.values(), folder)
            places = [*paths.values(), *(c.target for c in copies.values())]
            locked = {path: idmap.locked(path) for path in places}
            ours = idmap.locked(os.fspath(bundle))  # one file system with the pods' folders
            return locked | dict.fromkeys(self._files.paths(order.pod.id), ours)

        locked = await apart.call(work, within=LOOK_TIMEOUT, what="a mount source")
        return dataclasses.replace(found, copies=copies, locked=locked)
