# SPDX-License-Identifier: Apache-2.0
"""Processes: started in one place, waited for by pidfd, killed as a tree.

`spawn` uses posix_spawn, which shares no memory with the parent and runs no Python in the child, so
it is as safe in a threaded gRPC server as in a shim. A child leads a session of its own: it has no
terminal, no signal of ours reaches it, and its process group can be killed as one. Nothing here
outlives this process; children do, and are found again by (pid, start time) with `alive`. Waiting
without blocking belongs to `shim.loop` and to `cri_server.commands`.
"""

import contextlib
import errno
import fcntl
import os
import re
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
DEFAULT_ENV: Mapping[str, str] = {"PATH": DEFAULT_PATH, "LANG": "C.UTF-8", "HOME": "/"}

_KERNEL_THREAD = 0x00200000  # PF_KTHREAD, include/linux/sched.h
_CONTAINER_ID = re.compile(rb"[0-9a-f]{64}")
# Python ignores SIGPIPE and SIGXFSZ, a shim ignores more; a program would inherit that.
_RESET_SIGNALS = sorted(set(range(1, 32)) - {signal.SIGKILL, signal.SIGSTOP})


class Child(NamedTuple):
    """A started process. Whoever has it must `reap` it, which closes the pidfd."""

    pid: int
    pidfd: int


def spawn(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    stdin: int | None = None,
    stdout: int | None = None,
    stderr: int | None = None,
    fds: Mapping[int, int] | None = None,
    new_session: bool = True,
    program: str = "",
) -> Child:
    """Start a program and return at once; no shell, and no descriptor but the given ones.

    `program` is the file that is executed, "" for the one that argv[0] names.
    `env` is the whole environment (None: `DEFAULT_ENV`). A standard stream that is None is
    /dev/null. `fds` maps numbers in the child to descriptors here. The caller keeps, and closes,
    what it passed. What this process itself has inherited goes along until `keep_descriptors`.
    Raises FileNotFoundError, PermissionError, and OSError when the host has no process or
    descriptor left.
    """
    environment = DEFAULT_ENV if env is None else env
    wanted = {0: stdin, 1: stdout, 2: stderr, **(fds or {})}
    duplicates: list[int] = []
    try:
        pid = os.posix_spawn(
            program or find(argv[0], environment.get("PATH", DEFAULT_PATH)),
            list(argv),
            dict(environment),
            file_actions=_file_actions(wanted, duplicates),
            setsigmask=[],
            setsigdef=_RESET_SIGNALS,
            **({"setsid": True} if new_session else {"setpgroup": 0}),
        )
    finally:
        for fd in duplicates:
            os.close(fd)
    return Child(pid=pid, pidfd=_pidfd(pid))


def keep_descriptors() -> None:
    """Have no program get what our own starter left open: a container could reach the host by it
    (CVE-2024-21626). To be called before anything is opened.
    """
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # that of the list itself
            if int(name) > 2:
                os.set_inheritable(int(name), False)


def _file_actions(wanted: Mapping[int, int | None], duplicates: list[int]) -> list[tuple[int, ...]]:
    """Plan the child's descriptors; a source that would be overwritten before its turn is
    duplicated.
    """
    actions: list[tuple[int, ...]] = []
    for target, source in wanted.items():
        if source is None:
            actions.append((os.POSIX_SPAWN_OPEN, target, b"/dev/null", os.O_RDWR, 0))  # type: ignore[arg-type]
            continue
        if source != target and source in wanted:
            source = fcntl.fcntl(source, fcntl.F_DUPFD_CLOEXEC, max(wanted) + 1)
            duplicates.append(source)
        actions.append((os.POSIX_SPAWN_DUP2, source, target))
    return actions


def _pidfd(pid: int) -> int:
    try:
        return os.pidfd_open(pid)
    except OSError:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise


def find(name: str, path: str = DEFAULT_PATH) -> str:
    """Return the executable that `name` means in a PATH. Raises FileNotFoundError."""
    if "/" in name:
        return name
    for directory in path.split(":"):
        candidate = f"{directory or '.'}/{name}"
        if os.access(candidate, os.X_OK) and os.path.isfile(candidate):
            return candidate
    raise FileNotFoundError(2, "executable not found in PATH", name)


def input_file(data: bytes) -> int:
    """Return a descriptor from which a child reads exactly `data`: no pipe to fill, no writer to
    wait for.
    """
    fd = os.memfd_create("stdin")
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.lseek(fd, 0, os.SEEK_SET)
    except BaseException:
        os.close(fd)
        raise
    return fd


def kill_group(child: Child, signum: int = signal.SIGKILL) -> None:
    """Signal the child's process group and every descendant that left it. Only before `reap`.

    A zombie still owns its number, so an unreaped leader's group cannot be somebody else's.
    """
    strays = list(descendants(child.pid))
    for send, target in [(os.killpg, child.pid), *((os.kill, pid) for pid in strays)]:
        try:
            send(target, signum)
        except ProcessLookupError:
            continue


class Identity(NamedTuple):
    """A process, and no later one that gets its number."""

    pid: int
    start_time: int


def kill_orphans(*words: str) -> bool:
    """Kill the trees of all processes with these arguments or variables; return whether any, or
    that it could not be told (no descriptors left).

    For helpers that a dead shim or server has left behind: words that nothing else has all of. It
    may block, see `words_of`.
    """
    wanted = {word.encode() for word in words}
    try:
        found = [each for each in candidates(words) if wanted <= words_of(each.pid)]
        for each in found:
            kill_tree(each)
    except OSError:
        return True
    return bool(found)


def candidates(words: Iterable[str]) -> Iterator[Identity]:
    """Yield the processes that may have these words, without waiting for any of them.

    The kernel's own are left out, and those in the cgroup of a container that no word names: what
    runs there hangs most often, and no helper of ours is among it. Raises OSError.
    """
    named, around = set(_CONTAINER_ID.findall(" ".join(words).encode())), _cgroup_ids("self")
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            stat = _stat(int(name))
            if int(stat[6]) & _KERNEL_THREAD:
                continue
            ids = _cgroup_ids(name) - around
            if not ids or ids & named:
                yield Identity(int(name), int(stat[19]))


def _cgroup_ids(pid: str) -> set[bytes]:
    """Return the ids of containers in the path of a process's cgroups."""
    with open(f"/proc/{pid}/cgroup", "rb") as file:
        return set(_CONTAINER_ID.findall(file.read()))


def words_of(pid: int) -> frozenset[bytes]:
    """Return the arguments and variables of a process, none when it has ended or hides them.

    Blocks while the process has its memory locked, for ever when it hangs in the kernel. Raises
    OSError when there is no descriptor or memory left.
    """
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as one, open(f"/proc/{pid}/environ", "rb") as two:
            return frozenset((*one.read().split(b"\0"), *two.read().split(b"\0")))
    except OSError as e:
        if e.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise
        return frozenset()


def kill_tree(who: Identity) -> None:
    """Kill a process and its descendants, parents first: none sees its child die and goes on."""
    below: list[Identity] = []
    for pid in descendants(who.pid):
        with contextlib.suppress(ProcessLookupError):
            below.append(Identity(pid, start_time(pid)))
    for each in (who, *below):
        kill(each)


def kill(who: Identity) -> None:
    """Kill exactly this process; nothing to do when it has ended."""
    with contextlib.suppress(ProcessLookupError):
        fd = os.pidfd_open(who.pid)
        try:
            if alive(*who):  # looked at with the descriptor held: the number is not used again
                signal.pidfd_send_signal(fd, signal.SIGKILL)
        finally:
            os.close(fd)


def descendants(pid: int) -> Iterator[int]:
    """Yield the live descendants of a process, parents first; orphans have gone elsewhere.

    Without recursion: a container may nest its processes deeper than that goes.
    """
    left = [pid]
    while left:
        for child in _children(left.pop()):
            yield child
            left.append(child)


def _children(pid: int) -> list[int]:
    found: list[int] = []
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/children", "rb") as file:
                found += map(int, file.read().split())
    except (FileNotFoundError, ProcessLookupError):
        pass
    return found


def reap(child: Child) -> int:
    """Wait for the end of a child, release its number and pidfd; return its code, or -n for signal
    n.

    Blocks when the child has not ended: wait until its pidfd is readable first. Raises
    ChildProcessError when somebody else has waited for it.
    """
    try:
        result = os.waitid(os.P_PIDFD, child.pidfd, os.WEXITED)
    finally:
        os.close(child.pidfd)
    if result is None:  # only with WNOHANG
        raise ChildProcessError(child.pid)
    return result.si_status if result.si_code == os.CLD_EXITED else -result.si_status


def start_time(pid: int) -> int:
    """Return when a process started, in clock ticks since boot: with the pid its identity until a
    reboot.

    Field 22 of /proc/<pid>/stat, see proc(5). Raises ProcessLookupError.
    """
    return int(_stat(pid)[19])


def descends(pid: int, ancestor: int) -> bool:
    """Say whether a process, ended or not, is below another one. Raises ProcessLookupError."""
    above = int(_stat(pid)[1])
    while above not in (0, ancestor):
        try:
            above = int(_stat(above)[1])
        except ProcessLookupError:  # it has ended: what was below it has another parent now
            above = int(_stat(pid)[1])
    return above == ancestor


def alive(pid: int, start_time: int) -> bool:
    """Say whether exactly this process exists and is not a zombie."""
    try:
        stat = _stat(pid)
    except ProcessLookupError:
        return False
    return int(stat[19]) == start_time and stat[0] not in (b"Z", b"X")


def _stat(pid: int) -> list[bytes]:
    """Return the fields from the third on: the second, the command, may hold spaces and
    parentheses.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()
    except FileNotFoundError:
        raise ProcessLookupError(3, "no such process", str(pid)) from None
