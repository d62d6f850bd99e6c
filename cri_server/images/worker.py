# SPDX-License-Identifier: Apache-2.0
"""The process that unpacks one layer: `python -I -m cri_server.images.worker`, one job, then it
ends.

A job is a JSON object on standard input, the answer one on standard output:

    {"verb": "apply", "blob": PATH, "into": PATH, "limits": {...}, "lowers": [PATH, ...] | null}
        ──► {"diff_id": ..., "bytes": N, "inodes": N, "opaque_root": B, "pending": "" | "root" |
        "all"}
    {"verb": "settle", "into": PATH, "lowers": [PATH, ...]}
        ──► {}
    and for a failure
        ──► {"error": TEXT, "kind": "malformed" | "too big" | "host", "errno": N}

`into` is a staging folder with `fs/` in it. With `lowers` null the layers below are not there yet;
what needs them is kept in `needs.json` for a later "settle", except where it is only the root's
attributes, which is the usual case and needs no process. This one is its own group, has bounds on
memory and file size, and may be killed at any time: what it has made lies below tmp/ and is removed
by whoever asked.
"""

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

from cri_server.images import settle, stream, tar, unpack

MEMORY = 1 << 30  # bytes of address space


def main() -> int:
    """Do the job on standard input."""
    job = json.load(sys.stdin)
    try:
        _confine(job)
        answer = _apply(job) if job["verb"] == "apply" else _settle(job)
    except tar.Malformed as e:
        answer = {"error": str(e), "kind": "malformed", "errno": 0}
    except (tar.TooBig, MemoryError) as e:
        answer = {"error": str(e) or "out of memory", "kind": "too big", "errno": 0}
    except OSError as e:
        answer = {"error": e.strerror or str(e), "kind": "host", "errno": e.errno or 0}
    json.dump(answer, sys.stdout)
    return 0


def _confine(job: dict[str, Any]) -> None:
    os.umask(0)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if "limits" in job:
        size = job["limits"]["bytes"]
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def _apply(job: dict[str, Any]) -> dict[str, Any]:
    """Unpack, and settle at once where the layers below are known."""
    into, limits = Path(job["into"]), tar.Limits(**job["limits"])
    root = os.open(into / "fs", os.O_RDONLY | os.O_DIRECTORY)
    with open(job["blob"], "rb", buffering=0) as blob, stream.ahead(stream.inflate(blob)) as chunks:
        source = stream.Stream(chunks, limit=limits.bytes)
        outcome = unpack.Unpacker(root, limits).apply(tar.Reader(source))
        diff_id = source.drain()
    pending = "all" if any(outcome.folders) or outcome.links else "root" if outcome.folders else ""
    if pending == "all" or (pending and job["lowers"] is not None):
        needs = {"folders": outcome.folders, "links": outcome.links}
        (into / "needs.json").write_text(json.dumps(needs), encoding="ascii")
    if pending and job["lowers"] is not None:
        _settle(job)
        pending = ""
    return {
        "diff_id": diff_id,
        "bytes": outcome.usage.bytes,
        "inodes": outcome.usage.inodes,
        "opaque_root": outcome.opaque_root,
        "pending": pending,
    }


def _settle(job: dict[str, Any]) -> dict[str, Any]:
    into = Path(job["into"])
    needs = json.loads((into / "needs.json").read_text(encoding="ascii"))
    root = os.open(into / "fs", os.O_RDONLY | os.O_DIRECTORY)
    links = [(name, target) for name, target in needs["links"]]
    settle.settle(root, job["lowers"], folders=needs["folders"], links=links)
    return {}


if __name__ == "__main__":
    sys.exit(main())
