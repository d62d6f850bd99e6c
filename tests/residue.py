# SPDX-License-Identifier: Apache-2.0
"""What a runtime may leave behind on a host, as a set of lines: take it before and after, and
compare.

    process  27 /usr/bin/…            mentions one of the marks (command line, folder, open files,
    cgroup) socket   /tmp/cri-x/run/…         bound below a mark mount    /run/netns/4be1…
    every mount of this mount namespace netns    4be1…                    every name in /run/netns
    link     veth0a1b (crit77)        every network interface, with its bridge rule     nat -A CNI-…
    4be1…       every iptables rule, both families cgroup   memory/kubepods/4be1…    every folder of
    every hierarchy file     /var/lib/cni/results/…   results of libcni and leases of host-local

Marks (names of temporary folders, networks, cgroup parents, ids of pods) say what is ours. On a
machine that is ours alone (CI) everything that is new counts; elsewhere only lines with a mark do.
Stays behind by design of the plugins, and does not count: the bridge itself, host-local's
bookkeeping and the chains that portmap makes once.
"""

import contextlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator, Set
from pathlib import Path

from tests.lab import cgroups, init, network

NETNS = Path("/run/netns")
ONCE = re.compile(r"-j CNI-HOSTPORT-(DNAT|MASQ)$|^-A CNI-HOSTPORT-(MASQ|SETMARK) ")
BOOKKEEPING = re.compile(r"/(lock|last_reserved_ip\.\d+)$")
FOREIGN = re.compile(r"/(system|user|machine|init)\.(slice|scope)")


def take(marks: Iterable[str] = ()) -> frozenset[str]:
    """Return what is there now."""
    wanted = frozenset(marks)
    parts = (_mounts, _netns, _links, _rules, _cgroups, _files)
    lines = (line for part in parts for line in part())
    return frozenset([*lines, *_processes(wanted), *_sockets(wanted)])


def left(before: Set[str], *, marks: Iterable[str], alone: bool, seconds: float = 5.0) -> list[str]:
    """Return what is there that was not there `before`, once it no longer shrinks to nothing within
    `seconds`.

    With `alone` everything counts that is not plainly somebody else's, otherwise lines with one of
    the `marks`.
    """
    wanted = frozenset(marks)
    deadline = time.monotonic() + seconds
    while True:
        new = sorted(
            line
            for line in take(wanted) - before
            if _has(line, wanted) or (alone and not _of_others(line))
        )
        if not new or time.monotonic() > deadline:
            return new
        time.sleep(0.1)


def of_folders(root: Path, state: Path) -> list[str]:
    """Return what a server without pods keeps in its folders and should not: records, bundles,
    temporary files.
    """
    kept = [root / name for name in ("pods", "containers", "writable", "tmp")]
    kept += [state / name for name in ("pods", "containers")]
    return [f"file {path}" for folder in kept if folder.is_dir() for path in folder.iterdir()]


def _has(line: str, marks: Iterable[str]) -> bool:
    return any(mark in line for mark in marks)


# -- the parts -------------------------------------------------------------------------------------


def _mounts() -> Iterator[str]:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        target = line.split()[4]
        if target != os.fspath(NETNS):  # ip-netns(8) makes it a mount of itself, once
            yield f"mount {target}"


def _netns() -> Iterator[str]:
    if NETNS.is_dir():
        yield from (f"netns {name}" for name in os.listdir(NETNS))


def _links() -> Iterator[str]:
    for link in Path("/sys/class/net").iterdir():
        bridge = link / "brport" / "bridge"
        master = os.readlink(bridge).rpartition("/")[2] if bridge.is_symlink() else ""
        if not (link / "bridge").is_dir():
            yield f"link {link.name} ({master})"


def _rules() -> Iterator[str]:
    for command in ("iptables-save", "ip6tables-save"):
        program = shutil.which(command)
        if program is None:
            continue
        table = ""
        done = subprocess.run([program], capture_output=True, text=True, check=False)
        for line in done.stdout.splitlines():
            table = line[1:] if line.startswith("*") else table
            if line.startswith("-A") and not ONCE.search(line):
                yield f"rule {command.removesuffix('-save')} {table} {line}"


def _cgroups() -> Iterator[str]:
    for mount in cgroups.hierarchies():
        for folder, _, _ in os.walk(mount):
            path = folder.removeprefix(os.fspath(mount))
            if path and not FOREIGN.match(path):
                yield f"cgroup {mount.name}{path}"


def _of_others(line: str) -> bool:
    """Tell whether a line is of a cgroup in which processes are that do not belong to the run: a
    shell that somebody opened meanwhile.
    """
    kind, _, place = line.partition(" ")
    if kind != "cgroup":
        return False
    name, _, path = place.partition("/")
    mount = next(mount for mount in cgroups.hierarchies() if mount.name == name)
    with contextlib.suppress(OSError):
        pids = map(int, (mount / path / "cgroup.procs").read_text().split())
        return any(not init.has_below(pid) for pid in pids)
    return False


def _files() -> Iterator[str]:
    for top in (network.RESULTS, network.LEASES):
        for folder, _, names in os.walk(top):
            paths = (f"{folder}/{name}" for name in names)
            yield from (f"file {path}" for path in paths if not BOOKKEEPING.search(path))


def _processes(marks: Set[str]) -> Iterator[str]:
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) in (os.getpid(), os.getppid()):
            continue
        with contextlib.suppress(OSError):  # it ends while we look
            words = Path("/proc", name, "cmdline").read_bytes().replace(b"\0", b" ")
            text = "\n".join([words.decode(errors="replace"), *_belongings(name)])
            if words and _has(text, marks):
                yield f"process {name} {text[:300]!r}"


def _belongings(pid: str) -> Iterator[str]:
    yield Path("/proc", pid, "cgroup").read_text()
    yield os.readlink(f"/proc/{pid}/cwd")
    for name in os.listdir(f"/proc/{pid}/fd"):
        yield os.readlink(f"/proc/{pid}/fd/{name}")


def _sockets(marks: Set[str]) -> Iterator[str]:
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        path = line.split()[7:]
        if path and _has(path[0], marks):
            yield f"socket {path[0]}"
