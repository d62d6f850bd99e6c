# SPDX-License-Identifier: Apache-2.0
"""Who may use the streaming server: whoever holds a token, once, for what it was issued for.

The URL with the token in it is all that a client needs, so it is as good as a password
(behaviour.md §3, hazards V90): 256 random bits, forgotten when used or after a minute. Only digests
are kept. Nothing survives a restart: the kubelet asks again.
"""

import hashlib
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from cri_server import errors

LIFETIME = 60.0  # seconds
LIMIT = 1000  # outstanding
_BYTES = 32

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Issued(Generic[T]):
    request: T
    until: float


class Tokens(Generic[T]):
    """The requests that wait for their client. `clock` counts seconds and never goes back."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._issued: dict[bytes, _Issued[T]] = {}  # the oldest first

    def issue(self, request: T) -> str:
        """Return a new token for `request`, of letters that need no quoting in a URL.

        Raises ResourceExhausted when too many wait (the kubelet makes an HTTP 429 of it).
        """
        self._expire()
        if len(self._issued) >= LIMIT:
            raise errors.ResourceExhausted(f"{LIMIT} streaming requests wait for their client")
        token = secrets.token_urlsafe(_BYTES)
        self._issued[_digest(token)] = _Issued(request, self._clock() + LIFETIME)
        return token

    def redeem(self, token: str) -> T | None:
        """Return the request and forget the token; None when it is unknown, used or too old.

        What is looked up is a digest, so how long it takes tells nothing about any token.
        """
        self._expire()
        found = self._issued.pop(_digest(token), None)
        return found.request if found else None

    def _expire(self) -> None:
        now = self._clock()
        while self._issued:
            oldest = next(iter(self._issued))
            if self._issued[oldest].until > now:
                return
            del self._issued[oldest]


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
