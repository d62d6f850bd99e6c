# SPDX-License-Identifier: Apache-2.0
"""Give files an SELinux label, as a mount with selinux_relabel asks.

A volume is labelled as a whole: what is in it first, itself last, so that one which was cut short
does not look finished. No symlink is followed, in the way to it or in it, as its content may belong
to a container (CVE-2021-25741), and no mount in it is entered. The system's own folders are
refused: with another label the host would not work (CVE-2021-43816). Repeating it is harmless, and
touches only what has another label.

Functions block for as long as the volume is large.
"""

import errno
import os
import re

import structlog

from cri_server import errors, trees
from shim import linux

log = structlog.get_logger()
ATTRIBUTE = "security.selinux"
# Refused with all that lies below them; and refused themselves.
_WHOLE = re.compile(r"/(bin|boot|dev|etc|lib|lib32|lib64|libx32|proc|sbin|sys|usr)(/.*)?", re.S)
_ALONE = re.compile(
    r"/|/(home|media|mnt|opt|root|run|srv|tmp|var)|/home/[^/]*|/var/(cache|lib|log|spool|tmp)"
)


def check(path: str) -> None:
    """Refuse a path of the system's own; it is absolute and without symlinks."""
    if _WHOLE.fullmatch(path) or _ALONE.fullmatch(path):
        raise errors.InvalidArgument(
            f"selinux_relabel: {path[:200]!r} belongs to the system and keeps its label"
        )


def relabel(path: str, label: str) -> bool:
    """Label a file, or a folder with all that is in it; False if its file system takes no labels.

    Raises InvalidArgument as `check` does, for a path with a symlink in it, and for what cannot be
    labelled.
    """
    check(path)
    value = label.encode()
    try:
        fd = linux.openat2(
            linux.AT_FDCWD, path, os.O_PATH | os.O_CLOEXEC, resolve=linux.RESOLVE_NO_SYMLINKS
        )
        try:
            here = f"/proc/self/fd/{fd}"
            if os.path.isdir(here):
                _label_content(here, value)
            _set(here, value, follow=True)
        finally:
            os.close(fd)
    except OSError as e:
        if e.errno == errno.EOPNOTSUPP:
            log.info("no labels on this file system", path=path)
            return False
        raise errors.InvalidArgument(f"selinux_relabel: {path[:200]!r}: {e.strerror}") from e
    return True


def once(path: str, label: str) -> None:
    """Label a folder of ours, unless its own label says that this is done; what is made in it later
    inherits the label.

    What cannot be labelled is logged: a policy may keep containers from reading it.
    """
    try:
        if _get(path, follow=False) == label.encode():
            return
    except OSError:
        pass  # relabel says what there is to say
    try:
        relabel(path, label)
    except errors.InvalidArgument as e:
        log.warning("folder keeps its label", path=path, wanted=label, error=str(e))


def _label_content(folder: str, value: bytes) -> None:
    for step in trees.walk(f"{folder}/.", mounts="skip"):
        for name in step.names if step.left is None else (step.left,):
            _set(f"/proc/self/fd/{step.fd}/{name}", value)


def _set(path: str, value: bytes, *, follow: bool = False) -> None:
    """Set the label unless it is there; what vanishes meanwhile needs none."""
    try:
        if _get(path, follow=follow) != value:
            os.setxattr(path, ATTRIBUTE, value, follow_symlinks=follow)
    except FileNotFoundError:
        return


def _get(path: str, *, follow: bool) -> bytes:
    try:
        return os.getxattr(path, ATTRIBUTE, follow_symlinks=follow).rstrip(b"\0")
    except OSError as e:
        if e.errno != errno.ENODATA:
            raise
        return b""
