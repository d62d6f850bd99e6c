# SPDX-License-Identifier: Apache-2.0
"""Folder trees that strangers filled: measure and remove them.

What an image or a container leaves behind may be deeper than PATH_MAX, than the stack of Python and
than the limit of descriptors, so nothing here recurses, builds long paths, or holds more than one
descriptor. Symlinks are never followed and mounts never entered. Removing frees space and needs
none, and can be repeated.
"""

import contextlib
import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shim import linux

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """What a tree takes of its file system."""

    bytes: int = 0
    inodes: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(bytes=self.bytes + other.bytes, inodes=self.inodes + other.inodes)


def in_blocks(size: int) -> int:
    """Return what so many bytes take of a file system with the usual blocks of 4096."""
    return -(-size // 4096) * 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One stop of a walk: a folder entered, with the other names in it; or, coming back, the child
    `left`."""

    fd: int  # of the folder where the walk is; closed by the walk
    path: tuple[str, ...]  # below the top
    names: tuple[str, ...] = ()
    left: str | None = None


def walk(top: str | Path, *, mounts: Literal["refuse", "skip"] = "refuse") -> Iterator[Step]:
    """Walk a tree, parents before children; what vanishes meanwhile is left out.

    Raises OSError; EXDEV when something is mounted in it, unless that is to be skipped, ESTALE when
    a folder on the way back was moved.
    """
    fd = os.open(top, _FOLDER)
    try:
        folders, names = _list(fd)
        path: list[str] = []
        waiting, ids = [folders], [_id(fd)]
        yield Step(fd=fd, path=(), names=names)
        while waiting:
            if waiting[-1]:
                name = waiting[-1].pop()
                try:
                    child = linux.openat2(fd, name, _FOLDER, resolve=linux.RESOLVE_NO_XDEV)
                except (FileNotFoundError, NotADirectoryError):
                    continue
                except OSError as e:
                    if e.errno != errno.EXDEV or mounts == "refuse":
                        raise
                    continue
                os.close(fd)
                fd = child
                folders, names = _list(fd)
                path.append(name)
                waiting.append(folders)
                ids.append(_id(fd))
                yield Step(fd=fd, path=tuple(path), names=names)
                continue
            waiting.pop()
            ids.pop()
            if path:
                up = os.open("..", _FOLDER, dir_fd=fd)
                os.close(fd)
                fd = up
                if _id(fd) != ids[-1]:  # somebody moved it; never go on from where we do not belong
                    raise OSError(errno.ESTALE, "a folder was moved while it was walked", str(top))
                left = path.pop()
                yield Step(fd=fd, path=tuple(path), left=left)
    finally:
        os.close(fd)


def _id(fd: int) -> tuple[int, int]:
    st = os.fstat(fd)
    return st.st_dev, st.st_ino


def _list(fd: int) -> tuple[list[str], tuple[str, ...]]:
    with os.scandir(fd) as entries:
        found = [(e.name, e.is_dir(follow_symlinks=False)) for e in entries]
    return [n for n, is_dir in found if is_dir], tuple(n for n, is_dir in found if not is_dir)


def remove(top: str | Path) -> None:
    """Remove a tree or a file; nothing there is fine. Raises OSError at the first thing that
    stays."""
    try:
        for step in walk(top):
            for name in step.names:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=step.fd)
            if step.left is not None:
                os.rmdir(step.left, dir_fd=step.fd)
        os.rmdir(top)
    except FileNotFoundError:
        return
    except NotADirectoryError:
        os.unlink(top)


def usage(top: str | Path) -> Usage:
    """Measure a tree as du does, hard links once; what vanishes meanwhile counts nothing."""
    total = inodes = 0
    linked: set[tuple[int, int]] = set()
    for step in walk(top):
        if step.left is not None:
            continue
        stats = [os.fstat(step.fd), *_stats(step)]
        for st in stats:
            if st.st_nlink > 1 and stats[0] is not st:
                if (st.st_dev, st.st_ino) in linked:
                    continue
                linked.add((st.st_dev, st.st_ino))
            total += st.st_blocks * 512
            inodes += 1
    return Usage(bytes=total, inodes=inodes)


def _stats(step: Step) -> Iterator[os.stat_result]:
    for name in step.names:
        with contextlib.suppress(FileNotFoundError):
            yield os.lstat(name, dir_fd=step.fd)
