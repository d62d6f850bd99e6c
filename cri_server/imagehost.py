# SPDX-License-Identifier: Apache-2.0
"""What the ImageService does: images as CRI sees them, over the store, the puller and the
snapshots.

RemoveImage frees its layers before it answers, except those that a container still stands on: the
kubelet's garbage collector counts on the space (behaviour.md §2.5).
"""

import time
from collections.abc import Sequence

import msgspec

from cri_server import errors, snapshots
from cri_server.images import flights, gc, ingest, pull, store
from cri_server.pb import api_pb2 as api

MAX_DIGITS = 10  # of a number that may be a uid; int() refuses thousands


class ImageHost:
    """Pull, status, list, remove, usage."""

    def __init__(
        self,
        *,
        puller: pull.Puller,
        image_store: store.Store,
        layers: snapshots.Snapshots,
        collector: gc.Collector,
    ) -> None:
        self._puller, self._store = puller, image_store
        self._layers, self._collector = layers, collector

    async def pull(self, wanted: str, auth: api.AuthConfig | None) -> str:
        """Pull an image and return its id; always asks the registry. Raises as `Puller.pull`."""
        if not wanted:
            raise errors.InvalidArgument("image.image is missing")
        return await self._puller.pull(wanted, auth)

    async def status(
        self, wanted: str, *, verbose: bool
    ) -> tuple[api.Image | None, dict[str, str]]:
        """Return an image, None when it is not there: never NotFound (CRI ImageStatus)."""
        if not wanted:
            raise errors.InvalidArgument("image.image is missing")
        image = self._store.find(wanted)
        if image is None:
            return None, {}
        return _message(image), {"info": await self._info(image)} if verbose else {}

    async def _info(self, image: store.Image) -> str:
        """Return what `crictl inspecti` shows, in containerd's shape; `imageSpec` is the config."""
        config = await flights.in_thread(self._store.read_blob, image.id)
        whole = config is not None and ingest.matches(config, image.id)
        info = {
            "chainID": f"sha256:{image.layers[-1]}" if image.layers else "",
            "imageSpec": msgspec.Raw(config if config is not None and whole else b"null"),
        }
        return msgspec.json.encode(info).decode(errors="replace")

    def list(self, wanted: api.ImageFilter) -> Sequence[api.Image]:
        """Return all images, or the one that the filter names."""
        if wanted.image.image:
            found = self._store.find(wanted.image.image)
            return [_message(found)] if found else []
        return [_message(image) for image in self._store.list()]

    async def remove(self, wanted: str) -> None:
        """Remove an image with all names and free what nothing needs any more. OK when unknown."""
        if not wanted:
            raise errors.InvalidArgument("image.image is missing")
        await self._collector.remove(wanted)

    def fs_info(self) -> api.ImageFsInfoResponse:
        """Return what images and writable layers take, in both lists: they share a file system."""
        used = self._layers.fs_usage()
        filesystem = api.FilesystemUsage(
            timestamp=time.time_ns(),
            fs_id=api.FilesystemIdentifier(mountpoint=str(self._layers.mountpoint)),
            used_bytes=api.UInt64Value(value=used.bytes),
            inodes_used=api.UInt64Value(value=used.inodes),
        )
        return api.ImageFsInfoResponse(
            image_filesystems=[filesystem], container_filesystems=[filesystem]
        )


def _message(image: store.Image) -> api.Image:
    message = api.Image(
        id=image.id,
        repo_tags=image.repo_tags,
        repo_digests=image.repo_digests,
        size=image.size,
        spec=api.ImageSpec(image=next(iter(image.repo_tags), image.id)),
        pinned=image.pinned,
    )
    _set_user(message, image.config.user)
    return message


def _set_user(message: api.Image, user: str) -> None:
    """Set uid for a number, else username, from the part before ":" (CRI Image.uid, .username)."""
    name = user.partition(":")[0]
    number = name.isascii() and name.isdigit() and len(name) <= MAX_DIGITS
    if number and int(name) < 1 << 31:
        message.uid.value = int(name)
    else:
        message.username = name
