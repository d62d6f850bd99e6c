# SPDX-License-Identifier: Apache-2.0
"""System calls by ctypes: arguments arrive in the right order, errors with errno and path."""

import errno
import os
import select
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from shim import linux

root = pytest.mark.needs("root")


def in_child(work: Callable[[], object]) -> str:
    """Run in a forked child, where it may change the process; return the repr of the result."""
    r, w = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            said = repr(work())
        except BaseException as error:
            said = f"failed: {error!r}"
        os.write(w, said.encode())
        os._exit(0)
    os.close(w)
    with os.fdopen(r) as result:
        text = result.read()
    os.waitpid(pid, 0)
    return text


# ---- openat2


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/passwd").write_text("inside")
    (tmp_path / "out").symlink_to("/etc/passwd")
    (tmp_path / "up").symlink_to("../../../../etc/passwd")
    (tmp_path / "magic").symlink_to("/proc/self/root/etc/passwd")
    return tmp_path


@pytest.mark.parametrize("name", ["etc/passwd", "/etc/passwd", "out", "up", "../etc/passwd"])
def test_openat2_in_root_stays_in_the_root(tree: Path, name: str) -> None:
    top = os.open(tree, os.O_PATH)
    fd = linux.openat2(top, name, os.O_RDONLY, resolve=linux.RESOLVE_IN_ROOT)
    os.close(top)
    with os.fdopen(fd) as file:
        assert not os.get_inheritable(fd)
        assert file.read() == "inside"


@pytest.mark.parametrize(
    ("name", "resolve", "code"),
    [
        ("out", linux.RESOLVE_BENEATH, errno.EXDEV),
        ("out", linux.RESOLVE_NO_SYMLINKS, errno.ELOOP),
        ("missing", 0, errno.ENOENT),
        ("etc", 1 << 40, errno.EINVAL),
    ],
)
def test_openat2_refuses_with_errno_and_path(
    tree: Path, name: str, resolve: int, code: int
) -> None:
    top = os.open(tree, os.O_PATH)
    try:
        with pytest.raises(OSError, match=name) as caught:
            linux.openat2(top, name, os.O_RDONLY, resolve=resolve)
    finally:
        os.close(top)
    assert (caught.value.errno, caught.value.filename) == (code, name)


def test_openat2_creates_with_a_mode(tmp_path: Path) -> None:
    path = os.fspath(tmp_path / "new")
    os.close(linux.openat2(linux.AT_FDCWD, path, os.O_CREAT | os.O_WRONLY, mode=0o600))
    assert os.stat(path).st_mode & 0o777 == 0o600


# ---- errors


@root
def test_a_failed_mount_names_its_target() -> None:
    with pytest.raises(FileNotFoundError) as caught:
        linux.mount("none", "/no/such/target", "tmpfs")
    assert caught.value.filename == "/no/such/target"
    with pytest.raises(OSError, match="/no/such/target"):
        linux.umount2("/no/such/target")


@root
def test_a_wrong_option_is_explained_by_the_file_system() -> None:
    context = linux.fsopen("tmpfs")
    try:
        with pytest.raises(OSError, match="nonsense"):
            linux.fsconfig_string(context, "nonsense", "1")
    finally:
        os.close(context)
    with pytest.raises(OSError) as caught:  # noqa: PT011 - the number is compared below
        linux.fsopen("no-such-file-system")
    assert caught.value.errno == errno.ENODEV


# ---- this process


@root
def test_namespaces_are_left_and_entered() -> None:
    def work() -> tuple[bool, str, bool]:
        before = os.stat("/proc/self/ns/uts").st_ino
        with open("/proc/self/ns/uts") as outside:
            linux.unshare(linux.CLONE_NEWUTS)
            inside = os.stat("/proc/self/ns/uts").st_ino
            linux.sethostname("somewhere")
            name = socket.gethostname()
            linux.setns(outside.fileno(), linux.CLONE_NEWUTS)
        return inside != before, name, os.stat("/proc/self/ns/uts").st_ino == before

    host = socket.gethostname()
    assert in_child(work) == "(True, 'somewhere', True)"
    assert socket.gethostname() == host


def test_a_subreaper_inherits_orphans() -> None:
    def work() -> bool:
        linux.prctl_set_child_subreaper()
        r, w = os.pipe()
        middle = os.fork()
        if middle == 0:
            orphan = os.fork()
            if orphan == 0:
                os.read(r, 1)
                os._exit(7)
            os._exit(0)
        os.waitpid(middle, 0)
        os.write(w, b"x")
        return os.waitstatus_to_exitcode(os.waitpid(-1, 0)[1]) == 7

    assert in_child(work) == "True"


def test_the_name_is_cut_to_what_the_kernel_keeps() -> None:
    def work() -> str:
        linux.prctl_set_name("a-name-that-is-too-long")
        return Path("/proc/self/comm").read_text().strip()

    assert in_child(work) == "'a-name-that-is-'"


def test_pdeathsig_ends_the_child_of_a_dead_parent() -> None:
    r, w = os.pipe()
    parent = os.fork()
    if parent == 0:
        if os.fork() == 0:
            linux.set_pdeathsig(signal.SIGKILL)
            os.write(w, b"x")
            signal.pause()
        os.read(r, 1)
        os._exit(0)
    os.waitpid(parent, 0)
    os.close(w)
    assert select.select([r], [], [], 10)[0]  # the child's end of the pipe is closed: it is dead
    assert os.read(r, 1) == b""
    os.close(r)


def test_close_range_closes_the_range() -> None:
    def work() -> list[bool]:
        for fd in (50, 51, 52):
            os.dup2(1, fd)
        linux.close_range(51, 52)
        return [os.path.exists(f"/proc/self/fd/{fd}") for fd in (50, 51, 52)]

    assert in_child(work) == "[True, False, False]"


def test_capabilities_are_those_that_the_kernel_shows() -> None:
    status = dict(
        line.split(":\t", 1) for line in Path("/proc/thread-self/status").read_text().splitlines()
    )
    assert linux.effective_capabilities() == int(status["CapEff"], 16)
    assert linux.bounding_capabilities() == int(status["CapBnd"], 16)


def test_fork_makes_a_child_that_can_go_on() -> None:
    r, w = os.pipe()
    pid = linux.fork()
    if pid == 0:
        os.write(w, str(os.getpid()).encode())
        os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
    assert int(os.read(r, 20)) == pid
    os.close(r)
    os.close(w)


def test_syncfs_wants_a_descriptor(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    linux.syncfs(fd)
    os.close(fd)
    with pytest.raises(OSError, match="Bad file"):
        linux.syncfs(fd)
