# SPDX-License-Identifier: Apache-2.0
"""Names of images: parse what users write into one normal form, as docker does.

    a                      docker.io/library/a:latest
    index.docker.io/u/a:1  docker.io/u/a:1
    localhost:5000/a@sha256:<64 hex>

Pure: no files, no network, nothing to lose in a crash. A name that has passed `parse` is safe in a
URL path and as a folder name; whether it exists is for `registry` and `store` to say.
"""

import ipaddress
import re
from dataclasses import dataclass

from cri_server import errors

DEFAULT_DOMAIN = "docker.io"
MAX_REPOSITORY = 255

_LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?"
_DOMAIN = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[([a-fA-F0-9:.]+)\])(?::([0-9]{{1,5}}))?")
_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_PATH = re.compile(rf"{_PART}(?:/{_PART})*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")
_IMAGE_ID = re.compile(r"(?:sha256:)?[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """A normal name: `tag` or `digest` is set; with both, the tag is only what the user wrote."""

    domain: str
    path: str
    tag: str | None = None
    digest: str | None = None

    @property
    def repository(self) -> str:
        """Domain and path, such as `docker.io/library/a`."""
        return f"{self.domain}/{self.path}"

    @property
    def tagged(self) -> str | None:
        """Repository and tag; None with a digest, for then no registry vouched for the tag."""
        return None if self.digest else f"{self.repository}:{self.tag}"

    @property
    def target(self) -> str:
        """What a registry is asked for: the digest, else the tag."""
        return self.digest or self.tag or "latest"

    def canonical(self, digest: str) -> str:
        """Repository and digest, such as `docker.io/library/a@sha256:<64 hex>`."""
        return f"{self.repository}@{digest}"

    def __str__(self) -> str:
        return self.canonical(self.digest) if self.digest else f"{self.repository}:{self.tag}"


def parse(text: str) -> Reference:
    """Return the normal form of a name as kubelet, crictl or a pod's author writes it.

    Raises InvalidArgument, which names the reference. An image id is not a reference.
    Source of the rules: the grammar of distribution/reference and docker's short names.
    """
    if is_image_id(text):
        raise _invalid(text, "this is an image id, not a name")
    rest, at, digest = text.partition("@")
    if at and not is_digest(digest):
        raise _invalid(
            text, "digest must be sha256: and 64, or sha512: and 128, lower case hex digits"
        )
    rest, tag = _split_tag(rest)
    if tag is not None and not _TAG.fullmatch(tag):
        raise _invalid(text, "malformed tag")
    domain, path = _split_domain(rest)
    _check_name(text, domain, path)
    if not at and tag is None:
        tag = "latest"
    return Reference(domain=domain, path=path, tag=tag, digest=digest or None)


def is_image_id(text: str) -> bool:
    """Tell whether the text is a whole image id: 64 hex digits, with or without `sha256:`."""
    return _IMAGE_ID.fullmatch(text) is not None


def is_digest(text: str) -> bool:
    """Tell whether the text is a digest that we can verify (sha256 or sha512)."""
    return _DIGEST.fullmatch(text) is not None


def _split_tag(text: str) -> tuple[str, str | None]:
    head, colon, tail = text.rpartition(":")
    if colon and "/" not in tail:
        return head, tail
    return text, None


def _split_domain(name: str) -> tuple[str, str]:
    first, slash, rest = name.partition("/")
    if not slash or not _looks_like_domain(first):
        first, rest = DEFAULT_DOMAIN, name
    if first == "index.docker.io":
        first = DEFAULT_DOMAIN
    if first == DEFAULT_DOMAIN and "/" not in rest:
        rest = f"library/{rest}"
    return first, rest


def _looks_like_domain(first: str) -> bool:
    return "." in first or ":" in first or first == "localhost" or first.lower() != first


def _check_name(text: str, domain: str, path: str) -> None:
    match = _DOMAIN.fullmatch(domain)
    if not match or not _is_ipv6(match[1] or "::") or int(match[2] or 1) not in range(1, 65536):
        raise _invalid(text, "malformed registry host")
    if path != path.lower():
        raise _invalid(text, "repository name must be lower case")
    if not _PATH.fullmatch(path):
        raise _invalid(text, "malformed repository name")
    if len(domain) + 1 + len(path) > MAX_REPOSITORY:
        raise _invalid(text, f"repository name is longer than {MAX_REPOSITORY} characters")


def _is_ipv6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True


def _invalid(text: str, why: str) -> errors.InvalidArgument:
    return errors.InvalidArgument(f"invalid image reference {text[:300]!r}: {why}")
