# SPDX-License-Identifier: Apache-2.0
"""Proxies, TLS, and what HTTP does not allow."""

import asyncio
import socket
import ssl
import threading
import time
from collections.abc import Callable
from concurrent import futures
from pathlib import Path

import h11
import pytest

from cri_server import errors
from cri_server.images import reference, registry, transport, wire
from tests.fakes import certificates
from tests.fakes import registry as fake
from tests.fakes.pulling import (
    BASIC,
    BLOBS,
    LAYER,
    REPO,
    SECRET,
    USER,
    causes,
    fetch,
    framed,
    name,
    write_hosts,
)
from tests.fakes.registry import Guard, Raw, Say

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


async def test_a_proxy_that_cannot_be_one_is_refused_without_its_secret(
    client: registry.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", f"http://me:{SECRET}#x@proxy.test:3128")
    with pytest.raises(errors.Unknown, match="URL of the proxy") as caught:
        await client.resolve(reference.parse("far.test/a"))
    assert all(SECRET not in str(each) for each in causes(caught.value))


# ---- names


Found = list[tuple[int, int, int, str, tuple[str, int]]]


def lead(monkeypatch: pytest.MonkeyPatch, look_up: Callable[[], Found]) -> None:
    """Have every name looked up by this."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: look_up())


def at(host: str, port: int) -> Found:
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port))]


async def test_a_silent_resolver_holds_up_no_other_thread(
    there: fake.Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, go_on, loop = asyncio.Event(), threading.Event(), asyncio.get_running_loop()
    loop.set_default_executor(futures.ThreadPoolExecutor(1))

    def silent() -> Found:
        loop.call_soon_threadsafe(asked.set)
        go_on.wait(20)
        return at("127.0.0.1", int(there.address.rpartition(":")[2]))

    lead(monkeypatch, silent)
    http = transport.Transport()
    request = transport.Request(url="http://far.test/v2/")
    asking = [asyncio.create_task(http.send(request)) for _ in range(3)]
    async with asyncio.timeout(10):
        await asked.wait()
        await asyncio.to_thread(bool)
    asking.pop().cancel()
    go_on.set()
    for response in await asyncio.gather(*asking):
        assert response.status == 200
        response.close()
    http.close()


async def test_the_next_address_is_tried_when_one_refuses(
    there: fake.Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = int(there.address.rpartition(":")[2])
    lead(monkeypatch, lambda: at("127.0.0.1", 1) + at("127.0.0.1", port))
    http = transport.Transport()
    response = await http.send(transport.Request(url="http://far.test/v2/"))
    assert response.status == 200
    response.close()
    lead(monkeypatch, lambda: at("127.0.0.1", 1) + at("127.0.0.1", 2))
    with pytest.raises(wire.Unreachable, match="refused"):
        await http.send(transport.Request(url="http://other.test/v2/"))
    http.close()


def test_families_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    six = [(socket.AF_INET6, socket.SOCK_STREAM, 6, "", (f"::{n}", 1)) for n in range(3)]
    lead(monkeypatch, lambda: six + at("127.0.0.1", 1))
    found = [address[0] for _, address in wire._look_up("a.test", 1)]
    assert found == ["::0", "127.0.0.1", "::1", "::2"]


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


async def test_a_private_ca_without_key_usage_is_trusted(
    client: registry.Client, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Python 3.13 makes strict contexts; so does this one, whatever Python it is."""
    context = ssl.create_default_context()
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    monkeypatch.setattr(ssl, "create_default_context", lambda: context)
    authority = certificates.make(tmp_path, "ca", "DNS:ca.test")
    signed = certificates.make(tmp_path, "signed", "IP:127.0.0.1", authority=authority)
    with fake.run(tls=signed.server()) as secure:
        write_hosts(tmp_path, secure.address, f'ca = "{authority.certificate}"\n')
        top = secure.add_image(REPO, "v1", LAYER)
        assert (await client.resolve(name(secure))).digest == top.digest
        client.close()


@pytest.mark.parametrize("options", ["skip_verify = true\n", 'ca = "{pem}"\n'])
async def test_trust_goes_where_the_host_sends_us(
    client: registry.Client,
    there: fake.Registry,
    certificate: certificates.Certificate,
    tmp_path: Path,
    options: str,
) -> None:
    registry_host = there.address.replace("127.0.0.1", "localhost")
    with fake.run(tls=certificate.server()) as secure:
        text = options.format(pem=certificate.certificate)
        write_hosts(tmp_path, registry_host, f'server = "http://{registry_host}"\n{text}')
        secure.on("/token", Say(200, body=b'{"token":"abc"}'))
        there.on("/v2/", Guard("Bearer abc", f'Bearer realm="https://{secure.address}/token"'))
        there.add_image(REPO, "v1", LAYER)
        ref = reference.parse(f"{registry_host}/{REPO}:v1")
        await client.resolve(ref)
        blob = there.add_blob(REPO, LAYER)
        there.on(BLOBS, Say(307, {"Location": f"https://{secure.address}/x"}))
        secure.on("/x", Raw(framed(LAYER, "length")))
        assert await fetch(client, ref, blob) == LAYER
        client.close()


async def test_any_certificate_will_do_on_loopback(
    client: registry.Client, certificate: certificates.Certificate
) -> None:
    """As in containerd: `localhost:5000` works without a hosts.toml, and never in plain text."""
    with fake.run(tls=certificate.server()) as secure:
        top = secure.add_image(REPO, "v1", LAYER)
        assert (await client.resolve(name(secure), USER)).digest == top.digest
        assert client._shared.plain == set()
        client.close()


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


def test_a_header_of_the_request_stands_in_for_the_usual_one() -> None:
    request = transport.Request(url="http://a.test/", headers=(("user-agent", "proxy-2"),))
    sent = transport._encode(h11.Connection(h11.CLIENT), request, transport._target(request))
    agents = [line for line in sent.split(b"\r\n") if line.lower().startswith(b"user-agent:")]
    assert agents == [b"user-agent: proxy-2"]


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
