# SPDX-License-Identifier: Apache-2.0
"""The mount list, and what about mounts is refused."""

import dataclasses
import itertools
from typing import Any

import pytest

from cri_server import errors, spec
from cri_server.pb import api_pb2 as api
from tests.lab import wishes

Propagation = api.MountPropagation
FILES = spec.PodFiles(
    resolv_conf="/p/resolv.conf", hostname="/p/hostname", hosts="/p/hosts", shm="/p/shm"
)


def container(*mounts: api.Mount, **changes: object) -> spec.oci.Spec:
    return spec.container(wishes.given(wishes.container(mounts=mounts), **changes))


def by_target(document: spec.oci.Spec) -> dict[str, spec.oci.Mount]:
    return {m["destination"]: m for m in document["mounts"]}


def test_the_defaults_are_there_parents_first() -> None:
    found = container()["mounts"]
    assert [m["destination"] for m in found] == [
        "/proc",
        "/dev",
        "/sys",
        "/dev/pts",
        "/dev/shm",
        "/dev/mqueue",
        "/sys/fs/cgroup",
    ]
    assert {m["destination"] for m in found if "ro" in m["options"]} == {"/sys", "/sys/fs/cgroup"}


def test_a_privileged_container_may_write_sysfs_and_cgroups() -> None:
    wish = wishes.container(security=wishes.security(privileged=True))
    found = spec.container(wishes.given(wish))["mounts"]
    assert [m["destination"] for m in found if "rw" in m["options"]] == ["/sys", "/sys/fs/cgroup"]
    assert not [m for m in found if "ro" in m["options"]]


def test_a_privileged_container_sees_the_hosts_mount_of_cgroup_v2() -> None:
    wish = wishes.container(security=wishes.security(privileged=True))
    host = wishes.facts(cgroup_mount="/sys/fs/cgroup")
    found = by_target(spec.container(wishes.given(wish, host=host)))["/sys/fs/cgroup"]
    assert (found["type"], found["source"]) == ("bind", "/sys/fs/cgroup")
    assert {"rbind", "rprivate", "rw"} <= {*found["options"]}
    own = spec.container(wishes.given(wishes.container(), host=host))
    assert by_target(own)["/sys/fs/cgroup"]["type"] == "cgroup"


def test_a_handler_may_let_containers_write_to_their_cgroups_and_to_no_more() -> None:
    given = spec.Defaults(cgroup_writable_key="[runtimes.x] cgroup_writable")
    found = by_target(container(defaults=given))
    assert ("rw" in found["/sys/fs/cgroup"]["options"], "ro" in found["/sys"]["options"]) == (
        True,
        True,
    )


@pytest.mark.parametrize("readonly", [True, False])
def test_the_pods_files_are_bound_and_writable_only_if_the_root_is(readonly: bool) -> None:
    wish = wishes.container(security=wishes.security(readonly_rootfs=readonly))
    document = spec.container(wishes.given(wish, pod_files=FILES))
    found = by_target(document)
    mode = "ro" if readonly else "rw"
    assert document["root"] == {"path": "/rootfs", "readonly": readonly}
    for name in ("resolv.conf", "hostname", "hosts"):
        mount = found[f"/etc/{name}"]
        assert (mount["source"], mount["options"]) == (f"/p/{name}", ["rbind", "rprivate", mode])
    assert found["/dev/shm"]["options"] == ["rbind", "rprivate", "rw"]
    assert len([m for m in document["mounts"] if m["destination"] == "/dev/shm"]) == 1


def test_a_request_replaces_a_default_or_a_file_of_the_pod_at_the_same_place() -> None:
    found = container(
        api.Mount(container_path="/etc/hosts", host_path="/mine/hosts"),
        api.Mount(container_path="/dev//shm/", host_path="/mine/shm"),
        api.Mount(container_path="/sys", host_path="/sys"),
        pod_files=FILES,
    )
    targets = [m["destination"] for m in found["mounts"]]
    assert len(targets) == len(set(targets))
    assert by_target(found)["/etc/hosts"]["source"] == "/mine/hosts"
    assert by_target(found)["/dev/shm"]["source"] == "/mine/shm"
    assert by_target(found)["/sys"]["type"] == "bind"


@pytest.mark.parametrize(
    ("target", "others"),
    [
        ("/dev", ["/proc", "/sys", "/sys/fs/cgroup"]),
        ("/sys", ["/proc", "/dev", "/dev/pts", "/dev/shm", "/dev/mqueue"]),
        ("/sys/fs", ["/proc", "/dev", "/sys", "/dev/pts", "/dev/shm", "/dev/mqueue"]),
    ],
)
def test_a_request_for_a_folder_replaces_all_defaults_below_it(
    target: str, others: list[str]
) -> None:
    found = container(api.Mount(container_path=target, host_path=target))
    assert [m["destination"] for m in found["mounts"] if m["type"] != "bind"] == others


def test_mounts_are_ordered_by_depth_and_otherwise_as_listed() -> None:
    listed = ["/z/deep/er", "/b", "/a", "/z/deep", "/proc/x/y", "/a/b"]
    found = container(*(api.Mount(container_path=p, host_path="/h") for p in listed))
    requested = [m["destination"] for m in found["mounts"] if m["type"] == "bind"]
    assert requested == ["/b", "/a", "/z/deep", "/a/b", "/z/deep/er", "/proc/x/y"]


@pytest.mark.parametrize(
    ("mount", "options", "root"),
    [
        (api.Mount(), ["rbind", "rprivate", "rw"], None),
        (api.Mount(readonly=True), ["rbind", "rprivate", "ro"], None),
        (api.Mount(readonly=True, recursive_read_only=True), ["rbind", "rprivate", "rro"], None),
        (
            api.Mount(propagation=Propagation.PROPAGATION_HOST_TO_CONTAINER, readonly=True),
            ["rbind", "rslave", "ro"],
            "rslave",
        ),
        (
            api.Mount(propagation=Propagation.PROPAGATION_BIDIRECTIONAL),
            ["rbind", "rshared", "rw"],
            "rshared",
        ),
    ],
    ids=itertools.count(),
)
def test_access_and_propagation(mount: api.Mount, options: list[str], root: str | None) -> None:
    mount.MergeFrom(api.Mount(container_path="/data", host_path="/h"))
    wishes.validate(wishes.container(mounts=[mount]))
    document = container(mount)
    assert by_target(document)["/data"]["options"] == options
    assert document["linux"].get("rootfsPropagation") == root


def test_bidirectional_wins_for_the_root() -> None:
    kinds = (Propagation.PROPAGATION_BIDIRECTIONAL, Propagation.PROPAGATION_HOST_TO_CONTAINER)
    mounts = [api.Mount(container_path=f"/{k}", host_path="/h", propagation=k) for k in kinds]
    assert container(*mounts)["linux"]["rootfsPropagation"] == "rshared"


def test_the_source_is_where_the_host_path_really_is() -> None:
    mount = api.Mount(container_path="/data", host_path="/link/")
    assert by_target(container(mount))["/data"]["source"] == "/link"
    found = by_target(container(mount, sources={"/link/": "/real"}))
    assert found["/data"]["source"] == "/real"


RRO = {"readonly": True, "recursive_read_only": True}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"container_path": ""}, "container_path"),
        ({"container_path": "relative"}, "container_path"),
        ({"container_path": "/"}, "root cannot"),
        ({"container_path": "/x/.."}, "root cannot"),
        ({"container_path": "/x\0"}, "NUL"),
        ({"host_path": ""}, "host_path"),
        ({"host_path": "relative"}, "host_path"),
        ({"container_path": "/proc"}, "proc"),
        ({"container_path": "/proc/x/.."}, "proc"),
        ({"propagation": 7}, "propagation"),
        ({"recursive_read_only": True}, "readonly"),
        (RRO | {"propagation": Propagation.PROPAGATION_BIDIRECTIONAL}, "PRIVATE"),
        (RRO | {"propagation": Propagation.PROPAGATION_HOST_TO_CONTAINER}, "PRIVATE"),
        ({"uidMappings": [api.IDMapping(length=1)]}, "uidMappings"),
        ({"gidMappings": [api.IDMapping(length=1)]}, "gidMappings"),
    ],
)
def test_a_mount_that_cannot_be_is_refused(fields: dict[str, object], message: str) -> None:
    mount = api.Mount(**({"container_path": "/data", "host_path": "/h"} | fields))  # type: ignore[arg-type]
    with pytest.raises(errors.InvalidArgument, match=message):
        wishes.validate(wishes.container(mounts=[mount]))


def test_the_hosts_proc_may_be_mounted_on_proc() -> None:
    mount = api.Mount(container_path="/proc", host_path="/proc")
    wishes.validate(wishes.container(mounts=[mount]))
    assert by_target(container(mount))["/proc"]["type"] == "bind"
    with pytest.raises(errors.InvalidArgument, match="/proc"):
        container(mount, sources={"/proc": "/home/fake"})


def test_recursive_read_only_needs_the_runtime() -> None:
    mount = api.Mount(container_path="/d", host_path="/h", readonly=True, recursive_read_only=True)
    host = dataclasses.replace(wishes.FACTS, recursive_read_only=False)
    with pytest.raises(errors.InvalidArgument, match=r"^RROUnsupported: .*'/d'"):
        wishes.validate(wishes.container(mounts=[mount]), host=host)


def image_mount(**fields: Any) -> api.Mount:
    usual: dict[str, Any] = {
        "container_path": "/d",
        "image": api.ImageSpec(image="x"),
        "readonly": True,
    }
    return api.Mount(**(usual | fields))


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("host_path", {"host_path": "/h"}),
        ("image.image", {"image": api.ImageSpec()}),
        ("readonly", {"readonly": False}),
        ("propagation", {"propagation": api.MountPropagation.PROPAGATION_BIDIRECTIONAL}),
        ("image_sub_path", {"image_sub_path": "/etc"}),
        ("image_sub_path", {"image_sub_path": "a/../../b"}),
        ("image_sub_path", {"image_sub_path": "a\0b"}),
        ("container_path", {"container_path": "d"}),
        ("container_path", {"container_path": "/"}),
    ],
)
def test_an_image_volume_that_cannot_be_is_refused_by_name(
    field: str, fields: dict[str, Any]
) -> None:
    with pytest.raises(errors.InvalidArgument, match=rf"^ImageVolumeMountFailed: .*{field}"):
        wishes.validate(wishes.container(mounts=[image_mount(**fields)]))


def test_a_sub_path_without_an_image_is_refused() -> None:
    mount = api.Mount(container_path="/d", host_path="/h", image_sub_path="x")
    with pytest.raises(errors.InvalidArgument, match="image_sub_path"):
        wishes.validate(wishes.container(mounts=[mount]))


def test_an_image_volume_is_a_read_only_bind_mount_without_set_id_and_devices() -> None:
    mounts = [image_mount(), image_mount(container_path="/e", image_sub_path="s/t")]
    wishes.validate(wishes.container(mounts=mounts))
    sources = {spec.source_key(m): f"/made{m.container_path}" for m in mounts}
    found = by_target(container(*mounts, sources=sources))
    assert [found[t]["source"] for t in ("/d", "/e")] == ["/made/d", "/made/e"]
    assert found["/d"]["options"] == ["rbind", "rprivate", "ro", "nosuid", "nodev"]


def test_volumes_of_the_image_are_those_that_no_mount_covers() -> None:
    wish = wishes.container(mounts=[api.Mount(container_path="/covered", host_path="/h")])
    declared = ("/data", "/covered/", "/data/../data", "/../../etc", "/covered/below", "/coveredx")
    image = spec.ImageConfig(volumes=declared)
    assert spec.image_volumes(wish, image) == ("/data", "/etc", "/coveredx")


@pytest.mark.parametrize("path", ["/" + "n" * 256, "/" + "ü" * 128, "/p" * 2048])
def test_what_is_longer_than_linux_takes_it_is_refused(path: str) -> None:
    mount = api.Mount(container_path=path, host_path="/h")
    for wish in (wishes.container(mounts=[mount]), wishes.container(working_dir=path)):
        with pytest.raises(errors.InvalidArgument, match="longer"):
            wishes.validate(wish)
    image = spec.ImageConfig(cmd=("/x",), volumes=(path,))
    with pytest.raises(errors.InvalidArgument, match="longer"):
        wishes.validate(wishes.container(), image=image)


def test_a_relative_volume_of_the_image_is_one_of_the_root_and_none_leaves_it() -> None:
    declared = ("data", "./x", "C:/y", "../../etc/z")
    found = spec.image_volumes(wishes.container(), spec.ImageConfig(volumes=declared))
    assert found == ("/data", "/x", "/C:/y", "/etc/z")


def test_volumes_are_writable_mounts_before_what_lies_in_them() -> None:
    inner = api.Mount(container_path="/data/config", host_path="/h", readonly=True)
    found = spec.with_volumes(container(inner)["mounts"], {"/data": "/v/0", "/var/lib/x/y": "/v/1"})
    targets = [m["destination"] for m in found]
    assert targets.index("/data") < targets.index("/data/config")
    assert targets[-1] == "/var/lib/x/y"
    assert by_target({"mounts": found})["/data"] == {
        "destination": "/data",
        "type": "bind",
        "source": "/v/0",
        "options": ["rbind", "rprivate", "rw"],
    }


@pytest.mark.parametrize("volume", ["/", "/..", "..", ".", "/a\0", ""])
def test_a_volume_of_the_image_that_is_no_folder_below_the_root_is_refused(volume: str) -> None:
    with pytest.raises(errors.InvalidArgument, match="VOLUME"):
        wishes.validate(wishes.container(), image=spec.ImageConfig(cmd=("/x",), volumes=(volume,)))
