# SPDX-License-Identifier: Apache-2.0
"""Programs as they are run from memory: copies that nobody can write to.

crun and youki protect their file on the host from what they run (CVE-2019-5736): each start makes
a copy of it, or a read-only mount, and runs itself again from there, unless it finds that it is
such a copy already: a memfd with all seals (containers/crun, cloned_binary.c: "to allow reuse";
youki's main.rs, pentacle). One such copy for all saves half of what a start of crun takes.

The server makes the copies; a shim gets one as a descriptor and runs it for as long as the file is
the one that was copied, so that an update of the program counts for its next call.
"""

import contextlib
import fcntl
import os

_EXECUTABLE = 0x10  # MFD_EXEC: asked for since Linux 6.3, unknown before
_SELINUX = "/sys/fs/selinux/enforce"  # a policy knows programs by their files' labels


def identity(path: str) -> str:
    """Return what tells one state of a file from another, "" for a file that is not there."""
    try:
        found = os.stat(path)
    except OSError:
        return ""
    return f"{found.st_dev}:{found.st_ino}:{found.st_size}:{found.st_mtime_ns}:{found.st_ctime_ns}"


def copy(path: str) -> int:
    """Return the descriptor of a sealed copy, -1 where there can be none: no machine code (a script
    is read by its interpreter, which has no descriptor), SELinux, a kernel that refuses. Blocks for
    the read of the file.
    """
    if os.path.exists(_SELINUX):
        return -1
    try:
        with open(path, "rb") as file:
            return _sealed(os.path.basename(path), file.read())
    except OSError:
        return -1


def _sealed(name: str, program: bytes) -> int:
    if not program.startswith(b"\x7fELF"):
        return -1
    fd = _create(name)
    with contextlib.ExitStack() as undo:
        undo.callback(os.close, fd)
        view = memoryview(program)
        while view:
            view = view[os.write(fd, view) :]
        seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        if not os.access(f"/proc/self/fd/{fd}", os.X_OK):  # vm.memfd_noexec
            return -1
        undo.pop_all()
    return fd


def _create(name: str) -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return os.memfd_create(name, flags | _EXECUTABLE)
    except OSError:
        return os.memfd_create(name, flags)
