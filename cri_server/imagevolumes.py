# SPDX-License-Identifier: Apache-2.0
"""Images as volumes: mounted once for each pod that wants them, read-only, for as long as it lives.

    <state>/pods/<pod id>/images/<hex of the image id>/
        layers.json     what the mount stands on; there before it, and as long as it is
        fs/             the image: an overlay of its layers, nothing of ours in it

The containers of the pod get bind mounts of it, or of a folder in it. A mount outlives the server;
the next one learns from layers.json which layers must not be collected. RemoveImage takes the
record and leaves the mount alone. StopPodSandbox unmounts; what a kill leaves goes with the pod's
folder (`podfiles`), at the latest. Nobody can write to the mount, so a path in it that has been
looked up stays what it was (hazards V39).
"""

import asyncio
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec
import structlog

from cri_server import errors, locks, snapshots, spec, trees
from cri_server.images import store
from cri_server.pb import api_pb2 as api
from shim import linux

log = structlog.get_logger()
OPTIONS = (*spec.IMAGE_OPTIONS, "private")
_IN_ROOT = linux.RESOLVE_IN_ROOT | linux.RESOLVE_NO_MAGICLINKS | linux.RESOLVE_NO_XDEV
_Layers = tuple[str, ...]


class ImageVolumes:
    """All images that are mounted as volumes, by pod."""

    def __init__(self, state_dir: Path, layers: snapshots.Snapshots) -> None:
        """Read what an earlier server has mounted."""
        self._root, self._snapshots = state_dir / "pods", layers
        self._locks = locks.Locks()
        self._mounted = _load(self._root, every=tuple(layers.layers()))

    def in_use(self) -> Iterable[str]:
        """Return the keys of the layers that a mount stands on."""
        return [key for images in self._mounted.values() for ls in images.values() for key in ls]

    async def mount(
        self,
        pod_id: str,
        config: api.ContainerConfig,
        images: Mapping[str, store.Image],
        options: Sequence[str] = (),
        mapped: snapshots.Mapped | None = None,
    ) -> dict[str, str]:
        """Mount what the container wants and is not mounted yet; return folders by
        `spec.source_key`.

        `options` are mount options beside the usual ones: the pod's SELinux label. `mapped` is the
        pod's user namespace, whose root the files then belong to. `config` and `images` are from
        `resolve`; the caller has claimed the layers. Raises CriError with the kubelet's prefix.
        """
        found: dict[str, str] = {}
        for wanted in spec.image_mounts(config):
            with spec.explained(wanted.container_path):
                fs = await self._mount(pod_id, images[wanted.image.image], options, mapped)
                found[spec.source_key(wanted)] = await asyncio.to_thread(
                    _inside, fs, wanted.image_sub_path
                )
        return found

    async def _mount(
        self,
        pod_id: str,
        image: store.Image,
        options: Sequence[str],
        mapped: snapshots.Mapped | None,
    ) -> Path:
        folder = self._folder(pod_id) / image.id.removeprefix("sha256:")
        async with self._locks.held(pod_id):
            self._mounted.setdefault(pod_id, {})[folder.name] = image.layers
            await asyncio.to_thread(self._make, folder, image.layers, options, mapped)
        return folder / "fs"

    def _make(
        self,
        folder: Path,
        layers: _Layers,
        options: Sequence[str],
        mapped: snapshots.Mapped | None,
    ) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        note = folder / "layers.json"
        if not note.exists():
            (folder / "layers.tmp").write_bytes(msgspec.json.encode(layers))
            (folder / "layers.tmp").rename(note)
        self._snapshots.mount_readonly(layers, folder / "fs", (*OPTIONS, *options), mapped)

    async def remove(self, pod_id: str) -> None:
        """Unmount all images of a pod. Idempotent. Raises OSError."""
        async with self._locks.held(pod_id):
            if pod_id in self._mounted:
                await asyncio.to_thread(self._remove, self._folder(pod_id))
                del self._mounted[pod_id]

    def _remove(self, folder: Path) -> None:
        self._snapshots.unmount(folder)
        trees.remove(folder)

    def _folder(self, pod_id: str) -> Path:
        return self._root / pod_id / "images"


def resolve(
    config: api.ContainerConfig, images: store.Store
) -> tuple[api.ContainerConfig, Mapping[str, store.Image]]:
    """Return the config with the ids of its volumes' images in it, and those images by id.

    The id is what a status must show: the kubelet takes it for use of the image (behaviour.md
    §2.5). Raises NotFound, with the kubelet's prefix, for an image that is not here.
    """
    if not spec.image_mounts(config):
        return config, {}
    resolved = api.ContainerConfig()
    resolved.CopyFrom(config)
    found: dict[str, store.Image] = {}
    for mount in spec.image_mounts(resolved):
        with spec.explained(mount.container_path):
            image = _image(mount.image.image, images)
        mount.image.image = mount.image.image_ref = image.id
        found[image.id] = image
    return resolved, found


def _image(wanted: str, images: store.Store) -> store.Image:
    image = images.find(wanted)
    if image is None:
        raise errors.NotFound(f"image {wanted[:200]!r} is not present: pull it first")
    return image


def _inside(fs: Path, path: str) -> str:
    """Return where a folder of the image is, without symlinks. Raises InvalidArgument, OSError."""
    if not path:
        return os.fspath(fs)
    top = os.open(fs, os.O_PATH | os.O_DIRECTORY)
    try:
        fd = linux.openat2(top, path, os.O_PATH, resolve=_IN_ROOT)
    except OSError as e:
        raise errors.InvalidArgument(f"image_sub_path {path[:200]!r}: {e.strerror}") from e
    finally:
        os.close(top)
    try:
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            raise errors.InvalidArgument(f"image_sub_path {path[:200]!r} is not a folder")
        return os.readlink(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)


def _load(root: Path, *, every: _Layers) -> dict[str, dict[str, _Layers]]:
    """Return the layers of each mount that has ever been begun; a note is written by rename.

    A mount whose note cannot be read may stand on any layer, so it is taken to stand on every one.
    """
    found: dict[str, dict[str, _Layers]] = {}
    for note in root.glob("*/images/*/layers.json"):
        try:
            layers = msgspec.json.decode(note.read_bytes(), type=_Layers)
        except (OSError, ValueError, RecursionError) as e:  # msgspec's errors are ValueErrors
            log.error("layers of an image volume unknown", path=str(note), error=str(e))
            layers = every
        found.setdefault(note.parts[-4], {})[note.parent.name] = layers
    return found
