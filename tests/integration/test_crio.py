# SPDX-License-Identifier: Apache-2.0
"""CRI-O's inspection interface, asked as cAdvisor asks it, and the cgroups that it looks for."""

import contextlib
import http.client
import json
import os
import re
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cri_server.pb import api_pb2 as api
from tests.fakes.kubelet import Kubelet
from tests.integration.conftest import DRIVER, SLEEP
from tests.lab import cgroups, server
from tests.lab.server import Site

pytestmark = [
    pytest.mark.needs("root", "netns", "overlay", "cni", "runc", "docker-registry"),
    pytest.mark.ours,
]
CADVISORS = re.compile(r"^crio.*([a-z0-9]{64})")  # of cAdvisor's lib/container/crio/factory.go


class Connection(http.client.HTTPConnection):
    """HTTP on a unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("crio", timeout=10)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(os.fspath(self._path))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "crio.sock"


@pytest.fixture
def site(make_site: Callable[..., Site], path: Path) -> Site:
    return make_site(server={"crio_socket": os.fspath(path)})


@pytest.fixture
def client(site: Site, client_of: Callable[[Site], Kubelet], reference: str) -> Iterator[Kubelet]:
    client = client_of(site)
    client.pull(reference)
    yield client
    client.remove_own_pods()


@pytest.fixture
def get(path: Path) -> Callable[[str], tuple[int, Any]]:
    """Return a function that gives the status and the JSON of a path."""

    def get(url: str) -> tuple[int, Any]:
        connection = Connection(path)
        connection.request("GET", url)
        response = connection.getresponse()
        body = response.read()
        connection.close()
        return response.status, json.loads(body) if response.status == 200 else None

    return get


Get = Callable[[str], tuple[int, Any]]


def pid_of(client: Kubelet, container: str) -> int:
    info = client.status_response(container, verbose=True).info["info"]
    return int(json.loads(info)["pid"])


def test_info_tells_where_things_are(client: Kubelet, get: Get, site: Site) -> None:
    status, told = get("/info")

    assert status == 200
    assert told.pop("cgroup_driver") in ("systemd", "cgroupfs")
    everything = {"container_id": 0, "host_id": 0, "size": (1 << 32) - 1}
    assert told == {
        "storage_driver": "overlayfs",
        "storage_root": os.fspath(site.root),
        "storage_image": os.fspath(site.root),
        "default_id_mappings": {"uids": [everything], "gids": [everything]},
    }


def test_a_container_is_told_with_cri_os_names(
    client: Kubelet, get: Get, site: Site, reference: str
) -> None:
    pod = client.run_pod()
    container = client.run(pod, reference, SLEEP)
    status, told = get(f"/containers/{container}")

    m, seen = pod.config.metadata, client.status(container)
    assert status == 200
    assert told.pop("image").endswith("busybox:latest")
    assert told == {
        "name": f"k8s_main_{m.name}_{m.namespace}_{m.uid}_0",
        "pid": pid_of(client, container),
        "image_ref": seen.image_id,
        "created_time": seen.created_at,
        "labels": dict(seen.labels),
        "annotations": dict(seen.annotations),
        "crio_annotations": {},
        "log_path": seen.log_path,
        "root": os.fspath(site.root / "writable" / container / "fs"),
        "sandbox": pod.id,
        "ip_addresses": [client.pod_status(pod.id).status.network.ip],
        "host_network": False,
    }
    assert Path(told["root"]).is_dir()


def test_a_pod_is_told_as_the_container_pod(client: Kubelet, get: Get, reference: str) -> None:
    pod = client.run_pod()
    assert get(f"/containers/{pod.id}")[1]["pid"] == 0, "nothing runs in its network"
    container = client.run(pod, reference, SLEEP)
    status, told = get(f"/containers/{pod.id}")

    assert status == 200
    assert told["labels"]["io.kubernetes.container.name"] == "POD"
    assert told["labels"]["io.kubernetes.pod.name"] == pod.config.metadata.name
    assert told["pid"] == pid_of(client, container)
    inside = Path(f"/proc/{told['pid']}/ns/net").stat().st_ino
    assert inside == Path(f"/run/netns/{pod.id}").stat().st_ino
    client.stop(container)
    assert get(f"/containers/{pod.id}")[1]["pid"] == 0
    assert get(f"/containers/{container}")[1]["pid"] == 0


@pytest.mark.parametrize("wanted", ["f" * 64, "", "..%2f..", "a b"])
def test_what_is_not_known_is_not_found(client: Kubelet, get: Get, wanted: str) -> None:
    assert get(f"/containers/{wanted.replace(' ', '%20')}")[0] == 404


def test_other_paths_are_not_served(client: Kubelet, get: Get) -> None:
    assert get("/pause/x")[0] == 404


def cgroup_of(pid: int) -> Path:
    groups = cgroups.of_process(pid)
    return groups["" if cgroups.is_v2() else "memory"]


def test_cadvisor_recognises_containers_by_their_cgroups(
    client: Kubelet, get: Get, reference: str
) -> None:
    container = client.run(client.run_pod(), reference, SLEEP)
    found = CADVISORS.match(cgroup_of(pid_of(client, container)).name)

    assert found is not None
    assert found.group(1) == container


@pytest.mark.parametrize("shared", [False, True], ids=["no init", "with an init"])
def test_cadvisor_finds_a_cgroup_of_every_pod(
    client: Kubelet, get: Get, reference: str, shared: bool
) -> None:
    config = client.pod_config()
    if shared:
        config.linux.security_context.namespace_options.pid = api.POD
    with slice_of(config):
        pod = client.run_pod(config)
        container = client.run(pod, reference, SLEEP)
        folder = cgroup_of(pid_of(client, container)).parent
        (own,) = (p for p in folder.iterdir() if p.is_dir() and pod.id in p.name)

        assert CADVISORS.match(own.name)
        assert own.name == cgroup_of(pid_of(client, container)).name.replace(container, pod.id)
        client.stop_pod(pod.id)
        assert not own.exists()


def test_the_cgroup_of_a_pod_goes_also_when_the_socket_is_none_any_more(
    site: Site, client_of: Callable[[Site], Kubelet], client: Kubelet, reference: str
) -> None:
    config = client.pod_config()
    with slice_of(config):
        pod = client.run_pod(config)
        folder = cgroup_of(pid_of(client, client.run(pod, reference, SLEEP))).parent
        (own,) = (p for p in folder.iterdir() if p.is_dir() and pod.id in p.name)
        site.stop()
        server = {k: v for k, v in site.settings["server"].items() if k != "crio_socket"}
        site.settings = {**site.settings, "server": server}
        site.start()
        client_of(site).stop_pod(pod.id)
        assert not own.exists()


@contextlib.contextmanager
def slice_of(config: api.PodSandboxConfig) -> Iterator[None]:
    """Have the pod's slice there for the block, as the kubelet makes it, with that driver."""
    unit = Path(config.linux.cgroup_parent).name
    if DRIVER != "systemd":
        yield
        return
    subprocess.run(["systemctl", "start", unit], check=True)
    yield
    subprocess.run(["systemctl", "stop", unit], check=True)


def test_a_path_that_somebody_listens_on_is_not_taken(
    make_site: Callable[..., Site], site: Site, path: Path, get: Get
) -> None:
    with server.site({**site.settings}) as second:
        second.start(wait=False)
        assert second.process is not None
        assert second.process.wait(30) == 2
        assert f"server.crio_socket: somebody else listens on {path}" in second.tail()
    assert get("/info")[0] == 200


@pytest.mark.usefixtures("traceless")
def test_a_restart_serves_the_same_again(
    client: Kubelet, get: Get, site: Site, path: Path, reference: str
) -> None:
    pod = client.run_pod()
    container = client.run(pod, reference, SLEEP)
    before = get(f"/containers/{container}")
    site.kill()
    assert path.exists(), "a crash leaves the socket"
    site.start()

    assert get(f"/containers/{container}") == before
    client.remove_pod(pod.id)
    assert get(f"/containers/{container}")[0] == 404
    assert site.stop() == 0
    assert not path.exists()
    site.start()
