# SPDX-License-Identifier: Apache-2.0
"""Layers become folders as overlayfs wants them; hostile ones become errors and touch nothing."""

import errno
import gzip
import io
import json
import os
import random
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings, strategies

from cri_server import trees
from cri_server.images import layerdirs, settle, stream, tar, tarheader, unpack
from tests.lab import tars

pytestmark = pytest.mark.needs("root")
LIMITS = tar.Limits(entries=1000, bytes=16 << 20)


class Layer:
    """A layer folder beside a canary that no layer may reach."""

    def __init__(self, folder: Path) -> None:
        self.fs = folder / "fs"
        self.fs.mkdir(parents=True)
        self.fs.chmod(0o755)
        self.canary = folder / "canary"
        self.canary.write_text("untouched")
        self.canary.chmod(0o600)
        self.before = self._state()

    def _state(self) -> tuple[object, ...]:
        s = self.canary.stat()
        names = {p.name for p in self.canary.parent.iterdir()} - {"fs"}
        return self.canary.read_text(), s.st_mode, s.st_uid, s.st_nlink, s.st_mtime_ns, names

    def apply(self, *entries: bytes, limits: tar.Limits = LIMITS) -> unpack.Outcome:
        """Apply an archive with these entries."""
        source = stream.Stream(iter([tars.archive(*entries)]), limit=limits.bytes)
        fd = os.open(self.fs, os.O_RDONLY)
        try:
            return unpack.Unpacker(fd, limits).apply(tar.Reader(source))
        finally:
            os.close(fd)

    def settle(self, outcome: unpack.Outcome, *lowers: Path) -> None:
        fd = os.open(self.fs, os.O_RDONLY)
        try:
            names = [str(path) for path in lowers]
            settle.settle(fd, names, folders=outcome.folders, links=outcome.links)
        finally:
            os.close(fd)

    def check_canary(self) -> None:
        assert self._state() == self.before

    def is_whiteout(self, name: str) -> bool:
        return layerdirs.is_whiteout((self.fs / name).lstat())

    def is_opaque(self, name: str) -> bool:
        try:
            return os.getxattr(self.fs / name, "trusted.overlay.opaque") == b"y"
        except OSError:
            return False


@pytest.fixture(autouse=True)
def umask() -> Iterator[None]:
    """The worker's umask."""
    old = os.umask(0)
    yield
    os.umask(old)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[[], Layer]]:
    """Make layers; canaries are looked at when the test is over."""
    made: list[Layer] = []

    def new() -> Layer:
        made.append(Layer(tmp_path / str(len(made))))
        return made[-1]

    yield new
    for layer in made:
        layer.check_canary()
    trees.remove(tmp_path)
    tmp_path.mkdir()


@pytest.fixture
def layer(make: Callable[[], Layer]) -> Layer:
    return make()


# ---- what is in a layer


def test_content_owner_mode_and_times_are_kept(layer: Layer) -> None:
    layer.apply(
        tars.folder("etc/", 0o750, uid=3, gid=4, mtime=1000),
        tars.pax({"mtime": "1700000000.123456789"}, tars.file("etc/a", b"hello", uid=1, gid=2)),
        tars.file("etc/b", b"x" * 5000, mode=0o4755, uid=1000, gid=1000),
    )
    a, b, etc = (layer.fs / name for name in ("etc/a", "etc/b", "etc"))
    assert a.read_bytes() == b"hello"
    assert (a.stat().st_uid, a.stat().st_gid) == (1, 2)
    assert a.stat().st_mtime_ns == 1700000000123456789
    assert stat.S_IMODE(b.stat().st_mode) == 0o4755  # kept although chown takes it away
    assert (stat.S_IMODE(etc.stat().st_mode), etc.stat().st_uid) == (0o750, 3)
    assert etc.stat().st_mtime == 1000  # although entries came into it later


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ("7000000000.5", 7000000000.5),  # the year 2191
        ("-5", -5),
        ("9300000000", 0),
        ("9" * 19, 0),
        ("-" + "9" * 19, 0),
    ],
)
def test_a_time_is_kept_or_none(layer: Layer, seconds: str, expected: float) -> None:
    layer.apply(*(tars.pax({"mtime": seconds}, e) for e in (tars.file("f"), tars.folder("d"))))
    assert [(layer.fs / name).stat().st_mtime for name in "fd"] == [expected] * 2


def test_special_files_are_made(layer: Layer) -> None:
    layer.apply(
        tars.header("null", b"3", mode=0o666, device=(1, 3)),
        tars.header("disk", b"4", mode=0o660, device=(8, 1), gid=6),
        tars.header("pipe", b"6", mode=0o600),
        tars.symlink("link", "../../canary"),
    )
    null, disk, pipe = (os.lstat(layer.fs / n) for n in ("null", "disk", "pipe"))
    assert stat.S_ISCHR(null.st_mode)
    assert null.st_rdev == os.makedev(1, 3)
    assert stat.S_ISBLK(disk.st_mode)
    assert disk.st_gid == 6
    assert stat.S_ISFIFO(pipe.st_mode)
    assert os.readlink(layer.fs / "link") == "../../canary"


def test_hard_links_share_one_inode(layer: Layer) -> None:
    outcome = layer.apply(tars.file("a", b"x"), tars.link("d/b", "a"), tars.link("a", "a"))
    assert (layer.fs / "a").samefile(layer.fs / "d/b")
    assert outcome.links == ()


def test_attributes_are_kept_but_not_labels_and_not_those_of_overlayfs(layer: Layer) -> None:
    capability = bytes.fromhex("0100000200040000000000000000000000000000")
    records = {
        "SCHILY.xattr.user.note": b"\0binary",
        "SCHILY.xattr.security.capability": capability,
        "SCHILY.xattr.security.selinux": b"system_u:object_r:etc_t:s0",
        "SCHILY.xattr.trusted.overlay.redirect": b"/etc",
        "SCHILY.xattr.trusted.overlay.opaque": b"y",
    }
    layer.apply(tars.pax(records, tars.file("a", b"x", uid=5)), tars.pax(records, tars.folder("d")))
    path = layer.fs / "a"
    assert set(os.listxattr(path)) == {"user.note", "security.capability"}
    assert os.getxattr(path, "user.note") == b"\0binary"
    assert not layer.is_opaque("d")


def test_attributes_that_cannot_be_set_are_told(layer: Layer) -> None:
    broken = {"SCHILY.xattr.security.capability": b"none", "SCHILY.xattr.user.note": b"kept"}
    outcome = layer.apply(
        tars.pax(broken, tars.file("a", b"x")),
        tars.pax({"SCHILY.xattr.nowhere.at.all": b""}, tars.folder("d")),
        tars.pax({"SCHILY.xattr.user.note": b""}, tars.symlink("s", "a")),
        tars.pax({"SCHILY.xattr.security.selinux": b"x"}, tars.file("b")),  # never wanted
    )
    assert outcome.dropped == {"security.capability", "nowhere.at.all", "user.note"}
    assert os.listxattr(layer.fs / "a") == ["user.note"]


def test_what_is_replaced_is_not_counted_twice(layer: Layer) -> None:
    outcome = layer.apply(
        tars.file("f", b"x" * 5000),
        tars.file("f", b"y" * 9000),
        tars.folder("d"),
        tars.file("d/x", b"x" * 5000),
        tars.symlink("d/s", "nowhere"),
        tars.whiteout("d/gone"),
        tars.link("d/f", "f"),
        tars.file("d", b"now a file"),
    )
    assert outcome.usage == trees.Usage(bytes=(3 + 1 + 1) * 4096, inodes=3)  # f, d, the root


def test_long_names_of_pax_and_gnu(layer: Layer) -> None:
    long, longer = "n" * 200, "g" * 250
    body = f"d/{longer}\0".encode()
    layer.apply(
        tars.pax({"path": f"d/{long}"}, tars.file("short", b"1")),
        tars.header("././@LongLink", b"L", size=len(body)) + tars.padded(body),
        tars.file("short", b"2"),
    )
    assert {p.name for p in (layer.fs / "d").iterdir()} == {long, longer}


@pytest.mark.parametrize(
    ("magic", "field", "name"),
    [
        (b"ustar\x0000", b"way/to", "way/to/f"),
        (b"ustar  \0", b"way/to", "way/to/f"),  # Go before 1.8
        (b"ustar  \0", "wäy".encode(), "f"),
        (b"ustar  \0", b"12345670123\x0012345670123\0", "f"),  # times of access and change
        (b"ustar  \0", b"", "f"),
        (bytes(8), b"way/to", "f"),
    ],
)
def test_a_prefix_is_a_part_of_the_name(
    layer: Layer, magic: bytes, field: bytes, name: str
) -> None:
    layer.apply(tars.file("f", b"x", raw={257: magic, 345: field}))
    assert {str(p.relative_to(layer.fs)) for p in layer.fs.rglob("f")} == {name}


def test_later_entries_replace_earlier_ones(layer: Layer) -> None:
    layer.apply(
        tars.file("f", b"old"),
        tars.file("f", b"new"),
        tars.folder("d"),
        tars.file("d/x"),
        tars.file("d", b"now a file"),
        tars.symlink("s", "nowhere"),
        tars.folder("s"),
        tars.file("s/inside"),
    )
    assert (layer.fs / "f").read_bytes() == b"new"
    assert (layer.fs / "d").read_bytes() == b"now a file"
    assert not (layer.fs / "s").is_symlink()
    assert (layer.fs / "s/inside").exists()


def test_the_root_entry_sets_the_root(layer: Layer) -> None:
    outcome = layer.apply(tars.folder("./", 0o700, uid=9))
    assert stat.S_IMODE(layer.fs.stat().st_mode) == 0o700
    assert layer.fs.stat().st_uid == 9
    assert outcome.folders == ()


# ---- whiteouts


def test_a_whiteout_becomes_a_device(layer: Layer) -> None:
    layer.apply(tars.whiteout("etc/gone"))
    assert layer.is_whiteout("etc/gone")


def test_an_opaque_mark_becomes_an_attribute(layer: Layer) -> None:
    layer.apply(tars.file("d/a"), tars.opaque("d"), tars.file("d/b"))
    assert layer.is_opaque("d")
    assert sorted(os.listdir(layer.fs / "d")) == ["a", "b"]


def test_an_opaque_root_is_told(layer: Layer) -> None:
    assert layer.apply(tars.opaque("")).opaque_root
    assert not layer.apply(tars.file("a")).opaque_root


@pytest.mark.parametrize("first", ["whiteout", "entry"])
def test_a_whiteout_and_a_new_folder_of_that_name_hide_only_below(layer: Layer, first: str) -> None:
    entries = [tars.whiteout("d"), tars.folder("d", 0o711) + tars.file("d/new")]
    layer.apply(*(entries if first == "whiteout" else entries[::-1]))
    assert layer.is_opaque("d")
    assert os.listdir(layer.fs / "d") == ["new"]
    assert stat.S_IMODE((layer.fs / "d").stat().st_mode) == 0o711


@pytest.mark.parametrize("first", ["whiteout", "entry"])
def test_a_whiteout_and_a_new_file_of_that_name_keep_the_file(layer: Layer, first: str) -> None:
    entries = [tars.whiteout("f"), tars.file("f", b"new")]
    layer.apply(*(entries if first == "whiteout" else entries[::-1]))
    assert (layer.fs / "f").read_bytes() == b"new"


def test_a_whiteout_and_things_in_a_folder_that_is_not_an_entry(layer: Layer) -> None:
    outcome = layer.apply(tars.whiteout("d"), tars.file("d/e/new"))
    assert layer.is_opaque("d")
    assert outcome.folders == ("",)  # d and d/e take nothing from below: it is hidden


def test_bookkeeping_of_aufs_is_left_out(layer: Layer) -> None:
    layer.apply(tars.folder(".wh..wh.plnk"), tars.file(".wh..wh.plnk/1"), tars.file(".wh..wh.aufs"))
    assert os.listdir(layer.fs) == []


# ---- what comes from below


def test_folders_without_an_entry_take_owner_and_mode_from_below(make: Callable[[], Layer]) -> None:
    bottom, middle, top = make(), make(), make()
    bottom.apply(tars.folder("./", 0o711), tars.folder("a", 0o1777, uid=7, gid=8, mtime=5))
    bottom.apply(tars.folder("a/b", 0o700, uid=9))
    middle.apply(tars.folder("a", 0o755, uid=1), tars.whiteout("x"))
    outcome = top.apply(tars.file("a/b/c/file"))
    assert sorted(outcome.folders) == ["", "a", "a/b", "a/b/c"]
    top.settle(outcome, middle.fs, bottom.fs)
    a, b = (top.fs / "a").stat(), (top.fs / "a/b").stat()
    assert (stat.S_IMODE(a.st_mode), a.st_uid) == (0o755, 1)  # of the nearest
    assert (stat.S_IMODE(b.st_mode), b.st_uid) == (0o700, 9)
    assert stat.S_IMODE((top.fs / "a/b/c").stat().st_mode) == 0o755
    assert stat.S_IMODE(top.fs.stat().st_mode) == 0o755  # middle's root, which nothing has set


def test_what_a_layer_in_between_hides_is_not_taken(make: Callable[[], Layer]) -> None:
    bottom, middle, top = make(), make(), make()
    bottom.apply(tars.folder("a", 0o700), tars.folder("o"), tars.folder("o/x", 0o700))
    middle.apply(tars.whiteout("a"), tars.folder("o"), tars.opaque("o"))
    outcome = top.apply(tars.file("a/f"), tars.file("o/x/f"))
    top.settle(outcome, middle.fs, bottom.fs)
    assert stat.S_IMODE((top.fs / "a").stat().st_mode) == 0o755
    assert stat.S_IMODE((top.fs / "o/x").stat().st_mode) == 0o755


def test_a_hard_link_to_a_lower_file_becomes_a_copy(make: Callable[[], Layer]) -> None:
    bottom, top = make(), make()
    note = {"SCHILY.xattr.user.note": "kept"}
    entry = tars.file("bin/tool", b"tool", mode=0o4755, uid=3, mtime=77)
    bottom.apply(tars.pax(note, entry))
    outcome = top.apply(
        tars.folder("d", mtime=99),
        tars.link("d/one", "bin/tool"),
        tars.whiteout("bin/tool"),
        tars.link("d/two", "bin/tool"),
    )
    top.settle(outcome, bottom.fs)
    copy = top.fs / "d/one"
    assert copy.read_bytes() == b"tool"
    st = copy.stat()
    assert (stat.S_IMODE(st.st_mode), st.st_uid, st.st_mtime) == (0o4755, 3, 77)
    assert os.getxattr(copy, "user.note") == b"kept"
    assert copy.samefile(top.fs / "d/two")
    assert (top.fs / "d").stat().st_mtime == 99
    assert not copy.samefile(bottom.fs / "bin/tool")


def test_a_hard_link_to_a_lower_symlink_or_device(make: Callable[[], Layer]) -> None:
    bottom, top = make(), make()
    bottom.apply(tars.symlink("s", "/etc/passwd"), tars.header("n", b"3", device=(1, 3)))
    top.settle(top.apply(tars.link("a", "s"), tars.link("b", "n")), bottom.fs)
    assert os.readlink(top.fs / "a") == "/etc/passwd"
    assert os.lstat(top.fs / "b").st_rdev == os.makedev(1, 3)


@pytest.mark.parametrize(
    ("later", "expected"),
    [
        ((tars.file("d/b", b"new"),), {"d", "d/b"}),
        ((tars.symlink("d/b", "nowhere"),), {"d", "d/b"}),
        ((tars.folder("d/b"), tars.file("d/b/x")), {"d", "d/b", "d/b/x"}),
        ((tars.file("d"),), {"d"}),
        ((tars.file("d"), tars.folder("d")), {"d"}),
    ],
)
def test_what_comes_after_a_link_to_below_takes_its_place(
    make: Callable[[], Layer], later: tuple[bytes, ...], expected: set[str]
) -> None:
    bottom, top = make(), make()
    bottom.apply(tars.file("a", b"low"))
    top.settle(top.apply(tars.folder("d"), tars.link("d/b", "a"), *later), bottom.fs)
    found = list(top.fs.rglob("*"))
    assert {str(path.relative_to(top.fs)) for path in found} == expected
    assert not any(path.is_file() and path.read_bytes() == b"low" for path in found)


@pytest.mark.parametrize("earlier", [(), (tars.file("b", b"mine"),), (tars.folder("b"),)])
def test_a_link_to_a_link_to_below_is_one_to_the_same_file(
    make: Callable[[], Layer], earlier: tuple[bytes, ...]
) -> None:
    bottom, top = make(), make()
    bottom.apply(tars.file("a", b"low"), tars.file("b", b"old"))
    outcome = top.apply(*earlier, tars.link("b", "a"), tars.whiteout("b"), tars.link("c", "b"))
    top.settle(outcome, bottom.fs)
    assert (top.fs / "c").read_bytes() == b"low"
    assert (top.fs / "b").samefile(top.fs / "c")


def test_a_link_keeps_what_it_meant_when_its_target_changes(make: Callable[[], Layer]) -> None:
    bottom, top = make(), make()
    bottom.apply(tars.file("a", b"low"), tars.file("b", b"old"))
    links = (tars.link("e", "b"), tars.link("b", "a"), tars.link("c", "b"))
    outcome = top.apply(*links, tars.file("b", b"new"), tars.file("a", b"newer"))
    top.settle(outcome, bottom.fs)
    found = {p.name: p.read_bytes() for p in top.fs.iterdir()}
    assert found == {"a": b"newer", "b": b"new", "c": b"low", "e": b"old"}


@pytest.mark.parametrize("target", ["a", "/"])
def test_a_link_to_below_is_no_folder(make: Callable[[], Layer], target: str) -> None:
    with pytest.raises(tar.Malformed, match="not a folder"):
        make().apply(tars.link("b", target), tars.file("b/x"))


def test_a_hard_link_to_nothing_is_refused(make: Callable[[], Layer]) -> None:
    bottom, top = make(), make()
    outcome = top.apply(tars.link("a", "etc/shadow"))
    with pytest.raises(tar.Malformed, match="to nothing"):
        top.settle(outcome, bottom.fs)


def test_lower_symlinks_are_never_followed(make: Callable[[], Layer]) -> None:
    bottom, top = make(), make()
    bottom.apply(tars.symlink("out", str(bottom.canary.parent)))
    outcome = top.apply(tars.link("stolen", "out/canary"))
    with pytest.raises(tar.Malformed, match="to nothing"):
        top.settle(outcome, bottom.fs)


# ---- hostile layers

_EXT = {"SCHILY.xattr.user.x": b"1"}
HOSTILE: dict[str, tuple[bytes, ...]] = {
    "dot dot": (tars.file("../canary", b"evil"),),
    "dot dot in the middle": (tars.file("a/../../canary", b"evil"),),
    "dot dot in a hard link": (tars.link("a", "../canary"),),
    "root as a file": (tars.file("./", b"evil"),),
    "root as a symlink": (tars.symlink("/", "/etc"),),
    "root as a hard link": (tars.file("a"), tars.link(".", "a")),
    "owner 2^32-1": (tars.file("a", uid=2**32 - 1),),
    "group 2^32-1": (tars.folder("a", gid=2**32 - 1),),
    "owner of 2^33": (tars.pax({"uid": str(2**33)}, tars.file("a")),),
    "negative owner": (tars.file("a", uid=-2),),
    "negative size": (tars.header("a", size=-512),),
    "pax number with sign": (tars.pax({"size": "-1"}, tars.file("a")),),
    "pax number of letters": (tars.pax({"uid": "root"}, tars.file("a")),),
    "huge pax number": (tars.pax({"uid": "9" * 5000}, tars.file("a")),),
    "NUL in a name": (tars.pax({"path": b"a\0b"}, tars.file("a")),),
    "name of 5000": (tars.pax({"path": "d/" * 2500 + "x"}, tars.file("a")),),
    "name part of 300": (tars.pax({"path": "x" * 300}, tars.file("a")),),
    "unknown type": (tars.header("a", b"Q"),),
    "folder below a file": (tars.file("a"), tars.file("a/b")),
    "folder below a device": (tars.header("n", b"3", device=(1, 3)), tars.file("n/b")),
    "symlink loop as a folder": (tars.symlink("a", "b"), tars.symlink("b", "a"), tars.file("a/x")),
    "hard link to a folder": (tars.folder("d"), tars.link("l", "d")),
    "whiteout of dot": (tars.file(".wh.."),),
    "whiteout of dot dot": (tars.file("d/.wh..."),),
    "whiteout of nothing": (tars.file(".wh."),),
    "whiteout as a folder": (tars.file(".wh.a/b"),),
    "wrong checksum": (b"a" * 512,),
    "header of letters": (tars.header("a", raw={124: b"hello world\0"}),),
    "underscore in a number": (tars.header("a", raw={100: b"0000_44\0"}),),
    "zero block in the middle": (bytes(512), tars.file("a")),
    "pax body too long": (tars.header("x", b"x", size=2 << 20),),
    "pax record beyond the body": (tars.header("x", b"x", size=8) + tars.padded(b"99 a=bcd"),),
    "pax record of length 0": (tars.header("x", b"x", size=8) + tars.padded(b"0 a=bcd\n"),),
    "pax record without value": (tars.header("x", b"x", size=6) + tars.padded(b"6 abc\n"),),
    "extended header at the end": (tars.pax(_EXT, b""),),
    "data cut off": (tars.header("a", size=1 << 20),),
    "sparse without a map": (tars.pax({"GNU.sparse.numblocks": "1"}, tars.file("a")),),
    "sparse 0.0 with numbers out of turn": (
        tars.pax({"GNU.sparse.numbytes": "0", "GNU.sparse.offset": "0"}, tars.file("a")),
    ),
    "sparse 0.0 with more than a number": (
        tars.pax(
            {"GNU.sparse.size": "1", "GNU.sparse.offset": "0,1,1", "GNU.sparse.numbytes": "0"},
            tars.file("a", b"a"),
        ),
    ),
    "sparse beyond its size": (
        tars.pax({"GNU.sparse.map": "100,3", "GNU.sparse.size": "50"}, tars.file("a", b"abc")),
    ),
    "sparse that overlaps": (
        tars.pax({"GNU.sparse.map": "0,2,1,1", "GNU.sparse.size": "50"}, tars.file("a", b"abc")),
    ),
    "sparse without data": (
        tars.pax({"GNU.sparse.map": "0,9", "GNU.sparse.size": "50"}, tars.file("a", b"abc")),
    ),
    "sparse with a huge count": (
        tars.pax(
            {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "1"},
            tars.file("a", b"99999999999\n"),
        ),
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_refused(name: str, layer: Layer) -> None:
    with pytest.raises(tar.Malformed):
        layer.apply(*HOSTILE[name])


INSIDE = tars.file("smuggled", b"x" * 600)


@pytest.mark.parametrize(
    ("archive", "size"),
    [
        (tars.pax({"size": f"{len(INSIDE)}"}, tars.header("outer")) + INSIDE, len(INSIDE)),
        (tars.pax({"size": "0"}, tars.header("outer", size=len(INSIDE))) + INSIDE, 0),
    ],
    ids=["more than the header says", "less"],
)
def test_v75_a_pax_size_wins_over_the_headers(layer: Layer, archive: bytes, size: int) -> None:
    """Naive: the header's size counts, and what a scanner took for data becomes a file."""
    layer.apply(archive)
    assert (layer.fs / "outer").read_bytes() == INSIDE[:size]
    assert (layer.fs / "smuggled").exists() is (size == 0)


@pytest.mark.parametrize("kind", [b"1", b"2", b"3", b"5", b"6"])
def test_v75_what_is_no_file_has_no_data(layer: Layer, kind: bytes) -> None:
    """Naive: data is passed over that Go's reader takes for the next entries."""
    entry = tars.header("outer", kind, size=len(INSIDE), target="first", device=(1, 3))
    layer.apply(tars.file("first"), entry, INSIDE)
    assert sorted(os.listdir(layer.fs)) == ["first", "outer", "smuggled"]


def test_absolute_names_stay_in_the_layer(layer: Layer) -> None:
    layer.apply(tars.file(str(layer.canary), b"evil"))
    assert (layer.fs / str(layer.canary)[1:]).read_bytes() == b"evil"


@pytest.mark.parametrize("target", ["{outside}", "../" * 30 + "{outside}", "../..", "/"])
def test_symlinks_lead_nowhere_else(layer: Layer, target: str) -> None:
    """Writing, linking, whiting out, changing modes and replacing through a symlink."""
    outside = str(layer.canary.parent)
    layer.apply(
        tars.symlink("out", target.format(outside=outside)),
        tars.file("out/canary", b"evil"),
        tars.file("out/evil", b"evil"),
        tars.folder("out/sub", 0o777),
        tars.whiteout("out/canary"),
        tars.link("link", "out/canary"),
    )
    assert not (layer.canary.parent / "evil").exists()


def test_a_file_over_a_symlink_replaces_the_symlink(layer: Layer) -> None:
    """CVE-2021-32760 and its family: data, mode, owner and attributes went to the target."""
    layer.apply(
        tars.symlink("s", str(layer.canary)),
        tars.file("s", b"evil", mode=0o777, uid=5),
    )
    assert not (layer.fs / "s").is_symlink()
    layer.apply(tars.link("s2", "s"), tars.symlink("s3", str(layer.canary)), tars.link("h", "s3"))
    assert (layer.fs / "h").is_symlink()  # a link to the link


def test_a_dangling_symlink_is_followed_inside(layer: Layer) -> None:
    layer.apply(tars.symlink("lib", "usr/lib"), tars.file("lib/x/a", b"1"))
    assert (layer.fs / "usr/lib/x/a").read_bytes() == b"1"


def test_folders_deeper_than_any_path(layer: Layer) -> None:
    """Symlinks shorten the way, so a tree can be deeper than PATH_MAX; it is made and removed."""
    entries, way, deep = [], "", "/".join(["d" * 100] * 8)
    for depth in range(12):
        entries.append(tars.pax({"path": f"{way}{deep}/f"}, tars.file("x", b"deep")))
        entries.append(tars.pax({"linkpath": f"{way}{deep}"}, tars.symlink(f"l{depth}", "x")))
        way = f"l{depth}/"
    outcome = layer.apply(*entries)
    assert max(map(len, outcome.folders)) > 2 * tarheader.PATH_MAX
    trees.remove(layer.fs)
    assert not layer.fs.exists()


def test_bombs_stop_at_the_limit(layer: Layer) -> None:
    small = tar.Limits(entries=10, bytes=1 << 20)
    with pytest.raises(tar.TooBig):
        layer.apply(tars.file("a", bytes(2 << 20)), limits=small)
    with pytest.raises(tar.TooBig):
        layer.apply(*(tars.file(f"f{i}") for i in range(20)), limits=small)
    sparse = {"GNU.sparse.map": "0,3", "GNU.sparse.size": str(1 << 40)}
    with pytest.raises(tar.TooBig):
        layer.apply(tars.pax(sparse, tars.file("s", b"abc")), limits=small)


# ---- sparse files, archives of real tools


VERSIONS = ("0.0", "0.1", "1.0")


def test_sparse_files(layer: Layer, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    with (source / "holes").open("wb") as file:
        for at in range(0, 60 << 16, 1 << 16):
            file.seek(at)
            file.write(b"data at %d" % at)
        file.truncate(100 << 16)
    for form, version in (("gnu", []), *(("pax", [f"--sparse-version={v}"]) for v in VERSIONS)):
        command = ["tar", f"--format={form}", *version, "-C", str(source), "-Sc", "holes"]
        packed = subprocess.run(command, check=True, capture_output=True).stdout
        layer.apply(packed.removesuffix(tars.END))
        assert (layer.fs / "holes").read_bytes() == (source / "holes").read_bytes()
        assert (layer.fs / "holes").stat().st_blocks * 512 < 2 << 20
    trees.remove(source)


@pytest.mark.parametrize("form", ["v7", "ustar", "gnu", "pax"])
def test_what_gnu_tar_packs_is_what_comes_out(layer: Layer, tmp_path: Path, form: str) -> None:
    source = tmp_path / "source"
    (source / "d" / ("long" * 15 if form in ("v7", "ustar") else "long" * 30)).mkdir(parents=True)
    rng = random.Random(form)
    for i in range(30):
        path = source / "d" / f"{i}"
        path.write_bytes(rng.randbytes(rng.randrange(3000)))
        path.chmod(rng.choice((0o600, 0o755, 0o4711)))
        os.utime(path, (i, i))
    (source / "d/link").hardlink_to(source / "d/1")
    (source / "s").symlink_to("d/2")
    packed = subprocess.run(
        ["tar", f"--format={form}", "-C", source, "-c", "."], check=True, capture_output=True
    ).stdout
    fd = os.open(layer.fs, os.O_RDONLY)
    unpack.Unpacker(fd, LIMITS).apply(tar.Reader(stream.Stream(iter([packed]), limit=1 << 30)))
    os.close(fd)
    listing = ["find", ".", "-printf", "%p %y %m %U %G %s %n %l %T@\n"]
    if form == "pax":
        listing[-1] = listing[-1].replace("%T@", "%T@")
    else:
        listing[-1] = listing[-1].replace(" %T@", "")
    ours, theirs = (
        sorted(subprocess.run(listing, cwd=d, check=True, capture_output=True).stdout.split(b"\n"))
        for d in (layer.fs, source)
    )
    assert [o for o in ours if b" d " not in o] == [t for t in theirs if b" d " not in t]
    trees.remove(source)


@settings(max_examples=60, deadline=None)
@given(strategies.data())
def test_broken_archives_end_in_an_error_or_in_entries(data: strategies.DataObject) -> None:
    """Whatever bytes change, reading ends, stays in bounds, and raises nothing but Malformed."""
    good = bytearray(
        tars.archive(
            tars.pax({"path": "a/b", "size": "3"}, tars.file("x", b"abc")),
            tars.header(
                "s", b"S", size=3, raw={386: b"%011o\0%011o\0" % (0, 3), 483: b"%011o\0" % 3}
            )
            + tars.padded(b"abc"),
            tars.link("l", "a/b"),
        )
    )
    for _ in range(data.draw(strategies.integers(1, 6))):
        at = data.draw(strategies.integers(0, len(good) - 1))
        good[at] = data.draw(strategies.integers(0, 255))
    cut = data.draw(strategies.integers(0, len(good)))
    chunks = [bytes(good[i : i + 700]) for i in range(0, cut, 700)]
    try:
        entries = list(tar.Reader(stream.Stream(iter(chunks), limit=1 << 20)))
    except (tar.Malformed, tar.TooBig):
        return
    assert len(entries) < 20


# ---- decompression


GOOD = tars.archive(tars.file("a", b"hello" * 1000))


def _members(data: bytes) -> bytes:
    return b"".join(gzip.compress(data[i : i + 999]) for i in range(0, len(data), 999))


def _skippable(data: bytes) -> bytes:
    frame = zstandard.compress(data[:999]) + zstandard.compress(data[999:])
    return b"\x50\x2a\x4d\x18\x04\0\0\0skip" + frame + b"\x5f\x2a\x4d\x18\x02\0\0\0ab"


@pytest.mark.parametrize(
    "blob",
    [GOOD, gzip.compress(GOOD), _members(GOOD), zstandard.compress(GOOD), _skippable(GOOD)],
    ids=["plain", "gzip", "gzip members", "zstd", "zstd with frames to skip"],
)
def test_compression_is_told_by_the_content(blob: bytes) -> None:
    assert b"".join(stream.inflate(io.BytesIO(blob))) == GOOD


@pytest.mark.parametrize(
    "blob",
    [
        gzip.compress(GOOD)[:-9],
        gzip.compress(GOOD)[:50] + b"\xff" * 20 + gzip.compress(GOOD)[70:],
        zstandard.compress(GOOD)[:-5] + b"#####",
        b"\xfd7zXZ\0" + bytes(100),
        b"BZh9" + bytes(100),
        b"\x1f\x8b",
    ],
)
def test_what_does_not_decompress_is_refused(blob: bytes) -> None:
    with pytest.raises(tar.Malformed):
        read_all(blob)


def read_all(blob: bytes) -> None:
    source = stream.Stream(stream.inflate(io.BytesIO(blob)), limit=1 << 30)
    list(tar.Reader(source))
    source.drain()


def test_the_thread_ahead_ends_with_its_block() -> None:
    def endless() -> Iterator[bytes]:
        while True:
            yield b"x" * 10

    with stream.ahead(endless()) as chunks:
        assert next(chunks) == b"x" * 10

    def broken() -> Iterator[bytes]:
        yield b"x"
        raise tar.Malformed("broken")

    with stream.ahead(broken()) as chunks, pytest.raises(tar.Malformed):
        list(chunks)


# ---- the worker process


def test_a_worker_does_job_after_job(tmp_path: Path) -> None:
    jobs = [job(tmp_path / f"{i}", tars.archive(tars.file(f"{i}"))) for i in range(3)]
    jobs.insert(1, job(tmp_path / "bad", b"rubbish" * 100))
    done = subprocess.run(
        [sys.executable, "-I", "-m", "cri_server.images.worker"],
        input="".join(json.dumps(j) + "\n" for j in jobs).encode(),
        capture_output=True,
        check=True,
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert ["error" in answer for answer in answers] == [False, True, False, False]
    assert not done.stderr


def run_worker(job: dict[str, Any], **options: Any) -> dict[str, Any]:
    """Run the worker as the server does."""
    command = [sys.executable, "-I", "-m", "cri_server.images.worker"]
    done = subprocess.run(
        command, input=json.dumps(job).encode(), capture_output=True, check=True, **options
    )
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def job(folder: Path, content: bytes, **more: Any) -> dict[str, Any]:
    (folder / "into" / "fs").mkdir(parents=True)
    (folder / "blob").write_bytes(content)
    limits = {"entries": 1000, "bytes": 8 << 20}
    base = {"verb": "apply", "blob": str(folder / "blob"), "into": str(folder / "into")}
    return {**base, "limits": limits, "lowers": None} | more


def test_the_worker_unpacks_hashes_and_settles_later(tmp_path: Path) -> None:
    content = tars.archive(tars.file("a/b", b"1"), tars.link("c", "low"))
    asked = job(tmp_path, gzip.compress(content))
    answer = run_worker(asked)
    assert answer["diff_id"] == tars.digest(content)
    assert answer["pending"] == "all"
    assert answer["inodes"] == 3
    low = tmp_path / "low"
    (low / "a").mkdir(parents=True)
    (low / "a").chmod(0o700)
    (low / "low").write_text("lower")
    asked = {"verb": "settle", "into": asked["into"], "lowers": [str(low)]}
    assert run_worker(asked) == {"bytes": 4096, "inodes": 1}  # the copy of "low"
    assert (tmp_path / "into/fs/c").read_text() == "lower"
    assert stat.S_IMODE((tmp_path / "into/fs/a").stat().st_mode) == 0o700


def test_the_worker_tells_what_kind_of_failure_it_was(tmp_path: Path) -> None:
    bomb = zstandard.compress(tars.archive(tars.file("zeros", bytes(64 << 20))))
    assert len(bomb) < 10000
    assert run_worker(job(tmp_path / "1", bomb))["kind"] == "too big"
    evil = tars.archive(tars.file("../x"))
    assert run_worker(job(tmp_path / "2", evil))["kind"] == "malformed"
    missing = job(tmp_path / "3", b"", blob="/nonexistent")
    assert run_worker(missing)["errno"] == errno.ENOENT


def test_the_worker_is_small_whatever_the_layer(tmp_path: Path) -> None:
    data = random.Random(1).randbytes(1 << 20) * 128
    parameters = zstandard.ZstdCompressionParameters(window_log=20, compression_level=1)
    blob = zstandard.ZstdCompressor(compression_params=parameters).compress(
        tars.archive(tars.file("a", data))
    )
    asked = job(tmp_path, blob, limits={"entries": 10, "bytes": 1 << 30})
    script = (
        "import re, runpy, sys\n"
        "try: runpy.run_module('cri_server.images.worker', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "status = open('/proc/self/status').read()\n"
        "print(re.search(r'VmHWM:\\s*(\\d+)', status)[1], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", script],
        input=json.dumps(asked).encode(),
        capture_output=True,
        check=True,
    )
    assert json.loads(done.stdout)["pending"] == "root"
    assert int(done.stderr) < 64 << 10  # KiB


# ---- trees


def test_a_tree_of_any_depth_is_measured_and_removed(tmp_path: Path) -> None:
    top = tmp_path / "top"
    top.mkdir()
    fd = os.open(top, os.O_RDONLY)
    for _ in range(3000):
        os.mkdir("d", dir_fd=fd)
        deeper = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = deeper
    os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
    os.close(fd)
    assert trees.usage(top).inodes == 3002
    trees.remove(top)
    trees.remove(top)
    assert not top.exists()


def test_removing_follows_no_symlink_and_counts_hard_links_once(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "canary").write_text("x")
    top = tmp_path / "top"
    top.mkdir()
    (top / "s").symlink_to(outside)
    (top / "a").write_bytes(bytes(10000))
    (top / "b").hardlink_to(top / "a")
    assert trees.usage(top).inodes == 3
    trees.remove(top)
    assert (outside / "canary").exists()


def test_a_folder_that_moves_away_stops_the_walk(tmp_path: Path) -> None:
    (tmp_path / "top/a/b").mkdir(parents=True)
    walk = trees.walk(tmp_path / "top")
    while next(walk).path != ("a", "b"):
        continue
    (tmp_path / "top/a/b").rename(tmp_path / "b")
    with pytest.raises(OSError, match="moved") as caught:
        next(walk)
    assert caught.value.errno == errno.ESTALE
