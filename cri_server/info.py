# SPDX-License-Identifier: Apache-2.0
"""What the runtime says of itself, and of one pod or container when asked to be verbose.

Nothing here waits: Status is asked every five seconds, and a slow answer makes the node NotReady.
The network's state is the last one that its own poller saw. The `info` maps hold JSON texts, which
`crictl info` and `inspect` print.
"""

import dataclasses
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
from google.protobuf import json_format, message

from cri_server import bundles, cgroups, config, configjson, containers, host, pods, state
from cri_server.network import cni
from cri_server.pb import api_pb2 as api

NAME = "cri-server"
KUBELET_API_VERSION = "0.1.0"  # the kubelet refuses to start with any other (behaviour.md §1.1)


def package_version() -> str:
    return metadata.version("cri-server")


class Info:
    """Answers Version, Status, RuntimeConfig and the two *Status calls."""

    def __init__(
        self,
        *,
        settings: config.Config,
        facts: host.Host,
        groups: cgroups.Cgroups,
        network: cni.Network,
        pod_host: pods.Pods,
        container_host: containers.Containers,
        bundle_host: bundles.Bundles,
    ) -> None:
        self._settings, self._facts, self._groups, self._network = settings, facts, groups, network
        self._pods, self._containers, self._bundles = pod_host, container_host, bundle_host
        self._pod_cidr = ""

    def version(self) -> api.VersionResponse:
        return api.VersionResponse(
            version=KUBELET_API_VERSION,
            runtime_name=NAME,
            runtime_version=package_version(),
            runtime_api_version="v1",
        )

    def runtime_config(self) -> api.RuntimeConfigResponse:
        """Return the cgroup driver; always set, for the enum's zero is SYSTEMD."""
        systemd = self._groups.driver == "systemd"
        driver = api.CgroupDriver.SYSTEMD if systemd else api.CgroupDriver.CGROUPFS
        return api.RuntimeConfigResponse(linux=api.LinuxRuntimeConfiguration(cgroup_driver=driver))

    def update(self, wanted: api.RuntimeConfig) -> None:
        """Remember the node's pod CIDR (CRI UpdateRuntimeConfig); `Status` shows it, plugins bring
        their own.
        """
        self._pod_cidr = wanted.network_config.pod_cidr

    # -- status -----------------------------------------------------------------------------------

    def status(self, *, verbose: bool) -> api.StatusResponse:
        network = self._network.status()
        conditions = [
            self._runtime_condition(),
            api.RuntimeCondition(
                type="NetworkReady",
                status=network.ready,
                reason="" if network.ready else "NetworkPluginNotReady",
                message=network.message,
            ),
        ]
        return api.StatusResponse(
            status=api.RuntimeStatus(conditions=conditions),
            runtime_handlers=[self._handler(name) for name in ("", *self._settings.runtimes)],
            features=api.RuntimeFeatures(
                supplemental_groups_policy=True,
                user_namespaces_host_network=self._user_namespaces(self._settings.runtime.default),
            ),
            info=self._status_info() if verbose else {},
        )

    def _runtime_condition(self) -> api.RuntimeCondition:
        facts = self._facts.runtimes.get(self._settings.runtime.default)
        error = facts.error if facts else "no OCI runtime is installed"
        return api.RuntimeCondition(
            type="RuntimeReady",
            status=not error,
            reason="RuntimeNotUsable" if error else "",
            message=f"{self._settings.runtime.default}: {error}" if error else "",
        )

    def _handler(self, name: str) -> api.RuntimeHandler:
        handler = name or self._settings.runtime.default
        features = api.RuntimeHandlerFeatures(
            recursive_read_only_mounts=self._facts.recursive_read_only(handler),
            user_namespaces=self._user_namespaces(handler),
        )
        return api.RuntimeHandler(name=name, features=features)

    def _user_namespaces(self, handler: str) -> bool:
        return not self._facts.why_no_user_namespaces(handler)

    def _status_info(self) -> dict[str, str]:
        network = self._network.status()
        return {
            "config": _json(dataclasses.asdict(self._settings)),
            "host": _json(self._host()),
            "cniconfig": _json(self._network.info()),
            "lastCNILoadStatus": "OK" if network.ready else network.message,
        }

    def _host(self) -> dict[str, Any]:
        facts = self._facts
        return {
            "kernel": facts.kernel,
            "cgroupMode": facts.hierarchy.mode,
            "cgroupDriver": self._groups.driver,
            "cgroupControllers": facts.controllers,
            "apparmor": facts.apparmor,
            "selinux": facts.selinux is not None,
            "seccomp": facts.seccomp,
            "capSysResource": facts.raises_limits,
            "swapAccounting": facts.swap_accounting,
            "noUserNamespaces": facts.no_user_namespaces,
            "runtimes": {n: dataclasses.asdict(r) for n, r in facts.runtimes.items()},
            "podCIDR": self._pod_cidr,
        }

    # -- pods and containers ----------------------------------------------------------------------

    def pod_status(self, wanted: str, *, verbose: bool) -> api.PodSandboxStatusResponse:
        """Return the pod's status with those of its containers, which spares the kubelet a call for
        each.
        """
        pod = self._pods.record(wanted)
        return api.PodSandboxStatusResponse(
            status=self._pods.status(pod.id),
            containers_statuses=self._containers.statuses(pod.id),
            timestamp=self._pods.now(),
            info={"info": _json(self._pod_info(pod.id))} if verbose else {},
        )

    def _pod_info(self, pod_id: str) -> dict[str, Any]:
        pod = self._pods.record(pod_id)
        return {
            "pid": pod.pid,
            "shimPid": pod.shim_pid,
            "state": pod.state,
            "runtimeHandler": pod.handler,
            "netns": pod.netns,
            "cniResult": pod.network,
            "overhead": _message(state.limits(pod.overhead, pod.config.linux.overhead)),
            "resources": _message(state.limits(pod.resources, pod.config.linux.resources)),
            "config": _message(pod.config),
        }

    def container_status(self, wanted: str, *, verbose: bool) -> api.ContainerStatusResponse:
        container = self._containers.record(wanted)
        return api.ContainerStatusResponse(
            status=self._containers.status(container.id),
            info={"info": _json(self._container_info(container.id))} if verbose else {},
        )

    def _container_info(self, container_id: str) -> dict[str, Any]:
        container = self._containers.record(container_id)
        return {
            "sandboxID": container.pod_id,
            "pid": container.pid,
            "bundle": str(self._bundles.directory(container.id)),
            "cgroupsPath": container.cgroups_path,
            "snapshotter": "overlayfs",
            "snapshotKey": container.id,
            "config": _message(container.config),
            "runtimeSpec": self._spec(container.id),
        }

    def _spec(self, container_id: str) -> Any:
        try:
            return configjson.read(self._bundles.directory(container_id))
        except FileNotFoundError:
            return None


def _message(value: message.Message) -> dict[str, Any]:
    return json_format.MessageToDict(value, preserving_proto_field_name=True)


def _json(value: Mapping[str, Any]) -> str:
    return msgspec.json.encode(value, enc_hook=_plain).decode()


def _plain(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return dict(value)
    raise NotImplementedError(type(value))
