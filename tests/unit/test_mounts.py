# SPDX-License-Identifier: Apache-2.0
"""Mounts as values: option words, overlays said in each way, removal that may be repeated."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from shim import linux, mounts

pytestmark = pytest.mark.needs("root")


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder with some folders; whatever is mounted in it is gone afterwards."""
    for name in ("a", "b", "up", "work", "at", "source"):
        (tmp_path / name).mkdir()
    yield tmp_path
    for target in mounts.mounts_below(os.fspath(tmp_path)):
        mounts.unmount(target)


def entry(path: Path) -> list[str]:
    """Return the last mount at a path: its flags, then what follows in mountinfo."""
    lines = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return next(fields[5:] for fields in reversed(lines) if fields[4] == os.fspath(path))


def mount(kind: str, source: Path | str, target: Path, *options: str) -> mounts.Mount:
    made = mounts.Mount(type=kind, source=str(source), target=str(target), options=options)
    made.mount()
    return made


def test_a_file_system_that_takes_every_word_is_not_believed() -> None:
    assert not mounts.knows_option("overlay", "nonsense", "/")
    assert mounts.knows_option("tmpfs", "size", "1m")


# ---- option words


@pytest.mark.parametrize(
    ("words", "attributes", "data"),
    [
        (("ro",), ((linux.MOUNT_ATTR_RDONLY, 0, 0),), ("ro",)),
        (("ro", "rw"), ((0, linux.MOUNT_ATTR_RDONLY, 0),), ("ro", "rw")),
        (("rro",), ((linux.MOUNT_ATTR_RDONLY, 0, linux.AT_RECURSIVE),), ("ro",)),
        (
            ("nosuid", "nodev"),
            ((linux.MOUNT_ATTR_NOSUID | linux.MOUNT_ATTR_NODEV, 0, 0),),
            (),
        ),
        (("noatime",), ((linux.MOUNT_ATTR_NOATIME, linux.MOUNT_ATTR__ATIME, 0),), ()),
        (("relatime",), ((0, linux.MOUNT_ATTR__ATIME, 0),), ()),
        (("size=64m", "mode=755", "defaults"), (), ("size=64m", "mode=755")),
    ],
)
def test_option_words_are_sorted_by_what_they_are(
    words: tuple[str, ...], attributes: tuple[tuple[int, int, int], ...], data: tuple[str, ...]
) -> None:
    plan = mounts.parse_options(words)
    assert (plan.attributes, plan.data) == (attributes, data)


def test_bind_and_propagation_words_may_mean_the_tree() -> None:
    plan = mounts.parse_options(["rbind", "rslave", "private"])
    assert plan.bind == "rbind"
    assert plan.propagation == ((linux.MS_SLAVE, linux.AT_RECURSIVE), (linux.MS_PRIVATE, 0))


def test_a_mount_is_described_as_a_person_would_type_it() -> None:
    described = mounts.Mount(type="tmpfs", source="tmpfs", target="/t", options=("ro",)).describe()
    assert described == "mount -t tmpfs -o ro tmpfs /t"


# ---- single mounts


def test_a_tmpfs_gets_flags_and_data(place: Path) -> None:
    mount("tmpfs", "shm", place / "at", "nosuid", "noexec", "size=64m", "mode=1711")
    flags, *_, kind, source, data = entry(place / "at")
    assert {"nosuid", "noexec"} <= set(flags.split(","))
    assert (kind, source) == ("tmpfs", "shm")
    assert "size=65536k" in data
    assert (place / "at").stat().st_mode & 0o7777 == 0o1711


def test_a_read_only_bind_leaves_its_source_writable(place: Path) -> None:
    (place / "source/file").write_text("x")
    mount("bind", place / "source", place / "at", "ro", "nosuid")
    with pytest.raises(OSError, match="Read-only"):
        (place / "at/file").write_text("y")
    (place / "source/file").write_text("z")
    assert (place / "at/file").read_text() == "z"


def test_rbind_takes_the_tree_and_rro_makes_all_of_it_read_only(place: Path) -> None:
    (place / "source/deep").mkdir()
    mount("tmpfs", "inner", place / "source/deep")
    mount("bind", place / "source", place / "at", "rbind", "rro", "rprivate")
    with pytest.raises(OSError, match="Read-only"):
        (place / "at/deep/file").touch()
    (place / "source/deep/file").touch()
    assert (place / "at/deep/file").exists()


def test_propagation_is_set_below_a_shared_mount(place: Path) -> None:
    mount("tmpfs", "outer", place / "at", "shared")
    assert any(field.startswith("shared:") for field in entry(place / "at"))
    (place / "at/in").mkdir()
    mount("bind", place / "source", place / "at/in", "rbind", "rprivate")
    assert not any(field.startswith("shared:") for field in entry(place / "at/in"))


def test_a_mount_that_fails_leaves_nothing(place: Path) -> None:
    with pytest.raises(OSError, match="nonsense"):
        mount("tmpfs", "x", place / "at", "nonsense=1")
    with pytest.raises(FileNotFoundError):
        mount("bind", place / "missing", place / "at")
    assert mounts.mounts_below(os.fspath(place)) == []


# ---- many


def test_mount_all_is_all_or_nothing(place: Path) -> None:
    good = mounts.Mount(type="tmpfs", source="t", target=str(place / "at"))
    inner = mounts.Mount(type="bind", source=str(place / "a"), target=str(place / "b"))
    bad = mounts.Mount(type="bind", source=str(place / "missing"), target=str(place / "a"))
    with pytest.raises(FileNotFoundError):
        mounts.mount_all([good, inner, bad])
    assert mounts.mounts_below(os.fspath(place)) == []


def test_targets_below_a_root_do_not_leave_it(place: Path) -> None:
    (place / "a/evil").symlink_to(place / "b")
    (place / "a" / os.fspath(place / "b")[1:]).mkdir(parents=True)
    there = mounts.Mount(type="tmpfs", source="t", target="/evil")
    mounts.mount_all([there], root=os.fspath(place / "a"))
    below = mounts.mounts_below(os.fspath(place))
    assert below == [f"{place}/a{place}/b"]


def test_mounts_below_gives_the_order_to_unmount_and_odd_names(place: Path) -> None:
    odd = place / "at" / "with blank\tand\\slash ü"
    mount("tmpfs", "t", place / "at")
    odd.mkdir()
    mount("tmpfs", "t", odd)
    (place / "at-too").mkdir()
    mount("tmpfs", "t", place / "at-too")
    below = mounts.mounts_below(os.fspath(place / "at"))
    assert below == [os.fspath(odd), os.fspath(place / "at")]
    for target in below:
        mounts.unmount(target)
    assert mounts.mounts_below(os.fspath(place / "at")) == []


def test_unmount_takes_all_that_is_there_even_when_busy_and_may_be_repeated(place: Path) -> None:
    for _ in range(3):
        mount("tmpfs", "t", place / "at")
    (place / "at/file").touch()
    with (place / "at/file").open():
        mounts.unmount(os.fspath(place / "at"))
    assert mounts.mounts_below(os.fspath(place)) == []
    mounts.unmount(os.fspath(place / "at"))
    mounts.unmount(os.fspath(place / "missing/deeper"))


def test_unmount_does_not_follow_a_symlink(place: Path) -> None:
    mount("tmpfs", "t", place / "at")
    (place / "link").symlink_to(place / "at")
    mounts.unmount(os.fspath(place / "link"))
    assert mounts.mounts_below(os.fspath(place)) == [os.fspath(place / "at")]


# ---- overlay


@pytest.fixture(params=["lowerdir+", "page", "descriptors"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way in which layers can be named to the kernel."""
    if request.param != "lowerdir+":
        monkeypatch.setattr(mounts, "_takes_layers_one_by_one", lambda: False)
    if request.param == "descriptors":
        monkeypatch.setattr(mounts, "_PAGE_OPTIONS", 60)


@pytest.mark.usefixtures("way")
def test_an_overlay_shows_the_topmost_layer_first_and_writes_above(place: Path) -> None:
    (place / "a/both").write_text("top")
    (place / "b/both").write_text("bottom")
    (place / "b/lower").write_text("x")
    low = [os.fspath(place / name) for name in ("a", "b")]
    up, work, at = (os.fspath(place / name) for name in ("up", "work", "at"))
    mounts.overlay(low, up, work, at, ["nosuid"])
    assert (place / "at/both").read_text() == "top"
    (place / "at/new").touch()
    (place / "at/lower").unlink()
    assert sorted(os.listdir(place / "up")) == ["lower", "new"]
    assert "nosuid" in entry(place / "at")[0]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("names", [("a",), ("a", "b")])
def test_an_overlay_without_an_upper_layer_is_read_only(
    place: Path, names: tuple[str, ...]
) -> None:
    mounts.overlay([os.fspath(place / n) for n in names], None, None, os.fspath(place / "at"))
    with pytest.raises(OSError, match="Read-only"):
        (place / "at/file").touch()


@pytest.mark.usefixtures("way")
def test_names_with_commas_and_colons_are_layers_too(place: Path) -> None:
    odd = place / "a,upperdir=:b\\c"
    odd.mkdir()
    (odd / "file").touch()
    mounts.overlay([os.fspath(odd), os.fspath(place / "b")], None, None, os.fspath(place / "at"))
    assert os.listdir(place / "at") == ["file"]


def test_a_hundred_layers_are_stacked(place: Path) -> None:
    layers = [place / f"{number:0>64}" for number in range(100)]
    for number, layer in enumerate(layers):
        layer.mkdir()
        (layer / str(number)).touch()
    up, work, at = (os.fspath(place / name) for name in ("up", "work", "at"))
    mounts.overlay([os.fspath(layer) for layer in layers], up, work, at)
    assert len(os.listdir(at)) == 100


def test_a_layer_that_is_missing_is_an_error_and_nothing_is_mounted(place: Path) -> None:
    before = os.listdir("/proc/self/fd")
    up, work, at = (os.fspath(place / name) for name in ("up", "work", "at"))
    with pytest.raises(FileNotFoundError):
        mounts.overlay([os.fspath(place / "missing")], up, work, at)
    assert mounts.mounts_below(os.fspath(place)) == []
    assert os.listdir("/proc/self/fd") == before
