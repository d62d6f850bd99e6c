# SPDX-License-Identifier: Apache-2.0
"""How the record of a pod looks to CRI: as an item of a list, and as a status. Pure."""

from collections.abc import Sequence

from cri_server import state
from cri_server.pb import api_pb2 as api

READY, NOTREADY = api.PodSandboxState.SANDBOX_READY, api.PodSandboxState.SANDBOX_NOTREADY


def visible(pod: state.Pod) -> bool:
    """Tell whether anybody may know of a pod: not while it is made."""
    return pod.state is not state.PodState.CREATING


def matches(pod: state.Pod, selector: api.PodSandboxFilter) -> bool:
    """Tell whether a visible pod matches every part of a filter; an id may be cut short."""
    if not visible(pod) or not pod.id.startswith(selector.id):
        return False
    if selector.HasField("state") and selector.state.state != _state(pod):
        return False
    labels = pod.config.labels
    return all(labels.get(k) == v for k, v in selector.label_selector.items())


def item(pod: state.Pod) -> api.PodSandbox:
    """Return what a list shows."""
    return api.PodSandbox(
        id=pod.id,
        metadata=pod.config.metadata,
        state=_state(pod),
        created_at=pod.created_at,
        labels=pod.config.labels,
        annotations=pod.config.annotations,
        runtime_handler=pod.runtime_handler,
    )


def status(pod: state.Pod) -> api.PodSandboxStatus:
    """Return all that is known."""
    return api.PodSandboxStatus(
        id=pod.id,
        metadata=pod.config.metadata,
        state=_state(pod),
        created_at=pod.created_at,
        network=_network_status(pod.ips),
        linux=_linux_status(pod.config),
        labels=pod.config.labels,
        annotations=pod.config.annotations,
        runtime_handler=pod.runtime_handler,
    )


def _state(pod: state.Pod) -> "api.PodSandboxState.ValueType":
    return READY if pod.state is state.PodState.READY else NOTREADY


def _network_status(ips: Sequence[str]) -> api.PodSandboxNetworkStatus:
    more = [api.PodIP(ip=ip) for ip in ips[1:]]
    return api.PodSandboxNetworkStatus(ip=ips[0] if ips else "", additional_ips=more)


def _linux_status(config: api.PodSandboxConfig) -> api.LinuxPodSandboxStatus:
    options = config.linux.security_context.namespace_options
    return api.LinuxPodSandboxStatus(namespaces=api.Namespace(options=options))
