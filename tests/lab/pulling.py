# SPDX-License-Identifier: Apache-2.0
"""A puller on a temporary root; its client's blobs can be held up, counted and spoilt."""

import asyncio
import collections
import gzip
import http.client
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from cri_server import snapshots
from cri_server.images import gc, pull, store, tar
from cri_server.images import registry as client
from shim import mounts
from tests.lab import image, registry, tars


class Client(client.Client):
    """The real client, with a gate in front of every blob."""

    def __init__(self, folders: list[Path]) -> None:
        super().__init__(folders, progress_timeout=20.0)
        self.fetched: collections.Counter[str] = collections.Counter()
        self.open = asyncio.Event()
        self.open.set()
        self.held: Callable[[str, str], bool] = lambda domain, digest: True
        self.spoil: Callable[[bytes], bytes] = lambda data: data
        self.waiting = 0
        self.most = 0  # blobs under way at once

    async def blob(self, ref: Any, descriptor: Any, auth: Any = None, **more: Any) -> None:
        """Count, wait for the gate, then fetch."""
        self.fetched[descriptor.digest] += 1
        self.waiting += 1
        self.most = max(self.most, self.waiting)
        try:
            if self.held(ref.domain, descriptor.digest):
                await self.open.wait()
            sink = more.pop("sink")
            await super().blob(ref, descriptor, auth, sink=lambda d: sink(self.spoil(d)), **more)
        finally:
            self.waiting -= 1


class Node:
    """Everything between a registry and a mounted root, below one folder."""

    def __init__(self, root: Path, hosts: Path, *, limits: tar.Limits | None = None) -> None:
        self.root = root
        self.client = Client([hosts])
        self.images = store.Store(root)
        self.layers = snapshots.Snapshots(root)
        self.in_use: set[str] = set()
        self.collector = gc.Collector(self.images, self.layers, in_use=lambda: self.in_use)
        self.puller = pull.Puller(
            client=self.client,
            images=self.images,
            layer_host=self.layers,
            collector=self.collector,
            limits=limits,
        )

    async def close(self) -> None:
        await self.puller.close()
        self.client.close()

    def look(self, image_id: str, folder: Path) -> Path:
        """Mount an image read-only at `folder`."""
        found = self.images.find(image_id)
        assert found is not None
        self.layers.mount_readonly(found.layers, folder)
        return folder

    def leftovers(self) -> list[str]:
        """Return what is in tmp/, layers without an image, and blobs that no image names."""
        needed = {k for i in self.images.list() for k in i.layers}
        blobs = {self.images.blob_path(d) for i in self.images.list() for d in i.blobs}
        return [
            *os.listdir(self.root / "tmp"),
            *(self.layers.layers() - needed),
            *map(str, self.images.blobs() - blobs),
        ]


def unmount_below(folder: Path) -> None:
    for point in mounts.mounts_below(str(folder)):
        mounts.unmount(point)


def layer(*entries: bytes) -> bytes:
    return tars.archive(*entries)


def make(*layers: bytes, **config: Any) -> image.Image:
    """Make an image of uncompressed layers."""
    return image.image(list(layers), {"Cmd": ["/x"], **config})


def put(where: registry.Registry, name: str, tag: str, document: Any, kind: str) -> str:
    """Put any document as a manifest and return its digest."""
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    connection = http.client.HTTPConnection(where.address, timeout=30)
    connection.request("PUT", f"/v2/{name}/manifests/{tag}", body, {"Content-Type": kind})
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    assert answer.status == 201, text
    return image.digest(body)


def push_blobs(where: registry.Registry, name: str, blobs: Iterable[bytes]) -> None:
    """Put blobs without an image."""
    made = {image.digest(b): b for b in blobs}
    holder = image.Image(
        manifest=image._json(
            {
                "schemaVersion": 2,
                "mediaType": image.MANIFEST,
                "config": {"mediaType": image.CONFIG, "digest": next(iter(made)), "size": 1},
                "layers": [],
            }
        ),
        config=b"",
        blobs=made,
    )
    where.push(holder, name, tag="holder")


def packed(data: bytes) -> bytes:
    return gzip.compress(data, 1, mtime=0)
