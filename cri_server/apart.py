# SPDX-License-Identifier: Apache-2.0
"""Calls that may never return, each in a thread of its own.

A look at a host path on dead network storage blocks in the kernel, and nothing can end it. In the
shared pool of `asyncio.to_thread` a few of these would stop the whole server (hazards.md R21,
containerd#10828); here each costs one thread that dies with the process, and at most LIMIT exist.
"""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

from cri_server import errors

T = TypeVar("T")
LIMIT = 64

_busy: set[threading.Thread] = set()


async def call(function: Callable[[], T], *, within: float, what: str) -> T:
    """Return `function()`; stop waiting after `within` seconds, or when cancelled.

    Raises what it raises, DeadlineExceeded naming `what`, ResourceExhausted when LIMIT are stuck.
    """
    if len(_busy) >= LIMIT:
        raise errors.ResourceExhausted(f"{what}: {LIMIT} earlier ones still hang")
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[T] = loop.create_future()
    thread = threading.Thread(target=_work, args=(function, loop, answer), name=what, daemon=True)
    _busy.add(thread)
    thread.start()
    try:
        async with asyncio.timeout(within):
            return await answer
    except TimeoutError as e:
        raise errors.DeadlineExceeded(f"{what} does not answer within {within:g} s") from e


def _work(
    function: Callable[[], T], loop: asyncio.AbstractEventLoop, answer: "asyncio.Future[T]"
) -> None:
    settle: Callable[[], None]
    try:
        result = function()
        settle = lambda: answer.set_result(result)  # noqa: E731
    except BaseException as e:
        failure = e
        settle = lambda: answer.set_exception(failure)  # noqa: E731
    _busy.discard(threading.current_thread())
    with contextlib.suppress(RuntimeError):  # the loop is gone
        loop.call_soon_threadsafe(lambda: None if answer.done() else settle())
