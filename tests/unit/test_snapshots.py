# SPDX-License-Identifier: Apache-2.0
"""Layer folders and writable layers: stacking, removing, counting, on full disks too."""

import concurrent.futures
import contextlib
import os
import stat
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cri_server import errors, snapshots, trees
from shim import linux, mounts

pytestmark = pytest.mark.needs("root", "overlay")


@pytest.fixture
def host(tmp_path: Path) -> Iterator[snapshots.Snapshots]:
    yield snapshots.Snapshots(tmp_path / "root")
    for point in mounts.mounts_below(str(tmp_path)):
        mounts.unmount(point)
    trees.remove(tmp_path)
    tmp_path.mkdir()


def commit(host: snapshots.Snapshots, key: str, opaque_root: str = "", **files: str) -> str:
    """Make a layer with these files in its root."""
    folder = host.staging_path()
    host.stage(folder)
    for name, text in files.items():
        (folder / "fs" / name).write_text(text)
    layer = snapshots.Layer(diff_id="sha256:x", bytes=100, inodes=2, opaque_root=bool(opaque_root))
    host.commit(folder, key, layer)
    return key


def test_layers_are_stacked_and_writes_go_to_the_top(
    host: snapshots.Snapshots, tmp_path: Path
) -> None:
    layers = [commit(host, "one", a="1", b="1"), commit(host, "two", b="2")]
    target = tmp_path / "mnt"
    host.mount("c1", layers, target)
    host.mount("c1", layers, target)  # again is fine
    assert ((target / "a").read_text(), (target / "b").read_text()) == ("1", "2")
    (target / "new").write_text("written")
    host.unmount(target)
    host.unmount(target)
    assert not os.path.ismount(target)
    assert (tmp_path / "root/writable/c1/fs/new").read_text() == "written"
    assert not (host.fs("two") / "new").exists()
    host.remove("c1")
    host.remove("c1")
    assert os.listdir(tmp_path / "root/writable") == []


def test_what_was_written_is_there_after_a_new_mount(
    host: snapshots.Snapshots, tmp_path: Path
) -> None:
    layers, target = [commit(host, "one")], tmp_path / "mnt"
    for text in ("first", "second"):
        host.mount("c1", layers, target)
        with (target / "log").open("a") as file:
            file.write(text)
        # A volatile mount leaves a mark that forbids the next one, as after a crash.
        mark = tmp_path / "root/writable/c1/work/work/incompat/volatile"
        host.unmount(target)
        mark.mkdir(parents=True, exist_ok=True)
    host.mount("c1", layers, target)
    assert (target / "log").read_text() == "firstsecond"


def test_two_containers_share_layers_and_nothing_else(
    host: snapshots.Snapshots, tmp_path: Path
) -> None:
    layers = [commit(host, "one", a="1")]
    for name in ("c1", "c2"):
        host.mount(name, layers, tmp_path / name)
    (tmp_path / "c1/a").write_text("changed")
    assert (tmp_path / "c2/a").read_text() == "1"


def test_the_root_looks_like_that_of_the_topmost_layer(
    host: snapshots.Snapshots, tmp_path: Path
) -> None:
    commit(host, "one")
    host.fs("one").chmod(0o1751)
    os.chown(host.fs("one"), 5, 6)
    host.mount("c1", ["one"], tmp_path / "mnt")
    st = (tmp_path / "mnt").stat()
    assert (stat.S_IMODE(st.st_mode), st.st_uid, st.st_gid) == (0o1751, 5, 6)


def test_an_image_without_layers_is_an_empty_overlay(
    host: snapshots.Snapshots, tmp_path: Path
) -> None:
    target = tmp_path / "mnt"
    host.mount("c1", (), target)
    assert os.listdir(target) == []
    (target / "a").write_text("x")
    fstype = subprocess.run(
        ["stat", "-f", "-c", "%T", target], check=True, capture_output=True, text=True
    )
    assert fstype.stdout.strip() == "overlayfs"
    host.mount_readonly((), tmp_path / "ro")
    assert os.listdir(tmp_path / "ro") == []


@pytest.mark.parametrize("count", [1, 2, 200])
def test_an_image_is_mounted_read_only(
    host: snapshots.Snapshots, tmp_path: Path, count: int
) -> None:
    layers = [commit(host, f"{i:064x}", **{f"f{i}": "x", "top": f"{i}"}) for i in range(count)]
    os.mknod(host.fs(layers[-1]) / "gone", stat.S_IFCHR, 0)
    target = tmp_path / "mnt"
    host.mount_readonly(layers, target, ("nosuid", "nodev"))
    assert (target / "top").read_text() == f"{count - 1}"
    assert set(os.listdir(target)) == {"top", *(f"f{i}" for i in range(count))}
    with pytest.raises(OSError, match="Read-only"):
        (target / "new").write_text("x")


def test_two_hundred_layers(host: snapshots.Snapshots, tmp_path: Path) -> None:
    layers = [commit(host, f"{i:064x}", **{f"f{i}": "x"}) for i in range(200)]
    host.mount("c1", layers, tmp_path / "mnt")
    assert len(os.listdir(tmp_path / "mnt")) == 200


def test_an_opaque_root_hides_what_is_below(host: snapshots.Snapshots, tmp_path: Path) -> None:
    layers = [commit(host, "one", a="1"), commit(host, "two", opaque_root="yes", b="2")]
    layers.append(commit(host, "three", c="3"))
    host.mount("c1", layers, tmp_path / "mnt")
    assert sorted(os.listdir(tmp_path / "mnt")) == ["b", "c"]


def test_a_missing_layer_is_said(host: snapshots.Snapshots, tmp_path: Path) -> None:
    with pytest.raises(errors.FailedPrecondition, match="pull the image again"):
        host.mount("c1", ["none"], tmp_path / "mnt")


def test_a_layer_is_committed_once(host: snapshots.Snapshots, tmp_path: Path) -> None:
    commit(host, "one", a="first")
    commit(host, "one", a="second")
    assert (host.fs("one") / "a").read_text() == "first"
    assert os.listdir(tmp_path / "root/tmp") == []


def test_two_who_commit_one_layer_at_once_keep_the_first(
    host: snapshots.Snapshots, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container may stand on the first one already."""
    both, rename, inodes = threading.Barrier(2), Path.rename, []

    def late(self: Path, target: Path) -> Path:
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.5)  # together, if nothing keeps one of them from coming
        moved = rename(self, target)
        inodes.append((target / "fs").stat().st_ino)
        return moved

    monkeypatch.setattr(Path, "rename", late)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda text: commit(host, "one", a=text), "12")) == ["one"] * 2
    assert len(inodes) == 1
    assert host.fs("one").stat().st_ino == inodes[0]


def test_half_a_layer_is_no_layer(host: snapshots.Snapshots, tmp_path: Path) -> None:
    commit(host, "one", a="1")
    (tmp_path / "root/layers/one/layer.json").unlink()
    again = snapshots.Snapshots(tmp_path / "root")
    assert again.layer("one") is None
    assert again.strays() == [tmp_path / "root/layers/one"]
    commit(again, "one", a="2")
    assert (again.fs("one") / "a").read_text() == "2"
    assert snapshots.Snapshots(tmp_path / "root").layers() == {"one"}


def test_removing_and_a_layer_of_the_same_key_at_once(
    host: snapshots.Snapshots, tmp_path: Path
) -> None:
    commit(host, "one", a="1")
    aside = host.set_aside("one")
    assert host.layer("one") is None
    commit(host, "one", a="2")
    trees.remove(aside)
    assert (host.fs("one") / "a").read_text() == "2"
    trees.remove(host.set_aside("none"))


def test_what_is_mounted_below_goes_with_it(host: snapshots.Snapshots, tmp_path: Path) -> None:
    target = tmp_path / "mnt"
    host.mount("c1", [commit(host, "one")], target)
    (target / "deep").mkdir()
    linux.mount("tmpfs", target / "deep", "tmpfs")
    (target / "deep/file").write_text("x")
    with (target / "deep/file").open():  # busy
        host.unmount(target)
    host.remove("c1")
    assert mounts.mounts_below(str(target)) == []


def test_writable_layers_are_listed_until_they_are_removed(host: snapshots.Snapshots) -> None:
    commit(host, "one")
    for name in ("c1", "c2"):
        host.create(name, ["one"])
    assert host.writables() == {"c1", "c2"}
    host.remove("c1")
    assert host.writables() == {"c2"}


def test_nobody_else_may_look_inside(host: snapshots.Snapshots, tmp_path: Path) -> None:
    """Set-user-id files of images are not for the users of the host (CVE-2021-41103)."""
    for name in ("layers", "writable", "tmp"):
        assert stat.S_IMODE((tmp_path / "root" / name).stat().st_mode) == 0o700


async def test_usage_is_what_refresh_measured(host: snapshots.Snapshots, tmp_path: Path) -> None:
    host.mount("c1", [commit(host, "one")], tmp_path / "mnt")
    assert host.usage("c1") == snapshots.Usage()
    assert host.fs_usage() == snapshots.Usage(bytes=100, inodes=2)
    (tmp_path / "mnt/file").write_bytes(os.urandom(1 << 20))
    await host.refresh()
    used = host.usage("c1")
    assert 1 << 20 <= used.bytes < (1 << 20) + 100_000
    assert used.inodes >= 2
    assert host.fs_usage().bytes > used.bytes
    host.unmount(tmp_path / "mnt")
    host.remove("c1")
    await host.refresh()
    assert host.usage("c1") == snapshots.Usage()


@pytest.fixture
def small(tmp_path: Path) -> Iterator[snapshots.Snapshots]:
    """Snapshots on a file system of 4 MiB."""
    root = tmp_path / "small"
    root.mkdir()
    linux.mount("tmpfs", root, "tmpfs", 0, "size=4m")
    yield snapshots.Snapshots(root)
    for point in mounts.mounts_below(str(tmp_path)):
        mounts.unmount(point)


def test_removing_works_on_a_full_disk(small: snapshots.Snapshots, tmp_path: Path) -> None:
    commit(small, "one", a="1")
    target = tmp_path / "mnt"
    small.mount("c1", ["one"], target)
    with pytest.raises(OSError, match="No space"):
        (target / "fill").write_bytes(bytes(8 << 20))
    small.unmount(target)
    small.remove("c1")
    trees.remove(small.set_aside("one"))
    assert os.listdir(tmp_path / "small/writable") == []
    assert os.listdir(tmp_path / "small/layers") == []
