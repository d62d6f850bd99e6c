# SPDX-License-Identifier: Apache-2.0
"""Who waits for whom."""

import asyncio

from cri_server import locks


async def test_who_wants_to_be_alone_holds_up_nobody_until_it_is() -> None:
    lock, seen = locks.Shared(), list[str]()
    leave, done = asyncio.Event(), asyncio.Event()

    async def alone() -> None:
        async with lock.alone():
            seen.append("alone")
            await done.wait()

    async with lock.shared():
        waiting = asyncio.create_task(alone())
        await asyncio.sleep(0)
        async with lock.shared():
            seen.append("another")
    await asyncio.sleep(0)

    async def shared() -> None:
        async with lock.shared():
            seen.append("later")
            leave.set()

    last = asyncio.create_task(shared())
    for _ in range(5):
        await asyncio.sleep(0)
    assert seen == ["another", "alone"]
    assert not leave.is_set()
    done.set()
    await asyncio.gather(waiting, last)
    assert seen == ["another", "alone", "later"]


async def test_one_that_is_cancelled_leaves_the_lock() -> None:
    lock = locks.Shared()
    async with lock.shared():
        waiting = asyncio.create_task(anext(aiter(_alone(lock))))
        await asyncio.sleep(0)
        waiting.cancel()
    async with asyncio.timeout(5), lock.alone():
        pass


async def _alone(lock: locks.Shared):  # type: ignore[no-untyped-def]
    async with lock.alone():
        yield
