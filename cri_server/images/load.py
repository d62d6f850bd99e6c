# SPDX-License-Identifier: Apache-2.0
"""Images that come from a file, and further names for those that are here.

    archive ──► a puller of its own, with the archive in a registry's place ──► the store

So an import is a pull in all but where the bytes come from: verified, unpacked in worker processes,
on record by rename when it is whole, collected when it is not. Between two imports, or an import
and a pull, nothing is shared but what is there already; both make the same layers.
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import structlog

from cri_server import errors, snapshots
from cri_server.images import archive, flights, gc, ingest, pull, reference, store

log = structlog.get_logger()
PARALLEL = 3  # blobs copied at once


class Loader:
    """Imports archives into a store and tags what is in it."""

    def __init__(
        self, *, images: store.Store, layer_host: snapshots.Snapshots, collector: gc.Collector
    ) -> None:
        self._images, self._layers, self._collector = images, layer_host, collector

    async def load(self, path: str, name: str = "") -> Sequence[tuple[str, str]]:
        """Bring the images of an archive here; return the id of each of its names.

        `path` is of this machine; the archive is not compressed. With `name` its one image is
        called that, whatever the archive calls it. Images before one that fails stay.

        Raises InvalidArgument, NotFound and ResourceExhausted like `archive.open_archive`, Unknown
        for wrong content, Internal for what the host's file system said.
        """
        if not os.path.isabs(path):
            raise errors.InvalidArgument(f"path must be absolute: {path[:200]!r}")
        try:
            opened = await flights.in_thread(archive.open_archive, Path(path), name)
        except OSError as e:
            raise ingest.host_failure(e, f"{path} not read") from e
        puller = self._puller(opened)
        try:
            made = [(each, await puller.pull(each)) for each in opened.images]
        finally:
            await puller.close()
            opened.close()
        log.info("archive imported", path=path, images=len(made))
        return made

    async def tag(self, wanted: str, name: str) -> None:
        """Give an image that is here another name, which leaves the image that had it.

        Raises NotFound; InvalidArgument for a name with a digest, which is not ours to give.
        """
        tagged = reference.parse(name).tagged
        if tagged is None:
            raise errors.InvalidArgument(f"{name[:300]!r} has a digest: a tag is wanted")
        image = self._find(wanted)
        async with self._collector.claim((*image.layers, *image.blobs)):
            image = self._find(wanted)  # now it cannot go
            named = dataclasses.replace(image, repo_tags=(tagged,), repo_digests=())
            await flights.in_thread(self._images.put, named)

    def _find(self, wanted: str) -> store.Image:
        image = self._images.find(wanted)
        if image is None:
            raise errors.NotFound(f"image {wanted[:300]!r} is not here")
        return image

    def _puller(self, opened: archive.Archive) -> pull.Puller:
        return pull.Puller(
            client=opened,
            images=self._images,
            layer_host=self._layers,
            collector=self._collector,
            parallel=PARALLEL,
        )
