# SPDX-License-Identifier: Apache-2.0
"""The config.json of a container: filled in from the plan and host inputs, written, changed.

What is in it is decided by pure functions (`spec`); here they get their ContainerInput. Written
once while the container is made; later only its limits change, by rename, so that a crash leaves
the old or the new.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import structlog

from cri_server import (
    cgroups,
    container_plan,
    handlers,
    host_inputs,
    origins,
    podfiles,
    revisions,
    spec,
)
from cri_server.spec import pooled, why

log = structlog.get_logger()
NAME = "config.json"


class ConfigJson:
    """Fills in the documents of containers; one for all."""

    def __init__(
        self, live: handlers.Handlers, *, files: podfiles.PodFiles, groups: cgroups.Cgroups
    ) -> None:
        self._handlers, self._files, self._groups = live, files, groups

    def document(
        self,
        plan: container_plan.ContainerPlan,
        found: host_inputs.HostInputs,
        user: spec.User,
        bundle: Path,
    ) -> Any:
        """Return the document, to be written by `write`; raises as `spec.container`.

        That mount targets are safe is left to `rootfs`.
        """
        document = spec.container(self._input(plan, found, user, bundle))
        found.note_shortfalls()
        self._note_pooled(plan)
        return document

    def _note_pooled(self, plan: container_plan.ContainerPlan) -> None:
        """Say which limits the handler cannot keep, for it can limit the pod alone."""
        name = revisions.name_of(plan.pod.handler)
        if not self._handlers.of(plan.pod.handler).limits_pods:
            return
        of_pod = plan.pod.config.linux.resources
        if loose := pooled.unheld(plan.config.linux.resources, of_pod):
            pooled.note(loose, f"[runtimes.{name}] dialect")
            what = "limits hold for the pod as a whole, not for this container"
            log.warning(what, container=plan.container.id, handler=name, asked=dict(loose))

    def _input(
        self,
        plan: container_plan.ContainerPlan,
        found: host_inputs.HostInputs,
        user: spec.User,
        bundle: Path,
    ) -> spec.ContainerInput:
        pod, container = plan.pod, plan.container
        parent = pod.config.linux.cgroup_parent
        return spec.ContainerInput(
            id=container.id,
            pod_id=pod.id,
            config=plan.config,
            sandbox=pod.config,
            image=plan.image.config,
            user=user,
            namespaces=self._namespaces(plan),
            cgroups_path=self._groups.container_path(pod.id, parent, container.id),
            rootfs=str(bundle / "rootfs"),
            pod_files=self._pod_files(plan),
            hostname=podfiles.hostname(pod),
            host=plan.facts,
            defaults=self._handlers.defaults(pod.handler),
            sources={key: source.path for key, source in found.mounts.items()},
            devices=found.devices,
            cdi=found.cdi,
            host_devices=found.host_devices,
            seccomp_profile=found.seccomp,
            selinux_level=pod.selinux_level,
            annotations=self._annotations(plan),
            ids=plan.ids,
            mapped=found.mapped,
            sysfs=found.sysfs,
            locked=found.locked,
        )

    def _namespaces(self, plan: container_plan.ContainerPlan) -> dict[str, str]:
        """Return the namespaces to join; "pid" with "" is a new one of the container's own."""
        joined = self._files.namespaces(plan.pod)
        pod_init = joined.pop("pid", "")
        match spec.pid_mode(plan.config, plan.pod.config):
            case "own":
                return {**joined, "pid": ""}
            case "pod" if not self._handlers.of(plan.pod.handler).joins_pids:
                return joined
            case "pod":
                return {**joined, "pid": pod_init}
            case "target":
                return {**joined, "pid": f"/proc/{plan.target_pid}/ns/pid"}
            case "host":
                return joined

    def _pod_files(self, plan: container_plan.ContainerPlan) -> spec.PodFiles:
        hostname, hosts, resolv_conf = self._files.paths(plan.pod.id)
        shm = self._files.shm(plan.pod)
        return spec.PodFiles(resolv_conf=resolv_conf, hostname=hostname, hosts=hosts, shm=shm)

    def _annotations(self, plan: container_plan.ContainerPlan) -> dict[str, str]:
        """Return the annotations that the handler's configuration lets through to the runtime."""
        key = plan.pod.handler
        handler = self._handlers.of(key)
        of_pod = handler.allowed(handler.pod_annotations, plan.pod.config.annotations)
        own = handler.allowed(handler.container_annotations, plan.config.annotations)
        note_annotations(of_pod, self._handlers.label(key, "pod_annotations"))
        note_annotations(own, self._handlers.label(key, "container_annotations"))
        return {**of_pod, **own}


def note_annotations(allowed: Iterable[str], key: str) -> None:
    """Note whose configuration lets these annotations through."""
    for name in allowed:
        why.handler(f"annotations[{name}]", key, "let through")


# -- on disk ---------------------------------------------------------------------------------------


def write(bundle: Path, document: Any) -> None:
    """Write the document of a container that nobody knows yet."""
    (bundle / NAME).write_bytes(msgspec.json.encode(document))


def read(bundle: Path) -> Any:
    """Return the document. Raises OSError, msgspec.DecodeError (a ValueError)."""
    return msgspec.json.decode((bundle / NAME).read_bytes())


def limit(
    bundle: Path,
    resources: spec.Resources,
    *,
    oom_score_adj: int,
    found: why.Origins,
) -> None:
    """Write other limits into the document, by rename; blocks. The rest of it stays.

    `found` says where they came from.
    """
    document = read(bundle)
    earlier = document["linux"]["resources"]
    kept = {k: v for k, v in earlier.items() if k not in spec.LIMITS}
    document["linux"]["resources"] = {**kept, **spec.resources_at_start(resources)}
    document["process"]["oomScoreAdj"] = oom_score_adj
    temporary = (bundle / NAME).with_suffix(".tmp")
    temporary.write_bytes(msgspec.json.encode(document))
    temporary.replace(bundle / NAME)
    origins.amend(bundle, found, "as updated")
