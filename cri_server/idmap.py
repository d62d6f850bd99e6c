# SPDX-License-Identifier: Apache-2.0
"""Id-mapped copies of mounts: on disk files keep their owners, here they show those of a pod.

    <bundle>/mounts/0, 1, …     volumes of a container, from CreateContainer until it has started
             layers/            the image's layers, while overlayfs takes its own copies of them

OCI runtimes of today's distributions ignore mappings of mounts in silence (runc before 1.2), so we
make such mounts ourselves and every runtime gets plain bind mounts of them. Once a container has
started it has its own copy, and ours go: they would keep the volume's file system busy long after
the kubelet has unmounted it.

A copy is private, or a slave of its source, before anybody can see it: whoever unmounts it, also
after a crash, never unmounts anything on the host. `remove` deletes mount points and nothing else,
so that no clean-up can walk into a volume. Needs Linux 5.12, for layers 5.19.
"""

import contextlib
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from cri_server import errors, spec
from cri_server.pb import api_pb2 as api
from shim import linux, mounts

log = structlog.get_logger()
_FLAGS = {os.ST_NOSUID: "nosuid", os.ST_NODEV: "nodev", os.ST_NOEXEC: "noexec"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Copy:
    """A copy of what is mounted at `source`, a path without symlinks, to be attached at `target`.

    `userns` is the pinned user namespace whose ids it shows, "" for a plain copy; `what` is how an
    error calls it. Without `whole` the mounts below are left out. With `slave` what the host mounts
    below the source later appears in the copy too, without a mapping.
    """

    source: str
    target: str
    what: str
    userns: str = ""
    whole: bool = True
    slave: bool = False
    readonly: bool = False

    def attach(self) -> None:
        """Make the mount point and mount the copy on it. Raises FailedPrecondition, OSError."""
        tree = self._clone()
        try:
            if self.userns:
                self._map(tree)
            if self.readonly:
                _set(tree, attr_set=linux.MOUNT_ATTR_RDONLY)
            self._part(tree)
            _make_point(self.target, stat.S_ISDIR(os.fstat(tree).st_mode))
            flags = linux.MOVE_MOUNT_F_EMPTY_PATH
            linux.move_mount(tree, "", linux.AT_FDCWD, self.target, flags)
            self._part(tree)  # below a shared mount it has become shared
        finally:
            os.close(tree)

    def _clone(self) -> int:
        """Return the detached copy. A symlink that somebody has put into the path since it was
        looked at is refused (CVE-2021-25741).
        """
        here = linux.openat2(
            linux.AT_FDCWD, self.source, os.O_PATH, resolve=linux.RESOLVE_NO_SYMLINKS
        )
        whole = linux.AT_RECURSIVE if self.whole else 0
        try:
            return linux.open_tree(here, "", linux.OPEN_TREE_CLONE | linux.AT_EMPTY_PATH | whole)
        finally:
            os.close(here)

    def _map(self, tree: int) -> None:
        """Map the copy and, where their file systems can, the mounts below it."""
        userns = os.open(self.userns, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with contextlib.suppress(OSError):
                return _set_map(tree, "", userns, linux.AT_RECURSIVE)
            self._map_each(tree, userns)
        finally:
            os.close(userns)

    def _map_each(self, tree: int, userns: int) -> None:
        try:
            _set_map(tree, "", userns)
        except OSError as e:
            raise errors.FailedPrecondition(
                f"{self.what}: {self.source[:200]}: {_file_system(self.source)} cannot be mounted"
                f" with mapped ids, which a pod with userns_options needs ({e.strerror})"
            ) from e
        for below in self._below() if self.whole else ():
            try:
                _set_map(tree, below, userns)
            except OSError as e:
                log.warning(
                    "not id-mapped", mount=self.what, path=f"{self.source}/{below}", error=str(e)
                )

    def _below(self) -> Iterator[str]:
        top = self.source.rstrip("/") + "/"
        for point in mounts.mounts_below(self.source):
            if point.startswith(top) and len(point) > len(top):
                yield point.removeprefix(top)

    def _part(self, tree: int) -> None:
        _set(tree, propagation=linux.MS_SLAVE if self.slave else linux.MS_PRIVATE)


def _set(tree: int, *, attr_set: int = 0, propagation: int = 0) -> None:
    flags = linux.AT_EMPTY_PATH | linux.AT_RECURSIVE
    linux.mount_setattr(tree, "", flags, attr_set=attr_set, propagation=propagation)


def _set_map(tree: int, path: str, userns: int, flags: int = 0) -> None:
    flags |= linux.AT_SYMLINK_NOFOLLOW if path else linux.AT_EMPTY_PATH
    linux.mount_setattr(tree, path, flags, attr_set=linux.MOUNT_ATTR_IDMAP, userns_fd=userns)


def _make_point(path: str, directory: bool) -> None:
    if directory:
        os.mkdir(path, 0o700)
    else:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))


def _file_system(path: str) -> str:
    """Return "nfs4 (server:/export)": type and source of what is mounted at a path (proc(5))."""
    device = os.stat(path).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text(errors="replace").splitlines():
        fields = line.split(" ")
        if fields[2] == number:
            kind, source = fields[fields.index("-") + 1 :][:2]
            return f"{kind} ({source})"
    return "its file system"


# -- of a container --------------------------------------------------------------------------------


def of_container(
    config: api.ContainerConfig, folder: Path, *, sources: Mapping[str, str], userns: str
) -> dict[str, Copy]:
    """Return what a container needs by its path inside: a copy of every mount with mappings.

    `sources` maps host_path to where it really is.
    """
    asked = [m for m in config.mounts if spec.id_mapped(m) and m.host_path in sources]
    return {
        m.container_path: Copy(
            source=sources[m.host_path],
            target=str(folder / str(number)),
            what=f"mount {m.container_path[:200]!r}",
            userns=userns,
            slave=m.propagation == api.MountPropagation.PROPAGATION_HOST_TO_CONTAINER,
        )
        for number, m in enumerate(asked)
    }


def sysfs(folder: Path) -> Copy:
    """Return a copy of the host's /sys without what is mounted in it."""
    return Copy(source="/sys", target=str(folder / "sys"), what="/sys", whole=False)


def check_flat(sources: Iterable[str], handler: str) -> None:
    """Refuse a source with mounts below it, for a runtime that would leave those out."""
    for path in sources:
        below = [point for point in mounts.mounts_below(path) if point != path]
        if below:
            raise errors.FailedPrecondition(
                f"mount source {path[:200]!r}: {below[-1][:200]} is mounted in it, which runtime"
                f" {handler} leaves out in a pod with userns_options: use a newer one, or runc"
            )


def attach(copies: Iterable[Copy], folder: Path) -> None:
    """Attach all below a new folder. Blocks as long as a source does. Raises as `Copy.attach`."""
    folder.mkdir(mode=0o700)
    for copy in copies:
        copy.attach()


def remove(folder: Path) -> None:
    """Unmount all below a folder and delete the mount points; nothing there is fine.

    Raises OSError rather than delete anything that is not an empty mount point.
    """
    if not folder.exists():
        return
    for point in mounts.mounts_below(os.path.realpath(folder)):
        mounts.unmount(point)
    for entry in os.scandir(folder):
        os.rmdir(entry) if entry.is_dir(follow_symlinks=False) else os.unlink(entry)
    folder.rmdir()


def locked(path: str) -> tuple[str, ...]:
    """Return the flags of a mount that stay with its copies in a user namespace, as option words.

    Blocks as long as the file system does (mount_namespaces(7), "locked").
    """
    flags = os.statvfs(path).f_flag
    return tuple(word for flag, word in _FLAGS.items() if flags & flag)


# -- of an image -----------------------------------------------------------------------------------


@contextlib.contextmanager
def layers(lowerdirs: Sequence[str], userns: str, at: Path) -> Iterator[tuple[str, ...]]:
    """Give the layers with mapped owners for the block; an overlay made in it keeps them.

    Raises FailedPrecondition when the file system below them cannot do it.
    """
    top = os.path.commonpath([os.path.dirname(path) for path in lowerdirs])
    copy = Copy(
        source=os.path.realpath(top),
        target=str(at),
        what="the image's layers",
        userns=userns,
        whole=False,
        readonly=True,
    )
    copy.attach()
    try:
        yield tuple(str(at / os.path.relpath(path, top)) for path in lowerdirs)
    finally:
        mounts.unmount(os.path.realpath(at))
        at.rmdir()
