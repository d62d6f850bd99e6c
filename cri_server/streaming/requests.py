# SPDX-License-Identifier: Apache-2.0
"""What Exec, Attach and PortForward ask for, checked before a client is given a URL."""

from cri_server import containers, errors, exec, pods, state
from cri_server.pb import api_pb2 as api
from cri_server.streaming import remotecommand, server
from shim.pb import shim_pb2


class Requests:
    """Answers the three RPCs with URLs of the streaming server."""

    def __init__(
        self,
        *,
        pod_host: pods.Pods,
        container_host: containers.Containers,
        exec_host: exec.Exec,
        streaming: server.Server,
    ) -> None:
        self._pods, self._containers, self._exec = pod_host, container_host, exec_host
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
                leaves=wanted.stdin and not (wanted.tty or made.stdin_once),
            )
        )

    def port_forward(self, wanted: api.PortForwardRequest) -> str:
        """Return the URL of a port-forward. Raises InvalidArgument, NotFound, FailedPrecondition
        when the pod is not ready, ResourceExhausted.
        """
        pod = self._pods.record(wanted.pod_sandbox_id)
        if pod.state is not state.PodState.READY:
            raise errors.FailedPrecondition(f"pod sandbox {pod.id[:13]} is not ready")
        for port in wanted.port:
            if not 0 < port < 65536:
                raise errors.InvalidArgument(f"port: {port} is not a port")
        return self._streaming.url(
            server.Forward(pod_id=pod.id, netns=pod.netns, ports=tuple(wanted.port))
        )


def _streams(wanted: api.ExecRequest | api.AttachRequest) -> frozenset[str]:
    if not wanted.container_id:
        raise errors.InvalidArgument("container_id is missing")
    if wanted.tty and wanted.stderr:
        raise errors.InvalidArgument("tty and stderr cannot both be asked for")
    streams = frozenset(n for n in ("stdin", "stdout", "stderr") if getattr(wanted, n))
    if not streams:
        raise errors.InvalidArgument("none of stdin, stdout and stderr is asked for")
    return streams
