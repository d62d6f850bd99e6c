# SPDX-License-Identifier: Apache-2.0
"""`cri-server reset` and `deploy/uninstall.sh`, as an operator runs them: all of ours goes, and
nothing of others.
"""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from cri_server import sockets
from tests.fakes import cni
from tests.integration.conftest import SLEEP, ClientOf, MakeSite
from tests.lab import faults, server

pytestmark = [
    pytest.mark.needs("root", "netns", "overlay", "cni", "runc", "docker-registry"),
    pytest.mark.ours,
    pytest.mark.timeout(120),
]
DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
SAYS_GOODBYE = "trap 'echo goodbye >/out/said; exit' TERM; echo ready; while :; do sleep 0.1; done"
Done = subprocess.CompletedProcess[str]


def reset(site: server.Site, *arguments: str) -> Done:
    config = os.fspath(site.home / "config.toml")
    command = [server.command(), "reset", "--config", config, *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def busy(make_site: MakeSite, client_of: ClientOf, reference: str) -> server.Site:
    """Return a server of its own with two pods, a running container in each."""
    site = make_site()
    client = client_of(site)
    client.pull(reference)
    for _ in range(2):
        client.run(client.run_pod(), reference, SLEEP)
    return site


def gone(site: server.Site) -> None:
    """Assert that nothing of a server is there."""
    assert not site.root.exists()
    assert not site.state.exists()
    assert not (site.home / "cri.sock").exists()


@pytest.mark.usefixtures("traceless")
def test_pods_end_gracefully_and_then_nothing_is_left(
    make_site: MakeSite, client_of: ClientOf, reference: str, tmp_path: Path
) -> None:
    site = make_site()
    client = client_of(site)
    client.pull(reference)
    mount = {"container_path": "/out", "host_path": os.fspath(tmp_path)}
    pod = client.run_pod()
    container = client.run(pod, reference, ("sh", "-c", SAYS_GOODBYE), mounts=[mount])
    client.wait_log(container, "ready")
    done = reset(site)
    assert (done.returncode, done.stderr) == (0, "")
    site.wait_death()
    assert (tmp_path / "said").read_text() == "goodbye\n"
    gone(site)


@pytest.mark.usefixtures("traceless")
def test_what_a_dead_server_left_goes_too_and_a_second_reset_finds_nothing(
    busy: server.Site,
) -> None:
    busy.kill()
    done = reset(busy, "--grace", "1")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("removed pod") == 2
    gone(busy)
    again = reset(busy)
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")


def test_what_is_not_ours_stays_and_is_named(busy: server.Site, tmp_path: Path) -> None:
    (busy.root / "notes").write_text("keep me")
    (busy.state / "notes").mkdir()
    done = reset(busy, "--grace", "1")
    assert done.returncode == 0
    busy.wait_death()
    assert f"left {busy.root}: notes\n" in done.stdout
    assert os.listdir(busy.root) == os.listdir(busy.state) == ["notes"]


@contextlib.contextmanager
def connected(name: str, path: str, folder: Path) -> Iterator[int]:
    """Have a process of this name connected to a socket; yield its pid."""
    program = folder / name
    program.write_text(
        f"#!{sys.executable}\nimport socket, sys\ns = socket.socket(socket.AF_UNIX)\n"
        "s.connect(sys.argv[1])\nprint('connected', flush=True)\nsys.stdin.read()\n"
    )
    program.chmod(0o755)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([program, path], **pipes) as process:  # type: ignore[call-overload]
        assert process.stdout.readline() == b"connected\n"
        yield process.pid
        process.stdin.close()


def test_a_connected_kubelet_keeps_everything_as_it_is(
    busy: server.Site, client_of: ClientOf, tmp_path: Path
) -> None:
    path = busy.endpoint.removeprefix("unix://")
    with connected("kubelet", path, tmp_path) as pid:
        assert sockets.clients(Path(path))[pid] == "kubelet"
        done = reset(busy)
        assert done.returncode == 1
        assert f"a kubelet is connected (pid {pid})" in done.stderr
        assert len(client_of(busy).pods()) == 2
        assert reset(busy, "--force", "--grace", "0").returncode == 0
    busy.wait_death()
    gone(busy)


@pytest.mark.usefixtures("traceless")
def test_pods_that_are_made_meanwhile_end_too(busy: server.Site, client_of: ClientOf) -> None:
    """A kubelet that was not stopped makes them until there is no server."""
    client, made = client_of(busy), []
    done = subprocess.Popen(
        [server.command(), "reset", "--force", "--grace=0", "--config", busy.home / "config.toml"],
        stdout=subprocess.PIPE,
        text=True,
    )
    with contextlib.suppress(grpc.RpcError):
        while True:
            made.append(client.run_pod().id)
    told, _ = done.communicate()
    assert made
    assert done.returncode == 0, told
    busy.wait_death()
    gone(busy)


def test_another_client_is_no_kubelet(busy: server.Site, tmp_path: Path) -> None:
    with connected("crictl", busy.endpoint.removeprefix("unix://"), tmp_path):
        assert reset(busy, "--grace", "0").returncode == 0
    busy.wait_death()
    gone(busy)


def test_a_pod_that_cannot_be_removed_keeps_the_server_and_its_records(
    make_site: MakeSite, client_of: ClientOf, tmp_path: Path
) -> None:
    plugins = cni.Fakes(tmp_path)
    plugins.install("only", ADD=cni.result("10.1.2.3/24"), DEL=cni.fail("no luck"))
    plugins.configure("only")
    site = make_site(network=faults.network(plugins))
    client = client_of(site)
    pod = client.run_pod()
    done = reset(site)
    assert done.returncode == 1
    assert f"pod {pod.id[:13]}: " in done.stderr
    assert "no luck" in done.stderr
    assert [p.id for p in client.pods()] == [pod.id]
    plugins.install("only", DEL="")
    assert reset(site).returncode == 0
    site.wait_death()
    gone(site)


def test_a_server_that_hangs_is_told_and_nothing_is_touched(busy: server.Site) -> None:
    os.kill(busy.pid, signal.SIGSTOP)
    try:
        done = reset(busy)
    finally:
        os.kill(busy.pid, signal.SIGCONT)
    assert done.returncode == 1
    assert "no server answers" in done.stderr
    assert busy.root.exists()


def test_a_grace_that_is_none_is_refused_before_anything_ends(
    busy: server.Site, client_of: ClientOf
) -> None:
    done = reset(busy, "--grace=-1")
    assert done.returncode == 2
    assert "'-1' is not a number of seconds" in done.stderr
    assert len(client_of(busy).pods()) == 2


# ---- deploy/uninstall.sh


@pytest.fixture
def installed(busy: server.Site, tmp_path: Path) -> Path:
    """Return a folder with what install.sh puts on a host, for the server that runs."""
    place = tmp_path / "host"
    for source, target in {
        DEPLOY / "cri-server.service": "etc/systemd/system/cri-server.service",
        DEPLOY / "crictl.yaml": "etc/crictl.yaml",
        busy.home / "config.toml": "etc/cri-server/config.toml",
    }.items():
        (place / target).parent.mkdir(parents=True, exist_ok=True)
        (place / target).write_bytes(source.read_bytes())
    program = place / "opt/cri-server/bin/cri-server"
    program.parent.mkdir(parents=True)
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(server.command())} "$@"\n')
    program.chmod(0o755)
    return place


def uninstall(place: Path, *arguments: str) -> Done:
    return subprocess.run(
        [DEPLOY / "uninstall.sh", *arguments],
        env={**os.environ, "DESTDIR": os.fspath(place)},
        capture_output=True,
        text=True,
    )


def files(place: Path) -> set[str]:
    return {str(p.relative_to(place)) for p in place.rglob("*") if not p.is_dir()}


@pytest.mark.usefixtures("traceless")
def test_uninstall_leaves_the_configuration_and_purge_takes_it(
    busy: server.Site, installed: Path
) -> None:
    done = uninstall(installed, "--grace", "1")
    assert (done.returncode, done.stderr) == (0, "")
    busy.wait_death()
    gone(busy)
    assert files(installed) == {"etc/cri-server/config.toml", "etc/crictl.yaml"}
    again = uninstall(installed, "--purge")
    assert (again.returncode, again.stderr) == (0, "")
    assert files(installed) == set()


def test_uninstall_stops_where_reset_refuses(
    busy: server.Site, installed: Path, tmp_path: Path
) -> None:
    before = files(installed)
    with connected("kubelet", busy.endpoint.removeprefix("unix://"), tmp_path):
        done = uninstall(installed, "--purge")
        assert done.returncode == 1
        assert "a kubelet is connected" in done.stderr
        assert files(installed) == before
        assert uninstall(installed, "--force", "--grace=0").returncode == 1  # two words
        assert uninstall(installed, "--force", "--grace", "0", "--purge").returncode == 0
    busy.wait_death()


def test_a_crictl_yaml_that_was_edited_is_not_ours_any_more(
    busy: server.Site, installed: Path
) -> None:
    (installed / "etc/crictl.yaml").write_text("runtime-endpoint: unix:///run/other.sock\n")
    assert uninstall(installed, "--purge", "--grace", "0").returncode == 0
    busy.wait_death()
    assert files(installed) == {"etc/crictl.yaml"}
