# SPDX-License-Identifier: Apache-2.0
"""Devices of the host in real containers (CRI Device): those asked for, with those rights."""

import os
import stat
from pathlib import Path

import grpc
import pytest

from cri_server.pb import api_pb2 as api
from tests.fakes.kubelet import Kubelet, Pod, refusal

pytestmark = pytest.mark.needs("root", "netns", "overlay", "runc", "docker-registry", "busybox")
SLEEP = ("sleep", "86400")


def device(host: Path | str, path: str, permissions: str = "rwm") -> api.Device:
    return api.Device(host_path=str(host), container_path=path, permissions=permissions)


def sh(kubelet: Kubelet, container: str, script: str) -> str:
    done = kubelet.exec_sync(container, ["sh", "-c", f"exec 2>&1; {script}"])
    return done.stdout.decode()


def allowed(kubelet: Kubelet, container: str, path: str, how: str) -> bool:
    """Say whether the device cgroup lets a container open a node; there may be no such driver."""
    return "not permitted" not in sh(kubelet, container, f"(exec 3{how}{path})")


@pytest.fixture
def board(tmp_path: Path) -> Path:
    """Return a folder of devices that no container has by itself: of fuse and of loops."""
    folder = tmp_path / "board"
    (folder / "sub").mkdir(parents=True)
    os.mknod(folder / "fuse", stat.S_IFCHR | 0o640, os.makedev(10, 229))
    os.mknod(folder / "sub/control", stat.S_IFCHR | 0o600, os.makedev(10, 237))
    (folder / "readme").touch()
    (folder / "link").symlink_to("fuse")
    return folder


def test_a_folder_brings_all_devices_below_it_and_nothing_else(
    kubelet: Kubelet, pod: Pod, pulled: str, board: Path
) -> None:
    container = kubelet.run(pod, pulled, SLEEP, devices=[device(board, "/dev/board", "r")])
    assert sh(kubelet, container, "cd /dev/board; stat -c '%n %a %t %T' fuse sub/control; ls") == (
        "fuse 640 a e5\nsub/control 600 a ed\nfuse\nsub\n"
    )
    for name in ("fuse", "sub/control"):
        assert allowed(kubelet, container, f"/dev/board/{name}", "<")
        assert not allowed(kubelet, container, f"/dev/board/{name}", "<>")


def test_a_link_to_a_device_is_the_device(
    kubelet: Kubelet, pod: Pod, pulled: str, board: Path
) -> None:
    container = kubelet.run(pod, pulled, SLEEP, devices=[device(board / "link", "/dev/k")])
    assert sh(kubelet, container, "stat -c '%F %t %T' /dev/k") == "character special file a e5\n"
    assert allowed(kubelet, container, "/dev/k", "<>")


def test_permissions_are_those_asked_for(
    kubelet: Kubelet, pod: Pod, pulled: str, board: Path
) -> None:
    wanted = [device(board / "fuse", "/dev/w", "w")]
    container = kubelet.run(pod, pulled, SLEEP, devices=wanted)
    assert not allowed(kubelet, container, "/dev/w", "<")
    assert allowed(kubelet, container, "/dev/w", ">>")
    other = kubelet.run(pod, pulled, SLEEP, name="none")
    assert sh(kubelet, other, "mknod /dev/k c 10 229 && echo made") == "made\n"
    assert not allowed(kubelet, other, "/dev/k", "<")


@pytest.mark.parametrize(
    ("host", "permissions", "word"),
    [
        ("/dev/never-there", "rwm", "/dev/never-there"),
        ("/etc/passwd", "rwm", "is not a device"),
        ("/dev/null", "", "permissions"),
        ("/dev/null", "rwx", "permissions"),
        ("dev/null", "r", "host_path"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    kubelet: Kubelet, pod: Pod, pulled: str, host: str, permissions: str, word: str
) -> None:
    wanted = [device(host, "/dev/x", permissions)]
    config = kubelet.container_config(pulled, SLEEP, devices=wanted)
    code, text = refusal(lambda: kubelet.create(pod, config))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert word in text
    assert not kubelet.containers(pod_sandbox_id=pod.id)
