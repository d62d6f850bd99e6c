# SPDX-License-Identifier: Apache-2.0
"""Image archives: what a pull asks a registry for, answered from a file.

    index.json, blobs/<algorithm>/<hex>      an OCI layout: skopeo, buildah, ctr, docker from 25 on
    manifest.json, <hex>.json, .../layer.tar docker save before that, podman save

An archive that is both is read as an OCI layout. An archive of docker's own form has no manifest
that anybody could have signed: one is made of it, and its digests are computed here; those of an
OCI layout are verified by `pull`, as a registry's are. The file is read where it is, nothing is
unpacked from it but layers, so names in it lead nowhere. Nothing is written: a crash loses nothing.

Rules: OCI image-spec, image-layout.md; for docker's form what `docker load` accepts.
"""

import hashlib
import inspect
import os
import posixpath
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from cri_server import errors
from cri_server.images import documents, flights, manifest, reference, tar, wire

MAX_DOCUMENT = manifest.MAX_DOCUMENT
MAX_ENTRIES = 100_000
MAX_LINKS = 8  # from one name to the next: docker save had one
CHUNK = 1 << 20
SOURCE = "the archive"
NAME = "io.containerd.image.name"  # whole; containerd and docker write it
REF_NAME = "org.opencontainers.image.ref.name"  # a tag alone, or a whole name, as its writer likes
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """Where a file of the archive is."""

    offset: int
    size: int


class _Entry(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """An entry of index.json."""

    media_type: str = ""
    digest: str
    size: int
    platform: manifest.Platform | None = None
    annotations: dict[str, str] | None = None

    def descriptor(self) -> manifest.Descriptor:
        return manifest.Descriptor(
            media_type=self.media_type, digest=self.digest, size=self.size, platform=self.platform
        )

    def name(self) -> str:
        """Return the image's whole name, "" when there is none: a tag alone is no name."""
        said = self.annotations or {}
        short = said.get(REF_NAME, "")
        return said.get(NAME) or (short if set(short) & {":", "/"} else "")


class _Index(msgspec.Struct, frozen=True, kw_only=True):
    manifests: tuple[_Entry, ...] = ()


class _Saved(msgspec.Struct, frozen=True, kw_only=True, rename="pascal"):
    """An image of docker's manifest.json."""

    config: str
    repo_tags: tuple[str, ...] | None = None
    layers: tuple[str, ...] | None = None


@dataclass(kw_only=True, slots=True)
class Contents:
    """What an archive holds: images by their normal names, and where each digest is."""

    images: dict[str, manifest.Descriptor] = field(default_factory=dict)
    made: dict[str, bytes] = field(default_factory=dict)  # manifests that were not in it
    blobs: dict[str, Member] = field(default_factory=dict)


class Archive:
    """Answers a `pull.Puller` in a registry's place. `images` are the names that there are."""

    def __init__(self, fd: int, contents: Contents) -> None:
        # A file that closes itself: who asked for the archive may have gone meanwhile.
        self._file, self._contents = os.fdopen(fd, "rb", buffering=0), contents
        self.images: Sequence[str] = tuple(contents.images)

    def close(self) -> None:
        self._file.close()

    async def resolve(
        self, ref: reference.Reference, auth: object = None, *, known: object = None
    ) -> documents.Resolved:
        """Return the document behind a name. Raises NotFound, InvalidArgument."""
        found = self._contents.images.get(str(ref))
        if found is None:
            raise errors.NotFound(f"{ref}: {SOURCE} has no such image")
        if ref.digest not in (None, found.digest):
            raise errors.InvalidArgument(f"{SOURCE} calls {found.digest} {ref}")
        return await self.manifest(ref, found)

    async def manifest(
        self, ref: reference.Reference, descriptor: documents.Descriptor, auth: object = None
    ) -> documents.Resolved:
        """Return a document, verified. Raises NotFound, InvalidArgument, ResourceExhausted."""
        body = await self._document(descriptor, MAX_DOCUMENT)
        try:
            return documents.verified(
                body, wanted=descriptor.digest, content_type=descriptor.media_type, source=SOURCE
            )
        except wire.Invalid as e:
            raise errors.InvalidArgument(f"{ref}: {e}") from e

    async def read_blob(
        self,
        ref: reference.Reference,
        descriptor: documents.Descriptor,
        auth: object = None,
        *,
        limit: int = MAX_DOCUMENT,
    ) -> bytes:
        """Return a small blob, verified. Raises like `manifest`."""
        body = await self._document(descriptor, limit)
        if documents.digest_of(body, descriptor.digest) != descriptor.digest:
            raise errors.InvalidArgument(f"{ref}: wrong content of blob {descriptor.digest}")
        return body

    async def blob(
        self,
        ref: reference.Reference,
        descriptor: documents.Descriptor,
        auth: object = None,
        *,
        sink: Callable[[bytes], object],
    ) -> None:
        """Hand a blob to the sink, which verifies it. Raises NotFound."""
        member = self._member(descriptor)
        for at in range(0, member.size, CHUNK):
            size = min(CHUNK, member.size - at)
            data = await flights.in_thread(_read, self._file.fileno(), member.offset + at, size)
            if inspect.isawaitable(waiting := sink(data)):
                await waiting

    async def _document(self, descriptor: documents.Descriptor, limit: int) -> bytes:
        if (made := self._contents.made.get(descriptor.digest)) is not None:
            return made
        member = self._member(descriptor)
        return await flights.in_thread(_small, self._file.fileno(), member, limit)

    def _member(self, descriptor: documents.Descriptor) -> Member:
        member = self._contents.blobs.get(descriptor.digest)
        if member is None:
            raise errors.NotFound(f"{SOURCE} has no blob {descriptor.digest}")
        return member


def open_archive(path: Path, name: str = "") -> Archive:
    """Open an archive that is not compressed; blocks. With `name` its one image is called that.

    Raises InvalidArgument for what is no image archive, for names that are none, for an image
    without a name when none is given, and for a name for several; NotFound, ResourceExhausted,
    OSError.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as e:
        raise errors.NotFound(f"{path}: no such file") from e
    try:
        return Archive(fd, _contents(fd, name))
    except tar.Malformed as e:
        os.close(fd)
        raise errors.InvalidArgument(f"{path} is no image archive: {e}") from e
    except BaseException:
        os.close(fd)
        raise


def _contents(fd: int, name: str) -> Contents:
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise tar.Malformed("it is not a file")
    members = _members(fd)
    if "index.json" in members:
        return _of_layout(fd, members, name)
    if "manifest.json" in members:
        return _of_docker(fd, members, name)
    raise errors.InvalidArgument("neither index.json nor manifest.json is in the archive")


# ---- OCI layout


def _of_layout(fd: int, members: Mapping[str, Member], name: str) -> Contents:
    body = _small(fd, members["index.json"], MAX_DOCUMENT)
    entries = _decode(body, _Index, "index.json").manifests
    for entry in entries:
        manifest.check(entry.descriptor())
    named: dict[str, list[manifest.Descriptor]] = {}
    for entry in entries:
        if said := name or entry.name():
            named.setdefault(str(reference.parse(said)), []).append(entry.descriptor())
    contents = Contents(images={said: _one(found) for said, found in _some(named).items()})
    if name:
        _check_only(name, next(iter(contents.images.values())), entries)
    for path, member in members.items():
        parts = path.split("/")
        if len(parts) == 3 and parts[0] == "blobs":
            contents.blobs[f"{parts[1]}:{parts[2]}"] = member
    return contents


def _one(found: Sequence[manifest.Descriptor]) -> manifest.Descriptor:
    """Return the one that is for this machine; the last, when none says what it is for."""
    if len({d.digest for d in found}) > 1 and any(d.platform for d in found):
        index = manifest.Index(manifests=tuple(found))
        return manifest.choose(index, manifest.host_platform())
    return found[-1]


def _check_only(name: str, chosen: manifest.Descriptor, entries: Sequence[_Entry]) -> None:
    """Refuse to call one image so that is one of several, with no platform to tell which."""
    same = {each.digest for each in entries if each.platform == chosen.platform}
    if len(same) > 1:
        raise errors.InvalidArgument(f"{name}: the archive has {len(same)} images")


# ---- docker's form


def _of_docker(fd: int, members: Mapping[str, Member], name: str) -> Contents:
    body = _small(fd, members["manifest.json"], MAX_DOCUMENT)
    saved = _decode(body, tuple[_Saved, ...], "manifest.json")
    if name and len(saved) != 1:
        raise errors.InvalidArgument(f"{name}: the archive has {len(saved)} images")
    contents = Contents()
    named: dict[str, manifest.Descriptor] = {}
    for image in saved:
        names = (name,) if name else image.repo_tags or ()
        if names:
            made = _manifest(fd, members, image, contents)
            named.update({str(reference.parse(said)): made for said in names})
    contents.images = dict(_some(named))
    return contents


def _manifest(
    fd: int, members: Mapping[str, Member], image: _Saved, contents: Contents
) -> manifest.Descriptor:
    """Make the manifest that docker leaves out, the same one each time."""
    config = _described(fd, members, image.config, contents)
    layers = [_described(fd, members, path, contents) for path in image.layers or ()]
    document = {
        "schemaVersion": 2,
        "mediaType": manifest.OCI_MANIFEST,
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", **config},
        # What a layer is compressed with is told by its bytes (`stream`), not by this.
        "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar", **d} for d in layers],
    }
    body = msgspec.json.encode(document)
    digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
    contents.made[digest] = body
    return manifest.Descriptor(media_type=manifest.OCI_MANIFEST, digest=digest, size=len(body))


def _described(
    fd: int, members: Mapping[str, Member], path: str, contents: Contents
) -> dict[str, Any]:
    member = members.get(_normal(path))
    if member is None:
        raise errors.InvalidArgument(f"{path[:200]!r} is missing in the archive")
    digest = _digest(fd, member)
    contents.blobs[digest] = member
    return {"digest": digest, "size": member.size}


def _digest(fd: int, member: Member) -> str:
    counted = hashlib.sha256()
    for at in range(0, member.size, CHUNK):
        counted.update(_read(fd, member.offset + at, min(CHUNK, member.size - at)))
    return f"sha256:{counted.hexdigest()}"


# ---- the tar


class _Source:
    """A file as a `tar.Source`; `position` is where the next byte is."""

    def __init__(self, fd: int) -> None:
        self._fd, self._size = fd, os.fstat(fd).st_size
        self.position = 0

    def take(self, size: int) -> bytes:
        if self.position == self._size:
            return b""
        return b"".join(bytes(piece) for piece in self.pieces(size))

    def pieces(self, size: int) -> Iterator[memoryview]:
        at = self.position
        self.skip(size)
        for piece in range(at, at + size, CHUNK):
            yield memoryview(_read(self._fd, piece, min(CHUNK, at + size - piece)))

    def skip(self, size: int) -> None:
        if size > self._size - self.position:
            raise tar.Malformed("the archive ends too early")
        self.position += size


def _members(fd: int) -> dict[str, Member]:
    """Return the files of a tar by their normal names, links as what they point to."""
    source = _Source(fd)
    files: dict[str, Member] = {}
    links: dict[str, str] = {}
    for entry in tar.Reader(source):
        name = _normal(entry.name)
        if entry.kind is tar.Kind.FILE and (entry.size, entry.segments) != (0, ()):
            if entry.segments != ((0, entry.size),):
                raise tar.Malformed(f"{name[:200]!r} is a sparse file")
            files[name] = Member(offset=source.position, size=entry.size)
        elif entry.kind is tar.Kind.SYMLINK:
            links[name] = _normal(posixpath.join(posixpath.dirname(name), entry.target))
        elif entry.kind is tar.Kind.LINK:
            links[name] = _normal(entry.target)
        if len(files) + len(links) > MAX_ENTRIES:
            raise errors.ResourceExhausted(f"more than {MAX_ENTRIES} files in the archive")
    return files | dict(_followed(links, files))


def _followed(
    links: Mapping[str, str], files: Mapping[str, Member]
) -> Iterable[tuple[str, Member]]:
    for name in links:
        target = name
        for _ in range(MAX_LINKS):
            target = links.get(target, target)
        if target in files:
            yield name, files[target]


def _normal(name: str) -> str:
    return posixpath.normpath(name).lstrip("/")


def _small(fd: int, member: Member, limit: int) -> bytes:
    if member.size > limit:
        raise errors.ResourceExhausted(f"a document of {member.size} bytes in the archive")
    return _read(fd, member.offset, member.size)


def _read(fd: int, offset: int, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = os.pread(fd, size - len(data), offset + len(data))
        if not piece:
            raise errors.InvalidArgument("the archive became shorter while it was read")
        data += piece
    return data


def _some(named: dict[str, T]) -> dict[str, T]:
    if not named:
        raise errors.InvalidArgument("the archive does not name its image: give it a name")
    return named


def _decode(body: bytes, kind: type[T], name: str) -> T:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as e:
        raise errors.InvalidArgument(f"{name} of the archive is malformed: {e}") from e
