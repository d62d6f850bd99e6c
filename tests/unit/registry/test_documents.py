# SPDX-License-Identifier: Apache-2.0
"""Manifests and indexes are verified, and are clearly one thing (R17, V44-V46, V48)."""

import hashlib
import tracemalloc

import pytest

from cri_server import errors
from cri_server.images import documents, registry
from tests.fakes import registry as fake
from tests.fakes.pulling import (
    LAYER,
    MANIFESTS,
    REPO,
    framed,
    name,
)
from tests.fakes.registry import Ok, Raw, Say


async def test_a_tag_is_resolved_with_one_request(
    client: registry.Client, there: fake.Registry
) -> None:
    top = there.add_image(REPO, "v1", LAYER)
    found = await client.resolve(name(there))
    assert (found.digest, found.size, found.body) == (top.digest, top.size, top.body)
    assert (found.media_type, found.source) == (documents.OCI_MANIFEST, there.address)
    (asked,) = there.requests
    assert (asked.method, asked.path) == ("GET", f"{MANIFESTS}v1")
    assert asked.headers["accept-encoding"] == "identity"
    for kind in documents.INDEXES | documents.MANIFESTS:
        assert kind in asked.headers["accept"]


async def test_a_digest_is_asked_for_itself_whatever_the_tag(
    client: registry.Client, there: fake.Registry
) -> None:
    top = there.add_image(REPO, "v1", LAYER)
    found = await client.resolve(name(there, f":other@{top.digest}"))
    assert found.digest == top.digest
    assert there.paths() == [f"{MANIFESTS}{top.digest}"]


async def test_what_is_known_costs_a_head_request(
    client: registry.Client, there: fake.Registry
) -> None:
    top = there.add_image(REPO, "v1", LAYER)
    found = await client.resolve(name(there), known={top.digest: top.body}.get)
    assert (found.digest, found.body) == (top.digest, top.body)
    assert [each.method for each in there.requests] == ["HEAD"]


async def test_what_is_not_known_is_fetched_by_the_digest_of_the_head(
    client: registry.Client, there: fake.Registry
) -> None:
    top = there.add_image(REPO, "v1", LAYER)
    found = await client.resolve(name(there), known=lambda digest: None)
    assert found.body == top.body
    assert there.paths("HEAD") == [f"{MANIFESTS}v1"]
    assert there.paths("GET") == [f"{MANIFESTS}{top.digest}"]


@pytest.mark.parametrize(
    "head",
    [
        Say(405),
        Say(404),
        Ok({"Docker-Content-Digest": None}),
        Ok({"Docker-Content-Digest": "../x"}),
    ],
)
async def test_a_head_that_tells_nothing_is_no_failure(
    client: registry.Client, there: fake.Registry, head: fake.Behaviour
) -> None:
    top = there.add_image(REPO, "v1", LAYER)
    there.on(f"{MANIFESTS}v1", head, Ok())
    assert (await client.resolve(name(there), known=lambda digest: None)).digest == top.digest


async def test_an_entry_of_an_index(client: registry.Client, there: fake.Registry) -> None:
    child = there.add_image(REPO, "child", LAYER)
    document = {"schemaVersion": 2, "mediaType": documents.OCI_INDEX, "manifests": []}
    there.add_manifest(REPO, "v1", document, documents.OCI_INDEX)
    assert (await client.resolve(name(there))).media_type == documents.OCI_INDEX
    assert (await client.manifest(name(there), child)).body == child.body


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size": 1}, "bytes of a manifest"),
        ({"media_type": documents.OCI_INDEX}, "not of the type"),
        ({"digest": fake.digest(b"other")}, "not found"),
    ],
)
async def test_an_entry_must_be_what_its_index_says(
    client: registry.Client, there: fake.Registry, changes: dict[str, object], words: str
) -> None:
    child = there.add_image(REPO, "v1", LAYER)
    fields = {"digest": child.digest, "media_type": child.media_type, "size": child.size}
    lie = fake.Stored(body=b"", **{**fields, **changes})  # type: ignore[arg-type]
    with pytest.raises(errors.CriError, match=words):
        await client.manifest(name(there), lie)


@pytest.mark.parametrize(
    "digest", ["", "sha256:", "sha256:../../../../etc/passwd", "sha1:" + "0" * 40]
)
async def test_a_digest_that_is_none_is_never_asked_for(
    client: registry.Client, there: fake.Registry, digest: str
) -> None:
    blob = fake.Stored(digest=digest, media_type="", size=1, body=b"")
    for call in (client.manifest(name(there), blob), client.read_blob(name(there), blob)):
        with pytest.raises(errors.InvalidArgument, match="not a digest"):
            await call
    assert there.requests == []


async def test_a_digest_of_sha512_is_verified(
    client: registry.Client, there: fake.Registry
) -> None:
    top = there.add_image(REPO, "v1", LAYER)
    good = f"sha512:{hashlib.sha512(top.body).hexdigest()}"
    there.on(f"{MANIFESTS}sha512", Say(200, body=top.body), Say(200, body=top.body + b" "))
    assert (await client.resolve(name(there, f"@{good}"))).digest == good
    with pytest.raises(errors.Unknown, match="wrong digest"):
        await client.resolve(name(there, f"@{good}"))


async def test_a_manifest_with_another_digest_is_refused(
    client: registry.Client, there: fake.Registry
) -> None:
    top = there.add_image(REPO, "v1", LAYER)
    there.on(MANIFESTS, Say(200, body=top.body.replace(b"2", b"3")))
    with pytest.raises(errors.Unknown, match="wrong digest") as caught:
        await client.resolve(name(there, f"@{top.digest}"))
    assert caught.value.code == "UNKNOWN"


@pytest.mark.parametrize(
    "claim", [fake.digest(b"other"), "sha256:zz", "../../x", "sha1:" + "0" * 40]
)
async def test_a_wrong_digest_header_is_refused(
    client: registry.Client, there: fake.Registry, claim: str
) -> None:
    there.add_image(REPO, "v1", LAYER)
    there.on(MANIFESTS, Ok({"Docker-Content-Digest": claim}))
    with pytest.raises(errors.Unknown, match="digest"):
        await client.resolve(name(there))


async def test_the_digest_header_may_be_absent(
    client: registry.Client, there: fake.Registry
) -> None:
    top = there.add_image(REPO, "v1", LAYER)
    there.on(MANIFESTS, Ok({"Docker-Content-Digest": None}))
    assert (await client.resolve(name(there))).digest == top.digest


DESCRIPTOR = {"mediaType": "x", "digest": fake.digest(b""), "size": 0}
PLAIN = {"schemaVersion": 2, "config": DESCRIPTOR, "layers": []}
INDEX = {"schemaVersion": 2, "manifests": []}


@pytest.mark.parametrize(
    ("document", "header", "expected"),
    [
        (PLAIN, "", documents.OCI_MANIFEST),
        (PLAIN, "application/json; charset=utf-8", documents.OCI_MANIFEST),
        (PLAIN, documents.DOCKER_MANIFEST, documents.DOCKER_MANIFEST),
        (
            {**PLAIN, "mediaType": documents.DOCKER_MANIFEST},
            "text/plain",
            documents.DOCKER_MANIFEST,
        ),
        (INDEX, "", documents.OCI_INDEX),
        (INDEX, documents.DOCKER_INDEX, documents.DOCKER_INDEX),
        ({**INDEX, "layers": None}, "", documents.OCI_INDEX),
    ],
)
async def test_the_type_of_a_document(
    client: registry.Client, there: fake.Registry, document: object, header: str, expected: str
) -> None:
    there.add_manifest(REPO, "v1", document, header)
    assert (await client.resolve(name(there))).media_type == expected


@pytest.mark.parametrize(
    ("document", "header"),
    [
        ({**PLAIN, **INDEX}, documents.OCI_MANIFEST),
        ({**INDEX, "layers": []}, documents.OCI_INDEX),
        ({**INDEX, "config": DESCRIPTOR}, documents.OCI_INDEX),
        (PLAIN, documents.OCI_INDEX),
        (INDEX, documents.OCI_MANIFEST),
        ({**PLAIN, "mediaType": documents.OCI_INDEX}, ""),
        ({**PLAIN, "mediaType": documents.OCI_MANIFEST}, documents.OCI_INDEX),
        ({**PLAIN, "mediaType": documents.OCI_MANIFEST}, documents.DOCKER_MANIFEST),
        ({**PLAIN, "mediaType": "application/vnd.oci.artifact.manifest.v1+json"}, ""),
        (PLAIN, "text/html"),
        ({"schemaVersion": 2}, documents.OCI_MANIFEST),
        ({"mediaType": 1}, ""),
        ([], ""),
        (b"", ""),
        (b"<html>", "text/html"),
        (b"\xff\xfe{}", ""),
        (b"[" * 200_000, ""),
        (b'{"a":' * 100_000, ""),
    ],
)
async def test_what_is_not_clearly_one_thing_is_refused(
    client: registry.Client, there: fake.Registry, document: object, header: str
) -> None:
    there.add_manifest(REPO, "v1", document, header)
    with pytest.raises(errors.Unknown, match=f"{there.address} "):
        await client.resolve(name(there))


@pytest.mark.parametrize(
    ("document", "header"),
    [
        ({"schemaVersion": 1, "fsLayers": [], "history": []}, ""),
        ({"schemaVersion": 2, "fsLayers": []}, ""),
        (PLAIN, "application/vnd.docker.distribution.manifest.v1+prettyjws"),
        ({"schemaVersion": 1}, "application/vnd.docker.distribution.manifest.v1+json"),
    ],
)
async def test_schema_1_is_refused_by_its_name(
    client: registry.Client, there: fake.Registry, document: object, header: str
) -> None:
    there.add_manifest(REPO, "v1", document, header)
    with pytest.raises(errors.Unimplemented, match=r"vnd\.docker\.distribution\.manifest\.v1"):
        await client.resolve(name(there))


@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
async def test_a_manifest_has_at_most_4_mib(
    client: registry.Client, there: fake.Registry, framing: str
) -> None:
    there.on(MANIFESTS, Raw(framed(b" " * (5 << 20), framing)))
    with pytest.raises(errors.Unknown, match="4194304 bytes"):
        await client.resolve(name(there))


async def test_a_large_document_costs_no_more_than_its_bytes(
    client: registry.Client, there: fake.Registry
) -> None:
    junk = b'{"schemaVersion":2,"config":{},"junk":[' + b"[]," * 1_300_000 + b"[]]}"
    there.add_manifest(REPO, "v1", junk)
    tracemalloc.start()
    try:
        await client.resolve(name(there))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 6 * len(junk)
