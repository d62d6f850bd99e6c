# SPDX-License-Identifier: Apache-2.0
"""Mounts of the host in real containers: propagation, read-only, recursive or not, sources."""

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from cri_server.pb import api_pb2 as api
from shim import linux
from tests.fakes.kubelet import Kubelet, Pod, refusal

pytestmark = pytest.mark.needs("root", "netns", "overlay", "runc", "docker-registry", "busybox")
SLEEP = ("sleep", "86400")
PRIVATE, TO_CONTAINER, BOTH = (
    api.PROPAGATION_PRIVATE,
    api.PROPAGATION_HOST_TO_CONTAINER,
    api.PROPAGATION_BIDIRECTIONAL,
)


@contextlib.contextmanager
def tmpfs(folder: Path) -> Iterator[Path]:
    folder.mkdir(exist_ok=True)
    linux.mount("none", folder, "tmpfs", 0, "size=64k")
    try:
        yield folder
    finally:
        linux.umount2(folder, linux.MNT_DETACH)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """Return a mount of its own, private, with a mount `inner` in it."""
    with tmpfs(tmp_path / "place") as folder:
        linux.mount("none", folder, "", linux.MS_PRIVATE)
        with tmpfs(folder / "inner"):
            yield folder


def share(folder: Path, kind: int = linux.MS_SHARED) -> None:
    linux.mount("none", folder, "", kind)


def sh(kubelet: Kubelet, container: str, script: str) -> str:
    done = kubelet.exec_sync(container, ["sh", "-c", f"exec 2>&1; {script}"])
    return done.stdout.decode()


def mount(folder: Path, **fields: object) -> api.Mount:
    return api.Mount(container_path="/data", host_path=str(folder), **fields)  # type: ignore[arg-type]


def privileged(kubelet: Kubelet) -> Pod:
    config = kubelet.pod_config()
    config.linux.security_context.privileged = True
    return kubelet.run_pod(config)


def context(*, privileged: bool) -> api.LinuxContainerConfig:
    security = api.LinuxContainerSecurityContext(privileged=privileged)
    security.namespace_options.pid = api.CONTAINER
    return api.LinuxContainerConfig(security_context=security)


@pytest.mark.parametrize(
    ("kind", "shown", "told"),
    [(PRIVATE, False, False), (TO_CONTAINER, True, False), (BOTH, True, True)],
)
def test_mounts_propagate_as_asked(
    kubelet: Kubelet, pulled: str, place: Path, kind: int, shown: bool, told: bool
) -> None:
    share(place)
    pod = privileged(kubelet)
    container = kubelet.run(
        pod,
        pulled,
        SLEEP,
        mounts=[mount(place, propagation=kind)],
        linux=context(privileged=True),
    )
    (place / "inside").mkdir()
    with tmpfs(place / "later"):
        (place / "later/file").touch()
        assert (sh(kubelet, container, "ls /data/later") == "file\n") is shown
        sh(kubelet, container, "mount -t tmpfs x /data/inside && touch /data/inside/file")
        assert (place / "inside/file").exists() is told
    if told:
        linux.umount2(place / "inside", linux.MNT_DETACH)


@pytest.mark.parametrize("kind", [TO_CONTAINER, BOTH])
def test_what_cannot_propagate_is_refused_by_name(
    kubelet: Kubelet, pod: Pod, pulled: str, place: Path, kind: int
) -> None:
    config = kubelet.container_config(pulled, SLEEP, mounts=[mount(place, propagation=kind)])
    code, text = refusal(lambda: kubelet.create(pod, config))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert str(place) in text
    assert "not shared" in text
    assert not kubelet.containers(pod_sandbox_id=pod.id)


def test_a_slave_propagates_to_the_container_and_not_back(
    kubelet: Kubelet, pod: Pod, pulled: str, place: Path
) -> None:
    share(place)
    share(place, linux.MS_SLAVE)
    # A mount that is shared and nobody's slave loses its group, so it has a peer before.
    peer = place.parent / "peer"
    peer.mkdir()
    share(place)
    linux.mount(os.fspath(place), peer, "", linux.MS_BIND)
    share(peer, linux.MS_SLAVE)
    try:
        config = kubelet.container_config(pulled, SLEEP, mounts=[mount(peer, propagation=BOTH)])
        assert "not shared" in refusal(lambda: kubelet.create(pod, config))[1]
        container = kubelet.run(pod, pulled, SLEEP, mounts=[mount(peer, propagation=TO_CONTAINER)])
        with tmpfs(place / "later"):
            (place / "later/file").touch()
            assert sh(kubelet, container, "ls /data/later") == "file\n"
    finally:
        linux.umount2(peer, linux.MNT_DETACH)


def test_read_only_is_for_the_mount_alone_unless_it_is_recursive(
    kubelet: Kubelet, pod: Pod, pulled: str, place: Path
) -> None:
    script = "touch /data/x; touch /data/inner/x"
    container = kubelet.run(pod, pulled, SLEEP, name="one", mounts=[mount(place, readonly=True)])
    assert sh(kubelet, container, script) == "touch: /data/x: Read-only file system\n"
    assert (place / "inner/x").exists()
    wanted = mount(place, readonly=True, recursive_read_only=True)
    container = kubelet.run(pod, pulled, SLEEP, name="all", mounts=[wanted])
    assert sh(kubelet, container, script).count("Read-only file system") == 2
    (seen,) = kubelet.status(container).mounts
    assert seen == wanted


@pytest.mark.parametrize(
    "fields",
    [
        {"readonly": False},
        {"readonly": True, "propagation": TO_CONTAINER},
        {"readonly": True, "propagation": BOTH},
    ],
)
def test_recursive_read_only_that_cannot_be_is_refused(
    kubelet: Kubelet, pod: Pod, pulled: str, place: Path, fields: dict[str, int]
) -> None:
    share(place)
    wanted = mount(place, recursive_read_only=True, **fields)
    config = kubelet.container_config(pulled, SLEEP, mounts=[wanted])
    code, text = refusal(lambda: kubelet.create(pod, config))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "recursive_read_only" in text


def test_a_missing_source_is_a_folder_that_anybody_may_enter(
    kubelet: Kubelet, pod: Pod, pulled: str, tmp_path: Path
) -> None:
    before = os.umask(0o077)
    try:
        container = kubelet.run(pod, pulled, SLEEP, mounts=[mount(tmp_path / "a/b")])
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a/b").stat().st_mode) == 0o755
    assert sh(kubelet, container, "touch /data/x; ls /data") == "x\n"


def test_a_source_is_what_its_links_lead_to(
    kubelet: Kubelet, pod: Pod, pulled: str, tmp_path: Path
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real/file").write_text("text\n")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "dangling").symlink_to("nowhere")
    wanted = [
        mount(tmp_path / "link"),
        api.Mount(container_path="/etc/one", host_path=str(tmp_path / "link/file"), readonly=True),
    ]
    container = kubelet.run(pod, pulled, SLEEP, mounts=wanted)
    assert sh(kubelet, container, "cat /data/file /etc/one") == "text\ntext\n"
    assert [m.host_path for m in kubelet.status(container).mounts] == [m.host_path for m in wanted]
    config = kubelet.container_config(
        pulled, SLEEP, name="none", mounts=[mount(tmp_path / "dangling")]
    )
    assert "dangling" in refusal(lambda: kubelet.create(pod, config))[1]
    assert not (tmp_path / "nowhere").exists()


def test_mounts_are_made_parents_first_whatever_their_order(
    kubelet: Kubelet, pod: Pod, pulled: str, tmp_path: Path
) -> None:
    for name in ("outer", "inner", "shm"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    wanted = [
        api.Mount(container_path="/data/x/inner", host_path=str(tmp_path / "inner")),
        api.Mount(container_path="/dev/shm", host_path=str(tmp_path / "shm")),
        api.Mount(container_path="/data", host_path=str(tmp_path / "outer")),
    ]
    container = kubelet.run(pod, pulled, SLEEP, mounts=wanted)
    assert sh(kubelet, container, "ls /data /data/x/inner /dev/shm").split() == [
        *("/data:", "outer", "x", "/data/x/inner:", "inner", "/dev/shm:", "shm"),
    ]
