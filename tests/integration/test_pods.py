# SPDX-License-Identifier: Apache-2.0
"""Pod sandboxes, as the kubelet uses them (CRI: RunPodSandbox and its relatives)."""

import concurrent.futures
import ipaddress
import json
import time
from typing import Any

import grpc
import pytest

from cri_server.pb import api_pb2 as api
from tests.fakes.kubelet import Kubelet, Pod, refusal
from tests.integration.conftest import SLEEP
from tests.lab import waiting

pytestmark = pytest.mark.needs("root", "netns", "overlay", "cni", "runc", "docker-registry")
READY, NOTREADY = api.SANDBOX_READY, api.SANDBOX_NOTREADY


def test_a_pod_is_ready_with_an_address_and_all_that_was_given(kubelet: Kubelet) -> None:
    before = time.time_ns()
    config = kubelet.pod_config(labels={"a": "b"}, annotations={"long/key": "x" * 5000})
    pod = kubelet.run_pod(config)
    status = kubelet.pod_status(pod.id).status
    assert len(pod.id) == 64
    assert int(pod.id, 16) >= 0
    assert status.id == pod.id
    assert status.state == READY
    assert status.metadata == config.metadata
    assert dict(status.labels) == {"a": "b"}
    assert dict(status.annotations) == {"long/key": "x" * 5000}
    assert before <= status.created_at <= time.time_ns()
    assert ipaddress.ip_address(status.network.ip).is_private


def test_the_namespace_options_come_back_as_they_were_given(kubelet: Kubelet) -> None:
    options = api.NamespaceOption(pid=api.CONTAINER, ipc=api.NODE, network=api.NODE)
    config = kubelet.pod_config(hostname="")
    config.linux.security_context.namespace_options.CopyFrom(options)
    status = kubelet.pod_status(kubelet.run_pod(config).id).status
    assert status.linux.namespaces.options == options


def test_a_pod_on_the_host_network_has_no_address_of_its_own(kubelet: Kubelet) -> None:
    config = kubelet.pod_config(hostname="")
    config.linux.security_context.namespace_options.network = api.NODE
    assert kubelet.pod_status(kubelet.run_pod(config).id).status.network.ip == ""


@pytest.mark.ours
def test_the_same_request_again_is_the_same_pod(kubelet: Kubelet) -> None:
    config = kubelet.pod_config()
    first = kubelet.run_pod(config)
    assert kubelet.run_pod(config).id == first.id
    assert len(kubelet.pods(id=first.id)) == 1


@pytest.mark.ours
def test_the_same_request_in_flight_is_joined(kubelet: Kubelet) -> None:
    config = kubelet.pod_config()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        ids = set(pool.map(lambda _: kubelet.run_pod(config).id, range(4)))
    assert len(ids) == 1


def test_a_new_attempt_is_a_new_pod(kubelet: Kubelet) -> None:
    config = kubelet.pod_config()
    first = kubelet.run_pod(config)
    kubelet.stop_pod(first.id)
    config.metadata.attempt = 1
    second = kubelet.run_pod(config)
    assert first.id != second.id
    assert kubelet.pod_status(second.id).status.metadata.attempt == 1


def test_a_stopped_pod_is_listed_not_ready_until_it_is_removed(kubelet: Kubelet, pod: Pod) -> None:
    kubelet.stop_pod(pod.id)
    [item] = kubelet.pods(id=pod.id)
    assert item.state == NOTREADY
    kubelet.remove_pod(pod.id)
    assert not kubelet.pods(id=pod.id)
    assert refusal(lambda: kubelet.pod_status(pod.id))[0] is grpc.StatusCode.NOT_FOUND


def test_stop_and_remove_can_be_repeated(kubelet: Kubelet, pod: Pod) -> None:
    kubelet.stop_pod(pod.id)
    kubelet.stop_pod(pod.id)
    kubelet.remove_pod(pod.id)
    kubelet.remove_pod(pod.id)


def test_remove_takes_a_running_pod_with_its_containers(
    kubelet: Kubelet, pod: Pod, container: str
) -> None:
    request = api.RemovePodSandboxRequest(pod_sandbox_id=pod.id)
    kubelet.runtime.RemovePodSandbox(request)
    assert not kubelet.pods(id=pod.id)
    assert not kubelet.containers(id=container)


def test_stop_kills_the_containers(kubelet: Kubelet, pod: Pod, container: str) -> None:
    kubelet.stop_pod(pod.id)
    status = kubelet.status(container)
    assert status.state == api.CONTAINER_EXITED
    assert status.exit_code == 137


@pytest.mark.parametrize("handler", ["nonsense", "../runc"])
def test_an_unknown_handler_is_refused(kubelet: Kubelet, handler: str) -> None:
    config = kubelet.pod_config()
    assert handler in refusal(lambda: kubelet.run_pod(config, handler=handler))[1]
    assert not [p for p in kubelet.pods() if p.metadata.name == config.metadata.name]


def test_filters_are_conjunctions(kubelet: Kubelet) -> None:
    one = kubelet.run_pod(kubelet.pod_config(labels={"app": kubelet.prefix, "tier": "1"}))
    two = kubelet.run_pod(kubelet.pod_config(labels={"app": kubelet.prefix, "tier": "2"}))
    mine = {"label_selector": {"app": kubelet.prefix}}
    assert {p.id for p in kubelet.pods(**mine)} == {one.id, two.id}
    assert [p.id for p in kubelet.pods(id=one.id, **mine)] == [one.id]
    assert [p.id for p in kubelet.pods(id=one.id[:12], **mine)] == [one.id]
    assert not kubelet.pods(id=one.id, label_selector={"tier": "2"})
    state = api.PodSandboxStateValue(state=NOTREADY)
    assert not kubelet.pods(state=state, **mine)
    kubelet.stop_pod(two.id)
    assert [p.id for p in kubelet.pods(state=state, **mine)] == [two.id]


def test_a_short_id_will_do(kubelet: Kubelet, pod: Pod) -> None:
    assert kubelet.pod_status(pod.id[:13]).status.id == pod.id


def test_list_items_carry_what_the_kubelet_reads(kubelet: Kubelet, pod: Pod) -> None:
    [item] = kubelet.pods(id=pod.id)
    status = kubelet.pod_status(pod.id).status
    assert (item.metadata, item.state, item.created_at) == (
        status.metadata,
        status.state,
        status.created_at,
    )
    assert item.labels == status.labels
    assert item.annotations == status.annotations


def test_a_verbose_status_has_the_pid_free_facts_as_json(kubelet: Kubelet, pod: Pod) -> None:
    info = json.loads(kubelet.pod_status(pod.id, verbose=True).info["info"])
    assert info["netns"]
    assert "pid" in info


@pytest.mark.ours
@pytest.mark.parametrize("pid", [api.POD, api.CONTAINER])
def test_a_verbose_status_tells_the_namespaces_where_the_peers_do(
    kubelet: Kubelet, pid: api.NamespaceMode.ValueType
) -> None:
    config = kubelet.pod_config(annotations={"a": "b"})
    config.linux.security_context.namespace_options.pid = pid
    pod = kubelet.run_pod(config)
    info = json.loads(kubelet.pod_status(pod.id, verbose=True).info["info"])
    [path] = [n["path"] for n in _namespaces(info) if n["type"] == "network"]
    assert path == info["netns"]
    assert ("pid" in {n["type"] for n in _namespaces(info)}) == (pid == api.POD)


def _namespaces(info: Any) -> Any:
    """As `.info.runtimeSpec.linux.namespaces` in people's scripts."""
    return info["runtimeSpec"]["linux"]["namespaces"]


@pytest.mark.ours
def test_the_streamed_list_is_the_list(kubelet: Kubelet, pod: Pod, container: str) -> None:
    chunks = kubelet.streams.StreamPodSandboxes(
        api.StreamPodSandboxesRequest(), timeout=waiting.patient(10)
    )
    ids = {item.id for chunk in chunks for item in chunk.pod_sandboxes}
    assert pod.id in ids


def test_hostname_hosts_and_resolv_conf(kubelet: Kubelet, pulled: str) -> None:
    dns = api.DNSConfig(
        servers=["192.0.2.53", "2001:db8::53"], searches=["a.test", "b.test"], options=["ndots:3"]
    )
    pod = kubelet.run_pod(kubelet.pod_config(hostname="my-host", dns_config=dns))
    container = kubelet.run(pod, pulled, SLEEP)
    assert kubelet.exec_sync(container, ["hostname"]).stdout == b"my-host\n"
    resolv = kubelet.exec_sync(container, ["cat", "/etc/resolv.conf"]).stdout.decode()
    assert resolv.splitlines() == [
        "search a.test b.test",
        "nameserver 192.0.2.53",
        "nameserver 2001:db8::53",
        "options ndots:3",
    ]


def test_containers_of_a_pod_share_network_and_ipc_but_not_pids(
    kubelet: Kubelet, pod: Pod, pulled: str
) -> None:
    ids = [kubelet.run(pod, pulled, SLEEP, name=name) for name in ("one", "two")]

    def namespace(container: str, kind: str) -> bytes:
        return kubelet.exec_sync(container, ["readlink", f"/proc/1/ns/{kind}"]).stdout

    for kind, shared in (
        ("net", True),
        ("ipc", True),
        ("uts", True),
        ("pid", False),
        ("mnt", False),
    ):
        assert (namespace(ids[0], kind) == namespace(ids[1], kind)) is shared, kind


@pytest.mark.needs("catatonit")
def test_a_shared_pid_namespace_shows_the_processes_of_all(kubelet: Kubelet, pulled: str) -> None:
    config = kubelet.pod_config()
    config.linux.security_context.namespace_options.pid = api.POD
    pod = kubelet.run_pod(config)
    context = api.LinuxContainerSecurityContext(namespace_options=api.NamespaceOption(pid=api.POD))
    linux = api.LinuxContainerConfig(security_context=context)
    kubelet.run(pod, pulled, ["sleep", "4321"], name="one", linux=linux)
    second = kubelet.run(pod, pulled, SLEEP, name="two", linux=linux)
    assert b"sleep 4321" in kubelet.exec_sync(second, ["ps"]).stdout


def test_sysctls_are_those_of_the_pod(kubelet: Kubelet, pulled: str) -> None:
    config = kubelet.pod_config()
    config.linux.sysctls.update(
        {"kernel.shm_rmid_forced": "1", "net.ipv4.ip_local_port_range": "1024 2048"}
    )
    container = kubelet.run(kubelet.run_pod(config), pulled, SLEEP)
    read = kubelet.exec_sync(container, ["sysctl", "-n", "kernel.shm_rmid_forced"]).stdout
    assert read == b"1\n"
    ports = kubelet.exec_sync(container, ["sysctl", "-n", "net.ipv4.ip_local_port_range"]).stdout
    assert ports.split() == [b"1024", b"2048"]


def test_sysctls_of_the_pods_interface_are_set_when_it_is_there(
    kubelet: Kubelet, pulled: str
) -> None:
    config = kubelet.pod_config()
    config.linux.sysctls.update(
        {"net.ipv4.conf.eth0.rp_filter": "0", "net/ipv4/neigh/eth0/gc_stale_time": "77"}
    )
    container = kubelet.run(kubelet.run_pod(config), pulled, SLEEP)
    names = ("conf/eth0/rp_filter", "neigh/eth0/gc_stale_time")
    files = [f"/proc/sys/net/ipv4/{name}" for name in names]
    assert kubelet.exec_sync(container, ["cat", *files]).stdout == b"0\n77\n"
    config.metadata.attempt += 1
    config.linux.sysctls["net.ipv4.conf.eth1.rp_filter"] = "0"
    refused = refusal(lambda: kubelet.run_pod(config))
    assert refused[0] is grpc.StatusCode.INVALID_ARGUMENT
    assert "net.ipv4.conf.eth1.rp_filter" in refused[1]


def test_the_log_folder_is_made_when_the_client_has_not(kubelet: Kubelet, pulled: str) -> None:
    config = kubelet.pod_config()
    request = api.RunPodSandboxRequest(config=config)
    pod = Pod(id=kubelet.runtime.RunPodSandbox(request).pod_sandbox_id, config=config)
    container = kubelet.run(pod, pulled, ["echo", "hello"], log_path="flat.log")
    assert kubelet.wait_log(container, "hello")
