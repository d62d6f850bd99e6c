# SPDX-License-Identifier: Apache-2.0
"""Two things at once: both results, or the first error with nothing left running."""

import asyncio

import pytest

from cri_server import side_by_side


async def give(value: int) -> int:
    return value


async def test_both_results() -> None:
    assert await side_by_side.both(give(1), give(2)) == (1, 2)


async def test_the_first_error_comes_plain_and_the_other_has_ended() -> None:
    ended = False

    async def fail() -> None:
        raise ValueError("first")

    async def wait() -> None:
        nonlocal ended
        try:
            await asyncio.Event().wait()
        finally:
            ended = True

    with pytest.raises(ValueError, match="first"):
        await side_by_side.both(wait(), fail())
    assert ended


async def test_what_is_unbroken_ends_before_the_cancellation_is_told() -> None:
    ended = False

    async def work() -> None:
        nonlocal ended
        for _ in range(3):
            await asyncio.sleep(0)
        ended = True

    task = asyncio.create_task(side_by_side.uninterrupted(work()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended
    assert await side_by_side.uninterrupted(give(3)) == 3
