# SPDX-License-Identifier: Apache-2.0
"""Namespaces of a pod: all pinned or none, furnished inside, released however often."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shim import errors, linux, loop, process, reaper, sandbox

ROOT = pytest.mark.needs("root")


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("net.ipv4.ip_forward", "net/ipv4/ip_forward"),
        ("net/ipv4/ip_forward", "net/ipv4/ip_forward"),
        ("net.ipv4.conf.eno2/100.rp_filter", "net/ipv4/conf/eno2.100/rp_filter"),
        ("net/ipv4/conf/eno2.100/rp_filter", "net/ipv4/conf/eno2.100/rp_filter"),
        ("kernel", "kernel"),
    ],
)
def test_both_forms_of_a_sysctl(name: str, path: str) -> None:
    assert sandbox.sysctl_path(name) == path


@pytest.fixture
def paths(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Return a path for each kind of namespace; they are released in the end."""
    found = {kind: os.fspath(tmp_path / kind) for kind in ("net", "ipc", "uts")}
    yield found
    sandbox.release([*found.values(), os.fspath(tmp_path / "user")])


def create(paths: dict[str, str], **more: Any) -> None:
    settings: dict[str, Any] = {"sysctls": {}, **more}
    wanted = sandbox.Namespaces(paths=paths, **settings)
    loop.run(sandbox.create(wanted, reaper.Reaper()))


def inside(*argv: str) -> str:
    """Run a command in the namespace of a file and return what it says."""
    done = loop.run(loop.run_command(["nsenter", *argv], timeout=10))
    assert done.returncode == 0, done.stderr
    return done.stdout.decode().strip()


def pinned(folder: Path) -> list[str]:
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line for line in mounts if f" {folder}/" in line]


@ROOT
def test_each_path_is_a_new_namespace(paths: dict[str, str]) -> None:
    create(paths)
    for kind, path in paths.items():
        assert os.stat(path).st_ino != os.stat(f"/proc/self/ns/{kind}").st_ino
        assert os.stat(path).st_dev == os.stat(f"/proc/self/ns/{kind}").st_dev


@ROOT
def test_the_host_is_as_before(paths: dict[str, str]) -> None:
    name, before = socket.gethostname(), os.stat("/proc/self/ns/net").st_ino
    create(paths, hostname="other", sysctls={"net.ipv4.ip_default_ttl": "33"})
    assert socket.gethostname() == name
    assert os.stat("/proc/self/ns/net").st_ino == before
    assert Path("/proc/sys/net/ipv4/ip_default_ttl").read_text() != "33\n"


@ROOT
def test_they_are_furnished(paths: dict[str, str]) -> None:
    sysctls = {
        "net.ipv4.ip_default_ttl": "33",
        "net/ipv4/conf/lo/rp_filter": "2",
        "kernel.shmmni": "77",
        "fs.mqueue.msg_max": "11",
    }
    create(paths, hostname="pod-1", sysctls=sysctls)
    net, ipc, uts = (f"--{kind}={paths[kind]}" for kind in ("net", "ipc", "uts"))
    assert inside(uts, "hostname") == "pod-1"
    assert "UP" in inside(net, "ip", "-o", "link", "show", "lo").split("<")[1].split(">")[0]
    assert inside(net, "cat", "/proc/sys/net/ipv4/ip_default_ttl") == "33"
    assert inside(net, "cat", "/proc/sys/net/ipv4/conf/lo/rp_filter") == "2"
    assert inside(ipc, "cat", "/proc/sys/kernel/shmmni") == "77"
    assert inside(ipc, "cat", "/proc/sys/fs/mqueue/msg_max") == "11"


@ROOT
@pytest.mark.parametrize(
    "name", ["vm.swappiness", "kernel.pid_max", "net.ipv4.//.//.kernel.pid_max", "net/../vm/x"]
)
def test_a_sysctl_of_the_host_is_refused(paths: dict[str, str], tmp_path: Path, name: str) -> None:
    with pytest.raises(errors.InvalidArgument, match="is not confined to the pod"):
        create(paths, sysctls={name: "1"})
    assert pinned(tmp_path) == []


@ROOT
def test_a_sysctl_needs_its_namespace(paths: dict[str, str]) -> None:
    with pytest.raises(errors.InvalidArgument, match=r"kernel.shmmni"):
        create({"net": paths["net"]}, sysctls={"kernel.shmmni": "77"})
    with pytest.raises(errors.InvalidArgument, match=r"kernel.shmmni"):
        create({}, sysctls={"kernel.shmmni": "77"})


@ROOT
@pytest.mark.parametrize(
    ("name", "value"), [("net.ipv4.ip_default_ttl", "words"), ("net.ipv4.no_such", "1")]
)
def test_a_sysctl_that_fails_is_named_and_nothing_stays(
    paths: dict[str, str], tmp_path: Path, name: str, value: str
) -> None:
    with pytest.raises(errors.ShimError, match=name):
        create(paths, sysctls={name: value})
    assert pinned(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


@ROOT
def test_a_path_that_cannot_be_bound_undoes_the_others(
    paths: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(errors.ShimError, match="no/such"):
        create({**paths, "uts": os.fspath(tmp_path / "no/such")})
    assert pinned(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


@ROOT
def test_none_is_nothing(tmp_path: Path) -> None:
    create({})
    assert list(tmp_path.iterdir()) == []


@ROOT
def test_release_takes_what_it_finds(paths: dict[str, str], tmp_path: Path) -> None:
    create(paths)
    linux.mount(paths["net"], paths["net"], flags=linux.MS_BIND)  # twice
    sandbox.release(paths.values())
    sandbox.release(paths.values())
    assert pinned(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


@ROOT
def test_one_that_cannot_be_released_does_not_keep_the_others(
    paths: dict[str, str], tmp_path: Path
) -> None:
    create(paths)
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        sandbox.release([os.fspath(tmp_path / "folder"), *paths.values()])
    assert pinned(tmp_path) == []


@ROOT
def test_no_process_is_left(paths: dict[str, str]) -> None:
    before = set(process.descendants(os.getpid()))
    create(paths)
    with pytest.raises(errors.ShimError):
        create(paths, sysctls={"net.ipv4.no_such": "1"})
    assert set(process.descendants(os.getpid())) == before


@ROOT
def test_a_user_namespace_owns_the_others(paths: dict[str, str], tmp_path: Path) -> None:
    user = os.fspath(tmp_path / "user")
    mapping = "0 100000 65536\n"
    create(
        {"user": user, **paths},
        hostname="mapped",
        sysctls={
            "net.ipv4.ip_default_ttl": "44",
            "net.ipv4.ping_group_range": "0 65535",  # the pod's ids
            "kernel.shmmni": "77",
            "fs.mqueue.msg_max": "11",
        },
        uid_map=mapping,
        gid_map=mapping,
    )
    assert inside(f"--user={user}", "cat", "/proc/self/uid_map").split() == mapping.split()
    both = (f"--user={user}", f"--net={paths['net']}")
    assert inside(*both, "cat", "/proc/sys/net/ipv4/ip_default_ttl") == "44"
    assert inside(*both, "ip", "link", "set", "lo", "down") == ""  # root in there
    assert inside(both[1], "cat", "/proc/sys/net/ipv4/ping_group_range") == "100000\t165535"
    ipc = f"--ipc={paths['ipc']}"
    assert inside(ipc, "cat", "/proc/sys/kernel/shmmni") == "77"
    assert inside(ipc, "cat", "/proc/sys/fs/mqueue/msg_max") == "11"
    assert inside(f"--uts={paths['uts']}", "hostname") == "mapped"


@ROOT
def test_a_mapping_that_the_kernel_refuses(paths: dict[str, str], tmp_path: Path) -> None:
    user = os.fspath(tmp_path / "user")
    with pytest.raises(errors.ShimError, match="cannot make the pod's namespaces"):
        create({"user": user, **paths}, uid_map="0 0 0\n", gid_map="0 0 1\n")
    assert pinned(tmp_path) == []


@ROOT
def test_a_sysctl_that_fails_in_a_user_namespace_is_named_too(
    paths: dict[str, str], tmp_path: Path
) -> None:
    mapping = "0 100000 65536\n"
    with pytest.raises(errors.InvalidArgument, match="ping_group_range"):
        create(
            {"user": os.fspath(tmp_path / "user"), **paths},
            sysctls={"net.ipv4.ping_group_range": "0 65536"},  # more than the pod has
            uid_map=mapping,
            gid_map=mapping,
        )
    assert pinned(tmp_path) == []
