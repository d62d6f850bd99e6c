# SPDX-License-Identifier: Apache-2.0
"""Whether pods can have user namespaces on this host: tried, not guessed.

Tried with a user namespace that lasts as long as a helper process (unshare(1)) and a mount that
nobody else sees, so a crash leaves nothing behind. What the OCI runtimes can do is asked elsewhere
(`host`).
"""

import contextlib
import os
import select
from collections.abc import Iterator
from pathlib import Path

from shim import linux, process

LAYERS = (5, 19)  # the first Linux whose overlayfs takes id-mapped layers
_SECONDS = 5.0


def why_not(root: Path, state: Path) -> str:
    """Return why not, "" if they can; a person must be able to act on it. Blocks for some ms.

    `root` is where the layers are, `state` where the containers' roots are mounted; neither needs
    to exist yet.
    """
    if closed := _closed(state):
        return f"{closed} lets no other user pass, and {state} is below it: chmod o+x {closed}"
    try:
        with _namespace() as userns:
            return _try_map(_nearest(root), userns)
    except OSError as e:
        return f"no user namespace can be made: {e}"


def _nearest(path: Path) -> Path:
    return next(p for p in (path, *path.parents) if p.is_dir())


def _closed(state: Path) -> Path | None:
    """Return a folder above the containers' roots that a pod's root cannot pass through.

    The OCI runtime looks for the root by its path, as the root of the pod's user namespace.
    """
    above = state.resolve().parents
    return next((p for p in above if p.is_dir() and not p.stat().st_mode & 0o001), None)


@contextlib.contextmanager
def _namespace() -> Iterator[int]:
    """Give a descriptor of a new user namespace. Raises OSError with what the helper said."""
    with contextlib.ExitStack() as each:
        hear, say = _pipe(each)
        wait, hold = _pipe(each)
        os.write(hold, b"\n")  # comes back once the helper is there, which then waits for more
        argv = ["unshare", "--user", "--map-root-user", "cat"]
        child = process.spawn(argv, stdin=wait, stdout=say, stderr=say)
        each.callback(process.reap, child)
        each.callback(process.kill_group, child)
        heard = os.read(hear, 4096) if select.select([hear], [], [], _SECONDS)[0] else b""
        if heard != b"\n":
            raise OSError(heard.decode(errors="replace").strip() or "unshare does not answer")
        userns = os.open(f"/proc/{child.pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        each.callback(os.close, userns)
        yield userns


def _pipe(owner: contextlib.ExitStack) -> tuple[int, int]:
    ends = os.pipe()
    for fd in ends:
        owner.callback(os.close, fd)
    return ends


def _try_map(folder: Path, userns: int) -> str:
    """Map a copy of the folder's mount that is never attached; return why that fails."""
    try:
        tree = linux.open_tree(linux.AT_FDCWD, os.fspath(folder), linux.OPEN_TREE_CLONE)
        try:
            attributes = linux.MOUNT_ATTR_IDMAP
            linux.mount_setattr(
                tree, "", linux.AT_EMPTY_PATH, attr_set=attributes, userns_fd=userns
            )
        finally:
            os.close(tree)
    except OSError as e:
        return f"the file system of {folder} takes no id-mapped mounts ({e.strerror})"
    return ""
