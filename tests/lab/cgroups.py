# SPDX-License-Identifier: Apache-2.0
"""A parent for the pods' cgroups that belongs to one run, as the kubelet's `kubepods` belongs to
the kubelet.

Works on cgroup v1, hybrid and v2: the same path below every mounted hierarchy. Who puts pods below
it removes them first; `remove` takes away empty folders only. With the systemd driver the parent is
a slice, and systemd removes it.
"""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

MOUNTINFO = Path("/proc/self/mountinfo")


def hierarchies() -> list[Path]:
    """Return the mount points of all cgroup hierarchies."""
    lines = (line.split() for line in MOUNTINFO.read_text().splitlines())
    return [Path(f[4]) for f in lines if f[f.index("-") + 1] in ("cgroup", "cgroup2")]


def below(parent: str) -> Iterator[Path]:
    """Yield every folder below `parent` ("/name") in every hierarchy, children before their
    parents.
    """
    for mount in hierarchies():
        top = mount / parent.lstrip("/")
        for folder, _, _ in os.walk(top, topdown=False):
            yield Path(folder)


def parent(name: str, driver: str) -> str:
    """Return the cgroup parent of that name for a driver, "cgroupfs" or "systemd"."""
    return f"/{name}.slice" if driver == "systemd" else f"/{name}"


def remove(parent: str) -> None:
    """Remove `parent` and what is below it; a cgroup with processes in it stays."""
    if parent.endswith(".slice"):
        subprocess.run(["systemctl", "stop", os.path.basename(parent)], check=True)
    for folder in below(parent):
        with contextlib.suppress(OSError):
            folder.rmdir()


def of_process(pid: int) -> dict[str, Path]:
    """Return the cgroup of a process in every hierarchy: by v1 controller, and "" for v2."""
    mounts = {}
    for line in MOUNTINFO.read_text().splitlines():
        words = line.split()
        kind, options = words[words.index("-") + 1], words[-1].split(",")
        if kind == "cgroup2":
            mounts[""] = Path(words[4])
        elif kind == "cgroup":
            mounts |= {name: Path(words[4]) for name in options}
    found = {}
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        for name in controllers.split(","):
            if name in mounts:
                found[name] = mounts[name] / path.lstrip("/")
    return found


def is_v2() -> bool:
    """Tell whether cgroup v2 is all there is."""
    lines = (line.split() for line in MOUNTINFO.read_text().splitlines())
    return not any(f[f.index("-") + 1] == "cgroup" for f in lines)
