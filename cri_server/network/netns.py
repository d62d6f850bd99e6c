# SPDX-License-Identifier: Apache-2.0
"""A pod's network namespace: make it, is it there, take it away.

It is pinned by a bind mount of its nsfs file on /run/netns/<pod id>, where `ip netns` and CNI
plugins look. The pin outlives every process and not a reboot, after which at most an empty file is
left; `remove` takes that away too. That of a pod with a user namespace must belong to it, and is
made by the shim.
"""

import contextlib
import fcntl
import os
import re
import socket
import struct
from collections.abc import Mapping
from pathlib import Path

from cri_server import errors
from cri_server.network import inside
from shim import linux, mounts

_IFREQ = "16sh14x"  # name and flags: netdevice(7)
_OF_DEVICE = re.compile(r"net\.[^.]+\.(conf|neigh)\.(?!(all|default|lo)\.)")
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 0x1


def create(path: str, sysctls: Mapping[str, str]) -> None:
    """Make a namespace with its loopback up and these sysctls (dotted names below "net.") and pin
    it, or leave nothing. Blocks.

    Raises InvalidArgument for a sysctl that the kernel refuses, Internal.
    """
    try:
        inside.run_new(lambda: _furnish(path, sysctls))
    except OSError as e:
        remove(path)
        raise errors.Internal(f"cannot make the pod's network namespace: {e.strerror}") from e


def is_of_device(sysctl: str) -> bool:
    """Say whether a sysctl (by its dotted name) is there only when the pod has its interface."""
    return _OF_DEVICE.match(sysctl) is not None


def write(path: str, sysctls: Mapping[str, str]) -> None:
    """Write sysctls in the namespace that is pinned at `path`. Blocks.

    Raises InvalidArgument for one that the kernel refuses, Internal.
    """
    try:
        inside.run(path, lambda: _write_all(sysctls))
    except OSError as e:
        raise errors.Internal(f"cannot enter the pod's network namespace: {e.strerror}") from e


def _furnish(path: str, sysctls: Mapping[str, str]) -> None:
    _bring_up(b"lo")
    _write_all(sysctls)
    os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o444))
    linux.mount("/proc/thread-self/ns/net", path, flags=linux.MS_BIND)


def _bring_up(name: bytes) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        answer = fcntl.ioctl(control, _SIOCGIFFLAGS, struct.pack(_IFREQ, name, 0))
        _, flags = struct.unpack(_IFREQ, answer)
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack(_IFREQ, name, flags | _IFF_UP))


def _write_all(sysctls: Mapping[str, str]) -> None:
    for name, value in sysctls.items():
        _write(name, value)


def _write(name: str, value: str) -> None:
    """Write a sysctl of the namespace that this thread is in: proc_sys_net(5)."""
    path = name.translate(str.maketrans("./", "/."))  # a "/" stands for a dot in a part's name
    try:
        Path("/proc/sys", path).write_text(value + "\n")  # an empty one is written too
    except OSError as e:
        raise errors.InvalidArgument(f"sysctl {name}={value!r}: {e.strerror}") from e


def exists(path: str) -> bool:
    """Say whether a namespace is pinned at `path`: a file of nsfs, not the empty file below it."""
    try:
        # All namespaces of a kernel live on one nsfs, so its device number tells.
        return os.stat(path).st_dev == os.stat("/proc/self/ns/net").st_dev
    except OSError:
        return False


def remove(path: str) -> None:
    """Unpin what is at `path`; "" and a path where nothing is are fine. Raises OSError."""
    if path:
        mounts.unmount(path)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
