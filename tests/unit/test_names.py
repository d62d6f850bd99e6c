# SPDX-License-Identifier: Apache-2.0
"""A repeated request finds the attempt in flight."""

import asyncio
import re

import pytest

from cri_server import names


def test_ids_have_the_shape_that_cadvisor_knows() -> None:
    assert re.fullmatch(r"[0-9a-f]{64}", names.new_id())
    assert names.new_id() != names.new_id()


async def test_the_same_name_is_one_attempt() -> None:
    attempts, go, runs = names.Attempts(), asyncio.Event(), 0

    async def make() -> str:
        nonlocal runs
        runs += 1
        await go.wait()
        return "id"

    both = [asyncio.create_task(attempts.join("n", make)) for _ in range(2)]
    await asyncio.sleep(0)
    go.set()
    assert await asyncio.gather(*both) == ["id", "id"]
    assert runs == 1


async def test_a_caller_that_goes_away_does_not_end_the_attempt() -> None:
    attempts, go = names.Attempts(), asyncio.Event()

    async def make() -> str:
        await go.wait()
        return "id"

    first = asyncio.create_task(attempts.join("n", make))
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    second = asyncio.create_task(attempts.join("n", make))
    go.set()
    assert await second == "id"


async def test_a_failed_attempt_leaves_the_name_free() -> None:
    attempts = names.Attempts()

    async def fail() -> str:
        raise ValueError("no")

    async def make() -> str:
        return "id"

    with pytest.raises(ValueError, match="no"):
        await attempts.join("n", fail)
    assert await attempts.join("n", make) == "id"


async def test_closing_cancels_attempts_and_waits_for_their_undo() -> None:
    attempts, begun, undone = names.Attempts(), asyncio.Event(), []

    async def make() -> str:
        try:
            begun.set()
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            undone.append("it")
        return "never"

    waiter = asyncio.create_task(attempts.join("n", make))
    await begun.wait()
    await attempts.close()
    assert undone == ["it"]
    with pytest.raises(asyncio.CancelledError):
        await waiter


def test_ids_are_told_from_other_names() -> None:
    assert names.is_id(names.new_id())
    for other in ("", "ab" * 31, "AB" * 32, "g" * 64, "../" + "a" * 61):
        assert not names.is_id(other)
