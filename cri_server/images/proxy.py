# SPDX-License-Identifier: Apache-2.0
"""HTTP proxies from the environment: which one a URL goes through, if any.

Pure: the environment comes in as a mapping. HTTP_PROXY, HTTPS_PROXY and NO_PROXY count, in capitals
or not; loopback never goes through a proxy. Dialling is left to `wire`.
"""

import base64
import ipaddress
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass, field

_ESCAPE = "in a password, %23 is for #, %2F for /, %3F for ? and %40 for @"


class Unusable(ValueError):
    """The environment names a proxy that cannot be one; the text has nothing of its URL."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Proxy:
    """Where to dial, and a Proxy-Authorization ("" for none), which goes nowhere else."""

    host: str
    port: int
    authorization: str = field(default="", repr=False)


def choose(environ: Mapping[str, str], url: urllib.parse.SplitResult) -> Proxy | None:
    """Return the proxy for a URL, or None. Raises Unusable."""
    text = _variable(environ, f"{url.scheme}_proxy")
    host = url.hostname or ""
    port = url.port or (443 if url.scheme == "https" else 80)
    if not text or is_loopback(host) or _bypassed(_variable(environ, "no_proxy"), host, port):
        return None
    return _parse(text if "://" in text else f"http://{text}")


def is_loopback(host: str) -> bool:
    """Tell whether a host name or address literal means this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _variable(environ: Mapping[str, str], name: str) -> str:
    return environ.get(name) or environ.get(name.upper()) or ""


def _parse(text: str) -> Proxy:
    try:
        parts = urllib.parse.urlsplit(text)
        port = parts.port or 80
    except ValueError:  # its text may hold a part of a password
        raise Unusable(f"the URL of the proxy is malformed; {_ESCAPE}") from None
    if parts.scheme != "http" or not parts.hostname:
        raise Unusable("only http:// proxies are supported")
    if "@" in parts.path + parts.query + parts.fragment:  # what was parsed is half a password
        raise Unusable(f"the URL of the proxy has no clear host; {_ESCAPE}")
    authorization = ""
    if parts.username is not None:
        pair = (
            f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
        )
        authorization = f"Basic {base64.b64encode(pair.encode()).decode()}"
    return Proxy(host=parts.hostname, port=port, authorization=authorization)


def _bypassed(no_proxy: str, host: str, port: int) -> bool:
    rules = (rule.strip().lower() for rule in no_proxy.split(","))
    return any(_matches(rule, host.lower(), port) for rule in rules if rule)


def _matches(rule: str, host: str, port: int) -> bool:
    if rule == "*":
        return True
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(rule.strip("[]"), strict=False)
    except ValueError:
        pass
    name, colon, wanted = rule.rpartition(":")
    if colon and wanted.isdigit():
        return int(wanted) == port and _matches(name, host, port)
    name = rule.removeprefix("*").removeprefix(".").strip("[]")
    return host == name or host.endswith(f".{name}")
