# SPDX-License-Identifier: Apache-2.0
"""Users, mount targets and folders in the root of a hostile image, with a canary outside it."""

import itertools
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from cri_server import errors, rootfs, spec
from tests.lab import wishes

PASSWD = """\
root:x:0:0:root:/root:/bin/sh
# comment:x:0:0
broken line
short:x:1
web:x:33:34:web:/var/www:/bin/false
bad:x:4294967296:0::/:
badgroup:x:40:-1::/:
wild:x:99999999999999999999:0::/:
nohome:x:50:51
evil:x:60:60::/root\x1b[2J:
"""
GROUP = """\
root:x:0:
web:x:34:
extra:x:3000:other,web
more:x:3001:web
huge:x:4294967296:hugemember
text:x:abc:
"""
Request = spec.UserRequest


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return the root of an image; its folder's parent holds the canary."""
    (tmp_path / "canary").write_text("untouched")
    root = tmp_path / "rootfs"
    (root / "etc").mkdir(parents=True)
    (root / "etc/passwd").write_text(PASSWD)
    (root / "etc/group").write_text(GROUP)
    return root


def outside(root: Path) -> list[str]:
    return sorted(os.listdir(root.parent))


def user(uid: int, gid: int, *extra: int, home: str = "/") -> spec.User:
    return spec.User(uid=uid, gid=gid, additional_gids=(gid, *extra), home=home)


# -- users -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (Request(uid=0), user(0, 0, home="/root")),
        (Request(uid=33), user(33, 34, 3000, 3001, home="/var/www")),
        (Request(name="web"), user(33, 34, 3000, 3001, home="/var/www")),
        (Request(name="web", gid=7), user(33, 7, 3000, 3001, home="/var/www")),
        (Request(name="web", group="extra"), user(33, 3000, 3001, home="/var/www")),
        (Request(name="web", strict=True), user(33, 34, home="/var/www")),
        (
            Request(name="web", strict=True, supplemental=(9, 34, 9)),
            user(33, 34, 9, home="/var/www"),
        ),
        (
            Request(uid=33, supplemental=(9, 3000)),
            user(33, 34, 9, 3000, 3001, home="/var/www"),
        ),
        (Request(uid=12345), user(12345, 0)),
        (Request(uid=12345, gid=6, supplemental=(7,)), user(12345, 6, 7)),
        (Request(uid=12345, group="web"), user(12345, 34)),
        (Request(uid=50), user(50, 51)),
        (Request(uid=60), user(60, 60)),
        (Request(uid=2**31 - 1), user(2**31 - 1, 0)),
    ],
    ids=itertools.count(),
)
def test_a_user_is_resolved_by_the_images_own_files(
    root: Path, wanted: spec.UserRequest, expected: spec.User
) -> None:
    assert rootfs.resolve_user(str(root), wanted) == expected


@pytest.mark.parametrize(
    "wanted",
    [
        Request(name="nobody-here"),
        Request(name="short"),
        Request(name="bad"),
        Request(name="wild"),
        Request(name="badgroup"),
        Request(uid=40),
        Request(name="web", group="nogroup"),
        Request(name="web", group="huge"),
        Request(name="web", group="text"),
    ],
    ids=itertools.count(),
)
def test_what_is_not_there_or_is_no_number_is_refused(root: Path, wanted: spec.UserRequest) -> None:
    with pytest.raises(errors.InvalidArgument, match="image"):
        rootfs.resolve_user(str(root), wanted)


def test_a_membership_with_a_number_that_wraps_is_refused(root: Path) -> None:
    with (root / "etc/passwd").open("a") as file:
        file.write("hugemember:x:70:70::/:\n")
    with pytest.raises(errors.InvalidArgument, match="group"):
        rootfs.resolve_user(str(root), Request(name="hugemember"))
    assert rootfs.resolve_user(str(root), Request(name="hugemember", strict=True)).gid == 70


def test_an_image_without_files_has_numbers_only(root: Path) -> None:
    (root / "etc/passwd").unlink()
    (root / "etc/group").unlink()
    assert rootfs.resolve_user(str(root), Request(uid=5)) == user(5, 0)
    with pytest.raises(errors.InvalidArgument, match="root"):
        rootfs.resolve_user(str(root), Request(name="root"))
    (root / "etc").rmdir()
    (root / "etc").touch()
    assert rootfs.resolve_user(str(root), Request(uid=5)) == user(5, 0)


def test_links_inside_the_image_are_followed_and_never_out_of_it(root: Path) -> None:
    (root / "usr").mkdir()
    (root / "etc/passwd").rename(root / "usr/passwd")
    (root / "etc/passwd").symlink_to("/usr/passwd")
    assert rootfs.resolve_user(str(root), Request(name="web")).uid == 33
    (root / "etc/passwd").unlink()
    (root.parent / "passwd").write_text("outside:x:0:0::/:\n")
    (root / "etc/passwd").symlink_to("../../passwd")
    with pytest.raises(errors.InvalidArgument, match="outside"):
        rootfs.resolve_user(str(root), Request(name="outside"))


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(path))


def _folder(path: Path) -> None:
    path.mkdir()


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


def _huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(rootfs.PASSWD_LIMIT + 1)


@pytest.mark.parametrize("name", ["passwd", "group"])
@pytest.mark.parametrize("make", [_fifo, _socket, _folder, _loop, _huge])
def test_a_file_that_bites_is_refused_even_when_nothing_is_looked_up(
    root: Path, name: str, make: Callable[[Path], None]
) -> None:
    """A FIFO would hang the OCI runtime for ever, a device would feed it for ever."""
    (root / "etc" / name).unlink()
    make(root / "etc" / name)
    with pytest.raises(errors.InvalidArgument, match=name):
        rootfs.resolve_user(str(root), Request(uid=1000, gid=1000))


def test_a_magic_link_is_just_a_name(root: Path) -> None:
    (root / "etc/passwd").unlink()
    (root / "etc/passwd").symlink_to("/proc/self/exe")
    assert rootfs.resolve_user(str(root), Request(uid=5)) == user(5, 0)


@pytest.mark.needs("root")
def test_a_device_is_refused_without_being_opened(root: Path) -> None:
    (root / "etc/group").unlink()
    os.mknod(root / "etc/group", stat.S_IFCHR | 0o666, os.makedev(1, 5))
    with pytest.raises(errors.InvalidArgument, match="regular"):
        rootfs.resolve_user(str(root), Request(uid=0))


# -- mount targets ---------------------------------------------------------------------------------


def bound(target: str, source: str = "/h") -> spec.oci.Mount:
    return spec.oci.Mount(destination=target, type="bind", source=source, options=["rbind"])


def targets(root: Path, *wanted: spec.oci.Mount, files: frozenset[str] = frozenset()) -> list[str]:
    defaults = spec.container(wishes.given())["mounts"]
    made = rootfs.make_mountpoints(str(root), [*defaults, *wanted], files=files)
    return [m["destination"] for m in made[len(defaults) :]]


def test_missing_targets_become_folders_or_files_like_their_sources(root: Path) -> None:
    old = os.umask(0)
    try:
        found = targets(root, bound("/a/b/c"), bound("/etc/hosts", "/f"), files=frozenset({"/f"}))
    finally:
        os.umask(old)
    assert found == ["/a/b/c", "/etc/hosts"]
    assert stat.S_IMODE((root / "a/b/c").stat().st_mode) == 0o755
    assert stat.S_IMODE((root / "etc/hosts").stat().st_mode) == 0o644
    assert {p.name for p in root.iterdir()} == {"a", "dev", "etc", "proc", "sys"}
    assert not list((root / "dev").iterdir())
    assert (
        targets(root, bound("/a/b/c"), bound("/etc/hosts", "/f"), files=frozenset({"/f"})) == found
    )


def test_options_and_sources_are_kept(root: Path) -> None:
    mount = bound("/data", "/source")
    assert rootfs.make_mountpoints(str(root), [mount], files=set()) == [mount]


@pytest.mark.parametrize(
    ("links", "target", "expected"),
    [
        ({"var/run": "/run"}, "/var/run/secrets/x", "/run/secrets/x"),
        ({"var/run": "../run"}, "/var/run/secrets/x", "/run/secrets/x"),
        ({"a": "b", "b": "c"}, "/a/x", "/c/x"),
        ({"etc/resolv.conf": "../run/systemd/stub"}, "/etc/resolv.conf", "/run/systemd/stub"),
        ({"out": "/../../../.."}, "/out/x", "/x"),
        ({"out": "../../../../.."}, "/out/x", "/x"),
        ({"here": "."}, "/here/here/x", "/x"),
    ],
    ids=itertools.count(),
)
def test_links_are_resolved_inside_the_root(
    root: Path, links: dict[str, str], target: str, expected: str
) -> None:
    for name, to in links.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).symlink_to(to)
    before = outside(root)
    assert targets(root, bound(target)) == [expected]
    assert (root / expected.lstrip("/")).is_dir()
    assert outside(root) == before


def test_what_lies_below_an_earlier_mount_is_left_alone(root: Path) -> None:
    (root / "data").mkdir()
    (root / "data/link").symlink_to("/elsewhere")
    (root / "alias").symlink_to("data")
    found = targets(root, bound("/data"), bound("/data/link/x"), bound("/alias/y"), bound("/dev/z"))
    assert found == ["/data", "/data/link/x", "/data/y", "/dev/z"]
    assert sorted(os.listdir(root / "data")) == ["link"]
    assert not (root / "elsewhere").exists()


@pytest.mark.parametrize("name", ["dev", "proc", "sys"])
@pytest.mark.parametrize("absolute", [True, False])
def test_a_kernel_folder_that_is_a_link_is_refused(root: Path, name: str, absolute: bool) -> None:
    """An OCI runtime follows it on the host, before it changes its root (CVE-2026-41579)."""
    victim = root.parent / "victim"
    victim.mkdir()
    (root / name).symlink_to(victim if absolute else "../victim")
    with pytest.raises(errors.InvalidArgument, match=name):
        targets(root, bound("/data"))
    assert not list(victim.iterdir())


@pytest.mark.parametrize("name", ["dev", "proc", "sys"])
def test_a_kernel_folder_that_is_a_file_is_refused(root: Path, name: str) -> None:
    (root / name).touch()
    with pytest.raises(errors.InvalidArgument, match=name):
        targets(root)


@pytest.mark.parametrize("to", ["/proc/self", "/sys/fs", "/dev/shm", "proc/1/root"])
def test_an_image_cannot_lead_a_mount_into_a_kernel_folder(root: Path, to: str) -> None:
    (root / "data").symlink_to(to)
    with pytest.raises(errors.InvalidArgument, match="leads"):
        targets(root, bound("/data/x"))


def test_a_target_of_the_wrong_kind_is_refused(root: Path) -> None:
    (root / "file").touch()
    (root / "folder").mkdir()
    _fifo(root / "fifo")
    wrong = [
        ("/file", "/h"),
        ("/file/below", "/h"),
        ("/folder", "/f"),
        ("/fifo", "/f"),
        ("/fifo", "/h"),
    ]
    for target, source in wrong:
        with pytest.raises(errors.InvalidArgument, match="in the image is not a"):
            targets(root, bound(target, source), files=frozenset({"/f"}))


def test_a_loop_of_links_is_refused(root: Path) -> None:
    (root / "a").symlink_to("b")
    (root / "b").symlink_to("a")
    with pytest.raises(errors.InvalidArgument, match="symlinks"):
        targets(root, bound("/a/x"))


def test_a_link_to_a_name_that_cannot_be_is_refused(root: Path) -> None:
    (root / "a").symlink_to("b" * 300)
    with pytest.raises(errors.InvalidArgument, match="File name too long"):
        targets(root, bound("/a/x"))


# -- folders ---------------------------------------------------------------------------------------

COVERED = ("/proc", "/dev", "/sys", "/data")


def test_the_working_directory_is_made_inside_the_root(root: Path) -> None:
    (root / "srv").symlink_to("/../real")
    before = outside(root)
    rootfs.make_workdir(str(root), "/srv/app", covered=COVERED)
    rootfs.make_workdir(str(root), "/srv/app", covered=COVERED)
    rootfs.make_workdir(str(root), "/", covered=COVERED)
    assert (root / "real/app").is_dir()
    assert outside(root) == before


def test_a_working_directory_on_a_mount_is_left_to_the_runtime(root: Path) -> None:
    rootfs.make_workdir(str(root), "/data/app", covered=COVERED)
    assert not (root / "data").exists()


@pytest.mark.parametrize("to", ["/proc/self/fd", "proc/thread-self/fd", "/proc/1", "/etc/passwd"])
def test_a_working_directory_that_leads_to_the_host_or_is_no_folder_is_refused(
    root: Path, to: str
) -> None:
    (root / "w").symlink_to(to)
    with pytest.raises(errors.InvalidArgument):
        rootfs.make_workdir(str(root), "/w/7", covered=COVERED)


def test_the_folders_of_volumes_are_made_inside_the_root(root: Path) -> None:
    (root / "up").symlink_to("../../../..")
    before = outside(root)
    (root / "again").symlink_to("b")
    wanted = ("/up/volume", "/b/c", "/data/x", "/proc/y", "/again/c")
    assert rootfs.make_volumes(str(root), wanted, covered=COVERED) == ["/volume", "/b/c"]
    assert (root / "volume").is_dir()
    assert (root / "b/c").is_dir()
    assert outside(root) == before
    assert not (root / "data").exists()


@pytest.mark.parametrize("to", ["/", "../..", "/etc/passwd"])
def test_a_volume_that_leads_to_the_root_or_to_no_folder_is_refused(root: Path, to: str) -> None:
    (root / "v").symlink_to(to)
    with pytest.raises(errors.InvalidArgument):
        rootfs.make_volumes(str(root), ("/v",), covered=COVERED)


def test_a_root_that_is_a_link_is_not_entered(root: Path) -> None:
    (root.parent / "link").symlink_to(root)
    with pytest.raises(OSError, match="link"):
        rootfs.make_volumes(str(root.parent / "link"), ("/x",), covered=())
    assert not (root / "x").exists()
