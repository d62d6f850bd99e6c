# SPDX-License-Identifier: Apache-2.0
"""Which URLs go through a proxy."""

import re
import urllib.parse

import pytest

from cri_server.images import proxy

BOTH = {"HTTP_PROXY": "http://plain.test:3128", "HTTPS_PROXY": "secure.test"}


def choose(url: str, **more: str) -> str | None:
    found = proxy.choose({**BOTH, **more}, urllib.parse.urlsplit(url))
    return f"{found.host}:{found.port}" if found else None


def test_the_scheme_chooses() -> None:
    assert choose("http://a.test/") == "plain.test:3128"
    assert choose("https://a.test/") == "secure.test:80"


def test_small_letters_come_first() -> None:
    assert choose("http://a.test/", http_proxy="http://other.test:1") == "other.test:1"


def test_without_variables_there_is_none() -> None:
    assert proxy.choose({}, urllib.parse.urlsplit("http://a.test/")) is None


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.9.9.9", "[::1]"])
def test_loopback_is_never_sent_away(host: str) -> None:
    assert choose(f"http://{host}:5000/") is None


@pytest.mark.parametrize(
    ("rules", "url", "through"),
    [
        ("a.test", "http://a.test/", False),
        ("a.test", "http://b.a.test/", False),
        ("a.test", "http://ba.test/", True),
        (".a.test", "http://b.a.test/", False),
        ("*.a.test", "http://b.a.test/", False),
        ("x, A.test ,y", "http://a.test/", False),
        ("a.test:80", "http://a.test/", False),
        ("a.test:5000", "http://a.test/", True),
        ("10.0.0.0/8", "http://10.1.2.3/", False),
        ("10.0.0.0/8", "http://11.1.2.3/", True),
        ("10.1.2.3", "http://10.1.2.3:5000/", False),
        ("10.1.2.3:5000", "http://10.1.2.3:5000/", False),
        ("fd00::/8", "http://[fd00::1]/", False),
        ("*", "http://a.test/", False),
        ("", "http://a.test/", True),
        (",", "http://a.test/", True),
    ],
)
def test_no_proxy(rules: str, url: str, through: bool) -> None:
    assert (choose(url, NO_PROXY=rules) is not None) is through


def test_credentials_are_for_the_proxy_and_stay_out_of_sight() -> None:
    environ = {"HTTP_PROXY": "http://me:p%40ss@plain.test:1"}
    found = proxy.choose(environ, urllib.parse.urlsplit("http://a.test/"))
    assert found is not None
    assert found.authorization == "Basic bWU6cEBzcw=="
    assert "bWU6" not in repr(found)


@pytest.mark.parametrize("url", ["https://secure.test", "socks5://s.test", "http://"])
def test_what_is_no_plain_proxy_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="only http://"):
        proxy.choose({"HTTP_PROXY": url}, urllib.parse.urlsplit("http://a.test/"))


@pytest.mark.parametrize(
    "text",
    [
        "http://me:hun#ter2@proxy.test:3128",
        "http://me:hun/ter2@proxy.test:3128",
        "http://me:hun?ter2@proxy.test:3128",
        "http://me:h@un/ter2@proxy.test:3128",
        "http://me:[hunter2@proxy.test:3128",
        "http://me@hun:ter2",
        "https://me:hunter2@proxy.test:3128",
    ],
)
def test_a_proxy_that_cannot_be_one_is_refused_without_its_secret(text: str) -> None:
    with pytest.raises(proxy.Unusable) as caught:
        choose("http://a.test/", http_proxy=text)
    assert not re.search("hun|ter2", str(caught.value))


@pytest.mark.parametrize("text", ["http://p.test:1/", "p.test:1", "http://me:h%40un%23@p.test:1"])
def test_a_usual_proxy_is_taken(text: str) -> None:
    assert choose("http://a.test/", http_proxy=text) == "p.test:1"
