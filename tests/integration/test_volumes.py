# SPDX-License-Identifier: Apache-2.0
"""Images as volumes (CRI Mount.image): what a container sees of one, what it never sees, and how
long it stays.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from cri_server.pb import api_pb2 as api
from shim import mounts
from tests.fakes.kubelet import Kubelet, Pod, refusal
from tests.lab import image, server
from tests.lab.registry import Registry

pytestmark = pytest.mark.needs("root", "netns", "overlay", "runc", "docker-registry", "busybox")

SLEEP = ("sleep", "86400")
LAYERS = (
    [
        image.Entry(name="both", data=b"below\n"),
        image.Entry(name="gone", data=b"gone\n"),
        image.Entry(name="folder", kind="dir", mode=0o755),
        image.Entry(name="folder/inner", data=b"inner\n"),
        image.Entry(name="tool", data=b"#!/bin/sh\necho ran as $(id -u)\n", mode=0o4755),
    ],
    [
        image.Entry(name="both", data=b"above\n"),
        image.Entry(name=".wh.gone"),
        image.Entry(name="inside", kind="symlink", to="/folder"),
        image.Entry(name="absolute", kind="symlink", to="/tmp"),
        image.Entry(name="climbing", kind="symlink", to="../../../../../../../../../tmp"),
        image.Entry(name="magic", kind="symlink", to="/proc/1/root"),
        image.Entry(name="loop", kind="symlink", to="loop"),
        image.Entry(name="proc", kind="dir", mode=0o755),
        image.Entry(name="proc/1", kind="dir", mode=0o755),
        image.Entry(name="proc/1/root", kind="symlink", to="/tmp"),
    ],
)


def push(registry: Registry, name: str, *layers: list[image.Entry], **config: Any) -> str:
    return registry.push(image.image([image.tar(e) for e in layers], config), f"volumes/{name}")


def volume(reference: str, path: str = "/data", **fields: Any) -> api.Mount:
    """Return a mount as the kubelet asks for it."""
    spec = api.ImageSpec(image=reference, user_specified_image="as the author wrote it")
    return api.Mount(container_path=path, readonly=True, image=spec, **fields)


@pytest.fixture(scope="session")
def data(endpoint: str, registry: Registry) -> str:
    """Return the id of a pulled image with two layers and some traps in it."""
    with Kubelet(endpoint) as client:
        return client.pull(push(registry, "data", *LAYERS))


def sh(kubelet: Kubelet, container: str, script: str) -> tuple[int, str]:
    done = kubelet.exec_sync(container, ["sh", "-c", f"exec 2>&1; {script}"])
    return done.exit_code, done.stdout.decode()


def mounted(site: server.Site) -> list[str]:
    """Return the image volumes that are mounted on the host."""
    return [m for m in mounts.mounts_below(str(site.state)) if "/images/" in m]


def layers(site: server.Site) -> int:
    return len(list((site.root / "layers").iterdir()))


# -- what is seen ----------------------------------------------------------------------------------


def test_an_image_is_seen_as_its_layers_make_it(
    kubelet: Kubelet, pod: Pod, pulled: str, data: str
) -> None:
    container = kubelet.run(pod, pulled, SLEEP, mounts=[volume(data)])
    assert sh(kubelet, container, "cat /data/both; ls /data; cat /data/folder/inner") == (
        0,
        "above\nabsolute\nboth\nclimbing\nfolder\ninside\nloop\nmagic\nproc\ntool\ninner\n",
    )


def test_an_image_volume_is_read_only_and_gives_no_rights_away(
    kubelet: Kubelet, pod: Pod, pulled: str, data: str
) -> None:
    container = kubelet.run(pod, pulled, SLEEP, mounts=[volume(data)])
    _, text = sh(kubelet, container, "touch /data/x /data/folder/x; grep ' /data ' /proc/mounts")
    assert text.count("Read-only file system") == 2
    options = set(text.splitlines()[-1].split()[3].split(","))
    assert {"ro", "nosuid", "nodev"} <= options
    assert "noexec" not in options
    assert sh(kubelet, container, "/data/tool") == (0, "ran as 0\n")


@pytest.mark.parametrize("count", [0, 1])
def test_an_image_of_few_layers_is_a_volume_too(
    kubelet: Kubelet, pod: Pod, pulled: str, registry: Registry, count: int
) -> None:
    whiteout = [image.Entry(name=".wh.never"), image.Entry(name="file", data=b"alone\n")]
    reference = push(registry, f"few-{count}", *[whiteout][:count], Labels={"n": str(count)})
    image_id = kubelet.pull(reference)
    container = kubelet.run(pod, pulled, SLEEP, mounts=[volume(image_id)])
    assert sh(kubelet, container, "ls -A /data") == (0, "file\n" if count else "")
    assert "Read-only" in sh(kubelet, container, "touch /data/x")[1]


def test_a_status_tells_the_id_of_the_image(
    kubelet: Kubelet, pod: Pod, pulled: str, data: str, registry: Registry
) -> None:
    by_name = "registry.test/volumes/data:latest"
    container = kubelet.run(pod, pulled, SLEEP, mounts=[volume(by_name, image_sub_path="folder")])
    (seen,) = kubelet.status(container).mounts
    assert seen == api.Mount(
        container_path="/data",
        readonly=True,
        image=api.ImageSpec(
            image=data, image_ref=data, user_specified_image="as the author wrote it"
        ),
        image_sub_path="folder",
    )


# -- sub paths -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["folder", "folder/.", "inside"])
def test_a_sub_path_is_a_folder_of_the_image(
    kubelet: Kubelet, pod: Pod, pulled: str, data: str, path: str
) -> None:
    container = kubelet.run(pod, pulled, SLEEP, mounts=[volume(data, image_sub_path=path)])
    assert sh(kubelet, container, "ls /data; cat /data/inner; touch /data/x")[1].startswith(
        "inner\ninner\ntouch: /data/x: Read-only file system"
    )


@pytest.mark.parametrize(
    "path",
    ["absolute", "climbing", "magic", "magic/canary", "loop", "both", "gone", "inside/missing"],
)
def test_a_sub_path_never_leaves_the_image(
    kubelet: Kubelet, pod: Pod, pulled: str, data: str, path: str, tmp_path: Path
) -> None:
    Path("/tmp/canary").mkdir(exist_ok=True)
    config = kubelet.container_config(pulled, SLEEP, mounts=[volume(data, image_sub_path=path)])
    try:
        _, text = refusal(lambda: kubelet.create(pod, config))
    finally:
        Path("/tmp/canary").rmdir()
    assert text.startswith("ImageVolumeMountFailed: mount '/data': image_sub_path")
    assert not kubelet.containers(pod_sandbox_id=pod.id)


def test_every_refusal_begins_as_the_kubelet_wants_it(
    kubelet: Kubelet, pod: Pod, pulled: str, data: str
) -> None:
    missing = volume("registry.test/never/pulled:v1")
    writable = volume(data)
    writable.readonly = False
    codes = {}
    for name, mount in {
        "missing": missing,
        "writable": writable,
        "beside a path": volume(data, host_path="/tmp"),
        "relative": volume(data, path="data"),
        "on a file": volume(data, path="/bin/busybox"),
        "below a file": volume(data, path="/bin/busybox/below"),
    }.items():
        config = kubelet.container_config(pulled, SLEEP, mounts=[mount])
        codes[name], text = refusal(lambda: kubelet.create(pod, config))  # noqa: B023
        assert text.startswith("ImageVolumeMountFailed: mount "), text
    assert codes.pop("missing") is grpc.StatusCode.NOT_FOUND
    assert set(codes.values()) == {grpc.StatusCode.INVALID_ARGUMENT}


# -- how long --------------------------------------------------------------------------------------


@pytest.mark.ours
def test_an_image_is_mounted_once_for_a_pod_and_until_it_stops(
    kubelet: Kubelet, pulled: str, data: str, site: server.Site
) -> None:
    pods = [kubelet.run_pod() for _ in range(2)]
    for pod in pods:
        for name in ("one", "two"):
            kubelet.run(pod, pulled, SLEEP, name=name, mounts=[volume(data)])
    assert len([m for m in mounted(site) if any(p.id in m for p in pods)]) == 2
    kubelet.stop_pod(pods[0].id)
    left = [m for m in mounted(site) if any(p.id in m for p in pods)]
    assert [pods[1].id in m for m in left] == [True]
    kubelet.remove_pod(pods[1].id)
    kubelet.remove_pod(pods[0].id)
    assert not [m for m in mounted(site) if any(p.id in m for p in pods)]


@pytest.mark.ours
def test_a_mounted_image_survives_its_removal_and_restarts(
    make_site: Callable[..., server.Site],
    client_of: Callable[[server.Site], Kubelet],
    registry: Registry,
    reference: str,
) -> None:
    site = make_site()
    kubelet = client_of(site)
    kubelet.pull(reference)
    before = layers(site)
    image_id = kubelet.pull(push(registry, "lasting", *LAYERS))
    pod = kubelet.run_pod()
    first = kubelet.run(pod, reference, SLEEP, name="first", mounts=[volume(image_id)])
    kubelet.remove_image(image_id)
    site.kill()
    site.start()
    assert kubelet.image_status(image_id) is None
    assert sh(kubelet, first, "cat /data/both /data/folder/inner") == (0, "above\ninner\n")
    kubelet.remove(first)
    kubelet.remove_image("registry.test/never:there")  # collects, as each RemoveImage does
    kubelet.pull(push(registry, "lasting", *LAYERS))
    again = kubelet.run(pod, reference, SLEEP, name="again", mounts=[volume(image_id)])
    assert sh(kubelet, again, "cat /data/both /data/folder/inner") == (0, "above\ninner\n")
    kubelet.remove_pod(pod.id)
    kubelet.remove_image(image_id)
    assert layers(site) == before
    assert mounted(site) == []


@pytest.mark.ours
def test_what_a_killed_server_left_of_a_volume_is_swept(
    make_site: Callable[..., server.Site],
    client_of: Callable[[server.Site], Kubelet],
    registry: Registry,
    reference: str,
) -> None:
    site = make_site()
    kubelet = client_of(site)
    kubelet.pull(reference)
    image_id = kubelet.pull(push(registry, "swept", *LAYERS))
    pod = kubelet.run_pod()
    kubelet.run(pod, reference, SLEEP, mounts=[volume(image_id)])
    site.kill()
    (site.root / "pods" / f"{pod.id}.json").write_text("{")  # its record is lost
    site.start()
    (site.root / "pods" / f"{pod.id}.broken").unlink()
    assert kubelet.pods() == []
    assert mounted(site) == []
