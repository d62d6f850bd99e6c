# SPDX-License-Identifier: Apache-2.0
"""Which hosts to ask for a registry's images: containerd's `hosts.toml`, read afresh at every pull.

    /etc/containerd/certs.d/
        registry.example:5000/hosts.toml    or registry.example_5000_/hosts.toml
        _default/hosts.toml                 for every registry without a folder of its own
        other.example/ca.crt, c.cert, c.key without a hosts.toml, or with an empty one: docker's way
                                            to name certificates; c.cert alone holds the key too

Mirrors come in the order of the file, then `server`, then nothing: to keep the registry itself out,
name a mirror as `server`. A registry on loopback that nobody has said more about is not verified,
and may speak plain http where its port does not tell: 80 is http, 443 and none https (containerd's
rule). Nothing is kept between calls. Asking the hosts is left to `registry`.
"""

import dataclasses
import re
import tomllib
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cri_server import errors
from cri_server.images import proxy

DIAL_TIMEOUT = 30.0
CAPABILITIES = frozenset({"pull", "resolve", "push", "referrers"})  # as in containerd
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ns|us|µs|ms|s|m|h)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Tls:
    """How to trust and be trusted: CA files besides the system's, (certificate, key) pairs."""

    ca: tuple[Path, ...] = ()
    client: tuple[tuple[Path, Path | None], ...] = ()
    skip_verify: bool = False
    only_here: bool = False  # nobody wrote that skip_verify: it is for this machine alone


SYSTEM_TRUST = Tls()
_LOOPBACK_TRUST = Tls(skip_verify=True, only_here=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """One place to ask. `netloc` is host[:port], `path` the prefix of the API, such as `/v2`."""

    scheme: str
    netloc: str
    path: str = "/v2"
    namespace: str = ""  # the registry a mirror stands in for, sent as `?ns=`
    capabilities: frozenset[str] = CAPABILITIES
    tls: Tls = SYSTEM_TRUST
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    dial_timeout: float = DIAL_TIMEOUT
    own: bool = False  # the registry of the reference: may see credentials
    plain_fallback: bool = False  # loopback: plain http when the handshake fails

    @property
    def origin(self) -> str:
        """Scheme and authority: what decides whether credentials may be sent."""
        return f"{self.scheme}://{self.netloc}"

    @property
    def name(self) -> str:
        """The host without its port, for messages and comparisons."""
        return urllib.parse.urlsplit(self.origin).hostname or self.netloc

    @property
    def local(self) -> bool:
        """Whether it is on this machine, by its name."""
        return proxy.is_loopback(self.name)

    def is_home(self, url: urllib.parse.SplitResult) -> bool:
        """Whether a URL is of this very scheme, name and port: what its headers may be sent to.

        Raises ValueError for a port that is none.
        """
        return _origin(url) == _origin(urllib.parse.urlsplit(self.origin))

    def trust(self, name: str) -> Tls:
        """Return how to trust a host that this one sends us to; our certificates stay at home.

        As in containerd, where the client of a host follows its redirects and asks for its tokens;
        but credentials go to no other machine unverified when nobody asked for that.
        """
        if name == self.name:
            return self.tls
        far = self.tls.only_here and not proxy.is_loopback(name)
        return Tls(ca=self.tls.ca, skip_verify=self.tls.skip_verify and not far)


def load(dirs: Sequence[Path], registry_host: str) -> tuple[Host, ...]:
    """Return the hosts to ask for a registry, best first; at least one.

    Raises FailedPrecondition, which names the file, when a `hosts.toml` makes no sense. Keys that
    we do not know are left alone: containerd reads the same files.
    """
    folder = _folder(dirs, registry_host)
    if folder is None:
        return (_default(registry_host),)
    file = folder / "hosts.toml"
    try:
        text = _text_of(file)
        if not text:  # containerd takes an empty file for none
            return (_default(registry_host, tls=_docker_certificates(folder)),)
        return _from_document(tomllib.loads(text), folder, registry_host)
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split())
        raise errors.FailedPrecondition(f"cannot use {file}: {why}") from error


def _text_of(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except FileNotFoundError:
        return ""


def is_own(netloc: str, registry_host: str) -> bool:
    """Tell whether a host is the registry itself; docker.io lives at other names."""
    return endpoint(netloc) == endpoint(registry_host)


def endpoint(registry_host: str) -> str:
    """Return where a registry's API is served: docker.io has a name of its own for it."""
    if registry_host in {"docker.io", "index.docker.io"}:
        return "registry-1.docker.io"
    return registry_host.lower()


def _origin(url: urllib.parse.SplitResult) -> tuple[str, str | None, int | None]:
    return url.scheme, url.hostname, url.port or {"https": 443, "http": 80}.get(url.scheme)


def _folder(dirs: Sequence[Path], registry_host: str) -> Path | None:
    name, colon, port = registry_host.rpartition(":")
    names = [registry_host, "_default"]
    if colon and not port.endswith("]"):
        names.insert(0, f"{name}_{port}_")
    candidates = (root / each for root in dirs for each in names)
    return next((folder for folder in candidates if folder.is_dir()), None)


def _default(registry_host: str, *, tls: Tls = SYSTEM_TRUST) -> Host:
    netloc = endpoint(registry_host)
    parts = urllib.parse.urlsplit(f"//{netloc}")
    local = tls == SYSTEM_TRUST and proxy.is_loopback(parts.hostname or "")
    plain = local and parts.port == 80
    return Host(
        scheme="http" if plain else "https",
        netloc=netloc,
        tls=_LOOPBACK_TRUST if local and not plain else tls,
        own=True,
        plain_fallback=local and parts.port not in {None, 80, 443},
    )


def _from_document(document: dict[str, Any], folder: Path, registry_host: str) -> tuple[Host, ...]:
    tables = _table(document, "host")
    mirrors = [_host(url, _table(tables, url), folder, registry_host) for url in tables]
    server = document.get("server") or ""
    if server:
        return (*mirrors, _host(_text(server, "server"), document, folder, registry_host))
    default = _default(registry_host)
    last = _host(default.origin, document, folder, registry_host)
    if not last.tls.ca and not last.tls.client:
        tls = last.tls if "skip_verify" in document else default.tls
        last = dataclasses.replace(last, tls=tls, plain_fallback=default.plain_fallback)
    return (*mirrors, last)


def _host(url: str, table: dict[str, Any], folder: Path, registry_host: str) -> Host:
    parts = urllib.parse.urlsplit(url if "://" in url else f"https://{url}")
    usable = parts.scheme in {"http", "https"} and parts.hostname and "@" not in parts.netloc
    if not usable or parts.port == 0:  # reading the port checks it
        raise ValueError(f"host {parts.hostname!r} is not named by an http or https URL")
    own = is_own(parts.netloc, registry_host)
    return Host(
        scheme=parts.scheme,
        netloc=parts.netloc,
        path=_api_path(parts.path, override=_flag(table, "override_path")),
        namespace="" if own else registry_host,
        capabilities=_capabilities(table),
        tls=_tls(table, folder),
        headers=_headers(table),
        dial_timeout=_duration(table.get("dial_timeout")),
        own=own,
    )


def _api_path(path: str, *, override: bool) -> str:
    path = path.rstrip("/")
    return path if override or path.endswith("/v2") else f"{path}/v2"


def _capabilities(table: dict[str, Any]) -> frozenset[str]:
    names = frozenset(each.lower() for each in _texts(table.get("capabilities"), "capabilities"))
    if unknown := names - CAPABILITIES:
        raise ValueError(f"unknown capability {min(unknown)!r}")
    return names or CAPABILITIES


def _headers(table: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    pairs = _table(table, "header").items()
    return tuple((name, value) for name, given in pairs for value in _texts(given, "header"))


def _tls(table: dict[str, Any], folder: Path) -> Tls:
    client = table.get("client") or []
    entries = [client] if isinstance(client, str) else client
    if not isinstance(entries, list):
        raise ValueError("'client' must be a file, a list of files or a list of pairs")
    return Tls(
        ca=tuple(folder / name for name in _texts(table.get("ca"), "ca")),
        client=tuple(_pair(entry, folder) for entry in entries),
        skip_verify=_flag(table, "skip_verify"),
    )


def _pair(entry: object, folder: Path) -> tuple[Path, Path | None]:
    names = _texts(entry, "client")
    if len(names) not in {1, 2}:
        raise ValueError("an entry of 'client' is a certificate, or a certificate and a key")
    return folder / names[0], folder / names[1] if len(names) == 2 and names[1] else None


def _docker_certificates(folder: Path) -> Tls:
    """Return what the names of files tell; a certificate without a key beside it holds the key."""
    client = ((file, file.with_suffix(".key")) for file in sorted(folder.glob("*.cert")))
    pairs = tuple((file, key if key.exists() else None) for file, key in client)
    return Tls(ca=tuple(sorted(folder.glob("*.crt"))), client=pairs)


def _duration(value: object) -> float:
    """Return seconds; the file says them as Go does, such as `1m30s`."""
    if value in (None, ""):
        return DIAL_TIMEOUT
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    text = _text(value, "dial_timeout")
    if not re.fullmatch(rf"(?:{_DURATION.pattern})+", text):
        raise ValueError(f"dial_timeout {text!r} is not a duration such as '3s'")
    return sum(float(number) * _UNITS[unit] for number, unit in _DURATION.findall(text))


def _table(table: dict[str, Any], key: str) -> dict[str, Any]:
    value = table.get(key, {})
    if not isinstance(value, dict):
        raise _wrong_type(key, "a table")
    return value


def _flag(table: dict[str, Any], key: str) -> bool:
    value = table.get(key, False)
    if not isinstance(value, bool):
        raise _wrong_type(key, "true or false")
    return value


def _texts(value: object, key: str) -> list[str]:
    if value is None:
        return []
    values = value if isinstance(value, list) else [value]
    return [_text(each, key) for each in values]


def _text(value: object, key: str) -> str:
    if not isinstance(value, str):
        raise _wrong_type(key, "text")
    return value


def _wrong_type(key: str, wanted: str) -> ValueError:
    return ValueError(f"{key!r} must be {wanted}")
