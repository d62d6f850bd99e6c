# SPDX-License-Identifier: Apache-2.0
"""A real server, a real registry, a real network: registry → server → kubelet → pod → container.

One server serves the whole session; a test that ends or breaks a server makes its own
(`make_site`). The fixture `kubelet` removes the pods that its test made, and fails when a pod
cannot be removed. CRI_ENDPOINT=unix://… holds the same tests against another runtime, which finds
the registry through CRI_CERTS_DIR; tests of what is ours alone are marked `ours` and left out then.
CRI_TESTS_CGROUP_DRIVER=systemd has the same tests with that driver, on a host whose init it is.
CRI_TESTS_HANDLER=containerd-shim-runc-v2, or another line of `tests.lab.handlers`, has them with
that handler as the default.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import residue
from tests.conftest import Marks
from tests.fakes import kubelet as kubelets
from tests.fakes import registry as evil
from tests.lab import cgroups, handlers, hostile, image, matrix, network, server
from tests.lab import registry as registries

ELSEWHERE = os.environ.get("CRI_ENDPOINT", "")
SLEEP = ("sleep", "86400")
DRIVER = os.environ.get("CRI_TESTS_CGROUP_DRIVER", "cgroupfs")
HANDLER = os.environ.get("CRI_TESTS_HANDLER", "runc")
MakeSite = Callable[..., server.Site]
ClientOf = Callable[[server.Site], kubelets.Kubelet]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if ELSEWHERE:
        items[:] = [item for item in items if item.get_closest_marker("ours") is None]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "ours: about this runtime only, not about every CRI server")


MATRIX = matrix.Matrix()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    MATRIX.add(report)


def pytest_sessionfinish() -> None:
    if page := os.environ.get("CRI_TESTS_TABLE"):
        MATRIX.write(Path(page))


# -- what stands for the whole session -------------------------------------------------------------


@pytest.fixture(scope="session")
def home(marks: Marks) -> Iterator[Path]:
    """Return a temporary folder for the registry and the configuration."""
    with tempfile.TemporaryDirectory(prefix="crit-", dir="/tmp") as folder:
        marks.add(folder)
        yield Path(folder)


@pytest.fixture(scope="session")
def net(hugetlb: None, marks: Marks) -> Iterator[network.Network]:
    """Return a pod network of this run."""
    made = network.own("crit")
    marks.add(made.name)
    yield made
    cgroups.remove(cgroups.parent(made.name, DRIVER))
    made.remove()


@pytest.fixture(scope="session")
def cgroup_parent(net: network.Network) -> str:
    """Return what the pods of this run are below, as `kubepods` of a kubelet."""
    return cgroups.parent(net.name, DRIVER)


@pytest.fixture(scope="session")
def registry(home: Path) -> Iterator[registries.Registry]:
    """Return a running registry that the server knows as `registry.test`."""
    with registries.run(home / "registry") as running:
        if "CRI_CERTS_DIR" in os.environ:
            running.hosts(Path(os.environ["CRI_CERTS_DIR"]))
        yield running


@pytest.fixture(scope="session")
def busybox() -> image.Image:
    """Return the test image (not yet in the registry)."""
    return image.busybox()


@pytest.fixture(scope="session")
def settings(
    home: Path, net: network.Network, registry: registries.Registry
) -> dict[str, dict[str, Any]]:
    """Return the configuration of a server, without its `[server]` section."""
    hosts = registry.hosts(home / "certs.d", "mirror.test")
    return {
        "network": {"conf_dir": os.fspath(net.write(home / "net.d"))},
        "images": {"registry_config_dirs": [os.fspath(hosts)]},
        "runtime": {"default": HANDLER, "cgroup_driver": DRIVER},
        **handlers.tables(home, HANDLER),
    }


@pytest.fixture(scope="session")
def site(settings: dict[str, dict[str, Any]], marks: Marks) -> Iterator[server.Site]:
    """Return the session's server, running; at its end it must have cleaned up."""
    with running_site(settings, marks) as running:
        yield running


@pytest.fixture(scope="session")
def endpoint(request: pytest.FixtureRequest) -> str:
    """Return the socket that the tests talk to."""
    if ELSEWHERE:
        return ELSEWHERE
    running: server.Site = request.getfixturevalue("site")
    return running.endpoint


@pytest.fixture(scope="session")
def reference(registry: registries.Registry, busybox: image.Image) -> str:
    """Return the reference of the test image in the registry."""
    return registry.push(busybox, "test/busybox")


@pytest.fixture(scope="session")
def pulled(endpoint: str, reference: str) -> str:
    """Return the reference of the test image, pulled into the session's server."""
    with kubelets.Kubelet(endpoint) as client:
        client.pull(reference)
    return reference


# -- what each test gets ---------------------------------------------------------------------------


@pytest.fixture
def kubelet(endpoint: str, cgroup_parent: str) -> Iterator[kubelets.Kubelet]:
    """Return a client of the session's server; the pods that it makes go with it."""
    prefix = "test" + os.urandom(4).hex()
    with kubelets.Kubelet(endpoint, cgroup_parent=cgroup_parent, prefix=prefix) as client:
        yield client
        client.remove_own_pods()


@pytest.fixture
def pod(kubelet: kubelets.Kubelet, pulled: str) -> kubelets.Pod:
    """Return a running sandbox on the pod network."""
    return kubelet.run_pod()


@pytest.fixture
def container(kubelet: kubelets.Kubelet, pod: kubelets.Pod, pulled: str) -> str:
    """Return the id of a running container in `pod` that sleeps."""
    return kubelet.run(pod, pulled, SLEEP)


@pytest.fixture
def attack(
    kubelet: kubelets.Kubelet, site: server.Site, registry: registries.Registry, tmp_path: Path
) -> Iterator[hostile.Attack]:
    """Return an attack on the session's server, which must have done no harm at its end."""
    made = hostile.Attack(kubelet, site, registry, tmp_path, [image.busybox_layer()])
    yield made
    made.check()


@pytest.fixture
def evil_registry(home: Path, settings: dict[str, Any]) -> Iterator[evil.Registry]:
    """Return a registry that does as it is told, which servers with `settings` call `evil.test`."""
    with evil.run() as there:
        folder = home / "certs.d" / "evil.test"
        folder.mkdir(exist_ok=True)
        table = f'[host."http://{there.address}"]\ncapabilities = ["pull", "resolve"]\n'
        (folder / "hosts.toml").write_text(f'server = "http://{there.address}"\n\n{table}')
        yield there


@pytest.fixture
def traceless(
    request: pytest.FixtureRequest, reference: str, net: network.Network, marks: Marks
) -> Iterator[None]:
    """Fail a test after which anything is left of its pods or its own servers, anywhere on the
    host.
    """
    site: server.Site | None = None if ELSEWHERE else request.getfixturevalue("site")
    before, known = residue.take(), set(marks.names)
    yield
    if site is not None:
        marks.add_ids(site.log)
    own = (marks.names - known) | {net.name}
    assert residue.left(before, marks=own, alone=False) == []


@pytest.fixture
def make_site(settings: dict[str, dict[str, Any]], marks: Marks) -> Iterator[MakeSite]:
    """Return a function that starts a server of one's own; keyword arguments are further config
    tables.
    """
    with contextlib.ExitStack() as stack:

        def make(**tables: dict[str, Any]) -> server.Site:
            merged = {**settings}
            for name, table in tables.items():
                merged[name] = {**merged.get(name, {}), **table}
            return stack.enter_context(running_site(merged, marks))

        yield make


@pytest.fixture
def client_of(cgroup_parent: str) -> Iterator[ClientOf]:
    """Return a function that gives a client for a server of `make_site`."""
    with contextlib.ExitStack() as stack:

        def make(of: server.Site) -> kubelets.Kubelet:
            client = kubelets.Kubelet(of.endpoint, cgroup_parent=cgroup_parent, prefix="own")
            return stack.enter_context(client)

        yield make


@contextlib.contextmanager
def running_site(settings: dict[str, dict[str, Any]], marks: Marks) -> Iterator[server.Site]:
    """Have a server running for the block; at its end it must have cleaned up."""
    with server.site(settings) as made, contextlib.ExitStack() as after:
        marks.add(os.fspath(made.home))
        made.start()
        after.callback(_keep_log, made)
        after.callback(marks.add_ids, made.log)
        after.callback(_empty, made)
        yield made


def _empty(site: server.Site) -> None:
    """Remove all pods, end the server, and see that its folders hold none."""
    if site.process is None:
        site.start()
    with kubelets.Kubelet(site.endpoint) as client:
        for pod in client.pods():
            client.remove_pod(pod.id)
    assert site.stop() == 0, site.tail()
    assert residue.of_folders(site.root, site.state) == []


def _keep_log(site: server.Site) -> None:
    """Copy the server's log to $CRI_TESTS_LOGS, when that is set."""
    if folder := os.environ.get("CRI_TESTS_LOGS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        shutil.copy(site.log, Path(folder, f"{site.home.name}.log"))
