# SPDX-License-Identifier: Apache-2.0
"""The config.json of a container: filled in from order and givens, written, changed.

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
    givens,
    handlers,
    orders,
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
        self, order: orders.Order, found: givens.Givens, user: spec.User, bundle: Path
    ) -> Any:
        """Return the document, to be written by `write`; raises as `spec.container`.

        That mount targets are safe is left to `rootfs`.
        """
        document = spec.container(self._input(order, found, user, bundle))
        found.note_shortfalls()
        self._note_pooled(order)
        return document

    def _note_pooled(self, order: orders.Order) -> None:
        """Say which limits the handler cannot keep, for it can limit the pod alone."""
        name = revisions.name_of(order.pod.handler)
        if not self._handlers.of(order.pod.handler).limits_pods:
            return
        of_pod = order.pod.config.linux.resources
        if loose := pooled.unheld(order.config.linux.resources, of_pod):
            pooled.note(loose, f"[runtimes.{name}] dialect")
            what = "limits hold for the pod as a whole, not for this container"
            log.warning(what, container=order.container.id, handler=name, asked=dict(loose))

    def _input(
        self, order: orders.Order, found: givens.Givens, user: spec.User, bundle: Path
    ) -> spec.ContainerInput:
        pod, container = order.pod, order.container
        parent = pod.config.linux.cgroup_parent
        return spec.ContainerInput(
            id=container.id,
            pod_id=pod.id,
            config=order.config,
            sandbox=pod.config,
            image=order.image.config,
            user=user,
            namespaces=self._namespaces(order),
            cgroups_path=self._groups.container_path(pod.id, parent, container.id),
            rootfs=str(bundle / "rootfs"),
            pod_files=self._pod_files(order),
            hostname=podfiles.hostname(pod),
            host=order.facts,
            defaults=self._handlers.defaults(pod.handler),
            sources={key: source.path for key, source in found.mounts.items()},
            devices=found.devices,
            cdi=found.cdi,
            host_devices=found.host_devices,
            seccomp_profile=found.seccomp,
            selinux_level=pod.selinux_level,
            annotations=self._annotations(order),
            ids=order.ids,
            mapped=found.mapped,
            sysfs=found.sysfs,
            locked=found.locked,
        )

    def _namespaces(self, order: orders.Order) -> dict[str, str]:
        """Return the namespaces to join; "pid" with "" is a new one of the container's own."""
        joined = self._files.namespaces(order.pod)
        pod_init = joined.pop("pid", "")
        match spec.pid_mode(order.config, order.pod.config):
            case "own":
                return {**joined, "pid": ""}
            case "pod" if not self._handlers.of(order.pod.handler).joins_pids:
                return joined
            case "pod":
                return {**joined, "pid": pod_init}
            case "target":
                return {**joined, "pid": f"/proc/{order.target_pid}/ns/pid"}
            case "host":
                return joined

    def _pod_files(self, order: orders.Order) -> spec.PodFiles:
        hostname, hosts, resolv_conf = self._files.paths(order.pod.id)
        shm = self._files.shm(order.pod)
        return spec.PodFiles(resolv_conf=resolv_conf, hostname=hostname, hosts=hosts, shm=shm)

    def _annotations(self, order: orders.Order) -> dict[str, str]:
        """Return the annotations that the handler's configuration lets through to the runtime."""
        key = order.pod.handler
        handler = self._handlers.of(key)
        of_pod = handler.allowed(handler.pod_annotations, order.pod.config.annotations)
        own = handler.allowed(handler.container_annotations, order.config.annotations)
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
    document["linux"]["resources"] = {**kept, **resources}
    document["process"]["oomScoreAdj"] = oom_score_adj
    temporary = (bundle / NAME).with_suffix(".tmp")
    temporary.write_bytes(msgspec.json.encode(document))
    temporary.replace(bundle / NAME)
    origins.amend(bundle, found, "as updated")
