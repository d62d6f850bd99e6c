# SPDX-License-Identifier: Apache-2.0
"""Device requests, nodes and cgroup rules."""

import pytest

from cri_server import errors, spec
from cri_server.pb import api_pb2 as api
from tests.lab import wishes

FUSE = spec.DeviceNode(path="/dev/fuse", kind="c", major=10, minor=229, mode=0o666, access="rw")
DISK = spec.DeviceNode(path="/dev/sda", kind="b", major=8, minor=0, gid=6)


def test_requests_are_checked_and_normalised() -> None:
    wish = wishes.container(
        devices=[
            api.Device(host_path="/dev//fuse", container_path="/dev/x/../fuse2", permissions="rw"),
            api.Device(host_path="/dev/sda", permissions="m"),
        ]
    )
    wishes.validate(wish)
    found = [(r.host_path, r.container_path, r.access) for r in spec.device_requests(wish)]
    assert found == [("/dev/fuse", "/dev/fuse2", "rw"), ("/dev/sda", "/dev/sda", "m")]


@pytest.mark.parametrize(
    ("host", "container", "permissions"),
    [
        ("", "/dev/x", "rw"),
        ("dev/x", "/dev/x", "rw"),
        ("/dev/x", "dev/x", "rw"),
        ("/dev/x", "/dev/x", ""),
        ("/dev/x", "/dev/x", "rx"),
        ("/dev/x", "/dev/x", "rr"),
    ],
)
def test_a_request_that_cannot_be_is_refused(host: str, container: str, permissions: str) -> None:
    device = api.Device(host_path=host, container_path=container, permissions=permissions)
    with pytest.raises(errors.InvalidArgument, match="device"):
        wishes.validate(wishes.container(devices=[device]))


def test_rules_deny_all_then_allow_the_defaults_and_the_listed() -> None:
    linux = spec.container(wishes.given(devices=(FUSE,)))["linux"]
    rules = linux["resources"]["devices"]
    assert rules[0] == {"allow": False, "access": "rwm"}
    assert rules[-1] == {"allow": True, "type": "c", "major": 10, "minor": 229, "access": "rw"}
    opened = {
        (r.get("type"), r.get("major"), r.get("minor")) for r in rules if r["access"] == "rwm"
    }
    assert opened == {
        (None, None, None),
        *(("c", 1, n) for n in (3, 5, 7, 8, 9)),
        *(("c", 5, n) for n in (0, 1, 2)),
        ("c", 136, None),
    }
    assert linux["devices"] == [
        {
            "path": "/dev/fuse",
            "type": "c",
            "major": 10,
            "minor": 229,
            "fileMode": 0o666,
            "uid": 0,
            "gid": 0,
        }
    ]


def test_a_privileged_container_has_the_hosts_nodes_and_may_open_all() -> None:
    wish = wishes.container(security=wishes.security(privileged=True))
    other = spec.DeviceNode(path="/dev/fuse", kind="c", major=1, minor=3)
    given = wishes.given(wish, host_devices=(other, DISK), devices=(FUSE,))
    linux = spec.container(given)["linux"]
    assert linux["resources"]["devices"] == [{"allow": True, "access": "rwm"}]
    assert [(d["path"], d["minor"]) for d in linux["devices"]] == [
        ("/dev/fuse", 229),
        ("/dev/sda", 0),
    ]
    plain = spec.container(wishes.given(host_devices=(DISK,)))["linux"]
    assert plain["devices"] == []


def test_a_privileged_container_without_the_hosts_devices_has_those_of_any_other() -> None:
    wish = wishes.container(security=wishes.security(privileged=True))
    none = spec.Defaults(no_host_devices_key="[runtimes.kata] dialect")
    given = wishes.given(wish, host_devices=(DISK,), devices=(FUSE,), defaults=none)
    found, plain = spec.container(given)["linux"], spec.container(wishes.given(devices=(FUSE,)))
    assert found["devices"] == plain["linux"]["devices"]
    assert found["resources"]["devices"] == plain["linux"]["resources"]["devices"]
    assert found["maskedPaths"] == []
