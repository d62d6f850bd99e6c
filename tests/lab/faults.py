# SPDX-License-Identifier: Apache-2.0
"""Things that go wrong around a server, on demand: an OCI runtime that does odd things, processes
found and ended behind its back.
"""

import contextlib
import json
import os
import stat
from pathlib import Path
from typing import Any

from tests.fakes import cni, kubelet
from tests.lab import server, waiting

ODD = "odd"
HANG = "sleep 1000 & sleep 1000"  # what a verb does that never ends, with a child that does not
_WRAPPER = """#!/bin/sh
here={here}
verb=
for word; do
    case $word in run | exec | update | delete) verb=$word; break ;; esac
done
[ -e $here/$verb.sh ] && . $here/$verb.sh
exec runc "$@"
"""


def handler(folder: Path, **verbs: str) -> dict[str, dict[str, Any]]:
    """Return settings with a handler `odd`: runc, but each verb runs its shell lines first.

    `folder` ($here in the lines) is where they are; `break_` and `mend` change them at any time.
    """
    program = folder / "odd-runc"
    program.write_text(_WRAPPER.format(here=folder))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    break_(folder, **verbs)
    return {"runtimes.odd": {"path": os.fspath(program)}, "runtimes.runc": {"path": "runc"}}


def break_(folder: Path, **verbs: str) -> None:
    """Have the verbs (run, exec, update, delete) do something first from now on."""
    for verb, lines in verbs.items():
        (folder / f"{verb}.sh").write_text(lines + "\n")


def mend(folder: Path) -> None:
    """Have the runtime be as it should be."""
    for file in folder.glob("*.sh"):
        file.unlink()


def network(plugins: cni.Fakes) -> dict[str, Any]:
    """Return the `[network]` settings of a server that uses fake plugins."""
    return {
        "conf_dir": os.fspath(plugins.net),
        "bin_dirs": [os.fspath(plugins.bin)],
        "cache_dir": os.fspath(plugins.cache),
    }


def hanging(folder: Path) -> cni.Fakes:
    """Return fake plugins whose only one, `hanging`, never answers an ADD."""
    plugins = cni.Fakes(folder)
    plugins.install("hanging", ADD=cni.HANG)
    plugins.configure("hanging")
    return plugins


def alive(pid: int) -> bool:
    """Tell whether a process exists that has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def children(pid: int) -> list[int]:
    """Return the children of a process."""
    text = "".join(f.read_text() for f in Path(f"/proc/{pid}/task").glob("*/children"))
    return [int(word) for word in text.split()]


def descriptors(pid: int) -> list[str]:
    """Return what a process has open."""
    found = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed while we look
            found.append(os.readlink(f"/proc/{pid}/fd/{name}"))
    return sorted(found)


def name_of(pid: int) -> str:
    """Return what a process calls itself."""
    return Path(f"/proc/{pid}/comm").read_text().strip()


def processes(*words: str) -> list[int]:
    """Return the processes that have all these words, in this order, in their command line."""
    wanted = "\0".join(words).encode()
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            if wanted in Path("/proc", name, "cmdline").read_bytes():
                found.append(int(name))
        except OSError:  # it has ended
            continue
    return found


def pid_of(client: kubelet.Kubelet, container: str) -> int:
    """Return the pid of a running container's first process."""
    info = client.status_response(container, verbose=True).info["info"]
    return int(json.loads(info)["pid"])


def shim_of(site: server.Site, pod_id: str) -> int:
    """Return the pid of a pod's shim: the one that listens on its socket."""
    path = os.fspath(site.state / "pods" / pod_id / "shim.sock")

    def only() -> int | None:  # a child of it that is about to become a program has it open too
        found = listeners(path)
        return found[0] if len(found) == 1 else None

    return waiting.until(only, f"one process listens on {path}")


def listeners(path: str) -> list[int]:
    """Return the processes that listen on sockets of this name, also if it has gone."""
    lines = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    inodes = {
        f"socket:[{line[6]}]" for line in lines if line[7:] == [path] and line[3] == "00010000"
    }
    pids = map(int, filter(str.isdigit, os.listdir("/proc")))
    return [pid for pid in pids if _has(pid, inodes)]


def _has(pid: int, files: set[str]) -> bool:
    try:
        folder = f"/proc/{pid}/fd"
        return any(os.readlink(f"{folder}/{name}") in files for name in os.listdir(folder))
    except OSError:  # it has ended
        return False
