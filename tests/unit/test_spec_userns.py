# SPDX-License-Identifier: Apache-2.0
"""What a pod with a user namespace may ask for, and what its containers' specs say of it."""

import dataclasses
from typing import Any

import pytest

from cri_server import errors, spec
from cri_server.pb import api_pb2 as api
from tests.lab import wishes

Mode = api.NamespaceMode
MAPPING = api.IDMapping(host_id=100000, length=65536)
IDS = spec.IdMap(uid=100000, uids=65536, gid=200000, gids=1000)
FILES = spec.PodFiles(resolv_conf="/p/resolv.conf", hosts="/p/hosts", shm="/p/shm")


def userns(**changes: Any) -> api.UserNamespace:
    usual: dict[str, Any] = {"mode": Mode.POD, "uids": [MAPPING], "gids": [MAPPING]}
    return api.UserNamespace(**usual | changes)


def pod(wanted: api.UserNamespace | None = None, /, **options: Any) -> api.PodSandboxConfig:
    return wishes.pod(options={"userns_options": wanted or userns(), **options})


def mapping(host_id: int, length: int, container_id: int = 0) -> list[api.IDMapping]:
    return [api.IDMapping(host_id=host_id, length=length, container_id=container_id)]


def test_a_pods_ids() -> None:
    wanted = pod(userns(gids=mapping(200000, 1000)))
    spec.validate_sandbox(wanted, wishes.FACTS)
    assert spec.ids(wanted) == IDS
    assert spec.ids(wishes.pod()) is None
    assert spec.ids(pod(api.UserNamespace(mode=Mode.NODE))) is None


def test_who_owns_what_outside() -> None:
    assert IDS.owner(0, 0) == (100000, 200000)
    assert IDS.owner(65535, 999) == (165535, 200999)
    assert IDS.owner(65536, 1000) == (100000, 200000)  # not in the pod: its root's


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (userns(uids=[]), "userns_options.uids: one mapping is needed, 0 are given"),
        (userns(gids=[]), "userns_options.gids: one mapping is needed"),
        (userns(uids=[MAPPING, MAPPING]), "one mapping is needed, 2 are given"),
        (userns(uids=mapping(1, 9, 1)), "userns_options.uids: must map container_id 0"),
        (userns(gids=mapping(1, 0)), "userns_options.gids: length is 0"),
        (userns(gids=mapping(0, 9)), "userns_options.gids: host_id 0"),
        (userns(uids=mapping(4294967294, 2)), "userns_options.uids: 4294967295 is not an id"),
        (userns(mode=Mode.NODE), "userns_options: mode NODE has no mappings"),
        (userns(mode=Mode.CONTAINER), "userns_options: CONTAINER"),
        (userns(mode=Mode.TARGET), "userns_options: TARGET"),
        (userns(mode=7), "userns_options: 7"),
    ],
)
def test_what_no_pod_can_have(wanted: api.UserNamespace, message: str) -> None:
    with pytest.raises(errors.InvalidArgument, match=message):
        spec.validate_sandbox(pod(wanted), wishes.FACTS)


def test_the_last_ids_of_the_host_are_ids() -> None:
    spec.validate_sandbox(pod(userns(uids=mapping(4294967294, 1))), wishes.FACTS)


@pytest.mark.parametrize("field", ["pid", "ipc"])
def test_the_hosts_namespaces_exclude_it(field: str) -> None:
    with pytest.raises(errors.InvalidArgument, match=f"namespace_options.{field}"):
        spec.validate_sandbox(pod(userns(), **{field: Mode.NODE}), wishes.FACTS)


def test_a_host_that_cannot_says_why() -> None:
    facts = dataclasses.replace(wishes.FACTS, no_user_namespaces="the moon is full")
    with pytest.raises(errors.FailedPrecondition, match=r"userns_options: .*the moon is full"):
        spec.validate_sandbox(pod(), facts)
    spec.validate_sandbox(pod(api.UserNamespace(mode=Mode.NODE)), facts)


@pytest.mark.parametrize(
    ("length", "expected"), [(1000, "0 999"), (1 << 31, "0 2147483647"), (1 << 32 - 1, None)]
)
def test_ping_is_for_the_groups_of_the_pod(length: int, expected: str | None) -> None:
    given = spec.sysctls(pod(userns(gids=mapping(5, length))))["net.ipv4.ping_group_range"]
    assert given == (expected or f"0 {min(length, 1 << 31) - 1}")


def test_a_sandboxs_user_must_be_in_it() -> None:
    outside = pod()
    outside.linux.security_context.run_as_user.value = 65536
    with pytest.raises(errors.InvalidArgument, match="run_as_user: user 65536"):
        spec.validate_sandbox(outside, wishes.FACTS)
    small = pod(userns(uids=mapping(9, 10), gids=mapping(9, 10)))
    spec.validate_sandbox(small, wishes.FACTS)
    given = spec.SandboxInput(
        id="p", config=small, rootfs="/r", init="/i", namespaces={"user": "/ns/user"},
        cgroups_path="/c", host=wishes.FACTS,
    )  # fmt: skip
    document = spec.sandbox(given)
    assert document["process"]["user"]["uid"] == 9  # nobody is not in it
    assert document["linux"]["uidMappings"] == [{"containerID": 0, "hostID": 9, "size": 10}]


# -- containers ------------------------------------------------------------------------------------


def options(wanted: api.UserNamespace) -> dict[str, Any]:
    return {"namespace_options": api.NamespaceOption(userns_options=wanted)}


def test_a_container_has_its_pods_namespace() -> None:
    same = wishes.container(security=wishes.security(**options(userns())))
    unsaid = wishes.container()
    hosts = wishes.container(security=wishes.security(**options(api.UserNamespace(mode=Mode.NODE))))
    for wish in (same, unsaid):
        wishes.validate(wish, sandbox=pod())
    for wish in (hosts, unsaid):
        wishes.validate(wish, sandbox=wishes.pod())
    for wish, of in ((hosts, pod()), (same, wishes.pod()), (same, pod(userns(uids=mapping(1, 9))))):
        with pytest.raises(errors.InvalidArgument, match="userns_options: differs"):
            wishes.validate(wish, sandbox=of)


@pytest.mark.parametrize(
    ("fields", "of"),
    [
        ({"uidMappings": [MAPPING]}, pod()),
        ({"gidMappings": [MAPPING]}, pod()),
        ({"uidMappings": mapping(1, 9), "gidMappings": mapping(1, 9)}, pod()),
        ({"uidMappings": [MAPPING], "gidMappings": [MAPPING]}, wishes.pod()),
        ({"propagation": api.PROPAGATION_BIDIRECTIONAL}, pod()),
    ],
)
def test_mounts_that_do_not_fit(fields: dict[str, Any], of: api.PodSandboxConfig) -> None:
    mount = api.Mount(host_path="/a", container_path="/data", **fields)
    with pytest.raises(errors.InvalidArgument, match=r"^mount '/data'"):
        wishes.validate(wishes.container(mounts=[mount]), sandbox=of)
    of_image = api.Mount(
        image=api.ImageSpec(image="x"), readonly=True, container_path="/data", **fields
    )
    with pytest.raises(errors.InvalidArgument, match=r"^ImageVolumeMountFailed: mount '/data'"):
        wishes.validate(wishes.container(mounts=[of_image]), sandbox=of)


def by_target(wish: api.ContainerConfig, **changes: Any) -> dict[str, spec.oci.Mount]:
    document = spec.container(wishes.given(wish, ids=IDS, **changes))
    return {m["destination"]: m for m in document["mounts"]}


def test_the_spec_names_the_namespace_and_its_ids() -> None:
    namespaces = {"user": "/ns/user", "network": "/n"}
    linux = spec.container(wishes.given(ids=IDS, namespaces=namespaces))["linux"]
    assert {"type": "user", "path": "/ns/user"} in linux["namespaces"]
    assert linux["uidMappings"] == [{"containerID": 0, "hostID": 100000, "size": 65536}]
    assert linux["gidMappings"] == [{"containerID": 0, "hostID": 200000, "size": 1000}]
    assert "uidMappings" not in spec.container(wishes.given())["linux"]


def test_only_mounts_with_mappings_come_from_copies() -> None:
    mapped: dict[str, Any] = {"uidMappings": [MAPPING], "gidMappings": [MAPPING]}
    mounts = [
        api.Mount(host_path="/a", container_path="/mapped", **mapped),
        api.Mount(host_path="/a", container_path="/plain"),
    ]
    found = by_target(wishes.container(mounts=mounts), mapped={"/mapped": "/copies/0"})
    assert (found["/mapped"]["source"], found["/plain"]["source"]) == ("/copies/0", "/a")


def test_read_only_mounts_name_the_flags_that_stay() -> None:
    mounts = [
        api.Mount(host_path="/a", container_path="/ro", readonly=True),
        api.Mount(host_path="/a", container_path="/rw"),
        api.Mount(host_path="/b", container_path="/other", readonly=True),
    ]
    wish = wishes.container(mounts=mounts, security=wishes.security(readonly_rootfs=True))
    locked = {"/a": ("nosuid", "nodev"), "/p/hosts": ("noexec",)}
    found = by_target(wish, locked=locked, pod_files=FILES)
    assert found["/ro"]["options"] == ["rbind", "rprivate", "ro", "nosuid", "nodev"]
    assert found["/rw"]["options"] == ["rbind", "rprivate", "rw"]
    assert found["/other"]["options"] == ["rbind", "rprivate", "ro"]
    assert found["/etc/hosts"]["options"] == ["rbind", "rprivate", "ro", "noexec"]


def test_sysfs_of_a_pod_on_the_hosts_network_is_a_bind_mount() -> None:
    found = by_target(wishes.container(), sysfs="/copies/sys")["/sys"]
    assert (found["type"], found["source"]) == ("bind", "/copies/sys")
    assert {"rprivate", "nosuid", "noexec", "nodev", "ro"} <= set(found["options"])
    assert by_target(wishes.container())["/sys"]["type"] == "sysfs"


def test_terminals_have_a_group_only_if_the_pod_does() -> None:
    small = dataclasses.replace(IDS, gids=5)
    document = spec.container(wishes.given(ids=small))
    [pts] = [m for m in document["mounts"] if m["destination"] == "/dev/pts"]
    assert "gid=5" not in pts["options"]
    assert "gid=5" in by_target(wishes.container())["/dev/pts"]["options"]


def test_a_device_at_another_path_is_a_bind_mount() -> None:
    """The runtimes would bind the host's /dev/b, whatever that is."""
    moved = spec.DeviceNode(path="/dev/b", host_path="/dev/a", kind="c", major=1, minor=5)
    same = spec.DeviceNode(path="/dev/c", host_path="/dev/c", kind="c", major=1, minor=7)
    given = wishes.given(devices=(moved, same))
    inside = dataclasses.replace(given, ids=IDS)
    assert [d["path"] for d in spec.container(given)["linux"]["devices"]] == ["/dev/b", "/dev/c"]
    document = spec.container(inside)
    assert [d["path"] for d in document["linux"]["devices"]] == ["/dev/c"]
    [bind] = [m for m in document["mounts"] if m["destination"] == "/dev/b"]
    assert (bind["type"], bind["source"]) == ("bind", "/dev/a")
    rules = document["linux"]["resources"]["devices"]
    assert {"allow": True, "type": "c", "major": 1, "minor": 5, "access": "rwm"} in rules
