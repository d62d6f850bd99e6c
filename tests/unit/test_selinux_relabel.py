# SPDX-License-Identifier: Apache-2.0
"""Labels of files: the attribute can be set on any kernel, so the walk is tested for real."""

import os
from pathlib import Path

import pytest

from cri_server import errors, selinux_relabel
from shim import mounts

pytestmark = pytest.mark.needs("root")

LABEL = "system_u:object_r:container_file_t:s0:c1,c2"


def label_of(path: Path) -> str:
    """Return LABEL if the file has it, else "": with SELinux every file has one."""
    try:
        found = (
            os.getxattr(path, selinux_relabel.ATTRIBUTE, follow_symlinks=False)
            .decode()
            .rstrip("\0")
        )
    except OSError:
        return ""
    return found if found == LABEL else ""


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    volume = tmp_path / "volume"
    (volume / "deep/deeper").mkdir(parents=True)
    (volume / "file").touch()
    (volume / "deep/deeper/file").touch()
    os.mkfifo(volume / "deep/fifo")
    return volume.resolve()


def test_a_volume_is_labelled_with_all_that_is_in_it(volume: Path) -> None:
    assert selinux_relabel.relabel(os.fspath(volume), LABEL)
    assert {label_of(p) for p in (volume, *volume.rglob("*"))} == {LABEL}


def test_a_file_alone_is_labelled(volume: Path) -> None:
    assert selinux_relabel.relabel(os.fspath(volume / "file"), LABEL)
    assert (label_of(volume / "file"), label_of(volume)) == (LABEL, "")


def test_no_symlink_is_followed(volume: Path, tmp_path: Path) -> None:
    canary = tmp_path / "host"
    canary.mkdir()
    (canary / "file").touch()
    (volume / "link").symlink_to(canary)
    (volume / "deep/file-link").symlink_to(canary / "file")
    selinux_relabel.relabel(os.fspath(volume), LABEL)
    assert (label_of(canary), label_of(canary / "file")) == ("", "")
    assert label_of(volume / "link") == LABEL
    way = tmp_path / "way"
    way.symlink_to(canary)
    for path in (way, way / "file"):
        with pytest.raises(errors.InvalidArgument, match=r"selinux_relabel: .*symbolic links"):
            selinux_relabel.relabel(os.fspath(path), LABEL)
    assert (label_of(canary), label_of(canary / "file")) == ("", "")


def test_a_mount_in_a_volume_is_not_entered(volume: Path) -> None:
    inner = volume / "deep/deeper"
    plan = mounts.Mount(type="tmpfs", source="x", target=os.fspath(inner), options=("size=64k",))
    plan.mount()
    try:
        (inner / "other").touch()
        selinux_relabel.relabel(os.fspath(volume), LABEL)
        assert label_of(inner / "other") == ""
    finally:
        mounts.unmount(os.fspath(inner))
    assert label_of(volume / "deep") == LABEL
    assert label_of(inner / "file") == ""


def test_what_has_the_label_is_not_touched_again(volume: Path) -> None:
    selinux_relabel.relabel(os.fspath(volume), LABEL)
    before = {p: p.lstat().st_ctime_ns for p in (volume, *volume.rglob("*"))}
    (volume / "new").touch()
    before[volume] = volume.lstat().st_ctime_ns
    selinux_relabel.relabel(os.fspath(volume), LABEL)
    assert {p: p.lstat().st_ctime_ns for p in before} == before
    assert label_of(volume / "new") == LABEL


@pytest.mark.parametrize(
    "path",
    ["/", "/etc", "/etc/hosts", "/usr", "/usr/share/x", "/home", "/home/me", "/var", "/var/lib",
     "/var/log", "/root", "/tmp", "/run", "/bin", "/lib64/x", "/proc/1", "/sys", "/dev/shm",
     "/opt"],
)  # fmt: skip
def test_the_systems_own_folders_are_refused(path: str) -> None:
    with pytest.raises(errors.InvalidArgument, match="belongs to the system"):
        selinux_relabel.check(path)


@pytest.mark.parametrize("path", ["/data", "/srv/x", "/home/me/x", "/var/lib/kubelet", "/usrx"])
def test_other_folders_are_not(path: str) -> None:
    selinux_relabel.check(path)


def test_a_volume_that_vanished_is_named(tmp_path: Path) -> None:
    with pytest.raises(errors.InvalidArgument, match=r"gone.*No such file"):
        selinux_relabel.relabel(os.fspath(tmp_path.resolve() / "gone"), LABEL)


def test_a_folder_that_bears_its_label_is_not_walked_again(volume: Path) -> None:
    selinux_relabel.once(os.fspath(volume), LABEL)
    assert label_of(volume / "deep/deeper/file") == LABEL
    later = volume / "file"
    os.setxattr(later, selinux_relabel.ATTRIBUTE, b"system_u:object_r:container_file_t:s0")
    selinux_relabel.once(os.fspath(volume), LABEL)
    assert label_of(later) == ""


def test_a_folder_that_cannot_be_labelled_is_no_error(volume: Path) -> None:
    selinux_relabel.once(os.fspath(volume / "missing"), LABEL)
    selinux_relabel.once("/usr", LABEL)
    assert label_of(Path("/usr")) == ""
