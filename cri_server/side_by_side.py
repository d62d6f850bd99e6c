# SPDX-License-Identifier: Apache-2.0
"""Two things at once, where a task group would wrap the one error that callers want to see."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

A = TypeVar("A")
B = TypeVar("B")


async def both(first: Coroutine[Any, Any, A], second: Coroutine[Any, Any, B]) -> tuple[A, B]:
    """Run both and return both results.

    When one fails the other is cancelled and waited for, and the first error is raised as it is.
    """
    one, two = asyncio.ensure_future(first), asyncio.ensure_future(second)
    try:
        await asyncio.gather(one, two)
    except BaseException:
        one.cancel()
        two.cancel()
        await asyncio.wait([one, two])
        raise
    return one.result(), two.result()


async def uninterrupted(work: Coroutine[Any, Any, A]) -> A:
    """Run `work` to its end, also when the caller is cancelled, which is told afterwards."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise
