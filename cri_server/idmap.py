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
import dataclasses
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
class Shortfall:
    """A mount below a volume that its copy shows as it is, or (`missing`) does not show at all.

    `below` is where it is, relative to the volume; `because` says why.
    """

    below: str
    because: str
    missing: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Copy:
    """A copy of what is mounted at `source`, a path without symlinks, to be attached at `target`.

    `userns` is the pinned user namespace whose ids it shows, "" for a plain copy; `what` is how an
    error calls it. Without `whole` the mounts below are left out. With `slave` what the host mounts
    below the source later appears in the copy too, without a mapping. The mount point is made when
    it is `fresh`; below another copy it is there, and nothing may be made on a volume.
    """

    source: str
    target: str
    what: str
    userns: str = ""
    whole: bool = True
    slave: bool = False
    readonly: bool = False
    fresh: bool = True

    def attach(self) -> list[Shortfall]:
        """Make the mount point and mount the copy on it; return what is not as it should be.

        Raises FailedPrecondition, OSError.
        """
        tree = self._clone()
        try:
            if self.userns and self.whole and not _can_map(tree, self.userns):
                return self._attach_each()
            if self.userns and not self.whole:
                self._map(tree)
            self._attach(tree)
        finally:
            os.close(tree)
        return []

    def _attach(self, tree: int) -> None:
        if self.readonly:
            _set(tree, attr_set=linux.MOUNT_ATTR_RDONLY)
        self._part(tree)
        if self.fresh:
            _make_point(self.target, directory=stat.S_ISDIR(os.fstat(tree).st_mode))
        point = _open(self.target)
        try:
            flags = linux.MOVE_MOUNT_F_EMPTY_PATH | linux.MOVE_MOUNT_T_EMPTY_PATH
            linux.move_mount(tree, "", point, "", flags)
        finally:
            os.close(point)
        self._part(tree)  # below a shared mount it has become shared

    def _attach_each(self) -> list[Shortfall]:
        """Attach mount by mount, since not all below can be mapped: those stay as they are.

        The kernel maps a tree as a whole, or one mount without what is below it.
        """
        top, points = dataclasses.replace(self, whole=False), _below(self.source)
        top.attach()
        found = []
        for below in points:
            source, target = f"{self.source.rstrip('/')}/{below}", f"{self.target}/{below}"
            part = dataclasses.replace(top, source=source, target=target, fresh=False)
            found += part._attach_if_possible(below)
        return found

    def _attach_if_possible(self, below: str) -> list[Shortfall]:
        """Attach a mount of a tree: without a mapping if need be; or not at all, when its folder
        belongs to ids that the copy above does not map. One that is hidden by another lacks nobody.
        """
        try:
            try:
                return self.attach()
            except errors.FailedPrecondition:
                dataclasses.replace(self, userns="").attach()
                log.info("not id-mapped", mount=self.what, path=self.source)
                kind = _file_system(self.source)
                return [Shortfall(below=below, because=f"{kind} cannot be", missing=False)]
        except FileNotFoundError:  # hidden on the host too, or below one that is missing
            return []
        except OSError as e:
            log.warning("not mounted", mount=self.what, path=self.source, error=str(e))
            return [Shortfall(below=below, because=e.strerror or str(e), missing=True)]

    def _clone(self) -> int:
        """Return the detached copy. A symlink that somebody has put into the path since it was
        looked at is refused (CVE-2021-25741).
        """
        here = _open(self.source)
        whole = linux.AT_RECURSIVE if self.whole else 0
        try:
            return linux.open_tree(here, "", linux.OPEN_TREE_CLONE | linux.AT_EMPTY_PATH | whole)
        finally:
            os.close(here)

    def _map(self, tree: int) -> None:
        try:
            _set_map(tree, self.userns)
        except OSError as e:
            raise errors.FailedPrecondition(
                f"{self.what}: {self.source[:200]}: {_file_system(self.source)} cannot be mounted"
                f" with mapped ids, which a pod with userns_options needs ({e.strerror})"
            ) from e

    def _part(self, tree: int) -> None:
        _set(tree, propagation=linux.MS_SLAVE if self.slave else linux.MS_PRIVATE)


def _below(path: str) -> list[str]:
    """Return where something is mounted below a path, parents first, relative to it."""
    top = path.rstrip("/")
    points = (p.removeprefix(f"{top}/") for p in mounts.mounts_below(top) if p not in (top, "/"))
    return list(dict.fromkeys(reversed(list(points))))


def _open(path: str) -> int:
    return linux.openat2(linux.AT_FDCWD, path, os.O_PATH, resolve=linux.RESOLVE_NO_SYMLINKS)


def _can_map(tree: int, userns: str) -> bool:
    """Map a tree as a whole, and say whether that was possible."""
    try:
        _set_map(tree, userns)
    except OSError:
        return False
    return True


def _set(tree: int, *, attr_set: int = 0, propagation: int = 0) -> None:
    flags = linux.AT_EMPTY_PATH | linux.AT_RECURSIVE
    linux.mount_setattr(tree, "", flags, attr_set=attr_set, propagation=propagation)


def _set_map(tree: int, userns: str) -> None:
    namespace = os.open(userns, os.O_RDONLY | os.O_CLOEXEC)
    flags = linux.AT_EMPTY_PATH | linux.AT_RECURSIVE
    try:
        linux.mount_setattr(tree, "", flags, attr_set=linux.MOUNT_ATTR_IDMAP, userns_fd=namespace)
    finally:
        os.close(namespace)


def _make_point(path: str, *, directory: bool) -> None:
    """Make a mount point unless it is there."""
    with contextlib.suppress(FileExistsError):
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
        if below := _below(path):
            raise errors.FailedPrecondition(
                f"mount source {path[:200]!r}: {below[0][:200]} is mounted in it, which runtime"
                f" {handler} leaves out in a pod with userns_options: use a newer one, or runc"
            )


def attach(copies: Mapping[str, Copy], folder: Path) -> dict[str, list[Shortfall]]:
    """Attach all below a new folder; return what falls short, by the copies' names.

    Blocks as long as a source does. Raises as `Copy.attach`.
    """
    folder.mkdir(mode=0o700)
    found = {name: copy.attach() for name, copy in copies.items()}
    return {name: shortfalls for name, shortfalls in found.items() if shortfalls}


def remove(folder: Path) -> None:
    """Unmount all below a folder and delete the mount points; nothing there, or no folder, is fine.

    Raises OSError rather than delete anything that is not an empty mount point.
    """
    if folder.is_symlink() or not folder.is_dir():
        return
    for point in mounts.mounts_below(os.path.realpath(folder)):
        mounts.unmount(point)
    for path in folder.iterdir():
        path.rmdir() if path.is_dir() else path.unlink()
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
