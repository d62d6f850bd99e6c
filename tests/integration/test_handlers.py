# SPDX-License-Identifier: Apache-2.0
"""The contract of handlers: what every runtime at the end of the chain does for a kubelet.

One server has them all. A new kind of handler is one more line of `tests.lab.handlers`. What a
handler cannot do it must refuse, by an error that says so. CRI_TESTS_TABLE=docs/runtimes.md has a
run write the table of that page: a row for each test, with the notes that it left (`Lab.note`).
"""

import itertools
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest

from cri_server import capability
from cri_server.pb import api_pb2 as api
from shim import linux
from tests.conftest import Marks
from tests.fakes import kubelet as kubelets
from tests.fakes import streams
from tests.integration import conftest
from tests.lab import faults, handlers, server, waiting

pytestmark = [
    pytest.mark.needs("root", "netns", "overlay", "runc", "catatonit"),
    pytest.mark.ours,
]

MEMORY = 256 << 20


@dataclass(kw_only=True, slots=True)
class Lab:
    """A handler under test: pods are made with it, and notes are for the table."""

    name: str
    kubelet: kubelets.Kubelet
    site: server.Site
    image: str
    note: Callable[[str, object], None]
    numbers: "itertools.count[int]" = field(default_factory=itertools.count)

    @property
    def kernel(self) -> bool:
        return self.name in handlers.KERNELS

    def pod(self, **fields: Any) -> kubelets.Pod:
        config = self.kubelet.pod_config(**fields)
        return self.kubelet.run_pod(config, handler=self.name)

    def run(self, pod: kubelets.Pod, script: str, **fields: Any) -> str:
        name = f"c{next(self.numbers)}"
        return self.kubelet.run(pod, self.image, ("sh", "-c", script), name=name, **fields)

    def exec(self, container: str, *command: str, **options: Any) -> api.ExecSyncResponse:
        return self.kubelet.exec_sync(container, list(command), **options)


@pytest.fixture(scope="module")
def chain(settings: dict[str, dict[str, Any]], home: Path, marks: Marks) -> Iterator[server.Site]:
    """Return a server with all handlers."""
    linux.prctl_set_child_subreaper(on=False)  # other tests are; orphans of dead shims are init's
    names = list(handlers.HANDLERS)
    tables = {**handlers.tables(home, *names), **handlers.odd(home, *names)}
    with conftest.running_site({**settings, **tables}, marks) as site:
        yield site


@pytest.fixture(
    params=[pytest.param(name, marks=handlers.needs(name)) for name in handlers.HANDLERS],
)
def lab(
    request: pytest.FixtureRequest,
    chain: server.Site,
    cgroup_parent: str,
    reference: str,
    record_property: Callable[[str, object], None],
) -> Iterator[Lab]:
    with kubelets.Kubelet(chain.endpoint, cgroup_parent=cgroup_parent, prefix="chain") as client:
        client.pull(reference)
        record_property("handler", request.param)
        yield Lab(
            name=request.param, kubelet=client, site=chain, image=reference, note=record_property
        )
        client.remove_own_pods()


def test_a_pod_with_two_containers_lives_and_goes(lab: Lab) -> None:
    pod = lab.pod()
    one, two = lab.run(pod, "exec sleep 600"), lab.run(pod, "exit 0")
    ended = lab.kubelet.wait_exit(two)
    assert (ended.exit_code, ended.reason) == (0, "Completed")
    assert lab.kubelet.status(one).state == api.CONTAINER_RUNNING
    lab.kubelet.stop(one)
    assert lab.kubelet.status(one).exit_code == 137
    lab.kubelet.remove(one)
    lab.kubelet.remove_pod(pod.id)
    assert [p.id for p in lab.kubelet.pods() if p.id == pod.id] == []


def test_the_kernel_is_its_own_or_that_of_the_host(lab: Lab) -> None:
    container = lab.run(lab.pod(), "exec sleep 600")
    said = lab.exec(container, "dmesg").stdout
    assert (b"Starting gVisor" in said) == lab.kernel
    release = lab.exec(container, "uname", "-r").stdout.decode().strip()
    assert (release == Path("/proc/sys/kernel/osrelease").read_text().strip()) == (not lab.kernel)
    lab.note("cell", "its own" if lab.kernel else "the host's")


def test_the_host_name_is_the_pods(lab: Lab) -> None:
    container = lab.run(lab.pod(hostname="of-the-pod"), "exec sleep 600")
    assert lab.exec(container, "hostname").stdout == b"of-the-pod\n"


def test_all_capabilities_are_those_that_there_are(lab: Lab) -> None:
    linux = api.LinuxContainerConfig()
    linux.security_context.capabilities.add_capabilities.append("ALL")
    container = lab.run(lab.pod(), "exec sleep 600", linux=linux)
    status = lab.exec(container, "cat", "/proc/self/status").stdout.decode()
    held = int(status.partition("CapEff:")[2].split()[0], 16)
    assert held & 1 << capability.ALL.index("CAP_SYS_ADMIN")


def test_exit_codes_and_signals_are_told(lab: Lab) -> None:
    pod = lab.pod()
    assert lab.kubelet.wait_exit(lab.run(pod, "exit 3")).exit_code == 3
    crash = "sh -c 'kill -SEGV $$'; exit $?"  # not the init itself, which Linux protects
    assert lab.kubelet.wait_exit(lab.run(pod, crash)).exit_code == 139


def test_a_stop_signal_is_heard_in_time(lab: Lab) -> None:
    container = lab.run(lab.pod(), "trap 'exit 9' TERM; echo ready; while :; do sleep 0.1; done")
    lab.kubelet.wait_log(container, "ready")
    lab.kubelet.stop(container, timeout=20)
    assert lab.kubelet.status(container).exit_code == 9


def test_output_is_logged_by_stream(lab: Lab) -> None:
    container = lab.run(lab.pod(), "echo out; echo err >&2; printf end")
    lab.kubelet.wait_exit(container)
    lines = {(line.stream, line.text, line.tag) for line in lab.kubelet.log(container)}
    assert {("stdout", "out", "F"), ("stderr", "err", "F"), ("stdout", "end", "P")} <= lines


def test_a_program_that_is_not_there_is_named(lab: Lab) -> None:
    with pytest.raises(grpc.RpcError, match="no-such-program"):
        lab.kubelet.run(lab.pod(), lab.image, ("no-such-program",))


def test_exec_sync_gives_streams_and_code(lab: Lab) -> None:
    container = lab.run(lab.pod(), "exec sleep 600")
    answer = lab.exec(container, "sh", "-c", "echo out; echo err >&2; exit 5")
    assert (answer.stdout, answer.stderr, answer.exit_code) == (b"out\n", b"err\n", 5)


def test_exec_sync_ends_in_time_and_leaves_nothing(lab: Lab) -> None:
    container = lab.run(lab.pod(), "exec sleep 600")
    with pytest.raises(grpc.RpcError) as caught:
        lab.exec(container, "sh", "-c", "sh -c 'sleep 321 & wait' & wait", timeout=2)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    waiting.until(
        lambda: b"sleep 321" not in lab.exec(container, "ps").stdout, "the whole tree is dead"
    )


@pytest.mark.parametrize("connect", [streams.Spdy, streams.WebSocket])
def test_exec_has_streams_and_a_terminal(lab: Lab, connect: Any) -> None:
    container = lab.run(lab.pod(), "exec sleep 600")
    request = api.ExecRequest(container_id=container, cmd=["sh"], stdin=True, stdout=True, tty=True)
    url = lab.kubelet.runtime.Exec(request).url
    with connect(url, ("stdin", "stdout", "error", "resize")) as session:
        session.send("resize", json.dumps({"Width": 120, "Height": 33}).encode())
        session.send("stdin", b"while [ '33 120' != \"$(stty size)\" ]; do :; done; echo a''b\n")
        streams.until(session, "stdout", b"ab")
        session.send("stdin", b"exit 7\n")
        assert streams.exit_code(streams.ending(session)) == 7


def test_attach_gives_input_and_output(lab: Lab) -> None:
    container = lab.run(lab.pod(), "while read x; do echo got $x; done; exit 0", stdin=True)
    request = api.AttachRequest(container_id=container, stdin=True, stdout=True, stderr=True)
    url = lab.kubelet.runtime.Attach(request).url
    with streams.WebSocket(url, ("stdin", "stdout", "stderr", "error")) as session:
        session.send("stdin", b"word\n")
        streams.until(session, "stdout", b"got word\n")
    assert [line.text for line in lab.kubelet.log(container)] == ["got word"]


def test_a_container_has_a_terminal(lab: Lab) -> None:
    container = lab.run(lab.pod(), "test -t 0 && test -t 1 && echo yes; exit 6", tty=True)
    assert lab.kubelet.wait_exit(container).exit_code == 6
    assert "yes" in lab.kubelet.log(container)[0].text


def test_containers_can_share_processes(lab: Lab) -> None:
    config = lab.kubelet.pod_config()
    config.linux.security_context.namespace_options.pid = api.POD
    pod = lab.kubelet.run_pod(config, handler=lab.name)
    shared = api.LinuxContainerConfig()
    shared.security_context.namespace_options.pid = api.POD
    shared.security_context.namespace_options.target_id = ""
    lab.run(pod, "exec sleep 4321", linux=shared)
    other = lab.run(pod, "exec sleep 600", linux=shared)
    assert b"sleep 4321" in lab.exec(other, "ps").stdout
    first = lab.exec(other, "cat", "/proc/1/cmdline").stdout
    assert b"catatonit" in first


def test_containers_of_a_pod_share_its_network(lab: Lab) -> None:
    pod = lab.pod()
    lab.run(pod, "echo shared | nc -l -p 7000")
    client = lab.run(pod, "until nc 127.0.0.1 7000; do sleep 0.1; done")
    lab.kubelet.wait_log(client, "shared")
    addresses = lab.exec(lab.run(pod, "exec sleep 600"), "ip", "addr").stdout.decode()
    assert lab.kubelet.pod_status(pod.id).status.network.ip in addresses


def test_stats_are_those_of_the_container(lab: Lab) -> None:
    container = lab.run(lab.pod(), "i=0; while [ $i -lt 9999 ]; do i=$((i+1)); done; sleep 600")

    def seen() -> api.ContainerStats | None:
        request = api.ContainerStatsRequest(container_id=container)
        stats = lab.kubelet.runtime.ContainerStats(request).stats
        used = stats.cpu.usage_core_nano_seconds.value and stats.memory.usage_bytes.value
        return stats if used else None

    assert waiting.until(seen, "CPU and memory are counted").attributes.id == container


def test_metrics_are_those_of_the_container(lab: Lab) -> None:
    pod = lab.pod()
    container = lab.run(pod, "while :; do :; done")
    names = ("container_memory_usage_bytes", "container_cpu_usage_seconds_total")

    def seen() -> dict[str, int] | None:
        request = api.ListPodSandboxMetricsRequest()
        of_pods = lab.kubelet.runtime.ListPodSandboxMetrics(request).pod_metrics
        of_pod = next(p for p in of_pods if p.pod_sandbox_id == pod.id)
        (own,) = (c for c in of_pod.container_metrics if c.container_id == container)
        values = {m.name: m.value.value for m in own.metrics}
        return values if all(values.get(name) for name in names) else None

    waiting.until(seen, "CPU and memory have metrics", seconds=30)


def test_memory_has_a_limit(lab: Lab) -> None:
    limits = api.LinuxContainerResources(memory_limit_in_bytes=64 << 20)
    linux = api.LinuxContainerConfig(resources=limits)
    pod = lab.pod(linux=api.LinuxPodSandboxConfig(resources=limits))
    container = lab.run(pod, "exec tail -c 300m /dev/zero", linux=linux)
    ended = lab.kubelet.wait_exit(container, seconds=40)
    assert ended.exit_code == 137
    assert ended.reason == "OOMKilled"
    lab.note("cell", "of the pod" if lab.kernel else "of the container")


def test_a_limit_of_one_container_holds_or_that_is_told(lab: Lab) -> None:
    limits = api.LinuxContainerResources(memory_limit_in_bytes=MEMORY)
    wider = api.LinuxContainerResources(memory_limit_in_bytes=MEMORY * 2)
    pod = lab.pod(linux=api.LinuxPodSandboxConfig(resources=wider))
    container = lab.run(pod, "exec sleep 600", linux=api.LinuxContainerConfig(resources=limits))
    told = [json.loads(line) for line in lab.site.log.read_text().splitlines()]
    warned = [e for e in told if "hold for the pod as a whole" in e["event"]]
    mine = [e["asked"] for e in warned if e["container"] == container]
    assert mine == ([{"linux.resources.memory.limit": str(MEMORY)}] if lab.kernel else [])
    config = lab.site.home / "config.toml"
    done = subprocess.run(
        [server.command(), "explain", container, "--diff", "--config", config],
        capture_output=True,
        text=True,
        check=True,
    )
    assert ("not for one container" in done.stdout) == lab.kernel
    lab.note("cell", "told" if lab.kernel else "yes")


def test_limits_change_while_it_runs_or_that_is_refused(lab: Lab) -> None:
    container = lab.run(lab.pod(), "exec sleep 600")
    limits = api.LinuxContainerResources(memory_limit_in_bytes=MEMORY)
    request = api.UpdateContainerResourcesRequest(container_id=container, linux=limits)
    if not lab.kernel:
        lab.kubelet.runtime.UpdateContainerResources(request)
        now = lab.kubelet.status(container).resources.linux.memory_limit_in_bytes
        assert now == MEMORY
        return
    with pytest.raises(grpc.RpcError, match="cannot change the limits") as caught:
        lab.kubelet.runtime.UpdateContainerResources(request)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    lab.note("cell", "refused")


def test_sysctls_are_those_of_the_pod_or_refused(lab: Lab) -> None:
    name, config = "kernel.shm_rmid_forced", lab.kubelet.pod_config()
    config.linux.sysctls.update({name: "1", "net.core.somaxconn": "77"})
    if not lab.kernel:
        container = lab.run(lab.kubelet.run_pod(config, handler=lab.name), "exec sleep 600")
        asked = lab.exec(container, "sysctl", "-n", *config.linux.sysctls).stdout
        assert sorted(asked.split()) == [b"1", b"77"]
        return
    with pytest.raises(grpc.RpcError, match=name) as caught:
        lab.kubelet.run_pod(config, handler=lab.name)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    del config.linux.sysctls[name]
    lab.kubelet.run_pod(config, handler=lab.name)  # calls go to the host's stack: --network=host
    lab.note("cell", "of the network")


def test_a_restart_of_the_server_changes_nothing(lab: Lab) -> None:
    pod = lab.pod()
    script = "trap 'exit 4' TERM; echo before; while :; do sleep 0.1; done"
    container = lab.run(pod, script)
    lab.kubelet.wait_log(container, "before")
    pid = lab.kubelet.status_response(container, verbose=True).info["info"]
    lab.site.kill()
    lab.site.start()
    waiting.until(lambda: lab.kubelet.status(container), "the server answers again")
    assert lab.kubelet.status_response(container, verbose=True).info["info"] == pid
    assert lab.exec(container, "echo", "after").stdout == b"after\n"
    lab.kubelet.stop(container, timeout=20)
    assert lab.kubelet.status(container).exit_code == 4


def test_a_lost_shim_ends_its_containers_and_leaves_nothing(lab: Lab) -> None:
    pod = lab.pod()
    container = lab.run(pod, "exec sleep 600")
    os.kill(faults.shim_of(lab.site, pod.id), signal.SIGKILL)
    assert lab.kubelet.wait_exit(container).exit_code == 255
    waiting.until(
        lambda: lab.kubelet.pod_status(pod.id).status.state == api.SANDBOX_NOTREADY,
        "the pod is not ready",
    )
    lab.kubelet.remove_pod(pod.id)
    assert not list(lab.site.state.glob(f"runtimes/*/{pod.id}*"))
    assert not list(lab.site.state.glob(f"runtimes/*/{container}*"))
    assert not faults.processes(container)


def test_a_flag_that_the_program_does_not_know_is_named(lab: Lab) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        lab.kubelet.run_pod(handler=f"odd-{lab.name}")
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    details = str(caught.value.details())
    assert details.startswith(f"handler odd-{lab.name}: ")
    assert "no-such-flag" in details
    assert lab.pod().id  # the others are not affected
