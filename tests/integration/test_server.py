# SPDX-License-Identifier: Apache-2.0
"""The server as a process: what it says about itself, and that pods outlive it."""

import concurrent.futures
import json
import os
import re
import signal
import socket
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from cri_server.pb import api_pb2 as api
from tests.fakes import kubelet as kubelets
from tests.fakes.kubelet import Kubelet, Pod, conditions
from tests.integration.conftest import DRIVER, SLEEP
from tests.lab import holding, server, waiting

pytestmark = pytest.mark.needs("root", "netns", "overlay", "cni", "runc", "docker-registry")


def test_version_is_what_the_kubelet_wants(kubelet: Kubelet) -> None:
    found = kubelet.runtime.Version(api.VersionRequest(version="0.1.0"))
    assert found.version == "0.1.0"
    assert found.runtime_name
    assert found.runtime_api_version == "v1"
    assert re.match(r"v?\d+\.\d+\.\d+", found.runtime_version)


def test_status_is_ready(kubelet: Kubelet) -> None:
    answer = kubelet.runtime.Status(api.StatusRequest())
    found = conditions(answer)
    assert found["RuntimeReady"]
    assert found["NetworkReady"]


def test_a_request_of_ten_megabytes_is_read(kubelet: Kubelet, pod: Pod) -> None:
    """grpc's own limit is 4 MiB (hazards R40)."""
    assert kubelet.pods(label_selector={"big": "x" * (10 << 20)}) == []
    assert [p.id for p in kubelet.pods(id=pod.id)] == [pod.id]


@pytest.mark.ours
def test_verbose_status_names_the_handlers_and_has_the_config(kubelet: Kubelet) -> None:
    answer = kubelet.runtime.Status(api.StatusRequest(verbose=True))
    assert {"", "runc"} <= {handler.name for handler in answer.runtime_handlers}
    assert json.loads(answer.info["config"])


@pytest.mark.ours
def test_the_cgroup_driver_is_told(kubelet: Kubelet) -> None:
    answer = kubelet.runtime.RuntimeConfig(api.RuntimeConfigRequest())
    assert api.CgroupDriver.Name(answer.linux.cgroup_driver).lower() == DRIVER


def test_the_runtime_config_can_be_updated(kubelet: Kubelet) -> None:
    network = api.NetworkConfig(pod_cidr="10.9.0.0/16")
    config = api.RuntimeConfig(network_config=network)
    kubelet.runtime.UpdateRuntimeConfig(api.UpdateRuntimeConfigRequest(runtime_config=config))


@pytest.mark.ours
@pytest.mark.parametrize("end", [server.Site.stop, server.Site.kill])
def test_pods_outlive_the_server(
    make_site: Callable[..., server.Site],
    client_of: Callable[[server.Site], Kubelet],
    reference: str,
    end: Callable[[server.Site], object],
) -> None:
    site = make_site()
    client = client_of(site)
    client.pull(reference)
    pod = client.run_pod()
    script = "i=0; while :; do echo $i; i=$((i+1)); sleep 0.02; done"
    lasting = client.run(pod, reference, ["sh", "-c", script], name="lasting")
    ending = client.run(pod, reference, ["sh", "-c", "sleep 0.5; exit 7"], name="ending")
    before = client.pod_status(pod.id).status
    end(site)
    site.start()
    client = client_of(site)
    assert client.pod_status(pod.id).status == before
    assert client.status(lasting).state == api.CONTAINER_RUNNING
    assert client.wait_exit(ending).exit_code == 7
    assert client.exec_sync(lasting, ["echo", "still"]).stdout == b"still\n"
    client.stop(lasting)
    texts = [line.text for line in client.log(lasting)]
    assert texts == [str(n) for n in range(len(texts))]
    client.remove_pod(pod.id)


@pytest.mark.ours
def test_a_stale_socket_is_no_obstacle(
    make_site: Callable[..., server.Site],
    client_of: Callable[[server.Site], Kubelet],
    reference: str,
) -> None:
    site = make_site()
    site.kill()
    site.start()
    client = client_of(site)
    client.pull(reference)
    client.run(client.run_pod(), reference, SLEEP)


@pytest.mark.ours
def test_noise_on_the_socket_disturbs_nobody(site: server.Site, kubelet: Kubelet) -> None:
    for noise in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\0" * 5000, b"\xff" * 100):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(site.endpoint.removeprefix("unix://"))
            connection.sendall(noise)
    assert kubelet.runtime.Version(api.VersionRequest()).version == "0.1.0"


@pytest.mark.ours
def test_a_server_that_runs_obeys_signals(make_site: Callable[..., server.Site]) -> None:
    site = make_site(server={"log_level": "warning"})
    assert b'"event": "rpc"' not in poked(site)
    settings = site.home / "config.toml"
    text = settings.read_text().replace('"warning"', '"debug"')
    settings.write_text(f'{text}[metrics]\ngroups = ["cpu"]\n')
    os.kill(site.pid, signal.SIGHUP)
    said(site, {"log_level": "debug", "needs_a_restart": ["metrics.groups"]})
    waiting.until(lambda: b'"event": "rpc"' in poked(site), "calls are logged")
    settings.write_text("[nonsense]")
    os.kill(site.pid, signal.SIGHUP)
    said(site, {"event": "configuration not read again"})
    os.kill(site.pid, signal.SIGUSR1)
    places = said(site, {"event": "task", "name": "reload"})["at"]
    assert any("Reloader.run" in place for place in places)


def test_a_thread_that_never_comes_back_does_not_keep_the_server_from_ending(
    make_site: Callable[..., server.Site], client_of: Callable[[server.Site], Kubelet]
) -> None:
    site = make_site()
    gate = holding.gated(site, site.root / "pods")
    client = client_of(site)
    gate.shut()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        cut_off = pool.submit(client.run_pod)
        gate.wait()  # as where the disk of its record has died
        assert site.stop() == 0
        with pytest.raises(grpc.RpcError):
            cut_off.result()
    assert b"stopped without waiting any longer" in site.log.read_bytes()
    site.start()
    assert not client_of(site).pods()


def said(site: server.Site, wanted: dict[str, object]) -> dict[str, Any]:
    """Return the line of the server's log that has these fields, when there is one."""
    return waiting.until(lambda: _line(site, wanted), f"the server says {wanted}")


def _line(site: server.Site, wanted: dict[str, object]) -> dict[str, Any]:
    lines = (json.loads(line) for line in site.log.read_text().splitlines() if line[0] == "{")
    return next((line for line in lines if wanted.items() <= line.items()), {})


def poked(site: server.Site) -> bytes:
    """Return the server's log after a call."""
    kubelets.is_ready(site.endpoint)
    return site.log.read_bytes()
