# SPDX-License-Identifier: Apache-2.0
"""What nothing refers to is removed: layers and blobs that no image, no container and no pull
needs.

Called at start, when a crash may have left things; by RemoveImage, whose caller counts on the
space; after a pull that failed; and when a container goes whose image went before it. An image that
has lost a layer is none: at start its record goes too, so that the next pull heals it. A layer that
a container stands on stays even if nobody can read what is known of it. A pull claims what it is
about to rely on before it looks whether it is there; choosing rubbish and claiming exclude each
other, so a layer never vanishes between "it is there" and the record that needs it. Removing needs
no free space, goes on after a failure, and what stays is tried again at the next start.
"""

import asyncio
import collections
import contextlib
from collections.abc import AsyncIterator, Callable, Collection, Iterable
from pathlib import Path

import structlog

from cri_server import snapshots, trees
from cri_server.images import flights, store

log = structlog.get_logger()


class Collector:
    """Knows who needs what. `in_use` gives the layer keys of all containers that exist."""

    def __init__(
        self,
        images: store.Store,
        layers: snapshots.Snapshots,
        *,
        in_use: Callable[[], Iterable[str]],
    ) -> None:
        self._images, self._snapshots, self._in_use = images, layers, in_use
        self._claims: collections.Counter[str] = collections.Counter()
        self._lock = asyncio.Lock()
        self._owing = False  # layers are there that no image has, for the sake of somebody else

    @contextlib.asynccontextmanager
    async def claim(self, keys: Collection[str]) -> AsyncIterator[None]:
        """Protect layers (by key) and blobs (by digest) for the block, there or not."""
        async with self._lock:
            self._claims.update(keys)
        try:
            yield
        finally:
            self._claims.subtract(keys)
            self._claims = +self._claims

    async def remove(self, wanted: str) -> None:
        """Remove an image, all its names, and what only it needed (CRI RemoveImage); unknown is
        fine."""
        image = await flights.in_thread(self._images.remove, wanted)
        if image is not None:
            log.info("image removed", image=image.id, names=image.repo_tags or image.repo_digests)
        await self.collect()

    async def start(self) -> None:
        """Remove what a crash left. Only before the first pull: everything in tmp/ goes."""
        await flights.in_thread(_remove_all, self._snapshots.strays(set(self._in_use())))
        await flights.in_thread(self._forget_broken)
        await self.collect()

    def _forget_broken(self) -> None:
        for image in self._images.list():
            missing = [key for key in image.layers if self._snapshots.layer(key) is None]
            if missing:
                log.error("image has lost layers: pull it again", image=image.id, layers=missing)
                self._images.remove(image.id)

    async def collect_owed(self) -> None:
        """Collect after a container has gone, if some image went before its containers did.

        Mostly none did, and this costs nothing. A failure is logged: the container is gone.
        """
        if self._owing:
            try:
                await self.collect()
            except OSError as e:
                log.warning("layers not collected", error=str(e))

    async def collect(self) -> None:
        """Remove what nothing refers to; its space is free when this returns."""
        async with self._lock:
            # Claims first: a pull gives up its claim only when its record is there.
            needed = {*self._claims, *self._in_use()}
            rubbish = await flights.in_thread(self._set_aside, needed)
        await flights.in_thread(_remove_all, rubbish)

    def _set_aside(self, needed: set[str]) -> list[Path]:
        """Take layers and blobs without an owner out of their place; return what is left to
        remove."""
        of_images = {key for image in self._images.list() for key in (*image.layers, *image.blobs)}
        self._owing = not self._snapshots.layers().isdisjoint(needed - of_images)
        needed |= of_images
        _remove_all(self._images.blobs() - {self._images.blob_path(d) for d in needed if ":" in d})
        rubbish: list[Path] = []
        for key in self._snapshots.layers() - needed:
            try:
                rubbish.append(self._snapshots.set_aside(key))
            except OSError as e:
                log.warning("layer not removed", layer=key, error=str(e))
        return rubbish


def _remove_all(paths: Iterable[Path]) -> None:
    for path in paths:
        try:
            trees.remove(path)
        except OSError as e:
            log.warning("rubbish not removed", path=str(path), error=str(e))
