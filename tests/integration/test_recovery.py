# SPDX-License-Identifier: Apache-2.0
"""The server killed at any moment: what was running runs on, what was half made is whole or gone
(hazards R01, R02, R05, R36).
"""

import concurrent.futures
import functools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Set
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from cri_server import names
from cri_server.pb import api_pb2 as api
from shim import linux, mounts, process
from tests import residue
from tests.conftest import Marks
from tests.fakes import cni
from tests.fakes.kubelet import Kubelet, Pod, is_ready, refusal
from tests.integration.conftest import DRIVER, SLEEP, ClientOf, MakeSite
from tests.lab import cgroups, faults, image, network, server, waiting
from tests.lab import registry as registries

pytestmark = [
    pytest.mark.needs("root", "netns", "overlay", "cni", "runc", "docker-registry"),
    pytest.mark.ours,
    pytest.mark.usefixtures("traceless"),
    pytest.mark.timeout(120),
]
MOST_STEPS = 60


@pytest.fixture
def killable(make_site: MakeSite, client_of: ClientOf, reference: str) -> server.Site:
    """Return a server of the test's own that has the test image."""
    site = make_site(runtime={"runtime_timeout": waiting.patient(5)})
    client_of(site).pull(reference)
    return site


def addresses(net: network.Network) -> Set[str]:
    """Return what host-local has given out."""
    folder = network.LEASES / net.name
    return {p.name for p in folder.iterdir() if p.name[0].isdigit()} if folder.exists() else set()


def start_of(pid: int) -> str:
    """Return what tells a process from a later one of the same number."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


# -- an idle server --------------------------------------------------------------------------------


def test_everything_is_as_it_was(
    killable: server.Site, client_of: ClientOf, reference: str
) -> None:
    client = client_of(killable)
    pods = [client.run_pod() for _ in range(3)]
    client.stop_pod(pods[2].id)
    running = client.run(pods[0], reference, SLEEP, name="running")
    created = client.create(pods[0], client.container_config(reference, SLEEP, name="created"))
    exited = client.run(pods[1], reference, ["sh", "-c", "exit 3"], name="exited")
    client.wait_exit(exited)
    pid = faults.pid_of(client, running)
    born = start_of(pid)
    containers = (running, created, exited)
    before = [client.status(c) for c in containers], [client.pod_status(p.id) for p in pods]
    killable.kill()
    begin = time.monotonic()
    killable.start()
    assert time.monotonic() - begin < waiting.patient(5)

    client = client_of(killable)
    after = [client.status(c) for c in containers], [client.pod_status(p.id) for p in pods]
    for answer in (*before[1], *after[1]):
        answer.ClearField("timestamp")
    assert after == before
    assert (faults.pid_of(client, running), start_of(pid)) == (pid, born)
    assert client.exec_sync(running, ["echo", "yes"]).stdout == b"yes\n"
    request = api.ContainerStatsRequest(container_id=running)
    assert client.runtime.ContainerStats(request).stats.memory.working_set_bytes.value > 0
    client.start(created)
    assert client.exec_sync(created, ["true"]).exit_code == 0
    code, _ = refusal(lambda: client.start(exited))
    assert code is grpc.StatusCode.FAILED_PRECONDITION


@pytest.mark.slow
def test_fifty_pods_are_as_they_were(
    killable: server.Site, client_of: ClientOf, reference: str
) -> None:
    client = client_of(killable)

    def run(number: int) -> str:
        config = client.pod_config(f"own-{number}")
        config.linux.security_context.namespace_options.network = api.NamespaceMode.NODE
        return client.run(client.run_pod(config), reference, SLEEP)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        running = list(pool.map(run, range(50)))
    pids = {container: faults.pid_of(client, container) for container in running}
    born = {pid: start_of(pid) for pid in pids.values()}
    killable.kill()
    begin = time.monotonic()
    killable.start()
    assert time.monotonic() - begin < waiting.patient(5)
    client = client_of(killable)
    assert {p.state for p in client.pods()} == {api.SANDBOX_READY}
    assert {c.id: c.state for c in client.containers()} == dict.fromkeys(
        running, api.CONTAINER_RUNNING
    )
    assert {c: faults.pid_of(client, c) for c in running} == pids
    assert {pid: start_of(pid) for pid in born} == born
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda pod: client.remove_pod(pod.id), client.pods()))


def test_an_end_while_nobody_looked_is_told_as_it_was(
    killable: server.Site, client_of: ClientOf, reference: str, tmp_path: Path
) -> None:
    client = client_of(killable)
    pod = client.run_pod()
    gate = api.Mount(host_path=os.fspath(tmp_path), container_path="/gate")
    script = "until [ -e /gate/open ]; do sleep 0.02; done; exit 42"
    container = client.run(pod, reference, ["sh", "-c", script], mounts=[gate])
    pid = faults.pid_of(client, container)
    killable.kill()
    opened = time.time_ns()
    (tmp_path / "open").touch()
    waiting.until(lambda: not Path(f"/proc/{pid}").exists(), "the container ends")
    ended = time.time_ns()
    killable.start()
    status = client_of(killable).status(container)
    assert (status.state, status.exit_code) == (api.CONTAINER_EXITED, 42)
    assert opened <= status.finished_at <= ended + 1_000_000_000
    assert status.started_at < opened


def test_ten_megabytes_of_log_without_a_server(
    killable: server.Site, client_of: ClientOf, reference: str
) -> None:
    client = client_of(killable)
    pod = client.run_pod()
    line = "x" * 90
    count = f"seq 1 100000 | sed 's/$/ {line}/'"
    script = f"echo ready; sleep 0.5; {count}; echo done; sleep 1000"
    container = client.run(pod, reference, ["sh", "-c", script])
    path = Path(client.status(container).log_path)
    client.wait_log(container, "ready")
    killable.kill()
    waiting.until(lambda: path.read_bytes().endswith(b" done\n"), "all is written", seconds=30)
    killable.start()
    texts = [entry.text for entry in client_of(killable).log(container)]
    assert texts[0] == "ready"
    assert [int(text.split()[0]) for text in texts[1:-1]] == list(range(1, 100_001))


def test_what_was_asked_of_a_killed_server(
    killable: server.Site, client_of: ClientOf, reference: str
) -> None:
    """An exec ends with its caller; a stop can be asked for again, with less patience."""
    client = client_of(killable)
    deaf = "trap '' TERM; echo ready; while :; do sleep 0.05; done"
    container = client.run(client.run_pod(), reference, ["sh", "-c", deaf])
    client.wait_log(container, "ready")
    with concurrent.futures.ThreadPoolExecutor() as pool:
        stopping = pool.submit(lambda: client.stop(container, timeout=50))
        running = pool.submit(lambda: client.exec_sync(container, ["sleep", "9868"]))
        waiting.until(lambda: faults.processes("sleep", "9868"), "the command runs")
        killable.kill()
        for call in (stopping, running):
            assert isinstance(call.exception(), grpc.RpcError)
    waiting.until(lambda: not faults.processes("sleep", "9868"), "the command ends")
    killable.start()
    client = client_of(killable)
    assert client.status(container).state == api.CONTAINER_RUNNING
    client.stop(container)
    assert client.status(container).exit_code == 137


def test_a_server_that_is_asked_to_end_does_not_wait_for_ever(
    make_site: MakeSite, client_of: ClientOf, tmp_path: Path
) -> None:
    plugins = faults.hanging(tmp_path)
    site = make_site(network=faults.network(plugins))
    client = client_of(site)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        running = pool.submit(client.run_pod)
        pids = waiting.until(plugins.hanging, "the plugin hangs")
        begin = time.monotonic()
        assert site.stop() == 0
        assert time.monotonic() - begin < waiting.patient(20)
        assert isinstance(running.exception(), grpc.RpcError)
    assert not [pid for pid in pids if faults.alive(pid)]
    site.start()
    assert plugins.cached() == []
    assert not client_of(site).pods()


# -- killed in the middle --------------------------------------------------------------------------


@dataclass
class Scene:
    """What a call is made on."""

    client: Kubelet
    reference: str
    pod: Pod
    container: str = ""


def run_pod(at: Scene) -> None:
    at.pod = at.client.run_pod(at.pod.config)


def create(at: Scene) -> None:
    config = at.client.container_config(at.reference, SLEEP)
    at.container = at.client.create(at.pod, config)


def start(at: Scene) -> None:
    at.client.start(at.container)


def stop(at: Scene) -> None:
    at.client.stop(at.container)


def remove(at: Scene) -> None:
    at.client.remove(at.container)


def stop_pod(at: Scene) -> None:
    at.client.stop_pod(at.pod.id)


def remove_pod(at: Scene) -> None:
    at.client.runtime.RemovePodSandbox(api.RemovePodSandboxRequest(pod_sandbox_id=at.pod.id))


def pull(at: Scene) -> None:
    at.client.pull(at.reference)


def remove_image(at: Scene) -> None:
    at.client.remove_image(at.reference)


STORY = (run_pod, create, start)  # what has been done before each call
CALLS: dict[Callable[[Scene], None], int] = {
    run_pod: 0,
    create: 1,
    start: 2,
    stop: 3,
    remove: 3,
    stop_pod: 3,
    remove_pod: 3,
}


IMAGE_CALLS = (pull, remove_image)


@pytest.mark.parametrize("call", IMAGE_CALLS, ids=lambda call: call.__name__)
@pytest.mark.timeout(300)
def test_killed_at_every_step_of_an_images_life(
    killable: server.Site,
    client_of: ClientOf,
    registry: registries.Registry,
    call: Callable[[Scene], None],
) -> None:
    reference = registry.push(image.busybox([image.Entry(name="a", data=b"b")]), "recovery/image")
    trigger = killable.home / "die-at"
    killable.kill()
    killable.program = (sys.executable, "-m", "tests.lab.crashing", os.fspath(trigger))
    killable.start()
    before = folders_of_images(killable)
    steps = 0
    while image_killed_at(steps + 1, killable, client_of, reference, call, trigger):
        steps += 1
        assert steps < MOST_STEPS
        assert residue.of_folders(killable.root, killable.state) == []
        assert folders_of_images(killable) == before
    print(f"{call.__name__} was killed at {steps} steps")
    assert steps


def folders_of_images(site: server.Site) -> Set[Path]:
    """Return what the server keeps of images."""
    patterns = ("images/*", "layers/*", "blobs/*/*", "tmp/*")
    return {path for pattern in patterns for path in site.root.glob(pattern)}


def image_killed_at(
    step: int,
    site: server.Site,
    client_of: ClientOf,
    reference: str,
    call: Callable[[Scene], None],
    trigger: Path,
) -> bool:
    """Have the server die at this step of a call; the image is then whole or gone, and the call
    can be made again; False when it has fewer steps.
    """
    scene = Scene(client_of(site), reference, Pod(id="", config=api.PodSandboxConfig()))
    if call is remove_image:
        pull(scene)
    died = dies_at(step, site, trigger, call, scene)
    if died:
        site.start()
        scene.client = client_of(site)
        check_image(scene)
        call(scene)
    assert (scene.client.image_status(reference) is not None) is (call is pull)
    check_image(scene)
    remove_image(scene)
    return died


def dies_at(
    step: int, site: server.Site, trigger: Path, call: Callable[[Scene], None], scene: Scene
) -> bool:
    """Have the server die at this step of a call; False when the call has fewer steps."""
    trigger.write_text(str(step))
    try:
        call(scene)
    except grpc.RpcError as e:
        assert e.code() is grpc.StatusCode.UNAVAILABLE, site.tail()  # noqa: PT017
        site.wait_death()
    trigger.unlink()
    return site.process is None


def check_image(at: Scene) -> None:
    """See that an image that is listed is whole."""
    if at.client.image_status(at.reference) is not None:
        pod = at.client.run_pod()
        container = at.client.run(pod, at.reference, SLEEP)
        assert at.client.exec_sync(container, ["cat", "/a"]).stdout == b"b"
        at.client.remove_pod(pod.id)


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
@pytest.mark.timeout(300)
def test_killed_at_every_step(
    killable: server.Site,
    client_of: ClientOf,
    reference: str,
    net: network.Network,
    marks: Marks,
    call: Callable[[Scene], None],
) -> None:
    trigger = killable.home / "die-at"
    killable.kill()
    killable.program = (sys.executable, "-m", "tests.lab.crashing", os.fspath(trigger))
    killable.start()
    steps = 0
    while killed_at(steps + 1, killable, client_of, reference, call, trigger):
        steps += 1
        assert steps < MOST_STEPS
        assert residue.of_folders(killable.root, killable.state) == []
    print(f"{call.__name__} was killed at {steps} steps")
    assert steps
    assert addresses(net) == set()


def killed_at(
    step: int,
    site: server.Site,
    client_of: ClientOf,
    reference: str,
    call: Callable[[Scene], None],
    trigger: Path,
) -> bool:
    """Have the server die at this step of a call, and see that the call can be made again and leads
    to the same; False when it has fewer steps.
    """
    client = client_of(site)
    config = client.pod_config(f"{call.__name__}-{step}".replace("_", "-"))
    scene = Scene(client, reference, Pod(id="", config=config))
    for earlier in STORY[: CALLS[call]]:
        earlier(scene)
    died = dies_at(step, site, trigger, call, scene)
    if died:
        site.start()
        scene.client = client_of(site)
        check_agreement(scene)
        again(scene, call)
    check_result(scene, call)
    scene.client.remove_pod(scene.pod.id)
    assert not scene.client.pods()
    assert not scene.client.containers()
    return died


def check_agreement(at: Scene) -> None:
    """See that what is listed is true."""
    for pod in at.client.pods():
        assert at.client.pod_status(pod.id).status.state == pod.state
        assert pod.metadata == at.pod.config.metadata
    for container in at.client.containers():
        assert at.client.status(container.id).state == container.state
        if container.state == api.CONTAINER_RUNNING:
            assert at.client.exec_sync(container.id, ["true"]).exit_code == 0


def again(at: Scene, call: Callable[[Scene], None]) -> None:
    """Make the call again; a start that came through was one."""
    if call is start and at.client.status(at.container).state == api.CONTAINER_RUNNING:
        return
    call(at)


def check_result(at: Scene, call: Callable[[Scene], None]) -> None:
    """See that it is as it is after this call."""
    pods, containers = at.client.pods(), at.client.containers()
    states = [c.state for c in containers]
    if call is remove_pod:
        assert (pods, containers) == ([], [])
        return
    [pod] = pods
    assert pod.id == at.pod.id
    assert pod.state == (api.SANDBOX_NOTREADY if call is stop_pod else api.SANDBOX_READY)
    expected: dict[Callable[[Scene], None], list[int]] = {
        create: [api.CONTAINER_CREATED],
        start: [api.CONTAINER_RUNNING],
        stop: [api.CONTAINER_EXITED],
        stop_pod: [api.CONTAINER_EXITED],
    }
    assert states == expected.get(call, [])
    if call is create:
        start(at)
    if call in (create, start):
        assert at.client.exec_sync(at.container, ["true"]).exit_code == 0
    if call is run_pod:
        assert at.client.pod_status(at.pod.id).status.network.ip


def test_killed_while_the_runtime_is_at_work(
    make_site: MakeSite, client_of: ClientOf, reference: str, tmp_path: Path
) -> None:
    site = make_site(**faults.handler(tmp_path, run="touch $here/busy; sleep 1000"))
    client = client_of(site)
    client.pull(reference)
    pod = client.run_pod(handler="odd")
    container = client.create(pod, client.container_config(reference, SLEEP))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        starting = pool.submit(client.start, container)
        waiting.until((tmp_path / "busy").exists, "the runtime is at work")
        site.kill()
        assert isinstance(starting.exception(), grpc.RpcError)
    site.start()
    client = client_of(site)
    assert client.status(container).state == api.CONTAINER_CREATED
    faults.mend(tmp_path)
    client.start(container)
    assert client.exec_sync(container, ["true"]).exit_code == 0
    client.stop(container)
    assert client.status(container).exit_code == 137


def test_killed_while_a_plugin_hangs(
    make_site: MakeSite, client_of: ClientOf, tmp_path: Path
) -> None:
    plugins = faults.hanging(tmp_path)
    site = make_site(network=faults.network(plugins))
    client = client_of(site)
    config = client.pod_config()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        running = pool.submit(client.run_pod, config)
        pids = waiting.until(plugins.hanging, "the plugin hangs")
        site.kill()
        assert isinstance(running.exception(), grpc.RpcError)
    plugins.install("hanging", ADD=cni.result("10.1.2.3/24"))
    site.start()
    assert not [pid for pid in pids if faults.alive(pid)]
    assert plugins.verbs() == ["hanging ADD", "hanging DEL"]
    assert plugins.cached() == []
    client = client_of(site)
    assert not client.pods()
    assert client.pod_status(client.run_pod(config).id).status.network.ip == "10.1.2.3"


# -- without a shim, or a mute one -----------------------------------------------------------------


def test_a_shim_that_died_meanwhile(
    killable: server.Site, client_of: ClientOf, reference: str
) -> None:
    client = client_of(killable)
    pod, other = client.run_pod(), client.run_pod()
    lost = client.run(pod, reference, SLEEP, name="lost")
    spoilt = client.run(pod, reference, SLEEP, name="spoilt")
    ended = client.run(pod, reference, ["sh", "-c", "exit 5"], name="ended")
    client.wait_exit(ended)
    pids = [faults.pid_of(client, lost), faults.pid_of(client, spoilt)]
    killable.kill()
    (killable.state / "containers" / spoilt / "exit.json").write_bytes(b'{"exit_code": \xff')
    os.kill(faults.shim_of(killable, pod.id), signal.SIGKILL)
    killable.start()
    client = client_of(killable)
    assert client.pod_status(pod.id).status.state == api.SANDBOX_NOTREADY
    for container in (lost, spoilt):
        status = client.status(container)
        assert (status.state, status.exit_code) == (api.CONTAINER_EXITED, 255)
        assert status.reason == "Unknown"
        assert status.finished_at >= status.started_at
    assert client.status(ended).exit_code == 5
    assert not [pid for pid in pids if faults.alive(pid)]
    assert client.pod_status(other.id).status.state == api.SANDBOX_READY
    client.run(client.run_pod(client.pod_config("own-next")), reference, SLEEP)


@pytest.mark.parametrize("alive", [True, False], ids=["with-its-shim", "without-its-shim"])
def test_a_pod_of_the_other_cgroup_driver_can_be_looked_at_and_removed(
    killable: server.Site, client_of: ClientOf, reference: str, cgroup_parent: str, alive: bool
) -> None:
    client = client_of(killable)
    config = client.pod_config("own-other-driver")
    config.linux.security_context.namespace_options.pid = api.NamespaceMode.POD
    pod = client.run_pod(config)
    pid = faults.pid_of(client, client.run(pod, reference, SLEEP))
    killable.kill()
    if not alive:
        os.kill(faults.shim_of(killable, pod.id), signal.SIGKILL)
    other = {"systemd": "cgroupfs", "cgroupfs": "systemd"}[DRIVER]
    runtime = {**killable.settings["runtime"], "cgroup_driver": other}
    killable.settings = {**killable.settings, "runtime": runtime}
    killable.start()
    client = client_of(killable)
    ready = api.SANDBOX_READY if alive else api.SANDBOX_NOTREADY
    assert client.pod_status(pod.id).status.state == ready
    client.runtime.ListPodSandboxStats(api.ListPodSandboxStatsRequest())
    client.remove_pod(pod.id)
    assert not client.pods()
    assert not faults.alive(pid)
    cgroups.remove(cgroup_parent)  # slices that the other driver knows nothing of


def test_a_mute_shim_does_not_keep_the_server_from_starting(
    killable: server.Site, client_of: ClientOf, reference: str
) -> None:
    client = client_of(killable)
    mute, other = client.run_pod(), client.run_pod()
    container = client.run(mute, reference, SLEEP)
    lasting = client.run(other, reference, SLEEP)
    pid = faults.pid_of(client, container)
    shim = faults.shim_of(killable, mute.id)
    killable.kill()
    os.kill(shim, signal.SIGSTOP)
    begin = time.monotonic()
    killable.start(wait=False)
    code = waiting.until(lambda: answer_of(killable), "the server answers")
    assert code == (grpc.StatusCode.UNAVAILABLE, True)
    waiting.until(lambda: is_ready(killable.endpoint), "the server is ready")
    assert time.monotonic() - begin < waiting.patient(10)
    client = client_of(killable)
    assert client.status(container).state == api.CONTAINER_RUNNING
    assert client.exec_sync(lasting, ["true"]).exit_code == 0
    os.kill(shim, signal.SIGKILL)  # test_liveness has the minute after which the server does it
    client.remove_pod(mute.id)
    assert not faults.alive(pid)


def test_the_end_of_a_pod_that_is_given_up_late_is_told(
    killable: server.Site, client_of: ClientOf
) -> None:
    pod = client_of(killable).run_pod()
    shim = faults.shim_of(killable, pod.id)
    killable.kill()
    os.kill(shim, signal.SIGSTOP)
    killable.start()
    client = client_of(killable)
    stream = client.streams.GetContainerEvents(api.GetEventsRequest(), timeout=waiting.patient(60))
    stream.initial_metadata()  # the server listens for us
    os.kill(shim, signal.SIGKILL)
    event = next(stream)
    stream.cancel()
    assert (event.container_id, event.container_event_type) == (pod.id, api.CONTAINER_STOPPED_EVENT)
    assert event.pod_sandbox_status.state == api.SANDBOX_NOTREADY


def answer_of(site: server.Site) -> tuple[grpc.StatusCode, bool] | None:
    """Return how a server answers, and whether it says that it is starting; None when there is
    none.
    """
    with Kubelet(site.endpoint) as client:
        code, text = refusal(client.pods)
    return (code, True) if "starting" in text else None


def test_after_a_reboot_nothing_runs_and_everything_can_be_removed(
    make_site: MakeSite,
    client_of: ClientOf,
    reference: str,
    net: network.Network,
    tmp_path: Path,
) -> None:
    """Hazards R34, where the state survives it too; numbers of processes mean nothing any more."""
    # Without masquerading, whose rules the bridge plugin forgets together with the namespace.
    conflist = net.conflist()
    conflist["plugins"][0]["ipMasq"] = False
    (tmp_path / "10-plain.conflist").write_text(json.dumps(conflist))
    killable = make_site(network={"conf_dir": os.fspath(tmp_path)})
    client = client_of(killable)
    client.pull(reference)
    pod = client.run_pod()
    lost = client.run(pod, reference, SLEEP, name="lost")
    ended = client.run(pod, reference, ["sh", "-c", "exit 5"], name="ended")
    client.wait_exit(ended)
    dead = [faults.shim_of(killable, pod.id), faults.pid_of(client, lost)]
    killable.kill()
    for pid in dead:
        os.kill(pid, signal.SIGKILL)
    for place in (f"/run/netns/{pod.id}", os.fspath(killable.state)):
        for point in mounts.mounts_below(place):
            mounts.unmount(point)
    bystander = process.spawn(["sleep", "1000"])
    try:
        for record in (
            *killable.root.glob("pods/*.json"),
            *killable.root.glob("containers/*.json"),
        ):
            reboot(record, bystander.pid)
        killable.start()
        client = client_of(killable)
        assert client.pod_status(pod.id).status.state == api.SANDBOX_NOTREADY
        status = client.status(lost)
        assert (status.state, status.exit_code) == (api.CONTAINER_EXITED, 255)
        assert status.reason == "Unknown"
        assert client.status(ended).exit_code == 5
        assert len(addresses(net)) == 1
        client.stop_pod(pod.id)
        client.remove_pod(pod.id)
        assert addresses(net) == set()
        assert faults.alive(bystander.pid)
        client.run(client.run_pod(pod.config), reference, SLEEP)
    finally:
        process.kill_group(bystander)
        process.reap(bystander)


def reboot(record: Path, pid: int) -> None:
    """Have a record be of another boot, and its processes' numbers be this one's."""
    document = json.loads(record.read_bytes())
    assert document["boot_id"]
    document["boot_id"] = "11111111-2222-3333-4444-555555555555"
    for number, start in (("shim_pid", "shim_start_time"), ("pid", "start_time")):
        if document.get(number):
            document[number], document[start] = pid, process.start_time(pid)
    record.write_text(json.dumps(document))


# -- what hangs ------------------------------------------------------------------------------------


def test_plugins_that_hang_keep_nobody_waiting(
    make_site: MakeSite, client_of: ClientOf, tmp_path: Path
) -> None:
    """Twenty pods were half made: more than are released at a time."""
    plugins = cni.Fakes(tmp_path)
    plugins.install("odd", ADD=cni.result("10.1.2.3/24"))
    plugins.configure("odd", version="1.1.0")
    site = make_site(network=faults.network(plugins))
    client = client_of(site)
    pods = [client.run_pod() for _ in range(20)]
    site.kill()
    for pod in pods:
        record = site.root / f"pods/{pod.id}.json"
        spoil(record, lambda text: text.replace(b'"state":"ready"', b'"state":"creating"'))
    plugins.install("odd", ADD=cni.result("10.1.2.3/24"), DEL=cni.HANG, GC=cni.HANG)
    begin = time.monotonic()
    site.start()
    assert time.monotonic() - begin < waiting.patient(9)
    client = client_of(site)
    assert {p.id for p in client.pods()} == {p.id for p in pods}
    assert {p.state for p in client.pods()} == {api.SANDBOX_NOTREADY}
    _, pid = waiting.until(plugins.hanging, "a plugin hangs")
    removing = api.RemovePodSandboxRequest(pod_sandbox_id=pods[0].id)
    code, _ = refusal(lambda: client.runtime.RemovePodSandbox(removing, timeout=0.5))
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert faults.alive(pid)
    site.kill()
    plugins.install("odd", ADD=cni.result("10.1.2.3/24"), DEL="true", GC="true")
    site.start()
    client = client_of(site)
    waiting.until(lambda: not client.pods(), "all are released")
    assert plugins.cached() == []
    assert client.pod_status(client.run_pod(pods[0].config).id).status.network.ip == "10.1.2.3"
    waiting.until(lambda: "odd GC" in plugins.verbs(), "leaks are looked for")


# -- spoilt records --------------------------------------------------------------------------------

SPOILT: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda text: b"",
    "truncated": lambda text: text[: len(text) // 2],
    "binary": lambda text: os.urandom(500),
    "version": lambda text: text.replace(b'"version":1', b'"version":0'),
    "list": lambda text: b"[" + text + b"]",
    "deep": lambda text: b"[" * 100_000,
    "types": lambda text: text.replace(b'"created_at":', b'"created_at":"x","was":'),
    "other": lambda text: text.replace(b'"id":"', b'"id":"../'),
}


def spoil(file: Path, how: Callable[[bytes], bytes]) -> None:
    before = file.read_bytes()
    file.write_bytes(how(before))
    assert file.read_bytes() != before


def test_spoilt_records_harm_nobody_else(
    killable: server.Site, client_of: ClientOf, reference: str, net: network.Network
) -> None:
    client = client_of(killable)
    whole = client.run_pod()
    lasting = client.run(whole, reference, SLEEP)
    pods = {name: client.run_pod(client.pod_config(f"own-{name}")) for name in SPOILT}
    pids = {
        name: faults.pid_of(client, client.run(pod, reference, SLEEP)) for name, pod in pods.items()
    }
    strays = {name: client.run(whole, reference, SLEEP, name=name) for name in SPOILT}
    pids |= {f"stray {name}": faults.pid_of(client, stray) for name, stray in strays.items()}
    killable.kill()
    for name, how in SPOILT.items():
        spoil(killable.root / f"pods/{pods[name].id}.json", how)
        spoil(killable.root / f"containers/{strays[name]}.json", how)
    killable.start()

    client = client_of(killable)
    assert [p.id for p in client.pods()] == [whole.id]
    # The server waits 5 s for what it ends; a slow machine sees that go on.
    waiting.until(lambda: [c.id for c in client.containers()] == [lasting], "no other is listed")
    waiting.until(lambda: not any(map(faults.alive, pids.values())), "no other lives")
    waiting.until(lambda: len(addresses(net)) == 1, "addresses are given back")
    assert client.exec_sync(lasting, ["true"]).exit_code == 0
    again = client.run_pod(pods["empty"].config)
    client.run(again, reference, SLEEP)
    client.run(whole, reference, SLEEP, name="empty")
    client.remove_pod(again.id)
    for file in killable.root.glob("*/*.broken"):
        file.unlink()
    for pod in pods.values():  # which of them the kubelet had made is lost with the records
        cgroups.remove(pod.config.linux.cgroup_parent)


SPOILT_LAYERS = {n: SPOILT[n] for n in ("empty", "truncated", "binary", "list", "deep")} | {
    "types": lambda text: text.replace(b'"bytes":', b'"bytes":"x","was":'),
    "latin": lambda text: text.replace(b"sha256:", b"\xff"),
}


def test_a_spoilt_layer_stays_under_its_containers_and_a_pull_heals_it(
    killable: server.Site, client_of: ClientOf, registry: registries.Registry
) -> None:
    client = client_of(killable)
    before = set(os.listdir(killable.root / "layers"))
    made = image.busybox(*([image.Entry(name=name, data=b"whole")] for name in SPOILT_LAYERS))
    layered = registry.push(made, "recovery/layered")
    client.pull(layered)
    pod = client.run_pod()
    running = client.run(pod, layered, SLEEP, name="running")
    killable.kill()
    layers = sorted(set(os.listdir(killable.root / "layers")) - before)
    for layer, how in zip(layers, SPOILT_LAYERS.values(), strict=True):
        spoil(killable.root / f"layers/{layer}/layer.json", how)
    killable.start()

    client = client_of(killable)
    words = [b"whole"] * len(SPOILT_LAYERS)
    show = ["sh", "-c", f"cd /; for f in {' '.join(SPOILT_LAYERS)}; do cat $f; echo; done"]
    assert client.exec_sync(running, show).stdout.split() == words
    assert client.image_status(layered) is None
    client.pull(layered)
    again = client.run(pod, layered, SLEEP, name="again")
    for container in (running, again):
        assert client.exec_sync(container, show).stdout.split() == words


def test_records_of_a_later_version_end_nothing(
    killable: server.Site, client_of: ClientOf, reference: str
) -> None:
    client = client_of(killable)
    pod = client.run_pod()
    pid = faults.pid_of(client, client.run(pod, reference, SLEEP))
    killable.kill()
    record = killable.root / f"pods/{pod.id}.json"
    before = record.read_bytes()
    spoil(record, lambda text: text.replace(b'"version":1', b'"version":2'))
    killable.start(wait=False)
    assert killable.wait_death() == 2
    assert f"{record} is a record of version 2, and this server knows 1" in killable.tail()
    assert faults.alive(pid)
    record.write_bytes(before)
    killable.start()
    assert client_of(killable).pod_status(pod.id).status.state == api.SANDBOX_READY
    assert faults.alive(pid)


def test_odd_things_in_our_folders_harm_nobody(
    killable: server.Site, client_of: ClientOf, reference: str, net: network.Network, tmp_path: Path
) -> None:
    client = client_of(killable)
    pod = client.run_pod()
    container = client.run(pod, reference, SLEEP)
    killable.kill()
    precious = tmp_path / "precious"
    precious.mkdir()
    linux.mount("tmpfs", precious, "tmpfs")
    (precious / "file").touch()
    results = Path("/var/lib/cni/results")
    odd = results / f"{net.name}-x"
    try:
        for folder in (killable.state / "pods", killable.state / "containers"):
            (folder / "file").write_text("x")
            (folder / "link").symlink_to(precious)
            (folder / names.new_id()).write_text("x")
            (folder / names.new_id()).symlink_to(precious)
            (folder / names.new_id()).mkdir()
        (killable.state / "runtimes/runc" / names.new_id()).write_text("x")
        for folder in (killable.root / "pods", killable.root / "containers"):
            (folder / "folder.tmp").mkdir()
            (folder / f"{names.new_id()}.json").mkdir()
        (killable.root / "writable/file").write_text("x")
        (killable.root / "handlers/odd.json").mkdir()
        odd.mkdir()
        killable.start()
        client = client_of(killable)
        assert client.exec_sync(container, ["true"]).exit_code == 0
        for name, left in (("pods", pod.id), ("containers", container)):
            folder = killable.state / name
            waiting.until(functools.partial(is_alone, folder, left), f"{name} are swept")
        assert (precious / "file").exists()
        client.remove_pod(pod.id)
    finally:
        odd.rmdir()
        linux.umount2(precious)
        for entry in killable.root.glob("[chp]*/*.*"):
            if entry.is_dir():
                entry.rmdir()


def is_alone(folder: Path, name: str) -> bool:
    return os.listdir(folder) == [name]


def test_spoilt_bundles_can_be_removed(
    killable: server.Site, client_of: ClientOf, reference: str
) -> None:
    client = client_of(killable)
    pod = client.run_pod()
    running = client.run(pod, reference, SLEEP, name="running")
    created = client.create(pod, client.container_config(reference, SLEEP, name="created"))
    killable.kill()
    for container in (running, created):
        (killable.state / "containers" / container / "config.json").unlink()
    killable.start()
    client = client_of(killable)
    assert client.status(running).state == api.CONTAINER_RUNNING
    code, _ = refusal(lambda: client.exec_sync(running, ["true"]))
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    refusal(lambda: client.start(created))
    assert client.status(created).reason == "StartError"
    client.stop(running)
    client.remove(running)
    client.remove(created)
    client.remove_pod(pod.id)
