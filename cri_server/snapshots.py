# SPDX-License-Identifier: Apache-2.0
"""Layer folders, and the writable layers of containers on top of them.

    <root>/layers/<chain id>/fs/          one unpacked layer, as overlayfs wants it
                             layer.json   what is known of it; without it the folder is not a layer
           writable/<container id>/{fs,work}, and volumes/ where the image has any
           empty/                         the layer of an image that has none
           tmp/                           what is being made or removed

A layer is keyed by the chain id of the OCI image-spec, which covers the layers below too: a layer
takes the attributes of folders that it does not contain from them. Images that share a beginning
share these folders. A layer appears and disappears by one rename, so a crash leaves it whole, or
leaves rubbish in tmp/ that `images.gc` removes. Every removal is idempotent and works on a full
disk.

Mounts are made by the callers' word and are not remembered here. Writable layers are mounted
"volatile": they never outlive a boot (design.md §4), and without it every unmount would sync the
whole file system. Sizes are counters and cached measurements: no request waits for a walk.
"""

import asyncio
import contextlib
import dataclasses
import errno
import os
import secrets
import stat
import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import structlog

from cri_server import errors, idmap, spec, trees
from shim import mounts

log = structlog.get_logger()
Usage = trees.Usage


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """What is known of an unpacked layer; sizes as on this disk."""

    diff_id: str
    bytes: int
    inodes: int
    opaque_root: bool = False  # hides all layers below it


@dataclass(frozen=True, kw_only=True, slots=True)
class Overlay:
    """The folders of one container's root, the topmost layer first."""

    lowerdirs: tuple[str, ...]
    upper: str
    work: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Mapped:
    """Whose files a root shows: the pinned user namespace and what it maps."""

    userns: str
    ids: spec.IdMap


class Snapshots:
    """All layers and writable layers below one root. Methods block; call them in a thread."""

    def __init__(self, root: Path) -> None:
        """Make the folders that are missing and read what is known of the layers."""
        self.root = root
        self._layers_dir, self._writable = root / "layers", root / "writable"
        self._tmp, self._empty = root / "tmp", root / "empty"
        for folder in (root, self._layers_dir, self._writable, self._tmp):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._empty.mkdir(mode=0o755, exist_ok=True)
        self._layers = _load(self._layers_dir)
        self._committing = threading.Lock()
        self._usage: dict[str, Usage] = {}
        self._other = Usage()
        self._volatile: tuple[str, ...] = ("volatile",)

    @property
    def mountpoint(self) -> Path:
        """A path on the file system that holds everything (CRI FilesystemIdentifier)."""
        return self.root

    @property
    def read_only(self) -> tuple[Path, ...]:
        """The folders of which containers only read, through their overlays, once it is made."""
        return (self._layers_dir, self._empty, self._tmp)

    # ---- layers

    def layer(self, key: str) -> Layer | None:
        """Return what is known of a layer, None when it is not there."""
        return self._layers.get(key)

    def layers(self) -> frozenset[str]:
        """Return the keys of all layers."""
        return frozenset(self._layers)

    def fs(self, key: str) -> Path:
        """Return the folder with the content of a layer."""
        return self._layers_dir / key / "fs"

    def staging_path(self) -> Path:
        """Return a name for a layer that is not complete; `stage` makes it."""
        return self._tmp / f"layer-{secrets.token_hex(8)}"

    def stage(self, folder: Path) -> None:
        """Make a folder for a layer that is not complete, with an empty fs/ in it."""
        folder.mkdir(mode=0o700)
        (folder / "fs").mkdir()
        (folder / "fs").chmod(0o755)  # whatever our umask is

    def commit(self, staging: Path, key: str, layer: Layer) -> None:
        """Make a staged folder the layer `key`; if that is there already, it stays and this one
        goes."""
        (staging / "needs.json").unlink(missing_ok=True)
        (staging / "layer.json").write_bytes(msgspec.json.encode(layer))
        with self._committing:
            if key not in self._layers:
                self._place(staging, self._layers_dir / key)
                self._layers[key] = layer
        trees.remove(staging)

    def _place(self, staging: Path, target: Path) -> None:
        """Give a layer its place, in which there may be one that `_load` could not read."""
        try:
            staging.rename(target)
        except OSError as e:
            if e.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            if (target / "layer.json").exists():  # only that is spoilt: containers stand on fs/
                (staging / "layer.json").replace(target / "layer.json")
            else:  # half removed
                trees.remove(target)
                staging.rename(target)

    def set_aside(self, key: str) -> Path:
        """Let a layer disappear at once; return what is left to remove with `trees.remove`.

        That nobody uses it is the caller's knowledge. Nothing there is fine.
        """
        self._layers.pop(key, None)
        path = self._layers_dir / key
        aside = self._tmp / f"removed-{secrets.token_hex(4)}-{key}"
        try:
            path.rename(aside)
        except FileNotFoundError:
            return path
        except OSError as e:
            if e.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            (path / "layer.json").unlink(missing_ok=True)
            return path
        return aside

    def strays(self, in_use: Collection[str] = ()) -> list[Path]:
        """Return what lies in the folders for layers and temporary things and is no layer.

        A layer that containers stand on is none of it, whatever became of its layer.json. Only for
        the start: later there are layers that are not complete.
        """
        unknown = set(os.listdir(self._layers_dir)) - self.layers() - set(in_use)
        return [*(self._layers_dir / key for key in unknown), *self._tmp.iterdir()]

    def lowerdirs(self, layers: Sequence[str]) -> tuple[str, ...]:
        """Return the folders of a chain (bottom first) in the order of overlayfs (topmost first).

        Raises FailedPrecondition when a layer is not there.
        """
        found: list[str] = []
        for key in reversed(layers):
            layer = self._layers.get(key)
            if layer is None:
                raise errors.FailedPrecondition(
                    f"layer {key[:12]} is missing: pull the image again"
                )
            found.append(str(self.fs(key)))
            if layer.opaque_root:
                break
        return tuple(found) or (str(self._empty),)

    # ---- writable layers

    def writable(self, key: str) -> Path:
        """Return the folder with what a container has written."""
        return self._writable / key / "fs"

    def create(self, key: str, layers: Sequence[str], mapped: Mapped | None = None) -> Overlay:
        """Make the writable layer of a container, if it is not there. Raises FailedPrecondition,
        OSError."""
        lowerdirs = self.lowerdirs(layers)
        top = self._writable / key
        upper, work = top / "fs", top / "work"
        if not upper.exists():
            top.mkdir(mode=0o700, exist_ok=True)
            work.mkdir(mode=0o700, exist_ok=True)
            fresh = top / "new"
            fresh.mkdir(exist_ok=True)
            # overlayfs shows the root of the topmost layer
            _copy_owner(lowerdirs[0], fresh, mapped.ids if mapped else None)
            fresh.rename(upper)
        return Overlay(lowerdirs=lowerdirs, upper=str(upper), work=str(work))

    def volumes(self, key: str) -> Path:
        """Return where a container's volumes go: beside its writable layer, whose life they
        share."""
        return self._writable / key / "volumes"

    def mount(
        self,
        key: str,
        layers: Sequence[str],
        target: str | Path,
        options: Sequence[str] = (),
        *,
        mapped: Mapped | None = None,
        volatile: bool = True,
    ) -> None:
        """Mount the root file system of a container, if it is not mounted. Raises as `create`
        does.

        With `mapped` the layers' files show the owners of a user namespace, as those will that the
        container writes; the layers stay as they are. It uses a mount point beside the target.
        """
        target = Path(target)
        target.mkdir(mode=0o755, parents=True, exist_ok=True)
        if os.path.ismount(target):
            return
        plan = self.create(key, layers, mapped)
        with _shown(plan.lowerdirs, mapped, target) as lowerdirs:
            whole = dataclasses.replace(plan, lowerdirs=lowerdirs)
            self._mount(whole, target, options, volatile=volatile)

    def _mount(
        self, plan: Overlay, target: Path, options: Sequence[str], *, volatile: bool
    ) -> None:
        # A volatile mount that ended in a crash leaves a mark here that forbids the next one.
        trees.remove(Path(plan.work) / "work")
        try:
            self._overlay(plan, target, (*(self._volatile if volatile else ()), *options))
        except OSError as e:
            if e.errno != errno.EINVAL or not self._volatile or not volatile:
                raise
            trees.remove(Path(plan.work) / "work")
            self._overlay(plan, target, options)
            self._volatile = ()  # older than Linux 5.10

    def _overlay(self, plan: Overlay, target: Path, options: Sequence[str]) -> None:
        mounts.overlay(plan.lowerdirs, plan.upper, plan.work, str(target), options)

    def mount_readonly(
        self,
        layers: Sequence[str],
        target: str | Path,
        options: Sequence[str] = (),
        mapped: Mapped | None = None,
    ) -> None:
        """Mount an image without a writable layer, if it is not mounted (CRI image volumes).

        `mapped` as in `mount`.
        """
        target = Path(target)
        target.mkdir(mode=0o755, parents=True, exist_ok=True)
        if not os.path.ismount(target):
            lowerdirs = self.lowerdirs(layers)
            if layers and len(lowerdirs) == 1:
                # One layer alone would be a bind mount, which shows whiteouts as the devices they
                # are.
                lowerdirs = (*lowerdirs, str(self._empty))
            with _shown(lowerdirs, mapped, target) as shown:
                mounts.overlay(shown, None, None, str(target), ("ro", *options))

    def unmount(self, target: str | Path) -> None:
        """Unmount whatever is mounted at `target` and below it; nothing there is fine."""
        for point in mounts.mounts_below(os.path.realpath(target)):
            mounts.unmount(point)

    def remove(self, key: str) -> None:
        """Remove a writable layer; nothing there is fine. It must not be mounted any more."""
        trees.remove(self._writable / key)
        self._usage.pop(key, None)

    def writables(self) -> set[str]:
        """Return the keys of all writable layers."""
        return set(os.listdir(self._writable))

    # ---- sizes

    def usage(self, key: str) -> Usage:
        """Return what a writable layer took when `refresh` last looked, nothing before that."""
        return self._usage.get(key, Usage())

    def fs_usage(self) -> Usage:
        """Return what layers, blobs, records and writable layers take together."""
        total = sum(self._usage.copy().values(), self._other)
        layers = list(self._layers.values())
        return total + Usage(
            bytes=sum(layer.bytes for layer in layers), inodes=sum(layer.inodes for layer in layers)
        )

    async def refresh(self) -> None:
        """Measure the writable layers and all the small things anew, in a thread."""
        await asyncio.to_thread(self._measure)

    def _measure(self) -> None:
        self._other = sum((_measured(self.root / n) for n in ("blobs", "images", "tmp")), Usage())
        found = {key: _measured(self._writable / key) for key in os.listdir(self._writable)}
        self._usage = found  # one that is removed meanwhile counts until the next time


def _load(folder: Path) -> dict[str, Layer]:
    found: dict[str, Layer] = {}
    for key in os.listdir(folder):
        try:
            data = (folder / key / "layer.json").read_bytes()
            found[key] = msgspec.json.decode(data, type=Layer)
        except (OSError, ValueError, RecursionError) as e:  # msgspec's errors are ValueErrors
            log.warning("not a layer", layer=key, error=str(e))  # see images.gc
    return found


def _measured(path: Path) -> Usage:
    try:
        return trees.usage(path)
    except OSError:  # it vanishes, or a container moves folders while we look
        return Usage()


def _shown(
    lowerdirs: tuple[str, ...], mapped: Mapped | None, target: Path
) -> contextlib.AbstractContextManager[tuple[str, ...]]:
    """Return the layers as overlayfs is to see them."""
    if mapped is None:
        return contextlib.nullcontext(lowerdirs)
    return idmap.layers(lowerdirs, mapped.userns, target.with_name(f"{target.name}.layers"))


def _copy_owner(source: str, target: Path, ids: spec.IdMap | None) -> None:
    st = os.stat(source)
    owner = (st.st_uid, st.st_gid)
    os.chown(target, *(ids.owner(*owner) if ids else owner))
    target.chmod(stat.S_IMODE(st.st_mode))
    os.utime(target, ns=(st.st_atime_ns, st.st_mtime_ns))
