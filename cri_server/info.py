# SPDX-License-Identifier: Apache-2.0
"""What the runtime says of itself, and of one pod or container when asked to be verbose.

Nothing here waits: Status is asked every five seconds, and a slow answer makes the node NotReady.
The network's state is the last one that its own poller saw. The `info` maps hold JSON texts, which
`crictl info` and `inspect` print.
"""

import dataclasses
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
from google.protobuf import json_format, message

from cri_server import (
    bundles,
    cgroups,
    config,
    configjson,
    containers,
    handlers,
    podfiles,
    pods,
    revisions,
    state,
)
from cri_server.network import cni
from cri_server.pb import api_pb2 as api

NAME = "cri-server"
HANDLERS_CONFIGURED = "HandlersConfigured"  # a condition beside CRI's two
KUBELET_API_VERSION = "0.1.0"  # the kubelet refuses to start with any other (behaviour.md §1.1)


def package_version() -> str:
    return metadata.version("cri-server")


class Info:
    """Answers Version, Status, RuntimeConfig and the two *Status calls. Each id may be a unique
    prefix of one.
    """

    def __init__(
        self,
        *,
        settings: config.Config,
        live: handlers.Handlers,
        groups: cgroups.Cgroups,
        network: cni.Network,
        pod_host: pods.Pods,
        container_host: containers.Containers,
        bundle_host: bundles.Bundles,
        pod_files: podfiles.PodFiles,
    ) -> None:
        self._settings, self._handlers = settings, live
        self._groups, self._network = groups, network
        self._pods, self._containers, self._bundles = pod_host, container_host, bundle_host
        self._files = pod_files
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

    def update(self, config: api.RuntimeConfig) -> None:
        """Remember the node's pod CIDR (CRI UpdateRuntimeConfig); `Status` shows it, plugins bring
        their own.
        """
        self._pod_cidr = config.network_config.pod_cidr

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
            self._handlers_condition(),
        ]
        return api.StatusResponse(
            status=api.RuntimeStatus(conditions=conditions),
            runtime_handlers=[self._handler(name) for name in ("", *self._handlers.names)],
            features=api.RuntimeFeatures(
                supplemental_groups_policy=True,
                user_namespaces_host_network=self._user_namespaces(self._handlers.default),
            ),
            info=self._status_info() if verbose else {},
        )

    def _runtime_condition(self) -> api.RuntimeCondition:
        name = self._handlers.default
        facts, now = self._handlers.host_facts.runtimes.get(name), self._handlers.now
        lost = now.refused.get(name, "no OCI runtime is installed")
        error = facts.error if facts else lost
        return api.RuntimeCondition(
            type="RuntimeReady",
            status=not error,
            reason="RuntimeNotUsable" if error else "",
            message=f"{name}: {error}" if error else "",
        )

    def _handlers_condition(self) -> api.RuntimeCondition:
        """Tell of drop-ins that cannot be used; the kubelet only looks at the other two."""
        problems = [p.message for p in self._handlers.problems]
        return api.RuntimeCondition(
            type=HANDLERS_CONFIGURED,
            status=not problems,
            reason="DropInNotUsable" if problems else "",
            message="; ".join(problems),
        )

    def _handler(self, name: str) -> api.RuntimeHandler:
        handler = name or self._handlers.default
        features = api.RuntimeHandlerFeatures(
            recursive_read_only_mounts=self._handlers.host_facts.recursive_read_only(handler),
            user_namespaces=self._user_namespaces(handler),
        )
        return api.RuntimeHandler(name=name, features=features)

    def _user_namespaces(self, handler: str) -> bool:
        return not self._handlers.host_facts.why_no_user_namespaces(handler)

    def _status_info(self) -> dict[str, str]:
        network = self._network.status()
        return {
            "config": _json(dataclasses.asdict(self._settings)),
            "host": _json(self._host()),
            "cniconfig": _json(self._network.info()),
            "handlers": _json(self._handlers_info()),
            "lastCNILoadStatus": "OK" if network.ready else network.message,
            **self._networks(),
        }

    def _handlers_info(self) -> dict[str, Any]:
        now = self._handlers.now
        current = {
            name: {
                "source": r.source,
                "revision": r.key,
                "settings": dataclasses.asdict(r.handler),
                "runtime": dataclasses.asdict(now.facts[r.key]),
            }
            for name, r in now.current.items()
        }
        problems = [dataclasses.asdict(p) for p in now.problems]
        folder = self._settings.drop_ins
        return {"folder": str(folder or ""), "current": current, "problems": problems}

    def _networks(self) -> dict[str, str]:
        """Return the state of the networks of handlers that have their own, by containerd's key."""
        found = {}
        for name in self._handlers.names:
            if place := self._handlers.place(name):
                network = self._network.status(place)
                said = "OK" if network.ready else network.message
                found[f"lastCNILoadStatus.{name}"] = said
        return found

    def _host(self) -> dict[str, Any]:
        facts = self._handlers.host_facts
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
            "podCIDR": self._pod_cidr,
        }

    # -- pods and containers ----------------------------------------------------------------------

    def pod_status(self, pod_id: str, *, verbose: bool) -> api.PodSandboxStatusResponse:
        """Return the pod's status with those of its containers, which spares the kubelet a call for
        each.
        """
        pod = self._pods.record(pod_id)
        return api.PodSandboxStatusResponse(
            status=self._pods.status(pod.id),
            containers_statuses=self._containers.statuses(pod.id),
            timestamp=time.time_ns(),
            info={"info": _json(self._pod_info(pod.id))} if verbose else {},
        )

    def _pod_info(self, pod_id: str) -> dict[str, Any]:
        pod = self._pods.record(pod_id)
        return {
            "pid": pod.pid if pod.state is state.PodState.READY else 0,
            "shimPid": pod.shim_pid,
            "state": pod.state,
            "runtimeHandler": revisions.name_of(pod.handler),
            "handlerRevision": pod.handler,
            "netns": pod.netns,
            "cniResult": pod.network,
            "overhead": _message(state.limits(pod.overhead, pod.config.linux.overhead)),
            "resources": _message(state.limits(pod.resources, pod.config.linux.resources)),
            "config": _message(pod.config),
            "runtimeSpec": self._pod_spec(pod),
        }

    def _pod_spec(self, pod: state.Pod) -> Any:
        """Return the config.json of the sandbox container; of a pod without one what would be in
        it, so that scripts find the namespaces where the peers have them.
        """
        try:
            return configjson.read(self._files.bundle(pod.id))
        except (OSError, ValueError):
            joined = self._files.namespaces(pod).items()
            return {
                "hostname": podfiles.own_hostname(pod),
                "annotations": dict(pod.config.annotations),
                "linux": {"namespaces": [{"type": kind, "path": path} for kind, path in joined]},
            }

    def container_status(self, container_id: str, *, verbose: bool) -> api.ContainerStatusResponse:
        container = self._containers.record(container_id)
        return api.ContainerStatusResponse(
            status=self._containers.status(container.id),
            info={"info": _json(self._container_info(container.id))} if verbose else {},
        )

    def _container_info(self, container_id: str) -> dict[str, Any]:
        container = self._containers.record(container_id)
        return {
            "sandboxID": container.pod_id,
            "pid": 0 if container.finished_at else container.pid,
            "privileged": container.config.linux.security_context.privileged,
            "bundle": str(self._bundles.directory(container.id)),
            "cgroupsPath": container.cgroups_path,
            "snapshotter": "overlayfs",
            "snapshotKey": container.id,
            "config": container_config(container.config),
            "runtimeSpec": self._spec(container.id),
        }

    def _spec(self, container_id: str) -> Any:
        try:
            return configjson.read(self._bundles.directory(container_id))
        except (OSError, ValueError):  # not there, or spoilt
            return None


def container_config(config: api.ContainerConfig) -> dict[str, Any]:
    """Return a config for people: environment values as text, where JSON from proto has base64."""
    shown = _message(config)
    for env, entry in zip(config.envs, shown.get("envs", ()), strict=True):
        entry["value"] = env.value.decode(errors="replace")
    return shown


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
