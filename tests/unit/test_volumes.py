# SPDX-License-Identifier: Apache-2.0
"""A VOLUME is a faithful copy of what the image has there, and of nothing else."""

import os
import socket
import stat
from pathlib import Path

import pytest

from cri_server import trees, volumes

pytestmark = pytest.mark.needs("root")
CAPABILITY = bytes.fromhex("0100000200200000000000000000000000000000")  # cap_net_raw+ep


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    folder.mkdir()
    return folder


def make(root: Path, *paths: str, covered: tuple[str, ...] = ()) -> dict[str, str]:
    return volumes.make(str(root), paths, root.parent / "volumes", covered=covered)


def facts(path: Path) -> tuple[int, ...]:
    st = path.lstat()
    return (st.st_mode, st.st_uid, st.st_gid, st.st_rdev, st.st_mtime_ns)


def test_every_kind_of_file_is_copied_with_its_attributes(root: Path) -> None:
    data = root / "data"
    (data / "sub").mkdir(parents=True)
    (data / "file").write_bytes(b"content")
    (data / "program").write_bytes(b"#!")
    (data / "link").symlink_to("/etc/shadow")
    os.mkfifo(data / "fifo")
    os.mknod(data / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(data / "socket"))
    for number, name in enumerate(["sub", "file", "program", "link", "fifo", "null", "socket", ""]):
        os.chown(data / name, 1000 + number, 2000 + number, follow_symlinks=False)
    (data / "program").chmod(0o6755)
    (data / "null").chmod(0o606)
    (data / "sub").chmod(0o3777)
    data.chmod(0o2750)
    os.setxattr(data / "program", "security.capability", CAPABILITY)
    os.setxattr(data / "sub", "user.note", b"x")
    for number, name in enumerate(["sub", "file", "program", "link", "fifo", "null", "socket", ""]):
        when = 10**18 + number
        os.utime(data / name, ns=(when, when), follow_symlinks=False)
    copy = Path(make(root, "/data")["/data"])
    names = sorted(["", *os.listdir(data)])
    assert sorted(["", *os.listdir(copy)]) == names
    assert {n: facts(copy / n) for n in names} == {n: facts(data / n) for n in names}
    assert (copy / "file").read_bytes() == b"content"
    assert (copy / "link").readlink() == Path("/etc/shadow")
    assert os.getxattr(copy / "program", "security.capability") == CAPABILITY
    assert os.getxattr(copy / "sub", "user.note") == b"x"


def test_hard_links_stay_links_and_content_is_not_shared_with_the_image(root: Path) -> None:
    (root / "data/sub").mkdir(parents=True)
    (root / "data/one").write_text("1")
    os.link(root / "data/one", root / "data/sub/two")
    os.link(root / "data/one", root / "outside")
    copy = Path(make(root, "/data")["/data"])
    assert (copy / "one").stat().st_ino == (copy / "sub/two").stat().st_ino
    assert (copy / "one").stat().st_nlink == 2
    (copy / "one").write_text("changed")
    assert (root / "outside").read_text() == "1"


def test_links_on_the_way_stay_inside_and_links_below_are_not_followed(
    root: Path, tmp_path: Path
) -> None:
    (tmp_path / "canary").mkdir()
    (tmp_path / "canary/secret").write_text("secret")
    (root / "real").mkdir()
    (root / "real/out").symlink_to(tmp_path / "canary")
    (root / "way").symlink_to("../../../../real")
    (root / "host").symlink_to(tmp_path / "canary")
    made = make(root, "/way", "/host")
    inside = str(tmp_path / "canary")  # as a path in the root
    assert sorted(made) == sorted(["/real", inside])
    assert os.listdir(made[inside]) == []
    assert (Path(made["/real"]) / "out").is_symlink()
    assert os.listdir(tmp_path / "canary") == ["secret"]


def test_what_is_missing_is_an_empty_folder_and_what_is_covered_is_left_out(root: Path) -> None:
    (root / "etc").mkdir()
    made = make(root, "/new/folder", "/proc/x", "/etc", covered=("/proc", "/etc"))
    assert list(made) == ["/new/folder"]
    assert os.listdir(made["/new/folder"]) == []
    assert stat.S_IMODE(os.stat(made["/new/folder"]).st_mode) == 0o755


def test_no_volume_makes_no_folder(root: Path) -> None:
    assert make(root, "/proc", covered=("/proc",)) == {}
    assert not (root.parent / "volumes").exists()


def test_a_tree_deeper_than_any_path(root: Path) -> None:
    depth = 3000
    (root / "data").mkdir()
    here = os.open(root / "data", os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=here)
        inner = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(os.open("bottom", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    os.close(here)
    copy = make(root, "/data")["/data"]
    here = os.open(copy, os.O_RDONLY)
    for _ in range(depth):
        inner = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    assert os.listdir(here) == ["bottom"]
    os.close(here)
    trees.remove(root / "data")  # pytest's own removal recurses
    trees.remove(copy)


def test_a_copy_that_fails_leaves_no_descriptor(root: Path) -> None:
    (root / "data").mkdir()
    (root.parent / "volumes").mkdir()
    (root.parent / "volumes/0").mkdir()
    before = os.listdir("/proc/self/fd")
    with pytest.raises(FileExistsError):
        make(root, "/data")
    assert len(os.listdir("/proc/self/fd")) == len(before)
