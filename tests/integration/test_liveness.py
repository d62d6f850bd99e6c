# SPDX-License-Identifier: Apache-2.0
"""Nothing waits for ever, and nobody dies because somebody else is slow: shims that do not answer
for a while, runtimes that hang, a server without descriptors (hazards R06-R08, R23, R27, R38, R39).
"""

import concurrent.futures
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from cri_server.pb import api_pb2 as api
from tests.fakes.kubelet import Kubelet, Pod, is_ready, refusal, state_of
from tests.integration.conftest import SLEEP, ClientOf, MakeSite
from tests.lab import faults, server, waiting

pytestmark = [
    pytest.mark.needs("root", "netns", "overlay", "cni", "runc", "docker-registry"),
    pytest.mark.ours,
    pytest.mark.usefixtures("traceless"),
    pytest.mark.timeout(120),
]
READY, NOTREADY = api.SANDBOX_READY, api.SANDBOX_NOTREADY
RUNNING, EXITED = api.CONTAINER_RUNNING, api.CONTAINER_EXITED


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Have a process do nothing for the block, as one does that waits for its disk."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


# -- a slow shim -----------------------------------------------------------------------------------


def test_a_slow_shim_costs_no_life_but_that_of_the_container_that_is_stopped(
    kubelet: Kubelet, site: server.Site, pulled: str
) -> None:
    pod = kubelet.run_pod()
    lasting, ending = (kubelet.run(pod, pulled, SLEEP, name=name) for name in ("lasts", "ends"))
    dead = kubelet.run(pod, pulled, ["true"], name="dead")
    kubelet.wait_exit(dead)
    pids = faults.pid_of(kubelet, lasting), faults.pid_of(kubelet, ending)
    shim = faults.shim_of(site, pod.id)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        with stopped(shim):
            removing = pool.submit(kubelet.remove, dead)
            stopping = pool.submit(kubelet.stop, ending, timeout=1)
            waiting.until(lambda: not faults.alive(pids[1]), "it is killed anyway", seconds=20)
            assert kubelet.status(ending).state == RUNNING  # whose end the shim has to tell
        stopping.result()
        removing.result()
    assert kubelet.status(ending).exit_code == 137
    assert [c.id for c in kubelet.containers() if c.pod_sandbox_id == pod.id].count(dead) == 0
    assert faults.alive(pids[0])
    assert faults.shim_of(site, pod.id) == shim
    assert kubelet.exec_sync(lasting, ["true"]).exit_code == 0
    assert state_of(kubelet, pod) == READY


@pytest.fixture
def killable(make_site: MakeSite, client_of: ClientOf, reference: str) -> server.Site:
    """Return a server of the test's own that has the test image."""
    made = make_site()
    client_of(made).pull(reference)
    return made


def test_a_shim_that_is_slow_at_a_restart_keeps_its_pod(
    killable: server.Site, client_of: ClientOf, reference: str
) -> None:
    client = client_of(killable)
    pod = client.run_pod()
    lasting, ending = (client.run(pod, reference, SLEEP, name=name) for name in ("lasts", "ends"))
    created = client.create(pod, client.container_config(reference, SLEEP, name="created"))
    pids = faults.pid_of(client, lasting), faults.pid_of(client, ending)
    shim = faults.shim_of(killable, pod.id)
    killable.kill()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        with stopped(shim):
            killable.start()
            client = client_of(killable)
            assert state_of(client, pod) == READY
            assert client.status(lasting).state == RUNNING
            stopping = pool.submit(client.stop, ending)
            starting = pool.submit(client.start, created)
            code, _ = refusal(lambda: client.exec_sync(lasting, ["true"]))
            assert code is grpc.StatusCode.UNAVAILABLE
            assert not stopping.done()
        stopping.result()
        starting.result()
    assert not faults.alive(pids[1])
    assert client.status(ending).exit_code == 137
    assert client.status(created).state == RUNNING
    assert faults.pid_of(client, lasting) == pids[0]
    assert client.exec_sync(lasting, ["true"]).exit_code == 0
    assert state_of(client, pod) == READY
    os.kill(shim, signal.SIGKILL)
    waiting.until(lambda: state_of(client, pod) == NOTREADY, "its death is noticed", seconds=5)


# -- a want of descriptors -------------------------------------------------------------------------


@pytest.fixture
def scarce(killable: server.Site) -> Path:
    """Return what makes the server lack descriptors, see `tests.lab.scarcity`."""
    file = killable.home / "scarce"
    killable.program = (sys.executable, "-m", "tests.lab.scarcity", os.fspath(file))
    killable.kill()
    killable.start()
    return file


def said(site: server.Site, text: str) -> bool:
    return text in site.log.read_text()


def test_a_server_that_lacks_descriptors_at_its_start_kills_nobody(
    killable: server.Site, client_of: ClientOf, reference: str, scarce: Path
) -> None:
    client = client_of(killable)
    pods = [client.run_pod() for _ in range(2)]
    running = [client.run(pod, reference, SLEEP) for pod in pods]
    pids = [faults.pid_of(client, container) for container in running]
    killable.kill()
    scarce.write_text("/shim.sock")
    killable.start(wait=False)
    waiting.until(lambda: said(killable, "shim not found out about"), "it lacks them")
    scarce.unlink()
    waiting.until(lambda: is_ready(killable.endpoint), "the server is ready")
    client = client_of(killable)
    assert [faults.pid_of(client, container) for container in running] == pids
    assert [client.exec_sync(c, ["true"]).exit_code for c in running] == [0, 0]
    assert [state_of(client, pod) for pod in pods] == [READY, READY]


def test_a_server_that_lacks_descriptors_when_a_shim_dies_tells_the_end_later(
    killable: server.Site, client_of: ClientOf, reference: str, scarce: Path
) -> None:
    client = client_of(killable)
    pod = client.run_pod()
    container = client.run(pod, reference, SLEEP)
    pid = faults.pid_of(client, container)
    shim = faults.shim_of(killable, pod.id)
    scarce.write_text("/proc")  # which is listed before anything is killed
    os.kill(shim, signal.SIGKILL)
    waiting.until(lambda: said(killable, "not all processes looked at"), "it lacks them")
    stopping = concurrent.futures.ThreadPoolExecutor().submit(client.stop, container)
    scarce.unlink()
    assert client.wait_exit(container, seconds=10).exit_code == 255
    stopping.result(timeout=10)
    assert not faults.alive(pid)
    waiting.until(lambda: state_of(client, pod) == NOTREADY, "the pod is NOTREADY")


# -- who hangs -------------------------------------------------------------------------------------


@pytest.fixture
def odd(make_site: MakeSite, client_of: ClientOf, reference: str, tmp_path: Path) -> Kubelet:
    """Return a client of a server whose handler `odd` does as the test says, at its leisure."""
    client = client_of(make_site(runtime={"runtime_timeout": 100}, **faults.handler(tmp_path)))
    client.pull(reference)
    return client


def busy(folder: Path, verb: str) -> list[int]:
    """Return the runtime's processes at work on a verb."""
    return [
        pid
        for pid in faults.processes(os.fspath(folder / "odd-runc"))
        if verb in Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    ]


@pytest.mark.parametrize("verb", ["stop", "remove"])
def test_a_start_that_hangs_ends_with_the_grace_period(
    odd: Kubelet, reference: str, tmp_path: Path, verb: str
) -> None:
    pod = odd.run_pod(handler="odd")
    faults.break_(tmp_path, run=faults.HANG)
    container = odd.create(pod, odd.container_config(reference, SLEEP))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        starting = pool.submit(refusal, lambda: odd.start(container))
        waiting.until(lambda: busy(tmp_path, "run"), "the runtime hangs")
        began = time.monotonic()
        if verb == "stop":
            odd.stop(container, timeout=1)
        else:
            odd.remove(container)
        assert time.monotonic() - began < waiting.patient(8)
        assert "killed before it had started" in starting.result()[1]
    program = os.fspath(tmp_path / "odd-runc")
    waiting.until(lambda: not faults.processes(program), "the runtime is gone")
    if verb == "stop":
        status = odd.status(container)
        assert (status.state, status.exit_code, status.reason) == (EXITED, 128, "StartError")


def test_a_stop_does_not_wait_for_an_update(odd: Kubelet, reference: str, tmp_path: Path) -> None:
    container = odd.run(odd.run_pod(handler="odd"), reference, SLEEP)
    pid = faults.pid_of(odd, container)
    faults.break_(tmp_path, update=faults.HANG)
    limits = api.LinuxContainerResources(cpu_shares=500)
    request = api.UpdateContainerResourcesRequest(container_id=container, linux=limits)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        updating = pool.submit(refusal, lambda: odd.runtime.UpdateContainerResources(request))
        waiting.until(lambda: busy(tmp_path, "update"), "the update hangs")
        began = time.monotonic()
        odd.stop(container)
        assert time.monotonic() - began < waiting.patient(5)
        assert not faults.alive(pid)
        assert odd.status(container).exit_code == 137
        faults.mend(tmp_path)
        for stuck in busy(tmp_path, "update"):
            os.kill(stuck, signal.SIGKILL)
        updating.result()


# -- the rest of a pod -----------------------------------------------------------------------------


@pytest.mark.needs("catatonit")
def test_the_pods_init_ends_with_its_shim(kubelet: Kubelet, site: server.Site) -> None:
    config = kubelet.pod_config()
    config.linux.security_context.namespace_options.pid = api.POD
    pod = kubelet.run_pod(config)
    pid = int(json.loads(kubelet.pod_status(pod.id, verbose=True).info["info"])["pid"])
    assert faults.alive(pid)
    os.kill(faults.shim_of(site, pod.id), signal.SIGKILL)
    waiting.until(lambda: not faults.alive(pid), "the init has ended", seconds=5)
    assert state_of(kubelet, pod) == NOTREADY


def test_a_start_in_a_pod_that_has_ended_is_told_in_the_status(
    kubelet: Kubelet, pod: Pod, pulled: str
) -> None:
    container = kubelet.create(pod, kubelet.container_config(pulled, SLEEP))
    kubelet.stop_pod(pod.id)
    code, text = refusal(lambda: kubelet.start(container))
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    status = kubelet.status(container)
    assert (status.state, status.exit_code, status.reason) == (EXITED, 128, "StartError")
    assert status.message in text
