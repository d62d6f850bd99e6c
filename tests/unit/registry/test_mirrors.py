# SPDX-License-Identifier: Apache-2.0
"""Mirrors are asked first, told nothing, and passed over when they fail."""

from pathlib import Path

import pytest

from cri_server import errors
from cri_server.images import reference, registry
from tests.fakes import registry as fake
from tests.fakes.pulling import (
    BASIC,
    BLOBS,
    LAYER,
    MANIFESTS,
    REPO,
    SECRET,
    USER,
    fetch,
    name,
    write_hosts,
)
from tests.fakes.registry import Guard, Raw, Say, Stall


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
