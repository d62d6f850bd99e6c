# SPDX-License-Identifier: Apache-2.0
"""A containerd shim that misbehaves: the error names handler and binary, other handlers go on, and
nothing is left. What a shim does well is in test_handlers.py.
"""

import itertools
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import any_pb2

from cri_server import advisories
from cri_server.pb import api_pb2 as api
from shim import linux
from shim.pb.containerd import bootstrap_pb2, runc_options_pb2
from tests.conftest import Marks
from tests.fakes import kubelet as kubelets
from tests.fakes import shim
from tests.integration import conftest
from tests.lab import cgroups, faults, server, waiting

pytestmark = [
    pytest.mark.needs("root", "netns", "overlay", "runc", "catatonit"),
    pytest.mark.ours,
]

# Seconds for one call of the shim; one that does as it should has a second.
TIMEOUT = int(waiting.patient(4))
WHO = f"handler (lean|full): {shim.NAME}"


@dataclass(kw_only=True, slots=True)
class Lab:
    """A server with two handlers of the same fake: `lean` has no sandbox container, `full` has."""

    kubelet: kubelets.Kubelet
    site: server.Site
    image: str
    script: Path
    before: frozenset[str]

    def write(self, **script: Any) -> None:
        """Have the shim do something else from now on."""
        new = self.script.with_suffix(".new")
        new.write_text(json.dumps(script))
        new.rename(self.script)

    def at(self, **verbs: Any) -> None:
        self.write(at=verbs)

    def pod(self, handler: str = "lean") -> kubelets.Pod:
        return self.kubelet.run_pod(self.kubelet.pod_config(), handler=handler)

    def run(self, pod: kubelets.Pod, script: str = "exec sleep 600") -> str:
        return self.kubelet.run(pod, self.image, ("sh", "-c", script))

    def left(self) -> list[str]:
        """Return what there is of shims: homes, sockets, processes."""
        homes = [os.fspath(path) for path in self.site.state.glob("runtimes/[lfm]*/*")]
        processes = map(str, faults.processes(os.fspath(self.script)))
        return [*homes, *(sockets() - self.before), *processes]

    def others_go_on(self) -> None:
        pod = self.pod("runc")
        assert self.kubelet.wait_exit(self.run(pod, "exit 7")).exit_code == 7


def sockets() -> frozenset[str]:
    return frozenset(os.fspath(path) for path in Path("/tmp").glob("fake-shim-*"))


@pytest.fixture(scope="module")
def site(settings: dict[str, dict[str, Any]], home: Path, marks: Marks) -> Iterator[server.Site]:
    linux.prctl_set_child_subreaper(on=False)
    folder = home / "misbehaving"
    folder.mkdir()
    common = {"kind": "shim", "path": os.fspath(shim.install(folder))}
    tables: dict[str, dict[str, Any]] = {
        "runtimes.lean": {**common, "options": {"timeout": TIMEOUT}},
        "runtimes.full": {**common, "options": {"timeout": TIMEOUT}, "sandbox": "container"},
        "runtimes.moved": {
            **common,
            "options": {"timeout": TIMEOUT, "ShimCgroup": "/shims"},
            "dialect": "runc",
        },
        "runtimes.machine": {**common, "options": {"timeout": TIMEOUT}, "dialect": "kata"},
    }
    with conftest.running_site({**settings, **tables}, marks) as running:
        yield running


@pytest.fixture
def lab(site: server.Site, home: Path, cgroup_parent: str, reference: str) -> Iterator[Lab]:
    with kubelets.Kubelet(site.endpoint, cgroup_parent=cgroup_parent, prefix="fake") as client:
        client.pull(reference)
        script = home / "misbehaving" / "script.json"
        made = Lab(kubelet=client, site=site, image=reference, script=script, before=sockets())
        made.write()
        yield made
        made.write()
        client.remove_own_pods()
        waiting.until(lambda: not made.left(), f"nothing is left: {made.left()}")


# -- at start --------------------------------------------------------------------------------------


@pytest.mark.parametrize("handler", ["lean", "full"])
@pytest.mark.parametrize(
    ("start", "words"),
    [
        ("fail", "start ended with status 3: no VM on this host"),
        ("garbage", "start printed .*VMM panicked.*, which is no address"),
        ("nothing", "start printed b'', which is no address"),
        ("nobody", "cannot connect to /tmp/fake-shim-.*: No such file"),
        ("hang", f"start did not end within {TIMEOUT} s and was killed"),
    ],
)
def test_a_shim_that_does_not_start_makes_no_pod(
    lab: Lab, handler: str, start: str, words: str
) -> None:
    lab.write(start=start)
    with pytest.raises(grpc.RpcError, match=f"{WHO} {words}"):
        lab.pod(handler)
    assert not lab.left()
    lab.others_go_on()


def test_an_api_of_the_future_is_refused(lab: Lab) -> None:
    lab.write(start="json", version=4)
    with pytest.raises(grpc.RpcError, match=f"{WHO} speaks version 4 of the Task API over ttrpc"):
        lab.pod()


@pytest.mark.parametrize(
    "script",
    [
        {"start": "address"},
        {"start": "json", "version": 2},
        {"start": "json", "version": 3},
        {"start": "protobuf", "version": 3},
        {"start": "protobuf", "version": 3, "sandbox": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("handler", ["lean", "full"])
def test_every_generation_of_the_protocol_is_spoken(
    lab: Lab, handler: str, script: dict[str, Any]
) -> None:
    lab.write(**script)
    pod = lab.pod(handler)
    container = lab.run(pod)
    assert lab.kubelet.exec_sync(container, ["echo", "hi"]).stdout == b"hi\n"
    lab.kubelet.stop(container)
    assert lab.kubelet.status(container).exit_code == 137
    lab.kubelet.remove_pod(pod.id)
    assert not lab.left()


def test_who_looks_for_containerd_finds_it_and_that_it_can_do_nothing(lab: Lab) -> None:
    lab.write(daemon=True)
    pod = lab.pod()
    for name in ("one", "two"):
        container = lab.kubelet.run(pod, lab.image, ("sh", "-c", "exit 5"), name=name)
        assert lab.kubelet.wait_exit(container).exit_code == 5


@pytest.mark.parametrize("start", ["address", "protobuf"])
def test_runcs_shim_learns_its_cgroup_at_start(lab: Lab, start: str) -> None:
    lab.write(start=start)
    lab.pod("moved")
    said = Path(f"{lab.script}.stdin").read_bytes()
    if start == "protobuf":
        [extension] = bootstrap_pb2.BootstrapParams.FromString(said).extensions
        told = extension.value
    else:
        told = any_pb2.Any.FromString(said)
    assert told.type_url == "containerd.runc.v1.Options"
    assert runc_options_pb2.Options.FromString(told.value).shim_cgroup == "/shims"


def test_what_is_known_of_the_runtime_below_a_shim_is_named_at_start(lab: Lab) -> None:
    said = subprocess.run(["runc", "--version"], capture_output=True, text=True, check=True).stdout
    known = advisories.names(advisories.known("runc", said.split()[2]))
    lines = [json.loads(line) for line in lab.site.log.read_text().splitlines()]
    warned = {e["runtime"]: e for e in lines if "known vulnerabilities" in e["event"]}
    assert (warned["moved"]["vulnerabilities"] if known else []) == known
    assert "lean" not in warned


def test_a_pod_that_takes_long_to_start_is_waited_for(lab: Lab) -> None:
    lab.at(Create={"sleep": 2}, Start={"sleep": 1})
    assert lab.kubelet.wait_exit(lab.run(lab.pod(), "exit 3")).exit_code == 3


def test_what_a_machine_uses_is_what_its_shim_counts(lab: Lab) -> None:
    container = lab.run(lab.pod("machine"))
    request = api.ContainerStatsRequest(container_id=container)
    stats = lab.kubelet.runtime.ContainerStats(request).stats
    assert stats.cpu.usage_core_nano_seconds.value == 1234_000
    assert stats.memory.usage_bytes.value == 45 << 20
    assert stats.memory.working_set_bytes.value == 40 << 20
    lab.at(Stats="hang")
    code, text = kubelets.refusal(lambda: lab.kubelet.runtime.ContainerStats(request))
    assert (code, "no stats" in text) == (grpc.StatusCode.FAILED_PRECONDITION, True)
    (stats,) = lab.kubelet.runtime.ListContainerStats(api.ListContainerStatsRequest()).stats
    assert (stats.attributes.id, stats.HasField("cpu")) == (container, False)


def test_a_machine_is_told_of_its_pod_what_containerd_tells(lab: Lab) -> None:
    sysctls = {"kernel.shm_rmid_forced": "1", "net.core.somaxconn": "77"}
    config = lab.kubelet.pod_config()
    config.linux.sysctls.update(sysctls)
    config.linux.resources.memory_limit_in_bytes = 64 << 20
    pod = lab.kubelet.run_pod(config, handler="machine")

    folder = lab.site.state / "pods" / pod.id
    told = json.loads((folder / "sandbox/config.json").read_bytes())
    sources = {m["destination"]: m["source"] for m in told["mounts"]}
    assert sources["/dev/shm"] == os.fspath(folder / "shm")
    assert sources["/etc/resolv.conf"] == os.fspath(folder / "resolv.conf")
    assert told["linux"]["sysctl"].items() > sysctls.items()
    assert "memory" not in told["linux"]["resources"]
    assert told["annotations"]["io.kubernetes.cri.sandbox-memory"] == str(64 << 20)
    names = ("sysctl", "-n", *sysctls)  # the fake's machine is this host, and it has set them
    assert lab.kubelet.exec_sync(lab.run(pod), list(names)).stdout.split() == [b"1", b"77"]


def test_a_machines_size_is_not_changed_for_the_pod(lab: Lab) -> None:
    pod = lab.pod("machine")
    request = api.UpdatePodSandboxResourcesRequest(pod_sandbox_id=pod.id)
    request.resources.cpu_shares = 200
    code, text = kubelets.refusal(lambda: lab.kubelet.runtime.UpdatePodSandboxResources(request))
    assert code is grpc.StatusCode.UNIMPLEMENTED  # which the kubelet tolerates
    assert "handler machine" in text


# -- at a verb -------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["Connect", "Create", "Start"])
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("die", f"{WHO} ended during {{verb}}"),
        ("hang", f"{WHO} {{verb}}: no answer to {{verb}} within {TIMEOUT} s"),
        ("garbage", f"{WHO} {{verb}}: {{verb}} was answered with garbage"),
        ({"after": "die"}, f"{WHO} ended during {{verb}}"),
    ],
    ids=str,
)
def test_a_shim_that_fails_at_a_container_costs_that_pod_alone(
    lab: Lab, verb: str, how: Any, words: str
) -> None:
    lab.at(**{verb: how})
    with pytest.raises(grpc.RpcError, match=words.format(verb=verb)):
        lab.run(lab.pod())
    lab.others_go_on()


@pytest.mark.parametrize("verb", ["Create", "Start"])
def test_the_shims_own_words_are_the_error(lab: Lab, verb: str) -> None:
    lab.at(**{verb: {"error": "the guest has no memory left", "code": 8}})
    with pytest.raises(grpc.RpcError, match="the guest has no memory left"):
        lab.run(lab.pod())


@pytest.mark.parametrize(
    ("verb", "how"),
    [
        *itertools.product(
            ("CreateSandbox", "StartSandbox"), ("die", "hang", {"error": "no such kernel"})
        ),
        ("StartSandbox", {"pid": 1}),
    ],
    ids=str,
)
def test_a_sandbox_that_fails_makes_no_pod(lab: Lab, verb: str, how: Any) -> None:
    lab.write(start="protobuf", version=3, sandbox=True, at={verb: how})
    with pytest.raises(grpc.RpcError, match=f"{WHO}|no such kernel"):
        lab.pod("full")
    assert not lab.left()
    lab.others_go_on()


@pytest.mark.parametrize("pid", [1, os.getpid(), 4194300], ids=["init", "stranger", "nobody"])
def test_a_pid_that_is_not_the_shims_is_a_lie(lab: Lab, pid: int) -> None:
    lab.at(Start={"pid": pid})
    with pytest.raises(grpc.RpcError, match=f"{WHO} says that it has started process {pid}"):
        lab.run(lab.pod())
    os.kill(os.getpid(), 0)
    assert not faults.processes("sleep", "600")


def test_an_exec_that_lies_fails_alone(lab: Lab) -> None:
    container = lab.run(lab.pod())
    lab.at(Start={"pid": 1})
    with pytest.raises(grpc.RpcError, match=f"{WHO} says that it has started process 1,"):
        lab.kubelet.exec_sync(container, ["sleep", "321"])
    lab.at()
    waiting.until(lambda: not faults.processes("sleep", "321"), "what it did start is dead")
    assert lab.kubelet.exec_sync(container, ["echo", "hi"]).stdout == b"hi\n"


def test_an_exec_that_is_given_up_while_it_starts_does_not_live_on(lab: Lab) -> None:
    pod = lab.pod()
    container = lab.run(pod)
    lab.at(Start={"sleep": 2})
    with pytest.raises(grpc.RpcError, match="DEADLINE_EXCEEDED"):
        lab.kubelet.exec_sync(container, ["sleep", "322"], timeout=1)
    lab.at()
    home = lab.site.state / "runtimes" / "lean" / pod.id
    waiting.until(lambda: not list(home.glob("exec-*")), "the shim has forgotten the exec")
    assert not faults.processes("sleep", "322")


@pytest.mark.parametrize("verb", ["Exec", "Start"])
@pytest.mark.parametrize("how", ["hang", {"error": "no room"}], ids=str)
def test_an_exec_that_fails_leaves_the_container(lab: Lab, verb: str, how: Any) -> None:
    container = lab.run(lab.pod())
    lab.at(**{verb: how})
    with pytest.raises(grpc.RpcError, match=f"{WHO} {verb}: no answer|no room"):
        lab.kubelet.exec_sync(container, ["true"])
    lab.at()
    assert lab.kubelet.exec_sync(container, ["echo", "hi"]).stdout == b"hi\n"
    assert lab.kubelet.status(container).state == api.CONTAINER_RUNNING


# -- at the end ------------------------------------------------------------------------------------


@pytest.mark.parametrize("handler", ["lean", "full"])
def test_a_shim_that_dies_ends_its_containers(lab: Lab, handler: str) -> None:
    pod = lab.pod(handler)
    one = lab.run(pod, "exec sleep 601")
    two = lab.kubelet.run(pod, lab.image, ("sleep", "602"), name="two")
    [victim] = faults.processes(os.fspath(lab.script), "-id", pod.id)
    os.kill(victim, signal.SIGKILL)
    for container in (one, two):
        ended = lab.kubelet.wait_exit(container)
        assert (ended.exit_code, ended.reason) == (255, "Unknown")
        assert shim.NAME in ended.message
    assert not faults.processes("sleep", "601") + faults.processes("sleep", "602")
    lab.others_go_on()


def test_a_shim_that_dies_ends_its_containers_wherever_their_cgroups_are(
    lab: Lab, cgroup_parent: str
) -> None:
    lab.write(cgroup=f"{cgroup_parent}/elsewhere", delete="fail")
    pod = lab.pod()
    container = lab.run(pod, "sleep 603 & exec sleep 603")
    [victim] = faults.processes(os.fspath(lab.script), "-id", pod.id)
    os.kill(victim, signal.SIGKILL)
    assert lab.kubelet.wait_exit(container).exit_code == 255
    assert not faults.processes("sleep", "603")
    cgroups.remove(f"{cgroup_parent}/elsewhere")


@pytest.mark.parametrize("verb", ["Kill", "Wait", "Delete", "Shutdown"])
@pytest.mark.parametrize("how", ["die", "hang", "garbage", {"error": "never"}], ids=str)
def test_a_pod_goes_whatever_its_shim_does_at_the_end(lab: Lab, verb: str, how: Any) -> None:
    pod = lab.pod()
    container = lab.run(pod)
    lab.at(**{verb: how})
    lab.kubelet.runtime.StopPodSandbox(api.StopPodSandboxRequest(pod_sandbox_id=pod.id), timeout=60)
    assert lab.kubelet.status(container).state == api.CONTAINER_EXITED
    lab.kubelet.remove_pod(pod.id)
    assert not faults.processes("sleep", "600")
    assert not lab.left()


@pytest.mark.parametrize("how", ["", "fail", "hang"])
def test_a_lost_shim_of_ours_leaves_nothing_whatever_delete_says(lab: Lab, how: str) -> None:
    pod = lab.pod("full")
    container = lab.run(pod)
    lab.write(delete=how)
    os.kill(faults.shim_of(lab.site, pod.id), signal.SIGKILL)
    assert lab.kubelet.wait_exit(container, seconds=40).exit_code == 255
    lab.kubelet.remove_pod(pod.id)
    assert not faults.processes("sleep", "600")
    assert not lab.left()
