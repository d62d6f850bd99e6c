# SPDX-License-Identifier: Apache-2.0
"""The folders of a layer that is being unpacked: found by name, made where they are missing.

A name is resolved with openat2(RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS) below the layer's root,
which is all that a symlink in it can reach. What is known of a folder is kept by inode, for names
change their meaning while later entries replace earlier ones. Nobody else has the layer yet, so
nothing races.
"""

import os
import stat
from collections import OrderedDict
from dataclasses import dataclass, field

from cri_server.images import tar
from shim import linux

IN_ROOT = linux.RESOLVE_IN_ROOT | linux.RESOLVE_NO_MAGICLINKS
OPAQUE = "trusted.overlay.opaque"
FOLDER = os.O_RDONLY | os.O_DIRECTORY
_OPEN_FOLDERS = 64
_MAX_LINKS = 40  # symlinks on one path, as in the kernel


def is_whiteout(st: os.stat_result) -> bool:
    """Say whether overlayfs takes this for "there is nothing here"."""
    return stat.S_ISCHR(st.st_mode) and st.st_rdev == 0


def lstat(parent: int, name: str) -> os.stat_result | None:
    try:
        return os.lstat(name, dir_fd=parent)
    except FileNotFoundError:
        return None


@dataclass(slots=True)
class Seen:
    """What is known of the folders of a layer, by inode: names can change their meaning."""

    mtimes: dict[int, int] = field(default_factory=dict)
    implicit: set[int] = field(default_factory=set)
    opaque: set[int] = field(default_factory=set)
    # Hard links that wait for the layers below: name in the folder ─► target
    links: dict[int, dict[str, str]] = field(default_factory=dict)

    def forget(self, inode: int) -> None:
        self.mtimes.pop(inode, None)
        self.implicit.discard(inode)
        self.opaque.discard(inode)
        self.links.pop(inode, None)

    def waiting(self, folder: int, name: str) -> str | None:
        """Return the target of the link that waits under a name; most layers have none."""
        return self.links.get(os.fstat(folder).st_ino, {}).get(name) if self.links else None

    def untie(self, folder: int, name: str) -> None:
        """Forget the link that waits under a name: another entry takes it."""
        if self.links:
            self.links.get(os.fstat(folder).st_ino, {}).pop(name, None)


class Folders:
    """Open folders by name, made where they are missing; the last few stay open."""

    def __init__(self, root: int, seen: Seen) -> None:
        self._root, self._seen = root, seen
        self._open: OrderedDict[str, int] = OrderedDict()

    def open(self, path: str, *, links: int = 0) -> int:
        """Return a descriptor of a folder, which stays ours. Raises tar.Malformed, OSError."""
        if not path:
            return self._root
        fd = self._open.get(path)
        if fd is None:
            fd = self._keep(path, self._resolve(path, links))
        return fd

    def find(self, path: str) -> int:
        """Return a descriptor of a folder that is there, which is the caller's. Raises OSError."""
        return linux.openat2(self._root, path or ".", FOLDER, resolve=IN_ROOT)

    def make(self, parent: int, path: str, name: str, mode: int) -> int:
        """Make or find the folder `name` of `parent`; what is no folder gives way."""
        self._seen.untie(parent, name)
        try:
            os.mkdir(name, mode & 0o777, dir_fd=parent)
        except FileExistsError:
            st = os.lstat(name, dir_fd=parent)
            if not stat.S_ISDIR(st.st_mode):
                parent = os.dup(parent)  # `close` is about to take it away
                try:
                    self.close()
                    os.unlink(name, dir_fd=parent)
                    os.mkdir(name, mode & 0o777, dir_fd=parent)
                    fd = os.open(name, FOLDER | os.O_NOFOLLOW, dir_fd=parent)
                finally:
                    os.close(parent)
                if is_whiteout(st):
                    self.mark_opaque(fd)
                return self._keep(path, fd)
        return self._keep(path, os.open(name, FOLDER | os.O_NOFOLLOW, dir_fd=parent))

    def mark_opaque(self, fd: int) -> None:
        """Hide what the layers below have in this folder."""
        os.setxattr(fd, OPAQUE, b"y")
        self._seen.opaque.add(os.fstat(fd).st_ino)

    def mark_opaque_child(self, parent: int, name: str) -> None:
        fd = os.open(name, FOLDER | os.O_NOFOLLOW, dir_fd=parent)
        try:
            self.mark_opaque(fd)
        finally:
            os.close(fd)

    def close(self) -> None:
        """Forget all names."""
        while self._open:
            os.close(self._open.popitem()[1])

    def _keep(self, path: str, fd: int) -> int:
        old = self._open.pop(path, None)
        if old is not None:
            os.close(old)
        self._open[path] = fd
        if len(self._open) > _OPEN_FOLDERS:
            os.close(self._open.popitem(last=False)[1])
        return fd

    def _resolve(self, path: str, links: int) -> int:
        try:
            return self.find(path)
        except (FileNotFoundError, NotADirectoryError):
            return self._make_all(path, links)

    def _make_all(self, path: str, links: int) -> int:
        """Make what is missing of a path; follow a symlink to what is not there yet."""
        parent, parts = os.dup(self._root), path.split("/")
        for depth, name in enumerate(parts, start=1):
            prefix = "/".join(parts[:depth])
            try:
                child = self.find(prefix)
            except (FileNotFoundError, NotADirectoryError):
                child = self._make_implicit(parent, name, prefix, links)
            finally:
                os.close(parent)
            parent = child
        return parent

    def _make_implicit(self, parent: int, name: str, path: str, links: int) -> int:
        st = lstat(parent, name)
        if st is not None and stat.S_ISLNK(st.st_mode):
            return self._behind(parent, name, path, links)
        waits = self._seen.waiting(parent, name) is not None
        if waits or (st is not None and not is_whiteout(st)):
            raise tar.Malformed(f"{path[:200]!r} is not a folder")
        if st is not None:
            os.unlink(name, dir_fd=parent)
        os.mkdir(name, 0o755, dir_fd=parent)
        fd = os.open(name, FOLDER | os.O_NOFOLLOW, dir_fd=parent)
        os.fchown(fd, 0, 0)  # a set-gid parent passes on group and bit
        os.fchmod(fd, 0o755)
        self._seen.implicit.add(os.fstat(fd).st_ino)
        if st is not None:  # the whiteout still hides what lies below
            self.mark_opaque(fd)
        return fd

    def _behind(self, parent: int, name: str, path: str, links: int) -> int:
        """Make the folder that a dangling symlink points to, within the layer."""
        if links >= _MAX_LINKS:
            raise tar.Malformed(f"too many symlinks on the way to {path[:200]!r}")
        target = os.readlink(name, dir_fd=parent)
        base = "" if target.startswith("/") else path.rpartition("/")[0]
        found: list[str] = []
        for part in f"{base}/{target}".split("/"):
            if part == "..":
                found = found[:-1]
            elif part not in ("", "."):
                found.append(part)
        return os.dup(self.open("/".join(found), links=links + 1))
