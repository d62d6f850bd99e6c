# SPDX-License-Identifier: Apache-2.0
"""Where images come from: hosts.toml as containerd reads it."""

from pathlib import Path

import pytest

from cri_server import errors
from cri_server.images import hosts


def write(root: Path, name: str, text: str) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "hosts.toml").write_text(text)
    return folder


def origins(found: tuple[hosts.Host, ...]) -> list[str]:
    return [host.origin + host.path for host in found]


@pytest.mark.parametrize(
    ("registry", "expected"),
    [
        ("docker.io", "https://registry-1.docker.io/v2"),
        ("quay.io", "https://quay.io/v2"),
        ("a.test:5000", "https://a.test:5000/v2"),
        ("localhost", "https://localhost/v2"),
        ("127.0.0.1:80", "http://127.0.0.1:80/v2"),
        ("localhost:443", "https://localhost:443/v2"),
    ],
)
def test_without_files_the_registry_itself_is_asked(registry: str, expected: str) -> None:
    (host,) = hosts.load([], registry)
    assert host.origin + host.path == expected
    assert (host.own, host.namespace, host.plain_fallback) == (True, "", False)


@pytest.mark.parametrize("registry", ["localhost:5000", "127.0.0.1:5000", "[::1]:5000"])
def test_on_loopback_plain_http_is_the_second_choice(registry: str) -> None:
    (host,) = hosts.load([], registry)
    assert (host.scheme, host.plain_fallback) == ("https", True)


@pytest.mark.parametrize(
    ("registry", "text", "expected"),
    [
        ("localhost", None, True),
        ("localhost:5000", None, True),
        ("[::1]:443", None, True),
        ("localhost:80", None, False),
        ("a.test:5000", None, False),
        ("localhost:5000", "", True),
        ("localhost:5000", "skip_verify = false\n", False),
        ("localhost:5000", 'ca = "ca.pem"\n', False),
        ("localhost:5000", 'server = "https://localhost:5000"\n', False),
    ],
)
def test_a_registry_on_loopback_is_not_verified_unless_somebody_says_so(
    tmp_path: Path, registry: str, text: str | None, *, expected: bool
) -> None:
    if text is not None:
        write(tmp_path, registry, text)
    (host,) = hosts.load([tmp_path], registry)
    assert host.tls.skip_verify is expected


def test_what_nobody_wrote_is_not_passed_on_to_hosts_elsewhere(tmp_path: Path) -> None:
    (host,) = hosts.load([], "localhost:5000")
    assert host.trust("127.0.0.1").skip_verify
    assert not host.trust("auth.test").skip_verify
    write(tmp_path, "localhost:5000", "skip_verify = true\n")
    (host,) = hosts.load([tmp_path], "localhost:5000")
    assert host.trust("auth.test").skip_verify
    assert host.plain_fallback


def test_mirrors_come_in_the_order_of_the_file_and_the_server_last(tmp_path: Path) -> None:
    write(
        tmp_path,
        "docker.io",
        """
        server = "https://registry-1.docker.io"
        [host."https://z.test"]
        capabilities = ["pull"]
        [host."http://a.test:5000/prefix"]
        [host."plain.test"]
        """,
    )
    found = hosts.load([tmp_path], "docker.io")
    assert origins(found) == [
        "https://z.test/v2",
        "http://a.test:5000/prefix/v2",
        "https://plain.test/v2",
        "https://registry-1.docker.io/v2",
    ]
    assert [host.own for host in found] == [False, False, False, True]
    assert [host.namespace for host in found] == ["docker.io", "docker.io", "docker.io", ""]
    assert found[0].capabilities == {"pull"}
    assert found[1].capabilities == hosts.CAPABILITIES


def test_without_a_server_the_registry_itself_is_last(tmp_path: Path) -> None:
    write(tmp_path, "a.test", 'skip_verify = true\n[host."https://m.test"]\n')
    found = hosts.load([tmp_path], "a.test")
    assert origins(found) == ["https://m.test/v2", "https://a.test/v2"]
    assert [host.tls.skip_verify for host in found] == [False, True]


def test_another_server_is_a_mirror_without_credentials(tmp_path: Path) -> None:
    write(tmp_path, "a.test", 'server = "https://m.test"\n')
    (host,) = hosts.load([tmp_path], "a.test")
    assert (host.netloc, host.own, host.namespace) == ("m.test", False, "a.test")


@pytest.mark.parametrize("name", ["a.test:5000", "a.test_5000_"])
def test_both_spellings_of_a_port(tmp_path: Path, name: str) -> None:
    write(tmp_path, name, 'server = "http://found.test"\n')
    assert hosts.load([tmp_path], "a.test:5000")[0].netloc == "found.test"


def test_default_is_for_all_without_a_folder(tmp_path: Path) -> None:
    write(tmp_path, "_default", '[host."http://m.test"]\n')
    write(tmp_path, "b.test", "")
    assert origins(hosts.load([tmp_path], "a.test")) == ["http://m.test/v2", "https://a.test/v2"]
    assert origins(hosts.load([tmp_path], "b.test")) == ["https://b.test/v2"]


def test_the_first_folder_with_an_answer_counts(tmp_path: Path) -> None:
    write(tmp_path / "2", "a.test", 'server = "http://second.test"\n')
    assert hosts.load([tmp_path / "1", tmp_path / "2"], "a.test")[0].netloc == "second.test"
    write(tmp_path / "1", "a.test", 'server = "http://first.test"\n')
    assert hosts.load([tmp_path / "1", tmp_path / "2"], "a.test")[0].netloc == "first.test"


def test_all_keys_of_a_host(tmp_path: Path) -> None:
    folder = write(
        tmp_path,
        "a.test",
        """
        [host."https://m.test/api/root/"]
        capabilities = ["Pull", "resolve", "Referrers"]
        ca = "ca.pem"
        client = [["c.pem", "c.key"], ["both.pem", ""]]
        skip_verify = true
        override_path = true
        dial_timeout = "1m2.5s"
        some_later_key = 1
        [host."https://m.test/api/root/".header]
        x-one = "1"
        x-two = ["2", "3"]
        """,
    )
    host = hosts.load([tmp_path], "a.test")[0]
    assert host.path == "/api/root"
    assert host.capabilities == {"pull", "resolve", "referrers"}
    assert host.tls.ca == (folder / "ca.pem",)
    assert host.tls.client == ((folder / "c.pem", folder / "c.key"), (folder / "both.pem", None))
    assert host.tls.skip_verify
    assert host.dial_timeout == 62.5
    assert host.headers == (("x-one", "1"), ("x-two", "2"), ("x-two", "3"))
    assert "x-one" not in repr(host)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ('"/abs.pem"', [("/abs.pem", None)]),
        ('["one.pem", "two.pem"]', [("one.pem", None), ("two.pem", None)]),
    ],
)
def test_other_ways_to_name_client_certificates(
    tmp_path: Path, value: str, expected: list[tuple[str, str | None]]
) -> None:
    folder = write(tmp_path, "a.test", f"client = {value}\n")
    (host,) = hosts.load([tmp_path], "a.test")
    assert [(c, k) for c, k in host.tls.client] == [(folder / c, k) for c, k in expected]


def test_a_file_is_read_afresh(tmp_path: Path) -> None:
    folder = write(tmp_path, "a.test", 'server = "http://old.test"\n')
    assert hosts.load([tmp_path], "a.test")[0].netloc == "old.test"
    (folder / "hosts.toml").write_text('server = "http://new.test"\n')
    assert hosts.load([tmp_path], "a.test")[0].netloc == "new.test"


@pytest.mark.parametrize("more", [(), ("hosts.toml",)])
def test_docker_certificates_are_found_by_their_names(
    tmp_path: Path, more: tuple[str, ...]
) -> None:
    folder = tmp_path / "a.test:5000"
    folder.mkdir()
    for name in ("ca.crt", "both.cert", "client.cert", "client.key", *more):
        (folder / name).touch()
    (host,) = hosts.load([tmp_path], "a.test:5000")
    assert host.tls.ca == (folder / "ca.crt",)
    assert host.tls.client == (
        (folder / "both.cert", None),
        (folder / "client.cert", folder / "client.key"),
    )
    assert host.own


@pytest.mark.parametrize(
    "text",
    [
        "server = ",
        "server = 1\n",
        'server = "ftp://a.test"\n',
        'server = "https://user:secret@a.test"\n',
        '[host."https://m.test"]\ncapabilities = ["fly"]\n',
        '[host."https://m.test"]\nskip_verify = "yes"\n',
        '[host."https://m.test"]\nclient = 1\n',
        '[host."https://m.test"]\nclient = [["a", "b", "c"]]\n',
        '[host."https://m.test"]\ndial_timeout = "soon"\n',
        '[host."https://m.test"]\nheader = "x"\n',
        'host = "https://m.test"\n',
        '[host."https://m.test:port"]\n',
    ],
)
def test_a_file_that_makes_no_sense_is_named(tmp_path: Path, text: str) -> None:
    folder = write(tmp_path, "a.test", text)
    with pytest.raises(errors.FailedPrecondition) as caught:
        hosts.load([tmp_path], "a.test")
    assert str(folder / "hosts.toml") in caught.value.message
    assert "\n" not in caught.value.message
    assert "secret" not in caught.value.message
