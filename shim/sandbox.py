# SPDX-License-Identifier: Apache-2.0
"""The namespaces of a pod: made in a child that ends, kept by bind mounts, released by unmounting.

    shim ──fork──► child: unshare(user) ─► parent writes the mappings ─► unshare(net, ipc, uts), lo up, hostname, sysctls
      │                                                                                │
      └─ bind /proc/<child>/ns/* onto the given paths ◄────────── "done" ──────────────┘

Either all paths are namespaces afterwards or none is. The mounts survive a shim and are gone after a reboot;
`release` may be repeated and takes what it finds. Which sysctls a pod may have is decided by `cri_server`; here only
those are refused that would not stay inside the pod.
"""

import contextlib
import errno
import fcntl
import json
import os
import signal
import socket
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NoReturn

from shim import diagnostics, errors, linux, loop, reaper

_FLAGS = {
    "user": linux.CLONE_NEWUSER,
    "net": linux.CLONE_NEWNET,
    "ipc": linux.CLONE_NEWIPC,
    "uts": linux.CLONE_NEWUTS,
}
# Which namespace confines a sysctl, by the beginning of its name; see namespaces(7), ipc_namespaces(7).
_SYSCTL_HOMES = (
    ("net/", "net"),
    ("kernel/shm", "ipc"),
    ("kernel/msg", "ipc"),
    ("kernel/sem", "ipc"),
    ("fs/mqueue/", "ipc"),
    ("kernel/hostname", "uts"),
    ("kernel/domainname", "uts"),
)
_SECONDS = 30.0
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 0x1


@dataclass(frozen=True, kw_only=True, slots=True)
class Namespaces:
    """What a pod has of its own. `paths`: "net", "ipc", "uts", "user" to the file that keeps it.

    Mappings are lines for uid_map and gid_map (user_namespaces(7)); they come with a "user" path and only then.
    """

    paths: Mapping[str, str]
    hostname: str = ""
    sysctls: Mapping[str, str]
    uid_map: str = ""
    gid_map: str = ""


async def create(wanted: Namespaces, children: reaper.Reaper) -> None:
    """Make and pin the namespaces. Raises InvalidArgument for a sysctl, Internal for what the kernel refuses."""
    sysctls = _plan_sysctls(wanted)
    if not wanted.paths:
        return
    with children.launching():
        child = _Child(wanted, sysctls)
        try:
            async with loop.timeout(_SECONDS):
                await child.answer()
                if "user" in wanted.paths:
                    child.map_users(wanted)
                    await child.answer()
            _pin(wanted.paths, child.pid)
        except OSError as error:  # TimeoutError included
            raise errors.Internal(f"cannot make the pod's namespaces: {error}") from error
        finally:
            child.end()


def release(paths: Iterable[str]) -> None:
    """Unmount and remove the files that keep namespaces; each is tried. Raises the first OSError."""
    failures = []
    for path in paths:
        try:
            _unpin(path)
        except OSError as error:
            failures.append(error)
            diagnostics.report("cannot release a namespace", path=path, error=error)
    if failures:
        raise failures[0]


def _pin(paths: Mapping[str, str], pid: int) -> None:
    try:
        for kind, path in paths.items():
            os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o444))
            linux.mount(f"/proc/{pid}/ns/{kind}", path, flags=linux.MS_BIND)
    except OSError:
        with contextlib.suppress(OSError):  # The first error is the one to tell.
            release(paths.values())
        raise


def _unpin(path: str) -> None:
    while True:
        try:
            linux.umount2(path, linux.MNT_DETACH | linux.UMOUNT_NOFOLLOW)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOENT):
                raise
            break
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


# ---- sysctls


def _plan_sysctls(wanted: Namespaces) -> dict[str, str]:
    """Return paths below /proc/sys to values. Raises InvalidArgument, naming what would reach the host."""
    plan = {}
    for name, value in wanted.sysctls.items():
        path = sysctl_path(name)
        home = next((kind for start, kind in _SYSCTL_HOMES if path.startswith(start)), None)
        if home not in wanted.paths or ".." in path.split("/"):
            raise errors.InvalidArgument(f"sysctl {name!r} is not confined to the pod")
        plan[path] = value
    return plan


def sysctl_path(name: str) -> str:
    """Return the path below /proc/sys. The first separator tells the form, as sysctl.d(5) says.

    "net.ipv4.conf.eno2/100.rp_filter" and "net/ipv4/conf/eno2.100/rp_filter" are the same.
    """
    first = next((letter for letter in name if letter in "./"), "/")
    return name if first == "/" else name.translate(str.maketrans("./", "/."))


# ---- the child


class _Child:
    """The process that makes the namespaces; it answers "" or what went wrong, and waits to be ended."""

    def __init__(self, wanted: Namespaces, sysctls: Mapping[str, str]) -> None:
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ours.setblocking(False)
        self.pid = os.fork()
        if self.pid == 0:
            _work(theirs, wanted, sysctls)
        theirs.close()

    async def answer(self) -> None:
        """Wait until the next step is done. Raises what the child met."""
        await loop.readable(self._ours.fileno())
        failure = json.loads(self._ours.recv(4096) or b'["the process that makes them died"]')
        if failure:
            raise errors.Internal(f"cannot make the pod's namespaces: {failure[0]}")

    def map_users(self, wanted: Namespaces) -> None:
        """Write the mappings, which only its parent may, and let the child go on."""
        for name, lines in (("uid_map", wanted.uid_map), ("gid_map", wanted.gid_map)):
            with open(f"/proc/{self.pid}/{name}", "w") as file:
                file.write(lines)
        self._ours.send(b"go")

    def end(self) -> None:
        """Kill and reap it: all that it had is pinned or to be forgotten."""
        self._ours.close()
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def _work(pipe: socket.socket, wanted: Namespaces, sysctls: Mapping[str, str]) -> NoReturn:
    """Run in the child; it must touch neither the loop nor anything that the parent still uses."""
    try:
        flags = {kind: _FLAGS[kind] for kind in wanted.paths}
        if user := flags.pop("user", 0):
            linux.unshare(user)
            _tell(pipe, None)
            pipe.recv(16)
            os.setresgid(0, 0, 0)
            os.setresuid(0, 0, 0)
        linux.unshare(sum(flags.values()))
        _furnish(wanted, sysctls)
        _tell(pipe, None)
        pipe.recv(16)
    except BaseException as error:
        _tell(pipe, str(error))
    finally:
        os._exit(0)


def _tell(pipe: socket.socket, failure: str | None) -> None:
    pipe.send(json.dumps([failure[:1000]] if failure is not None else None).encode())


def _furnish(wanted: Namespaces, sysctls: Mapping[str, str]) -> None:
    if "net" in wanted.paths:
        _bring_up("lo")
    if "uts" in wanted.paths and wanted.hostname:
        linux.sethostname(wanted.hostname)
    for path, value in sysctls.items():
        try:
            with open(f"/proc/sys/{path}", "w") as file:
                file.write(value)
        except OSError as error:
            name = path.replace("/", ".")
            raise OSError(error.errno, f"sysctl {name}={value!r}: {error.strerror}") from error


def _bring_up(interface: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = struct.pack("16sh14x", interface.encode(), 0)
        _, flags = struct.unpack("16sh14x", fcntl.ioctl(control, _SIOCGIFFLAGS, request))
        up = struct.pack("16sh14x", interface.encode(), flags | _IFF_UP)
        fcntl.ioctl(control, _SIOCSIFFLAGS, up)
