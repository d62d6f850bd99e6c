# SPDX-License-Identifier: Apache-2.0
"""What a runtime's processes weigh, read from /proc.

A runtime is its server (found as the peer of its socket) with all descendants, and every process
that names one of its pods: in its command line, its cgroup, its folders or its sockets (shims are
orphans on purpose). The processes inside containers are left out. Leaves the choice of moments to
the caller.
"""

import contextlib
import os
import re
import socket
import struct
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path

PRIVATE = re.compile(r"^Private_\w+:\s+(\d+) kB$", re.MULTILINE)
PEAK = re.compile(r"^VmHWM:\s+(\d+) kB$", re.MULTILINE)
RESIDENT = re.compile(r"^VmRSS:\s+(\d+) kB$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Weight:
    """KiB: `server` is the server's own resident set, `private` what all processes have for
    themselves.
    """

    server: int
    private: int
    processes: int


def weigh(endpoint: str, *, pods: Set[str], containers: Set[str]) -> Weight:
    """Weigh the runtime behind a unix:// endpoint; `pods` and `containers` are the ids that it has
    up.
    """
    server = server_pid(endpoint)
    ours = {server, *_descendants(server), *_mentioning(pods)} - set(_inside(containers))
    return Weight(
        server=resident(server), private=sum(_private(pid) for pid in ours), processes=len(ours)
    )


@contextlib.contextmanager
def growth(endpoint: str, *, pods: Set[str], containers: Set[str]) -> Iterator[list[float]]:
    """Yield a list that gets, when the block has ended, the MiB by which the runtime's processes
    have grown within it, at their peaks (VmHWM, which writing 5 to clear_refs resets: proc(5)).
    """
    server = server_pid(endpoint)
    ours = {server, *_descendants(server), *_mentioning(pods)} - set(_inside(containers))
    for pid in ours:
        with contextlib.suppress(OSError):  # it has ended
            Path(f"/proc/{pid}/clear_refs").write_text("5")
    before = {pid: resident(pid) for pid in ours}
    grown: list[float] = []
    yield grown
    grown.append(sum(max(0, _peak(pid) - before[pid]) for pid in ours) / 1024)


def server_pid(endpoint: str) -> int:
    """Return the pid of the process that listens on a unix:// endpoint (SO_PEERCRED, unix(7))."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(endpoint.removeprefix("unix://"))
        packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    pid: int = struct.unpack("3i", packed)[0]
    return pid


def _descendants(root: int) -> set[int]:
    parents = {pid: _parent(pid) for pid in _pids()}
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def _mentioning(pods: Set[str]) -> Iterator[int]:
    sockets = _unix_sockets()
    for pid in _pids():
        if pid != os.getpid() and any(pod in text for text in _texts(pid, sockets) for pod in pods):
            yield pid


def _inside(containers: Set[str]) -> Iterator[int]:
    for pid in _pids():
        cgroup = _read(pid, "cgroup")
        if any(container in cgroup for container in containers):
            yield pid


def _texts(pid: int, sockets: dict[str, str]) -> Iterator[str]:
    yield _read(pid, "cmdline")
    yield _read(pid, "cgroup")
    with contextlib.suppress(OSError):
        yield os.readlink(f"/proc/{pid}/cwd")
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            target = os.readlink(f"/proc/{pid}/fd/{name}")
            yield sockets.get(target, target)


def _unix_sockets() -> dict[str, str]:
    """Return "socket:[inode]" → bound path."""
    lines = (line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:])
    return {f"socket:[{fields[6]}]": fields[7] for fields in lines if len(fields) > 7}


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _parent(pid: int) -> int:
    stat = _read(pid, "stat")
    return int(stat.rpartition(")")[2].split()[1]) if stat else 0


def _private(pid: int) -> int:
    return sum(map(int, PRIVATE.findall(_read(pid, "smaps_rollup"))))


def resident(pid: int) -> int:
    """Return the resident memory of a process in KiB."""
    return sum(map(int, RESIDENT.findall(_read(pid, "status"))))


def _peak(pid: int) -> int:
    return sum(map(int, PEAK.findall(_read(pid, "status"))))


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes().decode(errors="replace")
    except OSError:  # it has ended
        return ""
