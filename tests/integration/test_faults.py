# SPDX-License-Identifier: Apache-2.0
"""What goes wrong around the server: shims, plugins and OCI runtimes that die, hang or lie, calls
that race each other (hazards R06-R13, R21-R25).
"""

import concurrent.futures
import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from cri_server.pb import api_pb2 as api
from shim import linux
from tests import residue
from tests.fakes import cni
from tests.fakes.kubelet import Kubelet, Pod, refusal, state_of
from tests.integration.conftest import SLEEP, ClientOf, MakeSite
from tests.lab import cgroups, faults, network, server, waiting

pytestmark = [
    pytest.mark.needs("root", "netns", "overlay", "cni", "runc", "docker-registry"),
    pytest.mark.ours,
    pytest.mark.usefixtures("traceless"),
]
READY, NOTREADY = api.SANDBOX_READY, api.SANDBOX_NOTREADY
RUNNING, EXITED = api.CONTAINER_RUNNING, api.CONTAINER_EXITED
DEADLINE = grpc.StatusCode.DEADLINE_EXCEEDED
ADDRESS = cni.result("10.1.2.3/24")


def wait_not_ready(client: Kubelet, pod: Pod) -> None:
    """Return once the pod is NOTREADY; the limit is that of hazards R06 and R13."""
    waiting.until(lambda: state_of(client, pod) == NOTREADY, "the pod is NOTREADY", seconds=5)


def remove_pod(client: Kubelet, pod: Pod) -> None:
    """RemovePodSandbox alone, without StopPodSandbox."""
    client.runtime.RemovePodSandbox(api.RemovePodSandboxRequest(pod_sandbox_id=pod.id))


# -- shims -----------------------------------------------------------------------------------------


def test_a_killed_shim_takes_its_pod_with_it(
    kubelet: Kubelet, site: server.Site, pulled: str
) -> None:
    pod, other = kubelet.run_pod(), kubelet.run_pod()
    tree = kubelet.run(pod, pulled, ["sh", "-c", "sleep 1000 & setsid sleep 1000 & wait"])
    lasting = kubelet.run(other, pulled, SLEEP)
    pids = [faults.pid_of(kubelet, tree)]
    pids += waiting.until(lambda: faults.children(pids[0]), "the container has children")
    os.kill(faults.shim_of(site, pod.id), signal.SIGKILL)
    status = kubelet.wait_exit(tree, seconds=5)
    assert (status.exit_code, status.reason) == (255, "Unknown")
    assert status.finished_at >= status.started_at
    assert not [pid for pid in pids if faults.alive(pid)]
    wait_not_ready(kubelet, pod)
    assert kubelet.exec_sync(lasting, ["true"]).exit_code == 0
    kubelet.remove_pod(pod.id)
    assert state_of(kubelet, other) == READY


def test_a_mute_shim_disturbs_no_other_pod(
    kubelet: Kubelet, site: server.Site, pulled: str
) -> None:
    pod, other = kubelet.run_pod(), kubelet.run_pod()
    container = kubelet.run(pod, pulled, SLEEP)
    pid, shim = faults.pid_of(kubelet, container), faults.shim_of(site, pod.id)
    os.kill(shim, signal.SIGSTOP)
    request = api.ExecSyncRequest(container_id=container, cmd=["true"], timeout=1)
    code, _ = refusal(lambda: kubelet.runtime.ExecSync(request, timeout=0.5))
    assert code is DEADLINE
    with concurrent.futures.ThreadPoolExecutor() as pool:
        removing = pool.submit(kubelet.remove_pod, pod.id)
        slowest = 0.0
        while not removing.done():
            begin = time.monotonic()
            assert len(kubelet.containers(id=container)) <= 1
            kubelet.runtime.ListContainerStats(api.ListContainerStatsRequest())
            slowest = max(slowest, time.monotonic() - begin)
            kubelet.remove(kubelet.run(other, pulled, SLEEP))
        removing.result()
    assert slowest < 1
    assert not faults.alive(pid)
    assert not faults.alive(shim)


def test_a_shim_that_dies_in_a_start_leaves_no_container_behind(
    make_site: MakeSite, client_of: ClientOf, reference: str, tmp_path: Path
) -> None:
    late = "touch $here/busy; while [ -e $here/busy ]; do sleep 0.02; done"
    site = make_site(**faults.handler(tmp_path, run=late))
    client = client_of(site)
    client.pull(reference)
    pod = client.run_pod(handler="odd")
    container = client.create(pod, client.container_config(reference, SLEEP))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        starting = pool.submit(client.start, container)
        waiting.until((tmp_path / "busy").exists, "the runtime is at work")
        os.kill(faults.shim_of(site, pod.id), signal.SIGKILL)
        assert isinstance(starting.exception(), grpc.RpcError)
    assert not faults.processes(os.fspath(tmp_path / "odd-runc"))
    assert client.status(container).reason == "StartError"
    wait_not_ready(client, pod)
    client.remove_pod(pod.id)


def test_the_zygote_is_replaced(kubelet: Kubelet, site: server.Site, pulled: str) -> None:
    before = kubelet.run_pod()
    [zygote] = [p for p in faults.children(site.pid) if faults.name_of(p) == "cri-zygote"]
    os.kill(zygote, signal.SIGKILL)
    pod = kubelet.run_pod()
    kubelet.run(pod, pulled, SLEEP)
    assert state_of(kubelet, before) == READY


def test_a_network_namespace_taken_away(
    make_site: MakeSite,
    client_of: ClientOf,
    reference: str,
    tmp_path: Path,
    net: network.Network,
) -> None:
    # Without masquerading, whose rules the bridge plugin forgets together with the namespace.
    conflist = net.conflist()
    conflist["plugins"][0]["ipMasq"] = False
    (tmp_path / "10-plain.conflist").write_text(json.dumps(conflist))
    client = client_of(make_site(network={"conf_dir": os.fspath(tmp_path)}))
    client.pull(reference)
    pod, other = client.run_pod(), client.run_pod()
    address = network.LEASES / net.name / client.pod_status(pod.id).status.network.ip
    container = client.run(pod, reference, SLEEP)
    assert address.exists()
    subprocess.run(["ip", "netns", "delete", pod.id], check=True)
    wait_not_ready(client, pod)
    assert client.wait_exit(container, seconds=5).exit_code == 137
    client.remove_pod(pod.id)
    assert not address.exists()
    assert state_of(client, other) == READY


@pytest.mark.needs("catatonit")
def test_the_end_of_the_pods_init_is_the_end_of_the_pod(kubelet: Kubelet, pulled: str) -> None:
    config = kubelet.pod_config()
    config.linux.security_context.namespace_options.pid = api.POD
    pod = kubelet.run_pod(config)
    linux = api.LinuxContainerConfig()
    linux.security_context.namespace_options.pid = api.POD
    container = kubelet.run(pod, pulled, SLEEP, linux=linux)
    info = json.loads(kubelet.pod_status(pod.id, verbose=True).info["info"])
    os.kill(int(info["pid"]), signal.SIGKILL)
    wait_not_ready(kubelet, pod)
    kubelet.wait_exit(container, seconds=5)
    kubelet.remove_pod(pod.id)


# -- CNI plugins -----------------------------------------------------------------------------------


@pytest.fixture
def plugins(tmp_path: Path) -> cni.Fakes:
    """Return fake plugins; `first` and `second` are a chain that works."""
    made = cni.Fakes(tmp_path)
    made.install("first", ADD=ADDRESS)
    made.install("second", ADD=ADDRESS)
    made.configure("first", "second")
    return made


@pytest.fixture
def node(make_site: MakeSite, client_of: ClientOf, plugins: cni.Fakes) -> Kubelet:
    """Return a client of a server with these plugins."""
    limits = dict.fromkeys(("add_timeout", "del_timeout"), waiting.patient(1.5))
    return client_of(make_site(network={**faults.network(plugins), **limits}))


def test_a_hanging_plugin_ends_and_is_made_up_for(node: Kubelet, plugins: cni.Fakes) -> None:
    plugins.install("second", ADD=cni.HANG)
    config = node.pod_config()
    request = api.RunPodSandboxRequest(config=config)
    begin = time.monotonic()
    code, _ = refusal(lambda: node.runtime.RunPodSandbox(request, timeout=0.5))
    assert code is DEADLINE
    assert time.monotonic() - begin < waiting.patient(1.4)
    pids = waiting.until(plugins.hanging, "the plugin hangs")
    code, text = refusal(lambda: node.run_pod(config))  # joins the attempt
    assert code is DEADLINE
    assert "second" in text
    assert not [pid for pid in pids if faults.alive(pid)]
    assert plugins.verbs() == ["first ADD", "second ADD", "second DEL", "first DEL"]
    assert node.pods() == []
    plugins.install("second", ADD=ADDRESS)
    node.run_pod(config)
    assert len(node.pods()) == 1


ODD_ANSWERS = {
    "garbage": "echo 'Segmentation fault'",
    "nothing": "true",
    "no address": cni.result(),
    "a list": "echo '[]'",
    "binary": "head -c 5000 /dev/urandom",
    "huge": "head -c 50000000 /dev/zero | tr '\\0' ' '",
    "silence": "exit 3",
    "killed": "kill -9 $$",
}


def test_a_plugin_that_talks_nonsense(node: Kubelet, plugins: cni.Fakes) -> None:
    for name, lines in ODD_ANSWERS.items():
        plugins.install("second", ADD=lines)
        _, text = refusal(node.run_pod)
        assert "second" in text, name
        assert len(text) < 5000
        assert plugins.verbs()[-2:] == ["second DEL", "first DEL"], name
        assert plugins.cached() == [], name
    assert node.pods() == []


def test_a_pod_that_cannot_be_undone_is_listed_until_it_can(
    node: Kubelet, plugins: cni.Fakes
) -> None:
    plugins.install("second", ADD=cni.fail("no luck"), DEL=cni.fail("none at all"))
    config = node.pod_config()
    _, text = refusal(lambda: node.run_pod(config))
    assert "no luck" in text
    [left] = node.pods()
    assert (left.state, left.metadata) == (NOTREADY, config.metadata)
    assert "first DEL" in plugins.verbs()
    _, text = refusal(lambda: node.remove_pod(left.id))
    assert "none at all" in text
    assert [p.id for p in node.pods()] == [left.id]
    plugins.install("second", ADD=ADDRESS, DEL="true")
    pod = node.run_pod(config)
    assert [p.id for p in node.pods()] == [pod.id]
    assert pod.id != left.id
    node.remove_pod(pod.id)
    assert plugins.cached() == []


def test_a_failing_del_stops_no_pod_but_its_removal(node: Kubelet, plugins: cni.Fakes) -> None:
    pod = node.run_pod()
    plugins.install("second", DEL=cni.fail("busy"))
    node.stop_pod(pod.id)
    assert state_of(node, pod) == NOTREADY
    assert not Path("/run/netns", pod.id).exists()
    _, text = refusal(lambda: remove_pod(node, pod))
    assert "busy" in text
    assert state_of(node, pod) == NOTREADY
    plugins.install("second", DEL="true")
    remove_pod(node, pod)
    assert plugins.cached() == []


def test_a_failing_del_is_tried_again_by_itself(
    make_site: MakeSite, client_of: ClientOf, plugins: cni.Fakes
) -> None:
    site = make_site(network=faults.network(plugins))
    client = client_of(site)
    stopped, stopped_before = client.run_pod(), client.run_pod()
    plugins.install("second", DEL=cni.fail("busy"))
    client.stop_pod(stopped_before.id)
    site.kill()
    site.start()
    client = client_of(site)
    client.stop_pod(stopped.id)
    assert len(plugins.cached()) == 2
    plugins.install("second", DEL="true")
    waiting.until(lambda: not plugins.cached(), "both networks are given back", seconds=30)
    for pod in (stopped, stopped_before):
        assert state_of(client, pod) == NOTREADY
        remove_pod(client, pod)


def test_a_pod_stops_without_any_configuration(node: Kubelet, plugins: cni.Fakes) -> None:
    pod = node.run_pod()
    for file in plugins.net.iterdir():
        file.unlink()
    node.remove_pod(pod.id)
    assert plugins.verbs()[-2:] == ["second DEL", "first DEL"]


# -- OCI runtimes ----------------------------------------------------------------------------------


@pytest.fixture
def odd(make_site: MakeSite, client_of: ClientOf, reference: str, tmp_path: Path) -> Kubelet:
    """Return a client of a server whose handler `odd` does as the test says."""
    limit = {"runtime_timeout": waiting.patient(1.5)}
    client = client_of(make_site(runtime=limit, **faults.handler(tmp_path)))
    client.pull(reference)
    return client


def test_a_runtime_that_hangs_in_run(odd: Kubelet, reference: str, tmp_path: Path) -> None:
    pod, other = odd.run_pod(handler="odd"), odd.run_pod()
    lasting = odd.run(other, reference, SLEEP)
    faults.break_(tmp_path, run=faults.HANG)
    container = odd.create(pod, odd.container_config(reference, SLEEP))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        starting = pool.submit(refusal, lambda: odd.start(container))
        assert odd.exec_sync(lasting, ["true"]).exit_code == 0
        code, text = starting.result(timeout=waiting.patient(8))
    assert code is DEADLINE
    assert "odd-runc run" in text
    status = odd.status(container)
    assert (status.state, status.exit_code, status.reason) == (EXITED, 128, "StartError")
    assert not faults.processes(os.fspath(tmp_path / "odd-runc"))
    faults.mend(tmp_path)
    odd.stop(container)
    odd.remove(container)
    again = odd.run(pod, reference, SLEEP)
    assert odd.exec_sync(again, ["true"]).exit_code == 0


def test_a_runtime_that_hangs_in_exec(odd: Kubelet, reference: str, tmp_path: Path) -> None:
    pod = odd.run_pod(handler="odd")
    container = odd.run(pod, reference, SLEEP)
    faults.break_(tmp_path, exec=faults.HANG)
    begin = time.monotonic()
    code, _ = refusal(lambda: odd.exec_sync(container, ["true"], timeout=1))
    assert code is DEADLINE
    refusal(lambda: odd.exec_sync(container, ["true"]))
    assert time.monotonic() - begin < waiting.patient(8)
    assert not faults.processes(os.fspath(tmp_path / "odd-runc"))
    faults.mend(tmp_path)
    assert odd.exec_sync(container, ["true"]).exit_code == 0
    assert odd.status(container).state == RUNNING


def test_a_runtime_that_hangs_in_delete(odd: Kubelet, reference: str, tmp_path: Path) -> None:
    pod = odd.run_pod(handler="odd")
    container = odd.run(pod, reference, SLEEP)
    pid = faults.pid_of(odd, container)
    faults.break_(tmp_path, delete=faults.HANG)
    odd.stop(container)
    assert not faults.alive(pid)
    assert odd.status(container).exit_code == 137
    assert refusal(lambda: odd.remove(container))[0] is DEADLINE
    refusal(lambda: odd.stop_pod(pod.id))
    assert state_of(odd, pod) == NOTREADY
    faults.mend(tmp_path)
    odd.remove_pod(pod.id)
    assert not odd.containers()


def test_a_runtime_that_lies(odd: Kubelet, reference: str, tmp_path: Path) -> None:
    """It says that it failed when the container runs, and that all is well when nothing is."""
    pod = odd.run_pod(handler="odd")
    for name, lines in {"failure": 'runc "$@"; exit 1', "success": "exit 0"}.items():
        faults.break_(tmp_path, run=lines)
        container = odd.create(pod, odd.container_config(reference, ["sleep", "9875"], name=name))
        refusal(lambda: odd.start(container))  # noqa: B023
        assert odd.status(container).reason == "StartError"
        waiting.until(lambda: not faults.processes("sleep", "9875"), "nothing runs")
        odd.remove(container)
    faults.break_(tmp_path, run="head -c 3000000 /dev/zero >&2; exit 1")
    container = odd.create(pod, odd.container_config(reference, SLEEP))
    _, text = refusal(lambda: odd.start(container))
    assert len(text) < 5000


def test_a_runtime_that_fails_to_delete(odd: Kubelet, reference: str, tmp_path: Path) -> None:
    pod = odd.run_pod(handler="odd")
    container = odd.run(pod, reference, SLEEP)
    faults.break_(tmp_path, delete="echo 'device is busy' >&2; exit 1")
    _, text = refusal(lambda: remove_pod(odd, pod))
    assert "device is busy" in text
    assert odd.status(container).state == EXITED
    assert state_of(odd, pod) == NOTREADY
    faults.mend(tmp_path)
    remove_pod(odd, pod)


# -- the same again --------------------------------------------------------------------------------


def test_a_pod_that_its_caller_gave_up_is_the_one_that_the_next_call_gets(
    node: Kubelet, plugins: cni.Fakes
) -> None:
    plugins.install("first", ADD=f"sleep 0.7\n{ADDRESS}")
    config = node.pod_config()
    request = api.RunPodSandboxRequest(config=config)
    code, _ = refusal(lambda: node.runtime.RunPodSandbox(request, timeout=0.2))
    assert code is DEADLINE
    with concurrent.futures.ThreadPoolExecutor() as pool:
        ids = set(pool.map(lambda _: node.run_pod(config).id, range(4)))
    assert {p.id for p in node.pods()} == ids
    assert len(ids) == 1
    assert node.run_pod(config).id in ids
    assert plugins.verbs().count("first ADD") == 1


def test_a_container_is_made_once(kubelet: Kubelet, pod: Pod, pulled: str) -> None:
    config = kubelet.container_config(pulled, SLEEP)
    request = api.CreateContainerRequest(
        pod_sandbox_id=pod.id, config=config, sandbox_config=pod.config
    )
    kubelet.runtime.CreateContainer.future(request).cancel()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        ids = set(pool.map(lambda _: kubelet.create(pod, config), range(6)))
    assert {c.id for c in kubelet.containers(pod_sandbox_id=pod.id)} == ids
    assert len(ids) == 1


# -- stubborn processes ----------------------------------------------------------------------------


def test_who_forks_faster_than_it_is_killed_is_killed(
    kubelet: Kubelet, pod: Pod, pulled: str
) -> None:
    script = "trap '' TERM; f() { setsid sleep 9873 & }; while :; do f; f; sleep 0.01; done"
    container = kubelet.run(pod, pulled, ["sh", "-c", f"echo ready; {script}"])
    kubelet.wait_log(container, "ready")
    begin = time.monotonic()
    kubelet.stop(container, timeout=1)
    assert time.monotonic() - begin < waiting.patient(4)
    waiting.until(lambda: not faults.processes("sleep", "9873"), "the whole tree is gone")
    assert kubelet.status(container).exit_code == 137


@pytest.mark.parametrize("end", ["stop", "exit"])
def test_the_tree_of_a_container_in_the_hosts_pid_namespace(
    kubelet: Kubelet, pulled: str, end: str
) -> None:
    options = api.NamespaceOption(pid=api.NODE)
    config = kubelet.pod_config()
    config.linux.security_context.namespace_options.pid = api.NODE
    pod = kubelet.run_pod(config)
    linux = api.LinuxContainerConfig()
    linux.security_context.namespace_options.CopyFrom(options)
    script = "setsid sleep 9874 & (sleep 9874 &); echo ready; exec sleep 0.4"
    if end == "stop":
        script = script.replace("0.4", "1000")
    container = kubelet.run(pod, pulled, ["sh", "-c", script], linux=linux)
    kubelet.wait_log(container, "ready")
    if end == "stop":
        kubelet.stop(container, timeout=5)
    kubelet.wait_exit(container)
    waiting.until(lambda: not faults.processes("sleep", "9874"), "the whole tree is gone")


def test_a_frozen_container_can_be_stopped(kubelet: Kubelet, container: str, pod: Pod) -> None:
    folder = cgroups.place(pod.config.linux.cgroup_parent, container, "freezer")
    if (folder / "freezer.state").exists():
        (folder / "freezer.state").write_text("FROZEN")
    else:
        (folder / "cgroup.freeze").write_text("1")
    begin = time.monotonic()
    kubelet.stop(container, timeout=0)
    assert time.monotonic() - begin < waiting.patient(5)
    assert kubelet.status(container).exit_code == 137


# -- races -----------------------------------------------------------------------------------------

QUIET = {grpc.StatusCode.OK, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.FAILED_PRECONDITION}


def together(*calls: Callable[[], object]) -> list[grpc.StatusCode]:
    """Make all calls at once and return their codes."""

    def code(call: Callable[[], object]) -> grpc.StatusCode:
        try:
            call()
        except grpc.RpcError as e:
            found: grpc.StatusCode = e.code()
            return found
        return grpc.StatusCode.OK

    with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(code, calls))


def test_start_against_stop(kubelet: Kubelet, pod: Pod, pulled: str) -> None:
    for number in range(4):
        config = kubelet.container_config(pulled, SLEEP, name=f"c{number}")
        container = kubelet.create(pod, config)
        codes = together(lambda: kubelet.start(container), lambda: kubelet.stop(container))  # noqa: B023
        assert set(codes) <= QUIET
        assert kubelet.status(container).state in (EXITED, RUNNING)
        kubelet.stop(container)
        assert kubelet.status(container).state == EXITED


def test_start_against_remove(kubelet: Kubelet, pod: Pod, pulled: str) -> None:
    for number in range(4):
        config = kubelet.container_config(pulled, ["sleep", "9872"], name=f"c{number}")
        container = kubelet.create(pod, config)
        codes = together(lambda: kubelet.start(container), lambda: kubelet.remove(container))  # noqa: B023
        assert set(codes) <= QUIET
        kubelet.remove(container)
        assert not kubelet.containers(id=container)
    assert not faults.processes("sleep", "9872")


def test_all_that_ends_a_container_at_once(kubelet: Kubelet, pod: Pod, pulled: str) -> None:
    container = kubelet.run(pod, pulled, ["sleep", "9871"])
    path = kubelet.status(container).log_path
    reopen = api.ReopenContainerLogRequest(container_id=container)
    codes = together(
        lambda: kubelet.stop(container, timeout=20),
        lambda: kubelet.stop(container),
        lambda: kubelet.remove(container),
        lambda: kubelet.remove(container),
        lambda: kubelet.status(container),
        lambda: kubelet.runtime.ReopenContainerLog(reopen),
        lambda: kubelet.exec_sync(container, ["sleep", "9871"]),
        lambda: kubelet.runtime.ListContainerStats(api.ListContainerStatsRequest()),
    )
    assert codes[:4] == [grpc.StatusCode.OK] * 4
    assert set(codes[4:]) <= QUIET | {grpc.StatusCode.UNKNOWN}  # in the runtime's own words
    assert not kubelet.containers(id=container)
    assert not faults.processes("sleep", "9871")
    assert Path(path).exists()


@pytest.mark.parametrize("end", [Kubelet.stop_pod, Kubelet.remove_pod], ids=["stop", "remove"])
def test_a_pods_end_against_its_containers_beginning(
    kubelet: Kubelet, pulled: str, end: Callable[[Kubelet, str], None]
) -> None:
    for delay in (0.0, 0.01, 0.03, 0.06):
        pod = kubelet.run_pod()
        running = kubelet.run(pod, pulled, ["sleep", "9870"], name="running")

        def late(pod: Pod = pod, delay: float = delay) -> None:
            time.sleep(delay)
            end(kubelet, pod.id)

        def begin(pod: Pod = pod) -> None:
            kubelet.run(pod, pulled, ["sleep", "9870"], name="new")

        codes = together(late, begin, lambda: kubelet.exec_sync(running, ["sleep", "9870"]))  # noqa: B023
        assert codes[0] is grpc.StatusCode.OK
        assert codes[1] in QUIET
        assert not faults.processes("sleep", "9870")
        assert RUNNING not in {c.state for c in kubelet.containers(pod_sandbox_id=pod.id)}
        kubelet.remove_pod(pod.id)


def test_remove_alone_is_enough(kubelet: Kubelet, pod: Pod, pulled: str) -> None:
    kubelet.run(pod, pulled, ["sh", "-c", "trap '' TERM; sleep 9869 & wait; sleep 9869"])
    kubelet.create(pod, kubelet.container_config(pulled, SLEEP, name="created"))
    codes = together(*[lambda: remove_pod(kubelet, pod)] * 3)
    assert codes == [grpc.StatusCode.OK] * 3
    assert not kubelet.pods(id=pod.id)
    assert not kubelet.containers(pod_sandbox_id=pod.id)
    assert not faults.processes("sleep", "9869")


# -- want of memory --------------------------------------------------------------------------------


def test_out_of_memory_at_once_is_told(kubelet: Kubelet, pod: Pod, pulled: str) -> None:
    linux = api.LinuxContainerConfig()
    linux.resources.memory_limit_in_bytes = 15 << 20
    command = ["dd", "if=/dev/zero", "of=/dev/null", "bs=100M", "count=1"]
    containers = [kubelet.run(pod, pulled, command, name=f"c{n}", linux=linux) for n in range(8)]
    statuses = [kubelet.wait_exit(container) for container in containers]
    assert {(s.exit_code, s.reason) for s in statuses} == {(137, "OOMKilled")}


# -- want of space and of descriptors --------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """Return a folder that holds 30 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    linux.mount("tmpfs", os.fspath(folder), "tmpfs", 0, "size=30m")
    yield folder
    linux.umount2(os.fspath(folder), linux.MNT_DETACH)


def fill(folder: Path) -> Path:
    """Take all the space that is left; returns the file to remove."""
    waste = folder / "waste"
    with waste.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(1 << 16)):
            continue
    return waste


def test_on_a_full_disk_things_can_still_be_ended(
    small: Path, make_site: MakeSite, client_of: ClientOf, reference: str
) -> None:
    site = make_site(server={"root": os.fspath(small / "root")})
    client = client_of(site)
    client.pull(reference)
    pod, other = client.run_pod(), client.run_pod()
    stopped = client.run(pod, reference, SLEEP, name="stopped")
    removed = client.run(pod, reference, SLEEP, name="removed")
    lasting = client.run(other, reference, SLEEP)
    waste = fill(small)
    client.stop(stopped)
    assert client.status(stopped).exit_code == 137
    client.remove(removed)
    code, _ = refusal(lambda: client.run_pod(client.pod_config("own-late")))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert not list((small / "root/pods").glob("*.tmp"))
    assert len(client.pods()) == 2
    client.remove_pod(pod.id)
    assert [p.id for p in client.pods()] == [other.id]
    site.kill()
    site.start()
    client = client_of(site)
    assert [c.id for c in client.containers()] == [lasting]
    waste.unlink()
    client.remove_pod(other.id)
    assert residue.of_folders(small / "root", site.state) == []


def test_failures_leak_nothing_in_the_server(
    make_site: MakeSite, client_of: ClientOf, reference: str, tmp_path: Path
) -> None:
    plugins = cni.Fakes(tmp_path)
    plugins.install("first", ADD=ADDRESS)
    plugins.configure("first")
    site = make_site(network=faults.network(plugins), **faults.handler(tmp_path))
    client = client_of(site)
    client.pull(reference)
    for cycle in range(8):
        if cycle == 2:  # all that is made once has been made
            before = faults.descriptors(site.pid)
        plugins.install("first", ADD=cni.fail("no"))
        refusal(client.run_pod)
        plugins.install("first", ADD=ADDRESS)
        pod = client.run_pod(handler="odd")
        client.run(pod, reference, SLEEP, name="runs")
        faults.break_(tmp_path, run="exit 1")
        failing = client.create(pod, client.container_config(reference, SLEEP, name="fails"))
        refusal(lambda: client.start(failing))  # noqa: B023
        faults.mend(tmp_path)
        if cycle % 2:
            os.kill(faults.shim_of(site, pod.id), signal.SIGKILL)
        client.remove_pod(pod.id)
    after = faults.descriptors(site.pid)
    assert len(after) <= len(before) + 3, (before, after)
