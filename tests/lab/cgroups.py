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
from collections.abc import Iterator, Mapping
from pathlib import Path

from shim import linux
from tests.lab import waiting

TOP = Path("/sys/fs/cgroup")
HUGETLB = TOP / "hugetlb"
NO_LIMIT = str(2**63 - 4096)  # what v1 says of memory
MOUNTINFO = Path("/proc/self/mountinfo")


def hierarchies() -> list[Path]:
    """Return the mount points of all cgroup hierarchies."""
    lines = (line.split() for line in MOUNTINFO.read_text().splitlines())
    return [Path(f[4]) for f in lines if f[f.index("-") + 1] in ("cgroup", "cgroup2")]


@contextlib.contextmanager
def hugetlb() -> Iterator[None]:
    """Mount the v1 hierarchy of hugepages for the block, where nobody has; crun refuses a hybrid
    host on which cgroup v2 holds a controller, and this is the one that is left over.
    """
    mounted = not os.path.ismount(HUGETLB)
    before = _number_of("hugetlb")
    if mounted:
        HUGETLB.mkdir(exist_ok=True)
        linux.mount("cgroup", os.fspath(HUGETLB), "cgroup", 0, "hugetlb")
    yield
    if mounted:
        try:
            waiting.until(lambda: _number_of("hugetlb") <= before, "our cgroups are gone")
        finally:
            linux.umount2(os.fspath(HUGETLB))
            HUGETLB.rmdir()


def _number_of(controller: str) -> int:
    """Return how many cgroups a controller has, with removed ones that the kernel still frees:
    with one of these a v1 hierarchy outlives its umount, unseen, and v2 does not get the
    controller back.
    """
    lines = map(str.split, Path("/proc/cgroups").read_text().splitlines())
    return next(int(words[2]) for words in lines if words[0] == controller)


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


# -- the limits of a container, in the words of v1 -------------------------------------------------


def limits(parent: str, container: str, expected: Mapping[str, str]) -> dict[str, str]:
    """Return what the files of a container's cgroup say, by the names in `expected`: those of v1.

    On v2 they are read from the files that took their place. CPU shares have no exact counterpart
    there: the expected ones are returned when the weight is that of these.
    """
    return {file: _limit(parent, container, file, value) for file, value in expected.items()}


def place(parent: str, container: str, controller: str) -> Path:
    """Return a container's folder in the hierarchy of a controller, or the only one."""
    name = f"cri-server-{container}.scope" if ".slice" in parent else container
    top = TOP if is_v2() else TOP / controller
    return top / parent.strip("/") / name


def _limit(parent: str, container: str, file: str, expected: str) -> str:
    folder = place(parent, container, file.partition(".")[0])
    unified = (folder / "cgroup.controllers").exists()
    return _unified(folder, file, expected) if unified else _read(folder, file)


def _read(folder: Path, file: str) -> str:
    return (folder / file).read_text().strip()


def _unified(folder: Path, file: str, expected: str) -> str:
    if file == "cpu.shares":
        weight = _read(folder, "cpu.weight")
        return expected if weight == _weight(int(expected)) else f"the weight {weight}"
    if file.startswith("cpu.cfs_"):
        quota, period = _read(folder, "cpu.max").split()
        return period if "period" in file else quota.replace("max", "-1")
    if file == "memory.memsw.limit_in_bytes":
        memory, swap = (_read(folder, f"memory.{kind}max") for kind in ("", "swap."))
        return NO_LIMIT if "max" in (memory, swap) else str(int(memory) + int(swap))
    found = _read(folder, file.replace(".limit_in_bytes", ".max"))
    return NO_LIMIT if found == "max" else found


def _weight(shares: int) -> str:
    """Return what runc 1.1 and crun 1.8 make of shares (2 to 262144) for v2 (1 to 10000)."""
    return str(1 + (shares - 2) * 9999 // 262142)
