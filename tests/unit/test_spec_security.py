# SPDX-License-Identifier: Apache-2.0
"""Users, capabilities, privileged, profiles."""

import dataclasses
from typing import Any

import pytest

from cri_server import errors, spec
from cri_server.pb import api_pb2 as api
from tests.lab import wishes

ALL = list(spec.CAPABILITIES)
DEFAULT = sorted(spec.Defaults().capabilities, key=ALL.index)
POOR = dataclasses.replace(
    wishes.FACTS, capabilities=frozenset(ALL) - {"CAP_SYS_RESOURCE", "CAP_MKNOD"}
)
Profile = api.SecurityProfile


def capabilities(host: spec.HostFacts = wishes.FACTS, **fields: Any) -> spec.oci.Capabilities:
    privileged = bool(fields.pop("privileged", False))
    context = wishes.security(capabilities=api.Capability(**fields), privileged=privileged)
    wish = wishes.container(security=context)
    return spec.container(wishes.given(wish, host=host))["process"]["capabilities"]


@pytest.mark.parametrize(
    ("add", "drop", "expected"),
    [
        ([], [], DEFAULT),
        (["NET_ADMIN"], [], sorted([*DEFAULT, "CAP_NET_ADMIN"], key=ALL.index)),
        (["cap_net_admin", "Sys_Time"], ["all"], ["CAP_NET_ADMIN", "CAP_SYS_TIME"]),
        (["ALL"], [], ALL),
        (["ALL"], ["CAP_SYS_ADMIN"], [c for c in ALL if c != "CAP_SYS_ADMIN"]),
        (["ALL"], ["ALL"], []),
        (["CHOWN"], ["CHOWN"], [c for c in DEFAULT if c != "CAP_CHOWN"]),
        ([], ["ALL"], []),
    ],
)
def test_capabilities_are_default_then_all_then_added_then_dropped(
    add: list[str], drop: list[str], expected: list[str]
) -> None:
    assert capabilities(add_capabilities=add, drop_capabilities=drop) == {
        "bounding": expected,
        "effective": expected,
        "permitted": expected,
        "inheritable": [],
        "ambient": [],
    }


def test_defaults_and_all_mean_what_the_host_has() -> None:
    assert capabilities(POOR)["bounding"] == [c for c in DEFAULT if c != "CAP_MKNOD"]
    assert set(capabilities(POOR, add_capabilities=["ALL"])["bounding"]) == POOR.capabilities
    assert set(capabilities(POOR, drop_capabilities=["SYS_RESOURCE"])["bounding"]) < set(DEFAULT)


@pytest.mark.parametrize("name", ["SYS_RESOURCE", "NONSENSE", "CAP_", "", "CAP_CAP_CHOWN", "ALL_"])
@pytest.mark.parametrize("field", ["add_capabilities", "add_ambient_capabilities"])
def test_a_capability_that_is_not_to_be_had_is_refused(name: str, field: str) -> None:
    wish = wishes.container(
        security=wishes.security(capabilities=api.Capability(**{field: [name]}))
    )
    with pytest.raises(errors.InvalidArgument, match="capabilit"):
        wishes.validate(wish, host=POOR)


def test_ambient_capabilities_are_in_every_set() -> None:
    found = capabilities(drop_capabilities=["ALL"], add_ambient_capabilities=["net_raw"])
    assert found == {name: ["CAP_NET_RAW"] for name in found}
    found = capabilities(add_ambient_capabilities=["NET_RAW"], drop_capabilities=["NET_RAW"])
    assert found["ambient"] == []


def test_privileged_has_all_of_the_hosts_and_needs_a_privileged_pod() -> None:
    assert set(capabilities(POOR, privileged=True)["bounding"]) == POOR.capabilities
    wish = wishes.container(security=wishes.security(privileged=True))
    with pytest.raises(errors.InvalidArgument, match="privileged"):
        wishes.validate(wish)
    wishes.validate(
        wish, sandbox=wishes.pod(security=api.LinuxSandboxSecurityContext(privileged=True))
    )


def test_capability_names_come_from_a_mask() -> None:
    assert spec.capability_names(0b1000_0000_0001) == {"CAP_CHOWN", "CAP_NET_BROADCAST"}


REQUEST = spec.UserRequest


@pytest.mark.parametrize(
    ("fields", "image", "expected"),
    [
        ({}, "", REQUEST(uid=0)),
        ({}, "1000", REQUEST(uid=1000)),
        ({}, "1000:2000", REQUEST(uid=1000, gid=2000)),
        ({}, "me:us", REQUEST(name="me", group="us")),
        ({}, "me:7", REQUEST(name="me", gid=7)),
        ({}, ":7", REQUEST(uid=0, gid=7)),
        ({"run_as_user": 5}, "me:us", REQUEST(uid=5)),
        ({"run_as_user": 0, "run_as_group": 0}, "me", REQUEST(uid=0, gid=0)),
        ({"run_as_username": "you"}, "me:us", REQUEST(name="you")),
        ({"run_as_username": "1001"}, "", REQUEST(uid=1001)),
        ({"run_as_username": "you", "run_as_user": 6}, "", REQUEST(uid=6)),
        ({"run_as_username": "you", "run_as_group": 6}, "", REQUEST(name="you", gid=6)),
        ({"supplemental_groups": [7, 8]}, "", REQUEST(uid=0, supplemental=(7, 8))),
        ({"supplemental_groups_policy": 1}, "", REQUEST(uid=0, strict=True)),
        ({"run_as_user": 2**31 - 1}, "", REQUEST(uid=2**31 - 1)),
    ],
)
def test_the_user_is_the_requests_then_the_images_then_root(
    fields: dict[str, object], image: str, expected: spec.UserRequest
) -> None:
    wish = wishes.container(security=wishes.security(**fields))
    assert spec.user_request(wish, spec.ImageConfig(user=image)) == expected


@pytest.mark.parametrize(
    ("fields", "image"),
    [
        ({"run_as_group": 5}, "1000"),
        ({"run_as_user": -1}, ""),
        ({"run_as_user": 2**31}, ""),
        ({"run_as_user": 2**32}, ""),
        ({"run_as_user": 1, "run_as_group": 2**32}, ""),
        ({"run_as_user": 1, "run_as_group": -1}, ""),
        ({"supplemental_groups": [2**32]}, ""),
        ({"supplemental_groups": [-1]}, ""),
        ({"supplemental_groups_policy": 9}, ""),
        ({"run_as_username": "4294967296"}, ""),
        ({"run_as_username": "a\nb"}, ""),
        ({}, "4294967296"),
        ({}, "2147483648"),
        ({}, "99999999999999999999"),
        ({}, "-1"),
        ({}, "+0"),
        ({}, "0x0"),
        ({}, "1e3"),
        ({}, "1000:4294967296"),
        ({}, "1000:-1"),
        ({}, "\u0661"),  # a digit, but not one of ours
        ({}, "me\0"),
    ],
)
def test_a_number_that_is_none_is_refused_and_never_a_name(
    fields: dict[str, object], image: str
) -> None:
    wish = wishes.container(security=wishes.security(**fields))
    with pytest.raises(errors.InvalidArgument):
        wishes.validate(wish, image=spec.ImageConfig(user=image, cmd=("/x",)))


def seccomp(localhost: object = None, **fields: object) -> object:
    wish = wishes.container(security=wishes.security(**fields))
    document = spec.container(wishes.given(wish, seccomp_profile=localhost))
    return document["linux"].get("seccomp")


def test_seccomp_follows_the_request() -> None:
    own = {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": []}
    local = Profile(profile_type=Profile.Localhost, localhost_ref="/etc/p.json")
    assert seccomp() is None
    assert seccomp(seccomp=Profile(profile_type=Profile.Unconfined)) is None
    assert isinstance(seccomp(seccomp=Profile(profile_type=Profile.RuntimeDefault)), dict)
    assert seccomp(own, seccomp=local) is own
    assert isinstance(seccomp(seccomp_profile_path="runtime/default"), dict)
    assert seccomp(seccomp_profile_path="unconfined") is None
    assert seccomp(own, seccomp_profile_path="localhost//etc/p.json") is own
    assert seccomp(seccomp=Profile(), privileged=True) is None
    assert (
        seccomp(
            seccomp=Profile(profile_type=Profile.Unconfined), seccomp_profile_path="runtime/default"
        )
        is None
    )


def test_the_file_of_a_localhost_profile_is_named() -> None:
    local = Profile(profile_type=Profile.Localhost, localhost_ref="localhost//etc/p.json")
    wish = wishes.container(security=wishes.security(seccomp=local))
    assert spec.seccomp_path(wish.linux.security_context) == "/etc/p.json"
    assert spec.seccomp_path(wishes.security()) == ""


@pytest.mark.parametrize(
    "fields",
    [
        {"seccomp": Profile(profile_type=Profile.Localhost)},
        {"seccomp": Profile(profile_type=Profile.Localhost), "privileged": True},
        {"seccomp": Profile(profile_type=Profile.Localhost, localhost_ref="relative.json")},
        {"seccomp": Profile(profile_type=9)},  # type: ignore[arg-type]
        {"seccomp_profile_path": "localhost/"},
        {"seccomp_profile_path": "nonsense"},
        {"apparmor": Profile(profile_type=Profile.Localhost)},
        {"apparmor": Profile(profile_type=Profile.Localhost, localhost_ref="not-loaded")},
        {"apparmor": Profile(profile_type=Profile.Localhost, localhost_ref="localhost/")},
        {"apparmor_profile": "localhost/not-loaded"},
        {"apparmor_profile": "localhost/"},
        {"apparmor_profile": "nonsense"},
        {"apparmor": Profile(localhost_ref="of-no-use")},
        {"seccomp": Profile(profile_type=Profile.Unconfined, localhost_ref="/of/no/use")},
    ],
)
def test_a_profile_that_cannot_be_is_refused(fields: dict[str, object]) -> None:
    host = dataclasses.replace(wishes.FACTS, apparmor=False)
    pod = wishes.pod(security=api.LinuxSandboxSecurityContext(privileged=True))
    wish = wishes.container(security=wishes.security(**fields))
    with pytest.raises(errors.InvalidArgument, match=r"seccomp|apparmor"):
        wishes.validate(wish, host=host, sandbox=pod)


@pytest.mark.parametrize("profile", [None, {}, [], {"defaultAction": ""}, {"defaultAction": None}])
def test_a_localhost_file_without_a_profile_is_an_error_not_unconfined(profile: object) -> None:
    local = Profile(profile_type=Profile.Localhost, localhost_ref="/etc/p.json")
    with pytest.raises(errors.InvalidArgument, match=r"/etc/p\.json"):
        seccomp(profile, seccomp=local)


def test_a_profile_on_a_kernel_without_seccomp_is_refused() -> None:
    host = dataclasses.replace(wishes.FACTS, seccomp=False)
    wish = wishes.container(security=wishes.security(seccomp=Profile()))
    with pytest.raises(errors.InvalidArgument, match="seccomp"):
        wishes.validate(wish, host=host)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, "ours"),
        ({"privileged": True}, None),
        ({"apparmor": Profile()}, "ours"),
        ({"apparmor": Profile(profile_type=Profile.Unconfined)}, None),
        ({"apparmor": Profile(profile_type=Profile.Localhost, localhost_ref="localhost/a")}, "a"),
        ({"apparmor_profile": ""}, "ours"),
        ({"apparmor_profile": "unconfined"}, None),
        ({"apparmor_profile": "runtime/default"}, "ours"),
        ({"apparmor_profile": "localhost/mine"}, "mine"),
        ({"apparmor": Profile(), "apparmor_profile": "localhost/x"}, "ours"),
        ({"apparmor": Profile(profile_type=Profile.Unconfined), "apparmor_profile": "x"}, None),
        ({"apparmor": Profile(), "privileged": True}, None),
        ({"apparmor_profile": "localhost/mine", "privileged": True}, None),
    ],
)
def test_the_apparmor_profile_is_the_fields_then_the_old_strings(
    fields: dict[str, object], expected: str | None
) -> None:
    host = dataclasses.replace(wishes.FACTS, apparmor=True, apparmor_default="ours")
    wish = wishes.container(security=wishes.security(**fields))
    process = spec.container(wishes.given(wish, host=host))["process"]
    assert process.get("apparmorProfile") == expected


@pytest.mark.parametrize("fields", [{}, {"apparmor": Profile()}])
@pytest.mark.parametrize("enabled", [False, True])
def test_the_default_apparmor_profile_is_void_where_nothing_can_load_it(
    enabled: bool, fields: dict[str, object]
) -> None:
    host = dataclasses.replace(wishes.FACTS, apparmor=enabled, apparmor_default="")
    wish = wishes.container(security=wishes.security(**fields))
    wishes.validate(wish, host=host)
    assert "apparmorProfile" not in spec.container(wishes.given(wish, host=host))["process"]
