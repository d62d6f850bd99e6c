# SPDX-License-Identifier: Apache-2.0
"""Helpers that a dead shim or server has left behind: found by their words, and killed.

    kill(words) ─┐
    kill(words) ─┼─► one look at all processes ─► whose words they are is killed ─► the answers
    kill(words) ─┘

A caller that asks while a look goes on waits for the next one, which answers all of them. A process
that hangs in the kernel may let nobody read its words, so a look has its `own_thread`: it is given
up, and the next one passes that process by (hazards.md R24). Nothing outlives the server.
"""

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

import structlog

from cri_server import errors, own_thread
from shim import process

log = structlog.get_logger()
LOOK_TIMEOUT = 2.0  # seconds; a look takes some 20 ms


class _Request(NamedTuple):
    words: tuple[str, ...]
    answer: asyncio.Future[bool]


class Orphans:
    """Finds and kills them, in one look for all callers."""

    def __init__(self) -> None:
        self._requests: list[_Request] = []
        self._task: asyncio.Task[None] | None = None

    async def kill(self, *words: str) -> bool:
        """Kill the trees of all processes with these arguments or variables.

        Returns whether there were any, or that it could not be told: ask again until it is false.
        """
        request = _Request(words, asyncio.get_running_loop().create_future())
        self._requests.append(request)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run(), name="orphans")
        return await request.answer

    async def _run(self) -> None:
        while asked := self._requests:
            self._requests = []
            found = await _looked([r.words for r in asked])
            for request, any_found in zip(asked, found, strict=True):
                if not request.answer.done():  # the caller may have gone
                    request.answer.set_result(any_found)


async def _looked(asked: Sequence[tuple[str, ...]]) -> Sequence[bool]:
    try:
        what = "a look at all processes"
        return await own_thread.run(lambda: _kill(asked), within=LOOK_TIMEOUT, what=what)
    except Exception as e:  # the root of a task, for which others wait
        log.warning("not all processes looked at", error=repr(e))
        return [True] * len(asked)


def _kill(asked: Sequence[tuple[str, ...]]) -> Sequence[bool]:
    """Kill what has all the words of one of the callers; tell each whether there was any."""
    wanted = [{word.encode() for word in words} for words in asked]
    found = [False] * len(asked)
    for each in list(process.candidates(word for words in asked for word in words)):
        read = _words(each.pid)
        matches = [number for number, words in enumerate(wanted) if words <= read]
        if matches:
            process.kill_tree(each)
        for number in matches:
            found[number] = True
    return found


def _words(pid: int) -> frozenset[bytes]:
    try:
        with own_thread.looking_at(f"process {pid}"):
            return process.words_of(pid)
    except errors.Unavailable:
        return frozenset()
