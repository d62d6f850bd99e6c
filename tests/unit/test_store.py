# SPDX-License-Identifier: Apache-2.0
"""Image records: names, ids, tags that move, restarts and damaged files."""

import concurrent.futures
import dataclasses
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from cri_server import errors, spec
from cri_server.images import store

A, B = "a" * 64, "ab" + "c" * 62
DIGEST = "sha256:" + "d" * 64
TAG = "docker.io/library/nginx:latest"


def image(hexes: str, *tags: str, digest: str = DIGEST) -> store.Image:
    return store.Image(
        id=f"sha256:{hexes}",
        repo_tags=tags,
        repo_digests=(f"docker.io/library/nginx@{digest}",),
        size=10,
        config=spec.ImageConfig(user="www:www", env=("A=1",), labels={"k": "v"}, volumes=("/v",)),
        platform="linux/amd64",
        layers=("1" * 64,),
        blobs=(digest,),
    )


@pytest.fixture
def images(tmp_path: Path) -> store.Store:
    return store.Store(tmp_path)


@pytest.mark.parametrize(
    "wanted",
    [
        f"sha256:{A}",
        A,
        "sha256:aaa",
        "aaaa",
        TAG,
        "nginx",
        "nginx:latest",
        "library/nginx",
        "index.docker.io/library/nginx",
        f"nginx@{DIGEST}",
        f"nginx:other@{DIGEST}",
        f"docker.io/library/nginx@{DIGEST}",
    ],
)
def test_an_image_is_found_by_every_name(images: store.Store, wanted: str) -> None:
    images.put(image(A, TAG))
    found = images.find(wanted)
    assert found is not None
    assert found.id == f"sha256:{A}"


@pytest.mark.parametrize(
    "wanted", ["", "aa", "sha256:", "b" * 64, "other", "nginx:1", "no such", "../x", "a" * 5000]
)
def test_other_names_find_nothing(images: store.Store, wanted: str) -> None:
    images.put(image(A, TAG))
    assert images.find(wanted) is None


@pytest.mark.parametrize("prefix", ["abc", "sha256:abc"])
def test_a_prefix_of_two_ids_is_ambiguous(images: store.Store, prefix: str) -> None:
    images.put(image("abc" + "1" * 61, TAG))
    images.put(image("abc" + "2" * 61, "docker.io/library/b:1"))
    for use in (images.find, images.remove):
        with pytest.raises(errors.InvalidArgument, match=f"{prefix}.* ambiguous"):
            use(prefix)
    assert len(images.list()) == 2
    assert images.find(f"{prefix}1") is not None


def test_a_name_that_looks_like_a_prefix_wins(images: store.Store) -> None:
    images.put(image(A, TAG))
    images.put(image(B, "docker.io/library/aaa:latest"))
    found = images.find("aaa")
    assert found is not None
    assert found.id == f"sha256:{B}"


def test_a_record_survives_a_restart(images: store.Store, tmp_path: Path) -> None:
    before = images.put(image(A, TAG))
    assert store.Store(tmp_path).list() == (before,)


def test_a_tag_moves_and_the_old_image_stays_with_its_digest(
    images: store.Store, tmp_path: Path
) -> None:
    images.put(image(A, TAG, "docker.io/library/nginx:1"))
    images.put(image(B, TAG, digest="sha256:" + "e" * 64))
    for each in (images, store.Store(tmp_path)):
        old, new = each.find(A), each.find("nginx")
        assert old is not None
        assert new is not None
        assert new.id == f"sha256:{B}"
        assert old.repo_tags == ("docker.io/library/nginx:1",)
        assert old.repo_digests == (f"docker.io/library/nginx@{DIGEST}",)


def test_an_image_without_a_tag_is_listed(images: store.Store) -> None:
    images.put(image(A, TAG))
    images.put(image(B, TAG, digest="sha256:" + "e" * 64))
    assert [i.repo_tags for i in images.list() if i.id == f"sha256:{A}"] == [()]
    assert images.find(f"nginx@{DIGEST}") is not None


def test_after_a_crash_between_two_records_the_newer_one_has_the_tag(tmp_path: Path) -> None:
    first = store.Store(tmp_path)
    first.put(image(A, TAG))
    old = next((tmp_path / "images").iterdir())
    kept = old.read_bytes()
    first.put(image(B, TAG, digest="sha256:" + "e" * 64))
    old.write_bytes(kept)  # as if the second file had never been written
    found = store.Store(tmp_path).find(TAG)
    assert found is not None
    assert found.id == f"sha256:{B}"


def test_names_add_up(images: store.Store) -> None:
    images.put(image(A, TAG))
    other = dataclasses.replace(
        image(A, "b.io/x:1"), repo_digests=(f"b.io/x@{DIGEST}",), blobs=("sha256:" + "e" * 64,)
    )
    both = images.put(other)
    assert both.repo_tags == (TAG, "b.io/x:1")
    assert len(both.repo_digests) == 2
    assert len(both.blobs) == 2
    assert len(images.list()) == 1


def test_removing_takes_all_names_and_can_be_repeated(images: store.Store, tmp_path: Path) -> None:
    images.put(image(A, TAG, "b.io/x:1"))
    assert images.remove("b.io/x:1") is not None
    assert images.remove("b.io/x:1") is None
    assert images.find(TAG) is None
    assert images.list() == store.Store(tmp_path).list() == ()


def test_removing_at_the_same_time(images: store.Store) -> None:
    images.put(image(A, TAG))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        done = list(pool.map(images.remove, [TAG, A, "nginx", "aaa"] * 8))
    assert len([d for d in done if d is not None]) == 1


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: b"", id="empty"),
        pytest.param(lambda data: data[:50], id="cut"),
        pytest.param(lambda data: b"[" * 100_000, id="deep"),
        pytest.param(lambda data: data.replace(b'"version":1', b'"version":99'), id="version"),
        pytest.param(lambda data: data.replace(b"aaaaaaaa", b"../../..", 1), id="other id"),
        pytest.param(lambda data: b'{"version":1,"tagged_at":0,"image":null}', id="null"),
    ],
)
def test_a_damaged_record_is_set_aside(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    first = store.Store(tmp_path)
    first.put(image(A, TAG))
    first.put(image(B, "b.io/x:1", digest="sha256:" + "e" * 64))
    path = tmp_path / "images" / f"{A}.json"
    path.write_bytes(damage(path.read_bytes()))
    again = store.Store(tmp_path)
    assert [i.id for i in again.list()] == [f"sha256:{B}"]
    assert path.with_suffix(".broken").exists()


def test_a_symlink_in_place_of_a_record_is_harmless(tmp_path: Path) -> None:
    store.Store(tmp_path)
    (tmp_path / "images" / f"{A}.json").symlink_to("/nonexistent")
    assert store.Store(tmp_path).list() == ()


def test_pinned_by_globs(tmp_path: Path) -> None:
    images = store.Store(tmp_path, pinned=("*/nginx:*", "exact.io/x:1"))
    assert images.put(image(A, TAG)).pinned
    unpinned = dataclasses.replace(image("c" * 64, "b.io/y:2"), repo_digests=())
    assert not images.put(unpinned).pinned
    assert images.put(dataclasses.replace(unpinned, repo_tags=("exact.io/x:1",))).pinned
    found = store.Store(tmp_path).find(A)
    assert found is not None
    assert not found.pinned  # a matter of the configuration, not of the record


def test_sync_comes_before_the_name(images: store.Store, tmp_path: Path) -> None:
    seen: list[list[Path]] = []
    images.put(image(A, TAG), sync=lambda: seen.append(list((tmp_path / "images").iterdir())))
    assert seen == [[]]


def test_a_record_and_its_name_are_on_the_disk_after_a_sync(
    images: store.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    images.put(image(A, TAG), sync=lambda: None)
    folder = tmp_path / "images"
    assert synced == [str(folder / f"{A}.json"), str(folder)]
    images.put(image(A, "b.io/x:1"))
    assert len(synced) == 2


def test_nobody_waits_for_a_sync(images: store.Store) -> None:
    images.put(image(A, TAG))
    syncing, go_on = threading.Event(), threading.Event()

    def slow() -> None:
        syncing.set()
        assert go_on.wait(20)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        putting = pool.submit(images.put, image(B, TAG), sync=slow)
        assert syncing.wait(20)
        assert pool.submit(images.remove, A).result(timeout=10) is not None
        go_on.set()
        assert putting.result(timeout=20).repo_tags == (TAG,)
    assert [i.id for i in images.list()] == [f"sha256:{B}"]


def test_a_tag_is_on_one_image_even_when_a_record_cannot_be_written(
    images: store.Store, tmp_path: Path
) -> None:
    images.put(image(A, TAG, "b.io/x:1"))
    old = tmp_path / "images" / f"{A}.json"
    kept = old.read_bytes()
    old.unlink()
    old.mkdir()  # no file can be renamed to this
    assert images.put(image(B, TAG, digest="sha256:" + "e" * 64)).repo_tags == (TAG,)
    assert {i.id: i.repo_tags for i in images.list()} == {
        f"sha256:{A}": ("b.io/x:1",),
        f"sha256:{B}": (TAG,),
    }
    old.rmdir()
    old.write_bytes(kept)
    again = store.Store(tmp_path)
    assert all(again.find(i.id) == i for i in images.list())


def test_a_document_that_is_damaged_is_replaced(images: store.Store) -> None:
    images.write_blob(DIGEST, b"{}")
    images.blob_path(DIGEST).write_bytes(b"{")
    images.write_blob(DIGEST, b"{}")
    assert images.read_blob(DIGEST) == b"{}"


def test_a_failure_leaves_no_image_and_no_file(images: store.Store, tmp_path: Path) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="space"):
        images.put(image(A, TAG), sync=full)
    assert images.list() == ()
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
