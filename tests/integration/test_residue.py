# SPDX-License-Identifier: Apache-2.0
"""The check that nothing stays behind can fail: each kind of leftover is seen, and seen to go."""

import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from shim import linux
from tests import residue
from tests.lab import cgroups, init, network

pytestmark = pytest.mark.needs("root", "netns", "iptables", "ip")
MARK = f"residue{os.getpid()}"


def new(before: frozenset[str]) -> list[str]:
    """Return the kinds of what bears the mark and was not there before."""
    lines = residue.left(before, marks=[MARK], alone=False, seconds=0)
    return sorted({line.split()[0] for line in lines})


def run(*command: str | Path) -> None:
    subprocess.run(command, check=True)


def iptables(verb: str, *words: str) -> None:
    run("iptables", "-t", "nat", verb, "CNI-TEST", *words)


def make_mount(folder: Path) -> Callable[[], None]:
    linux.mount("tmpfs", os.fspath(folder), "tmpfs", 0, "size=4k")
    return lambda: linux.umount2(os.fspath(folder))


def make_netns(_folder: Path) -> Callable[[], None]:
    run("ip", "netns", "add", MARK)
    return lambda: run("ip", "netns", "delete", MARK)


def make_rule(_folder: Path) -> Callable[[], None]:
    iptables("-N")
    iptables("-A", "-m", "comment", "--comment", f"name: {MARK}", "-j", "RETURN")

    def undo() -> None:
        iptables("-F")
        iptables("-X")

    return undo


def make_cgroup(_folder: Path) -> Callable[[], None]:
    for mount in cgroups.hierarchies():
        (mount / MARK).mkdir()
    return lambda: cgroups.remove(f"/{MARK}")


def make_lease(_folder: Path) -> Callable[[], None]:
    lease = network.LEASES / MARK / "192.0.2.9"
    lease.parent.mkdir(parents=True)
    lease.write_text("a pod\n")

    def undo() -> None:
        lease.unlink()
        lease.parent.rmdir()

    return undo


def make_process(folder: Path) -> Callable[[], None]:
    process = subprocess.Popen(["sleep", "1000"], cwd=folder)

    def undo() -> None:
        process.kill()
        process.wait()

    return undo


def make_socket(folder: Path) -> Callable[[], None]:
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(os.fspath(folder / "s"))
    return listening.close


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("mount", make_mount),
        ("netns", make_netns),
        ("rule", make_rule),
        ("cgroup", make_cgroup),
        ("file", make_lease),
        ("process", make_process),
        ("socket", make_socket),
    ],
)
def test_a_leftover_is_seen(
    kind: str, make: Callable[[Path], Callable[[], None]], tmp_path: Path
) -> None:
    folder = tmp_path / MARK
    folder.mkdir()
    before = residue.take([MARK])
    undo = make(folder)
    try:
        assert kind in new(before)
    finally:
        undo()
    assert new(before) == []


def test_a_cgroup_with_a_process_of_others_is_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell that somebody opens while the tests run; `alone` or not, it is not left behind."""

    def left() -> list[str]:
        return [
            line for line in residue.left(before, marks=[], alone=True, seconds=0) if MARK in line
        ]

    before = residue.take()
    process = subprocess.Popen(["sleep", "1000"])
    try:
        for mount in cgroups.hierarchies():
            (mount / MARK).mkdir()
        (cgroups.hierarchies()[0] / MARK / "cgroup.procs").write_text(str(process.pid))

        monkeypatch.setenv(init.WHO, str(os.getpid()))
        assert len(left()) == len(cgroups.hierarchies()), "a process of the run: its cgroup counts"
        monkeypatch.setenv(init.WHO, str(process.pid + 1))  # nobody's ancestor
        assert len(left()) == len(cgroups.hierarchies()) - 1
    finally:
        process.kill()
        process.wait()
        cgroups.remove(f"/{MARK}")
