# SPDX-License-Identifier: Apache-2.0
"""What nothing refers to goes; what somebody needs stays, whoever it is."""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cri_server import snapshots, spec, trees
from cri_server.images import gc, store
from shim import linux, mounts

ONE, TWO, THREE = (c * 64 for c in "123")
BLOB_A, BLOB_B = (f"sha256:{c * 64}" for c in "ab")


class World:
    """Stores of which `crashed` makes new ones, as a restart does."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.in_use: set[str] = set()
        self.crashed()

    def crashed(self) -> None:
        self.images = store.Store(self.root)
        self.layers = snapshots.Snapshots(self.root)
        self.collector = gc.Collector(self.images, self.layers, in_use=lambda: self.in_use)

    def layer(self, key: str) -> None:
        folder = self.layers.staging_path()
        self.layers.stage(folder)
        (folder / "fs/file").write_text(key)
        self.layers.commit(folder, key, snapshots.Layer(diff_id="x", bytes=1, inodes=1))

    def image(self, digit: str, tag: str, layers: tuple[str, ...], *blobs: str) -> None:
        for blob in blobs:
            self.images.write_blob(blob, b"{}")
        self.images.put(
            store.Image(
                id=f"sha256:{digit * 64}",
                repo_tags=(tag,),
                repo_digests=(f"r.io/x@sha256:{digit * 64}",),
                size=1,
                config=spec.ImageConfig(),
                platform="linux/amd64",
                layers=layers,
                blobs=blobs,
            )
        )

    def state(self) -> tuple[set[str], set[str], list[str]]:
        """Return layers, blobs and what is in tmp/, as on the disk."""
        blobs = {p.name for p in self.images.blobs()}
        return set(os.listdir(self.root / "layers")), blobs, os.listdir(self.root / "tmp")


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    for key in (ONE, TWO, THREE):
        made.layer(key)
    made.image("a", "r.io/a:1", (ONE, TWO), BLOB_A)
    made.image("b", "r.io/b:1", (ONE, THREE), BLOB_B, BLOB_A)
    yield made
    trees.remove(tmp_path)
    tmp_path.mkdir()


async def test_nothing_goes_while_it_is_needed(world: World) -> None:
    before = world.state()
    await world.collector.collect()
    assert world.state() == before


async def test_removing_an_image_frees_what_only_it_had(world: World) -> None:
    await world.collector.remove("r.io/a:1")
    assert world.state() == ({ONE, THREE}, {"a" * 64, "b" * 64}, [])
    await world.collector.remove("b" * 64)
    assert world.state() == (set(), set(), [])
    await world.collector.remove("b" * 64)


async def test_a_container_keeps_its_layers_without_the_image(world: World) -> None:
    world.in_use = {ONE, TWO}
    await world.collector.remove("r.io/a:1")
    await world.collector.remove("r.io/b:1")
    assert world.state() == ({ONE, TWO}, set(), [])
    world.in_use = set()
    await world.collector.collect()
    assert world.state() == (set(), set(), [])


async def test_claims_protect(world: World) -> None:
    async with world.collector.claim([ONE, BLOB_A]), world.collector.claim([ONE, THREE]):
        await world.collector.remove("r.io/a:1")
        await world.collector.remove("r.io/b:1")
        assert world.state() == ({ONE, THREE}, {"a" * 64}, [])
    await world.collector.collect()
    assert world.state() == (set(), set(), [])


async def test_removing_all_at_once(world: World) -> None:
    names = ["r.io/a:1", "r.io/b:1", "a" * 64, "b" * 64, "r.io/none:1"] * 4
    await asyncio.gather(*map(world.collector.remove, names))
    assert world.state() == (set(), set(), [])


async def test_the_start_removes_what_a_crash_left(world: World) -> None:
    tmp = world.root / "tmp"
    (tmp / "layer-half/fs/etc").mkdir(parents=True)  # killed while unpacking
    (tmp / "blob-half").write_text("x")  # while downloading
    (tmp / "record-half").write_text("{")  # while writing a record
    world.layer("6" * 64)
    world.layers.set_aside("6" * 64)  # while removing a layer
    world.layer("4" * 64)  # between a layer and the record
    world.images.write_blob("sha256:" + "c" * 64, b"{}")  # between a document and the record
    (world.root / "layers" / ("5" * 64) / "fs").mkdir(parents=True)  # half removed on a full disk
    world.crashed()
    before = ({ONE, TWO, THREE}, {"a" * 64, "b" * 64}, list[str]())
    await world.collector.start()
    assert world.state() == before
    assert {i.id[-1] for i in world.images.list()} == {"a", "b"}


SPOILT = {
    "gone": None,
    "empty": b"",
    "cut": b'{"diff_id":"x","by',
    "binary": b"\xff\xfe\x00",
    "no text": b'{"diff_id":"\xff","bytes":1,"inodes":1}',
    "list": b"[]",
    "deep": b"[" * 100_000,
    "types": b'{"diff_id":1,"bytes":"x","inodes":1}',
}


def spoil(world: World, key: str, text: bytes | None) -> None:
    note = world.root / "layers" / key / "layer.json"
    if text is None:
        note.unlink()
    else:
        note.write_bytes(text)


@pytest.mark.parametrize("text", SPOILT.values(), ids=SPOILT)
async def test_a_spoilt_layer_stays_under_its_containers_and_a_pull_heals_it(
    world: World, text: bytes | None
) -> None:
    inside = world.layers.fs(TWO) / "file"
    inode = inside.stat().st_ino
    spoil(world, TWO, text)
    world.in_use = {ONE, TWO}
    world.crashed()
    await world.collector.start()
    assert inside.stat().st_ino == inode
    assert [i.id[-1] for i in world.images.list()] == ["b"]  # so that it is pulled again
    world.layer(TWO)
    world.image("a", "r.io/a:1", (ONE, TWO), BLOB_A)
    assert inside.exists()
    if text is not None:  # else it was half removed on a full disk
        assert inside.stat().st_ino == inode
    world.crashed()
    assert world.layers.layer(TWO) is not None
    await world.collector.start()
    assert {i.id[-1] for i in world.images.list()} == {"a", "b"}


@pytest.mark.parametrize("text", SPOILT.values(), ids=SPOILT)
async def test_a_spoilt_layer_that_nobody_uses_goes_with_its_images(
    world: World, text: bytes | None
) -> None:
    spoil(world, TWO, text)
    world.crashed()
    await world.collector.start()
    assert world.state() == ({ONE, THREE}, {"a" * 64, "b" * 64}, [])
    assert [i.id[-1] for i in world.images.list()] == ["b"]


async def test_what_an_image_left_to_its_containers_goes_with_them(world: World) -> None:
    world.in_use = {ONE, TWO}
    await world.collector.remove("r.io/a:1")
    await world.collector.collect_owed()
    assert world.state()[0] == {ONE, TWO, THREE}
    world.in_use = {ONE}
    await world.collector.collect_owed()
    assert world.state()[0] == {ONE, THREE}


async def test_nothing_is_looked_at_when_no_image_went_early(world: World) -> None:
    world.in_use = {ONE}
    await world.collector.start()
    world.layer("4" * 64)  # would be seen by a look
    await world.collector.collect_owed()
    assert "4" * 64 in world.state()[0]


@pytest.mark.needs("root")
async def test_a_failure_does_not_stop_the_rest(world: World) -> None:
    """A mount in a layer cannot be removed, and is not entered; what is beside it goes."""
    inside = world.layers.fs(TWO) / "deep"
    await asyncio.to_thread(inside.mkdir)
    linux.mount("tmpfs", inside, "tmpfs")
    await world.collector.remove("r.io/a:1")
    await world.collector.remove("r.io/b:1")
    layers, blobs, left = world.state()
    assert (layers, blobs, len(left)) == (set(), set(), 1)
    for point in mounts.mounts_below(str(world.root)):
        mounts.unmount(point)
    await world.collector.start()
    assert world.state() == (set(), set(), [])
