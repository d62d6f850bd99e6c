# SPDX-License-Identifier: Apache-2.0
"""Asking one host about one repository: credentials, tokens, redirects, repeats.

    ask ─► again on 408, 429, 5xx, reset (last host only) ─► answer one 401 ─► follow redirects

What is sent is decided by where a request goes: `Authorization`, the headers of hosts.toml and
client certificates go to the host itself and never along a redirect to another origin. No redirect
is followed from https to http, to other schemes, to addresses of this machine or its link, or a
sixth time. Which host is asked, and what for, is left to `registry`.
"""

import asyncio
import dataclasses
import datetime
import random
import re
import time
import urllib.parse
from dataclasses import dataclass

import msgspec

from cri_server.images import auth, hosts, reference, transport, wire

MAX_REDIRECTS = 5
ATTEMPTS = 5
REDIRECTS = frozenset({301, 302, 303, 307, 308})
REPEATED = frozenset({408, 429, 500, 502, 503, 504})
MAX_ERROR_BODY = 64 << 10
ERROR_BODY_TIMEOUT = 5.0  # seconds

_CODE = re.compile(r"[A-Z][A-Z_]{0,40}")


class Status(Exception):
    """A host answered with a status that is no success; `code` is the registry's word for why."""

    def __init__(self, host: str, status: int, code: str = "") -> None:
        super().__init__(f"{host} answered {status}" + (f" {code}" if code else ""))
        self.status = status


class Unauthorized(Status):
    """A 401 or 403, or a token endpoint that said no."""

    def __init__(self, host: str, status: int, why: str) -> None:
        super().__init__(host, status)
        self.args = (f"unauthorized: {host} answered {status} ({why})",)


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Times in seconds: between pieces of a body, of the first pause and of the longest one."""

    progress_timeout: float = 300.0
    head_timeout: float = 60.0
    pause: float = 0.5
    longest_pause: float = 30.0


class Shared:
    """What all sessions of a client have in common."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.http = transport.Transport()
        quick = min(limits.head_timeout, limits.progress_timeout)
        self.authorizer = auth.Authorizer(self.http, timeout=quick)
        self.plain: set[str] = set()  # loopback hosts that turned out not to speak TLS


class Session:
    """One host, one repository, one caller's credentials."""

    def __init__(
        self,
        host: hosts.Host,
        ref: reference.Reference,
        *,
        credentials: auth.Credentials,
        shared: Shared,
        patient: bool,
    ) -> None:
        """`patient` asks again when the host is busy or in trouble: no other is left to ask."""
        self.host = host
        self._path = ref.path
        self._credentials = credentials if host.own else auth.ANONYMOUS
        self._shared = shared
        self.patient = patient
        if host.plain_fallback and host.origin in shared.plain:
            self._use_plain_http()

    async def ask(
        self,
        kind: str,
        name: str,
        *,
        method: str = "GET",
        headers: tuple[tuple[str, str], ...] = (),
    ) -> transport.Response:
        """Return the 2xx response for `/v2/<path>/<kind>/<name>`; the caller closes it.

        `kind` is `manifests` or `blobs`. Raises Status, Unauthorized or wire.Failure.
        """
        request = self._request(kind, name, method, headers)
        attempts = ATTEMPTS if self.patient else 1
        for attempt in range(1, attempts + 1):
            last = attempt == attempts
            try:
                response = await self._authorized(request)
            except wire.Broken:
                if last:
                    raise
                await self.pause(attempt)
                continue
            if response.status < 300:
                return response
            error = await _refusal(response)
            if last or response.status not in REPEATED:
                raise error
            await self.pause(attempt, response.header("retry-after"))
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def pause(self, attempt: int, retry_after: str = "") -> None:
        """Wait before the next attempt: as long as the host wants, else twice as long each time.

        Never longer than the limit.
        """
        limits = self._shared.limits
        wanted = _seconds(retry_after)
        if wanted is None:
            wanted = limits.pause * 2 ** (attempt - 1) * random.uniform(0.75, 1.25)  # noqa: S311
        await asyncio.sleep(min(wanted, limits.longest_pause))

    def _request(
        self, kind: str, name: str, method: str, headers: tuple[tuple[str, str], ...]
    ) -> transport.Request:
        limits = self._shared.limits
        longest = limits.progress_timeout if kind == "blobs" else limits.head_timeout
        return transport.Request(
            url=f"{self.host.path}/{self._path}/{kind}/{name}",  # completed by _send
            method=method,
            headers=headers,
            dial_timeout=self.host.dial_timeout,
            head_timeout=min(longest, limits.progress_timeout),
            body_timeout=limits.progress_timeout,
        )

    async def _authorized(self, request: transport.Request) -> transport.Response:
        """Send with what we have, and once more with what a 401 asks for."""
        authorizer, host = self._shared.authorizer, self.host
        known = authorizer.current(host, self._path, self._credentials)
        response = await self._send(request, known)
        if response.status != 401:
            return response
        response.close()
        host = self.host  # may have become plain http
        authorizer.forget(host, self._path, self._credentials)
        challenges = auth.parse_challenges(response.headers("www-authenticate"))
        try:
            value = await authorizer.answer(
                host, self._path, credentials=self._credentials, challenges=challenges
            )
        except auth.Denied as error:
            raise Unauthorized(self.host.netloc, 401, str(error)) from error
        return await self._send(request, value)

    async def _send(self, request: transport.Request, authorization: str) -> transport.Response:
        """Send to the host, by plain http where a loopback registry has no TLS."""
        try:
            return await self._follow(request, authorization)
        except wire.NotTls:
            if not self.host.plain_fallback:
                raise
        self._shared.plain.add(self.host.origin)
        self._use_plain_http()
        return await self._follow(request, authorization)

    async def _follow(self, request: transport.Request, authorization: str) -> transport.Response:
        """Go where redirects lead, leaving behind at home what belongs to the host."""
        url, home = self._start(request.url), True
        for _ in range(MAX_REDIRECTS + 1):
            home = home and self._is_home(url)
            response = await self._shared.http.send(
                self._addressed(request, url, authorization, home=home)
            )
            if response.status == 401 and not home:
                response.close()
                raise Unauthorized(response.host, 401, "after a redirect")
            if response.status not in REDIRECTS:
                return response
            response.close()
            url = _next(url, response)
        raise wire.Invalid(f"{self.host.netloc} sent us on more than {MAX_REDIRECTS} times")

    def _is_home(self, url: str) -> bool:
        try:
            return self.host.is_home(urllib.parse.urlsplit(url))
        except ValueError:
            raise wire.Invalid("a redirect to an impossible port") from None

    def _start(self, path: str) -> str:
        query = urllib.parse.urlencode({"ns": self.host.namespace}) if self.host.namespace else ""
        return f"{self.host.origin}{path}" + (f"?{query}" if query else "")

    def _addressed(
        self, request: transport.Request, url: str, authorization: str, *, home: bool
    ) -> transport.Request:
        name = urllib.parse.urlsplit(url).hostname or ""
        tls = self.host.trust(name)
        public_only = name != self.host.name and not self.host.local
        if not home:
            return dataclasses.replace(request, url=url, tls=tls, public_only=public_only)
        own = self.host.headers
        if authorization:
            own = tuple(pair for pair in own if pair[0].lower() != "authorization")
            own += (("Authorization", authorization),)
        return dataclasses.replace(request, url=url, tls=tls, headers=request.headers + own)

    def _use_plain_http(self) -> None:
        self.host = dataclasses.replace(self.host, scheme="http", plain_fallback=False)


class _Error(msgspec.Struct):
    code: str = ""


class _Errors(msgspec.Struct):
    errors: list[_Error] | None = None


async def _refusal(response: transport.Response) -> Status:
    """Return the error that a response means.

    The message of a registry is not repeated: it may have secrets, or be made to look like ours.
    """
    code = ""
    try:
        async with asyncio.timeout(ERROR_BODY_TIMEOUT):
            body = await response.read(MAX_ERROR_BODY)
        said = msgspec.json.decode(body, type=_Errors).errors if body else None
        code = said[0].code if said and _CODE.fullmatch(said[0].code) else ""
    except (TimeoutError, wire.Failure, msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        pass  # the status alone says enough
    finally:
        response.close()
    if response.status in {401, 403}:
        return Unauthorized(response.host, response.status, code or "access denied")
    return Status(response.host, response.status, code)


def _next(url: str, response: transport.Response) -> str:
    try:
        target = urllib.parse.urljoin(url, response.header("location"))
        parts = urllib.parse.urlsplit(target)
    except ValueError:
        raise wire.Invalid(f"{response.host} sent us to no usable URL") from None
    if parts.scheme not in {"http", "https"} or not parts.hostname or "@" in parts.netloc:
        raise wire.Invalid(f"{response.host} sent us to something that is no http or https URL")
    if parts.scheme == "http" and url.startswith("https:"):
        raise wire.Invalid(f"{response.host} sent us from https to http")
    return parts._replace(fragment="").geturl()


def _seconds(retry_after: str) -> float | None:
    """Read Retry-After (RFC 9110, 10.2.3): seconds, or a date."""
    text = retry_after.strip()
    if text.isdecimal():
        return float(text[:9])
    try:
        then = datetime.datetime.strptime(text, "%a, %d %b %Y %H:%M:%S GMT")
    except ValueError:
        return None
    return max(0.0, then.replace(tzinfo=datetime.UTC).timestamp() - time.time())
