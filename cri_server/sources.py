# SPDX-License-Identifier: Apache-2.0
"""What containers take from the host: mount sources, device nodes, seccomp files.

Every function may block for ever: a host path can lie on dead network storage (containerd#10828).
Callers run them in a thread and stop waiting at a deadline. The only thing that is ever made is the
folder of a missing hostPath.
"""

import contextlib
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from cri_server import errors, openers, spec
from cri_server.pb import api_pb2 as api
from cri_server.spec import devices

PROFILE_LIMIT = 1 << 20  # bytes of a seccomp profile
DEVICE_LIMIT = 4096  # devices below one folder
# Not devices to hand out: mounts of the container's own, other managers' places, the console of
# whoever looks.
_SKIPPED = frozenset({"pts", "shm", "fd", "mqueue", ".lxc", ".lxd-mounts", ".udev", "console"})

_Propagation = api.MountPropagation


# -- mount sources ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A mount source that has been looked at: where it really is, and whether it is a folder."""

    path: str
    directory: bool


def find_source(mount: api.Mount) -> Source | None:
    """Resolve the source of a CRI mount, None for one that `make_source` has to make.

    Raises InvalidArgument if it can't be looked at, or if its mount does not propagate as asked
    (critest), which for a missing one is that of the folder to come.
    """
    with _naming(mount.host_path):
        if os.path.exists(mount.host_path):
            return _checked(mount.host_path, mount)
        _checked(_nearest(mount.host_path), mount)
        return None


def make_source(mount: api.Mount) -> Source:
    """Make the source of a CRI mount a folder with mode 0755 (behaviour.md §7). Raises
    InvalidArgument if it can't be made.
    """
    with _naming(mount.host_path):
        os.makedirs(mount.host_path, 0o755, exist_ok=True)
        return _checked(mount.host_path, mount)


@contextlib.contextmanager
def _naming(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise errors.InvalidArgument(f"mount source {path[:200]!r}: {e.strerror}") from e
    except RecursionError as e:  # of os.makedirs
        raise errors.InvalidArgument(f"mount source {path[:200]!r}: too many folders deep") from e


def _nearest(path: str) -> str:
    """Return the deepest folder of a path that is there."""
    return next(os.fspath(p) for p in Path(path).parents if p.exists())


def _checked(path: str, mount: api.Mount) -> Source:
    real = os.path.realpath(path, strict=True)
    fd = os.open(real, os.O_PATH)
    try:
        _check_propagation(fd, real, mount.propagation)
        return Source(path=real, directory=stat.S_ISDIR(os.fstat(fd).st_mode))
    finally:
        os.close(fd)


def _check_propagation(fd: int, path: str, wanted: _Propagation.ValueType) -> None:
    if wanted == _Propagation.PROPAGATION_PRIVATE:
        return
    peers = _propagation(fd)
    if "shared" in peers or (
        wanted == _Propagation.PROPAGATION_HOST_TO_CONTAINER and "master" in peers
    ):
        return
    raise errors.InvalidArgument(
        f"mount source {path[:200]!r}: its mount is not shared,"
        f" as propagation {_Propagation.Name(wanted)} needs"
    )


def _propagation(fd: int) -> set[str]:
    """Return the optional fields, "shared", "master", of `fd`'s mount (proc_pid_mountinfo(5))."""
    info = Path(f"/proc/self/fdinfo/{fd}").read_text()
    number = next(line.split()[1] for line in info.splitlines() if line.startswith("mnt_id:"))
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        fields = line.split(" ")
        if fields[0] == number:
            return {field.partition(":")[0] for field in fields[6 : fields.index("-")]}
    return set()


# -- devices ---------------------------------------------------------------------------------------


def device_nodes(requests: Iterable[devices.Request]) -> tuple[spec.DeviceNode, ...]:
    """Return the nodes behind the requests; a folder stands for all devices below it.

    Raises InvalidArgument for what does not exist and for what is neither.
    """
    return tuple(node for request in requests for node in _nodes(request))


def _nodes(request: devices.Request) -> Iterator[spec.DeviceNode]:
    try:
        found = os.stat(request.host_path)
    except OSError as e:
        raise errors.InvalidArgument(f"device {request.host_path[:200]!r}: {e.strerror}") from e
    if stat.S_ISDIR(found.st_mode):
        yield from _below(request.host_path, request.container_path, request.access)
        return
    node = _node(found, request.host_path, request.container_path, request.access)
    if node is None:
        raise errors.InvalidArgument(f"device {request.host_path[:200]!r} is not a device")
    yield node


def _node(found: os.stat_result, host_path: str, path: str, access: str) -> spec.DeviceNode | None:
    if not (stat.S_ISCHR(found.st_mode) or stat.S_ISBLK(found.st_mode)):
        return None
    return spec.DeviceNode(
        path=path,
        host_path=host_path,
        kind="c" if stat.S_ISCHR(found.st_mode) else "b",
        major=os.major(found.st_rdev),
        minor=os.minor(found.st_rdev),
        mode=stat.S_IMODE(found.st_mode),
        uid=found.st_uid,
        gid=found.st_gid,
        access=access,
    )


def _below(folder: str, target: str, access: str) -> Iterator[spec.DeviceNode]:
    """Yield the devices below a folder; symlinks are not followed."""
    count = 0
    for here, folders, names in os.walk(folder):
        folders[:] = sorted(set(folders) - _SKIPPED)
        for name in sorted(set(names) - _SKIPPED):
            path = os.path.join(here, name)
            inside = os.path.join(target, os.path.relpath(path, folder))
            node = _node_there(path, inside, access)
            if node is not None:
                count += 1
                if count > DEVICE_LIMIT:
                    raise errors.InvalidArgument(
                        f"device {folder[:200]!r}: too many devices below it"
                    )
                yield node


def _node_there(path: str, inside: str, access: str) -> spec.DeviceNode | None:
    """Return the device at a path that was listed, None if it is none, or gone by now."""
    try:
        return _node(os.lstat(path), path, inside, access)
    except FileNotFoundError:
        return None


def host_devices() -> tuple[spec.DeviceNode, ...]:
    """Return all device nodes of the host, for privileged containers."""
    return tuple(_below("/dev", "/dev", "rwm"))


# -- seccomp ---------------------------------------------------------------------------------------


def seccomp_profile(path: str) -> Mapping[str, object]:
    """Read a Localhost profile, a JSON object of at most 1 MiB. Raises InvalidArgument."""
    try:
        with open(path, "rb", opener=openers.at_once) as file:
            text = file.read(PROFILE_LIMIT + 1)
        if len(text) > PROFILE_LIMIT:
            raise errors.InvalidArgument(
                f"seccomp: {path[:200]} is larger than {PROFILE_LIMIT} bytes"
            )
        document = json.loads(text)
    except OSError as e:
        raise errors.InvalidArgument(f"seccomp: {path[:200]}: {e.strerror}") from e
    except (ValueError, RecursionError) as e:
        raise errors.InvalidArgument(f"seccomp: {path[:200]} is not JSON") from e
    if not isinstance(document, dict):
        raise errors.InvalidArgument(f"seccomp: {path[:200]} does not hold a profile")
    return document
