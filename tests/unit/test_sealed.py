# SPDX-License-Identifier: Apache-2.0
"""shim.sealed: copies of programs that can be run and not be changed."""

import fcntl
import os
import shutil
from pathlib import Path

import pytest

from shim import process, sealed

TRUE = shutil.which("true") or "/bin/true"
ALL = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def test_a_copy_runs_and_cannot_be_changed() -> None:
    fd = sealed.copy(TRUE)
    assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) == ALL  # exactly these: crun compares
    assert not os.get_inheritable(fd)
    for change in (lambda: os.pwrite(fd, b"x", 0), lambda: os.ftruncate(fd, 1)):
        with pytest.raises(PermissionError):
            change()
    child = process.spawn(["any name"], program=f"/proc/self/fd/{fd}")
    assert process.reap(child) == 0
    os.close(fd)


@pytest.mark.parametrize("content", [b"#!/bin/sh\nexit 0\n", b"", b"\x7fEL"])
def test_what_is_no_machine_code_has_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "program"
    path.write_bytes(content)
    path.chmod(0o755)
    before = os.listdir("/proc/self/fd")
    assert sealed.copy(os.fspath(path)) == -1
    assert os.listdir("/proc/self/fd") == before


def test_what_is_not_there_has_none() -> None:
    assert sealed.copy("/no/such/program") == -1
    assert sealed.identity("/no/such/program") == ""


def test_a_changed_file_is_another(tmp_path: Path) -> None:
    path = tmp_path / "program"
    path.write_bytes(b"one")
    first = sealed.identity(os.fspath(path))
    assert sealed.identity(os.fspath(path)) == first
    other = tmp_path / "other"
    other.write_bytes(b"two")
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    other.replace(path)
    assert sealed.identity(os.fspath(path)) != first
