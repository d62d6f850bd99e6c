# SPDX-License-Identifier: Apache-2.0
"""The VOLUMEs of an image: folders of the container's own, filled with what the image has there.

    <root>/writable/<container id>/volumes/<n>      beside the writable layer: measured and removed
                                                    with it, on the same file system

A volume is writable also where the root is not, and no overlay, so that databases and other
container engines can live in it. What is copied comes from the container's own mounted root, by a
path that has no symlink in it any more; symlinks below it are copied, never followed
(CVE-2022-23648). Only a fresh folder is ever filled (CVE-2020-1726). All functions block, and the
container does not run yet: nothing else changes the root. A crash leaves a container that is not
complete, which recovery removes with these folders.
"""

import errno
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cri_server import rootfs, trees
from cri_server.images import attributes
from shim import linux

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_RESOLVE = linux.RESOLVE_IN_ROOT | linux.RESOLVE_NO_SYMLINKS | linux.RESOLVE_NO_XDEV
_AT_ONCE = 1 << 30  # bytes for one sendfile(2)


def make(
    root: str,
    paths: Iterable[str],
    folder: Path,
    *,
    covered: Iterable[str],
    owner: tuple[int, int] = rootfs.ROOT,
) -> dict[str, str]:
    """Make a folder below `folder` for each of `paths`; return them by their place in the root.

    What lies at or below one of `covered`, the targets of the container's mounts, gets none. What
    the image does not have belongs to `owner`, as in `rootfs`. Raises
    InvalidArgument for a path that is no folder, OSError.
    """
    found: dict[str, str] = {}
    for target in rootfs.make_volumes(root, paths, covered=tuple(covered), owner=owner):
        folder.mkdir(mode=0o700, exist_ok=True)
        place = folder / str(len(found))
        _copy(root, target, place)
        found[target] = os.fspath(place)
    return found


def _copy(root: str, path: str, into: Path) -> None:
    into.mkdir(mode=0o700)
    top = os.open(root, os.O_PATH | os.O_DIRECTORY)
    try:
        source = linux.openat2(top, path, _FOLDER, resolve=_RESOLVE)
    finally:
        os.close(top)
    try:
        _Copy(into).run(source)
    finally:
        os.close(source)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Attributes:
    """What a file has beside its content."""

    st: os.stat_result
    xattrs: Mapping[str, bytes]

    @classmethod
    def of(cls, fd: int) -> "_Attributes":
        return cls(st=os.fstat(fd), xattrs=_xattrs(fd))

    def set(self, fd: int) -> None:
        """Set owner, then mode, then attributes: chown takes set-id bits and capabilities away."""
        os.fchown(fd, self.st.st_uid, self.st.st_gid)
        os.fchmod(fd, stat.S_IMODE(self.st.st_mode))
        attributes.set_xattrs(fd, self.xattrs)
        os.utime(fd, ns=(self.st.st_atime_ns, self.st.st_mtime_ns))


def _xattrs(fd: int) -> dict[str, bytes]:
    try:
        return {name: os.getxattr(fd, name) for name in os.listxattr(fd)}
    except OSError as e:
        if e.errno != errno.ENOTSUP:
            raise
        return {}


class _Copy:
    """One copy, of any depth: it holds two descriptors of the target, the top and where it is.

    A folder gets its attributes when it is full: what its contents would inherit, a group or an
    ACL, is not there yet.
    """

    def __init__(self, into: Path) -> None:
        self._top = os.open(into, _FOLDER)
        self._here = os.dup(self._top)
        self._open: list[_Attributes] = []
        self._links: dict[tuple[int, int], str] = {}

    def run(self, source: int) -> None:
        """Copy what is in `source` into the top, and its attributes; only once."""
        try:
            for step in trees.walk(f"/proc/self/fd/{source}/."):
                if step.left is None:
                    self._enter(step)
                else:
                    self._leave()
            self._open.pop().set(self._top)
        finally:
            os.close(self._here)
            os.close(self._top)

    def _enter(self, step: trees.Step) -> None:
        if step.path:
            os.mkdir(step.path[-1], 0o700, dir_fd=self._here)
            self._move(step.path[-1])
        self._open.append(_Attributes.of(step.fd))
        for name in step.names:
            self._entry(step, name)

    def _leave(self) -> None:
        self._open.pop().set(self._here)
        self._move("..")

    def _move(self, name: str) -> None:
        there = os.open(name, _FOLDER, dir_fd=self._here)
        os.close(self._here)
        self._here = there

    def _entry(self, step: trees.Step, name: str) -> None:
        st = os.lstat(name, dir_fd=step.fd)
        if st.st_nlink > 1 and self._linked(st, step, name):
            return
        if stat.S_ISREG(st.st_mode):
            self._file(step.fd, name)
            return
        if stat.S_ISLNK(st.st_mode):
            os.symlink(os.readlink(name, dir_fd=step.fd), name, dir_fd=self._here)
        else:
            os.mknod(name, st.st_mode, st.st_rdev, dir_fd=self._here)
        os.chown(name, st.st_uid, st.st_gid, dir_fd=self._here, follow_symlinks=False)
        if not stat.S_ISLNK(st.st_mode):
            os.chmod(name, stat.S_IMODE(st.st_mode), dir_fd=self._here)
        times = (st.st_atime_ns, st.st_mtime_ns)
        os.utime(name, ns=times, dir_fd=self._here, follow_symlinks=False)

    def _linked(self, st: os.stat_result, step: trees.Step, name: str) -> bool:
        """Make a hard link to what was copied already; say whether that was possible."""
        path = "/".join((*step.path, name))
        first = self._links.setdefault((st.st_dev, st.st_ino), path)
        if first == path:
            return False
        try:
            os.link(first, name, src_dir_fd=self._top, dst_dir_fd=self._here, follow_symlinks=False)
        except OSError as e:
            if e.errno not in (errno.ENAMETOOLONG, errno.EMLINK):
                raise
            return False
        return True

    def _file(self, source: int, name: str) -> None:
        old = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=source)
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
            new = os.open(name, flags, 0o600, dir_fd=self._here)
            try:
                while os.sendfile(new, old, None, _AT_ONCE):
                    pass
                _Attributes.of(old).set(new)
            finally:
                os.close(new)
        finally:
            os.close(old)
