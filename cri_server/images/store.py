# SPDX-License-Identifier: Apache-2.0
"""Which images there are, by what names, and the documents that say so.

    <root>/images/<hex>.json     a record; <hex> is the image id, the digest of the config
           blobs/sha256/<hex>    index, manifest and config of the images on record

Layer blobs are not kept: once unpacked they are only a second copy (behaviour.md W12), and a layer
that is needed again is fetched again. A record is written last and by rename, so an image is there
whole or not at all. A tag belongs to the image that got it last: should a crash leave it in two
records, the newer one wins. A record that cannot be read is set aside as `*.broken` and logged; it
never keeps the server from starting.
"""

import contextlib
import dataclasses
import fnmatch
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import structlog

from cri_server import errors, spec
from cri_server.images import reference

log = structlog.get_logger()
VERSION = 1
MIN_PREFIX = 3  # digits of an id, as in the peers
_ID = re.compile(r"(?:sha256:)?([0-9a-f]{64})")
_PREFIX = re.compile(rf"(?:sha256:)?([0-9a-f]{{{MIN_PREFIX},63}})")


@dataclass(frozen=True, kw_only=True, slots=True)
class Image:
    """An image. `size` is what its layers and documents take on this disk, shared layers
    included."""

    id: str  # "sha256:" + digest of the config
    repo_tags: tuple[str, ...]
    repo_digests: tuple[
        str, ...
    ]  # repository@digest of what the name resolved to, the index if there is one
    size: int
    config: spec.ImageConfig
    platform: str  # "linux/amd64"
    layers: tuple[str, ...]  # keys of snapshots, bottom first
    pinned: bool = False
    blobs: tuple[str, ...] = ()  # digests of index, manifest and config


class _Record(msgspec.Struct, frozen=True, kw_only=True):
    """What is in a file."""

    version: int
    tagged_at: int  # nanoseconds; decides who has a tag
    image: Image


class Store:
    """All images. Reading is from memory; `put` and `remove` write, so call them in a thread."""

    def __init__(self, root: Path, *, pinned: Sequence[str] = ()) -> None:
        """Read the records below `root`. `pinned` are globs over names ("registry.io/pause*")."""
        self._images_dir, self._blobs, self._tmp = root / "images", root / "blobs", root / "tmp"
        for folder in (self._tmp, self._images_dir, self._blobs / "sha256", self._blobs / "sha512"):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._pinned = tuple(pinned)
        self._lock = threading.Lock()
        self._images: dict[str, Image] = {}
        self._names: dict[str, str] = {}  # tag or digest reference ─► id
        self._load()

    # ---- reading

    def list(self) -> tuple[Image, ...]:
        """Return all images, also those without a tag."""
        return tuple(self._images.copy().values())

    def find(self, wanted: str) -> Image | None:
        """Return the image that a person or the kubelet means, None when there is none.

        In this order: a whole id, with or without "sha256:"; a name as given or after normalisation
        ("nginx"); the beginning of an id. Raises InvalidArgument when several ids begin so.
        """
        if match := _ID.fullmatch(wanted):
            return self._images.get(f"sha256:{match[1]}")
        found = self._named(wanted)
        if found is None and (match := _PREFIX.fullmatch(wanted)):
            images = [i for i in self.list() if i.id.startswith(f"sha256:{match[1]}")]
            if len(images) > 1:
                raise errors.InvalidArgument(
                    f"image id {wanted!r} is ambiguous: {len(images)} match"
                )
            found = next(iter(images), None)
        return found

    def _named(self, wanted: str) -> Image | None:
        if wanted not in self._names:
            try:
                name = reference.parse(wanted)
            except errors.CriError:
                return None
            wanted = name.canonical(name.digest) if name.digest else name.tagged or ""
        return self._images.get(self._names.get(wanted, ""))

    def blob_path(self, digest: str) -> Path:
        """Return where a document is kept."""
        algorithm, _, value = digest.partition(":")
        return self._blobs / algorithm / value

    def read_blob(self, digest: str) -> bytes | None:
        """Return a document that is kept, None when it is not there."""
        try:
            return self.blob_path(digest).read_bytes()
        except FileNotFoundError:
            return None

    def blobs(self) -> set[Path]:
        """Return the files of all blobs, those that no image needs too."""
        return {p for folder in self._blobs.iterdir() for p in folder.iterdir()}

    # ---- writing

    def write_blob(self, digest: str, data: bytes) -> None:
        """Keep a document; that `data` has this digest is the caller's knowledge."""
        if self.read_blob(digest) != data:
            _replace(self.blob_path(digest), data, self._tmp)

    def put(self, image: Image, *, sync: Callable[[], None] | None = None) -> Image:
        """Add an image, or names to it; its tags leave the images that had them. Return what is now
        on record.

        `sync` is called before the record is written: whatever it brings to the disk is there if
        the record is. It may take long, so nobody else waits for it. With it, the record is on the
        disk too on return. Raises OSError.
        """
        if sync is not None:
            sync()
        with self._lock:
            known = self._images.get(image.id)
            if known is not None:
                image = _merged(known, image)
            self._write(image)
            others = self._take_tags(image)
            self._index()
            for other in others:
                self._note_loss(other)
            image = self._images[image.id]
        if sync is not None:
            _sync_file(self._record(image.id))
        return image

    def _take_tags(self, image: Image) -> Sequence[Image]:
        """Take an image's tags from all others, in memory; return those that had any."""
        changed = []
        for other in self._images.copy().values():
            left = tuple(t for t in other.repo_tags if t not in image.repo_tags)
            if other.id != image.id and left != other.repo_tags:
                changed.append(self._as_configured(dataclasses.replace(other, repo_tags=left)))
                self._images[other.id] = changed[-1]
        return changed

    def _note_loss(self, other: Image) -> None:
        """Record that an image has fewer tags; if that fails, `_load` will see who is newer."""
        try:
            self._write(other)
        except OSError as e:
            log.warning("image record not brought up to date", image=other.id, error=str(e))

    def remove(self, wanted: str) -> Image | None:
        """Remove an image with all its names (CRI RemoveImage); return it, None if it was not
        there.

        Needs no free space. Its layers and blobs stay until `gc` finds them without an owner.
        Raises InvalidArgument like `find`.
        """
        with self._lock:
            image = self.find(wanted)
            if image is not None:
                self._record(image.id).unlink(missing_ok=True)
                del self._images[image.id]
                self._index()
            return image

    def _write(self, image: Image) -> None:
        record = _Record(version=VERSION, tagged_at=time.time_ns(), image=image)
        _replace(self._record(image.id), msgspec.json.encode(record), self._tmp)
        self._images[image.id] = self._as_configured(image)

    def _as_configured(self, image: Image) -> Image:
        return dataclasses.replace(image, pinned=self._is_pinned(image))

    def _record(self, image_id: str) -> Path:
        return self._images_dir / f"{image_id.removeprefix('sha256:')}.json"

    def _index(self) -> None:
        names: dict[str, str] = {}
        for image in self._images.values():
            names |= dict.fromkeys((*image.repo_tags, *image.repo_digests), image.id)
        self._names = names

    def _is_pinned(self, image: Image) -> bool:
        names = (*image.repo_tags, *image.repo_digests)
        return any(fnmatch.fnmatchcase(n, pattern) for n in names for pattern in self._pinned)

    # ---- starting

    def _load(self) -> None:
        records = sorted(self._read(), key=lambda record: record.tagged_at)
        owner = {tag: r.image.id for r in records for tag in r.image.repo_tags}
        for record in records:
            image = record.image
            tags = tuple(t for t in image.repo_tags if owner[t] == image.id)
            self._images[image.id] = self._as_configured(dataclasses.replace(image, repo_tags=tags))
        self._index()

    def _read(self) -> Iterable[_Record]:
        for path in self._images_dir.glob("*.json"):
            try:
                record = msgspec.json.decode(path.read_bytes(), type=_Record)
                if record.version != VERSION or self._record(record.image.id) != path:
                    raise ValueError(f"version {record.version} of image {record.image.id[:80]}")
            except (OSError, ValueError, RecursionError) as e:  # msgspec's errors are ValueErrors
                log.warning("image record set aside", file=path.name, error=str(e))
                path.replace(path.with_suffix(".broken"))
                continue
            yield record


def _merged(known: Image, new: Image) -> Image:
    """Add the names of a repeated pull; everything else follows from the id."""
    return dataclasses.replace(
        new,
        repo_tags=tuple(dict.fromkeys((*known.repo_tags, *new.repo_tags))),
        repo_digests=tuple(dict.fromkeys((*known.repo_digests, *new.repo_digests))),
        blobs=tuple(dict.fromkeys((*known.blobs, *new.blobs))),
    )


def _replace(path: Path, data: bytes, tmp: Path) -> None:
    """Give a file new content by rename; readers see the old or the new."""
    fd, name = tempfile.mkstemp(prefix="record-", dir=tmp)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
        os.rename(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _sync_file(path: Path) -> None:
    """Bring a file and its name to the disk; one that is gone meanwhile has no need of it."""
    for each in (path, path.parent):
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(each, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
