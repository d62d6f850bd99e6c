# SPDX-License-Identifier: Apache-2.0
"""Id-mapped copies of mounts: what they show, what they pass on, and how they go."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cri_server import errors, idmap
from cri_server.pb import api_pb2 as api
from shim import linux, loop, mounts, reaper, sandbox

pytestmark = pytest.mark.needs("root", "userns")
FIRST = 300000


@pytest.fixture
def userns(tmp_path: Path) -> Iterator[str]:
    """Return a pinned user namespace."""
    path, mapping = os.fspath(tmp_path / "user"), f"0 {FIRST} 65536\n"
    wanted = sandbox.Namespaces(paths={"user": path}, sysctls={}, uid_map=mapping, gid_map=mapping)
    loop.run(sandbox.create(wanted, reaper.Reaper()))
    yield path
    sandbox.release([path])


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    folder = tmp_path / "volume"
    folder.mkdir()
    (folder / "file").write_text("content")
    os.chown(folder / "file", 5, 6)
    return folder


@pytest.fixture
def copies(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "mounts"
    yield folder
    idmap.remove(folder)


def copy(source: Path, folder: Path, name: str = "0", **fields: Any) -> idmap.Copy:
    target = os.fspath(folder / name)
    return idmap.Copy(source=os.fspath(source), target=target, what="mount '/data'", **fields)


def owner(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_uid, found.st_gid


@contextlib.contextmanager
def tmpfs(target: Path) -> Iterator[Path]:
    target.mkdir(exist_ok=True)
    linux.mount("tmpfs", os.fspath(target), "tmpfs", linux.MS_NOSUID, "mode=755")
    try:
        yield target
    finally:
        mounts.unmount(os.fspath(target))


def peers(path: Path) -> list[str]:
    """Return the propagation of what is mounted at a path."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    fields = next(f for f in (line.split(" ") for line in reversed(lines)) if f[4] == str(path))
    return [word.partition(":")[0] for word in fields[6 : fields.index("-")]]


def test_a_copy_shows_other_owners(volume: Path, copies: Path, userns: str) -> None:
    idmap.attach({"": copy(volume, copies, userns=userns)}, copies)
    assert owner(copies / "0/file") == (FIRST + 5, FIRST + 6)
    assert owner(volume / "file") == (5, 6)
    os.chown(copies / "0/file", FIRST + 7, FIRST + 8)
    assert owner(volume / "file") == (7, 8)


def test_a_plain_copy_shows_the_same(volume: Path, copies: Path) -> None:
    idmap.attach({"": copy(volume, copies)}, copies)
    assert owner(copies / "0/file") == (5, 6)


def test_a_file_is_copied_onto_a_file(volume: Path, copies: Path, userns: str) -> None:
    idmap.attach({"": copy(volume / "file", copies, userns=userns)}, copies)
    assert (copies / "0").read_text() == "content"
    idmap.remove(copies)
    assert (volume / "file").read_text() == "content"


def test_a_read_only_copy(volume: Path, copies: Path, userns: str) -> None:
    idmap.attach({"": copy(volume, copies, userns=userns, readonly=True)}, copies)
    with pytest.raises(OSError, match="Read-only"):
        (copies / "0/file").write_text("x")


@pytest.mark.parametrize("whole", [True, False])
def test_mounts_below(volume: Path, copies: Path, userns: str, whole: bool) -> None:
    with tmpfs(volume / "below") as below:
        (below / "deep").touch()
        idmap.attach({"": copy(volume, copies, userns=userns, whole=whole)}, copies)
        found = list((copies / "0/below").iterdir())
        idmap.remove(copies)
        assert [p.name for p in below.iterdir()] == ["deep"]
    assert len(found) == whole


def test_a_mount_below_that_cannot_be_mapped_is_there_as_it_is(
    volume: Path, copies: Path, userns: str
) -> None:
    (volume / "proc").mkdir()
    linux.mount("proc", os.fspath(volume / "proc"), "proc")
    try:
        with tmpfs(volume / "below"):
            lacks = idmap.attach({"/data": copy(volume, copies, userns=userns)}, copies)
            assert [(s.below, s.missing) for s in lacks["/data"]] == [("proc", False)]
            assert "proc (proc)" in lacks["/data"][0].because
            assert owner(copies / "0/proc") == (0, 0)
            assert owner(copies / "0/below") == (FIRST, FIRST)
            assert owner(copies / "0/file") == (FIRST + 5, FIRST + 6)
            idmap.remove(copies)
    finally:
        mounts.unmount(os.fspath(volume / "proc"))


def test_a_mount_below_that_nobody_could_reach_is_told(
    volume: Path, copies: Path, userns: str
) -> None:
    """Its folder is closed and belongs to ids that the pod does not have."""
    closed, hidden = volume / "closed", volume / "hidden"
    for folder in (volume / "proc", closed, hidden):
        folder.mkdir(mode=0o700)
    os.chown(closed, 70000, 70000)
    linux.mount("proc", os.fspath(volume / "proc"), "proc")
    try:
        with tmpfs(closed / "below"), tmpfs(hidden / "deep"), tmpfs(hidden):
            lacks = idmap.attach({"/data": copy(volume, copies, userns=userns)}, copies)
            idmap.remove(copies)
    finally:
        mounts.unmount(os.fspath(volume / "proc"))
    assert {s.below: s.missing for s in lacks["/data"]} == {"proc": False, "closed/below": True}
    assert sorted(p.name for p in hidden.iterdir()) == ["deep"]


def test_a_file_system_that_cannot_is_named(copies: Path, userns: str) -> None:
    with pytest.raises(
        errors.FailedPrecondition, match=r"mount '/data': /proc/sys: proc"
    ) as caught:
        idmap.attach({"": copy(Path("/proc/sys"), copies, userns=userns)}, copies)
    assert "userns_options" in str(caught.value)
    assert list(copies.iterdir()) == []


def test_a_symlink_that_has_come_in_is_refused(
    volume: Path, copies: Path, userns: str, tmp_path: Path
) -> None:
    (tmp_path / "moved").symlink_to(volume)
    for path in (tmp_path / "moved", tmp_path / "moved/file"):
        with pytest.raises(OSError, match="symbolic links"):
            idmap.attach({"": copy(path, copies, userns=userns)}, copies)
        copies.rmdir()


@pytest.mark.parametrize("shared_below", [True, False])
@pytest.mark.parametrize("slave", [True, False])
def test_no_unmount_reaches_the_host(
    tmp_path: Path, userns: str, slave: bool, shared_below: bool
) -> None:
    """Also where our folder is on a shared mount, as /run is on hosts with systemd."""
    with tmpfs(tmp_path / "state") as state, tmpfs(tmp_path / "shared") as shared:
        if shared_below:
            linux.mount(None, os.fspath(state), flags=linux.MS_SHARED)
        linux.mount(None, os.fspath(shared), flags=linux.MS_SHARED)
        with tmpfs(shared / "early") as early:
            folder = state / "mounts"
            idmap.attach({"": copy(shared, folder, userns=userns, slave=slave)}, folder)
            assert peers(folder / "0") == (["master"] if slave else [])
            with tmpfs(shared / "late") as late:
                (late / "file").touch()
                assert len(list((folder / "0/late").iterdir())) == slave
                idmap.remove(folder)
                assert (late / "file").exists()
            assert os.path.ismount(early)


def test_remove_takes_what_it_finds_and_no_more(volume: Path, copies: Path, userns: str) -> None:
    idmap.remove(copies)
    idmap.attach({str(n): copy(volume, copies, str(n), userns=userns) for n in range(3)}, copies)
    idmap.remove(copies)
    idmap.remove(copies)
    assert not copies.exists()
    assert (volume / "file").exists()
    copies.mkdir()
    (copies / "folder").mkdir()
    (copies / "folder/precious").touch()
    with pytest.raises(OSError, match="not empty"):
        idmap.remove(copies)
    (copies / "folder/precious").unlink()


def test_remove_finds_mounts_through_a_symlink(
    volume: Path, tmp_path: Path, userns: str, copies: Path
) -> None:
    """/var/run is one."""
    (tmp_path / "link").symlink_to(tmp_path)
    idmap.attach({"": copy(volume, copies, userns=userns)}, tmp_path / "link/mounts")
    idmap.remove(tmp_path / "link/mounts")
    assert not copies.exists()
    assert (volume / "file").exists()


def test_flags_that_stay(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "memory") as memory:
        assert idmap.locked(os.fspath(memory)) == ("nosuid",)


def test_a_source_with_mounts_in_it_is_not_flat(tmp_path: Path, volume: Path) -> None:
    idmap.check_flat([os.fspath(volume)], "crun")
    with tmpfs(volume / "below"):
        idmap.check_flat([os.fspath(volume / "below")], "crun")
        with pytest.raises(errors.FailedPrecondition, match="crun"):
            idmap.check_flat([os.fspath(tmp_path), os.fspath(volume)], "crun")


def test_the_copies_of_a_container() -> None:
    mapping = [api.IDMapping(host_id=FIRST, length=9)]
    mapped: dict[str, Any] = {"uidMappings": mapping, "gidMappings": mapping}
    slave = api.PROPAGATION_HOST_TO_CONTAINER
    config = api.ContainerConfig(
        mounts=[
            api.Mount(host_path="/l/a", container_path="/a", **mapped),
            api.Mount(host_path="/b", container_path="/b"),
            api.Mount(host_path="/c", container_path="/c", propagation=slave, **mapped),
            api.Mount(image=api.ImageSpec(image="i"), container_path="/i", **mapped),
        ]
    )
    sources = {"/l/a": "/real/a", "/b": "/b", "/c": "/c", "image i": "/i"}
    found = idmap.of_container(config, Path("/f"), sources=sources, userns="/ns/user")
    assert [(c.source, c.target, c.slave) for c in found.values()] == [
        ("/real/a", "/f/0", False),
        ("/c", "/f/1", True),
    ]
    assert list(found) == ["/a", "/c"]


@pytest.mark.needs("overlay")
def test_an_overlay_keeps_the_owners_of_its_layers(tmp_path: Path, userns: str) -> None:
    lower = []
    for name in ("one", "two"):
        folder = tmp_path / "layers" / name / "fs"
        folder.mkdir(parents=True)
        (folder / name).touch()
        lower.append(os.fspath(folder))
    for name in ("upper", "work", "merged"):
        (tmp_path / name).mkdir()
    with idmap.layers(lower, userns, tmp_path / "at") as shown:
        upper, work = (os.fspath(tmp_path / name) for name in ("upper", "work"))
        mounts.overlay(shown, upper, work, os.fspath(tmp_path / "merged"))
    try:
        assert not (tmp_path / "at").exists()
        assert owner(tmp_path / "merged/one") == owner(tmp_path / "merged/two") == (FIRST, FIRST)
        (tmp_path / "merged/one").write_text("changed")
        assert owner(tmp_path / "upper/one") == (FIRST, FIRST)
        assert owner(tmp_path / "layers/one/fs/one") == (0, 0)
        assert (tmp_path / "layers/one/fs/one").read_text() == ""
    finally:
        mounts.unmount(os.fspath(tmp_path / "merged"))
