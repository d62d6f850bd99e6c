# SPDX-License-Identifier: Apache-2.0
"""Mount sources, device nodes and seccomp files of the host."""

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from cri_server import errors, sources, spec
from cri_server.pb import api_pb2 as api
from cri_server.spec import devices
from shim import linux
from tests.lab import driving

Propagation = api.MountPropagation


def mount(
    path: Path | str, kind: Propagation.ValueType = Propagation.PROPAGATION_PRIVATE
) -> api.Mount:
    return api.Mount(container_path="/x", host_path=str(path), propagation=kind)


def found_at(
    path: Path | str, kind: Propagation.ValueType = Propagation.PROPAGATION_PRIVATE
) -> sources.Source:
    """Return the source that is there already."""
    found = sources.find_source(mount(path, kind))
    assert found is not None
    return found


# -- mount sources ---------------------------------------------------------------------------------


def test_a_source_is_where_its_links_lead(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real/file").touch()
    (tmp_path / "link").symlink_to("real")
    found = found_at(tmp_path / "link/../link/file")
    assert found == sources.Source(path=str(tmp_path / "real/file"), directory=False)
    assert found_at(tmp_path / "link").directory


def test_a_missing_source_becomes_a_folder(tmp_path: Path) -> None:
    assert sources.find_source(mount(tmp_path / "a/b")) is None
    assert not (tmp_path / "a").exists()
    found = sources.make_source(mount(tmp_path / "a/b"))
    assert found == sources.Source(path=str(tmp_path / "a/b"), directory=True)
    assert (tmp_path / "a/b").is_dir()


def test_a_source_that_cannot_be_made_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("file/below", "dangling", "loop"):
        with pytest.raises(errors.InvalidArgument, match=name):
            sources.find_source(mount(tmp_path / name)) or sources.make_source(
                mount(tmp_path / name)
            )


def test_a_missing_source_deeper_than_can_be_made_is_refused(tmp_path: Path) -> None:
    deep = mount(f"{tmp_path}{'/a' * 1500}")
    assert sources.find_source(deep) is None
    with pytest.raises(errors.InvalidArgument, match="too many folders"):
        sources.make_source(deep)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """Return a folder that is a mount of its own, private."""
    folder = tmp_path / "mounted"
    folder.mkdir()
    linux.mount("none", os.fspath(folder), "tmpfs", 0, "size=64k")
    linux.mount("none", os.fspath(folder), "", linux.MS_PRIVATE)
    yield folder
    linux.umount2(os.fspath(folder), linux.MNT_DETACH)


@pytest.mark.needs("root")
def test_propagation_needs_a_mount_that_propagates(mounted: Path) -> None:
    both = (Propagation.PROPAGATION_BIDIRECTIONAL, Propagation.PROPAGATION_HOST_TO_CONTAINER)
    below = mounted / "below"
    below.mkdir()
    for kind in both:
        for path in (below, mounted / "missing/deep"):
            with pytest.raises(errors.InvalidArgument, match="not shared"):
                sources.find_source(mount(path, kind))
    linux.mount("none", os.fspath(mounted), "", linux.MS_SHARED)
    for kind in both:
        assert found_at(below, kind).directory
        assert sources.find_source(mount(mounted / "missing/deep", kind)) is None
    assert found_at(below).directory


# -- devices ---------------------------------------------------------------------------------------


def request(path: Path | str, target: str = "/dev/t") -> devices.Request:
    return devices.Request(host_path=str(path), container_path=target, access="rw")


def test_a_device_is_looked_at_through_its_links(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/dev/null")
    (found,) = sources.device_nodes([request(tmp_path / "link")])
    assert (found.path, found.kind, found.major, found.minor, found.access) == (
        "/dev/t",
        "c",
        1,
        3,
        "rw",
    )


@pytest.mark.needs("root")
def test_a_folder_stands_for_the_devices_below_it(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "pts").mkdir()
    os.mknod(tmp_path / "sub/disk", stat.S_IFBLK | 0o600, os.makedev(7, 1))
    os.mknod(tmp_path / "zero", stat.S_IFCHR | 0o640, os.makedev(1, 5))
    os.mknod(tmp_path / "pts/0", stat.S_IFCHR | 0o640, os.makedev(136, 0))
    (tmp_path / "plain").touch()
    (tmp_path / "link").symlink_to("/dev/null")
    found = sources.device_nodes([request(tmp_path, "/dev/d")])
    assert [(n.path, n.kind, n.major, n.minor, n.mode) for n in found] == [
        ("/dev/d/zero", "c", 1, 5, 0o640),
        ("/dev/d/sub/disk", "b", 7, 1, 0o600),
    ]


def test_what_is_no_device_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    for name in ("plain", "missing"):
        with pytest.raises(errors.InvalidArgument, match=name):
            sources.device_nodes([request(tmp_path / name)])


@pytest.mark.needs("root")
def test_a_folder_of_too_many_devices_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "DEVICE_LIMIT", 2)
    for number in range(3):
        os.mknod(tmp_path / f"n{number}", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    with pytest.raises(errors.InvalidArgument, match="too many"):
        sources.device_nodes([request(tmp_path)])


def test_the_hosts_devices_are_nodes_and_no_terminals() -> None:
    found = {node.path: node for node in sources.host_devices()}
    assert isinstance(found["/dev/null"], spec.DeviceNode)
    assert not [path for path in found if path.startswith(("/dev/pts/", "/dev/shm/"))]


# -- seccomp ---------------------------------------------------------------------------------------


def test_a_seccomp_file_is_an_object(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps({"defaultAction": "SCMP_ACT_LOG"}))
    assert sources.seccomp_profile(str(path)) == {"defaultAction": "SCMP_ACT_LOG"}


@pytest.mark.parametrize("text", ["", "null", "[]", '"x"', "{", "\xff", "[" * 100_000])
def test_a_seccomp_file_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "profile.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(errors.InvalidArgument, match="seccomp"):
        sources.seccomp_profile(str(path))


def test_a_seccomp_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "huge").write_bytes(b" " * (sources.PROFILE_LIMIT + 1))
    for name in ("missing", "fifo", "huge", "."):
        with (
            driving.keeping_descriptors(),
            pytest.raises(errors.InvalidArgument, match="seccomp"),
        ):
            sources.seccomp_profile(str(tmp_path / name))
