# SPDX-License-Identifier: Apache-2.0
"""CRI-O's inspection interface, for those who know no other: cAdvisor, also the one in the kubelet.

    GET /info               where images and containers are, and who makes cgroups
    GET /containers/<id>    one container, or a pod as its container "POD"

cAdvisor takes a cgroup whose name begins with `crio` and has an id of 64 digits for CRI-O's, asks
here whose it is, and reads the rest by itself. A pod's network it reads from the pid of the
container "POD": a pod without a sandbox container has a running container's, as CRI-O does it.

The socket is HTTP (`localhttp`) and off by default. Nothing here waits or changes anything.
"""

from pathlib import Path

import msgspec

from cri_server import cgroups, config, containers, errors, localhttp, names, pods, snapshots, state

CONTAINER_NAME = "io.kubernetes.container.name"
# Of "overlay" cAdvisor would measure writable layers by itself, where CRI-O keeps them.
STORAGE_DRIVER = "overlayfs"


class _IdMap(msgspec.Struct, frozen=True, kw_only=True):
    container_id: int = 0
    host_id: int = 0
    size: int = (1 << 32) - 1


class _IdMaps(msgspec.Struct, frozen=True, kw_only=True):
    uids: tuple[_IdMap, ...] = (_IdMap(),)
    gids: tuple[_IdMap, ...] = (_IdMap(),)


class Info(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of /info, with CRI-O's names."""

    storage_driver: str
    storage_root: str
    storage_image: str
    cgroup_driver: str
    default_id_mappings: _IdMaps = _IdMaps()


class Container(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of /containers/<id>, with CRI-O's names; `created_time` in nanoseconds."""

    name: str
    pid: int
    image: str
    image_ref: str
    created_time: int
    labels: dict[str, str]
    annotations: dict[str, str]
    crio_annotations: dict[str, str]
    log_path: str
    root: str
    sandbox: str
    ip_addresses: tuple[str, ...]
    host_network: bool


class Crio:
    """Answers as CRI-O would."""

    def __init__(
        self,
        *,
        settings: config.Config,
        pod_host: pods.Pods,
        container_host: containers.Containers,
        groups: cgroups.Cgroups,
        layers: snapshots.Snapshots,
    ) -> None:
        self._settings, self._groups, self._layers = settings, groups, layers
        self._pods, self._containers = pod_host, container_host

    def server(self) -> localhttp.Server:
        """Return the server of the configured socket."""
        return localhttp.Server(Path(self._settings.server.crio_socket), self.answer)

    def answer(self, path: str) -> localhttp.Answer:
        """Return what a GET of `path` is answered with."""
        if path == "/info":
            return _json(self.info())
        folder, _, wanted = path.rpartition("/")
        if folder != "/containers":
            return localhttp.Answer(status=404, body=b"/info and /containers/<id> are served\n")
        try:
            return _json(self.container(wanted))
        except (errors.NotFound, errors.InvalidArgument) as e:
            return localhttp.Answer(status=404, body=f"{e.message}\n".encode())

    def info(self) -> Info:
        root = str(self._layers.root)
        return Info(
            storage_driver=STORAGE_DRIVER,
            storage_root=root,
            storage_image=root,
            cgroup_driver=self._groups.driver,
        )

    def container(self, wanted: str) -> Container:
        """Return a container, or a pod as a container. Raises NotFound, InvalidArgument."""
        try:
            return self._container(self._containers.record(wanted))
        except errors.NotFound:
            return self._pod(self._pods.record(wanted))

    def _container(self, container: state.Container) -> Container:
        pod, own = self._pods.record(container.pod_id), container.config
        return Container(
            name=names.kubernetes(own.metadata.name, pod.config.metadata, own.metadata.attempt),
            pid=0 if container.finished_at else container.pid,
            image=container.image_name,
            image_ref=container.image_id,
            created_time=container.created_at,
            labels=dict(own.labels),
            annotations=dict(own.annotations),
            crio_annotations={},
            log_path=container.log_path,
            root=str(self._layers.writable(container.id)),
            sandbox=pod.id,
            ip_addresses=pod.ips,
            host_network=not pod.own_network,
        )

    def _pod(self, pod: state.Pod) -> Container:
        m = pod.config.metadata
        return Container(
            name=names.kubernetes(names.POD, m, m.attempt),
            pid=self._pid(pod),
            image="",
            image_ref="",
            created_time=pod.created_at,
            labels={**pod.config.labels, CONTAINER_NAME: names.POD},
            annotations=dict(pod.config.annotations),
            crio_annotations={},
            log_path="",
            root="",
            sandbox=pod.id,
            ip_addresses=pod.ips,
            host_network=not pod.own_network,
        )

    def _pid(self, pod: state.Pod) -> int:
        """Return a pid in the pod's network: its sandbox container's, else any other's; 0 without
        one.
        """
        inside = self._containers.of_pod(pod.id)
        return pod.pid or next((c.pid for c in inside if c.pid and not c.finished_at), 0)


def _json(value: msgspec.Struct) -> localhttp.Answer:
    return localhttp.Answer(type="application/json", body=msgspec.json.encode(value))
