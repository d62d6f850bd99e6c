# SPDX-License-Identifier: Apache-2.0
"""The sandbox container of a pod: it holds the PID namespace which the pod's containers share, or
is the sandbox that a handler starts them in.

It is catatonit of the host, alone in a root of its own, and needs no image. Its bundle is a folder
of the pod's files; the shim and the cgroup of the pod take it with them.
"""

import asyncio
import shutil
from pathlib import Path

import msgspec

from cri_server import (
    apparmor,
    cgroups,
    configjson,
    errors,
    handlers,
    host_inputs,
    origins,
    podfiles,
    revisions,
    shims,
    side_by_side,
    sources,
    spec,
    state,
)
from cri_server.pb import api_pb2 as api
from cri_server.spec import why
from shim.pb import shim_pb2


class SandboxContainers:
    """Makes and starts them."""

    def __init__(
        self,
        *,
        live: handlers.Handlers,
        files: podfiles.PodFiles,
        groups: cgroups.Cgroups,
        shim_host: shims.Shims,
        profiles: apparmor.AppArmor,
    ) -> None:
        self._handlers, self._files, self._groups = live, files, groups
        self._shims, self._profiles = shim_host, profiles

    def cgroup(self, pod: state.Pod) -> str:
        """Return the path of its cgroup, below the pod's."""
        return self._groups.container_path(pod.id, pod.config.linux.cgroup_parent, pod.id)

    def needed(self, pod: state.Pod) -> bool:
        """Tell whether a pod has one: to hold a PID namespace, or because its handler wants it."""
        options = pod.config.linux.security_context.namespace_options
        found = self._handlers.find(pod.handler)
        of_handler = found is not None and found.handler.has_sandbox
        if of_handler:
            key = f"[runtimes.{revisions.name_of(pod.handler)}] sandbox"
            why.handler("sandbox.init", key, "each sandbox is a container")
        else:
            shares = "shared by the containers, so a process holds it; else none is needed"
            why.pod("sandbox.init", "linux.security_context.namespace_options.pid", shares)
        return options.pid == api.NamespaceMode.POD or of_handler

    async def check_profiles(self, config: api.PodSandboxConfig, facts: spec.HostFacts) -> None:
        """Load the AppArmor profile; refuse it and the seccomp profile where they are not there,
        also for a pod without such a container: nothing is ignored in silence.

        Raises InvalidArgument that names the field, DeadlineExceeded for a file that cannot be
        read in time.
        """
        context = config.linux.security_context
        await self._profiles.provide_for(context, facts)
        if path := spec.seccomp_path(context):
            await host_inputs.seccomp_profile(path)

    async def start(self, pod: state.Pod) -> int:
        """Start it where the pod has one; return its pid, else 0."""
        if not self.needed(pod):
            return 0
        cgroups_path = self.cgroup(pod)
        await side_by_side.uninterrupted(asyncio.to_thread(self._write_bundle, pod, cgroups_path))
        request = shim_pb2.CreateRequest(
            id=pod.id,
            bundle=str(self._files.bundle(pod.id)),
            cgroups=self._groups.directories(cgroups_path),
        )
        async with self._shims.calling(pod.id) as shim:
            await shim.create(request)
            return (await shim.start(shim_pb2.StartRequest(id=pod.id))).pid

    def _write_bundle(self, pod: state.Pod, cgroups_path: str) -> None:
        """Write its bundle: catatonit from the host, in a root of its own."""
        bundle = self._files.bundle(pod.id)
        bundle.mkdir(mode=0o700)
        podfiles.admit(bundle, podfiles.root_of(pod))
        handler = self._handlers.of(pod.handler)
        copied, machine = handler.kind == "shim", handler.is_machine
        _make_rootfs(bundle / "rootfs", copied=copied, machine=machine)
        with why.recorded() as found:
            document = spec.sandbox(self._input(pod, cgroups_path))
        (bundle / "config.json").write_bytes(msgspec.json.encode(document))
        origins.write(bundle, found)

    def _input(self, pod: state.Pod, cgroups_path: str) -> spec.SandboxInput:
        handler = self._handlers.of(pod.handler)
        allowed = handler.allowed(handler.pod_annotations, pod.config.annotations)
        configjson.note_annotations(allowed, self._handlers.label(pod.handler, "pod_annotations"))
        profile = spec.seccomp_path(pod.config.linux.security_context)
        return spec.SandboxInput(
            id=pod.id,
            config=pod.config,
            rootfs=str(self._files.bundle(pod.id) / "rootfs"),
            init="" if handler.kind == "shim" else _binary(),
            namespaces=self._files.namespaces(pod),
            cgroups_path=cgroups_path,
            host=self._handlers.facts(pod.handler),
            defaults=self._handlers.defaults(pod.handler),
            seccomp_profile=sources.seccomp_profile(profile) if profile else None,
            annotations=allowed,
            limits_pod=handler.limits_pods,
            machine=handler.is_machine,
            pod_files=self._pod_files(pod) if handler.is_machine else spec.PodFiles(),
            hostname=podfiles.own_hostname(pod) if handler.has_guest_kernel else "",
        )

    def _pod_files(self, pod: state.Pod) -> spec.PodFiles:
        _, _, resolv_conf = self._files.paths(pod.id)
        return spec.PodFiles(resolv_conf=resolv_conf, shm=self._files.shm(pod))


def _make_rootfs(rootfs: Path, *, copied: bool, machine: bool) -> None:
    """Make its root: places to mount on, and catatonit, a copy where nothing of the host is in the
    guest.
    """
    rootfs.mkdir(mode=0o755)
    for name in ("proc", "dev", "sys"):
        (rootfs / name).mkdir()
    if machine:
        (rootfs / "etc").mkdir()
        (rootfs / "etc/resolv.conf").touch()
    if copied:
        shutil.copy(_binary(), rootfs / "catatonit")
    else:
        (rootfs / "catatonit").touch()


def _binary() -> str:
    found = shutil.which("catatonit")
    if found is None:
        raise errors.FailedPrecondition(
            "a sandbox container needs catatonit: install it on the host"
        )
    return found
