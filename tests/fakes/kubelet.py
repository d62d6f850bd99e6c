# SPDX-License-Identifier: Apache-2.0
"""A CRI client shaped like the kubelet: the same calls, in the same order, with the same fields
filled in.

It keeps no state but the names it has given: what exists is what the server lists. Works with any
CRI v1 socket, so that the same tests can be held against another runtime. Errors are
`grpc.RpcError`.
"""

import itertools
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import grpc

from cri_server.pb import api_pb2 as api
from cri_server.pb import api_pb2_grpc as rpc
from tests.lab import waiting

MESSAGE_LIMIT = 16 << 20  # the kubelet's
CALL_TIMEOUT = waiting.patient(60.0)
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Pod:
    """A sandbox and the configuration that CreateContainer has to be given again."""

    id: str
    config: api.PodSandboxConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class LogLine:
    """One line of a CRI log file: RFC 3339 time, stream, tag ("P" or "F"), text without the
    newline.
    """

    time: str
    stream: str
    tag: str
    text: str


class _Deadlines(grpc.UnaryUnaryClientInterceptor):
    """Give every call without a time-out the default one: a hung server fails a test, never the
    run.
    """

    def intercept_unary_unary(
        self,
        continuation: Callable[[grpc.ClientCallDetails, T], Any],
        client_call_details: Any,
        request: T,
    ) -> Any:
        if client_call_details.timeout is None:
            client_call_details = client_call_details._replace(timeout=CALL_TIMEOUT)
        return continuation(client_call_details, request)


class Kubelet:
    """Calls one CRI endpoint. `runtime` and `images` are the plain stubs; the rest are recipes."""

    def __init__(self, endpoint: str, *, cgroup_parent: str = "", prefix: str = "pod") -> None:
        limits = [
            ("grpc.max_receive_message_length", MESSAGE_LIMIT),
            ("grpc.default_authority", "localhost"),
        ]
        self.endpoint, self.cgroup_parent, self.prefix = endpoint, cgroup_parent, prefix
        self._plain = grpc.insecure_channel(endpoint, options=limits)
        channel = grpc.intercept_channel(self._plain, _Deadlines())
        self.runtime, self.images = rpc.RuntimeServiceStub(channel), rpc.ImageServiceStub(channel)
        self.streams = rpc.RuntimeServiceStub(self._plain)
        self._numbers = itertools.count(1)
        self._logs = tempfile.TemporaryDirectory(prefix="cri-logs-", ignore_cleanup_errors=True)

    def close(self) -> None:
        """Close the channel and remove the log folders; pods are not touched."""
        self._plain.close()
        self._logs.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    # -- images ------------------------------------------------------------------------------------

    def pull(self, reference: str, *, auth: api.AuthConfig | None = None) -> str:
        """Pull and return the image id."""
        request = api.PullImageRequest(image=api.ImageSpec(image=reference), auth=auth)
        return self.images.PullImage(request, timeout=300).image_ref

    def image_status(self, reference: str) -> api.Image | None:
        """Return the image, None when there is none."""
        request = api.ImageStatusRequest(image=api.ImageSpec(image=reference))
        answer = self.images.ImageStatus(request)
        return answer.image if answer.HasField("image") else None

    def remove_image(self, reference: str) -> None:
        self.images.RemoveImage(api.RemoveImageRequest(image=api.ImageSpec(image=reference)))

    # -- pods --------------------------------------------------------------------------------------

    def pod_config(self, name: str = "", **fields: Any) -> api.PodSandboxConfig:
        """Return a configuration with all that the kubelet sends; `fields` replace its fields."""
        name = name or f"{self.prefix}-{next(self._numbers)}"
        uid = f"{name}-{os.getpid()}"
        config = api.PodSandboxConfig(
            metadata=api.PodSandboxMetadata(name=name, namespace="test", uid=uid, attempt=0),
            hostname=name,
            log_directory=os.fspath(Path(self._logs.name, f"test_{name}_{uid}")),
            labels={"io.kubernetes.pod.name": name, "io.kubernetes.pod.uid": uid},
            annotations={"test": "yes"},
            linux=api.LinuxPodSandboxConfig(cgroup_parent=self._pod_cgroup(uid)),
        )
        config.linux.security_context.namespace_options.pid = api.CONTAINER
        for field in fields:
            config.ClearField(field)  # type: ignore[arg-type]
        config.MergeFrom(api.PodSandboxConfig(**fields))
        return config

    def run_pod(self, config: api.PodSandboxConfig | None = None, *, handler: str = "") -> Pod:
        """RunPodSandbox; makes the log folder first, as the kubelet does."""
        config = config or self.pod_config()
        if config.log_directory:
            Path(config.log_directory).mkdir(parents=True, exist_ok=True)
        request = api.RunPodSandboxRequest(config=config, runtime_handler=handler)
        return Pod(id=self.runtime.RunPodSandbox(request).pod_sandbox_id, config=config)

    def stop_pod(self, pod_id: str) -> None:
        self.runtime.StopPodSandbox(api.StopPodSandboxRequest(pod_sandbox_id=pod_id))

    def remove_pod(self, pod_id: str) -> None:
        """StopPodSandbox, RemovePodSandbox."""
        self.stop_pod(pod_id)
        self.runtime.RemovePodSandbox(api.RemovePodSandboxRequest(pod_sandbox_id=pod_id))

    def pod_status(self, pod_id: str, *, verbose: bool = False) -> api.PodSandboxStatusResponse:
        request = api.PodSandboxStatusRequest(pod_sandbox_id=pod_id, verbose=verbose)
        return self.runtime.PodSandboxStatus(request)

    def pods(self, **condition: Any) -> Sequence[api.PodSandbox]:
        """ListPodSandbox with a PodSandboxFilter of the given fields."""
        request = api.ListPodSandboxRequest(filter=api.PodSandboxFilter(**condition))
        return self.runtime.ListPodSandbox(request).items

    def remove_own_pods(self) -> None:
        """Remove every pod whose name begins with our prefix, finished or not."""
        for pod in self.pods():
            if pod.metadata.name.startswith(f"{self.prefix}-"):
                self.remove_pod(pod.id)

    # -- containers --------------------------------------------------------------------------------

    def container_config(
        self, image: str, command: Sequence[str] = (), *, name: str = "main", **fields: Any
    ) -> api.ContainerConfig:
        """Return a configuration with all that the kubelet sends; `fields` replace its fields."""
        values: dict[str, Any] = {
            "metadata": api.ContainerMetadata(name=name, attempt=0),
            "image": api.ImageSpec(image=image, user_specified_image=image),
            "command": command,
            "labels": {"io.kubernetes.container.name": name},
            "annotations": {"io.kubernetes.container.hash": "1"},
            "log_path": f"{name}/0.log",
        }
        config = api.ContainerConfig(**{**values, **fields})
        context = config.linux.security_context
        if not context.HasField("namespace_options"):
            context.namespace_options.pid = api.CONTAINER  # 0 would be the pod's
        return config

    def create(self, pod: Pod, config: api.ContainerConfig) -> str:
        """CreateContainer; returns its id."""
        if config.log_path and pod.config.log_directory:
            folder = Path(pod.config.log_directory, config.log_path).parent
            folder.mkdir(parents=True, exist_ok=True)
        request = api.CreateContainerRequest(
            pod_sandbox_id=pod.id, config=config, sandbox_config=pod.config
        )
        return self.runtime.CreateContainer(request).container_id

    def start(self, container_id: str) -> None:
        self.runtime.StartContainer(api.StartContainerRequest(container_id=container_id))

    def run(
        self,
        pod: Pod,
        image: str,
        command: Sequence[str] = (),
        *,
        name: str = "main",
        **fields: Any,
    ) -> str:
        """Create and start a container; returns its id."""
        config = self.container_config(image, command, name=name, **fields)
        container_id = self.create(pod, config)
        self.start(container_id)
        return container_id

    def stop(self, container_id: str, *, timeout: int = 0) -> None:
        request = api.StopContainerRequest(container_id=container_id, timeout=timeout)
        self.runtime.StopContainer(request, timeout=timeout + CALL_TIMEOUT)

    def remove(self, container_id: str) -> None:
        self.runtime.RemoveContainer(api.RemoveContainerRequest(container_id=container_id))

    def status(self, container_id: str) -> api.ContainerStatus:
        return self.status_response(container_id).status

    def status_response(
        self, container_id: str, *, verbose: bool = False
    ) -> api.ContainerStatusResponse:
        request = api.ContainerStatusRequest(container_id=container_id, verbose=verbose)
        return self.runtime.ContainerStatus(request)

    def containers(self, **condition: Any) -> Sequence[api.Container]:
        """ListContainers with a ContainerFilter of the given fields."""
        request = api.ListContainersRequest(filter=api.ContainerFilter(**condition))
        return self.runtime.ListContainers(request).containers

    def wait_exit(self, container_id: str, *, seconds: float = 20) -> api.ContainerStatus:
        """Return the status of a container once it is EXITED."""

        def exited() -> api.ContainerStatus | None:
            status = self.status(container_id)
            return status if status.state == api.CONTAINER_EXITED else None

        what = f"container {container_id[:12]} exits"
        return waiting.until(exited, what, seconds=seconds)

    def exec_sync(
        self, container_id: str, command: Sequence[str], *, timeout: int = 0
    ) -> api.ExecSyncResponse:
        """Run a command in a container; `timeout` in seconds, 0 for none."""
        request = api.ExecSyncRequest(container_id=container_id, cmd=command, timeout=timeout)
        return self.runtime.ExecSync(request)

    def log(self, container_id: str) -> list[LogLine]:
        """Return the log of a container, from the path that its status tells."""
        return read_log(Path(self.status(container_id).log_path))

    def wait_log(self, container_id: str, text: str, *, seconds: float = 10) -> list[LogLine]:
        """Return the log once a line contains `text`."""
        path = Path(self.status(container_id).log_path)

        def lines() -> list[LogLine]:
            found = read_log(path)
            return found if any(text in line.text for line in found) else []

        return waiting.until(lines, f"{text!r} in {path}", seconds=seconds)

    def _pod_cgroup(self, uid: str) -> str:
        """Return a pod's cgroup as the kubelet names it, for the driver that the parent is of."""
        slice_, systemd, _ = self.cgroup_parent.partition(".slice")
        if systemd:
            return f"{self.cgroup_parent}{slice_}-pod{uid.replace('-', '_')}.slice"
        return f"{self.cgroup_parent}/pod{uid}" if self.cgroup_parent else ""


def read_log(path: Path) -> list[LogLine]:
    """Parse a CRI log file; an unfinished last line is left out."""
    if not path.exists():
        return []
    text = path.read_text(errors="replace")
    whole = text[: text.rfind("\n") + 1].split("\n")[:-1]
    parts = [line.split(" ", 3) for line in whole]
    return [LogLine(time=p[0], stream=p[1], tag=p[2], text=p[3]) for p in parts]


def refusal(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    """Return code and message of a call that must fail; AssertionError when it does not."""
    try:
        call()
    except grpc.RpcError as e:
        return e.code(), e.details() or ""
    raise AssertionError("the call succeeded")


def state_of(client: Kubelet, pod: Pod) -> "api.PodSandboxState.ValueType":
    """Return the state of a pod, as its status tells it."""
    return client.pod_status(pod.id).status.state


def is_ready(endpoint: str) -> bool:
    """Tell whether an endpoint answers Status with the runtime ready."""
    with grpc.insecure_channel(endpoint) as channel:
        try:
            answer = rpc.RuntimeServiceStub(channel).Status(
                api.StatusRequest(), timeout=waiting.patient(2)
            )
        except grpc.RpcError:
            return False
    return conditions(answer).get("RuntimeReady", False)


def conditions(answer: api.StatusResponse) -> Mapping[str, bool]:
    """Return the conditions of a Status answer by type."""
    return {c.type: c.status for c in answer.status.conditions}
