# SPDX-License-Identifier: Apache-2.0
"""Trouble is waited for; credentials stay at home (R18, R19, V37, V40-V43)."""

import datetime
import json
import time
from pathlib import Path

import pytest

from cri_server import errors
from cri_server.images import reference, registry, session
from cri_server.pb import api_pb2 as api
from tests.fakes import registry as fake
from tests.fakes.pulling import (
    BASIC,
    BLOBS,
    LAYER,
    MANIFESTS,
    QUICK,
    REPO,
    SECRET,
    USER,
    causes,
    fetch,
    framed,
    name,
    write_hosts,
)
from tests.fakes.registry import Cut, Guard, Ok, Raw, Say, Stall

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
