# SPDX-License-Identifier: Apache-2.0
"""Manifests and blobs from registries: the OCI distribution protocol as a pull needs it.

    client = Client([Path("/etc/containerd/certs.d")])
    top = await client.resolve(ref, auth)                   # tag or digest → verified manifest
    child = await client.manifest(ref, descriptor, auth)    # an entry of an index
    await client.blob(ref, layer, auth, sink=writer.write)  # streamed, resumed after a cut

Hosts are asked in the order of hosts.toml; whatever goes wrong at one, the next is asked. Documents are
verified here. Blobs are bounded by the size of their descriptor and go to the sink, which verifies the
digest: bytes that it has taken cannot be taken back. Nothing is written to disk, so a crash loses
the transfer only; `blob(offset=…)` goes on from what a store has kept. Messages name reference, host
and status, never a URL.
"""

import asyncio
import contextlib
import hashlib
import inspect
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec
import structlog

from cri_server import errors
from cri_server.images import auth as authentication
from cri_server.images import hosts, reference, session, transport, wire

MAX_MANIFEST = 4 << 20
MAX_WITHOUT_PROGRESS = 3
PROGRESS = 64 << 10  # bytes that make an attempt count as progress
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
INDEXES = frozenset({OCI_INDEX, DOCKER_INDEX})
MANIFESTS = frozenset({OCI_MANIFEST, DOCKER_MANIFEST})
SCHEMA_1 = "application/vnd.docker.distribution.manifest.v1"
_ACCEPT = (("Accept", ", ".join((OCI_INDEX, DOCKER_INDEX, OCI_MANIFEST, DOCKER_MANIFEST))),)

_GENERIC = frozenset({"", "application/json", "application/octet-stream", "text/plain"})
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18}|\*)")

_log = structlog.get_logger(__name__)

Sink = Callable[[bytes], object]  # or a coroutine function
T = TypeVar("T")


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


class Client:
    """Registries as the hosts.toml files below `config_dirs` describe them. Belongs to one event loop."""

    def __init__(
        self,
        config_dirs: Sequence[Path],
        *,
        progress_timeout: float = 300.0,
        limits: session.Limits | None = None,
    ) -> None:
        """`progress_timeout` is in seconds, from one piece of a body to the next; `limits` overrides it."""
        self._dirs = tuple(config_dirs)
        self._shared = session.Shared(limits or session.Limits(progress_timeout=progress_timeout))

    async def resolve(
        self,
        ref: reference.Reference,
        auth: authentication.AuthConfig | None = None,
        *,
        known: Callable[[str], bytes | None] | None = None,
    ) -> Resolved:
        """Return the manifest or index that a reference means now.

        With `known`, a tag is looked up by HEAD first (which no rate limit counts), and `known(digest)` may
        return the document that is here already. It must not answer for another repository: a registry could
        name a digest that it does not have (cache poisoning).

        Raises NotFound; RegistryUnavailable when no host could be reached or all are in trouble; Unknown for
        `unauthorized`, wrong digests and documents that break the rules; Unimplemented for schema 1.
        """
        if ref.digest:
            return await self._document(ref, ref.digest, auth)
        return await self._first(
            ref, auth, "resolve", lambda at: self._by_tag(at, ref, auth, known)
        )

    async def manifest(
        self,
        ref: reference.Reference,
        descriptor: Descriptor,
        auth: authentication.AuthConfig | None = None,
    ) -> Resolved:
        """Return the document that a descriptor of the same repository points to. Raises like `resolve`."""
        _check(ref, descriptor, MAX_MANIFEST)
        found = await self._document(ref, descriptor.digest, auth, size=descriptor.size)
        if descriptor.media_type and descriptor.media_type != found.media_type:
            raise errors.Unknown(
                f"{ref}: {descriptor.digest} is not of the type that its index says"
            )
        return found

    async def blob(
        self,
        ref: reference.Reference,
        descriptor: Descriptor,
        auth: authentication.AuthConfig | None = None,
        *,
        sink: Sink,
        offset: int = 0,
    ) -> None:
        """Hand the bytes of a blob from `offset` to its end to the sink, in order, `size - offset` in all.

        The sink may be a coroutine function; time spent in it is no stall. What it raises ends the transfer
        and goes to the caller as it is. The digest is for the sink's owner to verify.
        Raises like `resolve`, after the connection was resumed as often as it made progress.
        """
        _check(ref, descriptor, 1 << 62)
        transfer = _Transfer(descriptor=descriptor, sink=sink, offset=offset)
        await self._first(ref, auth, "pull", transfer.run)

    async def read_blob(
        self,
        ref: reference.Reference,
        descriptor: Descriptor,
        auth: authentication.AuthConfig | None = None,
        *,
        limit: int = MAX_MANIFEST,
    ) -> bytes:
        """Return a small blob, such as a config, verified; ResourceExhausted beyond `limit` bytes."""
        _check(ref, descriptor, limit)
        whole = bytearray()
        await self.blob(ref, descriptor, auth, sink=whole.extend)
        if _digest(bytes(whole), descriptor.digest) != descriptor.digest:
            raise errors.Unknown(f"{ref}: wrong digest of blob {descriptor.digest}")
        return bytes(whole)

    def close(self) -> None:
        """Close idle connections."""
        self._shared.http.close()

    async def _document(
        self,
        ref: reference.Reference,
        digest: str,
        auth: authentication.AuthConfig | None,
        *,
        size: int | None = None,
    ) -> Resolved:
        return await self._first(ref, auth, "pull", lambda at: _fetch(at, digest, digest, size))

    async def _by_tag(
        self,
        at: session.Session,
        ref: reference.Reference,
        auth: authentication.AuthConfig | None,
        known: Callable[[str], bytes | None] | None,
    ) -> Resolved:
        may_pull = "pull" in at.host.capabilities
        digest = await _look_up(at, ref.target) if known or not may_pull else None
        if digest is None:
            return await _fetch(at, ref.target)
        body = known(digest) if known else None
        if body is not None:
            return _verified(body, wanted=digest, content_type="", source=at.host.netloc)
        return await (_fetch(at, digest, digest) if may_pull else self._document(ref, digest, auth))

    async def _first(
        self,
        ref: reference.Reference,
        auth: authentication.AuthConfig | None,
        capability: str,
        use: Callable[[session.Session], Awaitable[T]],
    ) -> T:
        """Ask host after host until one gives what was asked for; the last one's failure counts."""
        credentials = authentication.choose(auth, ref.domain)
        found = await asyncio.to_thread(hosts.load, self._dirs, ref.domain)
        able = [host for host in found if capability in host.capabilities]
        failures: list[Exception] = []
        for host in able:
            at = session.Session(
                host, ref, credentials=credentials, shared=self._shared, patient=host is able[-1]
            )
            try:
                return await use(at)
            except (session.Status, wire.Failure) as error:
                _log.info("registry host failed", image=str(ref), host=host.netloc, error=str(error))
                failures.append(error)
        raise _translated(ref, failures)


@dataclass(kw_only=True, slots=True)
class _Transfer:
    """A blob on its way to a sink, over as many connections and hosts as it takes."""

    descriptor: Descriptor
    sink: Sink
    offset: int

    async def run(self, at: session.Session) -> None:
        """Bring all that is still missing from one host."""
        fruitless, ranges = 0, True
        while self.offset < self.descriptor.size:
            before = self.offset
            try:
                await self._once(at, ranges=ranges)
            except (wire.Broken, _NoRange) as error:
                fruitless = 0 if self.offset - before >= PROGRESS else fruitless + 1
                if fruitless >= MAX_WITHOUT_PROGRESS:
                    raise
                ranges = ranges and not isinstance(error, _NoRange)
                await at.pause(max(fruitless, 1))

    async def _once(self, at: session.Session, *, ranges: bool) -> None:
        asked = ranges and self.offset > 0
        headers = (("Range", f"bytes={self.offset}-"),) if asked else ()
        try:
            response = await at.ask("blobs", self.descriptor.digest, headers=headers)
        except session.Status as error:
            if asked and error.status == 416:
                raise _NoRange(str(error)) from error
            raise
        with contextlib.closing(response):
            await self._copy(response, skip=self._start(response, asked=asked))

    def _start(self, response: transport.Response, *, asked: bool) -> int:
        """Return how many bytes of a response to skip: all that we have, when Range was ignored."""
        size, length = self.descriptor.size, response.length
        if response.status == 206 and asked:
            match = _CONTENT_RANGE.fullmatch(response.header("content-range"))
            if not match or int(match[1]) != self.offset or match[2] not in {"*", str(size)}:
                raise _NoRange(f"{response.host} sent another range than it was asked for")
            if length is not None and length > size - self.offset:
                raise wire.Invalid(f"{response.host} sent more than the {size} bytes of the blob")
            return 0
        if response.status != 200:
            raise wire.Invalid(f"{response.host} answered {response.status} for a blob")
        if length is not None and length != size:
            raise wire.Invalid(f"{response.host} has {length} bytes of a blob of {size}")
        return self.offset

    async def _copy(self, response: transport.Response, *, skip: int) -> None:
        while data := await response.receive():
            skipped = min(skip, len(data))
            skip -= skipped
            data = data[skipped:]
            if len(data) > self.descriptor.size - self.offset:
                raise wire.Invalid(
                    f"{response.host} sent more than the {self.descriptor.size} bytes of the blob"
                )
            self.offset += len(data)
            if data and inspect.isawaitable(waiting := self.sink(data)):
                await waiting
            if self.offset == self.descriptor.size:
                return
        raise wire.Broken(
            f"{response.host} sent less than the {self.descriptor.size} bytes of the blob"
        )


class _NoRange(wire.Broken):
    """The host cannot resume: ask for the whole, and skip."""


_ABSENT = msgspec.Raw()


class _Head(msgspec.Struct, rename="camel"):
    """What tells kinds of documents apart; the rest is not even built, however large."""

    media_type: str = ""
    schema_version: int = 0
    manifests: msgspec.Raw = _ABSENT
    config: msgspec.Raw = _ABSENT
    layers: msgspec.Raw = _ABSENT
    fs_layers: msgspec.Raw = _ABSENT


async def _look_up(at: session.Session, tag: str) -> str | None:
    """Return the digest that a HEAD gives for a tag; None when the host does not do that."""
    try:
        response = await at.ask("manifests", tag, method="HEAD", headers=_ACCEPT)
    except session.Status as error:
        if error.status in {400, 404, 405, 501}:
            return None  # the GET that follows tells the truth
        raise
    with contextlib.closing(response):
        digest = response.header("docker-content-digest")
        return digest if reference.is_digest(digest) else None


async def _fetch(
    at: session.Session, name: str, wanted: str | None = None, size: int | None = None
) -> Resolved:
    for attempt in range(1, MAX_WITHOUT_PROGRESS + 1):
        response = await at.ask("manifests", name, headers=_ACCEPT)
        with contextlib.closing(response):
            try:
                body = await response.read(MAX_MANIFEST)
                break
            except wire.Broken:
                if attempt == MAX_WITHOUT_PROGRESS:
                    raise
        await at.pause(attempt)
    if size is not None and len(body) != size:
        raise wire.Invalid(f"{at.host.netloc} sent {len(body)} bytes of a manifest of {size}")
    claimed = response.header("docker-content-digest")
    if claimed:
        _verify(body, claimed, at.host.netloc)
    kind = response.header("content-type")
    return _verified(body, wanted=wanted, content_type=kind, source=at.host.netloc)


def _verified(body: bytes, *, wanted: str | None, content_type: str, source: str) -> Resolved:
    if wanted:
        _verify(body, wanted, source)
    return Resolved(
        digest=wanted or _digest(body, "sha256"),
        media_type=_media_type(body, content_type, source),
        size=len(body),
        body=body,
        source=source,
    )


def _verify(body: bytes, wanted: str, source: str) -> None:
    if not reference.is_digest(wanted):
        raise wire.Invalid(f"{source} sent a digest that is none")
    actual = _digest(body, wanted)
    if actual != wanted:
        raise wire.Invalid(f"{source} sent wrong digest {actual} for {wanted}")


def _digest(body: bytes, like: str) -> str:
    algorithm = like.partition(":")[0]
    return f"{algorithm}:{hashlib.new(algorithm, body).hexdigest()}"


def _media_type(body: bytes, content_type: str, source: str) -> str:
    """Return the one type that a document can have; Invalid when it could be read in two ways (V45)."""
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
        raise wire.Invalid(
            f"{source} sent media type {said[:100]!r}, which is no {'index' if index else 'manifest'}"
        )
    return said


def _given(value: msgspec.Raw) -> bool:
    return bytes(value) not in {b"", b"null"}


def _check(ref: reference.Reference, descriptor: Descriptor, limit: int) -> None:
    """Refuse a descriptor whose digest is not safe in a path, or whose size is out of bounds."""
    if not reference.is_digest(descriptor.digest):
        raise errors.InvalidArgument(f"{ref}: {descriptor.digest[:80]!r} is not a digest")
    if not 0 <= descriptor.size <= limit:
        raise errors.ResourceExhausted(f"{ref}: {descriptor.size} bytes are more than {limit}")


def _translated(ref: reference.Reference, failures: Sequence[Exception]) -> errors.CriError:
    if not failures:
        return errors.FailedPrecondition(
            f"{ref}: hosts.toml names no host with the capability to pull it"
        )
    *before, last = failures
    text = f"{last} (before: {'; '.join(map(str, before))})" if before else str(last)
    match last:
        case session.Status(status=404):
            return errors.NotFound(f"{ref}: not found: {text}")
        case session.Status(status=status) if status >= 500 or status in session.REPEATED:
            return errors.RegistryUnavailable(f"{ref}: {text}")
        case wire.Unreachable() | wire.Stalled() | wire.Broken():
            return errors.RegistryUnavailable(f"{ref}: {text}")
    return errors.Unknown(f"{ref}: {text}")
