# SPDX-License-Identifier: Apache-2.0
"""From a layer's blob to a committed layer: the server's side of the worker process.

    staged ──► worker "apply" ──► folder below tmp/, diff id checked ──► commit: settle, rename
                (any order, several at once)                             (those below are there)

A layer whose commit does not come, because something failed or nobody wants it any more, is removed
with its folder; a crash leaves the folder to `gc`. The worker can be killed at any time and is,
when it stands still.
"""

import contextlib
import dataclasses
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import structlog

from cri_server import errors, snapshots, trees
from cri_server.images import flights, ingest, settle, tar, workers

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True, slots=True)
class Staged:
    """An unpacked layer that is not committed yet; `pending` is what it still needs from below."""

    folder: Path
    layer: snapshots.Layer
    pending: str  # "", "root", "all"


class Layers:
    """Makes layers of `snapshots`."""

    def __init__(self, layers: snapshots.Snapshots, *, limits: tar.Limits) -> None:
        self._snapshots, self._limits = layers, limits

    @contextlib.asynccontextmanager
    async def staged(
        self,
        blob: AbstractAsyncContextManager[Path],
        diff_id: str,
        below: Sequence[str],
        *,
        pool: workers.Workers,
    ) -> AsyncIterator[Staged]:
        """Have the content of a blob unpacked for the block; what is not committed then is removed.

        `below` are the keys under it, bottom first; they need not be there yet. Raises
        InvalidArgument for a layer that we refuse, ResourceExhausted for a bound or a full disk,
        Unknown for a wrong diff id.
        """
        folder = self._snapshots.staging_path()
        try:
            await flights.in_thread(self._snapshots.stage, folder)
            async with blob as path:
                answer = await _work(pool, self._job(path, folder, below))
            if answer["diff_id"] != diff_id:
                raise errors.Unknown(f"the layer unpacks to {answer['diff_id']}, not to {diff_id}")
            if answer["dropped"]:
                log.warning(
                    "files of a layer lack attributes: the file system does not take them",
                    layer=diff_id,
                    attributes=answer["dropped"],
                )
            yield _staged(folder, answer)
        finally:
            await flights.in_thread(trees.remove, folder)

    def _job(self, blob: Path, folder: Path, below: Sequence[str]) -> dict[str, Any]:
        known = all(self._snapshots.layer(key) for key in below)
        return {
            "verb": "apply",
            "blob": str(blob),
            "into": str(folder),
            "limits": asdict(self._limits),
            "lowers": self._lowers(below) if known else None,
        }

    async def commit(
        self, staged: Staged, key: str, below: Sequence[str], *, pool: workers.Workers
    ) -> None:
        """Make a staged layer the layer `key`; the layers `below` are there by now."""
        lowers, layer = self._lowers(below), staged.layer
        if staged.pending == "all":
            job = {"verb": "settle", "into": str(staged.folder), "lowers": lowers}
            layer = _grown(layer, await _work(pool, job))
        elif staged.pending == "root" and lowers:
            await flights.in_thread(_adopt_root, staged.folder / "fs", lowers[0])
        await flights.in_thread(self._snapshots.commit, staged.folder, key, layer)

    def _lowers(self, below: Sequence[str]) -> Sequence[str]:
        return self._snapshots.lowerdirs(below) if below else ()


async def _work(pool: workers.Workers, job: Mapping[str, Any]) -> dict[str, Any]:
    answer = await pool.run(job)
    if "error" in answer:
        raise _failure(answer)
    return answer


def _staged(folder: Path, answer: Mapping[str, Any]) -> Staged:
    layer = snapshots.Layer(
        diff_id=answer["diff_id"],
        bytes=answer["bytes"],
        inodes=answer["inodes"],
        opaque_root=answer["opaque_root"],
    )
    return Staged(folder=folder, layer=layer, pending=answer["pending"])


def _grown(layer: snapshots.Layer, more: Mapping[str, Any]) -> snapshots.Layer:
    """Return a layer with what settling has copied into it."""
    size, inodes = layer.bytes + more["bytes"], layer.inodes + more["inodes"]
    return dataclasses.replace(layer, bytes=size, inodes=inodes)


def _failure(answer: Mapping[str, Any]) -> errors.CriError:
    """Turn what the worker said into the error that the caller can act on."""
    text, code = str(answer["error"]), int(answer["errno"])
    if answer["kind"] == "malformed":
        return errors.InvalidArgument(f"layer refused: {text}")
    if answer["kind"] == "too big":
        return errors.ResourceExhausted(f"layer refused: {text}")
    return ingest.host_failure(OSError(code, text), "layer not unpacked")


def _adopt_root(fs: Path, lower: str) -> None:
    fd = os.open(fs, os.O_RDONLY | os.O_DIRECTORY)
    try:
        settle.adopt_root(fd, lower)
    finally:
        os.close(fd)
