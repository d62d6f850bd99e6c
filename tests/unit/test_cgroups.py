# SPDX-License-Identifier: Apache-2.0
"""Where cgroups are, in each mode and for each driver; and their removal on real directories."""

import os
from pathlib import Path
from typing import Literal

import pytest

from cri_server import cgroups, errors
from shim import process

V1 = """\
1 0 0:1 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:1 - cgroup cgroup rw,cpu,cpuacct
2 0 0:2 / /sys/fs/cgroup/memory rw,nosuid - cgroup cgroup rw,memory
3 0 0:3 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,release_agent=/x,name=systemd
4 0 0:4 / /proc rw - proc proc rw
"""
V2 = "5 0 0:5 / /sys/fs/cgroup{} rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
SLICE = "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice"


@pytest.mark.parametrize(
    ("text", "mode"), [(V1, "v1"), (V1 + V2.format("/unified"), "hybrid"), (V2.format(""), "v2")]
)
def test_mode_follows_from_the_mounts(text: str, mode: str) -> None:
    assert cgroups.detect(text).mode == mode


def test_v1_controllers_are_found_behind_joint_mounts() -> None:
    found = cgroups.detect(V1)
    assert found.v1["cpuacct"] == Path("/sys/fs/cgroup/cpu,cpuacct")
    assert found.v1["name=systemd"] == Path("/sys/fs/cgroup/systemd")
    assert found.controllers() == ("cpu", "cpuacct", "memory")


def groups(
    text: str = V2.format(""), driver: Literal["cgroupfs", "systemd"] = "cgroupfs"
) -> cgroups.Cgroups:
    return cgroups.Cgroups(cgroups.detect(text), driver)


def test_cgroupfs_paths() -> None:
    g = groups()
    assert g.container_path("p", "/kubepods/pod1", "c") == "/kubepods/pod1/c"
    assert g.container_path("p", "", "c") == "/cri-server/p/c"
    assert g.directories("/kubepods/pod1/c") == {"": "/sys/fs/cgroup/kubepods/pod1/c"}
    assert g.pod_directories("p", "/a/") == {"": "/sys/fs/cgroup/a"}


def test_systemd_paths() -> None:
    g = groups(driver="systemd")
    path = g.container_path("p", SLICE, "c")
    assert path == "kubepods-burstable-pod1.slice:cri-server:c"
    assert g.directories(path) == {"": f"/sys/fs/cgroup{SLICE}/cri-server-c.scope"}
    assert g.container_path("p", "", "c") == "system.slice:cri-server:c"
    assert g.directories("-.slice:cri-server:c") == {"": "/sys/fs/cgroup/cri-server-c.scope"}


def test_a_prefix_is_in_the_names_of_both_drivers() -> None:
    found = cgroups.detect(V2.format(""))
    g = cgroups.Cgroups(found, "cgroupfs", prefix="crio")
    assert g.container_path("p", "/kubepods/pod1", "c") == "/kubepods/pod1/crio-c"
    g = cgroups.Cgroups(found, "systemd", prefix="crio")
    path = g.container_path("p", SLICE, "c")
    assert g.directories(path) == {"": f"/sys/fs/cgroup{SLICE}/crio-c.scope"}
    assert groups(driver="systemd").directories(path) == g.directories(path), "of an earlier run"


def test_usage_is_read_from_v2_too_where_both_are() -> None:
    g = groups(V1 + V2.format("/unified"))
    assert g.every("/a/c")["unified"] == "/sys/fs/cgroup/unified/a/c"
    assert g.pod_accounts("p", "/a")["unified"] == "/sys/fs/cgroup/unified/a"
    assert "unified" not in g.directories("/a/c"), "nobody kills or limits by it"
    for text in (V1, V2.format("")):
        assert groups(text).every("/a/c") == groups(text).directories("/a/c")
    systemd = groups(V1 + V2.format("/unified"), driver="systemd")
    assert systemd.every("a.slice:x:c")["unified"] == "/sys/fs/cgroup/unified/a.slice/x-c.scope"
    for none in ("", "/"):
        assert systemd.pod_accounts("p", none) == {}, "system.slice is not the pod's"


def test_a_mark_is_an_empty_cgroup_that_goes_again(tmp_path: Path) -> None:
    (tmp_path / "a.slice").mkdir()
    found = cgroups.Hierarchy(mode="v2", v1={}, unified=tmp_path)
    g = cgroups.Cgroups(found, "systemd", prefix="crio")
    for _ in range(2):
        g.mark("a.slice:crio:p")
    g.mark("b.slice:crio:p")

    assert (tmp_path / "a.slice/crio-p.scope").is_dir()
    assert not (tmp_path / "b.slice").exists(), "a slice is systemd's to make"
    for _ in range(2):
        g.remove_all("a.slice:crio:p")
    assert not (tmp_path / "a.slice/crio-p.scope").exists()


def test_a_container_of_the_other_driver_is_found_too() -> None:
    path = groups(driver="systemd").container_path("p", "", "c")
    assert groups().directories(path) == groups(driver="systemd").directories(path)
    path = groups().container_path("p", "", "c")
    assert groups(driver="systemd").directories(path) == groups().directories(path)


@pytest.mark.parametrize("parent", ["/a/../b", "..", "/a\n"])
def test_a_parent_that_leaves_the_tree_is_refused(parent: str) -> None:
    with pytest.raises(errors.InvalidArgument, match="cgroup_parent"):
        groups().pod_parent("p", parent)


@pytest.mark.parametrize(
    "parent", ["/kubepods/pod1", "a.slice:b.slice", "x.scope", "a--b.slice", ".slice"]
)
def test_the_systemd_driver_takes_slices_only(parent: str) -> None:
    with pytest.raises(errors.InvalidArgument, match="slice"):
        groups(driver="systemd").pod_parent("p", parent)


def test_what_a_runtime_made_in_both_hierarchies_of_a_hybrid_host_is_removed(
    tmp_path: Path,
) -> None:
    """As after one that was killed: the next look is at v1, where it had made nothing yet."""
    v1 = {"freezer": tmp_path / "freezer", "memory": tmp_path / "memory"}
    hierarchy = cgroups.Hierarchy(mode="hybrid", v1=v1, unified=tmp_path / "unified")
    (tmp_path / "unified/pod/c").mkdir(parents=True)
    (tmp_path / "memory/pod/c").mkdir(parents=True)

    cgroups.Cgroups(hierarchy, "cgroupfs").remove_all("/pod/c")

    assert not [*tmp_path.glob("*/pod/*")]


async def test_only_what_was_missing_is_removed(tmp_path: Path) -> None:
    hierarchy = cgroups.Hierarchy(mode="v2", v1={}, unified=tmp_path)
    g = cgroups.Cgroups(hierarchy, "cgroupfs")
    (tmp_path / "old").mkdir()
    made = g.missing("/old/new/deep")
    assert made == ("/old/new/deep", "/old/new")
    (tmp_path / "old/new/deep").mkdir(parents=True)

    await g.remove(made)

    assert [*os.walk(tmp_path)] == [(f"{tmp_path}", ["old"], []), (f"{tmp_path}/old", [], [])]


async def test_a_parent_in_use_is_removed_with_its_last_user(tmp_path: Path) -> None:
    hierarchy = cgroups.Hierarchy(mode="v2", v1={}, unified=tmp_path)
    g = cgroups.Cgroups(hierarchy, "cgroupfs")
    (tmp_path / "root/p1").mkdir(parents=True)
    (tmp_path / "root/p2").mkdir()

    await g.remove(("/root/p1", "/root"))
    assert os.listdir(tmp_path) == ["root"]
    await g.remove(("/root/p2",))
    assert os.listdir(tmp_path) == []


def test_no_path_is_not_the_root(tmp_path: Path) -> None:
    child = process.spawn(["sleep", "1000"])
    (tmp_path / "cgroup.procs").write_text(f"{child.pid}\n")
    hierarchy = cgroups.Hierarchy(mode="v2", v1={}, unified=tmp_path)
    groups = cgroups.Cgroups(hierarchy, "cgroupfs")
    for nowhere in ("", "/", "//"):
        assert not groups.kill(nowhere)
        groups.remove_all(nowhere)
    assert process.alive(child.pid, process.start_time(child.pid))
    process.kill_group(child)
    process.reap(child)
