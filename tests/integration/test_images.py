# SPDX-License-Identifier: Apache-2.0
"""Images through the socket: pull, status, list, remove, and their consistency (CRI
ImageService)."""

import concurrent.futures
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from cri_server.pb import api_pb2 as api
from tests.fakes import registry as evil
from tests.fakes.kubelet import Kubelet, refusal
from tests.lab import image, registry, server, waiting

pytestmark = pytest.mark.needs("root", "overlay", "docker-registry")


def tiny(name: str, **config: object) -> image.Image:
    """Make an image of one file that no other image has."""
    entry = image.Entry(name="file", data=name.encode())
    return image.image([image.tar([entry])], {"Cmd": ["/file"], **config})


def listed(kubelet: Kubelet, prefix: str) -> list[api.Image]:
    """Return the images that have a name with `prefix`."""
    images = kubelet.images.ListImages(api.ListImagesRequest()).images
    return [i for i in images if any(t.startswith(prefix) for t in (*i.repo_tags, *i.repo_digests))]


def test_pull_by_tag_tells_the_id(kubelet: Kubelet, registry: registry.Registry) -> None:
    made = tiny("by-tag")
    reference = registry.push(made, "images/by-tag", tag="v1")
    assert kubelet.pull(reference) == made.id
    found = kubelet.image_status(reference)
    assert found is not None
    assert found.id == made.id
    assert list(found.repo_tags) == [reference]
    assert list(found.repo_digests) == [f"registry.test/images/by-tag@{made.digest}"]
    assert found.size > 0
    kubelet.remove_image(reference)


def test_pull_by_digest(kubelet: Kubelet, registry: registry.Registry) -> None:
    made = tiny("by-digest")
    registry.push(made, "images/by-digest")
    reference = f"registry.test/images/by-digest@{made.digest}"
    assert kubelet.pull(reference) == made.id
    found = kubelet.image_status(reference)
    assert found is not None
    assert list(found.repo_tags) == []
    assert list(found.repo_digests) == [reference]
    kubelet.remove_image(reference)


def test_no_tag_is_latest(kubelet: Kubelet, registry: registry.Registry) -> None:
    made = tiny("no-tag")
    registry.push(made, "images/no-tag")
    assert kubelet.pull("registry.test/images/no-tag") == made.id
    found = kubelet.image_status("registry.test/images/no-tag:latest")
    assert found is not None
    assert list(found.repo_tags) == ["registry.test/images/no-tag:latest"]
    kubelet.remove_image(made.id)


def test_an_image_is_found_by_every_name_and_by_its_id(
    kubelet: Kubelet, registry: registry.Registry
) -> None:
    made = tiny("names")
    reference = registry.push(made, "images/names", tag="v1")
    kubelet.pull(reference)
    names = [reference, made.id, made.id.removeprefix("sha256:"), made.id[7:25]]
    names.append(f"registry.test/images/names@{made.digest}")
    for name in names:
        found = kubelet.image_status(name)
        assert found is not None, name
        assert found.id == made.id
    kubelet.remove_image(reference)


def test_an_unknown_image_is_not_an_error(kubelet: Kubelet) -> None:
    assert kubelet.image_status("registry.test/images/unknown:v1") is None
    assert kubelet.image_status("sha256:" + "0" * 64) is None
    kubelet.remove_image("registry.test/images/unknown:v1")


def test_three_tags_of_one_image_are_one_entry(
    kubelet: Kubelet, registry: registry.Registry
) -> None:
    made = tiny("tags")
    tags = [registry.push(made, "images/tags", tag=tag) for tag in ("1", "2", "3")]
    assert {kubelet.pull(tag) for tag in tags} == {made.id}
    [entry] = listed(kubelet, "registry.test/images/tags")
    assert sorted(entry.repo_tags) == tags
    kubelet.remove_image(tags[1])
    assert not listed(kubelet, "registry.test/images/tags")
    assert kubelet.image_status(tags[0]) is None


def test_a_tag_that_moves_leaves_the_old_image(
    kubelet: Kubelet, registry: registry.Registry
) -> None:
    old, new = tiny("moves-1"), tiny("moves-2")
    reference = registry.push(old, "images/moves")
    kubelet.pull(reference)
    registry.push(new, "images/moves")
    assert kubelet.pull(reference) == new.id
    found = kubelet.image_status(reference)
    assert found is not None
    assert found.id == new.id
    previous = kubelet.image_status(old.id)
    assert previous is not None
    assert list(previous.repo_tags) == []
    kubelet.remove_image(old.id)
    kubelet.remove_image(new.id)


def test_one_image_of_two_registries_is_one_entry(
    kubelet: Kubelet, registry: registry.Registry
) -> None:
    made = tiny("two-registries")
    reference = registry.push(made, "images/two")
    other = reference.replace("registry.test", f"{registry.address}")
    assert kubelet.pull(reference) == kubelet.pull(other) == made.id
    [entry] = listed(kubelet, "registry.test/images/two")
    assert sorted(entry.repo_tags) == sorted([reference, other])
    kubelet.remove_image(made.id)


def test_simultaneous_pulls_and_removals_agree(
    kubelet: Kubelet, registry: registry.Registry
) -> None:
    made = image.busybox([image.Entry(name="simultaneous", data=b"x" * 100)])
    reference = registry.push(made, "images/simultaneous")
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        assert set(pool.map(kubelet.pull, [reference] * 6)) == {made.id}
        list(pool.map(kubelet.remove_image, [made.id] * 6))
    assert kubelet.image_status(made.id) is None


def test_a_deadline_is_told_as_one(kubelet: Kubelet, registry: registry.Registry) -> None:
    reference = registry.push(tiny("deadline"), "images/deadline")
    request = api.PullImageRequest(image=api.ImageSpec(image=reference))
    code, _ = refusal(lambda: kubelet.images.PullImage(request, timeout=0.001))
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED


@pytest.mark.parametrize(
    ("user", "uid", "name"),
    [
        ("1002", 1002, ""),
        ("www-data", None, "www-data"),
        ("1003:50000", 1003, ""),
        ("a:b", None, "a"),
        ("", None, ""),
    ],
)
def test_the_user_of_an_image(
    kubelet: Kubelet, registry: registry.Registry, user: str, uid: int | None, name: str
) -> None:
    made = tiny(f"user-{user}", User=user)
    reference = registry.push(made, "images/user", tag=made.id[7:15])
    kubelet.pull(reference)
    found = kubelet.image_status(reference)
    assert found is not None
    assert (found.uid.value if found.HasField("uid") else None) == uid
    assert found.username == name
    kubelet.remove_image(reference)


@pytest.mark.parametrize(
    "reference",
    [
        "",
        "UPPER/case",
        "registry.test/a:b:c",
        "registry.test/a@sha256:12",
        "registry.test/ space",
        "-/x",
    ],
)
def test_a_bad_reference_is_refused(kubelet: Kubelet, reference: str) -> None:
    refused = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNKNOWN}
    assert refusal(lambda: kubelet.pull(reference))[0] in refused


def test_what_the_registry_does_not_have(kubelet: Kubelet, registry: registry.Registry) -> None:
    with pytest.raises(grpc.RpcError, match="none"):
        kubelet.pull("registry.test/images/none:v1")


@pytest.mark.ours
def test_a_registry_that_is_down_is_named_so(kubelet: Kubelet) -> None:
    address = f"127.0.0.1:{registry.free_port()}"
    code, text = refusal(lambda: kubelet.pull(f"{address}/images/any:v1"))
    assert code is grpc.StatusCode.UNKNOWN
    assert text.startswith("RegistryUnavailable")


def test_the_filesystem_of_images(kubelet: Kubelet, pulled: str) -> None:
    answer = kubelet.images.ImageFsInfo(api.ImageFsInfoRequest())
    [found] = answer.image_filesystems
    assert found.fs_id.mountpoint.startswith("/")
    assert found.HasField("used_bytes")
    assert found.HasField("inodes_used")
    assert abs(found.timestamp - time.time_ns()) < 60e9
    mounted = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    [of_containers] = answer.container_filesystems
    for each in (found, of_containers):
        place = Path(each.fs_id.mountpoint)
        assert place.is_dir()
        assert any(place.is_relative_to(point) for point in mounted)


@pytest.mark.ours
def test_a_container_keeps_the_layers_of_an_image_that_is_gone_as_long_as_it_lives(
    kubelet: Kubelet, registry: registry.Registry, site: server.Site
) -> None:
    made = image.busybox([image.Entry(name="left", data=b"behind")])
    reference = registry.push(made, "images/left")
    before = set(os.listdir(site.root / "layers"))
    kubelet.pull(reference)
    container = kubelet.run(kubelet.run_pod(), reference, ("sleep", "86400"))
    kubelet.remove_image(reference)
    assert len(set(os.listdir(site.root / "layers")) - before) in (1, 2)
    assert kubelet.exec_sync(container, ["cat", "/left"]).stdout == b"behind"
    kubelet.stop(container)
    kubelet.remove(container)
    assert set(os.listdir(site.root / "layers")) <= before


@pytest.mark.ours
def test_verbose_tells_the_config_of_an_image(kubelet: Kubelet, pulled: str) -> None:
    request = api.ImageStatusRequest(image=api.ImageSpec(image=pulled), verbose=True)
    info = json.loads(kubelet.images.ImageStatus(request).info["info"])
    assert info["imageSpec"]["architecture"] == "amd64"
    assert info["imageSpec"]["config"]["Cmd"] == ["sh"]
    assert info["chainID"] == info["imageSpec"]["rootfs"]["diff_ids"][0]  # it has one layer


@pytest.mark.ours
def test_a_user_without_end_is_refused_and_harms_no_list(
    kubelet: Kubelet, registry: registry.Registry
) -> None:
    reference = registry.push(tiny("endless user", User="9" * 5000), "images/endless")
    code, text = refusal(lambda: kubelet.pull(reference))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "User has 5000 characters" in text
    assert kubelet.image_status(reference) is None
    kubelet.images.ListImages(api.ListImagesRequest())


@pytest.mark.ours
@pytest.mark.parametrize("stalls", ["/v2/app/manifests/", "/v2/app/blobs/"])
def test_a_registry_that_stalls_is_given_up_in_the_configured_time(
    make_site: Callable[..., server.Site],
    client_of: Callable[[server.Site], Kubelet],
    evil_registry: evil.Registry,
    stalls: str,
) -> None:
    client = client_of(make_site(images={"pull_progress_timeout": 1}))
    evil_registry.add_image("app", "v1", b"layer")
    evil_registry.on(stalls, evil.Stall(1))
    begin = time.monotonic()
    code, text = refusal(lambda: client.pull("evil.test/app:v1"))
    assert time.monotonic() - begin < waiting.patient(20)
    assert code is grpc.StatusCode.UNKNOWN
    assert text.startswith("RegistryUnavailable")
    assert "for 1 s" in text


@pytest.mark.ours
def test_the_list_can_be_filtered_and_streamed(kubelet: Kubelet, pulled: str) -> None:
    condition = api.ImageFilter(image=api.ImageSpec(image=pulled))
    [found] = kubelet.images.ListImages(api.ListImagesRequest(filter=condition)).images
    assert pulled in found.repo_tags
    with grpc.insecure_channel(kubelet.endpoint) as channel:
        call = channel.unary_stream(
            "/runtime.v1.ImageService/StreamImages",
            request_serializer=api.StreamImagesRequest.SerializeToString,
            response_deserializer=api.StreamImagesResponse.FromString,
        )
        ids = {
            i.id
            for chunk in call(api.StreamImagesRequest(), timeout=waiting.patient(10))
            for i in chunk.images
        }
    assert found.id in ids
