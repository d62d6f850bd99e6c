# SPDX-License-Identifier: Apache-2.0
"""Mounts as values, and what makes and removes them.

    Mount(type, source, target, options)
      └─ parse_options ─► Plan ─► a detached mount with its flags ─► attached in one step

`Mount` reads like an entry of the OCI spec. `overlay` stacks any number of layers with the new
mount API and falls back to the page-sized option string. A mount appears with its flags or not at
all. `unmount` is idempotent, it promises "nothing is mounted there", so undo, removal and recovery
after a crash are one call. Needs Linux 5.12 (mount_setattr).
"""

import contextlib
import dataclasses
import errno
import functools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from shim import linux

_ATTRIBUTES = {  # word: (bits to set, bits to clear), properties of one mount
    "ro": (linux.MOUNT_ATTR_RDONLY, 0),
    "rw": (0, linux.MOUNT_ATTR_RDONLY),
    "nosuid": (linux.MOUNT_ATTR_NOSUID, 0),
    "suid": (0, linux.MOUNT_ATTR_NOSUID),
    "nodev": (linux.MOUNT_ATTR_NODEV, 0),
    "dev": (0, linux.MOUNT_ATTR_NODEV),
    "noexec": (linux.MOUNT_ATTR_NOEXEC, 0),
    "exec": (0, linux.MOUNT_ATTR_NOEXEC),
    "nodiratime": (linux.MOUNT_ATTR_NODIRATIME, 0),
    "diratime": (0, linux.MOUNT_ATTR_NODIRATIME),
    "nosymfollow": (linux.MOUNT_ATTR_NOSYMFOLLOW, 0),
    "symfollow": (0, linux.MOUNT_ATTR_NOSYMFOLLOW),
    "noatime": (linux.MOUNT_ATTR_NOATIME, linux.MOUNT_ATTR__ATIME),
    "relatime": (linux.MOUNT_ATTR_RELATIME, linux.MOUNT_ATTR__ATIME),
    "strictatime": (linux.MOUNT_ATTR_STRICTATIME, linux.MOUNT_ATTR__ATIME),
}
_PROPAGATION = {
    "shared": linux.MS_SHARED,
    "slave": linux.MS_SLAVE,
    "private": linux.MS_PRIVATE,
    "unbindable": linux.MS_UNBINDABLE,
}
_NOTHING = frozenset({"defaults", "async", "atime", "nomand", "loud", "silent"})
_WHOLE_FILE_SYSTEM = frozenset({"ro", "rw"})  # meant for the superblock too when there is a new one

_FSCONFIG_VALUE = 255  # bytes that fsconfig(2) takes
_PAGE_OPTIONS = os.sysconf("SC_PAGE_SIZE") - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Mount:
    """One mount: `type` "bind" or a file system, `options` the words of mount(8) and the spec.

    The prefix r ("rbind", "rro", "rprivate") means the whole tree. Words that mean nothing to the
    kernel's mount layer go to the file system ("size=64m", "mode=755").
    """

    type: str
    source: str
    target: str
    options: tuple[str, ...] = ()

    def describe(self) -> str:
        """Return the command that a person would type."""
        options = ",".join(self.options) or "defaults"
        return f"mount -t {self.type} -o {options} {self.source} {self.target}"

    def mount(self) -> None:
        """Mount it, symlinks in the target followed. Raises OSError."""
        self.mount_at(linux.AT_FDCWD, self.target)

    def mount_at(self, dirfd: int, path: str) -> None:
        """Mount it elsewhere than at its target: at `path` below `dirfd`, "" for `dirfd` itself."""
        plan = parse_options(self.options)
        bind = plan.bind or ("bind" if self.type == "bind" else "")
        fd = _clone(self.source, bind) if bind else _create(self.type, self.source, plan)
        try:
            plan.set_attributes(fd)
            _attach(fd, dirfd, path)
            plan.set_propagation(fd)
        finally:
            os.close(fd)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a list of option words means to the kernel."""

    bind: str  # "", "bind" or "rbind"
    attributes: tuple[tuple[int, int, int], ...]  # attr_set, attr_clr, AT_RECURSIVE or 0
    propagation: tuple[tuple[int, int], ...]  # MS_*, AT_RECURSIVE or 0
    data: tuple[str, ...]  # "key" and "key=value" for the file system

    def set_attributes(self, fd: int) -> None:
        """Set the flags of a mount that is still detached."""
        for attr_set, attr_clr, recursive in self.attributes:
            flags = linux.AT_EMPTY_PATH | recursive
            linux.mount_setattr(fd, "", flags, attr_set=attr_set, attr_clr=attr_clr)

    def set_propagation(self, fd: int) -> None:
        """Set the propagation of an attached mount; to attach below a shared one changes it."""
        for kind, recursive in self.propagation:
            linux.mount_setattr(fd, "", linux.AT_EMPTY_PATH | recursive, propagation=kind)


def parse_options(options: Iterable[str]) -> Plan:
    """Sort option words by what they are; the later of two contradicting words wins. Pure."""
    bind = ""
    attributes: dict[int, tuple[int, int]] = {}
    propagation: list[tuple[int, int]] = []
    data: list[str] = []
    for word in options:
        base, recursive = _split_recursive(word)
        if base == "bind":
            bind = word
        elif base in _PROPAGATION:
            propagation.append((_PROPAGATION[base], recursive))
        elif base in _ATTRIBUTES:
            attributes[recursive] = _merge(attributes.get(recursive, (0, 0)), _ATTRIBUTES[base])
            data += [base] if base in _WHOLE_FILE_SYSTEM else []
        elif word not in _NOTHING:
            data.append(word)
    return Plan(
        bind=bind,
        attributes=tuple((s, c, r) for r, (s, c) in attributes.items()),
        propagation=tuple(propagation),
        data=tuple(data),
    )


def _split_recursive(word: str) -> tuple[str, int]:
    """Take the prefix r off "rbind" and "rro", not off "ro" or "relatime"."""
    base = word[1:]
    known = base == "bind" or base in _ATTRIBUTES or base in _PROPAGATION
    if word.startswith("r") and word not in _ATTRIBUTES and known:
        return base, linux.AT_RECURSIVE
    return word, 0


def _merge(old: tuple[int, int], new: tuple[int, int]) -> tuple[int, int]:
    touched = new[0] | new[1]
    return old[0] & ~touched | new[0], old[1] & ~touched | new[1]


def _clone(source: str, bind: str) -> int:
    recursive = linux.AT_RECURSIVE if bind == "rbind" else 0
    return linux.open_tree(linux.AT_FDCWD, source, linux.OPEN_TREE_CLONE | recursive)


def _create(fstype: str, source: str, plan: Plan) -> int:
    context = linux.fsopen(fstype)
    try:
        linux.fsconfig_string(context, "source", source or "none")
        for word in plan.data:
            key, equals, value = word.partition("=")
            if equals:
                linux.fsconfig_string(context, key, value)
            else:
                linux.fsconfig_flag(context, key)
        linux.fsconfig_create(context)
        return linux.fsmount(context)
    finally:
        os.close(context)


def _attach(fd: int, dirfd: int, path: str) -> None:
    flags = linux.MOVE_MOUNT_F_EMPTY_PATH | linux.MOVE_MOUNT_T_SYMLINKS
    if not path:
        flags |= linux.MOVE_MOUNT_T_EMPTY_PATH
    linux.move_mount(fd, "", dirfd, path, flags)


# ---- many


def mount_all(mounts: Sequence[Mount], *, root: str = "") -> None:
    """Mount all in order or nothing: what was mounted before a failure is unmounted again.

    With `root`, targets are resolved as if it were /, so that a symlink in it leads nowhere else.
    """
    done: list[str] = []
    try:
        for mount in mounts:
            target = _mount_in(mount, root) if root else _mount_here(mount)
            done.append(target)  # one by one, for the clean-up
    except BaseException:
        for target in reversed(done):
            with contextlib.suppress(OSError):  # the first error is the one to report
                unmount(target)
        raise


def _mount_here(mount: Mount) -> str:
    mount.mount()
    return mount.target


def _mount_in(mount: Mount, root: str) -> str:
    """Mount below a root and return the real path of the target."""
    with contextlib.ExitStack() as each:
        top = os.open(root, os.O_PATH | os.O_DIRECTORY)
        each.callback(os.close, top)
        resolve = linux.RESOLVE_IN_ROOT | linux.RESOLVE_NO_MAGICLINKS
        target = linux.openat2(top, mount.target, os.O_PATH, resolve=resolve)
        each.callback(os.close, target)
        mount.mount_at(target, "")
        return os.readlink(f"/proc/self/fd/{target}")


def mounts_below(path: str) -> list[str]:
    """Return what is mounted at or below a path, as often as it is, in the order to unmount it."""
    return [m for m in reversed(list(_mount_points())) if m == path or m.startswith(path + "/")]


def _mount_points() -> Iterator[str]:
    with open("/proc/self/mountinfo", "rb") as file:
        for line in file:
            # proc(5): the fifth field, with blanks as \040 and the like
            yield os.fsdecode(line.split(b" ", 5)[4].decode("unicode_escape").encode("latin-1"))


def unmount(target: str) -> None:
    """Take away everything that is mounted on `target`; nothing there is fine, busy is detached."""
    while _unmount_one(target):
        continue


def _unmount_one(target: str) -> bool:
    for flags in (linux.UMOUNT_NOFOLLOW, linux.UMOUNT_NOFOLLOW | linux.MNT_DETACH):
        try:
            linux.umount2(target, flags)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENOENT, errno.ENOTDIR):
                return False
            if error.errno != errno.EBUSY or flags & linux.MNT_DETACH:
                raise
        else:
            return True
    return False


# ---- overlay


def overlay(
    lowerdirs: Sequence[str],
    upper: str | None,
    work: str | None,
    target: str,
    options: Sequence[str] = (),
) -> None:
    """Stack layers at `target`, the topmost of `lowerdirs` first; without `upper` it is read-only.

    `options` are words as in `Mount`. Raises OSError, whose text is overlayfs's own where it has
    one.
    """
    plan = parse_options(options)
    if upper is None and len(lowerdirs) == 1:  # overlayfs wants two; a read-only view is the same
        options = (*options, "bind", "ro")
        Mount(type="bind", source=lowerdirs[0], target=target, options=options).mount()
        return
    writable = {"upperdir": upper, "workdir": work} if upper and work else {}
    paths = [*lowerdirs, *writable.values()]
    if _takes_layers_one_by_one() and all(len(os.fsencode(p)) <= _FSCONFIG_VALUE for p in paths):
        fd = _overlay_by_layer(lowerdirs, writable, plan)
        attach = True
    else:
        fd = _overlay_by_page(lowerdirs, writable, target, plan)
        attach = False
    try:
        plan.set_attributes(fd)
        if attach:
            _attach(fd, linux.AT_FDCWD, target)
        plan.set_propagation(fd)
    finally:
        os.close(fd)


@functools.cache
def _takes_layers_one_by_one() -> bool:
    """Whether overlayfs knows "lowerdir+" (Linux 6.8)."""
    return knows_option("overlay", "lowerdir+", "/")


def knows_option(fstype: str, key: str, value: str) -> bool:
    """Say whether a file system takes an option with the new mount API.

    One that has not been converted to that API (overlayfs before Linux 6.5) accepts every word at
    first and refuses at the end; one that accepts a nonsense word is therefore not believed.
    """
    return _accepts(fstype, key, value) and not _accepts(fstype, "no-such-option", value)


def _accepts(fstype: str, key: str, value: str) -> bool:
    try:
        context = linux.fsopen(fstype)
    except OSError:
        return False
    try:
        linux.fsconfig_string(context, key, value)
    except OSError:
        return False
    finally:
        os.close(context)
    return True


def _overlay_by_layer(lowerdirs: Sequence[str], writable: Mapping[str, str], plan: Plan) -> int:
    words = [f"lowerdir+={path}" for path in lowerdirs]
    words += [f"{key}={path}" for key, path in writable.items()]
    return _create("overlay", "overlay", dataclasses.replace(plan, data=(*words, *plan.data)))


def _overlay_by_page(
    lowerdirs: Sequence[str], writable: Mapping[str, str], target: str, plan: Plan
) -> int:
    """Mount with one option string, with descriptors for layers when their names are too long."""
    with contextlib.ExitStack() as each:
        data = _option_string(lowerdirs, writable, plan)
        if len(os.fsencode(data)) > _PAGE_OPTIONS:
            data = _option_string([_by_fd(p, each) for p in lowerdirs], writable, plan)
        linux.mount("overlay", target, "overlay", 0, data)
    return linux.open_tree(linux.AT_FDCWD, target, 0)


def _option_string(lowerdirs: Sequence[str], writable: Mapping[str, str], plan: Plan) -> str:
    lower = ":".join(_escape(path).replace(":", "\\:") for path in lowerdirs)
    words = [f"{key}={_escape(path)}" for key, path in writable.items()]
    data = [_quote(word) for word in plan.data if word not in _WHOLE_FILE_SYSTEM]
    return ",".join([f"lowerdir={lower}", *words, *data])


def _quote(word: str) -> str:
    """Quote a value with commas in it, as SELinux reads its labels: context="u:r:t:s0:c1,c2"."""
    key, equals, value = word.partition("=")
    return f'{key}="{value}"' if equals and "," in value else word


def _escape(path: str) -> str:
    return path.replace("\\", "\\\\").replace(",", "\\,")


def _by_fd(path: str, owner: contextlib.ExitStack) -> str:
    fd = os.open(path, os.O_PATH | os.O_DIRECTORY)
    owner.callback(os.close, fd)
    return f"/proc/self/fd/{fd}"
