# SPDX-License-Identifier: Apache-2.0
"""Calls that may never return, each in a thread of its own.

A look at a host path on dead network storage blocks in the kernel, and nothing can end it. In the
shared pool of `asyncio.to_thread` a few of these would stop the whole server (hazards.md R21,
containerd#10828); here each costs one thread that dies with the process, and at most LIMIT exist. A
call says with `looking_at` where it is; where an earlier one was given up and still hangs, the next
is refused at once, so that trying again and again costs no more than trying once.
"""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from cri_server import errors

T = TypeVar("T")
LIMIT = 256  # each at another place; a node has seldom more pods


@dataclass(slots=True)
class _Call:
    """One that is not over: `late` when nobody waits for it any more."""

    what: str
    place: str = ""
    late: bool = False


_calls: dict[threading.Thread, _Call] = {}
_guard = threading.Lock()


async def run(function: Callable[[], T], *, within: float, what: str) -> T:
    """Return `function()`; stop waiting after `within` seconds, or when cancelled.

    Raises what it raises, DeadlineExceeded naming `what` and the place, ResourceExhausted when
    LIMIT hang or there is no thread to be had.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[T] = loop.create_future()
    thread = threading.Thread(target=_work, args=(function, loop, answer), name=what, daemon=True)
    ours = _start(thread, what)
    try:
        async with asyncio.timeout(within):
            return await answer
    except TimeoutError as e:
        where = ": ".join(filter(None, [what, ours.place]))
        raise errors.DeadlineExceeded(f"{where} does not answer within {within:g} s") from e
    finally:
        ours.late = True


def _start(thread: threading.Thread, what: str) -> _Call:
    ours = _Call(what)
    with _guard:
        if len(_calls) >= LIMIT:
            raise errors.ResourceExhausted(f"{what}: {LIMIT} earlier ones still hang")
        _calls[thread] = ours
    try:
        thread.start()
    except RuntimeError as e:
        _forget(thread)
        raise errors.ResourceExhausted(f"{what}: {e}") from e
    return ours


def _forget(thread: threading.Thread) -> None:
    with _guard:
        _calls.pop(thread, None)


@contextlib.contextmanager
def looking_at(place: str) -> Iterator[None]:
    """Tell, inside a call, that the block looks at `place`.

    Raises Unavailable while an earlier call, given up since, hangs there.
    """
    with _guard:
        ours = _calls.get(threading.current_thread()) or _Call("")
        if any(c.late and c.place == place for c in _calls.values() if c is not ours):
            raise errors.Unavailable(f"{place[:200]} does not answer: an earlier look still hangs")
    ours.place, before = place, ours.place
    try:
        yield
    finally:
        ours.place = before


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
    _forget(threading.current_thread())
    with contextlib.suppress(RuntimeError):  # the loop is gone
        loop.call_soon_threadsafe(lambda: None if answer.done() else settle())
