# SPDX-License-Identifier: Apache-2.0
"""What a registry sent as a manifest or index: its digest verified, its type beyond doubt. Pure.

A document that could be read in two ways is refused (CVE-2021-41190): what it is must follow from
its own fields, and neither its `mediaType` nor the Content-Type may say otherwise. The rest of it
is not even built here, however large: `pull` reads it.
"""

import hashlib
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from cri_server import errors
from cri_server.images import reference, wire

OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
SCHEMA_1 = "application/vnd.docker.distribution.manifest.v1"
INDEXES = frozenset({OCI_INDEX, DOCKER_INDEX})
MANIFESTS = frozenset({OCI_MANIFEST, DOCKER_MANIFEST})
ACCEPT = ", ".join(sorted(INDEXES | MANIFESTS))
_GENERIC = frozenset({"", "application/json", "application/octet-stream", "text/plain"})


class Descriptor(Protocol):
    """What a document says about another: any object with these fields will do."""

    @property
    def media_type(self) -> str: ...
    @property
    def digest(self) -> str: ...
    @property
    def size(self) -> int: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Resolved:
    """A verified document; itself a descriptor. `source` is the host that gave it."""

    digest: str
    media_type: str
    size: int
    body: bytes = field(repr=False)
    source: str


def verified(body: bytes, *, wanted: str | None, content_type: str, source: str) -> Resolved:
    """Return the document that some bytes are; `wanted` is its digest, if one was asked for.

    Raises wire.Invalid for a wrong digest or an unclear type, Unimplemented for schema 1.
    """
    if wanted:
        verify(body, wanted, source)
    return Resolved(
        digest=wanted or digest_of(body, "sha256"),
        media_type=_media_type(body, content_type, source),
        size=len(body),
        body=body,
        source=source,
    )


def differ(one: str, other: str) -> bool:
    """Tell whether two types are as different as an index and a manifest."""
    return (one in INDEXES) is not (other in INDEXES)


def verify(body: bytes, wanted: str, source: str) -> None:
    """Raise Invalid unless the bytes have the digest."""
    if not reference.is_digest(wanted):
        raise wire.Invalid(f"{source} sent a digest that is none")
    actual = digest_of(body, wanted)
    if actual != wanted:
        raise wire.Invalid(f"{source} sent wrong digest {actual} for {wanted}")


def digest_of(body: bytes, like: str) -> str:
    """Return the digest by the algorithm of another one."""
    algorithm = like.partition(":")[0]
    return f"{algorithm}:{hashlib.new(algorithm, body).hexdigest()}"


def _media_type(body: bytes, content_type: str, source: str) -> str:
    """Return the one type that a document can have; Invalid when it has two, or none."""
    try:
        head = msgspec.json.decode(body, type=_Head)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        raise wire.Invalid(f"{source} sent a manifest that is none") from None
    header = content_type.partition(";")[0].strip().lower()
    said = head.media_type or header
    if head.schema_version == 1 or _given(head.fs_layers) or said.startswith(SCHEMA_1):
        raise errors.Unimplemented(f"manifest of schema 1 ({SCHEMA_1}) is not supported")
    index, plain = _given(head.manifests), _given(head.config) or _given(head.layers)
    if index == plain:
        raise wire.Invalid(f"{source} sent a document that is not clearly a manifest or an index")
    if header in INDEXES | MANIFESTS and said != header:
        raise wire.Invalid(f"{source} calls a document {header} that calls itself another type")
    if said in _GENERIC:
        return OCI_INDEX if index else OCI_MANIFEST
    if said not in (INDEXES if index else MANIFESTS):
        raise wire.Invalid(f"{source} sent media type {said[:100]!r}, which is no image")
    return said


def _given(value: msgspec.Raw) -> bool:
    return bytes(value) not in {b"", b"null"}


_ABSENT = msgspec.Raw()


class _Head(msgspec.Struct, rename="camel"):
    """What tells kinds of documents apart; the rest is not even built, however large."""

    media_type: str = ""
    schema_version: int = 0
    manifests: msgspec.Raw = _ABSENT
    config: msgspec.Raw = _ABSENT
    layers: msgspec.Raw = _ABSENT
    fs_layers: msgspec.Raw = _ABSENT
