# SPDX-License-Identifier: Apache-2.0
"""One layer's tar, applied to its own empty folder.

Runs in a worker process. Every name is resolved with openat2(RESOLVE_IN_ROOT |
RESOLVE_NO_MAGICLINKS) below the folder, and its last part is never followed, so a symlink in a
layer leads nowhere but into that layer. The folder is nobody else's until it is committed: a crash
leaves a folder below tmp/.

What overlayfs wants differs from what the tar says (OCI image-spec, layer.md, "Whiteouts"):

    .wh.NAME        a character device 0:0 called NAME; if this layer has a folder NAME too, in
                    whatever order they come, that folder is opaque instead: whiteouts hide only
                    what lies below the layer
    .wh..wh..opq    trusted.overlay.opaque=y on the folder; on the root it is told to the caller,
                    because overlayfs does not look for it there

What needs the layers below is left to `settle`: folders that the layer has things in, but not
itself, and hard links to files that it does not have.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cri_server import trees
from cri_server.images import attributes, layerdirs, tar

_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What came of a layer. `folders` and `links` (name, target) wait for the layers below;
    `dropped` are names of attributes that some file should have had."""

    usage: trees.Usage
    opaque_root: bool
    folders: tuple[str, ...]
    links: tuple[tuple[str, str], ...]
    dropped: frozenset[str]


def clean(name: str) -> str:
    """Return a name of the archive relative to the root, "" for the root. Raises tar.Malformed for
    "..".

    No tool that writes layers puts ".." into a name, so it is refused and not interpreted.
    """
    parts = [p for p in name.split("/") if p and p != "."]
    if ".." in parts:
        raise tar.Malformed(f"the name {name[:200]!r} leaves the layer")
    return "/".join(parts)


class Unpacker:
    """Applies entries to the folder behind a descriptor, which stays the caller's."""

    def __init__(self, root: int, limits: tar.Limits) -> None:
        self._root, self._limits = root, limits
        self._seen = layerdirs.Seen()
        self._folders = layerdirs.Folders(root, self._seen)
        self._dropped: set[str] = set()
        self._bytes = self._inodes = self._entries = 0
        self._seen.implicit.add(os.fstat(root).st_ino)

    def apply(self, reader: tar.Reader) -> Outcome:
        """Apply a whole archive. Raises tar.Malformed, tar.TooBig, OSError."""
        with contextlib.closing(self._folders):
            for entry in reader:
                self._entries += 1
                if self._entries > self._limits.entries or entry.size > self._limits.bytes:
                    raise tar.TooBig("the layer has too many entries, or one that is too large")
                try:
                    self._one(entry, reader)
                except (tar.Malformed, OSError) as e:
                    raise _naming(entry, e) from e
            return self._finish()

    def _one(self, entry: tar.Entry, reader: tar.Reader) -> None:
        path = clean(entry.name)
        parent, _, name = path.rpartition("/")
        if ".wh." in path and _is_marker(parent):
            return
        if not path:
            self._set_root(entry)
        elif name.startswith(".wh."):
            self._whiteout(parent, name)
        elif entry.kind is tar.Kind.LINK:
            self._link(path, clean(entry.target))
        elif entry.kind is tar.Kind.DIR:
            self._folder(path, entry)
        else:
            folder = self._folders.open(parent)
            self._anew(folder, name, lambda fd: self._node(fd, name, entry, reader))
            self._inodes += 1

    # ---- what is not a folder

    def _anew(self, folder: int, name: str, make: Callable[[int], None]) -> None:
        """Make something, in place of what an earlier entry put there."""
        self._seen.untie(folder, name)
        try:
            make(folder)
        except FileExistsError:
            with _duplicate(folder) as own:
                self._remove(own, name)
                make(own)

    def _node(self, folder: int, name: str, entry: tar.Entry, reader: tar.Reader) -> None:
        attributes.check(entry)
        if entry.kind is tar.Kind.FILE:
            self._file(folder, name, entry, reader)
            return
        if entry.kind is tar.Kind.SYMLINK:
            os.symlink(entry.target, name, dir_fd=folder)
        else:
            types = {
                tar.Kind.CHAR: stat.S_IFCHR,
                tar.Kind.BLOCK_DEVICE: stat.S_IFBLK,
                tar.Kind.FIFO: stat.S_IFIFO,
            }
            device = os.makedev(*entry.device)
            os.mknod(name, types[entry.kind] | entry.mode, device, dir_fd=folder)
        os.chown(name, entry.uid, entry.gid, dir_fd=folder, follow_symlinks=False)
        if entry.kind is not tar.Kind.SYMLINK:
            os.chmod(name, entry.mode, dir_fd=folder)  # ours, just made, no symlink
        self._dropped |= attributes.set_xattrs(f"/proc/self/fd/{folder}/{name}", entry.xattrs)
        os.utime(name, ns=(entry.mtime, entry.mtime), dir_fd=folder, follow_symlinks=False)

    def _file(self, folder: int, name: str, entry: tar.Entry, reader: tar.Reader) -> None:
        fd = os.open(name, _NEW_FILE, entry.mode & 0o777, dir_fd=folder)
        try:
            end = 0
            for offset, length in entry.segments:
                if not length:
                    continue  # GNU tar ends a map so, to tell the size
                if offset != end:
                    os.lseek(fd, offset, os.SEEK_SET)
                for piece in reader.data(length):
                    _write(fd, piece)
                end = offset + length
                self._bytes += trees.in_blocks(length)
            if end != entry.size:
                os.ftruncate(fd, entry.size)
            # After the data: writing takes set-id bits and capabilities away.
            self._dropped |= attributes.set_all(fd, entry)
            os.utime(fd, ns=(entry.mtime, entry.mtime))
        finally:
            os.close(fd)

    def _link(self, path: str, target: str) -> None:
        parent, _, name = path.rpartition("/")
        folder = self._folders.open(parent)
        source_parent, _, source = target.rpartition("/")
        try:
            fd = self._folders.find(source_parent)
        except (FileNotFoundError, NotADirectoryError):
            self._wait(folder, name, target)
            return
        try:
            # A link to one that waits itself is one to the same file of the layers below.
            below = self._seen.waiting(fd, source)
            st = layerdirs.lstat(fd, source) if below is None else None
            # A whiteout hides the target from the container, not from this link.
            if st is None or layerdirs.is_whiteout(st):
                self._wait(folder, name, target if below is None else below)
            elif stat.S_ISDIR(st.st_mode):
                raise tar.Malformed("a hard link to a folder")
            elif not _same(folder, name, st):
                self._anew(folder, name, lambda to: _hard_link(fd, source, to, name))
        finally:
            os.close(fd)

    def _wait(self, folder: int, name: str, target: str) -> None:
        """Leave a link to the layers below; what an earlier entry put in its place goes now."""
        inode, st = os.fstat(folder).st_ino, layerdirs.lstat(folder, name)
        if st is not None and not layerdirs.is_whiteout(st):
            with _duplicate(folder) as own:
                self._remove(own, name)
        self._seen.links.setdefault(inode, {})[name] = target

    # ---- folders

    def _folder(self, path: str, entry: tar.Entry) -> None:
        attributes.check(entry)
        parent, _, name = path.rpartition("/")
        folder = self._folders.open(parent)
        fd = self._folders.make(folder, path, name, entry.mode)
        self._own_folder(fd, entry)

    def _set_root(self, entry: tar.Entry) -> None:
        if entry.kind is not tar.Kind.DIR:
            raise tar.Malformed(f"the root of the layer is a {entry.kind}")
        attributes.check(entry)
        self._own_folder(self._root, entry)

    def _own_folder(self, fd: int, entry: tar.Entry) -> None:
        self._dropped |= attributes.set_all(fd, entry)
        inode = os.fstat(fd).st_ino
        self._seen.implicit.discard(inode)
        self._seen.mtimes[inode] = entry.mtime

    def _whiteout(self, parent: str, marker: str) -> None:
        folder = self._folders.open(parent)
        if marker == ".wh..wh..opq":
            self._folders.mark_opaque(folder)
            return
        name = marker[len(".wh.") :]
        if name.startswith(".wh."):
            return  # bookkeeping of AUFS
        if name in ("", ".", ".."):
            raise tar.Malformed(f"a whiteout called {marker!r}")
        try:
            os.mknod(name, stat.S_IFCHR, 0, dir_fd=folder)
            self._inodes += 1
        except FileExistsError:
            if stat.S_ISDIR(os.lstat(name, dir_fd=folder).st_mode):
                self._folders.mark_opaque_child(folder, name)

    def _remove(self, folder: int, name: str) -> None:
        """Remove what an earlier entry made; it may be a whole tree."""
        self._folders.close()  # names below it mean something else from now on
        st = os.lstat(name, dir_fd=folder)
        if not stat.S_ISDIR(st.st_mode):
            self._uncount(st)
            os.unlink(name, dir_fd=folder)
            return
        path = f"/proc/self/fd/{folder}/{name}"
        for step in trees.walk(path):
            self._seen.forget(os.fstat(step.fd).st_ino)
            for each in step.names:
                self._uncount(os.lstat(each, dir_fd=step.fd))
        trees.remove(path)

    def _uncount(self, st: os.stat_result) -> None:
        """Take back what was counted for something that is no folder: those are counted last."""
        if st.st_nlink == 1:
            self._inodes -= 1
            self._bytes -= trees.in_blocks(min(st.st_size, 512 * st.st_blocks))

    # ---- the end

    def _finish(self) -> Outcome:
        """Set the times of folders, which changed with every entry, and see what needs the layers
        below."""
        seen, folders, hidden = self._seen, [], None
        links: list[tuple[str, str]] = []
        for step in trees.walk(f"/proc/self/fd/{self._root}/."):
            if step.left is not None:
                continue
            inode = os.fstat(step.fd).st_ino
            self._bytes += trees.in_blocks(1)
            self._inodes += 1
            if (mtime := seen.mtimes.get(inode)) is not None:
                os.utime(step.fd, ns=(mtime, mtime))
            waiting = seen.links.get(inode, {})
            links += (("/".join((*step.path, name)), at) for name, at in waiting.items())
            if hidden is not None and step.path[: len(hidden)] != hidden:
                hidden = None
            if hidden is None and inode in seen.opaque:
                hidden = step.path
            if hidden is None and inode in seen.implicit:
                folders.append("/".join(step.path))
        return Outcome(
            usage=trees.Usage(bytes=self._bytes, inodes=self._inodes),
            opaque_root=os.fstat(self._root).st_ino in seen.opaque,
            folders=tuple(folders),
            links=tuple(links),
            dropped=frozenset(self._dropped),
        )


def _is_marker(parent: str) -> bool:
    """Say whether an entry lies in the bookkeeping of AUFS; other names with .wh. are no
    folders."""
    marked = [p for p in parent.split("/") if p.startswith(".wh.")]
    if marked and not marked[0].startswith(".wh..wh."):
        raise tar.Malformed(f"a whiteout used as a folder: {marked[0]!r}")
    return bool(marked)


def _write(fd: int, piece: memoryview) -> None:
    while piece:
        piece = piece[os.write(fd, piece) :]


@contextlib.contextmanager
def _duplicate(folder: int) -> Iterator[int]:
    """Have a folder open for the block: removing something closes those of `Folders`."""
    own = os.dup(folder)
    try:
        yield own
    finally:
        os.close(own)


def _hard_link(source_fd: int, source: str, folder: int, name: str) -> None:
    os.link(source, name, src_dir_fd=source_fd, dst_dir_fd=folder, follow_symlinks=False)


def _same(folder: int, name: str, st: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.lstat(name, dir_fd=folder), st)
    except FileNotFoundError:
        return False


def _naming(entry: tar.Entry, error: tar.Malformed | OSError) -> Exception:
    """Say which entry it was; a full disk stays an OSError with its errno."""
    where = f"{entry.kind} {entry.name[:200]!r}"
    if isinstance(error, tar.Malformed):
        return tar.Malformed(f"{where}: {error}")
    if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EXDEV, errno.EINVAL):
        return tar.Malformed(f"{where}: {error.strerror}")
    return OSError(error.errno, f"{where}: {error.strerror}")
