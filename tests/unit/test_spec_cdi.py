# SPDX-License-Identifier: Apache-2.0
"""CDI devices: which are asked for, what a file of them may hold, what they do to a spec."""

import dataclasses
import json
from typing import Any

import pytest

from cri_server import errors, origins, spec
from cri_server.pb import api_pb2 as api
from cri_server.spec import cdifile, oci, types, why
from tests.lab import wishes

# -- what is asked for -----------------------------------------------------------------------------


def test_the_field_comes_before_the_annotations_and_each_device_once() -> None:
    wish = wishes.container(
        CDI_devices=[api.CDIDevice(name="v.com/gpu=1"), api.CDIDevice(name="v.com/gpu=0")],
        annotations={
            "cdi.k8s.io/b": "v.com/gpu=1,w.org/net.fast=eth0",
            "cdi.k8s.io/a": "v.com/gpu=GPU-1:2",
            "other/cdi.k8s.io": "not one",
        },
    )
    wishes.validate(wish)
    assert spec.cdi_requests(wish) == (
        "v.com/gpu=1",
        "v.com/gpu=0",
        "v.com/gpu=GPU-1:2",
        "w.org/net.fast=eth0",
    )


@pytest.mark.parametrize(
    "name",
    [
        *("", "gpu", "v.com/gpu", "v.com/gpu=", "/gpu=0", "v.com/=0", "v.com/g/h=0", "../x/y=z"),
        *("v.com/gpu=0\n", "1v/gpu=0", "v.com/gpu=-0", "v.com/gpu=0-", "v.com/gp u=0", "v/g=0=1"),
    ],
)
def test_what_is_no_qualified_name_is_refused_by_its_field(name: str) -> None:
    with pytest.raises(errors.InvalidArgument, match="CDI_devices"):
        wishes.validate(wishes.container(CDI_devices=[api.CDIDevice(name=name)]))
    with pytest.raises(errors.InvalidArgument, match=r"annotation 'cdi\.k8s\.io/x'"):
        wishes.validate(wishes.container(annotations={"cdi.k8s.io/x": name}))


def test_the_labels_of_an_image_ask_for_nothing() -> None:
    image = spec.ImageConfig(cmd=("/x",), labels={"cdi.k8s.io/x": "v.com/gpu=0"})
    wish = wishes.container()
    wishes.validate(wish, image=image)
    assert spec.cdi_requests(wish) == ()


# -- files -----------------------------------------------------------------------------------------


def document(version: str = "0.3.0", **edits: Any) -> dict[str, Any]:
    device = {"name": "one", "containerEdits": edits or {"env": ["A=1"]}}
    return {"cdiVersion": version, "kind": "v.com/gpu", "devices": [device]}


NODE = {"path": "/dev/x"}
HOOK = {"hookName": "createRuntime", "path": "/bin/hook"}


@pytest.mark.parametrize(
    ("needed", "edits"),
    [
        ("0.3.0", {"deviceNodes": [NODE], "hooks": [HOOK]}),
        ("0.4.0", {"mounts": [{"hostPath": "/a", "containerPath": "/b", "type": "bind"}]}),
        ("0.5.0", {"deviceNodes": [{**NODE, "hostPath": "/dev/y"}]}),
        ("0.7.0", {"additionalGids": [5]}),
        ("0.7.0", {"intelRdt": {"closID": "x"}}),
        ("1.1.0", {"netDevices": [{"hostInterfaceName": "a", "name": "b"}]}),
    ],
)
def test_a_file_names_at_least_the_version_of_what_it_uses(
    needed: str, edits: dict[str, Any]
) -> None:
    at = cdifile.VERSIONS.index(needed)
    for version in cdifile.VERSIONS[at:]:
        cdifile.parse(document(version, **edits))
    for version in cdifile.VERSIONS[2:at]:
        with pytest.raises(cdifile.Invalid, match=f"cdiVersion {version}.*{needed}"):
            cdifile.parse(document(version, **edits))


def test_names_and_annotations_have_their_version_too() -> None:
    uses: list[tuple[dict[str, Any], str]] = [
        ({"kind": "v.com/gpu.fast"}, "0.6.0"),
        ({"annotations": {"a": "b"}}, "0.6.0"),
        ({"devices": [{"name": "0", "containerEdits": {"env": ["A=1"]}}]}, "0.5.0"),
    ]
    for changes, needed in uses:
        cdifile.parse(document(needed) | changes)
        with pytest.raises(cdifile.Invalid, match=needed):
            cdifile.parse(document("0.4.0") | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"cdiVersion": "2.0.0"},
        {"cdiVersion": 1},
        {"cdiVersion": None},
        {"kind": "gpu"},
        {"kind": "v.com/a/b"},
        {"kind": "v.com/-"},
        {"devices": []},
        {"devices": [{"name": "x"}]},
        {"devices": [{"name": "x y", "containerEdits": {}}]},
        {"devices": [{"name": "x", "containerEdits": {}}] * 2},
        {"more": 1},
        {"containerEdits": {"Env": []}},
        {"containerEdits": {"env": ["NOVALUE"]}},
        {"containerEdits": {"env": ["=x"]}},
        {"containerEdits": {"env": ["A=\0"]}},
        {"containerEdits": {"deviceNodes": [{"path": "dev/x"}]}},
        {"containerEdits": {"deviceNodes": [{**NODE, "type": "z"}]}},
        {"containerEdits": {"deviceNodes": [{**NODE, "permissions": "x"}]}},
        {"containerEdits": {"deviceNodes": [{**NODE, "major": -1}]}},
        {"containerEdits": {"deviceNodes": [{**NODE, "uid": 1 << 31}]}},
        {"containerEdits": {"mounts": [{"hostPath": "", "containerPath": "/x"}]}},
        {"containerEdits": {"mounts": [{"hostPath": "/x", "containerPath": "x"}]}},
        {"containerEdits": {"hooks": [{**HOOK, "hookName": "never"}]}},
        {"containerEdits": {"hooks": [{**HOOK, "path": "hook"}]}},
        {"containerEdits": {"hooks": [{**HOOK, "timeout": 0}]}},
        {"containerEdits": {"hooks": [{**HOOK, "env": ["x"]}]}},
        {"containerEdits": {"additionalGids": [-1]}},
    ],
    ids=json.dumps,
)
def test_a_file_that_is_none_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(cdifile.Invalid):
        cdifile.parse(document("1.1.0") | changes)


@pytest.mark.parametrize("thing", [None, [], "x", 7, {}])
def test_what_is_no_object_is_no_file(thing: object) -> None:
    with pytest.raises(cdifile.Invalid):
        cdifile.parse(thing)


def test_a_key_without_a_value_means_the_default() -> None:
    found = cdifile.parse(document(env=None, mounts=None, hooks=[{**HOOK, "args": None}]))
    assert found.devices[0].container_edits.hooks[0].args == ()


# -- what they do ----------------------------------------------------------------------------------


def node(path: str, **changes: Any) -> types.Node:
    usual: dict[str, Any] = {"kind": "c", "major": 195, "minor": 0, "access": "rw"}
    return types.Node(**({"path": path, "mode": None, "uid": None, "gid": None} | usual | changes))


def test_the_edits_stand_above_image_and_request() -> None:
    given = spec.Injection(
        devices=("v.com/gpu=0",),
        env=("A=cdi", "PATH=/cdi", "A=last"),
        nodes=(node("/dev/gpu"), node("/dev/fuse", major=9, mode=0o600, uid=7, gid=8, access="")),
        mounts=(spec.oci.Mount(destination="/data/x", type="bind", source="/s", options=["ro"]),),
        hooks=(("createRuntime", {"path": "/one"}), ("createRuntime", {"path": "/two"})),
        gids=(44, 3000),
    )
    wish = wishes.container(
        envs=[api.KeyValue(key="A", value=b"request")],
        mounts=[
            api.Mount(container_path="/data/x", host_path="/replaced"),
            api.Mount(container_path="/data/x/y/z", host_path="/below"),
        ],
        security=wishes.security(run_as_user=1000),
    )
    fuse = spec.DeviceNode(path="/dev/fuse", kind="c", major=10, minor=229)
    user = spec.User(uid=1000, gid=2000, additional_gids=(2000, 3000))
    with why.recorded() as found:
        made = spec.container(wishes.given(wish, cdi=given, devices=(fuse,), user=user))
    process, linux = made["process"], made["linux"]
    assert process["env"][:2] == ["PATH=/cdi", "HOSTNAME=pod"]
    assert "A=last" in process["env"]
    assert len([v for v in process["env"] if v.startswith("A=")]) == 1
    assert process["user"]["additionalGids"] == [2000, 3000, 44]
    nodes = {d["path"]: d for d in linux["devices"]}
    gpu, other = nodes["/dev/gpu"], nodes["/dev/fuse"]
    assert (gpu["fileMode"], gpu["uid"], gpu["gid"], gpu["major"]) == (0o666, 1000, 2000, 195)
    assert (other["fileMode"], other["uid"], other["gid"], other["major"]) == (0o600, 7, 8, 9)
    assert linux["resources"]["devices"][-1] == {
        "allow": True,
        "type": "c",
        "major": 195,
        "minor": 0,
        "access": "rw",
    }
    targets = [m["destination"] for m in made["mounts"]]
    assert targets.index("/data/x") < targets.index("/data/x/y/z")
    assert [m["source"] for m in made["mounts"] if m["destination"] == "/data/x"] == ["/s"]
    assert made["hooks"] == {"createRuntime": [{"path": "/one"}, {"path": "/two"}]}
    rows = {row.part: row for row in origins.rows(made, found)}
    with why.recorded() as usual:
        plain = spec.container(wishes.given(wish, user=user))
    before = {row.part for row in origins.rows(plain, usual) if not row.notes}  # noted by others
    assert {part for part, row in rows.items() if not row.notes} <= before
    assert rows["linux.devices[/dev/gpu]"].notes[-1].because == "v.com/gpu=0"


def test_nothing_is_injected_into_anybody_else() -> None:
    given = spec.Injection(devices=("v/g=0",), env=("A=1",), nodes=(node("/dev/gpu"),), gids=(9,))
    before = spec.container(wishes.given())
    spec.container(wishes.given(cdi=given))
    assert spec.container(wishes.given()) == before
    assert "hooks" not in before


def test_a_privileged_container_is_allowed_everything_as_before() -> None:
    wish = wishes.container(security=wishes.security(privileged=True))
    given = spec.Injection(devices=("v/g=0",), nodes=(node("/dev/gpu"),))
    made = spec.container(wishes.given(wish, cdi=given))
    assert made["linux"]["resources"]["devices"] == [{"allow": True, "access": "rwm"}]


def test_in_a_user_namespace_nodes_are_bound_and_mounts_keep_the_flags_of_their_source() -> None:
    plain = oci.Mount(destination="/l", type="bind", source="/host/l", options=["rbind", "ro"])
    free = oci.Mount(destination="/f", type="bind", source="/host/l", options=["rbind"])
    nodes = (node("/dev/a", host_path="/dev/b"), node("/dev/c", host_path="/dev/c"))
    given = spec.Injection(devices=("v/g=0",), nodes=nodes, mounts=(plain, free), gids=(9,))
    ids = spec.IdMap(uid=1000, uids=10, gid=1000, gids=10)
    usual: dict[str, Any] = {"ids": ids, "locked": {"/host/l": ("nosuid", "nodev")}}
    document = spec.container(wishes.given(wishes.container(), cdi=given, **usual))
    by_target = {m["destination"]: m for m in document["mounts"]}
    assert by_target["/dev/a"]["source"] == "/dev/b"
    assert by_target["/l"]["options"] == ["rbind", "ro", "nosuid", "nodev"]
    assert by_target["/f"]["options"] == ["rbind"]
    assert [d["path"] for d in document["linux"]["devices"]] == ["/dev/c"]
    far = dataclasses.replace(given, gids=(10,))
    with pytest.raises(errors.FailedPrecondition, match="additionalGids: group 10"):
        spec.container(wishes.given(wishes.container(), cdi=far, **usual))
