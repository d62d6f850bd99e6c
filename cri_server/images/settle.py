# SPDX-License-Identifier: Apache-2.0
"""What a layer takes from the layers below it, once they are there.

Layers are unpacked in whatever order they arrive, so `unpack` leaves two things open. A folder that
a layer has entries in, but does not itself contain, gets owner, mode, times and attributes of the
folder that it would hide. A hard link to a file that only a lower layer has becomes a copy of that
file. Nothing is mounted: a name is looked up layer by layer, from the top, as overlayfs does. Can
be repeated.
"""

import contextlib
import os
import shutil
import stat
from collections.abc import Iterator, Sequence

from cri_server import trees
from cri_server.images import attributes, layerdirs, tar
from shim import linux

_PLAIN = linux.RESOLVE_BENEATH | linux.RESOLVE_NO_SYMLINKS
_FOLDER = os.O_RDONLY | os.O_DIRECTORY


def settle(
    root: int,
    lowers: Sequence[str],
    *,
    folders: Sequence[str],
    links: Sequence[tuple[str, str]],
) -> trees.Usage:
    """Finish the layer behind `root`; `lowers` are the folders below it, the topmost first.

    Return what it takes more than before. Raises tar.Malformed for a hard link to nothing, OSError.
    """
    with contextlib.ExitStack() as each:
        below = [_open(path, each) for path in lowers]
        for path in folders:
            _adopt(root, path, below)
        copied: dict[str, str] = {}
        made = (_link(root, name, target, [*below, root], copied) for name, target in links)
        return sum(made, trees.Usage())


def adopt_root(root: int, lower: str) -> None:
    """Give the root of a layer that does not contain it the attributes of the one below."""
    settle(root, [lower], folders=[""], links=())


def _open(path: str, owner: contextlib.ExitStack) -> int:
    fd = os.open(path, os.O_PATH | os.O_DIRECTORY)
    owner.callback(os.close, fd)
    return fd


def _adopt(root: int, path: str, below: Sequence[int]) -> None:
    with _found(below, path) as source:
        if source is None or not stat.S_ISDIR(os.fstat(source).st_mode):
            return
        fd = linux.openat2(root, path or ".", _FOLDER, resolve=_PLAIN)
        try:
            st = os.fstat(source)
            os.fchown(fd, st.st_uid, st.st_gid)
            os.fchmod(fd, stat.S_IMODE(st.st_mode))
            attributes.set_xattrs(fd, _xattrs(source))
            os.utime(fd, ns=(st.st_atime_ns, st.st_mtime_ns))
        finally:
            os.close(fd)


def _link(
    root: int, name: str, target: str, where: Sequence[int], copied: dict[str, str]
) -> trees.Usage:
    made = trees.Usage()
    parent, _, base = name.rpartition("/")
    fd = linux.openat2(root, parent or ".", _FOLDER, resolve=layerdirs.IN_ROOT)
    try:
        times = os.fstat(fd)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(base, dir_fd=fd)
        if target in copied:  # two links to one file stay one file
            os.link(copied[target], base, src_dir_fd=root, dst_dir_fd=fd, follow_symlinks=False)
        else:
            with _found(where, target) as source:
                if source is None or stat.S_ISDIR(os.fstat(source).st_mode):
                    raise tar.Malformed(f"hard link {name[:200]!r} to nothing: {target[:200]!r}")
                made = _copy(source, fd, base)
            copied[target] = name
        os.utime(fd, ns=(times.st_atime_ns, times.st_mtime_ns))
        return made
    finally:
        os.close(fd)


def _copy(source: int, folder: int, name: str) -> trees.Usage:
    """Copy one thing that is no folder, with all that belongs to it; return what the copy takes."""
    st = os.fstat(source)
    if stat.S_ISREG(st.st_mode):
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        out = os.open(name, flags, 0o600, dir_fd=folder)
        with open(f"/proc/self/fd/{source}", "rb") as data, open(out, "wb") as copy:
            shutil.copyfileobj(data, copy, 1 << 20)
    elif stat.S_ISLNK(st.st_mode):
        os.symlink(os.readlink("", dir_fd=source), name, dir_fd=folder)
    else:
        os.mknod(name, st.st_mode, st.st_rdev, dir_fd=folder)
    os.chown(name, st.st_uid, st.st_gid, dir_fd=folder, follow_symlinks=False)
    if not stat.S_ISLNK(st.st_mode):
        os.chmod(name, stat.S_IMODE(st.st_mode), dir_fd=folder)
    attributes.set_xattrs(f"/proc/self/fd/{folder}/{name}", _xattrs(source))
    times = (st.st_atime_ns, st.st_mtime_ns)
    os.utime(name, ns=times, dir_fd=folder, follow_symlinks=False)
    size = st.st_size if stat.S_ISREG(st.st_mode) else 0
    return trees.Usage(bytes=trees.in_blocks(size), inodes=1)


def _xattrs(source: int) -> dict[str, bytes]:
    path = f"/proc/self/fd/{source}"
    return {n: os.getxattr(path, n) for n in os.listxattr(path) if attributes.wanted_xattr(n)}


@contextlib.contextmanager
def _found(layers: Sequence[int], path: str) -> Iterator[int | None]:
    """Look a name up in layers, the topmost first; give a descriptor (O_PATH) or None."""
    fd = None
    for layer in layers:
        fd, goes_on = _look(layer, path)
        if not goes_on:
            break
    try:
        yield fd
    finally:
        if fd is not None:
            os.close(fd)


def _look(layer: int, path: str) -> tuple[int | None, bool]:
    """Return what one layer has under a name, and whether the layers below it still count."""
    fd, hidden = os.dup(layer), False
    for part in path.split("/") if path else ():
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            os.close(fd)
            return None, False
        hidden = hidden or _is_opaque(fd)
        try:
            child = os.open(part, os.O_PATH | os.O_NOFOLLOW, dir_fd=fd)
        except FileNotFoundError:
            return None, not hidden
        finally:
            os.close(fd)
        fd = child
        if layerdirs.is_whiteout(os.fstat(fd)):
            os.close(fd)
            return None, False
    return fd, False


def _is_opaque(fd: int) -> bool:
    try:
        return os.getxattr(f"/proc/self/fd/{fd}", layerdirs.OPAQUE) == b"y"
    except OSError:
        return False
