# SPDX-License-Identifier: Apache-2.0
"""One set of tests against the fake registry and the real one, so that the fake can be believed."""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Iterator

import pytest

from cri_server import errors
from cri_server.images import documents, reference, registry, session
from tests.fakes import registry as fake
from tests.lab import image, waiting
from tests.lab import registry as real

REPO = "team/app"
LAYER = hashlib.shake_128(b"layer").digest(300_000)


@pytest.fixture(
    params=["fake", pytest.param("real", marks=pytest.mark.needs("docker-registry"))],
    scope="module",
)
def address(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """Return the address of a registry that has the test image."""
    if request.param == "fake":
        with fake.run() as there:
            image.push(made(), there.address, REPO, "v1")
            yield there.address
    else:
        with real.run(tmp_path_factory.mktemp("registry")) as running:
            image.push(made(), running.address, REPO, "v1")
            yield running.address


@pytest.fixture
async def client() -> AsyncIterator[registry.Client]:
    """Return a client without configuration: loopback registries need none."""
    limits = session.Limits(progress_timeout=waiting.patient(5), pause=0.01)
    client = registry.Client([], limits=limits)
    yield client
    client.close()


def made() -> image.Image:
    return image.image([LAYER], {"Cmd": ["sh"]})


def name(address: str, tail: str = ":v1") -> reference.Reference:
    return reference.parse(f"{address}/{REPO}{tail}")


def layer_of(body: bytes) -> fake.Stored:
    layer = json.loads(body)["layers"][0]
    return fake.Stored(
        digest=layer["digest"], media_type=layer["mediaType"], size=layer["size"], body=b""
    )


async def fetch(client: registry.Client, address: str, blob: fake.Stored, offset: int = 0) -> bytes:
    got = bytearray()
    await client.blob(name(address), blob, sink=got.extend, offset=offset)
    return bytes(got)


async def test_a_tag_is_resolved(client: registry.Client, address: str) -> None:
    found = await client.resolve(name(address))
    assert (found.digest, found.body) == (made().digest, made().manifest)
    assert (found.media_type, found.size) == (documents.OCI_MANIFEST, len(made().manifest))


async def test_a_digest_is_resolved(client: registry.Client, address: str) -> None:
    found = await client.resolve(name(address, f"@{made().digest}"))
    assert found.body == made().manifest


async def test_a_known_tag_costs_no_body(client: registry.Client, address: str) -> None:
    asked: list[str] = []

    def known(digest: str) -> bytes:
        asked.append(digest)
        return made().manifest

    assert (await client.resolve(name(address), known=known)).digest == made().digest
    assert asked == [made().digest]


async def test_an_unknown_tag_is_fetched_after_the_head(
    client: registry.Client, address: str
) -> None:
    found = await client.resolve(name(address), known=lambda digest: None)
    assert found.body == made().manifest


async def test_a_manifest_behind_a_descriptor(client: registry.Client, address: str) -> None:
    top = await client.resolve(name(address))
    assert (await client.manifest(name(address), top)).body == top.body


async def test_config_and_layer_arrive_whole(client: registry.Client, address: str) -> None:
    top = await client.resolve(name(address))
    config = json.loads(top.body)["config"]
    blob = fake.Stored(
        digest=config["digest"], media_type=config["mediaType"], size=config["size"], body=b""
    )
    assert await client.read_blob(name(address), blob) == made().config
    layer = layer_of(top.body)
    assert await fetch(client, address, layer) == made().blobs[layer.digest]


async def test_a_blob_goes_on_from_an_offset(client: registry.Client, address: str) -> None:
    layer = layer_of(made().manifest)
    assert await fetch(client, address, layer, 1000) == made().blobs[layer.digest][1000:]


async def test_many_at_once(client: registry.Client, address: str) -> None:
    layer = layer_of(made().manifest)
    got = await asyncio.gather(*(fetch(client, address, layer) for _ in range(20)))
    assert set(got) == {made().blobs[layer.digest]}


@pytest.mark.parametrize("tail", [":v2", f"@sha256:{'0' * 64}"])
async def test_what_is_not_there_is_not_found(
    client: registry.Client, address: str, tail: str
) -> None:
    with pytest.raises(errors.NotFound, match="answered 404 MANIFEST_UNKNOWN"):
        await client.resolve(name(address, tail))
    with pytest.raises(errors.NotFound, match="answered 404 MANIFEST_UNKNOWN"):
        await client.resolve(name(address, tail), known=lambda digest: None)


async def test_a_repository_that_is_not_there_is_not_found(
    client: registry.Client, address: str
) -> None:
    with pytest.raises(errors.NotFound, match="answered 404"):
        await client.resolve(reference.parse(f"{address}/no/such"))


async def test_a_blob_that_is_not_there_is_not_found(client: registry.Client, address: str) -> None:
    missing = fake.Stored(digest=fake.digest(b"x"), media_type="", size=1, body=b"")
    with pytest.raises(errors.NotFound, match="answered 404 BLOB_UNKNOWN"):
        await fetch(client, address, missing)
