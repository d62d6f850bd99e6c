# SPDX-License-Identifier: Apache-2.0
"""PullImage: from a name to an image on record.

    resolve ─► manifest for this platform ─► config
                 ├─► layer 1: download ─► unpack ────────────► commit ─┐
                 ├─► layer 2: download ─► unpack ─► (settle) ─► commit ├─► syncfs ─► record
                 └─► ...                            in this order, bottom first

A tag is asked for anew at every pull; documents and layers that are here already are not fetched
again. Documents, layers and record appear in that order, each by rename, with one syncfs before the
record: a crash at any point leaves orphans for `gc` and never half an image, and a power loss
leaves a whole image or none.

Pulls of the same name with the same credentials are one pull, and so are downloads and layers of
pulls from the same registry with the same credentials; whoever is cancelled takes nothing from the
others, the last one ends the work. What another image's pull could not bring is tried once more
from one's own repository. Bounds on parallel work are per pull: a registry that stalls holds up
nobody else.
"""

import asyncio
import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import structlog

from cri_server import errors, snapshots
from cri_server.images import (
    flights,
    gc,
    ingest,
    layers,
    manifest,
    reference,
    sources,
    store,
    tar,
    workers,
)
from cri_server.pb import api_pb2 as api
from shim import linux

log = structlog.get_logger()
LEAST_PATIENCE = 60.0  # seconds: a busy disk may hold up the unpacking of a layer for long
WORKERS = os.cpu_count() or 1  # processes of one pull


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    """One pull, once its documents are known."""

    name: reference.Reference
    auth: api.AuthConfig | None
    place: tuple[str, str]  # registry and credentials: what work may be shared with
    digest: str  # what the name resolved to
    documents: dict[str, bytes]
    image_id: str
    config: manifest.Config
    layers: tuple[manifest.Descriptor, ...]
    keys: tuple[str, ...]
    downloads: asyncio.Semaphore
    pool: workers.Workers


class Puller:
    """Pulls images into a store. `parallel` bounds the downloads of one pull; `patience` is in
    seconds, for the unpacking of a layer that stands still."""

    def __init__(
        self,
        *,
        client: sources.Source,
        images: store.Store,
        layer_host: snapshots.Snapshots,
        collector: gc.Collector,
        parallel: int = 3,
        patience: float = 300.0,
        limits: tar.Limits | None = None,
    ) -> None:
        self._client, self._images, self._snapshots = client, images, layer_host
        self._collector, self._parallel = collector, parallel
        self._patience = max(patience, LEAST_PATIENCE)
        self._layers = layers.Layers(layer_host, limits=limits or tar.Limits())
        self._platform = manifest.host_platform()
        self._pulls: flights.Flights[str] = flights.Flights()
        self._chains: flights.Flights[None] = flights.Flights()
        self._blobs: flights.Flights[Path] = flights.Flights(dispose=_unlink)

    async def pull(self, text: str, auth: api.AuthConfig | None = None) -> str:
        """Bring an image here, or up to date; return its id.

        Raises InvalidArgument for a name or an image that can never work, NotFound,
        ResourceExhausted for a full disk or a bound, and what `registry` raises.
        """
        name = reference.parse(text)
        place = (name.domain, _fingerprint(auth))
        async with self._pulls.hold(
            (str(name), place), lambda: self._pull(name, auth, place)
        ) as image_id:
            return image_id

    async def close(self) -> None:
        """Wait until cancelled pulls have cleaned up."""
        for each in (self._pulls, self._chains, self._blobs):
            await each.close()

    async def _pull(
        self, name: reference.Reference, auth: api.AuthConfig | None, place: tuple[str, str]
    ) -> str:
        try:
            plan = await self._plan(name, auth, place)
            await self._carry_out(plan)
        except OSError as e:
            raise ingest.host_failure(e, f"{name} not pulled") from e
        log.info("image pulled", image=str(name), id=plan.image_id, layers=len(plan.keys))
        return plan.image_id

    async def _carry_out(self, plan: _Plan) -> None:
        try:
            async with self._collector.claim((*plan.keys, *plan.documents)):
                if not await flights.in_thread(self._is_here, plan):
                    await self._make_all(plan)
                    await flights.in_thread(self._record, plan)
        except BaseException:
            await self._chains.close()  # a layer that was being committed may still come
            await self._collector.collect()
            raise

    # ---- documents

    async def _plan(
        self, name: reference.Reference, auth: api.AuthConfig | None, place: tuple[str, str]
    ) -> _Plan:
        """Resolve a name and read the documents behind it."""
        resolved = await self._client.resolve(name, auth, known=lambda d: self._known(name, d))
        documents = {resolved.digest: resolved.body}
        found = manifest.parse(resolved.body)
        if isinstance(found, manifest.Index):
            chosen = manifest.choose(found, self._platform)
            child = await self._child(name, resolved.digest, chosen, auth)
            documents[chosen.digest] = child
            found = manifest.parse(child)
        if isinstance(found, manifest.Index):
            raise errors.InvalidArgument("an index in an index is not supported")
        if not found.config.digest.startswith("sha256:"):
            raise errors.InvalidArgument("an image id must be a sha256 digest")
        body = await self._config(name, found.config, auth)
        documents[found.config.digest] = body
        config = manifest.parse_config(body, len(found.layers))
        if not config.platform.runs_on(self._platform):
            log.warning(
                "image for another platform", image=str(name), platform=str(config.platform)
            )
        return _Plan(
            name=name,
            auth=auth,
            place=place,
            digest=resolved.digest,
            documents=documents,
            image_id=found.config.digest,
            config=config,
            layers=found.layers,
            keys=manifest.chain(config.diff_ids),
            downloads=asyncio.Semaphore(self._parallel),
            pool=workers.Workers(WORKERS, patience=self._patience),
        )

    def _known(self, name: reference.Reference, digest: str) -> bytes | None:
        """Return the document that this very repository had under a digest earlier."""
        known = self._images.find(name.canonical(digest)) is not None
        return self._stored(digest) if known else None

    def _stored(self, digest: str) -> bytes | None:
        body = self._images.read_blob(digest)
        return body if body is not None and ingest.matches(body, digest) else None

    async def _child(
        self,
        name: reference.Reference,
        index: str,
        descriptor: manifest.Descriptor,
        auth: api.AuthConfig | None,
    ) -> bytes:
        """Return a manifest of an index; it is here when this repository had the index earlier."""
        image = self._images.find(name.canonical(index))
        if image is not None and descriptor.digest in image.blobs:
            body = await flights.in_thread(self._stored, descriptor.digest)
            if body is not None:
                return body
        return (await self._client.manifest(name, descriptor, auth)).body

    async def _config(
        self,
        name: reference.Reference,
        descriptor: manifest.Descriptor,
        auth: api.AuthConfig | None,
    ) -> bytes:
        body = await flights.in_thread(self._stored, descriptor.digest)
        if body is None:
            body = await self._client.read_blob(name, descriptor, auth, limit=manifest.MAX_DOCUMENT)
        return body

    # ---- layers

    async def _make_all(self, plan: _Plan) -> None:
        missing = sum(self._snapshots.layer(key) is None for key in plan.keys)
        plan.pool.warm(min(missing, WORKERS))
        try:
            with _unwrapped():
                async with asyncio.TaskGroup() as group:
                    for index in range(len(plan.keys)):
                        group.create_task(self._layer(plan, index))
        finally:
            await plan.pool.close()

    async def _layer(self, plan: _Plan, index: int) -> None:
        """See to it that a layer is there, and all below it."""
        key = plan.keys[index]
        if self._snapshots.layer(key) is None:
            async with self._chains.hold(
                (plan.place, key), lambda: self._make(plan, index), insist=True
            ):
                pass

    async def _make(self, plan: _Plan, index: int) -> None:
        """Unpack a layer while those below it are made, and commit it on top of them."""
        descriptor, below = plan.layers[index], plan.keys[:index]
        blob = self._blobs.hold(
            (plan.place, descriptor.digest), lambda: self._download(plan, descriptor), insist=True
        )
        parent = asyncio.create_task(self._layer(plan, index - 1)) if index else None
        try:
            async with self._layers.staged(
                blob, plan.config.diff_ids[index], below, pool=plan.pool
            ) as staged:
                if parent is not None:
                    await parent
                await self._layers.commit(staged, plan.keys[index], below, pool=plan.pool)
        finally:
            if parent is not None:
                parent.cancel()
                await asyncio.gather(parent, return_exceptions=True)

    async def _download(self, plan: _Plan, descriptor: manifest.Descriptor) -> Path:
        async with plan.downloads:
            blob = ingest.Ingest(self._snapshots.root / "tmp", descriptor)
            async with blob.writing():
                await self._client.blob(plan.name, descriptor, plan.auth, sink=blob.write)
            return blob.path

    # ---- the record

    def _is_here(self, plan: _Plan) -> bool:
        """Say whether all of this is on record already, names included, and nothing is lost."""
        image = self._images.find(plan.image_id)
        return (
            image is not None
            and plan.name.canonical(plan.digest) in image.repo_digests
            and plan.name.tagged in (None, *image.repo_tags)
            and all(self._snapshots.layer(key) for key in plan.keys)
            and all(self._images.read_blob(d) == body for d, body in plan.documents.items())
        )

    def _record(self, plan: _Plan) -> None:
        """Write the documents, bring everything to the disk, and only then say that it is there."""
        for digest, body in plan.documents.items():
            self._images.write_blob(digest, body)
        made = [layer for key in plan.keys if (layer := self._snapshots.layer(key))]
        image = store.Image(
            id=plan.image_id,
            repo_tags=(plan.name.tagged,) if plan.name.tagged else (),
            repo_digests=(plan.name.canonical(plan.digest),),
            size=sum(layer.bytes for layer in made) + sum(map(len, plan.documents.values())),
            config=plan.config.process,
            platform=str(plan.config.platform),
            layers=plan.keys,
            blobs=tuple(plan.documents),
        )
        self._images.put(image, sync=self._sync)

    def _sync(self) -> None:
        fd = os.open(self._snapshots.root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            linux.syncfs(fd)
        finally:
            os.close(fd)


@contextlib.contextmanager
def _unwrapped() -> Iterator[None]:
    """Raise the first error of a task group as itself."""
    try:
        yield
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None


def _fingerprint(auth: api.AuthConfig | None) -> str:
    """Return what tells credentials apart without being one."""
    data = auth.SerializeToString(deterministic=True) if auth is not None else b""
    return hashlib.sha256(data).hexdigest() if data else ""


def _unlink(path: Path) -> None:
    path.unlink(missing_ok=True)
