# SPDX-License-Identifier: Apache-2.0
"""Who a container runs as, when image, files of the image and request lie about it (hazards.md
§2.1 V03 to V09, V27, and §3: numbers are parsed as numbers or refused).

Each test says what a naive runtime does. Numbers are tried by dozens in one pod; what is wrong with
which is in the message of the assertion.
"""

from collections.abc import Callable
from typing import Any

import grpc
import pytest

from cri_server.pb import api_pb2 as api
from tests.lab import hostile, image, tars
from tests.lab.hostile import Attack, Canary

pytestmark = [
    pytest.mark.needs("root", "netns", "overlay", "cni", "runc", "docker-registry"),
    pytest.mark.ours,
]
INVALID = grpc.StatusCode.INVALID_ARGUMENT
NO_NUMBERS = [
    *("2147483648", "4294967295", "4294967296", "18446744073709551616", "9" * 200),
    *("-1", "+0", "0x0", "1e3", "0_0", "0 ", " 0", "\u00a00", "\u0660", "\uff10"),
]
WIDE = (1 << 31, (1 << 32) - 1, 1 << 32, 1 << 62, -1, -(1 << 31))


def everyone(*names: str) -> bytes:
    """Return a passwd in which every name is root."""
    return "".join(f"{name}:x:0:0:root:/root:/bin/sh\n" for name in names).encode()


def linux(**context: Any) -> api.LinuxContainerConfig:
    """Return the part of a request that says who is to run."""
    for name in ("run_as_user", "run_as_group"):
        if name in context:
            context[name] = api.Int64Value(value=context[name])
    return api.LinuxContainerConfig(security_context=api.LinuxContainerSecurityContext(**context))


# -- numbers ---------------------------------------------------------------------------------------


def test_v03_v04_a_user_of_the_image_that_looks_like_a_number(attack: Attack) -> None:
    """Naive: the number wraps to 0, or the image's passwd has a user of that name, who is root."""
    users = [*NO_NUMBERS, *(f"1000:{n}" for n in NO_NUMBERS[1::2])]
    files = [tars.file(f"etc/{n}", everyone(*NO_NUMBERS)) for n in ("passwd", "group")]
    run = {}
    for user in users:
        reference = attack.make(*files, User=user)
        outcome = attack.attempt(reference, "id")
        listed = attack.kubelet.image_status(reference)
        assert listed is not None
        if outcome.code is not INVALID or (listed.HasField("uid") and listed.uid.value != 1000):
            run[user] = outcome
    assert run == {}


@pytest.mark.parametrize("field", ["{bad}:1000:1000", "1000:{bad}:1000", "1000:1000:{bad}"])
def test_v04_a_number_in_a_file_of_the_image(attack: Attack, field: str) -> None:
    """Naive: it is read as far as it is a number, or wraps: who should be somebody is root."""
    run = {}
    for number in ("4294967296", "-1", "0x0", " 0", ""):
        uid, gid, member = field.format(bad=number).split(":")
        passwd = tars.file("etc/passwd", f"app:x:{uid}:{gid}::/:/bin/sh\n".encode())
        group = tars.file("etc/group", f"club:x:{member}:app\n".encode())
        outcome = attack.attempt(attack.make(passwd, group, User="app"), "id")
        if outcome.code is not INVALID:
            run[number] = outcome
    assert run == {}


def test_v04_a_user_of_the_request_that_looks_like_a_number(attack: Attack) -> None:
    """Naive: the same, by way of the pod's security context."""
    reference = attack.make(tars.file("etc/passwd", everyone(*NO_NUMBERS)))
    tried = [linux(run_as_username=name) for name in (*NO_NUMBERS, "9" * 4000)]
    tried += [linux(run_as_user=number) for number in WIDE]
    tried += [linux(run_as_user=1, run_as_group=number) for number in WIDE]
    tried += [linux(run_as_user=1, supplemental_groups=[1, number]) for number in WIDE]
    codes = [attack.attempt(reference, "id", linux=wanted).code for wanted in tried]
    assert [t for t, code in zip(tried, codes, strict=True) if code is not INVALID] == []


@pytest.mark.parametrize("number", [(1 << 32) - 1, 1 << 32, -1, (1 << 64) - 1])
def test_an_owner_in_a_layer_that_is_none(attack: Attack, number: int) -> None:
    """Naive: chown(2) leaves the owner alone for 2^32-1, and wraps 2^32 to root: setuid root."""
    entry = tars.header("bin/evil", mode=0o4755, uid=number, gid=number)
    with pytest.raises(grpc.RpcError) as refused:
        attack.make(entry)
    assert refused.value.code() is INVALID
    assert "\n" not in (refused.value.details() or "")


# -- files of users --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["passwd", "group"])
def test_v05_v06_a_huge_file_of_users_is_not_read(attack: Attack, name: str) -> None:
    """Naive: the whole file is read into memory, and the kernel ends the server."""
    reference = attack.make(tars.file(f"etc/{name}", b"a:x:0:0\n" * (4 << 20)), User="a")
    before = hostile.resident(attack.site.pid)
    outcome = attack.attempt(reference, "true")
    assert outcome.code is INVALID
    assert f"/etc/{name}" in outcome.message
    assert hostile.resident(attack.site.pid) - before < 16 << 20


TRAPS: dict[str, Callable[[Canary, str], list[bytes]]] = {
    "fifo": lambda canary, name: [hostile.fifo(name)],
    "link to the host's fifo": lambda canary, name: [tars.symlink(name, f"{canary.path}/fifo")],
    "link to a fifo": lambda canary, name: [hostile.fifo("trap"), tars.symlink(name, "../trap")],
    "device": lambda canary, name: [hostile.device(name, 1, 5)],
    "folder": lambda canary, name: [tars.folder(name)],
    "link to itself": lambda canary, name: [tars.symlink(name, name.rpartition("/")[2])],
    "link to a process": lambda canary, name: [tars.symlink(name, "/proc/self/fd/0")],
    "link to the host's": lambda canary, name: [tars.symlink(name, f"{canary.path}/passwd")],
    "link up": lambda canary, name: [tars.symlink(name, f"..{'/..' * 20}{canary.path}/passwd")],
}


@pytest.mark.parametrize("name", ["etc/passwd", "etc/group"])
def test_v07_a_file_of_users_that_bites_hangs_nobody(attack: Attack, name: str) -> None:
    """Naive: the server opens it and waits for ever, or reads the host's file; so does runc."""
    for trap, make in TRAPS.items():
        reference = attack.make(tars.whiteout(name), *make(attack.canary, name), User="1000")
        for wanted in ({}, {"run_as_username": "mallory"}):
            outcome = attack.attempt(reference, "id -u", linux=linux(**wanted))
            assert outcome.code is INVALID or outcome.lines == ["1000"], (trap, wanted, outcome)


@pytest.mark.parametrize("line", ["/x\nmallory:x:0:0::/:/bin/sh", "/x\\nmallory:x:0:0::/:/bin/sh"])
def test_v08_v09_a_home_with_a_line_break_adds_no_user(attack: Attack, line: str) -> None:
    """Naive: HOME is written into a passwd that the runtime makes for the container."""
    reference = attack.make(Env=[image.PATH, f"HOME={line}"])
    script = "cat /etc/passwd; id mallory; id -u"
    outcome = attack.attempt(reference, script, linux=linux(run_as_user=4711))
    assert "mallory:" not in outcome.text
    assert "4711" in outcome.lines


# -- groups ----------------------------------------------------------------------------------------


def test_v27_a_group_without_rights_is_not_left_behind(attack: Attack) -> None:
    """Naive: the primary group is missing among the others, or those of the image are: a file that
    is closed to a group opens to its member.
    """
    closed = tars.file("closed", b"open to all but staff\n", mode=0o604, gid=50000)
    primary = tars.file("primary", b"open to all but tester\n", mode=0o604, gid=1000)
    reference = attack.make(closed, primary, User="tester")
    script = "id -G; cat /closed /primary; grep Groups /proc/self/status"
    outcome = attack.attempt(reference, script)
    assert outcome.lines[0] == "1000 50000"
    assert "Groups:\t1000 50000 " in outcome.lines
    assert "open to all" not in outcome.text
    container = attack.keep(reference)
    said = attack.inside(container, "id -G; cat /closed /primary")
    assert said.startswith("1000 50000\n")
    assert "open to all" not in said
    strict = linux(supplemental_groups_policy=api.Strict, supplemental_groups=[7])
    assert attack.attempt(reference, "id -G", linux=strict).lines == ["1000 7"]
