# SPDX-License-Identifier: Apache-2.0
"""Pulling from registries that are fine, in trouble, or evil.

Hazards R15-R19, V37, V40-V49, V73, V74.
"""

import asyncio
import base64
import datetime
import hashlib
import json
import threading
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from cri_server import errors
from cri_server.images import documents, reference, registry, session, transport, wire
from cri_server.pb import api_pb2 as api
from tests.fakes import certificates
from tests.fakes import registry as fake
from tests.fakes.registry import Cut, Drip, Guard, Ok, Raw, Say, Stall

REPO = "team/app"
BLOBS = f"/v2/{REPO}/blobs/"
MANIFESTS = f"/v2/{REPO}/manifests/"
LAYER = hashlib.shake_128(b"layer").digest(600_000)
SECRET = "hunter2"
USER = api.AuthConfig(username="me", password=SECRET)
BASIC = "Basic " + base64.b64encode(f"me:{SECRET}".encode()).decode()
QUICK = session.Limits(progress_timeout=0.4, head_timeout=0.4, pause=0.01, longest_pause=0.05)


@pytest.fixture
def there() -> Iterator[fake.Registry]:
    """Return a running registry."""
    with fake.run() as running:
        yield running


@pytest.fixture
def mirror() -> Iterator[fake.Registry]:
    """Return another running registry."""
    with fake.run() as running:
        yield running


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[registry.Client]:
    """Return a client that reads hosts.toml files below `tmp_path`, with little patience."""
    made = registry.Client([tmp_path], limits=QUICK)
    yield made
    made.close()


@pytest.fixture
def via_mirror(tmp_path: Path, there: fake.Registry, mirror: fake.Registry) -> reference.Reference:
    """Return a name for which `mirror` is asked before `there`."""
    write_hosts(tmp_path, there.address, f'[host."http://{mirror.address}"]\n')
    return name(there)


def write_hosts(root: Path, host: str, text: str) -> None:
    (root / host).mkdir()
    (root / host / "hosts.toml").write_text(text)


def name(there: fake.Registry, tail: str = ":v1") -> reference.Reference:
    return reference.parse(f"{there.address}/{REPO}{tail}")


async def fetch(
    client: registry.Client,
    ref: reference.Reference,
    blob: fake.Stored,
    auth: api.AuthConfig | None = None,
    *,
    offset: int = 0,
) -> bytes:
    got = bytearray()
    await client.blob(ref, blob, auth, sink=got.extend, offset=offset)
    return bytes(got)


# ---- documents


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


def framed(body: bytes, framing: str) -> bytes:
    head = b"HTTP/1.1 200 OK\r\n"
    if framing == "length":
        return head + b"Content-Length: %d\r\n\r\n" % len(body) + body
    if framing == "chunked":
        pieces = [body[i : i + 50_000] for i in range(0, len(body), 50_000)]
        chunks = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
        return head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"
    return head + b"\r\n" + body


# ---- blobs


@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
async def test_a_blob_arrives_however_it_is_framed(
    client: registry.Client, there: fake.Registry, framing: str
) -> None:
    blob = there.add_blob(REPO, LAYER)
    there.on(BLOBS, Raw(framed(LAYER, framing)))
    assert await fetch(client, name(there), blob) == LAYER


async def test_a_sink_may_be_a_coroutine_and_slow(there: fake.Registry) -> None:
    blob = there.add_blob(REPO, LAYER)
    client = registry.Client([], limits=session.Limits(progress_timeout=0.1))
    got = bytearray()
    paused = False

    async def sink(data: bytes) -> None:
        nonlocal paused
        if not paused:
            paused = True
            await asyncio.sleep(0.3)  # a slow disk is no stall
        got.extend(data)

    await client.blob(name(there), blob, sink=sink)
    client.close()
    assert bytes(got) == LAYER


async def test_what_a_sink_raises_goes_to_the_caller_and_ends_the_transfer(
    client: registry.Client, there: fake.Registry
) -> None:
    blob = there.add_blob(REPO, LAYER)

    def sink(data: bytes) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        await client.blob(name(there), blob, sink=sink)
    assert len(there.requests) == 1


async def test_an_empty_blob_costs_no_request(
    client: registry.Client, there: fake.Registry
) -> None:
    assert await fetch(client, name(there), there.add_blob(REPO, b"")) == b""
    assert there.requests == []


async def test_a_blob_goes_on_where_the_store_had_it(
    client: registry.Client, there: fake.Registry
) -> None:
    blob = there.add_blob(REPO, LAYER)
    assert await fetch(client, name(there), blob, offset=1000) == LAYER[1000:]
    assert there.requests[0].headers["range"] == "bytes=1000-"
    assert await fetch(client, name(there), blob, offset=len(LAYER)) == b""
    assert len(there.requests) == 1


@pytest.mark.parametrize("reset", [False, True])
async def test_a_cut_or_reset_blob_is_resumed(
    client: registry.Client, there: fake.Registry, reset: bool
) -> None:
    blob = there.add_blob(REPO, LAYER)
    there.on(BLOBS, Cut(200_000, reset), Cut(200_000, reset), Ok())
    assert await fetch(client, name(there), blob) == LAYER
    asked = [each.headers.get("range") for each in there.requests]
    assert asked[0] is None
    assert all(each and each.startswith("bytes=") for each in asked[1:])


@pytest.mark.parametrize(
    "second",
    [
        Ok(ranges=False),
        Say(416),
        Ok({"Content-Range": "bytes 5-599999/600000"}),
        Ok({"Content-Range": "bytes 200000-599999/777"}),
        Ok({"Content-Range": "lines 1-2/3"}),
        Ok({"Content-Range": None}),
    ],
)
async def test_a_host_that_cannot_resume_sends_all_again(
    client: registry.Client, there: fake.Registry, second: fake.Behaviour
) -> None:
    blob = there.add_blob(REPO, LAYER)
    there.on(BLOBS, Cut(200_000), second, Ok())
    assert await fetch(client, name(there), blob) == LAYER


async def test_a_new_etag_does_not_matter_when_the_bytes_are_right(
    client: registry.Client, there: fake.Registry
) -> None:
    blob = there.add_blob(REPO, LAYER)
    there.on(BLOBS, Cut(200_000), Ok({"ETag": '"new"'}))
    assert await fetch(client, name(there), blob) == LAYER


async def test_without_progress_the_tries_are_few(
    client: registry.Client, there: fake.Registry
) -> None:
    blob = there.add_blob(REPO, LAYER)
    there.on(BLOBS, Cut(10))
    with pytest.raises(errors.RegistryUnavailable, match="closed the connection"):
        await fetch(client, name(there), blob)
    assert len(there.requests) == 3


async def test_with_progress_a_blob_may_be_cut_often(
    client: registry.Client, there: fake.Registry
) -> None:
    blob = there.add_blob(REPO, LAYER)
    there.on(BLOBS, Cut(70_000))
    assert await fetch(client, name(there), blob) == LAYER
    assert len(there.requests) == 9


@pytest.mark.parametrize("after", [None, 0, 1, 300_000])
async def test_a_stall_ends_in_time_and_leaves_no_connection(
    client: registry.Client, there: fake.Registry, after: int | None
) -> None:
    blob = there.add_blob(REPO, LAYER)
    there.on(BLOBS, Stall(after))
    start = time.monotonic()
    with pytest.raises(errors.RegistryUnavailable, match=r"for 0\.4 s"):
        await fetch(client, name(there), blob)
    assert time.monotonic() - start < 2
    assert client._shared.http._idle == []


async def test_a_stalled_manifest_ends_in_time(
    client: registry.Client, there: fake.Registry
) -> None:
    there.add_image(REPO, "v1", LAYER)
    there.on(MANIFESTS, Stall(3))
    with pytest.raises(errors.RegistryUnavailable, match="sent nothing"):
        await client.resolve(name(there))


async def test_a_slow_blob_that_moves_is_no_stall(there: fake.Registry) -> None:
    client = registry.Client([], limits=session.Limits(progress_timeout=0.5))
    blob = there.add_blob(REPO, b"0123456789")
    step = threading.Semaphore(1)
    there.on(BLOBS, Drip(1, step))
    got = bytearray()
    loop, start = asyncio.get_running_loop(), time.monotonic()

    def sink(data: bytes) -> None:
        got.extend(data)
        loop.call_later(0.1, step.release)

    await client.blob(name(there), blob, sink=sink)
    client.close()
    assert bytes(got) == b"0123456789"
    assert time.monotonic() - start > 0.5


async def test_a_cancelled_blob_ends_at_once(client: registry.Client, there: fake.Registry) -> None:
    blob = there.add_blob(REPO, LAYER)
    there.on(BLOBS, Stall(1000))
    arrived = asyncio.Event()
    task = asyncio.create_task(client.blob(name(there), blob, sink=lambda data: arrived.set()))
    await asyncio.wait_for(arrived.wait(), 5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (b"Content-Length: 10", "10 bytes of a blob of"),
        (b"Content-Length: 999999999999999999", "999999999999999999 bytes of a blob of"),
        (b"Content-Length: -1", "rules of HTTP"),
        (b"Content-Length: 1e3", "rules of HTTP"),
        (b"Content-Length: " + b"9" * 5000, "rules of HTTP"),
        (b"Content-Length: 1\r\nContent-Length: 2", "rules of HTTP"),
        (b"Transfer-Encoding: gzip", "rules of HTTP"),
        (b"X: " + b"x" * 200_000, "rules of HTTP"),
        (b"Transfer-Encoding: chunked", "rules of HTTP"),
        (b"Content-Range: bytes 0-1/2", "sent more than"),
    ],
)
async def test_lies_in_a_head_are_refused(
    client: registry.Client, there: fake.Registry, head: bytes, words: str
) -> None:
    blob = there.add_blob(REPO, LAYER)
    there.on(BLOBS, Raw(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n\r\n" + LAYER + b"more"))
    with pytest.raises(errors.Unknown, match=words):
        await fetch(client, name(there), blob)


@pytest.mark.parametrize("answer", [b"", b"\r\n\r\n", b"HTTP/9.9 banana\r\n\r\n", b"SSH-2.0-x\r\n"])
async def test_what_is_not_http_is_refused(
    client: registry.Client, there: fake.Registry, answer: bytes
) -> None:
    there.on(MANIFESTS, Raw(answer))
    with pytest.raises(errors.Unknown):
        await client.resolve(name(there))


async def test_endless_interim_answers_end_in_time(
    client: registry.Client, there: fake.Registry
) -> None:
    there.on(MANIFESTS, Raw(b"HTTP/1.1 103 Early Hints\r\n\r\n" * 1000))
    with pytest.raises(errors.RegistryUnavailable):
        await client.resolve(name(there))


@pytest.mark.parametrize("framing", ["chunked", "close"])
async def test_a_sink_never_gets_more_than_the_descriptor_says(
    client: registry.Client, there: fake.Registry, framing: str
) -> None:
    blob = there.add_blob(REPO, LAYER)
    there.on(BLOBS, Raw(framed(LAYER + b"more", framing)))
    got = bytearray()
    with pytest.raises(errors.Unknown, match="sent more than"):
        await client.blob(name(there), blob, sink=got.extend)
    assert len(got) <= len(LAYER)


async def test_an_endless_body_is_cut_at_the_size(
    client: registry.Client, there: fake.Registry
) -> None:
    blob = there.add_blob(REPO, b"small")
    there.on(BLOBS, Raw(framed(bytes(30 << 20), "close")))
    with pytest.raises(errors.Unknown, match="sent more than"):
        await fetch(client, name(there), blob)


async def test_a_content_encoding_changes_nothing(
    client: registry.Client, there: fake.Registry
) -> None:
    blob = there.add_blob(REPO, LAYER)
    there.on(BLOBS, Ok({"Content-Encoding": "gzip, gzip, gzip"}))
    assert await fetch(client, name(there), blob) == LAYER


async def test_a_huge_descriptor_allocates_nothing(
    client: registry.Client, there: fake.Registry
) -> None:
    size = 1 << 50
    blob = fake.Stored(digest=fake.digest(b""), media_type="", size=size, body=b"")
    there.on(BLOBS, Raw(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\nx" % size))
    with pytest.raises(errors.RegistryUnavailable):
        await fetch(client, name(there), blob)


async def test_a_small_blob_is_verified_and_bounded(
    client: registry.Client, there: fake.Registry
) -> None:
    blob = there.add_blob(REPO, b"{}")
    assert await client.read_blob(name(there), blob) == b"{}"
    there.on(BLOBS, Raw(framed(b"[]", "length")))
    with pytest.raises(errors.Unknown, match="wrong digest"):
        await client.read_blob(name(there), blob)
    with pytest.raises(errors.ResourceExhausted):
        await client.read_blob(name(there), blob, limit=1)


async def test_connections_are_used_again(client: registry.Client, there: fake.Registry) -> None:
    top = there.add_image(REPO, "v1", LAYER)
    blob = there.add_blob(REPO, LAYER)
    await client.resolve(name(there))
    for _ in range(5):
        await fetch(client, name(there), blob)
        await client.manifest(name(there), top)
    assert len(there.connections) == 1


async def test_a_kept_connection_that_was_closed_is_no_failure(
    client: registry.Client, there: fake.Registry
) -> None:
    there.add_image(REPO, "v1", LAYER)
    await client.resolve(name(there))
    there.hang_up()
    assert (await client.resolve(name(there))).source == there.address


# ---- trouble


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
async def test_trouble_that_passes_is_waited_for(
    client: registry.Client, there: fake.Registry, status: int
) -> None:
    top = there.add_image(REPO, "v1", LAYER)
    there.on(MANIFESTS, Say(status), Say(status, {"Retry-After": "0"}), Ok())
    assert (await client.resolve(name(there))).digest == top.digest


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
async def test_trouble_that_stays_is_told(
    client: registry.Client, there: fake.Registry, status: int
) -> None:
    there.on(MANIFESTS, Say(status))
    with pytest.raises(errors.RegistryUnavailable, match=rf"{there.address} answered {status}$"):
        await client.resolve(name(there))
    assert len(there.requests) == session.ATTEMPTS


@pytest.mark.parametrize("status", [400, 405, 410, 418, 501, 599])
async def test_other_statuses_are_not_tried_again(
    client: registry.Client, there: fake.Registry, status: int
) -> None:
    there.on(MANIFESTS, Say(status))
    with pytest.raises(errors.Unknown, match=str(status)):
        await client.resolve(name(there))
    assert len(there.requests) == 1


@pytest.mark.slow
async def test_retry_after_is_obeyed(there: fake.Registry) -> None:
    there.add_image(REPO, "v1", LAYER)
    client = registry.Client([], limits=session.Limits(pause=0.001))
    soon = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    past = soon.strftime("%a, %d %b %Y %H:%M:%S GMT")
    there.on(
        MANIFESTS,
        Say(429, {"Retry-After": "1"}),
        Say(503, {"Retry-After": past}),
        Say(503, {"Retry-After": "nonsense"}),
        Ok(),
    )
    start = time.monotonic()
    await client.resolve(name(there))
    client.close()
    assert 1.0 <= time.monotonic() - start < 2


async def test_retry_after_is_obeyed_up_to_a_cap(
    client: registry.Client, there: fake.Registry
) -> None:
    there.add_image(REPO, "v1", LAYER)
    there.on(MANIFESTS, Say(429, {"Retry-After": "99999999999999999999"}), Ok())
    start = time.monotonic()
    await client.resolve(name(there))
    assert QUICK.longest_pause <= time.monotonic() - start < 1


async def test_a_reset_before_the_head_is_tried_again(
    client: registry.Client, there: fake.Registry
) -> None:
    top = there.add_image(REPO, "v1", LAYER)
    there.on(MANIFESTS, Raw(b""), Raw(b"HTTP/1.1 200"), Ok())
    assert (await client.resolve(name(there))).digest == top.digest


async def test_a_manifest_cut_in_the_middle_is_tried_again(
    client: registry.Client, there: fake.Registry
) -> None:
    top = there.add_image(REPO, "v1", LAYER)
    there.on(MANIFESTS, Cut(10), Ok())
    assert (await client.resolve(name(there))).digest == top.digest


async def test_what_is_not_there_is_not_found(
    client: registry.Client, there: fake.Registry
) -> None:
    with pytest.raises(errors.NotFound) as caught:
        await client.resolve(name(there))
    text = caught.value.message
    assert (
        text
        == f"{there.address}/{REPO}:v1: not found: {there.address} answered 404 MANIFEST_UNKNOWN"
    )


async def test_nobody_there_is_unavailable(client: registry.Client) -> None:
    with pytest.raises(errors.RegistryUnavailable, match=r"^RegistryUnavailable: .*refused"):
        await client.resolve(reference.parse("127.0.0.1:1/a"))


async def test_no_such_host_is_unavailable(client: registry.Client) -> None:
    with pytest.raises(errors.RegistryUnavailable, match="no such host name"):
        await client.resolve(reference.parse("registry.invalid/a"))


async def test_a_registrys_own_words_are_not_repeated(
    client: registry.Client, there: fake.Registry
) -> None:
    said = {"errors": [{"code": "TOOMANYREQUESTS", "message": f"{SECRET}\nFAKE LOG LINE"}]}
    there.on(MANIFESTS, Say(418, body=json.dumps(said).encode()))
    with pytest.raises(errors.Unknown, match=r"418 TOOMANYREQUESTS$") as caught:
        await client.resolve(name(there))
    assert SECRET not in caught.value.message
    said["errors"][0]["code"] = "BAD\nLINE"
    there.on(MANIFESTS, Say(418, body=json.dumps(said).encode()))
    with pytest.raises(errors.Unknown, match=r"418$"):
        await client.resolve(name(there))


# ---- mirrors


@pytest.mark.parametrize(
    "trouble",
    [
        Say(404),
        Say(401),
        Say(403),
        Say(429),
        Say(500),
        Say(503),
        Stall(),
        Raw(b""),
        Raw(b"x\r\n\r\n"),
    ],
)
async def test_a_mirror_that_fails_is_passed_over_at_once(
    client: registry.Client,
    there: fake.Registry,
    mirror: fake.Registry,
    via_mirror: reference.Reference,
    trouble: fake.Behaviour,
) -> None:
    top = there.add_image(REPO, "v1", LAYER)
    mirror.on("/v2/", trouble)
    found = await client.resolve(via_mirror)
    assert (found.digest, found.source) == (top.digest, there.address)
    assert await fetch(client, via_mirror, there.add_blob(REPO, LAYER)) == LAYER
    assert [each.query for each in mirror.requests] == [{"ns": there.address}] * 2


async def test_a_mirror_that_lies_about_a_manifest_is_passed_over(
    client: registry.Client,
    there: fake.Registry,
    mirror: fake.Registry,
    via_mirror: reference.Reference,
) -> None:
    top = there.add_image(REPO, "v1", LAYER)
    mirror.on("/v2/", Say(200, body=b"{}"))
    ref = reference.parse(f"{via_mirror.repository}@{top.digest}")
    assert (await client.resolve(ref)).source == there.address


async def test_a_mirror_that_works_is_enough(
    client: registry.Client,
    there: fake.Registry,
    mirror: fake.Registry,
    via_mirror: reference.Reference,
) -> None:
    top = mirror.add_image(REPO, "v1", LAYER)
    assert (await client.resolve(via_mirror)).digest == top.digest
    assert there.requests == []


async def test_another_host_goes_on_where_the_first_one_stopped(
    client: registry.Client,
    there: fake.Registry,
    mirror: fake.Registry,
    via_mirror: reference.Reference,
) -> None:
    blob = there.add_blob(REPO, LAYER)
    mirror.add_blob(REPO, LAYER)
    mirror.on(BLOBS, Stall(300_000))
    assert await fetch(client, via_mirror, blob) == LAYER
    assert there.requests[0].headers["range"] == "bytes=300000-"


async def test_credentials_never_reach_a_mirror(
    client: registry.Client,
    there: fake.Registry,
    mirror: fake.Registry,
    via_mirror: reference.Reference,
) -> None:
    there.add_image(REPO, "v1", LAYER)
    there.on("/v2/", Guard(BASIC, "Basic"))
    mirror.on(
        "/v2/",
        Say(401, {"WWW-Authenticate": f'Basic, Bearer realm="http://{mirror.address}/token"'}),
    )
    mirror.on("/token", Say(200, body=b'{"token":"anonymous"}'))
    assert (await client.resolve(via_mirror, USER)).source == there.address
    assert "/token" in mirror.paths()
    assert all(each.headers.get("authorization") != BASIC for each in mirror.requests)
    assert SECRET not in repr(mirror.requests)


async def test_all_failures_are_told_the_last_one_first(
    client: registry.Client,
    there: fake.Registry,
    mirror: fake.Registry,
    via_mirror: reference.Reference,
) -> None:
    mirror.on("/v2/", Say(503))
    with pytest.raises(errors.NotFound) as caught:
        await client.resolve(via_mirror)
    assert f"(before: {mirror.address} answered 503)" in caught.value.message


async def test_capabilities_decide_who_is_asked_for_what(
    client: registry.Client, there: fake.Registry, mirror: fake.Registry, tmp_path: Path
) -> None:
    write_hosts(
        tmp_path,
        there.address,
        f'capabilities = ["resolve"]\n[host."http://{mirror.address}"]\ncapabilities = ["pull"]\n',
    )
    top = there.add_image(REPO, "v1", LAYER)
    mirror.add_image(REPO, "v1", LAYER)
    assert (await client.resolve(name(there))).source == mirror.address
    assert [each.method for each in there.requests] == ["HEAD"]
    assert mirror.paths() == [f"{MANIFESTS}{top.digest}"]


async def test_headers_and_another_path_of_a_mirror(
    client: registry.Client, there: fake.Registry, mirror: fake.Registry, tmp_path: Path
) -> None:
    url = f"http://{mirror.address}/api/proxy"
    write_hosts(
        tmp_path,
        there.address,
        f'[host."{url}"]\noverride_path = true\n[host."{url}".header]\nx-key = "{SECRET}"\n',
    )
    top = there.add_image(REPO, "v1", LAYER)
    mirror.on("/api/proxy", Say(200, body=top.body))
    assert (await client.resolve(name(there))).source == mirror.address
    (asked,) = mirror.requests
    assert (asked.path, asked.headers["x-key"]) == (f"/api/proxy/{REPO}/manifests/v1", SECRET)


async def test_hosts_files_are_read_at_each_pull(
    client: registry.Client, there: fake.Registry, mirror: fake.Registry, tmp_path: Path
) -> None:
    there.add_image(REPO, "v1", LAYER)
    mirror.add_image(REPO, "v1", LAYER)
    assert (await client.resolve(name(there))).source == there.address
    write_hosts(tmp_path, there.address, f'server = "http://{mirror.address}"\n')
    assert (await client.resolve(name(there))).source == mirror.address


# ---- who we are


async def test_the_token_flow(client: registry.Client, there: fake.Registry) -> None:
    there.add_image(REPO, "v1", LAYER)
    blob = there.add_blob(REPO, LAYER)
    realm = f'Bearer realm="http://{there.address}/token",service="svc"'
    there.on("/v2/", Guard("Bearer abc", realm))
    there.on("/token", Say(200, body=b'{"token":"abc"}'))
    await client.resolve(name(there), USER)
    assert await fetch(client, name(there), blob, USER) == LAYER
    assert there.paths() == [
        f"{MANIFESTS}v1",
        "/token",
        f"{MANIFESTS}v1",
        f"{BLOBS}{blob.digest}",
    ]
    assert there.requests[0].headers.get("authorization") is None
    assert there.requests[1].headers["authorization"] == BASIC


async def test_a_token_that_has_run_out_is_replaced(
    client: registry.Client, there: fake.Registry
) -> None:
    there.add_image(REPO, "v1", LAYER)
    realm = f'Bearer realm="http://{there.address}/token"'
    there.on("/token", Say(200, body=b'{"token":"one"}'), Say(200, body=b'{"token":"two"}'))
    there.on("/v2/", Guard("Bearer one", realm))
    await client.resolve(name(there))
    there.on("/v2/", Guard("Bearer two", realm))
    await client.resolve(name(there))


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (Say(401), "unauthorized"),
        (Say(401, {"WWW-Authenticate": "Basic"}), "unauthorized"),
        (Say(403, body=b'{"errors":[{"code":"DENIED"}]}'), "unauthorized.*403 .DENIED"),
        (Say(401, {"WWW-Authenticate": 'Bearer realm="file:///etc/passwd"'}), "unauthorized"),
    ],
)
async def test_a_refusal_says_unauthorized(
    client: registry.Client, there: fake.Registry, answer: fake.Behaviour, words: str
) -> None:
    there.on("/v2/", answer)
    for lent in (None, USER):
        with pytest.raises(errors.Unknown, match=words) as caught:
            await client.resolve(name(there), lent)
        assert SECRET not in caught.value.message


async def test_a_token_endpoint_in_trouble_is_unavailable(
    client: registry.Client, there: fake.Registry
) -> None:
    there.on("/v2/", Guard("x", f'Bearer realm="http://{there.address}/token?key={SECRET}"'))
    there.on("/token", Say(503))
    with pytest.raises(
        errors.RegistryUnavailable, match=r"token endpoint .* answered 503"
    ) as caught:
        await client.resolve(name(there), USER)
    assert SECRET not in caught.value.message


async def test_credentials_for_another_server_are_not_sent(
    client: registry.Client, there: fake.Registry
) -> None:
    there.on("/v2/", Guard(BASIC, "Basic"))
    lent = api.AuthConfig(username="me", password=SECRET, server_address="other.test")
    with pytest.raises(errors.Unknown, match="unauthorized"):
        await client.resolve(name(there), lent)
    assert all("authorization" not in each.headers for each in there.requests)


# ---- redirects


async def test_a_blob_elsewhere_is_fetched_without_credentials(
    client: registry.Client, there: fake.Registry, mirror: fake.Registry, tmp_path: Path
) -> None:
    write_hosts(
        tmp_path, there.address, f'server = "http://{there.address}"\nheader = {{x-key = "k"}}\n'
    )
    blob = there.add_blob(REPO, LAYER)
    there.on(
        "/v2/",
        Say(401, {"WWW-Authenticate": "Basic"}),
        Say(307, {"Location": f"http://{mirror.address}/x?sig=1"}),
    )
    mirror.on("/x", Raw(framed(LAYER, "length")))
    assert await fetch(client, name(there), blob, USER) == LAYER
    assert there.requests[1].headers["authorization"] == BASIC
    assert there.requests[1].headers["x-key"] == "k"
    (asked,) = mirror.requests
    assert not {"authorization", "x-key", "cookie"} & set(asked.headers)
    assert asked.headers["host"] == mirror.address
    assert asked.query == {"sig": "1"}


async def test_a_redirect_at_home_keeps_credentials_and_range(
    client: registry.Client, there: fake.Registry
) -> None:
    blob = there.add_blob(REPO, LAYER)
    there.on(
        BLOBS, Say(401, {"WWW-Authenticate": "Basic"}), Say(302, {"Location": "/v2/x/blobs/y"})
    )
    there.on("/v2/x/", Raw(framed(LAYER, "length")))
    assert await fetch(client, name(there), blob, USER, offset=5) == LAYER[5:]
    assert there.requests[-1].headers["authorization"] == BASIC
    assert there.requests[-1].headers["range"] == "bytes=5-"


async def test_who_has_left_home_does_not_get_credentials_back(
    client: registry.Client, there: fake.Registry, mirror: fake.Registry
) -> None:
    blob = there.add_blob(REPO, LAYER)
    there.on(
        BLOBS,
        Say(401, {"WWW-Authenticate": "Basic"}),
        Say(302, {"Location": f"http://{mirror.address}/a"}),
    )
    mirror.on("/a", Say(302, {"Location": f"http://{there.address}/back"}))
    there.on("/back", Raw(framed(LAYER, "length")))
    assert await fetch(client, name(there), blob, USER) == LAYER
    assert "authorization" not in there.requests[-1].headers


async def test_a_401_from_elsewhere_is_not_answered(
    client: registry.Client, there: fake.Registry, mirror: fake.Registry
) -> None:
    there.on(MANIFESTS, Say(302, {"Location": f"http://{mirror.address}/a"}))
    mirror.on("/a", Say(401, {"WWW-Authenticate": "Basic"}))
    with pytest.raises(errors.Unknown, match=r"unauthorized.*after a redirect"):
        await client.resolve(name(there), USER)
    assert len(mirror.requests) == 1


@pytest.mark.parametrize(
    "location",
    [
        "file:///etc/passwd",
        "ftp://a.test/",
        "//",
        "http://",
        "http://user:pass@127.0.0.1/",
        "http://[::1/",
        "http://127.0.0.1:99999/",
        "gopher://127.0.0.1:70/x",
        "",
        "http://127.0.0.1/\r\n x",
    ],
)
async def test_redirects_to_nowhere_are_refused(
    client: registry.Client, there: fake.Registry, location: str
) -> None:
    there.on(MANIFESTS, Say(302, {"Location": location}))
    with pytest.raises(errors.Unknown) as caught:
        await client.resolve(name(there), USER)
    assert "passwd" not in caught.value.message


async def test_a_loop_of_redirects_ends(client: registry.Client, there: fake.Registry) -> None:
    there.on(MANIFESTS, Say(302, {"Location": f"{MANIFESTS}v1"}))
    with pytest.raises(errors.Unknown, match="more than 5 times"):
        await client.resolve(name(there))
    assert len(there.requests) == 6


async def test_a_signed_url_is_in_no_message(
    client: registry.Client, there: fake.Registry, mirror: fake.Registry
) -> None:
    there.on(
        MANIFESTS, Say(302, {"Location": f"http://{mirror.address}/x?X-Amz-Signature={SECRET}"})
    )
    for answer in (Say(403), Say(500), Stall(), Raw(b"x"), Say(404)):
        mirror.on("/x", answer)
        with pytest.raises(errors.CriError) as caught:
            await client.resolve(name(there))
        assert SECRET not in caught.value.message
        assert SECRET not in "".join(map(repr, causes(caught.value)))


def causes(error: BaseException) -> Iterator[BaseException]:
    yield error
    for each in (error.__cause__, error.__context__):
        if each is not None:
            yield from causes(each)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:{port}/x", "http://localhost:{port}/x", "http://0.0.0.0:{port}/x"]
)
async def test_a_registry_elsewhere_cannot_send_us_to_this_machine(
    client: registry.Client,
    there: fake.Registry,
    mirror: fake.Registry,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    url: str,
) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://{there.address}")  # stands in for the whole Internet
    monkeypatch.setenv("NO_PROXY", "0.0.0.0")
    write_hosts(tmp_path, "far.test", 'server = "http://far.test"\n')
    port = mirror.address.rpartition(":")[2]
    there.on("/v2/", Say(302, {"Location": url.format(port=port)}))
    with pytest.raises(errors.Unknown, match="this machine or its link"):
        await client.resolve(reference.parse("far.test/a"))
    assert mirror.requests == []


@pytest.mark.parametrize("host", ["169.254.169.254", "[fe80::1]", "[::ffff:169.254.169.254]"])
async def test_a_registry_elsewhere_cannot_send_us_to_the_link(
    client: registry.Client,
    there: fake.Registry,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    host: str,
) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://{there.address}")
    write_hosts(tmp_path, "far.test", 'server = "http://far.test"\n')
    there.on("/v2/", Say(302, {"Location": f"http://{host}/latest/meta-data"}))
    with pytest.raises(errors.Unknown, match="this machine or its link"):
        await client.resolve(reference.parse("far.test/a"))
    assert len(there.requests) == 1


# ---- proxies


async def test_a_plain_request_goes_through_the_proxy(
    client: registry.Client, there: fake.Registry, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://me:{SECRET}@{there.address}")
    write_hosts(tmp_path, "far.test", 'server = "http://far.test"\n')
    top = there.add_image("a", "v1", LAYER)
    assert (await client.resolve(reference.parse("far.test/a:v1"))).digest == top.digest
    (asked,) = there.requests
    assert asked.headers["host"] == "far.test"
    assert asked.headers["proxy-authorization"] == BASIC


async def test_a_tls_request_goes_through_a_tunnel_of_the_proxy(
    client: registry.Client, there: fake.Registry, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    certificate = certificates.make(tmp_path, "far", "DNS:far.test")
    there.inside = certificate.server()
    monkeypatch.setenv("HTTPS_PROXY", f"http://me:{SECRET}@{there.address}")
    write_hosts(tmp_path, "far.test", f'ca = "{certificate.certificate}"\n')
    top = there.add_image("a", "v1", LAYER)
    assert (await client.resolve(reference.parse("far.test/a:v1"))).digest == top.digest
    outside, inside = there.requests
    assert (outside.method, outside.path) == ("CONNECT", "far.test:443")
    assert outside.headers["proxy-authorization"] == BASIC
    assert "proxy-authorization" not in inside.headers


@pytest.mark.parametrize("answer", ["refuse", "nobody"])
async def test_a_proxy_that_fails_is_named(
    client: registry.Client, there: fake.Registry, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    address = there.address if answer == "refuse" else "127.0.0.1:1"
    monkeypatch.setenv("HTTPS_PROXY", f"http://me:{SECRET}@{address}")
    with pytest.raises(errors.RegistryUnavailable, match=r"proxy 127\.0\.0\.1") as caught:
        await client.resolve(reference.parse("far.test/a"))
    assert SECRET not in caught.value.message


# ---- TLS


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> certificates.Certificate:
    """Return a certificate for 127.0.0.1."""
    return certificates.make(tmp_path_factory.mktemp("tls"), "loopback", "IP:127.0.0.1")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("", "certificate not accepted"),
        ("skip_verify = true\n", ""),
        ('ca = "{pem}"\n', ""),
        ('ca = "missing.pem"\n', "certificate files"),
    ],
)
async def test_who_is_trusted(
    client: registry.Client,
    certificate: certificates.Certificate,
    tmp_path: Path,
    options: str,
    words: str,
) -> None:
    with fake.run(tls=certificate.server()) as secure:
        top = secure.add_image(REPO, "v1", LAYER)
        text = options.format(pem=certificate.certificate)
        write_hosts(tmp_path, secure.address, f'server = "https://{secure.address}"\n{text}')
        if words:
            with pytest.raises(errors.Unknown, match=words):
                await client.resolve(name(secure))
            assert secure.requests == []
        else:
            assert (await client.resolve(name(secure))).digest == top.digest
            blob = secure.add_blob(REPO, LAYER * 5)
            assert await fetch(client, name(secure), blob) == LAYER * 5
        client.close()


async def test_a_bad_certificate_on_loopback_is_no_reason_for_plain_http(
    client: registry.Client, certificate: certificates.Certificate
) -> None:
    with fake.run(tls=certificate.server()) as secure:
        with pytest.raises(errors.RegistryUnavailable, match="certificate not accepted"):
            await client.resolve(name(secure), USER)
        assert secure.requests == []


async def test_a_client_certificate_is_shown_to_its_host(
    client: registry.Client, certificate: certificates.Certificate, tmp_path: Path
) -> None:
    own = certificates.make(tmp_path, "me", "DNS:me")
    with fake.run(tls=certificate.server(demand=own.certificate)) as secure:
        top = secure.add_image(REPO, "v1", LAYER)
        write_hosts(
            tmp_path,
            secure.address,
            f'ca = "{certificate.certificate}"\nclient = [["{own.certificate}", "{own.key}"]]\n',
        )
        assert (await client.resolve(name(secure))).digest == top.digest
        client.close()


async def test_no_redirect_from_https_to_http(
    client: registry.Client,
    there: fake.Registry,
    certificate: certificates.Certificate,
    tmp_path: Path,
) -> None:
    with fake.run(tls=certificate.server()) as secure:
        write_hosts(tmp_path, secure.address, f'ca = "{certificate.certificate}"\n')
        secure.on("/v2/", Say(302, {"Location": f"http://{there.address}/"}))
        with pytest.raises(errors.Unknown, match="from https to http"):
            await client.resolve(name(secure))
        client.close()
    assert there.requests == []


async def test_plain_http_on_loopback_is_remembered(
    client: registry.Client, there: fake.Registry
) -> None:
    there.add_image(REPO, "v1", LAYER)
    await client.resolve(name(there))
    assert client._shared.plain == {f"https://{there.address}"}


# ---- the transport alone


async def test_a_request_that_http_forbids_is_refused_without_repeating_it(
    there: fake.Registry,
) -> None:
    http = transport.Transport()
    request = transport.Request(
        url=f"http://{there.address}/", headers=(("Authorization", f"{SECRET}\r\nX: y"),)
    )
    with pytest.raises(wire.Invalid) as caught:
        await http.send(request)
    assert SECRET not in "".join(map(repr, causes(caught.value)))
    assert there.requests == []


async def test_reading_pauses_while_nobody_takes_the_bytes(there: fake.Registry) -> None:
    body = bytes(30 << 20)
    there.on("/big", Raw(framed(body, "length")))
    http = transport.Transport()
    response = await http.send(transport.Request(url=f"http://{there.address}/big"))
    most = await settled(lambda: response._wire._size)
    assert most <= wire.HIGH_WATER + (1 << 20)
    assert len(await response.read(len(body))) == len(body)
    response.close()


async def settled(value: Callable[[], int]) -> int:
    """Return a value once it has stayed the same for a while and is not zero."""
    last, since = value(), time.monotonic()
    while time.monotonic() - since < 0.2 or not last:
        await asyncio.sleep(0.01)
        if value() != last:
            last, since = value(), time.monotonic()
    return last
