# SPDX-License-Identifier: Apache-2.0
"""PullImage against a real registry: what comes, what is shared, what a failure leaves behind."""

import asyncio
import contextlib
import errno
import json
import os
import random
import stat
import sys
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard
from structlog import testing

from cri_server import errors, trees
from cri_server.images import flights, layers, manifest, reference, tar, transport, workers
from cri_server.pb import api_pb2 as api
from shim import linux
from tests.lab import image, pulling, registry, tars, waiting

pytestmark = pytest.mark.needs("root", "overlay", "docker-registry")
BASE = pulling.layer(tars.folder("etc", 0o711, uid=3), tars.file("etc/base", b"base"))


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[registry.Registry]:
    with registry.run(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture
async def node(hub: registry.Registry, tmp_path: Path) -> AsyncIterator[pulling.Node]:
    made = pulling.Node(tmp_path / "root", hub.hosts(tmp_path / "hosts", "other.test"))
    yield made
    made.client.open.set()
    await made.close()
    pulling.unmount_below(tmp_path)
    trees.remove(made.root)


def unique(name: str) -> bytes:
    """Return a layer that no other test has."""
    return pulling.layer(tars.file(name, name.encode()))


# ---- what comes


async def test_an_image_comes_with_its_names_and_its_content(
    hub: registry.Registry, node: pulling.Node, tmp_path: Path
) -> None:
    made = pulling.make(BASE, unique("one"), User="1000:1000", Env=["A=1"], Labels={"k": "v"})
    name = hub.push(made, "one", tag="v1")
    assert await node.puller.pull(name) == made.id
    found = node.images.find(name)
    assert found is not None
    assert found.id == made.id
    assert found.repo_tags == (name,)
    assert found.repo_digests == (f"registry.test/one@{made.digest}",)
    assert found.size > len(made.config)
    assert (found.config.user, found.config.env, found.platform) == (
        "1000:1000",
        ("A=1",),
        "linux/amd64",
    )
    root = node.look(made.id, tmp_path / "mnt")
    assert (root / "etc/base").read_text() == "base"
    assert (root / "one").read_text() == "one"
    assert node.leftovers() == []
    assert not any(image.digest(b) in found.blobs for b in made.blobs.values() if b != made.config)


async def test_by_digest_and_by_both(hub: registry.Registry, node: pulling.Node) -> None:
    made = pulling.make(unique("digest"))
    hub.push(made, "digest")
    await node.puller.pull(f"registry.test/digest:ignored@{made.digest}")
    found = node.images.find(f"registry.test/digest@{made.digest}")
    assert found is not None
    assert found.repo_tags == ()


async def test_docker_types_zstd_and_plain_layers(
    hub: registry.Registry, node: pulling.Node, tmp_path: Path
) -> None:
    contents = [unique("gzip"), unique("zstd"), unique("plain")]
    blobs = [pulling.packed(contents[0]), zstandard.compress(contents[1]), contents[2]]
    config = {"architecture": "amd64", "os": "linux", "config": None}
    config["rootfs"] = {"type": "layers", "diff_ids": [image.digest(x) for x in contents]}  # type: ignore[assignment]
    body = json.dumps(config).encode()
    pulling.push_blobs(hub, "docker", [*blobs, body])
    kind = "application/vnd.docker.distribution.manifest.v2+json"
    document = {
        "schemaVersion": 2,
        "mediaType": kind,
        "config": {
            "mediaType": "application/vnd.docker.container.image.v1+json",
            "digest": image.digest(body),
            "size": len(body),
        },
        "layers": [
            {
                "mediaType": "application/vnd.docker.image.rootfs.diff.tar.gzip",  # for all three
                "digest": image.digest(b),
                "size": len(b),
                "urls": ["http://169.254.169.254/layer"],
            }
            for b in blobs
        ],
    }
    pulling.put(hub, "docker", "latest", document, kind)
    got = await node.puller.pull("registry.test/docker")
    root = node.look(got, tmp_path / "mnt")
    assert sorted(os.listdir(root)) == ["gzip", "plain", "zstd"]


def index(*entries: tuple[image.Image, str]) -> dict[str, object]:
    platforms = [
        (made, dict(zip(("os", "architecture", "variant"), p.split("/"), strict=False)))
        for made, p in entries
    ]
    return {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [
            {
                "mediaType": image.MANIFEST,
                "digest": made.digest,
                "size": len(made.manifest),
                "platform": platform,
            }
            for made, platform in platforms
        ],
    }


async def test_an_index_gives_the_image_of_this_platform(
    hub: registry.Registry, node: pulling.Node
) -> None:
    mine, other, proof = (pulling.make(unique(f"index {i}")) for i in range(3))
    for made in (mine, other, proof):
        hub.push(made, "index", tag=made.digest[7:20])
    here = str(manifest.host_platform())
    document = index((proof, "unknown/unknown"), (other, "linux/s390x"), (mine, here))
    top = pulling.put(hub, "index", "latest", document, str(document["mediaType"]))
    assert await node.puller.pull("registry.test/index") == mine.id
    found = node.images.find(mine.id)
    assert found is not None
    assert found.repo_digests == (
        f"registry.test/index@{top}",
    )  # of the index, not of the manifest

    document = index((proof, "unknown/unknown"), (other, "linux/s390x"), (other, "linux/arm/v7"))
    pulling.put(hub, "index", "bad", document, str(document["mediaType"]))
    with pytest.raises(errors.NotFound, match="available: linux/arm/v7, linux/s390x"):
        await node.puller.pull("registry.test/index:bad")


async def test_folders_and_hard_links_come_from_the_layers_below(
    hub: registry.Registry, node: pulling.Node, tmp_path: Path
) -> None:
    top = pulling.layer(tars.file("etc/sub/new", b"new"), tars.link("linked", "etc/base"))
    made = pulling.make(BASE, unique("between"), top)
    await node.puller.pull(hub.push(made, "below"))
    root = node.look(made.id, tmp_path / "mnt")
    assert stat.S_IMODE((root / "etc").stat().st_mode) == 0o711
    assert (root / "etc").stat().st_uid == 3
    assert (root / "linked").read_text() == "base"
    assert (root / "etc/base").read_text() == "base"


async def test_an_image_without_layers(
    hub: registry.Registry, node: pulling.Node, tmp_path: Path
) -> None:
    made = pulling.make()
    await node.puller.pull(hub.push(made, "empty"))
    found = node.images.find(made.id)
    assert found is not None
    assert found.size > 0
    assert os.listdir(node.look(made.id, tmp_path / "mnt")) == []


@pytest.mark.parametrize("config", [{}, {"rootfs": None}, {"rootfs": {"diff_ids": None}}])
async def test_an_image_that_says_null_for_nothing(
    hub: registry.Registry, node: pulling.Node, config: dict[str, object]
) -> None:
    body = json.dumps({"architecture": "amd64", "os": "linux", **config}).encode()
    pulling.push_blobs(hub, "null", [body])
    described = {"mediaType": image.CONFIG, "digest": image.digest(body), "size": len(body)}
    document = {"schemaVersion": 2, "mediaType": image.MANIFEST, "config": described}
    ways: list[dict[str, object]] = [{}, {"layers": None}, {"layers": [], "manifests": None}]
    for more in ways:
        pulling.put(hub, "null", "latest", {**document, **more}, image.MANIFEST)
        assert await node.puller.pull("registry.test/null") == image.digest(body)


async def test_the_same_layer_twice(
    hub: registry.Registry, node: pulling.Node, tmp_path: Path
) -> None:
    twice, gone = unique("twice"), pulling.layer(tars.whiteout("twice"))
    made = pulling.make(twice, gone, twice, gone)
    await node.puller.pull(hub.push(made, "twice"))
    assert os.listdir(node.look(made.id, tmp_path / "mnt")) == []
    assert max(node.client.fetched.values()) == 1


# ---- what is not fetched again


async def test_a_second_pull_fetches_nothing(hub: registry.Registry, node: pulling.Node) -> None:
    name = hub.push(pulling.make(unique("again")), "again")
    first = await node.puller.pull(name)
    fetched = node.client.fetched.total()
    record = next((node.root / "images").iterdir()).stat()
    assert await node.puller.pull(name) == first
    assert node.client.fetched.total() == fetched
    assert next((node.root / "images").iterdir()).stat().st_mtime_ns == record.st_mtime_ns


async def test_a_second_pull_of_an_index_asks_for_the_tag_alone(
    hub: registry.Registry, node: pulling.Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = pulling.make(unique("index again"))
    hub.push(made, "again-index", tag="one")
    document = index((made, str(manifest.host_platform())))
    pulling.put(hub, "again-index", "latest", document, str(document["mediaType"]))
    await node.puller.pull("registry.test/again-index")
    http, asked = node.client._shared.http, []
    send = http.send

    async def noted(request: transport.Request) -> transport.Response:
        asked.append((request.method, request.url.rpartition("/")[2].partition("?")[0]))
        return await send(request)

    monkeypatch.setattr(http, "send", noted)
    await node.puller.pull("registry.test/again-index")
    assert asked == [("HEAD", "latest")]
    node.images.blob_path(made.digest).write_bytes(b"damaged")
    asked.clear()
    assert await node.puller.pull("registry.test/again-index") == made.id
    assert asked == [("HEAD", "latest"), ("GET", made.digest)]


async def test_layers_are_shared_between_images(hub: registry.Registry, node: pulling.Node) -> None:
    a, b = pulling.make(BASE, unique("a")), pulling.make(BASE, unique("b"))
    await node.puller.pull(hub.push(a, "share-a"))
    fetched = node.client.fetched.total()
    await node.puller.pull(hub.push(b, "share-b"))
    assert node.client.fetched.total() == fetched + 2  # a config and a layer
    assert len(os.listdir(node.root / "layers")) == 3


async def test_v49_a_document_is_known_to_its_own_repository_only(
    hub: registry.Registry, node: pulling.Node
) -> None:
    """Naive: a registry names a digest that it does not have, and gets what another one sent."""
    made = pulling.make(unique("known"))
    await node.puller.pull(hub.push(made, "known"))
    known = node.puller._known
    assert known(reference.parse("registry.test/known:other"), made.digest) == made.manifest
    assert known(reference.parse("registry.test/stranger"), made.digest) is None
    assert known(reference.parse("other.test/known"), made.digest) is None


async def test_a_moved_tag_is_seen(hub: registry.Registry, node: pulling.Node) -> None:
    old, new = pulling.make(unique("old")), pulling.make(unique("new"))
    name = hub.push(old, "moved")
    await node.puller.pull(name)
    hub.push(new, "moved")
    assert await node.puller.pull(name) == new.id
    found = node.images.find(old.id)
    assert found is not None
    assert found.repo_tags == ()


async def test_one_image_from_two_registries_has_all_names(
    hub: registry.Registry, node: pulling.Node
) -> None:
    made = pulling.make(unique("two names"))
    hub.push(made, "two")
    await node.puller.pull("registry.test/two")
    await node.puller.pull("other.test/two")
    found = node.images.find(made.id)
    assert found is not None
    assert found.repo_tags == ("registry.test/two:latest", "other.test/two:latest")


# ---- at once


async def test_twenty_pulls_of_one_image_are_one(
    hub: registry.Registry, node: pulling.Node
) -> None:
    made = pulling.make(BASE, unique("twenty"))
    name = hub.push(made, "twenty")
    got = await asyncio.gather(*(node.puller.pull(name) for _ in range(20)))
    assert set(got) == {made.id}
    assert set(node.client.fetched.values()) == {1}


async def test_ten_images_with_common_layers_fetch_them_once(
    hub: registry.Registry, node: pulling.Node
) -> None:
    images = [pulling.make(BASE, unique("common"), unique(f"ten {i}")) for i in range(10)]
    names = [hub.push(made, f"ten-{i}") for i, made in enumerate(images)]
    await asyncio.gather(*map(node.puller.pull, names))
    assert set(node.client.fetched.values()) == {1}
    assert node.leftovers() == []


async def wait_for(check: Callable[[], object]) -> None:
    """Wait until `check()` is true."""
    await asyncio.to_thread(waiting.until, check, "a condition of the test")


async def test_cancelling_nineteen_of_twenty(hub: registry.Registry, node: pulling.Node) -> None:
    made = pulling.make(unique("nineteen"))
    name = hub.push(made, "nineteen")
    node.client.open.clear()
    tasks = [asyncio.create_task(node.puller.pull(name)) for _ in range(20)]
    await wait_for(lambda: node.client.waiting)
    for task in tasks[:19]:
        task.cancel()
    done, _ = await asyncio.wait(tasks[:19], timeout=1)
    assert len(done) == 19  # at once, though the work goes on
    node.client.open.set()
    assert await tasks[19] == made.id


async def test_cancelling_all_ends_the_work_and_cleans_up(
    hub: registry.Registry, node: pulling.Node
) -> None:
    made = pulling.make(*(unique(f"all {i}") for i in range(5)))
    name = hub.push(made, "all")
    node.client.held = lambda domain, digest: digest != made.id
    node.client.open.clear()
    tasks = [asyncio.create_task(node.puller.pull(name)) for _ in range(3)]
    await wait_for(lambda: node.client.waiting == 3)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    await node.puller.close()
    assert node.client.waiting == 0
    assert os.listdir(node.root / "tmp") == []
    assert node.images.list() == ()
    node.client.open.set()
    assert await node.puller.pull(name) == made.id


async def test_cancelling_one_of_two_images_that_share_a_download(
    hub: registry.Registry, node: pulling.Node
) -> None:
    a, b = pulling.make(unique("shared"), unique("x")), pulling.make(unique("shared"), unique("y"))
    names = hub.push(a, "shared-a"), hub.push(b, "shared-b")
    node.client.held = lambda domain, digest: digest not in (a.id, b.id)
    node.client.open.clear()
    first, second = (asyncio.create_task(node.puller.pull(n)) for n in names)
    await wait_for(lambda: node.client.waiting == 3)
    first.cancel()
    await asyncio.wait([first])
    node.client.open.set()
    assert await second == b.id
    assert {i.id for i in node.images.list()} == {b.id}


async def test_the_failure_of_one_image_is_not_anothers(
    hub: registry.Registry, node: pulling.Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R20: the layer that both have is gone from the repository of the one that was first."""
    a, b = pulling.make(unique("lost")), pulling.make(unique("lost"), unique("beside"))
    names = hub.push(a, "lost-a"), hub.push(b, "lost-b")
    node.client.held = lambda domain, digest: digest not in (a.id, b.id)
    node.client.open.clear()
    blob, begun, joined = node.client.blob, asyncio.Event(), asyncio.Event()

    async def lossy(ref: Any, descriptor: Any, auth: Any = None, **more: Any) -> None:
        if ref.path == "lost-a" and descriptor.digest != a.id:
            begun.set()
            await node.client.open.wait()
            raise errors.NotFound("lost")
        if descriptor.digest not in (a.id, b.id):
            joined.set()
        await blob(ref, descriptor, auth, **more)

    monkeypatch.setattr(node.client, "blob", lossy)
    first = asyncio.create_task(node.puller.pull(names[0]))
    await begun.wait()
    second = asyncio.create_task(node.puller.pull(names[1]))
    await joined.wait()
    node.client.open.set()
    assert await second == b.id
    with pytest.raises(errors.NotFound, match="lost"):
        await first


async def test_downloads_of_one_pull_are_bounded(
    hub: registry.Registry, node: pulling.Node
) -> None:
    made = pulling.make(*(unique(f"bound {i}") for i in range(8)))
    await node.puller.pull(hub.push(made, "bound"))
    assert node.client.most <= 3


async def test_a_registry_that_stalls_holds_up_nobody_else(
    hub: registry.Registry, node: pulling.Node
) -> None:
    """The same layers, from another place, while five pulls of the first place stand still."""
    images = [pulling.make(BASE, *(unique(f"stall {i} {j}") for j in range(4))) for i in range(5)]
    for i, made in enumerate(images):
        hub.push(made, f"stall-{i}")
    node.client.held = lambda domain, digest: domain == "registry.test"
    node.client.open.clear()
    stuck = [asyncio.create_task(node.puller.pull(f"registry.test/stall-{i}")) for i in range(5)]
    await wait_for(lambda: node.client.waiting >= 5)
    async with asyncio.timeout(10):
        assert await node.puller.pull("other.test/stall-0") == images[0].id
    node.client.open.set()
    await asyncio.gather(*stuck)


async def test_removing_during_a_pull(hub: registry.Registry, node: pulling.Node) -> None:
    """RemoveImage takes no layers from a pull that relies on them."""
    a, b = pulling.make(BASE), pulling.make(BASE, unique("during"))
    await node.puller.pull(hub.push(a, "during-a"))
    name = hub.push(b, "during-b")
    node.client.held = lambda domain, digest: digest != b.id
    node.client.open.clear()
    task = asyncio.create_task(node.puller.pull(name))
    await wait_for(lambda: node.client.waiting)
    await node.collector.remove(a.id)
    node.client.open.set()
    assert await task == b.id
    assert all(node.layers.layer(key) for i in node.images.list() for key in i.layers)


# ---- failures


async def failed(node: pulling.Node, name: str) -> errors.CriError:
    """Pull in vain; nothing may be left."""
    with pytest.raises(errors.CriError) as caught:
        await node.puller.pull(name)
    await node.puller.close()
    assert node.images.list() == ()
    assert node.leftovers() == []
    return caught.value


async def test_a_layer_that_unpacks_to_something_else(
    hub: registry.Registry, node: pulling.Node
) -> None:
    made = pulling.make(BASE, unique("promised"))
    lie = made.config.replace(image.digest(BASE).encode(), image.digest(b"other").encode())
    kind, document = image.MANIFEST, json.loads(made.manifest)
    document["config"] |= {"digest": image.digest(lie), "size": len(lie)}
    hub.push(made, "lie")
    pulling.push_blobs(hub, "lie", [lie])
    pulling.put(hub, "lie", "latest", document, kind)
    error = await failed(node, "registry.test/lie")
    assert isinstance(error, errors.Unknown)
    assert "unpacks to" in error.message


async def test_a_blob_with_the_wrong_bytes(hub: registry.Registry, node: pulling.Node) -> None:
    made = pulling.make(unique("spoilt"))
    name = hub.push(made, "spoilt")
    node.client.spoil = lambda data: data if data == made.config else data[:-1] + b"!"
    error = await failed(node, name)
    assert "wrong content of blob" in error.message
    node.client.spoil = lambda data: data
    assert await node.puller.pull(name) == made.id


async def test_layers_that_came_before_the_failure_go(
    hub: registry.Registry, node: pulling.Node
) -> None:
    made = pulling.make(BASE, unique("comes"), unique("fails"))
    name = hub.push(made, "halfway")
    last = list(made.blobs)[-1]
    node.client.held = lambda domain, digest: digest == last
    node.client.open.clear()
    pulling_it = asyncio.create_task(node.puller.pull(name))
    await wait_for(lambda: len(node.layers.layers()) == 2)
    node.client.spoil = lambda data: data[:-1] + b"!"
    node.client.open.set()
    with pytest.raises(errors.Unknown, match="wrong content of blob"):
        await pulling_it
    await node.puller.close()
    assert node.leftovers() == []


async def test_a_document_that_is_damaged_here_is_fetched_again(
    hub: registry.Registry, node: pulling.Node
) -> None:
    made = pulling.make(unique("damaged"))
    name = hub.push(made, "damaged")
    await node.puller.pull(name)
    for digest, body in ((made.digest, made.manifest), (made.id, made.config)):
        node.images.blob_path(digest).write_bytes(b"{")
        assert await node.puller.pull(name) == made.id
        assert node.images.read_blob(digest) == body


async def test_a_pull_is_on_the_disk_before_its_record_is_there(
    hub: registry.Registry, node: pulling.Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = pulling.make(BASE, unique("synced"))
    seen = []

    def syncfs(fd: int) -> None:
        assert os.fstat(fd).st_dev == node.root.stat().st_dev
        seen.append((len(os.listdir(node.root / "layers")), os.listdir(node.root / "images")))

    monkeypatch.setattr(linux, "syncfs", syncfs)
    name = hub.push(made, "synced")
    await node.puller.pull(name)
    assert seen == [(2, [])]
    await node.puller.pull(name)  # nothing new, nothing to sync
    assert len(seen) == 1


async def test_attributes_that_a_layer_loses_are_logged_once(
    hub: registry.Registry, node: pulling.Node
) -> None:
    broken = {"SCHILY.xattr.security.capability": b"none"}
    layer = pulling.layer(*(tars.pax(broken, tars.file(n)) for n in ("a", "b")))
    name = hub.push(pulling.make(layer), "attributes")
    with testing.capture_logs() as logs:
        await node.puller.pull(name)
    [said] = [entry for entry in logs if "attributes" in entry]
    assert (said["log_level"], said["attributes"]) == ("warning", ["security.capability"])


async def test_a_hostile_layer_is_refused(hub: registry.Registry, node: pulling.Node) -> None:
    canary = node.root.parent / "canary"
    canary.write_text("untouched")
    evil = pulling.layer(
        tars.symlink("out", str(canary.parent)), tars.file("out/canary", b"evil"), tars.file("../x")
    )
    error = await failed(node, hub.push(pulling.make(BASE, evil), "evil"))
    assert isinstance(error, errors.InvalidArgument)
    assert canary.read_text() == "untouched"


async def test_documents_that_are_no_image(hub: registry.Registry, node: pulling.Node) -> None:
    made = pulling.make(unique("documents"))
    hub.push(made, "documents")
    document = json.loads(made.manifest)
    artifact = document | {"config": document["config"] | {"mediaType": "application/vnd.x"}}
    pulling.put(hub, "documents", "artifact", artifact, image.MANIFEST)
    secret = json.loads(made.manifest)
    secret["layers"][0]["mediaType"] += "+encrypted"
    pulling.put(hub, "documents", "encrypted", secret, image.MANIFEST)
    for tag, text in (("artifact", "application/vnd.x"), ("encrypted", "encrypted")):
        assert text in (await failed(node, f"registry.test/documents:{tag}")).message
    assert isinstance(await failed(node, "registry.test/none:1"), errors.NotFound)
    assert isinstance(await failed(node, "registry.test/UPPER"), errors.InvalidArgument)


async def test_a_bomb_stops_at_the_limit(
    hub: registry.Registry, node: pulling.Node, tmp_path: Path
) -> None:
    limits = tar.Limits(entries=1000, bytes=1 << 20)
    small = pulling.Node(tmp_path / "bounded", tmp_path / "hosts", limits=limits)
    bomb = pulling.layer(tars.file("zeros", bytes(8 << 20)))
    error = await failed(small, hub.push(pulling.make(bomb), "bomb"))
    assert isinstance(error, errors.ResourceExhausted)
    await small.close()


async def test_a_full_disk_is_named_and_left_clean(
    hub: registry.Registry, node: pulling.Node, tmp_path: Path
) -> None:
    root = tmp_path / "small"
    root.mkdir()
    linux.mount("tmpfs", root, "tmpfs", 0, "size=3m")
    small = pulling.Node(root, tmp_path / "hosts")
    sparse = pulling.layer(tars.file("large", bytes(8 << 20)))  # small as a blob
    dense = pulling.layer(tars.file("noise", random.Random(1).randbytes(4 << 20)))
    for made, tag in ((pulling.make(sparse), "unpack"), (pulling.make(dense), "download")):
        error = await failed(small, hub.push(made, "full", tag=tag))
        assert isinstance(error, errors.ResourceExhausted)
        assert "ENOSPC" in error.message
    linux.mount("tmpfs", root, "tmpfs", linux.MS_REMOUNT, "size=64m")
    got = await small.puller.pull("registry.test/full:unpack")
    (root / "fill").write_bytes(bytes(50 << 20))
    with pytest.raises(OSError, match="No space"):
        (root / "rest").write_bytes(bytes(64 << 20))
    await small.collector.remove(got)  # with nothing left
    assert small.images.list() == ()
    assert os.listdir(root / "layers") == []
    await small.close()


async def test_an_image_whose_layer_is_lost_is_healed(
    hub: registry.Registry, node: pulling.Node
) -> None:
    made = pulling.make(BASE, unique("lost"))
    name = hub.push(made, "lost")
    await node.puller.pull(name)
    found = node.images.find(name)
    assert found is not None
    trees.remove(node.layers.set_aside(found.layers[1]))
    assert await node.puller.pull(name) == made.id
    assert node.layers.layer(found.layers[1]) is not None


async def test_other_credentials_are_another_pull(
    hub: registry.Registry, node: pulling.Node
) -> None:
    made = pulling.make(unique("credentials"))
    name = hub.push(made, "credentials")
    node.client.open.clear()
    node.client.held = lambda domain, digest: digest != made.id
    auth = api.AuthConfig(username="u", password="p")
    tasks = [asyncio.create_task(node.puller.pull(name, a)) for a in (None, auth, auth)]
    await wait_for(lambda: node.client.waiting == 2)
    node.client.open.set()
    assert await asyncio.gather(*tasks) == [made.id] * 3


async def test_a_worker_that_stands_still_is_killed(node: pulling.Node, tmp_path: Path) -> None:
    blob = tmp_path / "blob"
    os.mkfifo(blob)  # which nobody writes to
    host = layers.Layers(node.layers, limits=tar.Limits())
    pool = workers.Workers(1, patience=0.3)
    with pytest.raises(errors.DeadlineExceeded, match="stood still"):
        async with host.staged(contextlib.nullcontext(blob), "sha256:x", (), pool=pool):
            pass
    assert os.listdir(node.root / "tmp") == []


BUSY = "import time\nend = time.monotonic() + 1.5\nwhile time.monotonic() < end: pass\nprint('{}')"


async def test_a_worker_that_works_may_take_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_COMMAND", (sys.executable, "-I", "-c", BUSY))
    pool = workers.Workers(1, patience=0.5)
    assert await pool.run({"verb": "apply"}) == {}
    await pool.close()


async def test_a_worker_that_dies_is_an_error_and_not_used_again() -> None:
    pool = workers.Workers(1, patience=10)
    pool.warm(1)
    with pytest.raises(errors.Internal, match="KeyError"):
        await pool.run({"verb": "apply"})
    asked = {"verb": "settle", "into": "/nonexistent", "lowers": []}
    assert (await pool.run(asked))["kind"] == "host"
    await pool.close()


async def test_a_worker_that_cannot_start_leaves_no_descriptor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    for name in ("memfd_create", "pipe"):
        before = os.listdir("/proc/self/fd")
        monkeypatch.setattr(os, name, full)
        with pytest.raises(OSError, match="Too many"):
            workers.Workers(1, patience=1).warm(1)
        monkeypatch.undo()
        assert os.listdir("/proc/self/fd") == before


async def test_a_cancelled_caller_waits_for_its_thread() -> None:
    started, go, ended = (threading.Event() for _ in range(3))

    def work() -> None:
        started.set()
        go.wait(10)
        ended.set()

    task = asyncio.create_task(flights.in_thread(work))
    await wait_for(started.is_set)
    task.cancel()
    go.set()
    await asyncio.wait([task])
    assert task.cancelled()
    assert ended.is_set()


# ---- choosing, keys, flights


def offer(*platforms: str) -> manifest.Index:
    entries = []
    for number, platform in enumerate(platforms):
        os_, architecture, variant = (platform + "//").split("/")[:3]
        chosen = manifest.Platform(os=os_, architecture=architecture, variant=variant)
        digest = f"sha256:{number:064x}"
        entries.append(manifest.Descriptor(digest=digest, size=1, platform=chosen))
    return manifest.Index(manifests=tuple(entries))


@pytest.mark.parametrize(
    ("wanted", "offers", "best"),
    [
        ("linux/amd64", ["linux/arm64", "linux/amd64"], 1),
        ("linux/amd64", ["windows/amd64", "linux/amd64/v3", "linux/amd64"], 2),
        ("linux/arm/v7", ["linux/arm/v5", "linux/arm/v6", "linux/arm64"], 1),
        ("linux/arm/v7", ["linux/arm/v8", "linux/arm/v6"], 1),
        ("linux/arm/v7", ["linux/arm/v6", "linux/arm"], 1),
        ("linux/arm64/v8", ["linux/arm64"], 0),
        ("linux/amd64", ["linux/amd64", "linux/amd64"], 0),
        ("linux/amd64", ["linux/arm64", "", "unknown/unknown", ""], 1),
        ("linux/amd64", ["", "linux/amd64"], 1),
    ],
)
def test_the_best_platform_is_chosen(wanted: str, offers: list[str], best: int) -> None:
    os_, architecture, variant = (wanted + "//").split("/")[:3]
    here = manifest.Platform(os=os_, architecture=architecture, variant=variant)
    assert manifest.choose(offer(*offers), here).digest == f"sha256:{best:064x}"


def test_an_entry_may_say_nothing_of_its_platform() -> None:
    """`platform` is optional (OCI image-spec, image-index.md); a signature is still no image."""
    here = manifest.host_platform()
    kinds = ("application/vnd.example.signature", manifest.OCI_INDEX, manifest.OCI_MANIFEST)
    entries = [
        manifest.Descriptor(digest=f"sha256:{n:064x}", size=1, media_type=kind)
        for n, kind in enumerate(kinds)
    ]
    assert manifest.choose(manifest.Index(manifests=tuple(entries)), here) == entries[2]
    with pytest.raises(errors.NotFound):
        manifest.choose(manifest.Index(manifests=tuple(entries[:2])), here)


def test_chain_ids() -> None:
    """The rule of the OCI image-spec: sha256("<chain id of the parent> <diff id>")."""
    one, two = (f"sha256:{c * 64}" for c in "12")
    second = image.digest(f"{one} {two}".encode())
    third = image.digest(f"{second} {one}".encode())
    assert manifest.chain([one, two, one]) == tuple(i[7:] for i in (one, second, third))
    assert manifest.chain([]) == ()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{",
        b"[" * 100_000,
        b'{"manifests":[],"layers":[]}',
        b'{"config":{"digest":"sha256:../../etc","size":1},"layers":[]}',
        b'{"config":{"digest":"sha256:' + b"a" * 64 + b'","size":-1},"layers":[]}',
        b'{"config":{"digest":"sha256:' + b"a" * 64 + b'","size":1},"layers":[1]}',
        b'{"config":{"digest":"md5:' + b"a" * 32 + b'","size":1},"layers":[]}',
        b'{"manifests":[{"digest":"sha256:x","size":1}]}',
        b'{"a":' + b"9" * 100_000 + b"}",
    ],
    ids=range(11),
)
def test_malformed_manifests(body: bytes) -> None:
    with pytest.raises(errors.CriError):
        manifest.parse(body)


@pytest.mark.parametrize(
    "value", ["1", '"sha256:1"', '["sha256:1"]', '["sha512:%s"]' % ("a" * 128)]
)
def test_malformed_diff_ids(value: str) -> None:
    with pytest.raises(errors.InvalidArgument):
        manifest.parse_config(b'{"rootfs":{"diff_ids":%s}}' % value.encode(), 1)


def test_a_user_has_a_bound() -> None:
    body = b'{"config":{"User":"%s"},"rootfs":{"diff_ids":[]}}'
    assert manifest.parse_config(body % (b"9" * 256), 0).process.user == "9" * 256
    with pytest.raises(errors.InvalidArgument, match="User has 5000 characters"):
        manifest.parse_config(body % (b"9" * 5000), 0)


def test_an_index_that_says_null_for_a_manifests_keys_is_one() -> None:
    found = manifest.parse(b'{"manifests":[],"config":null,"layers":null}')
    assert isinstance(found, manifest.Index)


def test_nulls_in_a_config_are_nothing() -> None:
    body = b'{"config":{"User":null,"Env":null,"Labels":null},"rootfs":{"diff_ids":null}}'
    config = manifest.parse_config(body, 0)
    assert (config.process.user, config.process.env, config.process.labels) == ("", (), {})


async def test_a_failure_reaches_all_who_wait_and_is_not_kept() -> None:
    shared: flights.Flights[int] = flights.Flights()
    calls = 0

    async def make() -> int:
        nonlocal calls
        calls += 1
        await asyncio.sleep(0)
        if calls == 1:
            raise errors.NotFound("first")
        return calls

    async def use() -> int:
        async with shared.hold("key", make) as value:
            return value

    got = await asyncio.gather(*(use() for _ in range(5)), return_exceptions=True)
    assert all(isinstance(g, errors.NotFound) for g in got)
    assert await use() == 2


async def test_who_insists_tries_once_when_others_have_failed() -> None:
    shared: flights.Flights[int] = flights.Flights()
    tried: list[int] = []

    def maker(number: int) -> Callable[[], Coroutine[Any, Any, int]]:
        async def make() -> int:
            tried.append(number)
            await asyncio.sleep(0)
            if number < 3:
                raise errors.NotFound(str(number))
            return number

        return make

    async def use(number: int) -> int:
        async with shared.hold("key", maker(number), insist=True) as value:
            return value

    got = await asyncio.gather(*map(use, range(6)), return_exceptions=True)
    assert [str(g) for g in got[:3]] == ["0", "1", "2"]
    assert got[3:] == [3, 3, 3]
    assert tried == [0, 1, 2, 3]


async def test_a_result_is_disposed_of_by_the_last_one() -> None:
    disposed: list[int] = []
    shared: flights.Flights[int] = flights.Flights(dispose=disposed.append)

    async def make() -> int:
        return 7

    async with shared.hold("key", make):
        async with shared.hold("key", make) as value:
            assert value == 7
        await asyncio.sleep(0)
        assert disposed == []
    await asyncio.sleep(0)
    assert disposed == [7]
