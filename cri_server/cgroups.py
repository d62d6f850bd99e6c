# SPDX-License-Identifier: Apache-2.0
"""Where the cgroups of pods and containers are, in every cgroup mode and for both drivers.

    mode     hierarchies                                   a container's directories
    v1       one per controller                            <mount>/<path> for each
    hybrid   v1, and a v2 without (all) controllers        the v1 ones
    v2       one                                           <mount>/<path>

    driver     cgroup_parent               cgroupsPath for the runtime    path below the mount
    cgroupfs   /kubepods/pod1              /kubepods/pod1/<id>            the same
    systemd    /kube.slice/kube-x.slice    kube-x.slice:cri-server:<id>   .../cri-server-<id>.scope

With a prefix the last part is `<prefix>-<id>`, or `<prefix>-<id>.scope`: some tools recognise
containers by that. Such a tool looks for a pod's network at the pod's own container, so that a pod
without a sandbox container gets an empty cgroup of that name (`mark`).

The OCI runtime (through systemd, with that driver) makes the directories and removes the
container's own. It also makes missing parents, and leaves them: `missing` tells which before a pod
begins, `remove` takes them away with the pod. A kubelet makes its own, which are never ours.
"""

import contextlib
import errno
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cri_server import commands, config, errors
from cri_server.spec import why
from shim import cgroup

PREFIX = "cri-server"
SYSTEMCTL_TIMEOUT = 60  # seconds
Mode = Literal["v1", "hybrid", "v2"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Hierarchy:
    """The mounted cgroup file systems: mount points by v1 controller name, and the v2 one."""

    mode: Mode
    v1: Mapping[str, Path]
    unified: Path | None

    @property
    def mounts(self) -> dict[str, Path]:
        """Controller name ("" for v2) to mount point, of what containers are in."""
        if self.mode == "v2" and self.unified is not None:
            return {"": self.unified}
        return dict(self.v1)

    @property
    def places(self) -> tuple[Path, ...]:
        """Every mount point where a runtime may make directories: in hybrid mode in v2 as well."""
        unified = (self.unified,) if self.unified else ()
        return (*dict.fromkeys(self.v1.values()), *unified)

    def controllers(self) -> tuple[str, ...]:
        """Return the controllers that limits can be set with."""
        if self.mode == "v2" and self.unified is not None:
            return tuple((self.unified / "cgroup.controllers").read_text().split())
        return tuple(name for name in self.v1 if not name.startswith("name="))


def detect(mountinfo: str | None = None) -> Hierarchy:
    """Read the mounts of this process (or the given text) and tell the mode."""
    text = Path("/proc/self/mountinfo").read_text() if mountinfo is None else mountinfo
    v1: dict[str, Path] = {}
    unified = None
    for line in text.splitlines():
        left, _, right = line.partition(" - ")
        fstype, _, options = right.split(" ", 2)
        if fstype == "cgroup2":
            unified = unified or Path(left.split()[4])
        elif fstype == "cgroup":
            for name in _v1_names(options):
                v1.setdefault(name, Path(left.split()[4]))
    if not v1:
        return Hierarchy(mode="v2", v1={}, unified=unified)
    return Hierarchy(mode="hybrid" if unified else "v1", v1=v1, unified=unified)


def _v1_names(options: str) -> list[str]:
    ignored = ("rw", "ro", "xattr", "noprefix", "clone_children")
    words = options.split(",")
    return [w for w in words if w not in ignored and not w.startswith("release_agent=")]


def driver(wanted: config.CgroupDriver) -> Literal["cgroupfs", "systemd"]:
    """Return the driver to use; "auto" is systemd where systemd is the init of the host."""
    if wanted != "auto":
        return wanted
    return "systemd" if Path("/run/systemd/system").is_dir() else "cgroupfs"


class Cgroups:
    """Names and removes the cgroups of pods and containers."""

    def __init__(
        self,
        hierarchy: Hierarchy,
        driver: Literal["cgroupfs", "systemd"],
        *,
        root: str = f"/{PREFIX}",
        prefix: str = "",
    ) -> None:
        self.hierarchy, self.driver = hierarchy, driver
        self._root, self._prefix = root, prefix
        self._leftover: dict[str, None] = {}

    def pod_parent(self, pod_id: str, cgroup_parent: str) -> str:
        """Return the path below the mounts that the pod's containers are in.

        Raises InvalidArgument for a parent that is no path of this driver (CRI
        LinuxPodSandboxConfig.cgroup_parent).
        """
        if ".." in cgroup_parent.split("/") or any(c in cgroup_parent for c in "\r\n\0"):
            raise errors.InvalidArgument(f"cgroup_parent {cgroup_parent!r} is not a clean path")
        why.pod("sandbox.cgroup_parent", "linux.cgroup_parent")
        if not cgroup_parent.strip("/"):
            why.default("sandbox.cgroup_parent", "the request names none: one of ours")
        if self.driver == "systemd":
            return slice_path(posix_basename(cgroup_parent) or "system.slice")
        return (
            "/" + cgroup_parent.strip("/") if cgroup_parent.strip("/") else f"{self._root}/{pod_id}"
        )

    def container_path(self, pod_id: str, cgroup_parent: str, container_id: str) -> str:
        """Return linux.cgroupsPath for the OCI runtime."""
        if self.driver == "systemd":
            unit = posix_basename(cgroup_parent) or "system.slice"
            return f"{unit}:{self._prefix or PREFIX}:{container_id}"
        name = f"{self._prefix}-{container_id}" if self._prefix else container_id
        return f"{self.pod_parent(pod_id, cgroup_parent)}/{name}"

    def directories(self, cgroups_path: str) -> dict[str, str]:
        """Return the directories behind a `container_path`: controller name ("" for v2) to
        directory.
        """
        path = cgroups_path
        if not path.startswith("/"):
            unit, prefix, container_id = cgroups_path.split(":")
            path = f"{slice_path(unit)}/{prefix}-{container_id}.scope"
        return {name: f"{mount}{path}" for name, mount in self.hierarchy.mounts.items()}

    def pod_directories(self, pod_id: str, cgroup_parent: str) -> dict[str, str]:
        """Return the directories of the pod's own cgroup; none when the pod has no parent of its
        own.
        """
        if self.driver == "systemd" and not cgroup_parent.strip("/"):
            return {}
        path = self.pod_parent(pod_id, cgroup_parent)
        return {name: f"{mount}{path}" for name, mount in self.hierarchy.mounts.items()}

    def every(self, cgroups_path: str) -> dict[str, str]:
        """Return all directories that a runtime makes for a container: in hybrid mode "unified" is
        among them. `usage.read` takes them, too.
        """
        return self._with_unified(self.directories(cgroups_path))

    def pod_accounts(self, pod_id: str, cgroup_parent: str) -> dict[str, str]:
        """Return the directories to read the pod's own usage from."""
        return self._with_unified(self.pod_directories(pod_id, cgroup_parent))

    def _with_unified(self, directories: dict[str, str]) -> dict[str, str]:
        """Add "unified" in hybrid mode: the OCI runtimes join the v2 hierarchy at the same path."""
        if self.hierarchy.mode != "hybrid" or not directories:
            return directories
        name, directory = next(iter(directories.items()))
        path = directory.removeprefix(str(self.hierarchy.v1[name]))
        return {**directories, "unified": f"{self.hierarchy.unified}{path}"}

    def mark(self, cgroups_path: str) -> None:
        """Make an empty cgroup, where its parent is; `remove_all` removes it.

        A slice that is not there yet is systemd's to make: then there is no mark.
        """
        for directory in self.directories(cgroups_path).values():
            with contextlib.suppress(FileNotFoundError, FileExistsError):
                if self.driver == "cgroupfs":
                    os.makedirs(os.path.dirname(directory), exist_ok=True)
                os.mkdir(directory)

    def missing(self, parent: str) -> tuple[str, ...]:
        """Return `parent` and those of its parents that do not exist yet, deepest first."""
        paths = [parent, *(str(p) for p in Path(parent).parents if str(p) != "/")]
        places = self.hierarchy.places
        return tuple(p for p in paths if not any(os.path.isdir(f"{m}{p}") for m in places))

    async def remove(self, made: Iterable[str]) -> None:
        """Remove the empty ones of these directories. One that others use is tried again at the
        next call. Raises commands.Failed when systemd does not let go of a slice.
        """
        wanted = sorted({*made, *self._leftover}, key=len, reverse=True)
        gone = [p for p in wanted if self._remove(p)]
        self._leftover = {p: None for p in wanted if p not in gone}
        # Those of the other driver are no units.
        units = [posix_basename(path) for path in gone if path.endswith(".slice")]
        if units and self.driver == "systemd":
            # To stop a slice ends what is in it; that it could be removed says that nothing was.
            await commands.run(["systemctl", "stop", *units], timeout=SYSTEMCTL_TIMEOUT)

    def _remove(self, path: str) -> bool:
        gone = [_rmdir(f"{mount}{path}") for mount in self.hierarchy.places]
        return all(gone)

    def kill(self, cgroups_path: str) -> bool:
        """Kill what is in a container's cgroup, once; return whether there was anything.

        An empty path, as in a record that was never completed, is nobody's and not the root's.
        """
        if not cgroups_path.strip("/"):
            return False
        return cgroup.Cgroup(self.directories(cgroups_path)).kill()

    def remove_all(self, cgroups_path: str) -> None:
        """Remove a container's cgroup where its runtime was ended before it could."""
        if cgroups_path.strip("/"):
            cgroup.Cgroup(self.every(cgroups_path)).remove()


def slice_path(unit: str) -> str:
    """Return the path of a systemd slice: "a-b.slice" is /a.slice/a-b.slice, "-.slice" is the
    root (systemd.slice(5)). Raises InvalidArgument.
    """
    if unit == "-.slice":
        return ""
    parts = unit.removesuffix(".slice").split("-")
    if not unit.endswith(".slice") or "/" in unit or ":" in unit or "" in parts:
        raise errors.InvalidArgument(
            f"cgroup_parent {unit!r} is not a slice, as the systemd driver needs"
        )
    return "".join(f"/{'-'.join(parts[: n + 1])}.slice" for n in range(len(parts)))


def posix_basename(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def _rmdir(path: str) -> bool:
    try:
        os.rmdir(path)
    except OSError as e:
        return e.errno == errno.ENOENT
    return True
