# SPDX-License-Identifier: Apache-2.0
"""Container logs: the CRI format, long lines, rotation, and who may say where they are (CRI)."""

import re
from pathlib import Path

import grpc
import pytest

from cri_server.pb import api_pb2 as api
from tests.fakes.kubelet import Kubelet, Pod, read_log, refusal
from tests.integration.conftest import SLEEP
from tests.lab import waiting

pytestmark = pytest.mark.needs("root", "netns", "overlay", "cni", "runc", "docker-registry")
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}(Z|[+-]\d\d:\d\d)$")
COUNT = "i=0; while :; do echo line $i; i=$((i+1)); sleep 0.01; done"


def test_each_line_has_time_stream_and_tag(kubelet: Kubelet, pod: Pod, pulled: str) -> None:
    container = kubelet.run(pod, pulled, ["sh", "-c", "echo out; echo err >&2; echo"])
    kubelet.wait_exit(container)
    lines = kubelet.log(container)
    assert sorted((line.stream, line.tag, line.text) for line in lines) == [
        ("stderr", "F", "err"),
        ("stdout", "F", ""),
        ("stdout", "F", "out"),
    ]
    assert all(TIME.match(line.time) for line in lines)


def test_all_that_was_written_is_there_when_the_exit_is_told(
    kubelet: Kubelet, pod: Pod, pulled: str
) -> None:
    container = kubelet.run(pod, pulled, ["seq", "20000"])
    kubelet.wait_exit(container)
    assert [line.text for line in kubelet.log(container)] == [str(n) for n in range(1, 20001)]


def test_long_lines_come_in_parts(kubelet: Kubelet, pod: Pod, pulled: str) -> None:
    script = "head -c 40000 /dev/zero | tr '\\0' x; echo; echo after"
    container = kubelet.run(pod, pulled, ["sh", "-c", script])
    kubelet.wait_exit(container)
    *parts, after = kubelet.log(container)
    assert after.text == "after"
    assert "".join(part.text for part in parts) == "x" * 40000
    assert [part.tag for part in parts] == ["P"] * (len(parts) - 1) + ["F"]
    assert max(len(part.text) for part in parts) <= 16384


@pytest.mark.ours
def test_a_last_line_without_newline_is_kept(kubelet: Kubelet, pod: Pod, pulled: str) -> None:
    container = kubelet.run(pod, pulled, ["printf", "no newline"])
    kubelet.wait_exit(container)
    [line] = kubelet.log(container)
    assert line.text == "no newline"
    assert line.tag in "PF"


def test_reopen_loses_and_doubles_nothing(kubelet: Kubelet, pod: Pod, pulled: str) -> None:
    container = kubelet.run(pod, pulled, ["sh", "-c", COUNT])
    path = Path(kubelet.status(container).log_path)
    old = path.with_suffix(".1")
    kubelet.wait_log(container, "line 5")
    path.rename(old)
    kubelet.runtime.ReopenContainerLog(api.ReopenContainerLogRequest(container_id=container))
    frozen = old.read_bytes()
    assert path.exists()
    waiting.until(lambda: len(read_log(path)) > 5, "the new file grows")
    kubelet.stop(container)
    assert old.read_bytes() == frozen
    texts = [line.text for line in read_log(old) + read_log(path)]
    assert texts == [f"line {n}" for n in range(len(texts))]


def test_reopen_needs_a_running_container(kubelet: Kubelet, pod: Pod, pulled: str) -> None:
    container = kubelet.run(pod, pulled, ["true"])
    kubelet.wait_exit(container)
    path = Path(kubelet.status(container).log_path)
    path.unlink()
    with pytest.raises(grpc.RpcError):
        kubelet.runtime.ReopenContainerLog(api.ReopenContainerLogRequest(container_id=container))
    assert not path.exists()
    nobody = api.ReopenContainerLogRequest(container_id="f" * 64)
    code, _ = refusal(lambda: kubelet.runtime.ReopenContainerLog(nobody))
    assert code is grpc.StatusCode.NOT_FOUND


def test_a_terminal_has_one_stream(kubelet: Kubelet, pod: Pod, pulled: str) -> None:
    container = kubelet.run(pod, pulled, ["sh", "-c", "tty; echo err >&2"], tty=True)
    kubelet.wait_exit(container)
    lines = kubelet.log(container)
    assert {line.stream for line in lines} == {"stdout"}
    assert [line.text.rstrip("\r") for line in lines] == ["/dev/pts/0", "err"]


def test_the_log_file_outlives_the_container(kubelet: Kubelet, pod: Pod, pulled: str) -> None:
    container = kubelet.run(pod, pulled, ["echo", "kept"])
    kubelet.wait_exit(container)
    path = Path(kubelet.status(container).log_path)
    kubelet.remove(container)
    assert [line.text for line in read_log(path)] == ["kept"]


def test_without_a_log_path_output_goes_nowhere(kubelet: Kubelet, pod: Pod, pulled: str) -> None:
    container = kubelet.run(pod, pulled, ["seq", "200000"], log_path="")
    assert kubelet.wait_exit(container).exit_code == 0


def test_a_flood_does_not_stop_the_container(kubelet: Kubelet, pod: Pod, pulled: str) -> None:
    script = "head -c 30000000 /dev/zero | tr '\\0' x | fold -w 100; exit 9"
    container = kubelet.run(pod, pulled, ["sh", "-c", script])
    assert kubelet.wait_exit(container, seconds=40).exit_code == 9


@pytest.mark.ours
@pytest.mark.parametrize("path", ["../../../../../../../../tmp/escaped.log", "a/../../x", "a\nb"])
def test_a_log_path_does_not_escape(kubelet: Kubelet, pod: Pod, pulled: str, path: str) -> None:
    request = api.CreateContainerRequest(
        pod_sandbox_id=pod.id,
        config=kubelet.container_config(pulled, SLEEP, log_path=path),
        sandbox_config=pod.config,
    )
    code, _ = refusal(lambda: kubelet.runtime.CreateContainer(request))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert not Path("/tmp/escaped.log").exists()
    assert not kubelet.containers(pod_sandbox_id=pod.id)


@pytest.mark.ours
def test_a_log_path_needs_a_log_directory(kubelet: Kubelet, pulled: str) -> None:
    config = kubelet.pod_config()
    config.log_directory = ""
    pod = kubelet.run_pod(config)
    code, text = refusal(lambda: kubelet.create(pod, kubelet.container_config(pulled, SLEEP)))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "log_path" in text
    assert "log_directory" in text
    kubelet.create(pod, kubelet.container_config(pulled, SLEEP, log_path=""))


def test_an_absolute_log_path_is_below_the_log_folder(
    kubelet: Kubelet, pod: Pod, pulled: str
) -> None:
    config = kubelet.container_config(pulled, SLEEP, log_path="/escaped.log")
    request = api.CreateContainerRequest(
        pod_sandbox_id=pod.id, config=config, sandbox_config=pod.config
    )
    container = kubelet.runtime.CreateContainer(request).container_id
    assert kubelet.status(container).log_path == f"{pod.config.log_directory}/escaped.log"
