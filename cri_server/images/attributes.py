# SPDX-License-Identifier: Apache-2.0
"""Owner, mode and extended attributes: what a layer may set, in the order that keeps all of it.

chown(2) takes set-id bits and capabilities away, so the owner comes first. Labels belong to the
host, and overlayfs's own attributes to us: neither may come from a layer.
"""

import errno
import os
import stat
from collections.abc import Mapping

from cri_server.images import tar

_NOBODY = 2**32 - 1  # chown(2): "leave it as it is"


def wanted_xattr(name: str) -> bool:
    """Say whether an attribute may come from a layer: labels are the host's, overlay's own are
    ours."""
    host = ("security.selinux", "security.apparmor", "security.SMACK64", "security.evm")
    return not name.startswith((*host, "trusted.overlay.", "user.overlay."))


def set_xattrs(path: str | int, xattrs: Mapping[str, bytes]) -> set[str]:
    """Set what may be set; return the names that the file system or the kernel does not take.

    They do not make a layer unusable, but a program may miss its capabilities: say so.
    """
    dropped: set[str] = set()
    for name, value in xattrs.items():
        if wanted_xattr(name):
            try:
                if isinstance(path, int):
                    os.setxattr(path, name, value)
                else:
                    os.setxattr(path, name, value, follow_symlinks=False)
            except OSError as e:
                if e.errno not in (errno.ENOTSUP, errno.EPERM, errno.EINVAL):
                    raise
                dropped.add(name)
    return dropped


def check(entry: tar.Entry) -> None:
    if not (0 <= entry.uid < _NOBODY and 0 <= entry.gid < _NOBODY):
        raise tar.Malformed(f"owner {entry.uid}:{entry.gid} is not one")


def set_all(fd: int, entry: tar.Entry) -> set[str]:
    """Set owner, then mode, then attributes: chown takes set-id bits and capabilities away.

    Return the names of attributes that could not be set.
    """
    st = os.fstat(fd)
    if (st.st_uid, st.st_gid) != (entry.uid, entry.gid):
        os.fchown(fd, entry.uid, entry.gid)
        st = os.fstat(fd)
    if stat.S_IMODE(st.st_mode) != entry.mode:
        os.fchmod(fd, entry.mode)
    return set_xattrs(fd, entry.xattrs)
