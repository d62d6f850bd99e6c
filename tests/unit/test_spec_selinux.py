# SPDX-License-Identifier: Apache-2.0
"""SELinux labels from what pods and containers ask for."""

import dataclasses
import re
from typing import Any

import pytest

from cri_server import errors, spec
from cri_server.pb import api_pb2 as api
from cri_server.spec import selinux
from tests.lab import wishes

HOST = dataclasses.replace(wishes.FACTS, selinux=spec.SelinuxPolicy())
LEVEL = "s0:c12,c34"
FILE = f"system_u:object_r:container_file_t:{LEVEL}"
NODE, POD = api.NamespaceMode.NODE, api.NamespaceMode.POD


def labels(
    options: dict[str, str] | None = None,
    *,
    privileged: bool = False,
    of_pod: dict[str, str] | None = None,
    level: str = LEVEL,
    host: spec.HostFacts = HOST,
    **namespaces: Any,
) -> tuple[str, str]:
    """Return the labels in the spec of a container, "" where there is none."""
    context = wishes.security(privileged=privileged)
    if options is not None:
        context.selinux_options.CopyFrom(api.SELinuxOption(**options))
    frame = api.LinuxSandboxSecurityContext(selinux_options=api.SELinuxOption(**(of_pod or {})))
    pod = wishes.pod(security=frame, options=namespaces)
    wish = wishes.container(security=context)
    document = spec.container(wishes.given(wish, sandbox=pod, host=host, selinux_level=level))
    return document["process"].get("selinuxLabel", ""), document["linux"].get("mountLabel", "")


@pytest.mark.parametrize(
    ("asked", "process"),
    [
        ({}, f"system_u:system_r:container_t:{LEVEL}"),
        ({"options": {"type": "svirt_lxc_net_t"}}, f"system_u:system_r:svirt_lxc_net_t:{LEVEL}"),
        ({"of_pod": {"type": "pod_t"}}, f"system_u:system_r:pod_t:{LEVEL}"),
        (
            {"of_pod": {"type": "pod_t", "role": "r"}, "options": {"type": "own_t"}},
            f"system_u:r:own_t:{LEVEL}",
        ),
        ({"privileged": True}, "system_u:system_r:spc_t:s0"),
        ({"privileged": True, "options": {"type": "own_t"}}, "system_u:system_r:spc_t:s0"),
        ({"pid": NODE}, "system_u:system_r:spc_t:s0"),
        ({"ipc": NODE}, "system_u:system_r:spc_t:s0"),
        ({"network": NODE}, f"system_u:system_r:container_t:{LEVEL}"),
        ({"pid": NODE, "options": {"type": "own_t"}}, f"system_u:system_r:own_t:{LEVEL}"),
    ],
)
def test_processes_run_in_the_type_asked_for_or_the_policys_own(
    asked: dict[str, Any], process: str
) -> None:
    assert labels(**asked) == (process, FILE)


@pytest.mark.parametrize(
    ("of_pod", "own", "relabels"),
    [("", "", True), ("", "spc_t", False), ("spc_t", "", False), ("spc_t", "own_t", True)],
)
def test_no_volume_is_relabelled_for_who_asks_to_be_unconfined(
    of_pod: str, own: str, relabels: bool
) -> None:
    pod = wishes.pod()
    pod.linux.security_context.selinux_options.type = of_pod
    context = wishes.security(selinux_options=api.SELinuxOption(type=own))
    assert selinux.of_container(context, pod, LEVEL, HOST).relabels == relabels


def test_level_and_user_of_a_container_are_those_of_its_files_too() -> None:
    options = {"user": "staff_u", "role": "staff_r", "type": "own_t", "level": "s0:c1"}
    assert labels(options) == (
        "staff_u:staff_r:own_t:s0:c1",
        "staff_u:object_r:container_file_t:s0:c1",
    )


def test_containers_of_a_pod_share_its_level() -> None:
    process, file = labels({"type": "own_t"})
    assert {process.split(":", 3)[3], file.split(":", 3)[3]} == {LEVEL}


def test_without_selinux_nothing_is_labelled() -> None:
    assert labels({"type": "own_t", "level": "s0:c1,c2"}, host=wishes.FACTS) == ("", "")
    assert selinux.SelinuxLabels().mount_options == ()
    assert selinux.SelinuxLabels().shared == ""


def test_the_pods_init_is_not_confined_and_labelled_only_with_selinux() -> None:
    assert str(selinux.of_init(HOST).process) == "system_u:system_r:spc_t:s0"
    assert selinux.of_init(wishes.FACTS) == selinux.SelinuxLabels()


def test_a_pods_files_are_mounted_with_its_label() -> None:
    of_pod = selinux.of_sandbox(wishes.pod(), LEVEL, HOST)
    assert of_pod.mount_options == (f"context={FILE}",)
    assert of_pod.shared == "system_u:object_r:container_file_t:s0"


@pytest.mark.parametrize(
    "level",
    ["s0", "s0:c1", "s0:c4,c5", "s0:c0.c1023", "s0-s0:c0.c1023", "s0:c1,c3.c5", "s1:c2-s15:c2,c9"],
)
@pytest.mark.parametrize("host", [HOST, wishes.FACTS])
def test_a_level_that_can_be_is_accepted(level: str, host: spec.HostFacts) -> None:
    options = api.SELinuxOption(user="system_u", role="system_r", type="t.a_1", level=level)
    wishes.validate(wishes.container(security=wishes.security(selinux_options=options)), host=host)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("level", "s0,c4,c5"),
        ("level", "s0:"),
        ("level", "s0:c"),
        ("level", "s0:c1024"),
        ("level", "s0:c1,"),
        ("level", "c1,c2"),
        ("level", "s0:c1:c2"),
        ("level", "s0:c1\n"),
        ("level", "s0:c\u0661"),
        ("type", "t:s0:c1"),
        ("type", "a b"),
        ("user", "u\0"),
        ("role", "-r"),
    ],
)
@pytest.mark.parametrize("host", [HOST, wishes.FACTS])
def test_parts_that_no_label_has_are_refused(part: str, value: str, host: spec.HostFacts) -> None:
    options = api.SELinuxOption(**{part: value})
    wish = wishes.container(security=wishes.security(selinux_options=options))
    with pytest.raises(errors.InvalidArgument, match=rf"^selinux_options\.{part}"):
        wishes.validate(wish, host=host)
    with pytest.raises(errors.InvalidArgument, match=rf"^selinux_options\.{part}"):
        spec.validate_sandbox(
            wishes.pod(security=api.LinuxSandboxSecurityContext(selinux_options=options)), host
        )


def test_a_new_level_is_a_pair_that_nobody_has() -> None:
    found: set[str] = set()
    for _ in range(2000):
        found.add(selinux.new_level(found))
    assert len(found) == 2000
    for level in found:
        pair = re.fullmatch(r"s0:c(\d+),c(\d+)", level)
        assert pair is not None
        assert 0 <= int(pair[1]) < int(pair[2]) < selinux.CATEGORIES
