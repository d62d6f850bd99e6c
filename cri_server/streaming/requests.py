# SPDX-License-Identifier: Apache-2.0
"""What Exec, Attach and PortForward ask for, checked before a client is given a URL."""

import functools

from cri_server import containers, errors, exec, handlers, pods, state
from cri_server.pb import api_pb2 as api
from cri_server.streaming import portforward, remotecommand, server
from shim.pb import shim_pb2


class Requests:
    """Answers the three RPCs with URLs of the streaming server."""

    def __init__(
        self,
        *,
        live: handlers.Handlers,
        pod_host: pods.Pods,
        container_host: containers.Containers,
        exec_host: exec.Exec,
        streaming: server.Server,
    ) -> None:
        self._handlers, self._pods = live, pod_host
        self._containers, self._exec = container_host, exec_host
        self._streaming = streaming

    def exec(self, wanted: api.ExecRequest) -> str:
        """Return the URL of an exec. Raises InvalidArgument, NotFound, FailedPrecondition when the
        container does not run, ResourceExhausted.
        """
        streams = _streams(wanted)
        container = self._containers.running(wanted.container_id)
        start = self._exec.start(container, wanted.cmd, terminal=wanted.tty, stdin=wanted.stdin)
        return self._streaming.url(
            remotecommand.Command(
                pod_id=container.pod_id, start=start, streams=streams, terminal=wanted.tty
            )
        )

    def attach(self, wanted: api.AttachRequest) -> str:
        """Return the URL of an attach. Raises as `exec` does, and InvalidArgument for a terminal
        where the container has none, or none where it has one.
        """
        streams = _streams(wanted)
        container = self._containers.running(wanted.container_id)
        made = container.config
        if wanted.tty != made.tty:
            raise errors.InvalidArgument(f"tty: the container was made with {made.tty}")
        start = shim_pb2.AttachStart(id=container.id, **dict.fromkeys(streams, True))
        return self._streaming.url(
            remotecommand.Attachment(
                pod_id=container.pod_id,
                start=start,
                streams=streams,
                terminal=wanted.tty,
                leaves=wanted.stdin and made.stdin and (wanted.tty or not made.stdin_once),
            )
        )

    def port_forward(self, wanted: api.PortForwardRequest) -> str:
        """Return the URL of a port-forward. Raises InvalidArgument, NotFound, FailedPrecondition
        when the pod is not ready, ResourceExhausted.
        """
        if not wanted.pod_sandbox_id:
            raise errors.InvalidArgument("pod_sandbox_id is missing")
        find = functools.partial(self._place, wanted.pod_sandbox_id)
        find()
        for port in wanted.port:
            if not 0 < port < 65536:
                raise errors.InvalidArgument(f"port: {port} is not a port")
        return self._streaming.url(server.Forward(find=find, ports=tuple(wanted.port)))

    def _place(self, pod_id: str) -> portforward.Place:
        """Return where a pod listens. Raises NotFound, FailedPrecondition when it is not ready."""
        pod = self._pods.record(pod_id)
        if pod.state is not state.PodState.READY:
            raise errors.FailedPrecondition(f"pod sandbox {pod.id[:13]} is not ready")
        found = self._handlers.find(pod.handler)
        has_stack = pod.own_network and found is not None and found.handler.has_guest_kernel
        return portforward.Place(netns=pod.netns, addresses=pod.ips if has_stack else ())


def _streams(wanted: api.ExecRequest | api.AttachRequest) -> frozenset[str]:
    if not wanted.container_id:
        raise errors.InvalidArgument("container_id is missing")
    if wanted.tty and wanted.stderr:
        raise errors.InvalidArgument("tty and stderr cannot both be asked for")
    streams = frozenset(n for n in ("stdin", "stdout", "stderr") if getattr(wanted, n))
    if not streams:
        raise errors.InvalidArgument("none of stdin, stdout and stderr is asked for")
    return streams
