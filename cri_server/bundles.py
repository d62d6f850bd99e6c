# SPDX-License-Identifier: Apache-2.0
"""The bundle of a container: its root file system mounted, its config.json written.

    <state>/containers/<container id>/
        config.json   rootfs/      what the OCI runtime reads
        origins.json               why config.json is as it is: for `cri-server explain`
        exit.json                  what the shim writes when the container has ended
        mounts/                    id-mapped copies of volumes, until it has started

A hostile image must not steer us or the OCI runtime (hazards.md §3): the user is resolved and the
mount targets are made here, inside the mounted root, before any runtime looks at it.

`create` and `remove` are a pair; `remove` takes away whatever is there. What the OCI runtime and
the kernel have of a container is `leftovers`.
"""

import asyncio
import dataclasses
import os
from pathlib import Path
from typing import Any

import structlog

from cri_server import (
    cgroups,
    config,
    configjson,
    container_plan,
    errors,
    handlers,
    host_inputs,
    idmap,
    leftovers,
    origins,
    overlayoptions,
    podfiles,
    rootfs,
    selinux_relabel,
    snapshots,
    spec,
    state,
    steps,
    trees,
    volumes,
)
from cri_server.spec import why
from shim import mounts
from shim.pb import shim_pb2

log = structlog.get_logger()


class Bundles:
    """All bundle directories below `<state>/containers`."""

    def __init__(
        self,
        settings: config.Config,
        *,
        live: handlers.Handlers,
        files: podfiles.PodFiles,
        groups: cgroups.Cgroups,
        layers: snapshots.Snapshots,
        resolver: host_inputs.Resolver,
        leftover_host: leftovers.Leftovers,
    ) -> None:
        self.root = settings.server.state / "containers"
        self._files, self._groups, self._snapshots = files, groups, layers
        self._handlers, self._resolver, self._leftovers = live, resolver, leftover_host
        self._documents = configjson.ConfigJson(live, files=files, groups=groups)

    def directory(self, container_id: str) -> Path:
        return self.root / container_id

    # -- create -----------------------------------------------------------------------------------

    async def create(
        self, plan: container_plan.ContainerPlan, recipe: steps.Steps
    ) -> state.Container:
        """Make the bundle; return the record with the user and the cgroup that it will have.

        Raises InvalidArgument for what the host or the image cannot give, FailedPrecondition for
        snapshot options that the kernel refuses, DeadlineExceeded when a host path does not answer.
        """
        with recipe.step("host paths"):
            found = await self._resolver.resolve(plan)
        if plan.volumes:
            with recipe.step("image volumes"):
                found = await self._resolver.add_image_volumes(plan, found)
        with recipe.step("rootfs"):
            await asyncio.to_thread(self._mount, plan)
        if plan.ids:
            with recipe.step("id-mapped mounts"):
                bundle = self.directory(plan.container.id)
                found = await self._resolver.add_idmapped_mounts(plan, found, bundle)
        with recipe.step("spec"):
            return await asyncio.to_thread(self._furnish, plan, found)

    def _mount(self, plan: container_plan.ContainerPlan) -> None:
        """Mount the root, where nobody but the container's own root can reach it."""
        container, folder = plan.container, self.directory(plan.container.id)
        folder.mkdir(parents=True, mode=0o700)
        podfiles.admit(folder, plan.owner)
        root = folder / "rootfs"
        root.mkdir(mode=0o700)
        words = self._handlers.of(container.handler).snapshot_options
        options = (*plan.labels.mount_options, *overlayoptions.of_mount(words))
        try:
            self._snapshots.mount(
                container.id,
                container.layers,
                root,
                options,
                mapped=self._resolver.mapped(plan),
                volatile=overlayoptions.SYNC not in words,
            )
        except OSError as e:
            if not words:
                raise
            label = self._handlers.label(container.handler, "snapshot_options")
            reason = f"{label}: {', '.join(words)}: {e.strerror}"
            raise errors.FailedPrecondition(reason) from e

    def _furnish(
        self, plan: container_plan.ContainerPlan, found: host_inputs.HostInputs
    ) -> state.Container:
        """Make config.json, what the runtime will mount on, and the notes of why it is so."""
        bundle = self.directory(plan.container.id)
        root = str(bundle / "rootfs")
        with why.recorded() as noted:
            user = rootfs.resolve_user(root, spec.user_request(plan.config, plan.image.config))
            spec.check_user(user, plan.ids, "run_as_user")
            document = self._documents.document(plan, found, user, bundle)
            self._make_places(root, document, plan, found, user)
        configjson.write(bundle, document)
        origins.write(bundle, noted)
        if lowered := origins.lowered(noted):
            log.debug("the host allows less", container=plan.container.id, asked=lowered)
        return dataclasses.replace(
            plan.container,
            uid=user.uid,
            gid=user.gid,
            groups=tuple(document["process"]["user"]["additionalGids"]),  # with those of CDI
            cgroups_path=document["linux"]["cgroupsPath"],
        )

    def _make_places(
        self,
        root: str,
        document: Any,
        plan: container_plan.ContainerPlan,
        found: host_inputs.HostInputs,
        user: spec.User,
    ) -> None:
        """Make mount points, working directory and VOLUMEs; what moves is put right in the mounts
        of the document. A VOLUME that the image has no folder for is the user's, who is to write
        there.
        """
        plain = found.plain | {p for p in self._files.paths(plan.pod.id) if os.path.isfile(p)}
        document["mounts"] = rootfs.make_mountpoints(
            root, document["mounts"], files=plain, images=found.images, owner=plan.owner
        )
        covered = [m["destination"] for m in document["mounts"]]
        rootfs.make_workdir(root, document["process"]["cwd"], covered=covered, owner=plan.owner)
        asked = spec.image_volumes(plan.config, plan.image.config)
        if not asked:
            return
        folder = self._snapshots.volumes(plan.container.id)
        owner = plan.ids.owner(user.uid, user.gid) if plan.ids else (user.uid, user.gid)
        made = volumes.make(root, asked, folder, covered=covered, owner=owner)
        document["mounts"] = spec.with_volumes(document["mounts"], made)
        if made and (label := plan.labels.mount):
            selinux_relabel.relabel(os.path.realpath(folder), label)

    # -- start ------------------------------------------------------------------------------------

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
        """End whatever is there of the container; unmount and delete whatever is there of the
        bundle and its writable layer. Idempotent.
        """
        await self._leftovers.remove(container.handler, container.id, container.cgroups_path)
        await asyncio.to_thread(self.sweep, container.id)

    def sweep(self, container_id: str) -> None:
        """Delete bundle and writable layer; blocks. Needs no free space.

        A link in the bundle's place is not ours: what it leads to stays as it is.
        """
        directory = self.directory(container_id)
        if not directory.is_symlink():
            idmap.remove(directory / "mounts")  # nothing may be deleted while a volume is there
            for target in mounts.mounts_below(os.path.realpath(directory)):
                mounts.unmount(target)
        trees.remove(directory)
        self._snapshots.remove(container_id)
