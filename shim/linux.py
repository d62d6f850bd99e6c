# SPDX-License-Identifier: Apache-2.0
"""System calls that the standard library does not have: the only ctypes in the repository.

One typed function per call, constants by their C names, every failure an `OSError` with errno and,
where there is one, the path. Nothing here remembers anything, so there is nothing to lose in a
crash. What a mount, a namespace or a capability is *for* is decided by the callers. The numbers of
the newer calls are the same on every architecture (asm-generic/unistd.h); glibc of Debian 12 wraps
some of them and not others, so all of them are called by number.
"""

import ctypes
import os

# mount(2)
MS_RDONLY = 0x1
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOEXEC = 0x8
MS_SYNCHRONOUS = 0x10
MS_REMOUNT = 0x20
MS_MANDLOCK = 0x40
MS_DIRSYNC = 0x80
MS_NOSYMFOLLOW = 0x100
MS_NOATIME = 0x400
MS_NODIRATIME = 0x800
MS_BIND = 0x1000
MS_MOVE = 0x2000
MS_REC = 0x4000
MS_SILENT = 0x8000
MS_UNBINDABLE = 0x20000
MS_PRIVATE = 0x40000
MS_SLAVE = 0x80000
MS_SHARED = 0x100000
MS_RELATIME = 0x200000
MS_STRICTATIME = 0x1000000
MS_LAZYTIME = 0x2000000

# umount2(2)
MNT_FORCE = 0x1
MNT_DETACH = 0x2
MNT_EXPIRE = 0x4
UMOUNT_NOFOLLOW = 0x8

# unshare(2), setns(2)
CLONE_NEWTIME = 0x80
CLONE_FS = 0x200
CLONE_FILES = 0x400
CLONE_NEWNS = 0x20000
CLONE_NEWCGROUP = 0x2000000
CLONE_NEWUTS = 0x4000000
CLONE_NEWIPC = 0x8000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

# openat2(2)
RESOLVE_NO_XDEV = 0x1
RESOLVE_NO_MAGICLINKS = 0x2
RESOLVE_NO_SYMLINKS = 0x4
RESOLVE_BENEATH = 0x8
RESOLVE_IN_ROOT = 0x10
RESOLVE_CACHED = 0x20

# the *at family
AT_FDCWD = -100
AT_SYMLINK_NOFOLLOW = 0x100
AT_NO_AUTOMOUNT = 0x800
AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000

# open_tree(2), move_mount(2)
OPEN_TREE_CLONE = 0x1
OPEN_TREE_CLOEXEC = os.O_CLOEXEC
MOVE_MOUNT_F_SYMLINKS = 0x1
MOVE_MOUNT_F_EMPTY_PATH = 0x4
MOVE_MOUNT_T_SYMLINKS = 0x10
MOVE_MOUNT_T_EMPTY_PATH = 0x40

# fsopen(2), fsconfig(2), fsmount(2), fspick(2)
FSOPEN_CLOEXEC = 0x1
FSCONFIG_SET_FLAG = 0
FSCONFIG_SET_STRING = 1
FSCONFIG_SET_BINARY = 2
FSCONFIG_SET_PATH = 3
FSCONFIG_SET_FD = 5
FSCONFIG_CMD_CREATE = 6
FSCONFIG_CMD_RECONFIGURE = 7
FSMOUNT_CLOEXEC = 0x1
FSPICK_CLOEXEC = 0x1
FSPICK_NO_AUTOMOUNT = 0x4
FSPICK_EMPTY_PATH = 0x8

# mount_setattr(2)
MOUNT_ATTR_RDONLY = 0x1
MOUNT_ATTR_NOSUID = 0x2
MOUNT_ATTR_NODEV = 0x4
MOUNT_ATTR_NOEXEC = 0x8
MOUNT_ATTR__ATIME = 0x70
MOUNT_ATTR_RELATIME = 0x0
MOUNT_ATTR_NOATIME = 0x10
MOUNT_ATTR_STRICTATIME = 0x20
MOUNT_ATTR_NODIRATIME = 0x80
MOUNT_ATTR_IDMAP = 0x100000
MOUNT_ATTR_NOSYMFOLLOW = 0x200000

# prctl(2)
PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15
PR_CAPBSET_READ = 23
PR_SET_CHILD_SUBREAPER = 36

# inotify(7)
IN_MODIFY = 0x2
IN_CLOSE_WRITE = 0x8
IN_MOVED_FROM = 0x40
IN_MOVED_TO = 0x80
IN_CREATE = 0x100
IN_DELETE = 0x200
IN_Q_OVERFLOW = 0x4000
IN_IGNORED = 0x8000
IN_ONLYDIR = 0x1000000

# close_range(2)
CLOSE_RANGE_UNSHARE = 0x2
CLOSE_RANGE_CLOEXEC = 0x4

# capabilities(7): the ones that somebody here asks about
CAP_NET_ADMIN = 12
CAP_SYS_PTRACE = 19
CAP_SYS_RESOURCE = 24
CAP_BPF = 39

_LINUX_CAPABILITY_VERSION_3 = 0x20080522


_NR_OPEN_TREE = 428
_NR_MOVE_MOUNT = 429
_NR_FSOPEN = 430
_NR_FSCONFIG = 431
_NR_FSMOUNT = 432
_NR_FSPICK = 433
_NR_CLOSE_RANGE = 436
_NR_OPENAT2 = 437
_NR_MOUNT_SETATTR = 442

_libc = ctypes.CDLL(None, use_errno=True)
_python = ctypes.PyDLL(None, use_errno=True)  # keeps the interpreter lock, as `fork` must
_libc.syscall.restype = ctypes.c_long
_libc.mount.argtypes = (
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_ulong,
    ctypes.c_char_p,
)
_libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)
_libc.unshare.argtypes = (ctypes.c_int,)
_libc.setns.argtypes = (ctypes.c_int, ctypes.c_int)
_libc.prctl.argtypes = (ctypes.c_int, *(ctypes.c_ulong,) * 4)
_libc.syncfs.argtypes = (ctypes.c_int,)
_libc.sethostname.argtypes = (ctypes.c_char_p, ctypes.c_size_t)
_libc.capget.argtypes = (ctypes.c_void_p, ctypes.c_void_p)


class _OpenHow(ctypes.Structure):
    _fields_ = (
        ("flags", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("resolve", ctypes.c_uint64),
    )


class _MountAttr(ctypes.Structure):
    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


class _CapHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _CapData(ctypes.Structure):
    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


# ---- mounts, the old way


def mount(
    source: str | None,
    target: str | os.PathLike[str],
    fstype: str | None = None,
    flags: int = 0,
    data: str | None = None,
) -> None:
    """Mount as mount(2) does; `data` is limited to one page by the kernel."""
    result = _libc.mount(_bytes(source), os.fsencode(target), _bytes(fstype), flags, _bytes(data))
    _check(result, os.fspath(target))


def umount2(target: str | os.PathLike[str], flags: int = 0) -> None:
    """Unmount the topmost mount at `target`."""
    _check(_libc.umount2(os.fsencode(target), flags), os.fspath(target))


# ---- mounts, the new way


def open_tree(dirfd: int, path: str, flags: int) -> int:
    """Return a descriptor of a mount, or with OPEN_TREE_CLONE of a detached copy of it."""
    return _syscall(_NR_OPEN_TREE, dirfd, path.encode(), flags | OPEN_TREE_CLOEXEC, path=path)


def move_mount(from_dirfd: int, from_path: str, to_dirfd: int, to_path: str, flags: int) -> None:
    """Attach a detached mount, or move an attached one."""
    source, target = from_path.encode(), os.fsencode(to_path)
    _syscall(_NR_MOVE_MOUNT, from_dirfd, source, to_dirfd, target, flags, path=to_path)


def mount_setattr(
    dirfd: int,
    path: str,
    flags: int,
    *,
    attr_set: int = 0,
    attr_clr: int = 0,
    propagation: int = 0,
    userns_fd: int = 0,
) -> None:
    """Change flags, propagation or the id mapping of a mount; AT_RECURSIVE in `flags` for the tree.

    With MOUNT_ATTR_IDMAP in `attr_set` the mount must be detached (open_tree with OPEN_TREE_CLONE).
    """
    attr = _MountAttr(attr_set, attr_clr, propagation, userns_fd)
    size = ctypes.sizeof(attr)
    encoded = os.fsencode(path)
    _syscall(_NR_MOUNT_SETATTR, dirfd, encoded, flags, ctypes.byref(attr), size, path=path)


def fsopen(fstype: str) -> int:
    """Return a descriptor of a new file system context."""
    return _syscall(_NR_FSOPEN, fstype.encode(), FSOPEN_CLOEXEC, path=fstype)


def fsconfig_string(fd: int, key: str, value: str) -> None:
    """Set an option; the kernel takes at most 255 bytes."""
    _fsconfig(fd, FSCONFIG_SET_STRING, key, os.fsencode(value), 0)


def fsconfig_flag(fd: int, key: str) -> None:
    """Set an option that has no value."""
    _fsconfig(fd, FSCONFIG_SET_FLAG, key, None, 0)


def fsconfig_create(fd: int) -> None:
    """Make the superblock."""
    _fsconfig(fd, FSCONFIG_CMD_CREATE, None, None, 0)


def fsconfig_reconfigure(fd: int) -> None:
    """Apply the options to the superblock that `fspick` chose."""
    _fsconfig(fd, FSCONFIG_CMD_RECONFIGURE, None, None, 0)


def fsmount(fd: int, attributes: int = 0) -> int:
    """Return a descriptor of a detached mount (MOUNT_ATTR_*) of a created context."""
    return _syscall(_NR_FSMOUNT, fd, FSMOUNT_CLOEXEC, attributes)


def fspick(dirfd: int, path: str, flags: int = 0) -> int:
    """Return a context of the file system mounted at `path`, for `fsconfig_reconfigure`."""
    return _syscall(_NR_FSPICK, dirfd, os.fsencode(path), flags | FSPICK_CLOEXEC, path=path)


def _fsconfig(fd: int, command: int, key: str | None, value: bytes | None, aux: int) -> None:
    try:
        _syscall(_NR_FSCONFIG, fd, command, _bytes(key), value, aux)
    except OSError as error:
        # The context keeps a log; its last line says which option was wrong, which errno cannot.
        code = error.errno or 0
        detail = _last_message(fd) or f"{os.strerror(code)} ({key or 'create'})"
        raise OSError(code, detail) from None


def _last_message(fd: int) -> str:
    last = b""
    try:
        while message := os.read(fd, 4096):
            last = message
    except OSError:
        pass
    return last[2:].decode(errors="replace").strip()


# ---- namespaces


def unshare(flags: int) -> None:
    """Leave the namespaces (CLONE_NEW*) of the parent for new ones."""
    _check(_libc.unshare(flags))


def setns(fd: int, flags: int = 0) -> None:
    """Enter the namespace of a /proc/<pid>/ns file, or with a pidfd those in `flags`."""
    _check(_libc.setns(fd, flags))


def sethostname(name: str) -> None:
    """Set the host name of this UTS namespace."""
    encoded = name.encode()
    _check(_libc.sethostname(encoded, len(encoded)))


# ---- this process


def fork() -> int:
    """Fork this process, which must have one thread; 0 in the child.

    Not `os.fork`: what Python does in a child (locks anew, hooks, threading) is for processes with
    threads, and touches 0.6 MB of memory that parent and child would go on sharing otherwise.
    """
    return _check(_python.fork())


def prctl_set_child_subreaper(*, on: bool = True) -> None:
    """Become the parent of every orphan among our descendants, or no longer; not inherited by
    fork.
    """
    _check(_libc.prctl(PR_SET_CHILD_SUBREAPER, int(on), 0, 0, 0))


def prctl_set_name(name: str) -> None:
    """Set the name that ps shows; the kernel keeps 15 bytes."""
    buffer = ctypes.create_string_buffer(name.encode()[:15])
    _check(_libc.prctl(PR_SET_NAME, ctypes.addressof(buffer), 0, 0, 0))


def set_pdeathsig(signal: int) -> None:
    """Ask for this signal when the *thread* that made this process ends."""
    _check(_libc.prctl(PR_SET_PDEATHSIG, signal, 0, 0, 0))


def effective_capabilities() -> int:
    """Return the effective set of this thread, one bit per capability number."""
    header = _CapHeader(_LINUX_CAPABILITY_VERSION_3, 0)
    data = (_CapData * 2)()
    _check(_libc.capget(ctypes.byref(header), ctypes.byref(data)))
    return int(data[0].effective) | int(data[1].effective) << 32


def bounding_capabilities() -> int:
    """Return the bounding set of this thread, one bit per capability that the kernel knows."""
    bits = number = 0
    while (present := _libc.prctl(PR_CAPBSET_READ, number, 0, 0, 0)) >= 0:
        bits |= present << number
        number += 1
    return bits


# ---- files


def openat2(dirfd: int, path: str, flags: int, *, mode: int = 0, resolve: int = 0) -> int:
    """Open as openat2(2) does, always close-on-exec. ELOOP, EXDEV: `resolve` forbade the path.

    EAGAIN, which RESOLVE_IN_ROOT and RESOLVE_BENEATH give when somebody renames below them, is
    tried again.
    """
    how = _OpenHow(flags | os.O_CLOEXEC, mode, resolve)
    encoded, size = os.fsencode(path), ctypes.sizeof(how)
    for _ in range(32):
        try:
            return _syscall(_NR_OPENAT2, dirfd, encoded, ctypes.byref(how), size, path=path)
        except BlockingIOError:
            continue
    return _syscall(_NR_OPENAT2, dirfd, encoded, ctypes.byref(how), size, path=path)


def syncfs(fd: int) -> None:
    """Write the whole file system of `fd` to its device."""
    _check(_libc.syncfs(fd))


def inotify_init() -> int:
    """Return an inotify instance that does not block; the kernel has 128 of them for a user."""
    return _check(_libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))


def inotify_add_watch(fd: int, path: str, mask: int) -> int:
    """Watch a path and return the watch's number."""
    return _check(_libc.inotify_add_watch(fd, path.encode(), ctypes.c_uint32(mask)), path)


def close_range(first: int, last: int = 0xFFFFFFFF, flags: int = 0) -> None:
    """Close every descriptor from `first` to `last`, both included."""
    unsigned = ctypes.c_uint
    _syscall(_NR_CLOSE_RANGE, unsigned(first), unsigned(last), unsigned(flags))


# ---- shared


def _syscall(number: int, *arguments: object, path: str | None = None) -> int:
    converted = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return _check(_libc.syscall(ctypes.c_long(number), *converted), path)


def _check(result: int, path: str | None = None) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), path)
    return result


def _bytes(value: str | None) -> bytes | None:
    return None if value is None else os.fsencode(value)
