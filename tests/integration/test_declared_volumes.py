# SPDX-License-Identifier: Apache-2.0
"""The VOLUMEs that an image declares: writable folders of each container's own."""

import os
from pathlib import Path
from typing import Any

import pytest

from cri_server.pb import api_pb2 as api
from tests.fakes.kubelet import Kubelet, Pod, refusal
from tests.lab import image, server, waiting
from tests.lab.registry import Registry

pytestmark = pytest.mark.needs("root", "netns", "overlay", "runc", "docker-registry", "busybox")

SLEEP = ("sleep", "86400")
CANARY = Path("/tmp/volume-canary")
CONTENT = [
    image.Entry(name="data", kind="dir", mode=0o2770, uid=1000, gid=50000, mtime=1_000_000_000),
    image.Entry(name="data/file", data=b"from the image\n", mode=0o640, uid=1000, gid=33),
    image.Entry(name="data/program", data=b"#!/bin/sh\n", mode=0o4755),
    image.Entry(name="data/noted", xattrs={"user.note": "kept"}),
    image.Entry(name="data/out", kind="symlink", to=str(CANARY)),
    image.Entry(name="led", kind="symlink", to="../../../../../../" + str(CANARY)),
    image.Entry(name="kernel", kind="symlink", to="/proc/1/root/tmp"),
    image.Entry(name="plain", data=b""),
]


def sh(kubelet: Kubelet, container: str, script: str) -> str:
    done = kubelet.exec_sync(container, ["sh", "-c", f"exec 2>&1; {script}"])
    return done.stdout.decode()


def pull(kubelet: Kubelet, registry: Registry, *volumes: str, **config: Any) -> str:
    """Pull an image that declares these volumes; return its id."""
    made = image.busybox(CONTENT, Volumes={v: {} for v in volumes}, **config)
    return kubelet.pull(registry.push(made, "volumes/declared", tag=made.digest[-12:]))


def readonly_root() -> api.LinuxContainerConfig:
    context = api.LinuxContainerSecurityContext(readonly_rootfs=True)
    return api.LinuxContainerConfig(security_context=context)


def test_a_volume_has_the_images_content_and_is_writable_in_a_read_only_root(
    kubelet: Kubelet, pod: Pod, registry: Registry
) -> None:
    image_id = pull(kubelet, registry, "/data", "/var/new", WorkingDir="/data/app")
    container = kubelet.run(pod, image_id, SLEEP, linux=readonly_root())
    stat = "stat -c '%n %a %u %g %Y' /data; stat -c '%n %a %u %g' /data/file /data/program"
    assert sh(kubelet, container, f"pwd; {stat}; cat /data/file; readlink /data/out").split() == [
        *("/data/app", "/data", "2770", "1000", "50000"),
        # The working directory was made in it.
        sh(kubelet, container, "stat -c %Y /data").strip(),
        *("/data/file", "640", "1000", "33", "/data/program", "4755", "0", "0"),
        *("from", "the", "image", str(CANARY)),
    ]
    script = "echo new >/data/new && echo x >>/data/file && touch /var/new/x && touch /root/x"
    assert "Read-only" in sh(kubelet, container, script)
    assert sh(kubelet, container, "cat /data/new /data/file; ls /var/new") == (
        "new\nfrom the image\nx\nx\n"
    )
    kinds = sh(kubelet, container, "grep -c -E '^overlay [^ ]*(/data|/var/new) ' /proc/mounts")
    assert kinds.strip() == "0"


@pytest.mark.ours  # containerd's is root's, and nobody else can use it
def test_a_volume_that_the_image_has_no_folder_for_is_the_users(
    kubelet: Kubelet, pod: Pod, registry: Registry
) -> None:
    image_id = pull(kubelet, registry, "/new/volume", User="1000:50")
    container = kubelet.run(pod, image_id, SLEEP)
    found = sh(kubelet, container, "touch /new/volume/x && stat -c '%u %g %a' /new/volume")
    assert found == "1000 50 755\n"


@pytest.mark.ours
def test_a_volume_is_the_containers_own_and_goes_with_it(
    kubelet: Kubelet, pod: Pod, registry: Registry, site: server.Site
) -> None:
    image_id = pull(kubelet, registry, "/data")
    one, two = (kubelet.run(pod, image_id, SLEEP, name=n) for n in ("one", "two"))
    sh(kubelet, one, "head -c 3000000 /dev/zero >/data/big; sync")
    assert sh(kubelet, two, "ls /data/big").startswith("ls: ")
    folder = site.root / "writable" / one
    assert (folder / "volumes/0/big").stat().st_size == 3_000_000
    assert os.getxattr(folder / "volumes/0/noted", "user.note") == b"kept"

    def used() -> int:
        request = api.ContainerStatsRequest(container_id=one)
        return kubelet.runtime.ContainerStats(request).stats.writable_layer.used_bytes.value

    waiting.until(lambda: used() >= 3_000_000, "the volume is counted", seconds=25)
    kubelet.remove(one)
    assert not folder.exists()


def test_a_requested_mount_is_not_covered_and_gets_nothing_of_the_image(
    kubelet: Kubelet, pod: Pod, registry: Registry, tmp_path: Path
) -> None:
    image_id = pull(kubelet, registry, "/data", "/srv/db/files", "/etc/hosts", "/dev/shm")
    at, above, below = (tmp_path / n for n in ("at", "above", "below"))
    for folder in (at, above, below):
        folder.mkdir()
    (above / "files").mkdir()
    wanted = [
        api.Mount(container_path="/data", host_path=str(at)),
        api.Mount(container_path="/srv/db", host_path=str(above)),
    ]
    container = kubelet.run(pod, image_id, SLEEP, name="at", mounts=wanted)
    sh(kubelet, container, "touch /srv/db/files/kept")
    assert os.listdir(at) == []
    assert os.listdir(above / "files") == ["kept"]
    inner = [api.Mount(container_path="/data/deep/inner", host_path=str(below))]
    container = kubelet.run(pod, image_id, SLEEP, name="in", mounts=inner)
    assert sh(kubelet, container, "touch /data/deep/inner/x; cat /data/file") == "from the image\n"
    assert os.listdir(below) == ["x"]


@pytest.mark.parametrize("path", ["/led", "/data", "/led/../data"])
def test_a_hostile_volume_gets_nothing_of_the_host(
    kubelet: Kubelet, pod: Pod, registry: Registry, path: str
) -> None:
    CANARY.mkdir(exist_ok=True)
    (CANARY / "secret").write_text("known to the host alone")
    try:
        container = kubelet.run(pod, pull(kubelet, registry, path), SLEEP)
        found = sh(kubelet, container, f"cat {path}/secret {path}/out/secret; echo x >{path}/new")
        assert "known to the host" not in found
        assert os.listdir(CANARY) == ["secret"]
        assert (CANARY / "secret").read_text() == "known to the host alone"
    finally:
        (CANARY / "secret").unlink()
        CANARY.rmdir()


def test_a_volume_below_the_kernels_trees_is_left_to_them(
    kubelet: Kubelet, pod: Pod, registry: Registry
) -> None:
    image_id = pull(kubelet, registry, "/kernel", "/proc/sys", "/dev/volume", "/sys")
    container = kubelet.run(pod, image_id, SLEEP)
    assert sh(kubelet, container, "grep -c -E 'volumes/|/proc/sys ' /proc/mounts").strip() == "0"


def test_a_volume_that_is_no_folder_is_refused_by_name(
    kubelet: Kubelet, pod: Pod, registry: Registry
) -> None:
    config = kubelet.container_config(pull(kubelet, registry, "/plain"), SLEEP)
    _, text = refusal(lambda: kubelet.create(pod, config))
    assert "'/plain' in the image is not a folder" in text
