# SPDX-License-Identifier: Apache-2.0
"""Work that several callers want at once is done once.

    hold(key) ──► the first one starts it ──► everybody waits for it, uses the result, and lets go
                                              the last one to let go ends it: cancelled, or disposed
                                              of

Whoever goes away early takes nothing from the others. A cancelled caller returns at once; what it
alone had wanted cleans up behind it. Nothing here survives a crash, and nothing needs to.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Hashable
from typing import Any, Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class _Flight(Generic[T]):
    def __init__(self, task: "asyncio.Task[T]") -> None:
        self.task = task
        self.holders = 0


class Flights(Generic[T]):
    """Shared results by key, each alive while somebody holds it."""

    def __init__(self, dispose: Callable[[T], None] | None = None) -> None:
        """`dispose` is called with a result that nobody holds any more."""
        self._dispose = dispose
        self._flights: dict[Hashable, _Flight[T]] = {}
        self._leaving: set[asyncio.Task[T]] = set()

    @contextlib.asynccontextmanager
    async def hold(
        self, key: Hashable, make: Callable[[], Coroutine[Any, Any, T]], *, insist: bool = False
    ) -> AsyncIterator[T]:
        """Have the result of `make()` for the block, shared with all who hold the same key.

        Raises what `make` raised, to everybody who waits. With `insist` only what the caller's own
        `make` raised: where another one's has failed, the caller's may know a better way.
        """
        flight, ours = self._join(key, make)
        try:
            while insist and not ours and await _fails(flight.task):
                self._leave(key, flight)
                flight, ours = self._join(key, make)
            yield await asyncio.shield(flight.task)
        finally:
            self._leave(key, flight)

    def _join(
        self, key: Hashable, make: Callable[[], Coroutine[Any, Any, T]]
    ) -> tuple[_Flight[T], bool]:
        """Return the flight with this key, and whether it had to be started."""
        flight = self._flights.get(key)
        start = flight is None or flight.task.cancelling() or _failed(flight.task)
        if flight is None or start:
            flight = _Flight(asyncio.create_task(make(), name=f"flight {key}"))
            self._flights[key] = flight
        flight.holders += 1
        return flight, bool(start)

    def _leave(self, key: Hashable, flight: _Flight[T]) -> None:
        flight.holders -= 1
        if not flight.holders:
            self._end(key, flight)

    async def close(self) -> None:
        """Wait for cancelled work to have cleaned up."""
        while self._leaving:
            await asyncio.wait(self._leaving)

    def _end(self, key: Hashable, flight: _Flight[T]) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]
        task = flight.task
        if not task.done():
            self._leaving.add(task)
            task.cancel()
        task.add_done_callback(self._landed)

    def _landed(self, task: "asyncio.Task[T]") -> None:
        self._leaving.discard(task)
        if not task.cancelled() and task.exception() is None and self._dispose is not None:
            self._dispose(task.result())


async def _fails(task: "asyncio.Task[T]") -> bool:
    """Wait for the end of a task, which goes on when the caller does not; say how it was."""
    await asyncio.wait([task])
    return _failed(task)


def _failed(task: "asyncio.Task[T]") -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)


async def in_thread(function: Callable[..., R], *args: Any) -> R:
    """Run something blocking in a thread; a caller that is cancelled still waits for its end.

    What comes after, such as removing what the thread makes, would otherwise run beside it.
    """
    task = asyncio.ensure_future(asyncio.to_thread(function, *args))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise
