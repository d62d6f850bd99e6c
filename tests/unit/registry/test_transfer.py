# SPDX-License-Identifier: Apache-2.0
"""Blobs arrive whole or not at all, from registries that stall, cut and lie (R15-R17, V73, V74)."""

import asyncio
import threading
import time

import pytest

from cri_server import errors
from cri_server.images import registry, session, transfer
from tests.fakes import registry as fake
from tests.fakes.pulling import (
    BLOBS,
    LAYER,
    MANIFESTS,
    REPO,
    fetch,
    framed,
    name,
)
from tests.fakes.registry import Cut, Drip, Ok, Raw, Say, Stall


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
    there.on(BLOBS, Cut(10), Cut(0))
    with pytest.raises(errors.RegistryUnavailable, match="closed the connection"):
        await fetch(client, name(there), blob)
    assert len(there.requests) == 4


async def test_little_progress_is_progress_but_not_for_ever(
    client: registry.Client, there: fake.Registry
) -> None:
    blob = there.add_blob(REPO, LAYER)
    there.on(BLOBS, *[Cut(10), Cut(10), Cut(0), Cut(0)] * 3, Ok())
    assert await fetch(client, name(there), blob) == LAYER
    there.requests.clear()
    there.on(BLOBS, Cut(10))
    with pytest.raises(errors.RegistryUnavailable, match="closed the connection"):
        await fetch(client, name(there), blob)
    assert len(there.requests) == transfer.MAX_SMALL


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
