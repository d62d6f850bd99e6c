# SPDX-License-Identifier: Apache-2.0
"""SELinux on this host: what its policy calls the types of containers, and who has which level.

    /etc/selinux/config                            SELINUXTYPE=targeted
    /etc/selinux/<type>/contexts/lxc_contexts      process = "system_u:system_r:container_t:s0"
    /sys/fs/selinux/                               there while SELinux is on

Levels are kept on the pods' records and nowhere else: what is on a record is taken, so recovery
restores them and removing a pod frees its own. `Levels` adds those that are promised but not on
record yet. Labels themselves are computed in `spec.selinux`.
"""

import contextlib
import dataclasses
import errno
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from cri_server import errors, spec
from cri_server.spec import selinux

FILESYSTEM = Path("/sys/fs/selinux")
CONFIGURATION = Path("/etc/selinux")
_ENTRY = re.compile(r'^\s*(\w+)\s*=\s*"([^"]*)"', re.M)


def enabled() -> bool:
    return (FILESYSTEM / "enforce").exists()


def policy(configuration: Path = CONFIGURATION) -> spec.SelinuxPolicy:
    """Return the labels that the installed policy has for containers; its usual ones by default."""
    kind = _match(r"^\s*SELINUXTYPE\s*=\s*(\w+)", configuration / "config") or "targeted"
    contexts = dict(_ENTRY.findall(_text(configuration / kind / "contexts/lxc_contexts")))
    usual = spec.SelinuxPolicy()
    return spec.SelinuxPolicy(
        process=_whole(contexts.get("process", ""), usual.process),
        file=_whole(contexts.get("file", ""), usual.file),
        read_only=_whole(contexts.get("ro_file", ""), usual.read_only),
    )


def lacking(named: spec.SelinuxPolicy) -> str:
    """Return the first of the labels that the kernel's policy does not have, "" if it has all.

    A policy may be installed without a module for containers, as Debian's is.
    """
    unconfined = dataclasses.replace(selinux.parse(named.process), type=named.unconfined)
    for label in (named.process, str(unconfined), named.file, named.read_only):
        try:
            check(label)
        except errors.InvalidArgument:
            return label
    return ""


def _whole(label: str, otherwise: str) -> str:
    return label if label.count(":") >= 3 else otherwise


def _match(pattern: str, path: Path) -> str:
    found = re.search(pattern, _text(path), re.M)
    return found[1] if found else ""


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def check(label: str) -> None:
    """Ask the kernel whether its policy has this label. Raises InvalidArgument."""
    fd = os.open(FILESYSTEM / "context", os.O_RDWR | os.O_CLOEXEC)
    try:
        os.write(fd, label.encode())
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ERANGE):
            raise
        raise errors.InvalidArgument(
            f"selinux_options: the host's policy has no label {label[:200]!r}"
        ) from e
    finally:
        os.close(fd)


class Levels:
    """The levels that pods have. `recorded` returns those on record."""

    def __init__(self, recorded: Callable[[], Iterable[str]]) -> None:
        self._recorded = recorded
        self._promised: set[str] = set()

    @contextlib.contextmanager
    def held(self, asked: str) -> Iterator[str]:
        """Yield the level asked for, or else one of nobody's; it is taken for the block, in which
        it is put on a record.
        """
        if asked:
            yield asked
            return
        level = selinux.new_level({*self._recorded(), *self._promised})
        self._promised.add(level)
        try:
            yield level
        finally:
            self._promised.discard(level)
