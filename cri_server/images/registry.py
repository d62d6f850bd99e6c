# SPDX-License-Identifier: Apache-2.0
"""Manifests and blobs from registries: the OCI distribution protocol as a pull needs it.

    client = Client([Path("/etc/containerd/certs.d")])
    top = await client.resolve(ref, auth)                   # tag or digest → verified manifest
    child = await client.manifest(ref, descriptor, auth)    # an entry of an index
    await client.blob(ref, layer, auth, sink=writer.write)  # streamed, resumed after a cut

Hosts are asked in the order of hosts.toml; whatever goes wrong at one, the next is asked. Documents
are verified here. Blobs are bounded by the size of their descriptor and go to the sink, which
verifies the digest: bytes that it has taken cannot be taken back. Nothing is written to disk, so a
crash loses the transfer only; `blob(offset=…)` goes on from what a store has kept. Messages name
reference, host and status, never a URL.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TypeVar

import structlog

from cri_server import errors
from cri_server.images import auth as authentication
from cri_server.images import documents, hosts, reference, session, transfer, wire

MAX_MANIFEST = 4 << 20
MAX_BLOB = 1 << 62
MAX_CUTS = 3
_ACCEPT = (("Accept", documents.ACCEPT),)

_log = structlog.get_logger(__name__)

T = TypeVar("T")


class Client:
    """Registries as the hosts.toml files below `config_dirs` describe them.

    Belongs to one event loop.
    """

    def __init__(
        self,
        config_dirs: Sequence[Path],
        *,
        progress_timeout: float = 300.0,
        limits: session.Limits | None = None,
    ) -> None:
        """`progress_timeout` is in seconds, from one piece of a body to the next.

        `limits` overrides it, and has the others.
        """
        self._dirs = tuple(config_dirs)
        self._shared = session.Shared(limits or session.Limits(progress_timeout=progress_timeout))

    async def resolve(
        self,
        ref: reference.Reference,
        auth: authentication.AuthConfig | None = None,
        *,
        known: Callable[[str], bytes | None] | None = None,
    ) -> documents.Resolved:
        """Return the manifest or index that a reference means now.

        With `known`, a tag is looked up by HEAD first (which no rate limit counts), and
        `known(digest)` may return the document that is here already. It must not answer for another
        repository: a registry could name a digest that it does not have (cache poisoning).

        Raises NotFound; RegistryUnavailable when the last host could not be reached or is in
        trouble; Unknown for `unauthorized`, wrong digests and documents that break the rules (the
        kubelet shows its text alone); Unimplemented for schema 1; InvalidArgument for credentials
        and FailedPrecondition for a hosts.toml that make no sense.
        """
        if ref.digest:
            return await self._document(ref, ref.digest, auth)
        return await self._first(
            ref, auth, "resolve", lambda at: self._by_tag(at, ref, auth, known)
        )

    async def manifest(
        self,
        ref: reference.Reference,
        descriptor: documents.Descriptor,
        auth: authentication.AuthConfig | None = None,
    ) -> documents.Resolved:
        """Return the document that a descriptor of the same repository points to.

        Raises like `resolve`.
        """
        _check(ref, descriptor, MAX_MANIFEST)
        found = await self._document(ref, descriptor.digest, auth, size=descriptor.size)
        if descriptor.media_type and documents.differ(descriptor.media_type, found.media_type):
            raise errors.Unknown(f"{ref}: {found.digest} is not of the type that its index says")
        return found

    async def blob(
        self,
        ref: reference.Reference,
        descriptor: documents.Descriptor,
        auth: authentication.AuthConfig | None = None,
        *,
        sink: transfer.Sink,
        offset: int = 0,
    ) -> None:
        """Hand the bytes of a blob from `offset` to its end to the sink, in order.

        The sink may be a coroutine function; time spent in it is no stall. What it raises ends the
        transfer and goes to the caller as it is. The digest is for the sink's owner to verify.
        Raises like `resolve`, after the connection was resumed as often as it made progress.
        """
        _check(ref, descriptor, MAX_BLOB)
        moving = transfer.Transfer(descriptor=descriptor, sink=sink, offset=offset)
        await self._first(ref, auth, "pull", moving.run)

    async def read_blob(
        self,
        ref: reference.Reference,
        descriptor: documents.Descriptor,
        auth: authentication.AuthConfig | None = None,
        *,
        limit: int = MAX_MANIFEST,
    ) -> bytes:
        """Return a small blob, such as a config, verified.

        Raises like `resolve`, and ResourceExhausted beyond `limit` bytes.
        """
        _check(ref, descriptor, limit)
        whole = bytearray()
        await self.blob(ref, descriptor, auth, sink=whole.extend)
        if documents.digest_of(bytes(whole), descriptor.digest) != descriptor.digest:
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
    ) -> documents.Resolved:
        return await self._first(ref, auth, "pull", lambda at: _fetch(at, digest, digest, size))

    async def _by_tag(
        self,
        at: session.Session,
        ref: reference.Reference,
        auth: authentication.AuthConfig | None,
        known: Callable[[str], bytes | None] | None,
    ) -> documents.Resolved:
        may_pull = "pull" in at.host.capabilities
        digest = await _look_up(at, ref.target) if known or not may_pull else None
        if digest is None:
            return await _fetch(at, ref.target)
        body = known(digest) if known else None
        if body is not None:
            return documents.verified(body, wanted=digest, content_type="", source=at.host.netloc)
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
                _log.info(
                    "registry host failed", image=str(ref), host=host.netloc, error=str(error)
                )
                failures.append(error)
        raise _translated(ref, failures)


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
) -> documents.Resolved:
    for attempt in range(1, MAX_CUTS + 1):
        response = await at.ask("manifests", name, headers=_ACCEPT)
        with contextlib.closing(response):
            try:
                body = await response.read(MAX_MANIFEST)
                break
            except wire.Broken:
                if attempt == MAX_CUTS:
                    raise
        await at.pause(attempt)
    if size is not None and len(body) != size:
        raise wire.Invalid(f"{at.host.netloc} sent {len(body)} bytes of a manifest of {size}")
    claimed = response.header("docker-content-digest")
    if claimed:
        documents.verify(body, claimed, at.host.netloc)
    kind = response.header("content-type")
    return documents.verified(body, wanted=wanted, content_type=kind, source=at.host.netloc)


def _check(ref: reference.Reference, descriptor: documents.Descriptor, limit: int) -> None:
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
