# SPDX-License-Identifier: Apache-2.0
"""The namespaces of a pod: made in a child that ends, kept by bind mounts, released by unmounting.

    shim ──fork──► maker: unshare(net, ipc, uts), lo up, hostname, sysctls; bind /proc/self/ns/*
                     │    onto the given paths; answer; end
                     └──fork──► with a user namespace: unshare(user) and the rest happen in a child
                                of the maker, which writes the mappings and binds from outside

Either all paths are namespaces afterwards or none is. The mounts survive a shim and are gone after
a reboot; `release` may be repeated and takes what it finds. Which sysctls a pod may have is decided
by `cri_server`; here only those are refused that would not stay inside the pod. All the work is
done in the maker, so that none of its memory stays with the shim.
"""

import contextlib
import errno
import fcntl
import os
import signal
import socket
import struct
from collections.abc import Iterable, Mapping
from typing import NamedTuple, NoReturn

from shim import diagnostics, errors, linux, loop, reaper

_FLAGS = {
    "user": linux.CLONE_NEWUSER,
    "net": linux.CLONE_NEWNET,
    "ipc": linux.CLONE_NEWIPC,
    "uts": linux.CLONE_NEWUTS,
}
# Which namespace confines a sysctl, by the beginning of its name: namespaces(7).
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
_ANSWER_LIMIT = 4096
_MADE, _REFUSED, _FAILED = b"+", b"?", b"-"
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 0x1


class Namespaces(NamedTuple):
    """What a pod has of its own. `paths`: "net", "ipc", "uts", "user" to the file that keeps it.

    Mappings are lines for uid_map and gid_map (user_namespaces(7)); they come with a "user" path
    and only then.
    """

    paths: Mapping[str, str]
    sysctls: Mapping[str, str]
    hostname: str = ""
    uid_map: str = ""
    gid_map: str = ""


async def create(wanted: Namespaces, children: reaper.Reaper) -> None:
    """Make and pin the namespaces. Raises InvalidArgument for a sysctl, Internal for what the
    kernel refuses.
    """
    if not wanted.paths and not wanted.sysctls:
        return
    ours, theirs = os.pipe2(os.O_CLOEXEC)
    with children.launching():
        pid = linux.fork()
        if pid == 0:
            _answer(theirs, wanted)
        os.close(theirs)
        try:
            async with loop.timeout(_SECONDS):
                await loop.readable(ours)
            _check(os.read(ours, _ANSWER_LIMIT))
        except TimeoutError as error:
            raise errors.Internal("cannot make the pod's namespaces in time") from error
        finally:
            os.close(ours)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)  # noqa: ASYNC222 - killed: it ends at once


def _check(answer: bytes) -> None:
    """Raise what the maker met: its answer is a digit for the kind and the text."""
    if answer != _MADE:
        kind = errors.InvalidArgument if answer[:1] == _REFUSED else errors.Internal
        text = answer[1:].decode(errors="replace") or "the process that makes them died"
        raise kind(f"cannot make the pod's namespaces: {text}")


def release(paths: Iterable[str]) -> None:
    """Unmount and remove the files that keep namespaces, each; raises the first OSError."""
    failures = []
    for path in paths:
        try:
            _unpin(path)
        except OSError as error:
            failures.append(error)
            diagnostics.report("cannot release a namespace", path=path, error=error)
    if failures:
        raise failures[0]


def _pin(paths: Mapping[str, str], process: str) -> None:
    """Bind the namespaces of a process, "self" or a pid, onto files that are made for it."""
    try:
        for kind, path in paths.items():
            os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o444))
            linux.mount(f"/proc/{process}/ns/{kind}", path, flags=linux.MS_BIND)
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
    """Return paths below /proc/sys to values. Raises InvalidArgument, naming what would reach the
    host.
    """
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


# ---- the maker; it touches neither the loop nor anything that the shim still uses


def _answer(pipe: int, wanted: Namespaces) -> NoReturn:
    """Do the work, write how it went, end."""
    answer = _MADE
    try:
        _make(wanted)
    except errors.InvalidArgument as error:
        answer = _REFUSED + error.message.encode()
    except BaseException as error:
        answer = _FAILED + str(error).encode()
    finally:
        os.write(pipe, answer[:_ANSWER_LIMIT])
        os._exit(0)


def _make(wanted: Namespaces) -> None:
    sysctls = _plan_sysctls(wanted)
    if "user" in wanted.paths:
        _make_in_child(wanted, sysctls)
        return
    linux.unshare(sum(_FLAGS[kind] for kind in wanted.paths))
    _furnish(wanted, sysctls)
    _pin(wanted.paths, "self")


def _make_in_child(wanted: Namespaces, sysctls: Mapping[str, str]) -> None:
    """Make them inside a user namespace, whose mappings and mounts only an outsider can make."""
    ours, theirs = socket.socketpair()
    pid = linux.fork()
    if pid == 0:
        _become_user(theirs, wanted, sysctls)
    theirs.close()
    try:
        _expect(ours)
        for name, lines in (("uid_map", wanted.uid_map), ("gid_map", wanted.gid_map)):
            with open(f"/proc/{pid}/{name}", "w") as file:
                file.write(lines)
        ours.send(_MADE)
        _expect(ours)
        _pin(wanted.paths, str(pid))
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _expect(peer: socket.socket) -> None:
    """Wait until the child has done its part. Raises InvalidArgument or OSError: what it met."""
    answer = peer.recv(_ANSWER_LIMIT)
    if answer[:1] == _REFUSED:
        raise errors.InvalidArgument(answer[1:].decode(errors="replace"))
    if answer != _MADE:
        raise OSError(answer[1:].decode(errors="replace") or "the process that makes them died")


def _become_user(peer: socket.socket, wanted: Namespaces, sysctls: Mapping[str, str]) -> NoReturn:
    """Make the other namespaces in a new user namespace."""
    try:
        linux.unshare(linux.CLONE_NEWUSER)
        peer.send(_MADE)
        peer.recv(1)
        linux.unshare(sum(_FLAGS[kind] for kind in wanted.paths if kind != "user"))
        _furnish_as_either(wanted, sysctls)
        peer.send(_MADE)
        peer.recv(1)
    except errors.InvalidArgument as error:
        peer.send(_REFUSED + error.message.encode())
    except BaseException as error:
        peer.send(_FAILED + str(error).encode())
    finally:
        os._exit(0)


def _furnish_as_either(wanted: Namespaces, sysctls: Mapping[str, str]) -> None:
    """Do it as the host's root, whom the user namespace does not have and to whom the sysctls of
    IPC belong before Linux 6.11; if that fails, as its own root, to whom they belong since.
    """
    try:
        _furnish(wanted, sysctls)
    except errors.InvalidArgument:
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
        _furnish(wanted, sysctls)


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
            what = f"sysctl {name}={value!r}: {error.strerror}"
            raise errors.InvalidArgument(what) from error


def _bring_up(interface: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = struct.pack("16sh14x", interface.encode(), 0)
        _, flags = struct.unpack("16sh14x", fcntl.ioctl(control, _SIOCGIFFLAGS, request))
        up = struct.pack("16sh14x", interface.encode(), flags | _IFF_UP)
        fcntl.ioctl(control, _SIOCSIFFLAGS, up)
