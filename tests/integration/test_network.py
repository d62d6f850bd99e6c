# SPDX-License-Identifier: Apache-2.0
"""Pods on the network: addresses, port mappings, the host's network, and what CNI keeps (CRI, CNI
1.0)."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from cri_server.pb import api_pb2 as api
from tests.fakes.kubelet import Kubelet
from tests.integration.conftest import SLEEP
from tests.lab import network, registry, waiting

pytestmark = pytest.mark.needs(
    "root", "netns", "overlay", "cni", "runc", "docker-registry", "curl", "ip"
)
WEB = ("sh", "-c", "exec httpd -f -p 8080 -h /var/www")
PAGE = "hello from a pod\n"


def fetch(url: str) -> str:
    """Get a page as a user would, with a name of the host, not through loopback."""
    command = [
        "curl",
        "--silent",
        "--show-error",
        "--fail",
        "--noproxy",
        "*",
        "--max-time",
        "5",
        url,
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def host_address() -> str:
    """Return an address of this host that is not loopback."""
    done = subprocess.run(
        ["ip", "-4", "-json", "address", "show", "scope", "global", "up"],
        capture_output=True,
        text=True,
        check=True,
    )
    links = [link for link in json.loads(done.stdout) if link.get("addr_info")]
    return str(links[0]["addr_info"][0]["local"])


def wait_for_page(url: str) -> None:
    waiting.until(lambda: fetch(url) == PAGE, f"{url} answers", seconds=10)


def test_a_pod_answers_at_its_address(kubelet: Kubelet, pulled: str) -> None:
    pod = kubelet.run_pod()
    kubelet.run(pod, pulled, WEB)
    wait_for_page(f"http://{kubelet.pod_status(pod.id).status.network.ip}:8080/")


def test_a_host_port_leads_to_the_pod_and_ends_with_it(kubelet: Kubelet, pulled: str) -> None:
    port = registry.free_port()
    mapping = api.PortMapping(protocol=api.TCP, container_port=8080, host_port=port)
    pod = kubelet.run_pod(kubelet.pod_config(port_mappings=[mapping]))
    kubelet.run(pod, pulled, WEB)
    url = f"http://{host_address()}:{port}/"
    wait_for_page(url)
    kubelet.stop_pod(pod.id)
    assert fetch(url) == ""


def test_two_containers_and_a_host_port(kubelet: Kubelet, pulled: str) -> None:
    port = registry.free_port()
    mapping = api.PortMapping(container_port=8080, host_port=port)
    pod = kubelet.run_pod(kubelet.pod_config(port_mappings=[mapping]))
    web = kubelet.run(pod, pulled, ["sh", "-c", f"echo web up; {WEB[2]}"], name="web")
    script = "until wget -q -O - http://127.0.0.1:8080/; do sleep 0.05; done; sleep 1000"
    side = kubelet.run(pod, pulled, ["sh", "-c", script], name="side")
    wait_for_page(f"http://{host_address()}:{port}/")
    assert [line.text for line in kubelet.log(web)] == ["web up"]
    assert kubelet.wait_log(side, PAGE.strip())


def test_a_mapping_without_host_port_maps_nothing(kubelet: Kubelet) -> None:
    mapping = api.PortMapping(container_port=8080)
    pod = kubelet.run_pod(kubelet.pod_config(port_mappings=[mapping]))
    assert kubelet.pod_status(pod.id).status.network.ip


def test_two_pods_reach_each_other(kubelet: Kubelet, pulled: str) -> None:
    server, client = kubelet.run_pod(), kubelet.run_pod()
    kubelet.run(server, pulled, WEB)
    address = kubelet.pod_status(server.id).status.network.ip
    wait_for_page(f"http://{address}:8080/")
    container = kubelet.run(client, pulled, SLEEP)
    done = kubelet.exec_sync(container, ["wget", "-q", "-O", "-", f"http://{address}:8080/"])
    assert done.stdout.decode() == PAGE


def test_loopback_is_up_and_there_is_one_more_interface(kubelet: Kubelet, container: str) -> None:
    links = kubelet.exec_sync(container, ["ip", "-o", "addr"]).stdout.decode()
    assert "127.0.0.1/8" in links
    assert "eth0" in links


def test_the_host_network_is_the_hosts(kubelet: Kubelet, pulled: str) -> None:
    config = kubelet.pod_config(hostname="")
    config.linux.security_context.namespace_options.network = api.NODE
    pod = kubelet.run_pod(config)
    context = api.LinuxContainerSecurityContext(
        namespace_options=api.NamespaceOption(network=api.NODE, pid=api.CONTAINER)
    )
    linux = api.LinuxContainerConfig(security_context=context)
    container = kubelet.run(pod, pulled, SLEEP, linux=linux)
    inside = kubelet.exec_sync(container, ["readlink", "/proc/1/ns/net"]).stdout.decode().strip()
    assert inside == os.readlink("/proc/self/ns/net")
    name = kubelet.exec_sync(container, ["hostname"]).stdout.decode().strip()
    assert name == os.uname().nodename


@pytest.mark.ours
def test_the_netns_is_where_ip_netns_finds_it(kubelet: Kubelet) -> None:
    pod = kubelet.run_pod()
    done = subprocess.run(
        ["ip", "netns", "exec", pod.id, "ip", "-o", "-4", "addr", "show", "eth0"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert kubelet.pod_status(pod.id).status.network.ip in done.stdout


@pytest.mark.ours
def test_the_cni_result_is_kept_and_dropped(kubelet: Kubelet, net: network.Network) -> None:
    pod = kubelet.run_pod()
    address = kubelet.pod_status(pod.id).status.network.ip
    [result] = list(network.RESULTS.glob(f"{net.name}-{pod.id}-*"))
    assert address in result.read_text()
    lease = network.LEASES / net.name / address
    assert pod.id in lease.read_text()
    kubelet.stop_pod(pod.id)
    assert not result.exists()
    assert not lease.exists()


@pytest.mark.ours
def test_an_address_is_given_back_when_the_cache_has_lost_it(
    kubelet: Kubelet, net: network.Network
) -> None:
    pod = kubelet.run_pod()
    lease = network.LEASES / net.name / kubelet.pod_status(pod.id).status.network.ip
    assert pod.id in lease.read_text()
    [result] = list(network.RESULTS.glob(f"{net.name}-{pod.id}-*"))
    result.unlink()
    kubelet.stop_pod(pod.id)
    assert not lease.exists()


@pytest.mark.ours
def test_a_stopped_pod_has_no_netns(kubelet: Kubelet) -> None:
    pod = kubelet.run_pod()
    assert Path("/run/netns", pod.id).exists()
    kubelet.stop_pod(pod.id)
    assert not Path("/run/netns", pod.id).exists()
