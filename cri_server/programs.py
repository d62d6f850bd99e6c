# SPDX-License-Identifier: Apache-2.0
"""The sealed copies of OCI runtimes' programs that shims are given (`shim.sealed`).

One for each file, made when a pod first needs it and again when the file has changed. They are
memory of this process: nothing of them is on disk, and a shim that has one keeps it when we die.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from typing import NamedTuple

import structlog

from cri_server import config
from shim import sealed

log = structlog.get_logger()


class Copy(NamedTuple):
    """A descriptor, -1 for none, and of which state of the file it is the copy."""

    fd: int
    identity: str


class Programs:
    """Makes copies and keeps them."""

    def __init__(self) -> None:
        self._copies: dict[str, Copy] = {}
        self._lock = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def lent(self, handler: config.Handler) -> AsyncIterator[Copy]:
        """Give the copy of a handler's program as it is now, for the block; only those that would
        else copy themselves at each start have one.
        """
        if handler.dialect not in config.COPIED:
            yield Copy(-1, "")
            return
        async with self._lock:
            known = await self._known(handler.path)
            lent = known._replace(fd=os.dup(known.fd)) if known.fd >= 0 else known
        try:
            yield lent
        finally:
            _close(lent)

    async def _known(self, path: str) -> Copy:
        now = sealed.identity(path)
        known = self._copies.get(path)
        if known is None or known.identity != now:
            if known is not None:
                _close(self._copies.pop(path))
            known = self._copies[path] = Copy(await asyncio.to_thread(_copied, path, now), now)
            what = "program copied" if known.fd >= 0 else "program runs from its file"
            log.debug(what, program=path)
        return known

    def close(self) -> None:
        """Let go of all copies; shims keep theirs."""
        while self._copies:
            _close(self._copies.popitem()[1])


def _copied(path: str, identity: str) -> int:
    fd = sealed.copy(path)
    if fd >= 0 and sealed.identity(path) != identity:  # it was written meanwhile
        os.close(fd)
        return -1
    return fd


def _close(known: Copy) -> None:
    if known.fd >= 0:
        os.close(known.fd)
