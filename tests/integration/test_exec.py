# SPDX-License-Identifier: Apache-2.0
"""ExecSync: output, exit codes, time-outs, and what is left of an exec afterwards (CRI)."""

import concurrent.futures
import time

import grpc
import pytest

from cri_server.pb import api_pb2 as api
from tests.fakes.kubelet import Kubelet, Pod, refusal
from tests.integration.conftest import SLEEP
from tests.lab import waiting

pytestmark = pytest.mark.needs("root", "netns", "overlay", "cni", "runc", "docker-registry")
LIMIT = 16 << 20


def test_both_streams_and_the_exit_code(kubelet: Kubelet, container: str) -> None:
    done = kubelet.exec_sync(container, ["sh", "-c", "echo out; echo err >&2; exit 5"])
    assert (done.stdout, done.stderr, done.exit_code) == (b"out\n", b"err\n", 5)


def test_bytes_pass_unchanged(kubelet: Kubelet, container: str) -> None:
    done = kubelet.exec_sync(container, ["printf", r"\000\377\r\n"])
    assert done.stdout == b"\0\xff\r\n"


def test_an_exec_runs_as_the_containers_user_in_its_folder(
    kubelet: Kubelet, pod: Pod, pulled: str
) -> None:
    context = api.LinuxContainerSecurityContext(run_as_user=api.Int64Value(value=1000))
    linux = api.LinuxContainerConfig(security_context=context)
    envs = [api.KeyValue(key="MINE", value=b"yes")]
    container = kubelet.run(pod, pulled, SLEEP, linux=linux, working_dir="/home", envs=envs)
    done = kubelet.exec_sync(container, ["sh", "-c", "id -u; pwd; echo $MINE"])
    assert done.stdout.split() == [b"1000", b"/home", b"yes"]


@pytest.mark.ours  # containerd waits for the pipes of the second sleep without end
def test_a_timeout_is_deadline_exceeded_and_leaves_nothing(
    kubelet: Kubelet, container: str
) -> None:
    command = ["sh", "-c", "sleep 3333 & setsid sleep 3333 & sleep 3333"]
    begin = time.monotonic()
    code, _ = refusal(lambda: kubelet.exec_sync(container, command, timeout=1))
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert 0.9 <= time.monotonic() - begin < waiting.patient(10)

    def gone() -> bool:
        return b"sleep 3333" not in kubelet.exec_sync(container, ["ps"]).stdout

    waiting.until(gone, "the tree of the exec is gone", seconds=5)


@pytest.mark.parametrize("timeout", [2**31 - 1, 2**63 - 1])
def test_a_timeout_of_ages_is_one(kubelet: Kubelet, container: str, timeout: int) -> None:
    assert kubelet.exec_sync(container, ["sleep", "0.1"], timeout=timeout).exit_code == 0


@pytest.mark.ours
def test_a_child_that_keeps_the_pipes_does_not_keep_the_call(
    kubelet: Kubelet, container: str
) -> None:
    begin = time.monotonic()
    done = kubelet.exec_sync(container, ["sh", "-c", "echo done; sleep 30 &"])
    assert done.stdout == b"done\n"
    assert time.monotonic() - begin < waiting.patient(8)


@pytest.mark.ours
def test_output_is_cut_at_the_limit(kubelet: Kubelet, container: str) -> None:
    request = api.ExecSyncRequest(
        container_id=container,
        cmd=["sh", "-c", "head -c 20000000 /dev/zero; head -c 20000000 /dev/zero >&2"],
    )
    channel = grpc.insecure_channel(
        kubelet.endpoint, options=[("grpc.max_receive_message_length", 64 << 20)]
    )
    with channel:
        call = channel.unary_unary(
            "/runtime.v1.RuntimeService/ExecSync",
            request_serializer=api.ExecSyncRequest.SerializeToString,
            response_deserializer=api.ExecSyncResponse.FromString,
        )
        done = call(request, timeout=30)
    for output in (done.stdout, done.stderr):
        assert LIMIT - (64 << 10) < len(output) <= LIMIT


def test_a_missing_program_is_an_error_or_a_status(kubelet: Kubelet, container: str) -> None:
    try:
        done = kubelet.exec_sync(container, ["/no/such"])
    except grpc.RpcError as e:
        assert "no/such" in (e.details() or "")  # noqa: PT017
    else:
        assert done.exit_code != 0


def test_exec_in_what_does_not_run(kubelet: Kubelet, pod: Pod, pulled: str) -> None:
    created = kubelet.create(pod, kubelet.container_config(pulled, SLEEP))
    with pytest.raises(grpc.RpcError):
        kubelet.exec_sync(created, ["true"])
    code, _ = refusal(lambda: kubelet.exec_sync("f" * 64, ["true"]))
    assert code is grpc.StatusCode.NOT_FOUND


def test_many_at_once(kubelet: Kubelet, container: str) -> None:
    def say(number: int) -> bytes:
        return kubelet.exec_sync(container, ["echo", str(number)]).stdout

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(say, range(24))) == [b"%d\n" % n for n in range(24)]


@pytest.mark.ours
def test_probes_of_a_pod_may_all_come_at_once(kubelet: Kubelet, container: str) -> None:
    request = api.ExecSyncRequest(container_id=container, cmd=["true"])
    # More than a backlog of 64; an emulated CPU takes minutes for 150.
    number, limit = 150 if waiting.PATIENCE == 1 else 75, waiting.patient(60)
    calls = [kubelet.runtime.ExecSync.future(request, timeout=limit) for _ in range(number)]
    assert [call.result().exit_code for call in calls] == [0] * number


def test_the_container_may_end_during_an_exec(kubelet: Kubelet, container: str) -> None:
    request = api.ExecSyncRequest(container_id=container, cmd=["sleep", "1000"])
    running = kubelet.runtime.ExecSync.future(request)
    waiting.until(
        lambda: b"sleep 1000" in kubelet.exec_sync(container, ["ps"]).stdout, "the exec runs"
    )
    kubelet.stop(container)
    try:
        assert running.result(timeout=waiting.patient(10)).exit_code != 0
    except grpc.RpcError:
        assert running.done()


@pytest.mark.ours
def test_an_abandoned_exec_is_ended(kubelet: Kubelet, container: str) -> None:
    request = api.ExecSyncRequest(container_id=container, cmd=["sleep", "2222"])
    with pytest.raises(grpc.RpcError):
        kubelet.runtime.ExecSync(request, timeout=1)

    def gone() -> bool:
        return b"sleep 2222" not in kubelet.exec_sync(container, ["ps"]).stdout

    waiting.until(gone, "nothing is left of the abandoned exec", seconds=5)
