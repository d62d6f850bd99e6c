# SPDX-License-Identifier: Apache-2.0
"""The life of a container: create, start, stop, remove, status, list, stats (CRI)."""

import json
import time
from pathlib import Path

import grpc
import pytest

from cri_server.pb import api_pb2 as api
from tests.fakes.kubelet import Kubelet, Pod
from tests.integration.conftest import SLEEP
from tests.lab import cgroups, image, registry, waiting

pytestmark = pytest.mark.needs("root", "netns", "overlay", "cni", "runc", "docker-registry")
TRAP = "trap 'echo got TERM; exit 3' TERM; echo ready; while :; do sleep 0.05; done"
DEAF = "trap '' TERM; echo ready; while :; do sleep 0.05; done"


def test_the_states_of_a_container(kubelet: Kubelet, pod: Pod, pulled: str) -> None:
    begin = time.time_ns()
    container = kubelet.create(pod, kubelet.container_config(pulled, SLEEP))
    created = kubelet.status(container)
    assert created.state == api.CONTAINER_CREATED
    assert begin <= created.created_at <= time.time_ns()
    assert (created.started_at, created.finished_at) == (0, 0)
    kubelet.start(container)
    running = kubelet.status(container)
    assert running.state == api.CONTAINER_RUNNING
    assert running.created_at <= running.started_at <= time.time_ns()
    assert running.finished_at == 0
    kubelet.stop(container)
    exited = kubelet.status(container)
    assert exited.state == api.CONTAINER_EXITED
    assert exited.started_at <= exited.finished_at <= time.time_ns()
    assert exited.exit_code == 137
    kubelet.remove(container)
    assert not kubelet.containers(id=container)


def test_a_status_carries_all_that_was_given(
    kubelet: Kubelet, pod: Pod, pulled: str, busybox: image.Image
) -> None:
    config = kubelet.container_config(pulled, SLEEP, labels={"l": "1"}, annotations={"a": "2"})
    config.metadata.attempt = 7
    container = kubelet.create(pod, config)
    status = kubelet.status(container)
    assert status.metadata == config.metadata
    assert dict(status.labels) == {"l": "1"}
    assert dict(status.annotations) == {"a": "2"}
    assert status.image.image
    assert status.image_ref
    assert status.log_path == f"{pod.config.log_directory}/main/0.log"
    [item] = kubelet.containers(id=container)
    assert item.pod_sandbox_id == pod.id
    assert item.metadata == config.metadata
    assert item.image.image == pulled
    assert dict(item.labels) == {"l": "1"}


@pytest.mark.ours
def test_the_image_id_is_the_same_everywhere(
    kubelet: Kubelet, container: str, pulled: str, busybox: image.Image
) -> None:
    image_ = kubelet.image_status(pulled)
    assert image_ is not None
    [item] = kubelet.containers(id=container)
    assert {image_.id, kubelet.status(container).image_id, item.image_id} == {busybox.id}


@pytest.mark.parametrize(("code", "reason"), [(0, "Completed"), (1, "Error"), (77, "Error")])
def test_the_exit_code_and_its_reason(
    kubelet: Kubelet, pod: Pod, pulled: str, code: int, reason: str
) -> None:
    container = kubelet.run(pod, pulled, ["sh", "-c", f"exit {code}"])
    status = kubelet.wait_exit(container)
    assert (status.exit_code, status.reason) == (code, reason)


def test_a_death_by_signal_is_128_and_the_signal(kubelet: Kubelet, pod: Pod, pulled: str) -> None:
    container = kubelet.run(
        pod, pulled, ["sh", "-c", "trap - SEGV; sleep 0.1; exec sh -c 'exit 139'"]
    )
    assert kubelet.wait_exit(container).exit_code == 139


def test_stop_asks_first(kubelet: Kubelet, pod: Pod, pulled: str) -> None:
    container = kubelet.run(pod, pulled, ["sh", "-c", TRAP])
    kubelet.wait_log(container, "ready")
    kubelet.stop(container, timeout=20)
    assert kubelet.status(container).exit_code == 3
    assert [line.text for line in kubelet.log(container)] == ["ready", "got TERM"]


def test_stop_kills_who_does_not_listen(kubelet: Kubelet, pod: Pod, pulled: str) -> None:
    container = kubelet.run(pod, pulled, ["sh", "-c", DEAF])
    kubelet.wait_log(container, "ready")
    begin = time.monotonic()
    kubelet.stop(container, timeout=1)
    assert 0.9 <= time.monotonic() - begin < waiting.patient(5)
    assert kubelet.status(container).exit_code == 137


def test_stop_uses_the_images_signal(
    kubelet: Kubelet, pod: Pod, registry: registry.Registry
) -> None:
    reference = registry.push(image.busybox(StopSignal="SIGUSR1"), "test/usr1")
    kubelet.pull(reference)
    script = TRAP.replace("TERM", "USR1")
    container = kubelet.run(pod, reference, ["sh", "-c", script])
    kubelet.wait_log(container, "ready")
    kubelet.stop(container, timeout=20)
    assert kubelet.status(container).exit_code == 3
    kubelet.remove(container)
    kubelet.remove_image(reference)


@pytest.mark.ours
def test_a_later_stop_with_less_patience_shortens_the_first(
    kubelet: Kubelet, pod: Pod, pulled: str
) -> None:
    container = kubelet.run(pod, pulled, ["sh", "-c", DEAF])
    kubelet.wait_log(container, "ready")
    request = api.StopContainerRequest(container_id=container, timeout=50)
    first = kubelet.runtime.StopContainer.future(request)
    begin = time.monotonic()
    kubelet.stop(container, timeout=0)
    first.result(timeout=waiting.patient(5))
    assert time.monotonic() - begin < waiting.patient(5)


@pytest.mark.ours
def test_stop_goes_on_when_its_caller_has_gone(kubelet: Kubelet, pod: Pod, pulled: str) -> None:
    container = kubelet.run(pod, pulled, ["sh", "-c", DEAF])
    kubelet.wait_log(container, "ready")
    request = api.StopContainerRequest(container_id=container, timeout=2)
    with pytest.raises(grpc.RpcError):
        kubelet.runtime.StopContainer(request, timeout=0.3)
    assert kubelet.wait_exit(container, seconds=6).exit_code == 137


def test_stop_and_remove_of_what_is_stopped_or_created(
    kubelet: Kubelet, pod: Pod, pulled: str
) -> None:
    created = kubelet.create(pod, kubelet.container_config(pulled, SLEEP, name="created"))
    kubelet.stop(created)
    kubelet.remove(created)
    ended = kubelet.run(pod, pulled, ["true"], name="ended")
    kubelet.wait_exit(ended)
    kubelet.stop(ended)
    kubelet.stop(ended)
    kubelet.remove(ended)
    kubelet.remove(ended)


def test_remove_takes_a_running_container(kubelet: Kubelet, container: str) -> None:
    kubelet.remove(container)
    assert not kubelet.containers(id=container)


def test_a_container_starts_once(kubelet: Kubelet, pod: Pod, pulled: str) -> None:
    container = kubelet.run(pod, pulled, SLEEP)
    with pytest.raises(grpc.RpcError):
        kubelet.start(container)
    assert kubelet.status(container).state == api.CONTAINER_RUNNING


def test_a_failed_start_can_be_read_in_the_status(kubelet: Kubelet, pod: Pod, pulled: str) -> None:
    container = kubelet.create(pod, kubelet.container_config(pulled, ["/no/such/program"]))
    with pytest.raises(grpc.RpcError, match="no/such/program"):
        kubelet.start(container)
    status = kubelet.status(container)
    assert (status.state, status.exit_code, status.reason) == (
        api.CONTAINER_EXITED,
        128,
        "StartError",
    )
    assert "no/such/program" in status.message
    assert status.finished_at > 0


@pytest.mark.ours
def test_the_same_request_again_is_the_same_container(
    kubelet: Kubelet, pod: Pod, pulled: str
) -> None:
    config = kubelet.container_config(pulled, SLEEP)
    first = kubelet.create(pod, config)
    assert kubelet.create(pod, config) == first


def test_a_new_attempt_is_a_new_container(kubelet: Kubelet, pod: Pod, pulled: str) -> None:
    config = kubelet.container_config(pulled, ["true"])
    first = kubelet.create(pod, config)
    config.metadata.attempt = 1
    assert kubelet.create(pod, config) != first


def test_the_writable_layers_are_apart(kubelet: Kubelet, pod: Pod, pulled: str) -> None:
    one, two = (kubelet.run(pod, pulled, SLEEP, name=name) for name in ("one", "two"))
    kubelet.exec_sync(one, ["sh", "-c", "echo mine > /file; rm /etc/group"])
    assert kubelet.exec_sync(two, ["ls", "/file"]).exit_code != 0
    assert kubelet.exec_sync(two, ["ls", "/etc/group"]).exit_code == 0


# -- what runs -------------------------------------------------------------------------------------


def test_command_and_args_and_what_the_image_says(
    kubelet: Kubelet, pod: Pod, registry: registry.Registry
) -> None:
    made = image.busybox(
        Entrypoint=["echo", "entry"], Cmd=["cmd"], WorkingDir="/home", Env=["A=1", "B=2"]
    )
    reference = registry.push(made, "test/entry")
    kubelet.pull(reference)
    cases = {
        "none": ([], [], "entry cmd"),
        "args": ([], ["x", "y"], "entry x y"),
        "command": (["echo", "own"], [], "own"),
        "both": (["echo", "own"], ["z"], "own z"),
    }
    for name, (command, args, wanted) in cases.items():
        container = kubelet.run(pod, reference, command, name=name, args=args)
        kubelet.wait_exit(container)
        assert [line.text for line in kubelet.log(container)] == [wanted], name


def test_environment_and_working_folder(kubelet: Kubelet, pod: Pod, pulled: str) -> None:
    envs = [api.KeyValue(key="A", value=b"1 2"), api.KeyValue(key="PATH", value=b"/bin")]
    container = kubelet.run(
        pod, pulled, ["sh", "-c", "pwd; env"], envs=envs, working_dir="/made/up"
    )
    kubelet.wait_exit(container)
    lines = [line.text for line in kubelet.log(container)]
    assert lines[0] == "/made/up"
    assert {"A=1 2", "PATH=/bin"} <= set(lines)
    assert any(line.startswith("HOME=") for line in lines)


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({}, "uid=0 gid=0"),
        ({"run_as_user": {"value": 1000}}, "uid=1000 gid=1000"),
        ({"run_as_username": "tester"}, "uid=1000 gid=1000"),
        ({"run_as_user": {"value": 4242}}, "uid=4242 gid=0"),
        ({"run_as_user": {"value": 5}, "run_as_group": {"value": 6}}, "uid=5 gid=6"),
    ],
)
def test_users(
    kubelet: Kubelet, pod: Pod, pulled: str, fields: dict[str, object], wanted: str
) -> None:
    context = api.LinuxContainerSecurityContext(**fields)  # type: ignore[arg-type]
    script = 'echo "uid=$(id -u) gid=$(id -g)"'
    linux = api.LinuxContainerConfig(security_context=context)
    container = kubelet.run(pod, pulled, ["sh", "-c", script], linux=linux)
    kubelet.wait_exit(container)
    assert [line.text for line in kubelet.log(container)] == [wanted]


def test_mounts_of_folders_and_files(
    kubelet: Kubelet, pod: Pod, pulled: str, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("from the host\n")
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    mounts = [
        api.Mount(host_path=str(tmp_path / "folder"), container_path="/data/a"),
        api.Mount(host_path=str(tmp_path / "file"), container_path="/data/f", readonly=True),
        api.Mount(host_path=str(tmp_path / "link"), container_path="/data/b"),
        api.Mount(host_path=str(tmp_path / "made"), container_path="/data/c"),
    ]
    script = (
        "cat /data/f; echo x > /data/a/x; echo y > /data/b/y; touch /data/c/z; echo no > /data/f"
    )
    container = kubelet.run(pod, pulled, ["sh", "-c", script], mounts=mounts)
    assert kubelet.wait_exit(container).exit_code == 1
    said = [line.text for line in kubelet.log(container) if line.stream == "stdout"]
    assert said == ["from the host"]
    assert sorted(p.name for p in (tmp_path / "folder").iterdir()) == ["x", "y"]
    assert (tmp_path / "made" / "z").exists()
    assert (tmp_path / "file").read_text() == "from the host\n"


def test_a_read_only_root(kubelet: Kubelet, pod: Pod, pulled: str) -> None:
    context = api.LinuxContainerSecurityContext(readonly_rootfs=True)
    linux = api.LinuxContainerConfig(security_context=context)
    container = kubelet.run(pod, pulled, ["touch", "/file"], linux=linux)
    assert kubelet.wait_exit(container).exit_code == 1


def test_out_of_memory_is_told(kubelet: Kubelet, pod: Pod, pulled: str) -> None:
    resources = api.LinuxContainerResources(memory_limit_in_bytes=15 << 20)
    linux = api.LinuxContainerConfig(resources=resources)
    # A shell variable that doubles; the shell is the container's first process.
    script = "x=0123456789; while :; do x=$x$x; done"
    container = kubelet.run(pod, pulled, ["sh", "-c", script], linux=linux)
    status = kubelet.wait_exit(container, seconds=30)
    assert (status.exit_code, status.reason) == (137, "OOMKilled")


def test_resources_are_set_below_the_pods_cgroup(kubelet: Kubelet, pod: Pod, pulled: str) -> None:
    resources = api.LinuxContainerResources(
        memory_limit_in_bytes=64 << 20, cpu_shares=512, cpu_quota=20000, cpu_period=100000
    )
    linux = api.LinuxContainerConfig(resources=resources)
    container = kubelet.run(pod, pulled, SLEEP, linux=linux)
    expected = {
        "memory.limit_in_bytes": str(64 << 20),
        "cpu.shares": "512",
        "cpu.cfs_quota_us": "20000",
    }
    assert cgroups.limits(pod.config.linux.cgroup_parent, container, expected) == expected


# -- lists and statistics --------------------------------------------------------------------------


def test_list_filters(kubelet: Kubelet, pulled: str) -> None:
    first, second = kubelet.run_pod(), kubelet.run_pod()
    one = kubelet.run(first, pulled, SLEEP, labels={"app": kubelet.prefix, "n": "1"})
    two = kubelet.create(
        second, kubelet.container_config(pulled, SLEEP, labels={"app": kubelet.prefix, "n": "2"})
    )
    mine = {"label_selector": {"app": kubelet.prefix}}
    assert {c.id for c in kubelet.containers(**mine)} == {one, two}
    assert [c.id for c in kubelet.containers(pod_sandbox_id=first.id, **mine)] == [one]
    assert [c.id for c in kubelet.containers(id=two[:10], **mine)] == [two]
    running = api.ContainerStateValue(state=api.CONTAINER_RUNNING)
    assert [c.id for c in kubelet.containers(state=running, **mine)] == [one]
    assert not kubelet.containers(id=one, pod_sandbox_id=second.id)


def test_stats_of_one(kubelet: Kubelet, pod: Pod, pulled: str) -> None:
    script = "head -c 3000000 /dev/zero > /file; while :; do :; done"
    container = kubelet.run(pod, pulled, ["sh", "-c", script])

    def stats() -> api.ContainerStats:
        request = api.ContainerStatsRequest(container_id=container)
        return kubelet.runtime.ContainerStats(request).stats

    found = waiting.until(
        lambda: s if (s := stats()).cpu.usage_core_nano_seconds.value > 50_000_000 else None,
        "cpu use",
    )
    assert found is not None
    assert found.attributes.id == container
    assert found.attributes.metadata.name == "main"
    assert found.memory.working_set_bytes.value > 0
    assert found.cpu.timestamp > 0


@pytest.mark.ours
def test_stats_count_the_writable_layer(kubelet: Kubelet, container: str) -> None:
    kubelet.exec_sync(container, ["sh", "-c", "head -c 3000000 /dev/zero > /file"])

    def used() -> int:
        request = api.ContainerStatsRequest(container_id=container)
        return kubelet.runtime.ContainerStats(request).stats.writable_layer.used_bytes.value

    waiting.until(lambda: used() >= 3_000_000, "3 MB in the writable layer", seconds=30)


def test_stats_of_all_include_created_ones(kubelet: Kubelet, pod: Pod, pulled: str) -> None:
    labels = {"app": kubelet.prefix}
    running = kubelet.run(pod, pulled, SLEEP, name="one", labels=labels)
    created = kubelet.create(
        pod, kubelet.container_config(pulled, SLEEP, name="two", labels=labels)
    )
    condition = api.ContainerStatsFilter(label_selector=labels)
    request = api.ListContainerStatsRequest(filter=condition)
    found = kubelet.runtime.ListContainerStats(request).stats
    assert {s.attributes.id for s in found} == {running, created}
    assert all(s.attributes.metadata.name for s in found)


@pytest.mark.ours
def test_the_streamed_lists_are_the_lists(kubelet: Kubelet, container: str) -> None:
    chunks = kubelet.streams.StreamContainers(
        api.StreamContainersRequest(), timeout=waiting.patient(10)
    )
    assert container in {item.id for chunk in chunks for item in chunk.containers}
    stats = kubelet.streams.StreamContainerStats(
        api.StreamContainerStatsRequest(), timeout=waiting.patient(10)
    )
    assert container in {s.attributes.id for chunk in stats for s in chunk.container_stats}


def test_a_verbose_status_tells_the_pid(kubelet: Kubelet, container: str) -> None:
    info = kubelet.status_response(container, verbose=True).info["info"]
    assert '"pid"' in info


@pytest.mark.ours
def test_a_verbose_status_is_for_people(kubelet: Kubelet, pod: Pod, pulled: str) -> None:
    envs = [api.KeyValue(key="A", value=b"text"), api.KeyValue(key="B")]
    container = kubelet.run(pod, pulled, SLEEP, envs=envs)
    info = json.loads(kubelet.status_response(container, verbose=True).info["info"])
    assert info["privileged"] is False
    assert info["config"]["envs"] == [{"key": "A", "value": "text"}, {"key": "B", "value": ""}]
    assert Path("/proc", str(info["pid"])).exists()
    kubelet.stop(container)
    info = json.loads(kubelet.status_response(container, verbose=True).info["info"])
    assert info["pid"] == 0
