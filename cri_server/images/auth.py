# SPDX-License-Identifier: Apache-2.0
"""Proving who we are to a registry: challenges, tokens, and the credentials of a pull request.

    401, WWW-Authenticate ──► parse_challenges ──► Authorizer.answer ──► "Bearer …" or "Basic …"
                                                        └── token endpoint (the realm): GET, or POST

Credentials go to the reference's own registry and to the realm that it names, never to a mirror;
the headers of hosts.toml go to a realm at the host's own origin only. A realm must be https unless
the registry itself is plain http. Tokens are kept in memory until they expire; nothing is written
to disk, logged, or put into an error.
"""

import base64
import binascii
import dataclasses
import hashlib
import re
import time
import urllib.parse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from cri_server import errors
from cri_server.images import hosts, transport, wire

MAX_TOKEN_BODY = 256 << 10
MAX_KEPT = 64
SHORTEST_LIFE = 60.0  # seconds; what the token spec means when nothing is said
LONGEST_LIFE = 3600.0
BASIC_LIFE = 300.0

_SCHEME = re.compile(r"\s*,?\s*([A-Za-z0-9!#$%&'*+.^_`|~-]+)(?!\s*=)(?=[\s,]|$)")
_PARAMETER = re.compile(
    r"\s*,?\s*([A-Za-z0-9!#$%&'*+.^_`|~-]+)\s*=\s*(?:\"((?:[^\"\\]|\\.)*)\"|([^\s,\"]+))"
)
_SCOPE = re.compile(r"repository:([a-zA-Z0-9][a-zA-Z0-9._:/-]{0,255}):[a-z,*]+")


class AuthConfig(Protocol):
    """The fields of the CRI message of this name."""

    username: str
    password: str
    auth: str
    server_address: str
    identity_token: str
    registry_token: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Credentials:
    """What a caller lent us for one pull; empty is anonymous."""

    username: str = ""
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)
    registry_token: str = field(default="", repr=False)

    def fingerprint(self) -> bytes:
        """Return what tells two credentials apart and tells nothing else."""
        parts = (self.username, self.password, self.identity_token, self.registry_token)
        return hashlib.sha256("\0".join(parts).encode()).digest()


ANONYMOUS = Credentials()


@dataclass(frozen=True, kw_only=True, slots=True)
class Challenge:
    """One offer of a WWW-Authenticate header: `scheme` and parameter names in lower case."""

    scheme: str
    parameters: dict[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Authorization:
    """A header value, and the monotonic time after which it is not sent any more."""

    value: str = field(repr=False)
    expires: float


class Denied(Exception):
    """The token endpoint said no, or asked for what we do not give; the text has no secrets."""


class _Token(msgspec.Struct):
    token: str | None = None
    access_token: str | None = None
    expires_in: float | None = None


def choose(config: AuthConfig | None, domain: str) -> Credentials:
    """Return the credentials to use for a registry.

    User and password come first, then identity token, `auth`, registry token. A `server_address` of
    another registry means anonymous, as in containerd.

    Raises InvalidArgument when `auth` is not the base64 of user:password, or `server_address`
    cannot be an address.
    """
    if config is None or not _meant_for(config.server_address, domain):
        return ANONYMOUS
    if config.username:
        return Credentials(username=config.username, password=config.password)
    if config.identity_token:
        return Credentials(identity_token=config.identity_token)
    if config.auth:
        return _decode(config.auth)
    return Credentials(registry_token=config.registry_token)


def parse_challenges(values: Iterable[str]) -> tuple[Challenge, ...]:
    """Read WWW-Authenticate headers (RFC 9110, 11.6.1); what is malformed ends the list."""
    return tuple(challenge for value in values for challenge in _parse(value[:8192]))


class Authorizer:
    """Answers challenges, and remembers the answers until they expire."""

    def __init__(self, http: transport.Transport, *, timeout: float = 60.0) -> None:
        """`timeout` is how many seconds a token endpoint may take to say anything."""
        self._http, self._timeout = http, timeout
        self._kept: dict[tuple[str, str, bytes], Authorization] = {}

    def current(self, host: hosts.Host, path: str, credentials: Credentials) -> str:
        """Return what to send without being asked, "" for nothing."""
        if credentials.registry_token:
            return f"Bearer {credentials.registry_token}"
        kept = self._kept.get((host.origin, path, credentials.fingerprint()))
        return kept.value if kept and kept.expires > time.monotonic() else ""

    async def answer(
        self,
        host: hosts.Host,
        path: str,
        *,
        credentials: Credentials,
        challenges: Sequence[Challenge],
    ) -> str:
        """Return the Authorization for a repository on a host that has just refused one.

        Raises Denied, or the wire.Failure of the token endpoint.
        """
        bearer = next((each for each in challenges if each.scheme == "bearer"), None)
        basic = any(each.scheme == "basic" for each in challenges)
        if credentials.registry_token:
            raise Denied("the registry token was not accepted")
        if bearer is not None:
            made = await self._token(host, path, credentials, bearer)
        elif basic and credentials.username:
            made = Authorization(value=_basic(credentials), expires=time.monotonic() + BASIC_LIFE)
        else:
            raise Denied("no credentials" if basic else "no way to authenticate is offered")
        self._keep((host.origin, path, credentials.fingerprint()), made)
        return made.value

    def forget(self, host: hosts.Host, path: str, credentials: Credentials) -> None:
        """Drop an answer that the host does not accept any more."""
        self._kept.pop((host.origin, path, credentials.fingerprint()), None)

    def _keep(self, key: tuple[str, str, bytes], made: Authorization) -> None:
        now = time.monotonic()
        self._kept = {each: kept for each, kept in self._kept.items() if kept.expires > now}
        if len(self._kept) >= MAX_KEPT:
            self._kept.pop(next(iter(self._kept)))
        self._kept[key] = made

    async def _token(
        self, host: hosts.Host, path: str, credentials: Credentials, challenge: Challenge
    ) -> Authorization:
        request = _token_request(host, path, credentials, challenge)
        request = dataclasses.replace(
            request, head_timeout=self._timeout, body_timeout=self._timeout
        )
        response = await self._http.send(request)
        try:
            if response.status in {408, 429} or response.status >= 500:
                raise wire.Broken(f"the token endpoint {response.host} answered {response.status}")
            if response.status != 200:
                raise Denied(f"the token endpoint {response.host} answered {response.status}")
            body = await response.read(MAX_TOKEN_BODY)
        finally:
            response.close()
        return _read_token(body, response.host)


def _meant_for(server_address: str, domain: str) -> bool:
    if not server_address:
        return True
    with_scheme = server_address if "://" in server_address else f"https://{server_address}"
    try:
        netloc = urllib.parse.urlsplit(with_scheme).netloc
    except ValueError:  # its text may hold a part of a password
        raise errors.InvalidArgument("auth.server_address is not an address") from None
    return hosts.is_own(netloc, domain)


def _decode(text: str) -> Credentials:
    lines = text.replace("\r", "").replace("\n", "")  # base64(1) wraps; Go ignores it
    try:
        pair = base64.b64decode(lines, validate=True).decode().rstrip("\0")
    except (binascii.Error, UnicodeDecodeError):
        pair = ""
    username, colon, password = pair.partition(":")
    if not colon:
        raise errors.InvalidArgument("auth.auth is not the base64 of user:password")
    return Credentials(username=username, password=password)


def _basic(credentials: Credentials) -> str:
    pair = f"{credentials.username}:{credentials.password}"
    return f"Basic {base64.b64encode(pair.encode()).decode()}"


def _parse(value: str) -> Iterable[Challenge]:
    position = 0
    while match := _SCHEME.match(value, position):
        position = match.end()
        parameters: dict[str, str] = {}
        while pair := _PARAMETER.match(value, position):
            position = pair.end()
            text = pair[3] if pair[2] is None else re.sub(r"\\(.)", r"\1", pair[2])
            parameters.setdefault(pair[1].lower(), text)
        yield Challenge(scheme=match[1].lower(), parameters=parameters)


def _token_request(
    host: hosts.Host, path: str, credentials: Credentials, challenge: Challenge
) -> transport.Request:
    realm = _checked_realm(challenge.parameters.get("realm", ""), host)
    same = realm.hostname == host.name
    query = (
        [("service", challenge.parameters["service"])] if "service" in challenge.parameters else []
    )
    scopes = [("scope", scope) for scope in _scopes(path, challenge.parameters.get("scope", ""))]
    url, method, headers, body = realm, "GET", [("Accept", "application/json")], b""
    if credentials.identity_token:
        form = [("grant_type", "refresh_token"), ("refresh_token", credentials.identity_token)]
        form += [("client_id", transport.USER_AGENT), *query]
        form.append(("scope", " ".join(scope for _, scope in scopes)))
        method, body = "POST", urllib.parse.urlencode(form).encode()
        headers.append(("Content-Type", "application/x-www-form-urlencoded"))
    else:
        given = [realm.query] if realm.query else []
        account = [("account", credentials.username)] if credentials.username else []
        url = realm._replace(
            query="&".join([*given, urllib.parse.urlencode(query + scopes + account)])
        )
        if credentials.username:
            headers.append(("Authorization", _basic(credentials)))
    if host.is_home(realm):
        ours = {name.lower() for name, _ in headers}
        headers += (pair for pair in host.headers if pair[0].lower() not in ours)
    return transport.Request(
        url=url.geturl(),
        method=method,
        headers=tuple(headers),
        body=body,
        tls=host.trust(realm.hostname or ""),
        dial_timeout=host.dial_timeout,
        public_only=not same and not host.local,
    )


def _checked_realm(realm: str, host: hosts.Host) -> urllib.parse.SplitResult:
    try:
        parts = urllib.parse.urlsplit(realm)
        allowed = {"https", "http"} if host.scheme == "http" else {"https"}
        good = parts.scheme in allowed and bool(parts.hostname) and "@" not in parts.netloc
        good = good and parts.port != 0  # reading the port checks it
    except ValueError:
        good = False
    if not good:
        raise Denied("refused the token endpoint that it names: not an https URL")
    return parts._replace(fragment="")


def _scopes(path: str, offered: str) -> list[str]:
    """Ask to pull our path, and what a mirror calls it; never more than to pull."""
    names = [path, *(match[1] for each in offered.split() if (match := _SCOPE.fullmatch(each)))]
    return [f"repository:{name}:pull" for name in dict.fromkeys(names)][:4]


def _read_token(body: bytes, host: str) -> Authorization:
    try:
        answer = msgspec.json.decode(body, type=_Token)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        raise Denied(f"the token endpoint {host} sent no token") from None
    token = answer.token or answer.access_token
    if not token or not token.isascii() or not token.isprintable():
        raise Denied(f"the token endpoint {host} sent no token")
    life = min(max(answer.expires_in or 0.0, SHORTEST_LIFE), LONGEST_LIFE)
    return Authorization(value=f"Bearer {token}", expires=time.monotonic() + 0.9 * life)
