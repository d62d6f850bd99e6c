# SPDX-License-Identifier: Apache-2.0
"""The inventory of a sandbox: what it is made of, where no config.json tells.

Only for people (`cri-server explain`); nothing reads it to decide. Values and reasons come from the
functions that decide them, asked once more.
"""

from cri_server import cgroups, podfiles, revisions, spec, state
from cri_server.pb import api_pb2 as api
from cri_server.spec import why


def of(
    pod: state.Pod,
    files: podfiles.PodFiles,
    groups: cgroups.Cgroups,
    *,
    shm_size: int,
    labels: spec.SelinuxLabels,
    init: bool,
) -> dict[str, object]:
    """Return the parts of the sandbox by name; its files exist. `labels` are what its containers
    have in common; `init`: it has a sandbox container.
    """
    wanted = pod.config
    why.pod("sandbox.name", "metadata")
    _note_handler(pod)
    why.pod("sandbox.ports", "port_mappings", "for the CNI plugins")
    return {
        "sandbox": {
            "name": f"{wanted.metadata.namespace}/{wanted.metadata.name}",
            "handler": revisions.name_of(pod.handler),
            "hostname": podfiles.hostname(pod),
            "namespaces": files.namespaces(pod),
            "sysctls": spec.sysctls(wanted),
            "files": files.texts(pod.id),
            "shm": files.shm(pod),
            **_shm_size(wanted, shm_size),
            **_selinux(labels),
            "cgroup_parent": groups.pod_parent(pod.id, wanted.linux.cgroup_parent),
            "ports": [_port(m) for m in wanted.port_mappings],
            "init": init,
        }
    }


def _note_handler(pod: state.Pod) -> None:
    if pod.runtime_handler:
        why.pod("sandbox.handler", "runtime_handler", "of RunPodSandboxRequest")
    else:
        why.handler("sandbox.handler", "[runtime] default", "the request names none")


def _shm_size(wanted: api.PodSandboxConfig, size: int) -> dict[str, object]:
    if spec.own_ipc(wanted):
        return {"shm_size": size}
    field = "linux.security_context.namespace_options.ipc"
    why.pod("sandbox.shm_size", field, "the host's, as it is")
    return {}


def _selinux(labels: spec.SelinuxLabels) -> dict[str, object]:
    """Return the labels by the names that they have in a config.json; none without SELinux."""
    if not labels.process:
        return {}
    return {"selinuxLabel": labels.process, "mountLabel": labels.mount}


def _port(mapping: api.PortMapping) -> str:
    inside = f"{mapping.container_port}/{api.Protocol.Name(mapping.protocol)}"
    outside = f"{mapping.host_ip}:{mapping.host_port}".lstrip(":")
    return f"{outside} to {inside}" if mapping.host_port else inside
