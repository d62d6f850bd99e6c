# SPDX-License-Identifier: Apache-2.0
"""Challenges, tokens, and whose credentials go where."""

import base64
import dataclasses
import urllib.parse
from collections.abc import AsyncIterator, Iterator

import pytest

from cri_server import errors
from cri_server.images import auth, hosts, transport, wire
from cri_server.pb import api_pb2 as api
from tests.fakes import registry as fake

USER = auth.Credentials(username="me", password="secret")
BASIC = "Basic " + base64.b64encode(b"me:secret").decode()


def encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


@pytest.fixture
def there() -> Iterator[fake.Registry]:
    """Return a token endpoint, at /token."""
    with fake.run() as running:
        running.on("/token", fake.Say(200, body=b'{"token":"abc","expires_in":120}'))
        yield running


@pytest.fixture
async def authorizer() -> AsyncIterator[auth.Authorizer]:
    """Return an authorizer that has not met anybody."""
    http = transport.Transport()
    yield auth.Authorizer(http, timeout=0.5)
    http.close()


def host_of(there: fake.Registry, *, scheme: str = "http") -> hosts.Host:
    return hosts.Host(scheme=scheme, netloc=there.address, own=True)


def bearer(realm: str, **parameters: str) -> list[auth.Challenge]:
    return [auth.Challenge(scheme="bearer", parameters={"realm": realm, **parameters})]


# ---- the header


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("Basic", [("basic", {})]),
        ('Basic realm="a b"', [("basic", {"realm": "a b"})]),
        (
            'Bearer realm="https://a/t",service="s",scope="repository:a:pull,push"',
            [
                (
                    "bearer",
                    {"realm": "https://a/t", "service": "s", "scope": "repository:a:pull,push"},
                )
            ],
        ),
        ("BEARER Realm=x , Service = y", [("bearer", {"realm": "x", "service": "y"})]),
        ('Bearer realm="q\\"uote"', [("bearer", {"realm": 'q"uote'})]),
        (
            'Basic realm="b", Bearer realm="https://a",service="s"',
            [("basic", {"realm": "b"}), ("bearer", {"realm": "https://a", "service": "s"})],
        ),
        ('Bearer realm="first",realm="second"', [("bearer", {"realm": "first"})]),
        ('Bearer realm="open', [("bearer", {})]),
        ("", []),
        ("=,=", []),
    ],
)
def test_challenges(value: str, expected: list[tuple[str, dict[str, str]]]) -> None:
    found = [(each.scheme, each.parameters) for each in auth.parse_challenges([value])]
    assert found == expected


def test_several_headers_make_one_list() -> None:
    found = auth.parse_challenges(["Negotiate", 'Basic realm="a"'])
    assert [each.scheme for each in found] == ["negotiate", "basic"]


def test_a_long_header_takes_no_time() -> None:
    auth.parse_challenges(['Bearer realm="' + '\\"' * 100_000, "a=" * 100_000, "a " * 100_000])


# ---- the request's credentials


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, auth.ANONYMOUS),
        (api.AuthConfig(), auth.ANONYMOUS),
        (api.AuthConfig(username="me", password="secret", identity_token="i"), USER),
        (
            api.AuthConfig(identity_token="i", auth=encoded("x:y"), registry_token="r"),
            auth.Credentials(identity_token="i"),
        ),
        (api.AuthConfig(auth=encoded("me:secret"), registry_token="r"), USER),
        (api.AuthConfig(auth=encoded("me:secret\0\0")), USER),
        (api.AuthConfig(auth="bWU6\r\nc2VjcmV0\n"), USER),
        (
            api.AuthConfig(auth=encoded("me:a:b")),
            auth.Credentials(username="me", password="a:b"),
        ),
        (api.AuthConfig(registry_token="r"), auth.Credentials(registry_token="r")),
    ],
)
def test_which_credentials_count(config: api.AuthConfig | None, expected: auth.Credentials) -> None:
    assert auth.choose(config, "a.test") == expected


@pytest.mark.parametrize(
    ("address", "domain", "meant"),
    [
        ("a.test", "a.test", True),
        ("https://a.test", "a.test", True),
        ("https://a.test/v1/", "a.test", True),
        ("b.test", "a.test", False),
        ("a.test:5000", "a.test", False),
        ("a.test:5000", "a.test:5000", True),
        ("https://index.docker.io/v1/", "docker.io", True),
        ("registry-1.docker.io", "docker.io", True),
        ("https://a.test.evil.test", "a.test", False),
    ],
)
def test_credentials_for_another_registry_are_not_used(
    address: str, domain: str, meant: bool
) -> None:
    config = api.AuthConfig(username="me", password="secret", server_address=address)
    assert auth.choose(config, domain) == (USER if meant else auth.ANONYMOUS)


@pytest.mark.parametrize("text", ["no base64!", encoded("no colon"), "/w=="])
def test_a_malformed_auth_is_refused_without_repeating_it(text: str) -> None:
    with pytest.raises(errors.InvalidArgument, match=r"auth\.auth") as caught:
        auth.choose(api.AuthConfig(auth=text), "a.test")
    assert text not in caught.value.message


def test_a_malformed_server_address_is_refused_without_repeating_it() -> None:
    lent = api.AuthConfig(username="me", server_address="https://[secret")
    with pytest.raises(errors.InvalidArgument, match=r"auth\.server_address") as caught:
        auth.choose(lent, "a.test")
    assert "secret" not in caught.value.message


def test_no_secret_is_in_a_repr() -> None:
    secret = auth.Credentials(password="hush", identity_token="hush", registry_token="hush")
    assert "hush" not in repr(secret)
    assert "hush" not in repr(auth.Authorization(value="hush", expires=0))


# ---- answering


async def test_a_token_is_fetched_with_the_users_name(
    there: fake.Registry, authorizer: auth.Authorizer
) -> None:
    challenges = bearer(f"http://{there.address}/token?x=1", service="svc")
    value = await authorizer.answer(host_of(there), "u/a", credentials=USER, challenges=challenges)
    (asked,) = there.requests
    assert value == "Bearer abc"
    assert asked.headers["authorization"] == BASIC
    assert asked.query == {
        "x": "1",
        "service": "svc",
        "scope": "repository:u/a:pull",
        "account": "me",
    }


async def test_anonymous_tokens_need_no_credentials(
    there: fake.Registry, authorizer: auth.Authorizer
) -> None:
    await authorizer.answer(
        host_of(there),
        "u/a",
        credentials=auth.ANONYMOUS,
        challenges=bearer(f"http://{there.address}/token"),
    )
    assert "authorization" not in there.requests[0].headers


async def test_an_identity_token_is_posted(
    there: fake.Registry, authorizer: auth.Authorizer
) -> None:
    there.on("/token", fake.Say(200, body=b'{"access_token":"xyz"}'))
    value = await authorizer.answer(
        host_of(there),
        "u/a",
        credentials=auth.Credentials(identity_token="i&d"),
        challenges=bearer(f"http://{there.address}/token", service="svc"),
    )
    (asked,) = there.requests
    form = dict(urllib.parse.parse_qsl(asked.body.decode()))
    assert value == "Bearer xyz"
    assert (asked.method, form["grant_type"], form["refresh_token"]) == (
        "POST",
        "refresh_token",
        "i&d",
    )
    assert (form["service"], form["scope"]) == ("svc", "repository:u/a:pull")
    assert asked.query == {}


async def test_a_token_is_used_again_for_the_same_caller_only(
    there: fake.Registry, authorizer: auth.Authorizer
) -> None:
    host = host_of(there)
    assert authorizer.current(host, "u/a", USER) == ""
    await authorizer.answer(
        host, "u/a", credentials=USER, challenges=bearer(f"http://{there.address}/token")
    )
    assert authorizer.current(host, "u/a", USER) == "Bearer abc"
    assert authorizer.current(host, "u/b", USER) == ""
    assert authorizer.current(host, "u/a", auth.ANONYMOUS) == ""
    other = auth.Credentials(username="me", password="other")
    assert authorizer.current(host, "u/a", other) == ""
    authorizer.forget(host, "u/a", USER)
    assert authorizer.current(host, "u/a", USER) == ""


@pytest.mark.parametrize("offered", ["repository:up/a:pull,push,delete", "repository:up/a:*"])
async def test_a_mirrors_own_name_is_asked_for_but_only_to_pull(
    there: fake.Registry, authorizer: auth.Authorizer, offered: str
) -> None:
    challenges = bearer(f"http://{there.address}/token", scope=f"{offered} registry:catalog:*")
    await authorizer.answer(
        host_of(there), "u/a", credentials=auth.ANONYMOUS, challenges=challenges
    )
    assert there.requests[0].query["scope"] == "repository:up/a:pull"  # the last of two


async def test_a_realm_at_home_gets_the_hosts_headers(
    there: fake.Registry, authorizer: auth.Authorizer
) -> None:
    host = dataclasses.replace(host_of(there), headers=(("X-Key", "k"), ("authorization", "no")))
    away = there.address.replace("127.0.0.1", "localhost")
    for address in (there.address, away):
        await authorizer.answer(
            host, "u/a", credentials=USER, challenges=bearer(f"http://{address}/token")
        )
    await authorizer.answer(
        host,
        "u/a",
        credentials=auth.ANONYMOUS,
        challenges=bearer(f"http://{there.address}/token"),
    )
    assert [each.headers.get("x-key") for each in there.requests] == ["k", None, "k"]
    assert [each.headers["authorization"] for each in there.requests] == [BASIC, BASIC, "no"]


async def test_basic_is_answered_with_user_and_password(authorizer: auth.Authorizer) -> None:
    host = hosts.Host(scheme="https", netloc="a.test", own=True)
    value = await authorizer.answer(
        host, "u/a", credentials=USER, challenges=auth.parse_challenges(["Basic"])
    )
    assert value == BASIC


async def test_a_registry_token_is_sent_unasked_and_once(authorizer: auth.Authorizer) -> None:
    host = hosts.Host(scheme="https", netloc="a.test", own=True)
    lent = auth.Credentials(registry_token="r")
    assert authorizer.current(host, "u/a", lent) == "Bearer r"
    with pytest.raises(auth.Denied):
        await authorizer.answer(host, "u/a", credentials=lent, challenges=bearer("https://a.test"))


@pytest.mark.parametrize(
    "realm",
    [
        "",
        "http://a.test/token",
        "file:///etc/passwd",
        "//a.test/token",
        "https://",
        "https://user@a.test/token",
        "https://[::1/token",
        "https://a.test:x/token",
        "gopher://a.test",
    ],
)
async def test_an_https_registry_may_not_name_such_a_realm(
    authorizer: auth.Authorizer, realm: str
) -> None:
    host = hosts.Host(scheme="https", netloc="a.test", own=True)
    with pytest.raises(auth.Denied, match="token endpoint") as caught:
        await authorizer.answer(host, "u/a", credentials=USER, challenges=bearer(realm))
    assert "passwd" not in str(caught.value)


async def test_a_realm_on_this_machine_is_refused_to_a_registry_elsewhere(
    there: fake.Registry, authorizer: auth.Authorizer
) -> None:
    host = hosts.Host(scheme="http", netloc="a.test", own=True)
    with pytest.raises(wire.Invalid, match="this machine"):
        await authorizer.answer(
            host, "u/a", credentials=USER, challenges=bearer(f"http://{there.address}/token")
        )
    assert there.requests == []


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{}",
        b'{"token":""}',
        b'{"token":1}',
        b'{"token":"a\\r\\nX: y"}',
        b'{"token":"a","expires_in":"soon"}',
        b"[" * 100_000,
        b"\xff",
    ],
)
async def test_what_is_no_token_is_refused(
    there: fake.Registry, authorizer: auth.Authorizer, body: bytes
) -> None:
    there.on("/token", fake.Say(200, body=body))
    with pytest.raises(auth.Denied, match="no token"):
        await authorizer.answer(
            host_of(there),
            "u/a",
            credentials=USER,
            challenges=bearer(f"http://{there.address}/token"),
        )


@pytest.mark.parametrize(
    ("behaviour", "error"),
    [
        (fake.Say(401), auth.Denied),
        (fake.Say(302, {"Location": "http://127.0.0.1:1/"}), auth.Denied),
        (fake.Say(503), wire.Broken),
        (fake.Say(200, body=b" " * (1 << 20)), wire.Invalid),
        (fake.Stall(), wire.Stalled),
    ],
)
async def test_a_token_endpoint_in_trouble(
    there: fake.Registry,
    authorizer: auth.Authorizer,
    behaviour: fake.Behaviour,
    error: type[Exception],
) -> None:
    there.on("/token", behaviour)
    with pytest.raises(error) as caught:
        await authorizer.answer(
            host_of(there),
            "u/a",
            credentials=USER,
            challenges=bearer(f"http://{there.address}/token?signature=hush"),
        )
    assert "hush" not in str(caught.value)
    assert len(there.requests) == 1
