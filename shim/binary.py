# SPDX-License-Identifier: Apache-2.0
"""The command line of a containerd shim, and the folder by which whatever it leaves is found.

    <root>/<pod id>/            home of a pod's shim, which is its working directory
        config.json             of the container that it is started for: for its annotations
        log                     FIFO that it logs to
        events                  socket to which it sends events
        grpc                    socket that it is told is containerd's (shim.runtimes.refusals)
        socket                  the path of its own socket
        bundles/<container id>  link to the bundle of a container that it has not yet forgotten
        runc/                   what runc remembers, where it is runc's

A home belongs to the pod's own shim as long as that lives, which a lock tells. Afterwards it is
`cri_server`'s to clear: kill all that has the home in its environment, have the binary `delete`
each container, remove the folder. Every step can be done again.
"""

import contextlib
import fcntl
import os
from collections.abc import Mapping, Sequence

from shim import process

NAMESPACE = "k8s.io"  # of containerd, which shims demand
GRPC = "grpc"
_MARK = "CRI_SHIM_HOME"
_BUNDLES, _SOCKET = "bundles", "socket"


def home(root: str, pod_id: str) -> str:
    """Return the home of a pod's shim below a handler's root."""
    return os.path.join(root, pod_id)


def mark(home: str) -> str:
    """Return the variable in the environment of all that is started for a home."""
    return f"{_MARK}={home}"


def argv(
    path: str, home: str, verb: str, *, wanted: str, directory: str, grpc: str = ""
) -> Sequence[str]:
    """Return the command line of `start` and `delete` (containerd core/runtime/v2/README.md).

    `grpc` is a name by which others find that socket of the home. The working directory is the
    bundle: env(1) goes there, since posix_spawn cannot.
    """
    return (
        "/usr/bin/env", "-C", directory, path,
        "-namespace", NAMESPACE, "-address", grpc or _grpc(home), "-publish-binary", "/bin/true",
        "-id", wanted, *(("-bundle", directory) if verb == "delete" else ()), verb,
    )  # fmt: skip


def environment(home: str, events: str = "", grpc: str = "") -> Mapping[str, str]:
    """Return the whole environment of a shim that sends its events to a socket; see `argv`."""
    key, _, value = mark(home).partition("=")
    return {
        **process.DEFAULT_ENV,
        "NAMESPACE": NAMESPACE,
        "TTRPC_ADDRESS": events,
        "GRPC_ADDRESS": grpc or _grpc(home),
        "MAX_SHIM_VERSION": "2",  # as containerd says, whose shims answer 3 all the same
        key: value,
    }


def _grpc(home: str) -> str:
    return os.path.join(home, GRPC)


def make(home: str) -> int:
    """Make a home and hold it; whoever closes the descriptor lets go. Raises OSError."""
    os.makedirs(os.path.join(home, _BUNDLES), 0o700, exist_ok=True)
    fd = os.open(home, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return fd


def is_held(home: str) -> bool:
    """Say whether the pod's own shim lives."""
    try:
        fd = os.open(home, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def note_socket(home: str, path: str) -> None:
    """Remember the path of the socket that a shim listens on."""
    with open(os.path.join(home, _SOCKET), "w") as file:
        file.write(path)


def remove_socket(home: str) -> None:
    """Remove a dead shim's socket, if there is one."""
    with contextlib.suppress(OSError), open(os.path.join(home, _SOCKET)) as file:
        os.unlink(file.read())


def note(home: str, container_id: str, bundle: str) -> None:
    """Remember where a container's bundle is, before the shim is told of it."""
    os.symlink(bundle, os.path.join(home, _BUNDLES, container_id))
    if os.path.basename(bundle) != container_id:  # runc's `delete` looks for its sibling by the id
        with contextlib.suppress(FileExistsError):
            os.symlink(
                os.path.basename(bundle), os.path.join(os.path.dirname(bundle), container_id)
            )


def forget(home: str, container_id: str) -> None:
    """Remember a container no more."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(os.path.join(home, _BUNDLES, container_id))


def noted(home: str) -> Mapping[str, str]:
    """Return the bundles of the containers that are not forgotten, by id."""
    folder = os.path.join(home, _BUNDLES)
    try:
        return {name: os.readlink(os.path.join(folder, name)) for name in os.listdir(folder)}
    except FileNotFoundError:
        return {}
