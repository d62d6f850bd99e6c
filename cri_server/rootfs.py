# SPDX-License-Identifier: Apache-2.0
"""What we do inside a container's mounted root before any OCI runtime looks at it.

An image is hostile until shown otherwise (hazards.md §2.1, §3): a symlink at /dev makes a runtime
work on the host, a FIFO at /etc/passwd hangs it. So users are read here, and mount targets and
folders are made here, by paths that are resolved inside the root and never through a link that
leads out. What is made belongs to `owner`, uid and gid of the pod's root on the host.

Nothing else may change the root meanwhile: the container does not run yet. All functions block;
they are quick, as the root lies on a local disk, and leave behind nothing but what they are asked
to make. Repeating a call is harmless.
"""

import contextlib
import errno
import os
import posixpath
import stat
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet

from cri_server import errors, spec
from cri_server.spec import checks, oci, processes, why
from shim import linux

PASSWD, GROUP = "/etc/passwd", "/etc/group"
PASSWD_LIMIT = 1 << 20  # bytes of either; longer ones are refused (CVE-2026-47262)
_IN_ROOT = linux.RESOLVE_IN_ROOT | linux.RESOLVE_NO_MAGICLINKS
_LINKS = 40  # as the kernel's own limit, path_resolution(7)
ROOT = (0, 0)
_KERNEL_TREES = ("/proc", "/sys", "/dev")


# -- users -----------------------------------------------------------------------------------------


def resolve_user(root: str, wanted: spec.UserRequest) -> spec.User:
    """Return who `wanted` is according to the root's own /etc/passwd and /etc/group.

    A number without an entry is itself, with group 0 and home "/". Raises InvalidArgument for a
    name that is not there, for a number in an entry that is none, and for files that are no regular
    ones, even when nothing is looked up: the OCI runtime reads them too.
    """
    with _opened(root) as top:
        passwd = _records(top, PASSWD)
        groups = _records(top, GROUP)
    entry = _passwd_entry(passwd, wanted)
    uid = wanted.uid if wanted.uid is not None else _number(entry[2], PASSWD)
    if wanted.uid is None:
        why.image("process.user.uid", PASSWD, wanted.name)
    gid = _primary_group(groups, wanted, entry)
    extra = () if wanted.strict or not entry else _memberships(groups, entry[0])
    for number in extra:
        why.image(f"process.user.additionalGids[{number}]", GROUP, f"{entry[0]} is a member")
    why.default(f"process.user.additionalGids[{gid}]", "the primary group too (CVE-2022-36109)")
    return spec.User(
        uid=uid,
        gid=gid,
        additional_gids=tuple(dict.fromkeys((gid, *wanted.supplemental, *extra))),
        home=_home(entry),
    )


def _passwd_entry(passwd: Iterable[Sequence[str]], wanted: spec.UserRequest) -> Sequence[str]:
    """Return the fields of the user's line; () for a number without one."""
    whole = (e for e in passwd if len(e) >= 4)
    if wanted.uid is not None:
        return next((e for e in whole if _lenient(e[2]) == wanted.uid), ())
    found = next((e for e in whole if e[0] == wanted.name), ())
    if not found:
        raise errors.InvalidArgument(f"user {wanted.name[:80]!r} is not in the image's /etc/passwd")
    return found


def _primary_group(
    groups: Iterable[Sequence[str]], wanted: spec.UserRequest, entry: Sequence[str]
) -> int:
    if wanted.gid is not None:
        return wanted.gid
    if not wanted.group:
        why.image("process.user.gid", PASSWD, "the user's group there, else 0")
        return _number(entry[3], PASSWD) if entry else 0
    found = next((e for e in groups if len(e) >= 3 and e[0] == wanted.group), None)
    if found is None:
        raise errors.InvalidArgument(
            f"group {wanted.group[:80]!r} is not in the image's /etc/group"
        )
    why.image("process.user.gid", GROUP, wanted.group)
    return _number(found[2], GROUP)


def _memberships(groups: Iterable[Sequence[str]], name: str) -> Iterable[int]:
    return [_number(e[2], GROUP) for e in groups if len(e) >= 4 and name in e[3].split(",")]


def _number(text: str, path: str) -> int:
    number = checks.parse_identity(text, f"the image's {path}")
    if number is None:
        raise errors.InvalidArgument(f"the image's {path}: {text[:80]!r} is not a number")
    return number


def _lenient(text: str) -> int | None:
    """Return the number, None for none: a broken line of another user does no harm."""
    with contextlib.suppress(errors.InvalidArgument):
        return checks.parse_identity(text, PASSWD)
    return None


def _home(entry: Sequence[str]) -> str:
    """Return the home folder if it is a plain absolute path (CVE-2022-4318), else "/"."""
    home = entry[5] if len(entry) > 5 else ""
    return home if home.startswith("/") and home.isprintable() else "/"


def _records(top: int, path: str) -> list[list[str]]:
    """Return the lines of a passwd-like file, split; [] when there is no such file."""
    text = _read(top, path).decode("utf-8", "surrogateescape")
    return [
        line.split(":") for line in text.split("\n") if ":" in line and not line.startswith("#")
    ]


def _read(top: int, path: str) -> bytes:
    """Return a small regular file, opened only once it is known to be one; b"" if missing."""
    try:
        fd = linux.openat2(top, path, os.O_PATH, resolve=_IN_ROOT)
    except (FileNotFoundError, NotADirectoryError):
        return b""
    except OSError as e:
        raise errors.InvalidArgument(f"the image's {path}: {e.strerror}") from e
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise errors.InvalidArgument(f"the image's {path} is not a regular file")
        if found.st_size > PASSWD_LIMIT:
            raise errors.InvalidArgument(f"the image's {path} is larger than {PASSWD_LIMIT} bytes")
        with open(f"/proc/self/fd/{fd}", "rb") as file:
            return file.read(PASSWD_LIMIT)
    finally:
        os.close(fd)


# -- mount targets and folders ---------------------------------------------------------------------


def make_mountpoints(
    root: str,
    mounts: Iterable[oci.Mount],
    *,
    files: AbstractSet[str],
    images: AbstractSet[str] = frozenset(),
    owner: tuple[int, int] = ROOT,
) -> list[oci.Mount]:
    """Make the targets that are missing and return the mounts with targets that contain no symlink.

    `mounts` come in the order in which they will be made; `files` are the sources that are not
    folders, `images` those that are image volumes, whose errors say so. A target below an earlier
    mount is left to the OCI runtime. Raises InvalidArgument when /dev, /proc or /sys is not a
    folder, when a target is of the wrong kind, and when the image leads a target into one of them.
    """
    with _opened(root) as top:
        for path in _KERNEL_TREES:
            _check_folder(top, path)
        tree = _Tree(top, owner=owner)
        return [_explained(tree, mount, files, images) for mount in mounts]


def _explained(
    tree: "_Tree", mount: oci.Mount, files: AbstractSet[str], images: AbstractSet[str]
) -> oci.Mount:
    if mount["source"] not in images:
        return _mountpoint(tree, mount, files)
    with spec.explained(mount["destination"]):
        return _mountpoint(tree, mount, files)


def _mountpoint(tree: "_Tree", mount: oci.Mount, files: AbstractSet[str]) -> oci.Mount:
    wanted = mount["destination"]
    target = tree.resolve(wanted)
    if _kernel_tree(target) != _kernel_tree(wanted):
        raise errors.InvalidArgument(f"mount {wanted!r}: the image leads it to {target[:200]!r}")
    tree.make(target, directory=mount["type"] != "bind" or mount["source"] not in files)
    tree.covered.add(target)
    why.moved(f"mounts[{wanted}]", f"mounts[{target}]", "without the image's symlinks")
    return oci.Mount(
        destination=target, type=mount["type"], source=mount["source"], options=mount["options"]
    )


def _kernel_tree(path: str) -> str:
    return next((t for t in _KERNEL_TREES if checks.below(path, t)), "")


def make_workdir(
    root: str, cwd: str, *, covered: Collection[str], owner: tuple[int, int] = ROOT
) -> None:
    """Make the working directory if it is missing, with mode 0755.

    `covered` are the targets of the container's mounts: what lies below one is left to the OCI
    runtime. Raises InvalidArgument if it is not a folder or leads to a process's links in /proc
    (CVE-2024-21626).
    """
    with _opened(root) as top:
        tree = _Tree(top, covered, owner=owner)
        target = processes.check_cwd(tree.resolve(cwd))
        tree.make(target, directory=True)


def make_volumes(
    root: str, paths: Iterable[str], *, covered: Collection[str], owner: tuple[int, int] = ROOT
) -> list[str]:
    """Make the folders of an image's VOLUMEs and return where they are, without symlinks.

    What lies at or below one of `covered` is left out. Errors as in `make_workdir`.
    """
    with _opened(root) as top:
        tree = _Tree(top, covered, owner=owner)
        found = [
            t for t in map(tree.resolve, paths) if not any(checks.below(t, c) for c in covered)
        ]
        for target in found:
            checks.unsupported(target == "/", "image VOLUME", "the root cannot be a volume")
            tree.make(target, directory=True)
        return list(dict.fromkeys(found))


class _Tree:
    """The root as one call sees it. `covered` are paths on which something will be mounted."""

    def __init__(
        self, top: int, covered: Collection[str] = (), *, owner: tuple[int, int] = ROOT
    ) -> None:
        self._top, self._owner = top, owner
        self.covered = set(covered)
        self._links: dict[str, str | None] = {}

    def resolve(self, path: str) -> str:
        """Return `path` without symlinks, absolute in the root.

        What does not exist is taken as it stands. Stops at a covered path: what its symlinks are
        cannot be seen from here.
        """
        done: list[str] = []
        left = deque(path.split("/"))
        links = 0
        while left:
            part = left.popleft()
            if part == "..":
                del done[-1:]
            elif part not in ("", "."):
                here = "/".join(("", *done, part))
                if here in self.covered:
                    return posixpath.normpath("/".join((here, *left)))
                link = self._link(here)
                if link is None:
                    done.append(part)
                    continue
                links += 1
                if links > _LINKS:
                    raise errors.InvalidArgument(f"{path[:200]!r}: too many symlinks in the image")
                done = [] if link.startswith("/") else done
                left.extendleft(reversed(link.split("/")))
        return "/" + "/".join(done)

    def _link(self, path: str) -> str | None:
        if path not in self._links:
            self._links[path] = _readlink(self._top, path)
        return self._links[path]

    def make(self, path: str, *, directory: bool) -> None:
        """Make a resolved path, parents as folders, unless it exists or lies below a covered
        one.
        """
        if any(checks.below(path, c) for c in self.covered):
            return
        parent, name = posixpath.split(path)
        with _folder(self._top, parent, self._owner) as fd:
            if not name or _is_folder(fd, name, path, wanted=directory):
                return
            if directory:
                os.mkdir(name, 0o755, dir_fd=fd)
            else:
                flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW
                os.close(os.open(name, flags, 0o644, dir_fd=fd))
            os.chown(name, *self._owner, dir_fd=fd, follow_symlinks=False)


def _readlink(top: int, path: str) -> str | None:
    """Return where the symlink at `path` points, None if there is none; it follows nothing."""
    try:
        fd = linux.openat2(
            top, path, os.O_PATH | os.O_NOFOLLOW, resolve=_IN_ROOT | linux.RESOLVE_NO_SYMLINKS
        )
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as e:
        if e.errno == errno.ENAMETOOLONG:  # where a symlink of the image leads
            raise errors.InvalidArgument(f"the image's {path[:200]}: {e.strerror}") from e
        raise
    try:
        return os.readlink("", dir_fd=fd) if stat.S_ISLNK(os.fstat(fd).st_mode) else None
    finally:
        os.close(fd)


@contextlib.contextmanager
def _folder(top: int, path: str, owner: tuple[int, int]) -> Iterator[int]:
    """Open a resolved folder of the root, making it and its parents where they are missing."""
    fd = os.dup(top)
    try:
        for part in path.split("/"):
            if part:
                fd = _enter(fd, part, path, owner)
        yield fd
    finally:
        os.close(fd)


def _enter(fd: int, name: str, path: str, owner: tuple[int, int]) -> int:
    """Return the folder `name` below `fd`, which is closed on success."""
    if not _is_folder(fd, name, path, wanted=True):
        os.mkdir(name, 0o755, dir_fd=fd)
        os.chown(name, *owner, dir_fd=fd, follow_symlinks=False)
    inner = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
    os.close(fd)
    return inner


def _is_folder(fd: int, name: str, path: str, *, wanted: bool) -> bool:
    """Return whether the entry is there. Raises InvalidArgument if it is not of that kind."""
    try:
        mode = os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return False
    if not (stat.S_ISDIR(mode) if wanted else stat.S_ISREG(mode)):
        kind = "folder" if wanted else "regular file"
        raise errors.InvalidArgument(f"{path[:200]!r} in the image is not a {kind}")
    return True


def _check_folder(top: int, path: str) -> None:
    _is_folder(top, path.lstrip("/"), path, wanted=True)


@contextlib.contextmanager
def _opened(root: str) -> Iterator[int]:
    fd = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        yield fd
    finally:
        os.close(fd)
