# SPDX-License-Identifier: Apache-2.0
"""The CNI plugins of the distribution, run by us, on a host of their own.

A thread enters a new network namespace and runs a loop there: for the plugins that it starts this
is the host, with no bridge, no iptables rule and no route of the real one. Pods are further
namespaces, pinned in a temporary folder.
"""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import json
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from cri_server import config, errors
from cri_server.network import attachment, cni, netns
from cri_server.pb import api_pb2 as api
from shim import linux
from tests.fakes import cni as fakes

pytestmark = pytest.mark.needs("root", "netns", "cni")
T = TypeVar("T")
PLUGINS = next((d for d in ("/opt/cni/bin", "/usr/lib/cni") if Path(d, "bridge").exists()), "")
VERSIONS = ["0.3.1", "0.4.0", "1.0.0"]  # what the oldest plugins that we support speak
IP = shutil.which("ip") or "/usr/sbin/ip"
IPTABLES = shutil.which("iptables-save") or "/usr/sbin/iptables-save"
PORTS = {"type": "portmap", "capabilities": {"portMappings": True}}


class Host:
    """A host: its folders, and its network namespace in which `run` runs things."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.leases = folder, folder / "leases"
        self.conf = folder / "net.d"
        self.conf.mkdir()
        self._pins: list[str] = []

    def network(self) -> cni.Network:
        return cni.Network(
            config.Network(
                conf_dir=self.conf, bin_dirs=(Path(PLUGINS),), cache_dir=self.folder / "cache"
            )
        )

    def configure(self, *more: dict[str, Any], version: str = "1.0.0", **bridge: Any) -> None:
        """Write a network: bridge with host-local addresses, and more plugins."""
        ranges = [[{"subnet": "10.99.0.0/24"}], [{"subnet": "fd99::/64"}]]
        ipam = {"type": "host-local", "ranges": ranges, "dataDir": str(self.leases)}
        first = {"type": "bridge", "bridge": "br0", "isGateway": True, "ipMasq": True, "ipam": ipam}
        document = {"cniVersion": version, "name": "real", "plugins": [first | bridge, *more]}
        (self.conf / "10.conflist").write_text(json.dumps(document))

    def leased(self) -> list[str]:
        """Return the addresses that host-local has given away."""
        folder = self.leases / "real"
        names = [p.name for p in folder.iterdir()] if folder.exists() else []
        return sorted(n for n in names if not n.startswith(("last_reserved", "lock")))

    def pod(self, pod_id: str, **values: Any) -> cni.Attachment:
        """Return a pod with a namespace of its own, in which the loopback is up."""
        path = self.folder / pod_id
        path.touch()
        in_new_namespace(lambda: pin(os.fspath(path)))
        self._pins.append(os.fspath(path))
        return fakes.attachment(pod_id, netns=os.fspath(path), **values)

    def run(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run a coroutine with the host's namespace as its own."""
        return in_new_namespace(lambda: asyncio.run(work()))

    def remove(self) -> None:
        for path in self._pins:
            netns.remove(path)


def in_new_namespace(work: Callable[[], T]) -> T:
    """Call `work` in a thread that is alone in a new network namespace and ends with it."""
    done: concurrent.futures.Future[T] = concurrent.futures.Future()

    def body() -> None:
        try:
            linux.unshare(linux.CLONE_NEWNET)
            subprocess.run([IP, "link", "set", "lo", "up"], check=True)
            done.set_result(work())
        except BaseException as e:
            done.set_exception(e)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    return done.result()


def in_namespace(path: str, work: Callable[[], T]) -> T:
    def entered() -> T:
        with open(path) as file:
            linux.setns(file.fileno(), linux.CLONE_NEWNET)
        return work()

    return in_new_namespace(entered)


def pin(path: str) -> None:
    linux.mount("/proc/thread-self/ns/net", path, "", linux.MS_BIND, "")


def interfaces(path: str) -> dict[str, list[str]]:
    """Return the interfaces in a namespace with their addresses, without the loopback."""
    printed = subprocess.run(
        ["nsenter", f"--net={path}", IP, "-json", "addr"], check=True, capture_output=True
    ).stdout
    return {
        link["ifname"]: [a["local"] for a in link["addr_info"] if a["scope"] == "global"]
        for link in json.loads(printed)
        if link["ifname"] != "lo"
    }


def rules() -> str:
    return subprocess.run([IPTABLES], check=True, capture_output=True, text=True).stdout


def links() -> list[str]:
    printed = subprocess.run([IP, "-json", "link"], check=True, capture_output=True).stdout
    return [link["ifname"] for link in json.loads(printed)]


def load_ifb() -> None:
    """Load what the bandwidth plugin needs, without the two devices that come with it."""
    if shutil.which("modprobe"):
        subprocess.run(["modprobe", "ifb", "numifbs=0"], check=False, capture_output=True)


def queues() -> str:
    return subprocess.run(["tc", "qdisc"], check=True, capture_output=True, text=True).stdout


@contextlib.contextmanager
def echo_server(path: str, port: int) -> Iterator[None]:
    """Serve one line on a port inside a pod."""
    listener = in_namespace(path, lambda: socket.create_server(("0.0.0.0", port)))
    thread = threading.Thread(target=answer, args=(listener,))
    thread.start()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        listener.close()


def answer(listener: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"hello")


def ask(address: str, port: int) -> bytes:
    with socket.create_connection((address, port), timeout=5) as connection:
        return connection.recv(100)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    made = Host(tmp_path)
    yield made
    made.remove()


@pytest.mark.parametrize("version", VERSIONS)
def test_a_pod_gets_the_addresses_that_are_reported_and_gives_them_back(
    host: Host, version: str
) -> None:
    host.configure(PORTS, version=version)
    pod = host.pod("pod1")

    async def work() -> None:
        network = host.network()
        got = await network.attach(pod)
        assert got.ips == ("10.99.0.2", "fd99::2")
        assert interfaces(pod.netns) == {"eth0": list(got.ips)}
        assert host.leased() == ["10.99.0.2", "fd99::2"]
        if version >= "0.4.0":
            await network.check(pod)
        await network.detach(pod)
        assert interfaces(pod.netns) == {}
        assert host.leased() == []
        assert [name for name in links() if name.startswith("veth")] == []
        await network.detach(pod)

    host.run(work)


@pytest.mark.parametrize("more", [(PORTS,), ()], ids=["as configured", "put in"])
def test_a_host_port_reaches_the_pod_until_it_is_detached(
    host: Host, more: tuple[dict[str, Any], ...]
) -> None:
    host.configure(*more)
    mapping = api.PortMapping(container_port=80, host_port=8080)
    pod = host.pod("pod1", port_mappings=[mapping])

    async def work() -> None:
        network = host.network()
        await network.attach(pod)
        with echo_server(pod.netns, 80):
            assert await asyncio.to_thread(ask, "10.99.0.2", 80) == b"hello"
            assert await asyncio.to_thread(ask, "10.99.0.1", 8080) == b"hello"
        await network.detach(pod)
        assert "8080" not in rules()
        assert pod.pod_id not in rules()

    host.run(work)


def test_bandwidth_and_firewall_take_part_in_the_chain(host: Host) -> None:
    load_ifb()
    bandwidth = {"type": "bandwidth", "capabilities": {"bandwidth": True}}
    host.configure(PORTS, {"type": "firewall", "backend": "iptables"}, bandwidth)
    pod = host.pod("pod1", annotations={attachment.INGRESS: "10M", attachment.EGRESS: "5M"})

    async def work() -> None:
        network = host.network()
        got = await network.attach(pod)
        shaped = queues()
        assert "rate 10Mbit" in shaped
        assert "rate 5Mbit" in shaped
        assert f"-d {got.ips[0]}/32" in rules()
        await network.detach(pod)
        assert f"-d {got.ips[0]}/32" not in rules()
        assert set(links()) <= {"lo", "br0"}

    host.run(work)


def test_addresses_are_given_back_when_the_namespace_and_the_configuration_are_gone(
    host: Host,
) -> None:
    host.configure(PORTS)
    pods = [host.pod(f"pod{n}") for n in range(3)]

    async def work() -> None:
        network = host.network()
        for pod in pods:
            await network.attach(pod)
        assert len(host.leased()) == 6
        netns.remove(pods[0].netns)  # no file
        linux.umount2(pods[1].netns)  # a file that is no namespace: a reboot
        (host.conf / "10.conflist").unlink()
        for pod in pods:
            await network.detach(pod)
        assert host.leased() == []

    host.run(work)


@pytest.mark.parametrize("lost", [True, False], ids=["lost", "broken"])
def test_addresses_are_given_back_when_the_cache_entry_is_gone(host: Host, *, lost: bool) -> None:
    host.configure(PORTS)
    pod = host.pod("pod1")

    async def work() -> None:
        network = host.network()
        added = (await network.attach(pod)).raw
        entry = host.folder / "cache" / "results" / "real-pod1-eth0"
        if lost:
            entry.unlink()
        else:  # by a power loss, which the namespace does not survive either
            entry.write_bytes(b"")
            linux.umount2(pod.netns)
        await network.detach(dataclasses.replace(pod, result=added))
        assert host.leased() == []

    host.run(work)


def test_a_later_plugin_that_fails_leaves_no_address(host: Host) -> None:
    host.configure({"type": "tuning", "sysctl": {"net.ipv4.conf.eth0.none": "1"}})
    pod = host.pod("pod1")

    async def work() -> None:
        network = host.network()
        with pytest.raises(errors.Internal, match=r"'tuning': ADD failed: .*none"):
            await network.attach(pod)
        assert host.leased() == []
        assert interfaces(pod.netns) == {}
        assert host.network()._cache.find("pod1", "eth0") == []

    host.run(work)


def test_a_version_that_a_plugin_does_not_speak_is_its_error(host: Host) -> None:
    host.configure(version="1.1.0")
    pod = host.pod("pod1")

    async def work() -> None:
        network = host.network()
        spoken = (await network.versions())["bridge"]
        if "1.1.0" in spoken:
            pytest.skip("the plugins speak 1.1.0")
        with pytest.raises(
            errors.Internal, match=r"'bridge': ADD failed: incompatible CNI versions"
        ):
            await network.attach(pod)

    host.run(work)


def test_eight_pods_at_a_time_get_eight_addresses(host: Host) -> None:
    host.configure(PORTS)
    pods = [host.pod(f"pod{n}") for n in range(8)]

    async def work() -> None:
        network = host.network()
        results = await asyncio.gather(*(network.attach(pod) for pod in pods))
        assert len({r.ips[0] for r in results}) == 8
        for pod, got in zip(pods, results, strict=True):
            assert interfaces(pod.netns) == {"eth0": list(got.ips)}
        await asyncio.gather(*(network.detach(pod) for pod in pods))
        assert host.leased() == []

    host.run(work)


def test_the_sample_configuration_is_valid_and_works(host: Host) -> None:
    sample = Path(__file__).parents[2] / "deploy" / "10-bridge.conflist"
    document = json.loads(sample.read_text())
    document["plugins"][0]["ipam"]["dataDir"] = str(host.leases)
    (host.conf / sample.name).write_text(json.dumps(document))
    pod = host.pod("pod1")

    async def work() -> None:
        network = host.network()
        assert network.status() == cni.NetworkStatus(ready=True, reason="", message="")
        got = await network.attach(pod)
        assert got.ips == ("10.86.0.2",)
        await network.detach(pod)

    host.run(work)


def test_a_namespace_exists_while_it_is_pinned(host: Host) -> None:
    path = host.pod("pod1").netns
    assert netns.exists(path)
    linux.umount2(path)
    assert os.path.exists(path)
    assert not netns.exists(path)
    in_new_namespace(lambda: pin(path))
    netns.remove(path)
    assert not os.path.exists(path)
    netns.remove(path)
    netns.remove("")
    assert not netns.exists(path)
    assert not netns.exists("")
