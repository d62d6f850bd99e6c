# SPDX-License-Identifier: Apache-2.0
"""Who waits for whom: one operation per object at a time; many of one kind, or one of another."""

import asyncio
import contextlib
from collections.abc import AsyncIterator


class Locks:
    """A lock per id, which exists while somebody holds or wants it."""

    def __init__(self) -> None:
        self._locks: dict[str, asyncio.Lock] = {}
        self._users: dict[str, int] = {}

    @contextlib.asynccontextmanager
    async def held(self, key: str) -> AsyncIterator[None]:
        """Hold the lock of `key` for the block."""
        lock = self._locks.setdefault(key, asyncio.Lock())
        self._users[key] = self._users.get(key, 0) + 1
        try:
            async with lock:
                yield
        finally:
            self._users[key] -= 1
            if not self._users[key]:
                del self._users[key], self._locks[key]


class Shared:
    """Any number at a time, or one alone.

    A caller that wants to be alone waits until nobody is there, for ever if need be, and meanwhile
    holds up nobody: one that hangs must not stop those that come after it.
    """

    def __init__(self) -> None:
        self._gate = asyncio.Lock()  # held by the one alone
        self._users = 0
        self._empty = asyncio.Event()
        self._empty.set()

    @contextlib.asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        """Be one of many for the block."""
        async with self._gate:
            self._users += 1
            self._empty.clear()
        try:
            yield
        finally:
            self._users -= 1
            if not self._users:
                self._empty.set()

    @contextlib.asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Be alone for the block."""
        while True:
            await self._empty.wait()
            async with self._gate:
                if not self._users:
                    yield
                    return
