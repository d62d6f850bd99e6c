# SPDX-License-Identifier: Apache-2.0
"""Images from archives: what comes, by which names, and what is refused."""

import gzip
import json
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from cri_server import errors, trees
from cri_server.images import archive, load, manifest
from tests.lab import archives, image, pulling, tars

pytestmark = pytest.mark.needs("root", "overlay")
BASE = pulling.layer(tars.folder("etc", 0o711, uid=3), tars.file("etc/base", b"base"))
TOP = pulling.layer(tars.file("top", b"top"))
NAME = "docker.io/library/a:1"


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[pulling.Node]:
    made = pulling.Node(tmp_path / "root", tmp_path / "hosts")
    yield made
    await made.close()
    pulling.unmount_below(tmp_path)
    trees.remove(made.root)


@pytest.fixture
def loader(node: pulling.Node) -> load.Loader:
    return load.Loader(images=node.images, layer_host=node.layers, collector=node.collector)


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    return tmp_path / "image.tar"


async def refusal(loader: load.Loader, path: Path, name: str = "") -> errors.CriError:
    with pytest.raises(errors.CriError) as caught:
        await loader.load(str(path), name)
    return caught.value


# ---- OCI layout


async def test_a_layout_comes_with_its_name_and_its_content(
    node: pulling.Node, loader: load.Loader, tar: Path, tmp_path: Path
) -> None:
    made = pulling.make(BASE, TOP, User="7")
    archives.layout(tar, ("a:1", made))
    assert await loader.load(str(tar)) == [(NAME, made.id)]
    found = node.images.find("a:1")
    assert found is not None
    assert found.repo_tags == (NAME,)
    assert found.repo_digests == (f"docker.io/library/a@{made.digest}",)
    assert found.config.user == "7"
    root = node.look(made.id, tmp_path / "mnt")
    assert (root / "etc/base").read_text() + (root / "top").read_text() == "basetop"
    assert node.leftovers() == []


async def test_a_second_import_of_the_same_changes_nothing(
    node: pulling.Node, loader: load.Loader, tar: Path
) -> None:
    archives.layout(tar, ("a:1", pulling.make(BASE)))
    first = await loader.load(str(tar))
    before = node.images.list()
    assert await loader.load(str(tar)) == first
    assert node.images.list() == before


async def test_images_that_share_layers_and_names_of_one_image_all_come(
    node: pulling.Node, loader: load.Loader, tar: Path
) -> None:
    one, two = pulling.make(BASE), pulling.make(BASE, TOP)
    archives.layout(tar, ("a:1", one), ("r.test/b:2", two), ("r.test/c:3", two))
    made = await loader.load(str(tar))
    assert dict(made) == {NAME: one.id, "r.test/b:2": two.id, "r.test/c:3": two.id}
    found = node.images.find(two.id)
    assert found is not None
    assert set(found.repo_tags) == {"r.test/b:2", "r.test/c:3"}


async def test_a_name_with_a_digest_becomes_a_digest_and_no_tag(
    node: pulling.Node, loader: load.Loader, tar: Path
) -> None:
    made = pulling.make(BASE)
    archives.layout(tar, (f"r.test/a@{made.digest}", made))
    await loader.load(str(tar))
    found = node.images.find(made.id)
    assert found is not None
    assert (found.repo_tags, found.repo_digests) == ((), (f"r.test/a@{made.digest}",))


async def test_a_name_with_another_digest_is_refused(loader: load.Loader, tar: Path) -> None:
    archives.layout(tar, (f"r.test/a@sha256:{'0' * 64}", pulling.make(BASE)))
    assert isinstance(await refusal(loader, tar), errors.InvalidArgument)


async def test_a_whole_name_of_another_annotation_counts_and_a_tag_alone_does_not(
    loader: load.Loader, tar: Path
) -> None:
    made = pulling.make(BASE)
    archives.layout(tar, ("r.test/a:1", made), key=archive.REF_NAME)
    assert await loader.load(str(tar)) == [("r.test/a:1", made.id)]
    archives.layout(tar, ("v1", made), key=archive.REF_NAME)
    assert "give it a name" in (await refusal(loader, tar)).message
    assert await loader.load(str(tar), "r.test/named:2") == [("r.test/named:2", made.id)]


async def test_of_several_platforms_the_one_for_this_machine_comes(
    loader: load.Loader, tar: Path
) -> None:
    here, there = pulling.make(BASE), pulling.make(TOP)
    own = manifest.host_platform().architecture
    platforms = [(there, "s390x"), (here, own)]
    inner = [
        archives.entry(made, {}, platform={"os": "linux", "architecture": arch})
        for made, arch in platforms
    ]
    unknown = {"os": "unknown", "architecture": "unknown"}  # buildkit's attestations: no images
    inner.append(archives.entry(here, {}, platform=unknown))
    nested = json.dumps({"schemaVersion": 2, "manifests": inner}).encode()
    top = {
        "mediaType": manifest.OCI_INDEX,
        "digest": image.digest(nested),
        "size": len(nested),
        "annotations": {archive.NAME: "a:1"},
    }
    files = {image.digest(b): b for b in (nested, here.manifest)} | dict(here.blobs)
    index = json.dumps({"manifests": [top]}).encode()
    blobs = {f"blobs/{d.replace(':', '/')}": b for d, b in files.items()}
    archives.write(tar, {**blobs, "index.json": index})  # the other platform's blobs are missing
    assert await loader.load(str(tar)) == [(NAME, here.id)]


@pytest.mark.parametrize("architecture", [None, manifest.host_platform().architecture])
async def test_a_name_is_for_one_image_and_not_for_the_last_of_several(
    loader: load.Loader, tar: Path, architecture: str | None
) -> None:
    images = [pulling.make(BASE), pulling.make(TOP)]
    platform = {"os": "linux", "architecture": architecture} if architecture else None
    other = {"os": "linux", "architecture": "s390x"}
    entries = [archives.entry(made, {}, platform=platform) for made in images]
    entries.append(archives.entry(pulling.make(), {}, platform=other))
    index = {"index.json": json.dumps({"manifests": entries}).encode()}
    archives.layout(tar, *(("", made) for made in images), more=index)
    assert "has 2 images" in (await refusal(loader, tar, "a:1")).message
    archives.layout(tar, ("b:1", images[0]), ("c:1", images[0]))  # one image of two names
    assert await loader.load(str(tar), "a:1") == [(NAME, images[0].id)]


# ---- docker's form


async def test_what_docker_saves_comes_and_has_the_same_digest_each_time(
    node: pulling.Node, loader: load.Loader, tar: Path, tmp_path: Path
) -> None:
    made = pulling.make(BASE, TOP)
    archives.docker(tar, ["a:1", "r.test/b:2"], [BASE, TOP], made.config)
    assert dict(await loader.load(str(tar))) == {NAME: made.id, "r.test/b:2": made.id}
    first = node.images.find(made.id)
    assert (node.look(made.id, tmp_path / "mnt") / "top").read_text() == "top"
    await loader.load(str(tar))
    assert node.images.find(made.id) == first


async def test_layers_of_dockers_form_may_be_compressed(loader: load.Loader, tar: Path) -> None:
    """minikube keeps its images so."""
    made = pulling.make(BASE)
    archives.docker(tar, ["a:1"], [gzip.compress(BASE)], made.config)
    assert await loader.load(str(tar)) == [(NAME, made.id)]


async def test_a_layer_that_is_a_link_to_another_one_comes_too(
    loader: load.Loader, tar: Path
) -> None:
    """Docker saved a layer that two images share once, and linked to it."""
    made = pulling.make(BASE)
    saved = {"Config": "c.json", "RepoTags": ["a:1"], "Layers": ["two/layer.tar"]}
    files = {"one/layer.tar": BASE, "c.json": made.config}
    said = json.dumps([saved]).encode()
    archives.write(tar, {**files, "manifest.json": said}, {"two/layer.tar": "../one/layer.tar"})
    assert await loader.load(str(tar)) == [(NAME, made.id)]


async def test_an_image_of_docker_without_a_name_needs_one(loader: load.Loader, tar: Path) -> None:
    made = pulling.make(BASE)
    archives.docker(tar, [], [BASE], made.config)
    assert "give it a name" in (await refusal(loader, tar)).message
    assert await loader.load(str(tar), "a:1") == [(NAME, made.id)]


# ---- what is refused, and leaves nothing


def spoilt_layer(tar: Path) -> None:
    made = pulling.make(BASE)
    digest = image.digest(gzip.compress(BASE, 6, mtime=0))
    wrong = {f"blobs/{digest.replace(':', '/')}": b"x" * len(made.blobs[digest])}
    archives.layout(tar, ("a:1", made), more=wrong)


def spoilt_config(tar: Path) -> None:
    made = pulling.make(BASE)
    wrong = {f"blobs/{made.id.replace(':', '/')}": made.config.replace(b"linux", b"LINUX")}
    archives.layout(tar, ("a:1", made), more=wrong)


def spoilt_manifest(tar: Path) -> None:
    made = pulling.make(BASE)
    wrong = {f"blobs/{made.digest.replace(':', '/')}": made.manifest.replace(b":2", b":3", 1)}
    archives.layout(tar, ("a:1", made), more=wrong)


def other_layer(tar: Path) -> None:
    archives.docker(tar, ["a:1"], [TOP], pulling.make(BASE).config)


def cut_short(tar: Path) -> None:
    archives.layout(tar, ("a:1", pulling.make(BASE)))
    os.truncate(tar, 2000)


def missing_file(tar: Path) -> None:
    said = json.dumps([{"Config": "/etc/passwd", "RepoTags": ["a:1"], "Layers": []}]).encode()
    archives.write(tar, {"manifest.json": said})


def bad_name(tar: Path) -> None:
    archives.layout(tar, ("UPPER/../x:1", pulling.make(BASE)))


def missing_blob(tar: Path) -> None:
    index = {"manifests": [archives.entry(pulling.make(BASE), {archive.NAME: "a:1"})]}
    archives.write(tar, {"index.json": json.dumps(index).encode()})


def bad_digest(tar: Path) -> None:
    index = {"manifests": [{"digest": "sha256:../../x", "size": 1, "annotations": {}}]}
    archives.write(tar, {"index.json": json.dumps(index).encode()})


Maker = Callable[[Path], object]
REFUSED: dict[str, tuple[Maker, str]] = {
    "spoilt layer": (spoilt_layer, "wrong content of blob"),
    "spoilt config": (spoilt_config, "wrong content of blob"),
    "spoilt manifest": (spoilt_manifest, "sent wrong digest"),
    "another layer": (other_layer, "the layer unpacks to"),
    "cut short": (cut_short, "is no image archive"),
    "missing file": (missing_file, "is missing in the archive"),
    "bad name": (bad_name, "invalid image reference"),
    "missing blob": (missing_blob, "has no blob sha256:"),
    "bad digest": (bad_digest, "is not a digest"),
    "no index": (lambda tar: archives.write(tar, {"x": b"y"}), "neither index.json nor"),
    "bad index": (lambda tar: archives.write(tar, {"index.json": b"["}), "malformed"),
    "bad list": (lambda tar: archives.write(tar, {"manifest.json": b"[7]"}), "malformed"),
    "no tar": (lambda tar: tar.write_bytes(b"not a tar" * 200), "is no image archive"),
    "empty": (lambda tar: tar.write_bytes(b""), "neither index.json nor"),
    "folder": (lambda tar: tar.mkdir(), "it is not a file"),
    "fifo": (os.mkfifo, "it is not a file"),
    "nothing": (lambda tar: None, "no such file"),
}


@pytest.mark.parametrize("what", REFUSED)
async def test_what_is_wrong_is_refused_and_leaves_nothing(
    node: pulling.Node, loader: load.Loader, tar: Path, what: str
) -> None:
    make, says = REFUSED[what]
    make(tar)
    error = await refusal(loader, tar)
    assert says in error.message
    assert error.code in ("INVALID_ARGUMENT", "NOT_FOUND", "UNKNOWN")
    assert node.images.list() == ()
    await node.collector.collect()
    assert node.leftovers() == []


async def test_a_path_must_be_absolute(loader: load.Loader) -> None:
    assert isinstance(await refusal(loader, Path("image.tar")), errors.InvalidArgument)


# ---- tags


async def test_a_tag_moves_and_a_digest_is_not_ours_to_give(
    node: pulling.Node, loader: load.Loader, tar: Path
) -> None:
    one, two = pulling.make(BASE), pulling.make(TOP)
    archives.layout(tar, ("a:1", one), ("b:1", two))
    await loader.load(str(tar))
    await loader.tag(two.id, "a:1")
    moved, left = node.images.find("a:1"), node.images.find(one.id)
    assert moved is not None
    assert left is not None
    assert (moved.id, left.repo_tags) == (two.id, ())
    with pytest.raises(errors.InvalidArgument):
        await loader.tag(two.id, f"a@{one.digest}")
    with pytest.raises(errors.NotFound):
        await loader.tag("c", "d")
