# SPDX-License-Identifier: Apache-2.0
"""The process that unpacks layers: `python -I -m cri_server.images.worker`.

Each line of standard input is a job, a JSON object; for each there is one line on standard output:

    {"verb": "apply", "blob": PATH, "into": PATH, "limits": {...}, "lowers": [PATH, ...] | null}
        ──► {"diff_id": ..., "bytes": N, "inodes": N, "opaque_root": BOOL, "pending": WHAT,
             "dropped": [NAME, ...]}
    {"verb": "settle", "into": PATH, "lowers": [PATH, ...]}
        ──► {"bytes": N, "inodes": N} that came in addition
    and for a failure
        ──► {"error": TEXT, "kind": "malformed" | "too big" | "host", "errno": N}

`into` is a staging folder with `fs/` in it. With `lowers` null the layers below are not there yet,
and WHAT is pending: "", "root" for the root's attributes alone, which is the usual case and needs
no process, or "all", kept in `needs.json` for a later "settle". This process has bounds on memory
and file size, ends with its input or its parent, and may be killed at any time: what it has made
lies below tmp/ and is removed by whoever asked for it.
"""

import contextlib
import json
import os
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cri_server.images import settle, stream, tar, unpack
from shim import linux

MEMORY = 1 << 30  # bytes of address space
MAX_DROPPED = 20  # names of attributes that are told


def main() -> int:
    """Do the jobs on standard input, one after the other."""
    linux.set_pdeathsig(signal.SIGKILL)
    os.umask(0)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line))), flush=True)
    return 0


def _answer(job: dict[str, Any]) -> dict[str, Any]:
    try:
        return _apply(job) if job["verb"] == "apply" else _settle(job)
    except tar.Malformed as e:
        return {"error": str(e), "kind": "malformed", "errno": 0}
    except (tar.TooBig, MemoryError) as e:
        return {"error": str(e) or "out of memory", "kind": "too big", "errno": 0}
    except OSError as e:
        return {"error": e.strerror or str(e), "kind": "host", "errno": e.errno or 0}


def _apply(job: dict[str, Any]) -> dict[str, Any]:
    """Unpack, and settle at once where the layers below are known."""
    into, limits = Path(job["into"]), tar.Limits(**job["limits"])
    resource.setrlimit(resource.RLIMIT_FSIZE, (limits.bytes, resource.RLIM_INFINITY))
    with _opened(into / "fs") as root:
        outcome, diff_id = _unpack(Path(job["blob"]), root, limits)
    pending = "all" if any(outcome.folders) or outcome.links else "root" if outcome.folders else ""
    if pending == "all" or (pending and job["lowers"] is not None):
        needs = {"folders": outcome.folders, "links": outcome.links}
        (into / "needs.json").write_text(json.dumps(needs), encoding="ascii")
    more = {"bytes": 0, "inodes": 0}
    if pending and job["lowers"] is not None:
        more, pending = _settle(job), ""
    return {
        "diff_id": diff_id,
        "bytes": outcome.usage.bytes + more["bytes"],
        "inodes": outcome.usage.inodes + more["inodes"],
        "opaque_root": outcome.opaque_root,
        "pending": pending,
        "dropped": [ascii(name)[1:-1] for name in sorted(outcome.dropped)[:MAX_DROPPED]],
    }


def _unpack(blob: Path, root: int, limits: tar.Limits) -> tuple[unpack.Outcome, str]:
    with blob.open("rb", buffering=0) as file, stream.ahead(stream.inflate(file)) as chunks:
        source = stream.Stream(chunks, limit=limits.bytes)
        outcome = unpack.Unpacker(root, limits).apply(tar.Reader(source))
        return outcome, source.drain()


def _settle(job: dict[str, Any]) -> dict[str, int]:
    into = Path(job["into"])
    needs = json.loads((into / "needs.json").read_text(encoding="ascii"))
    links = [(name, target) for name, target in needs["links"]]
    with _opened(into / "fs") as root:
        more = settle.settle(root, job["lowers"], folders=needs["folders"], links=links)
    return {"bytes": more.bytes, "inodes": more.inodes}


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[int]:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


if __name__ == "__main__":
    sys.exit(main())
