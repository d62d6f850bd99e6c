# SPDX-License-Identifier: Apache-2.0
"""How containers end: signals, exit codes, reasons, messages, times; and ends that are hard to
reach.
"""

import contextlib
import json
import os
import subprocess
import time
from pathlib import Path

import grpc
import pytest

from cri_server.pb import api_pb2 as api
from tests.fakes.kubelet import Kubelet, Pod, refusal
from tests.integration.conftest import SLEEP
from tests.lab import cgroups, image, registry, waiting

pytestmark = pytest.mark.needs("root", "netns", "overlay", "cni", "runc", "docker-registry")
V1 = Path("/sys/fs/cgroup")
MIB = 1 << 20


def trap(number: int) -> list[str]:
    """Return a command that ends with 3 at this signal, and hears no other."""
    return ["sh", "-c", f"trap 'exit 3' {number}; echo ready; while :; do sleep 0.05; done"]


def beside_an_init(kubelet: Kubelet, image: str, script: str) -> str:
    """Run a script whose process is not number 1, which no signal of its own ends."""
    config = kubelet.pod_config()
    config.linux.security_context.namespace_options.pid = api.POD
    linux = api.LinuxContainerConfig()
    linux.security_context.namespace_options.pid = api.POD
    return kubelet.run(kubelet.run_pod(config), image, ["sh", "-c", script], linux=linux)


# -- signals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spelling", "number", "name"),
    [
        ("INT", 2, "SIGINT"),
        ("sigint", 2, "SIGINT"),
        ("2", 2, "SIGINT"),
        ("SIGRTMIN+3", 37, "SIGRTMINPLUS3"),
    ],
)
def test_the_images_stop_signal_counts_in_every_spelling(
    kubelet: Kubelet,
    pod: Pod,
    registry: registry.Registry,
    spelling: str,
    number: int,
    name: str,
) -> None:
    reference = registry.push(image.busybox(StopSignal=spelling), f"test/{name.lower()}")
    kubelet.pull(reference)
    container = kubelet.run(pod, reference, trap(number))
    kubelet.wait_log(container, "ready")
    assert api.Signal.Name(kubelet.status(container).stop_signal) == name
    kubelet.stop(container, timeout=20)
    assert kubelet.status(container).exit_code == 3
    kubelet.remove(container)
    kubelet.remove_image(reference)


def test_an_image_whose_stop_signal_is_none_is_refused_by_name(
    kubelet: Kubelet, pod: Pod, registry: registry.Registry
) -> None:
    reference = registry.push(image.busybox(StopSignal="SIGNONE"), "test/signone")
    kubelet.pull(reference)
    code, message = refusal(lambda: kubelet.create(pod, kubelet.container_config(reference, SLEEP)))
    assert (code, message) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "image StopSignal: 'SIGNONE' is not a signal",
    )
    kubelet.remove_image(reference)


def test_the_requests_stop_signal_wins(
    kubelet: Kubelet, pod: Pod, registry: registry.Registry
) -> None:
    reference = registry.push(image.busybox(StopSignal="SIGINT"), "test/int")
    kubelet.pull(reference)
    container = kubelet.run(pod, reference, trap(50), stop_signal=api.SIGRTMAXMINUS14)
    kubelet.wait_log(container, "ready")
    kubelet.stop(container, timeout=20)
    status = kubelet.status(container)
    assert (status.exit_code, status.stop_signal) == (3, api.SIGRTMAXMINUS14)
    kubelet.remove(container)
    kubelet.remove_image(reference)


def test_without_any_it_is_sigterm(kubelet: Kubelet, container: str) -> None:
    assert kubelet.status(container).stop_signal == api.SIGTERM


# -- codes, reasons, messages, times ---------------------------------------------------------------


@pytest.mark.needs("catatonit")
@pytest.mark.parametrize(("name", "code"), [("KILL", 137), ("SEGV", 139), ("TERM", 143)])
def test_a_process_that_a_signal_ends_has_128_and_its_number(
    kubelet: Kubelet, pulled: str, name: str, code: int
) -> None:
    container = beside_an_init(kubelet, pulled, f"kill -{name} $$")
    status = kubelet.wait_exit(container)
    assert (status.exit_code, status.reason, status.message) == (code, "Error", "")


def test_a_process_that_seccomp_ends_has_the_number_of_sigsys(
    kubelet: Kubelet, pod: Pod, pulled: str, tmp_path: Path
) -> None:
    kill = {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_KILL_PROCESS"}
    profile = tmp_path / "profile.json"
    profile.write_text(json.dumps({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [kill]}))
    linux = api.LinuxContainerConfig()
    linux.security_context.seccomp.profile_type = api.SecurityProfile.Localhost
    linux.security_context.seccomp.localhost_ref = os.fspath(profile)
    container = kubelet.run(pod, pulled, ["mkdir", "/x"], linux=linux)
    status = kubelet.wait_exit(container)
    assert (status.exit_code, status.reason) == (128 + 31, "Error")


@pytest.mark.ours
def test_a_child_that_is_killed_for_memory_is_told(kubelet: Kubelet, pod: Pod, pulled: str) -> None:
    linux = api.LinuxContainerConfig()
    linux.resources.memory_limit_in_bytes = 15 * MIB
    grow = "x=0123456789; while :; do x=$x$x; done"
    container = kubelet.run(pod, pulled, ["sh", "-c", f"sh -c '{grow}'; exit 0"], linux=linux)
    status = kubelet.wait_exit(container, seconds=30)
    assert (status.exit_code, status.reason) == (0, "OOMKilled")
    assert status.message == "1 process OOM-killed"


@pytest.mark.parametrize(
    ("handler", "words"),
    [
        ("runc", 'exec: "nope": executable file not found in $PATH'),
        ("crun", "executable file `nope` not found in $PATH: No such file or directory"),
    ],
)
def test_a_start_that_fails_says_why_in_its_first_words(
    kubelet: Kubelet, pulled: str, handler: str, words: str
) -> None:
    pod = kubelet.run_pod(handler=handler)
    container = kubelet.create(pod, kubelet.container_config(pulled, ["nope"]))
    begin = time.time_ns()
    _, message = refusal(lambda: kubelet.start(container))
    status = kubelet.status(container)
    assert (message, status.message) == (words, words)
    assert (status.exit_code, status.reason) == (128, "StartError")
    assert status.started_at == 0
    assert begin < status.finished_at < time.time_ns()


def test_the_time_of_the_end_is_that_of_the_end(kubelet: Kubelet, pod: Pod, pulled: str) -> None:
    container = kubelet.run(pod, pulled, ["sh", "-c", "sleep 0.3; date +%s"])
    status = kubelet.wait_exit(container)
    assert status.created_at < status.started_at
    assert status.finished_at - status.started_at >= 200_000_000
    assert abs(status.finished_at / 1e9 - int(kubelet.log(container)[-1].text)) < 5


# -- ends that are hard to reach -------------------------------------------------------------------


@pytest.mark.parametrize(("timeout", "code"), [(20, 3), (0, 137)])
def test_a_paused_container_hears_its_stop_signal_and_dies(
    kubelet: Kubelet, pod: Pod, pulled: str, timeout: int, code: int
) -> None:
    container = kubelet.run(pod, pulled, trap(15))
    kubelet.wait_log(container, "ready")
    freeze(cgroups.place(pod.config.linux.cgroup_parent, container, "freezer"))
    begin = time.monotonic()
    kubelet.stop(container, timeout=timeout)
    assert kubelet.status(container).exit_code == code
    assert time.monotonic() - begin < 10


def freeze(folder: Path) -> None:
    """Pause a container, as somebody on the host would."""
    if (folder / "cgroup.freeze").exists():
        (folder / "cgroup.freeze").write_text("1")
        state, frozen = folder / "cgroup.events", "frozen 1"
    else:
        state, frozen = folder / "freezer.state", "FROZEN"
        state.write_text(frozen)
    waiting.until(lambda: frozen in state.read_text(), "the container is frozen")


def made_by_the_kubelet(config: api.PodSandboxConfig, **files: str) -> dict[Path, str]:
    """Make the pod's cgroup in every v1 hierarchy, as the kubelet does; return what was written."""
    parent, written = config.linux.cgroup_parent.lstrip("/"), {}
    for hierarchy in ("cpu", "cpuacct", "cpuset", "memory", "pids", "freezer", "devices", "blkio"):
        (V1 / hierarchy / parent).mkdir(parents=True)
    for name, text in files.items():
        hierarchy, _, rest = name.partition("_")
        path = V1 / hierarchy / parent / f"{hierarchy}.{rest}"
        path.write_text(text)
        written[path] = text
    return written


@pytest.mark.needs("cgroup-v1")
def test_the_limits_of_the_pods_cgroup_stay_the_kubelets(kubelet: Kubelet, pulled: str) -> None:
    config = kubelet.pod_config()
    written = made_by_the_kubelet(
        config, memory_limit_in_bytes=str(128 * MIB), cpu_shares="600", pids_max="40"
    )
    pod = kubelet.run_pod(config)
    linux = api.LinuxContainerConfig()
    linux.resources.memory_limit_in_bytes = 64 * MIB
    container = kubelet.run(pod, pulled, SLEEP, linux=linux)
    linux.resources.memory_limit_in_bytes = 96 * MIB
    kubelet.runtime.UpdateContainerResources(
        api.UpdateContainerResourcesRequest(container_id=container, linux=linux.resources)
    )
    assert {path: path.read_text().strip() for path in written} == written
    kubelet.remove_pod(pod.id)
    assert {path: path.read_text().strip() for path in written} == written


def refused(file: Path) -> int:
    """Return how many forks the limit of a cgroup has refused."""
    return int(file.read_text().split()[1])


@pytest.mark.needs("cgroup-v1")
def test_a_fork_bomb_ends_at_the_pods_limit_and_dies(kubelet: Kubelet, pulled: str) -> None:
    config = kubelet.pod_config()
    made_by_the_kubelet(config, pids_max="48")
    pod = kubelet.run_pod(config)
    bomb = "b() { while :; do b & done; }; b 2>/dev/null & exec sleep 86400"
    container = kubelet.run(pod, pulled, ["sh", "-c", bomb])
    pids = V1 / f"pids{config.linux.cgroup_parent}"
    counts = (pids / "pids.events", pids / container / "pids.events")
    waiting.until(lambda: any(refused(file) for file in counts), "the kernel refuses to fork")
    assert subprocess.run(["true"], check=False).returncode == 0  # the host can
    request = api.ExecSyncRequest(container_id=container, cmd=["true"], timeout=5)
    call = kubelet.runtime.ExecSync.future(request)
    with contextlib.suppress(grpc.RpcError):  # a matter of luck, but soon known
        call.result(timeout=20)
    assert call.code() is not grpc.StatusCode.INTERNAL, call.details()
    assert int((pids / "pids.current").read_text()) <= 48
    begin = time.monotonic()
    kubelet.stop(container, timeout=1)
    assert time.monotonic() - begin < 15
    assert kubelet.status(container).exit_code == 137
    assert (pids / "cgroup.procs").read_text() == ""
    waiting.until(lambda: not (pids / container).exists(), "the container's cgroup is gone")
