# SPDX-License-Identifier: Apache-2.0
"""A call that hangs costs its own thread and nothing else."""

import functools
import os
import threading
from collections.abc import Iterator

import pytest

from cri_server import errors, own_thread
from tests.lab import waiting


class Storage:
    """What looks at its paths hangs until it is back."""

    def __init__(self) -> None:
        self._back = threading.Event()

    def look(self, path: str) -> None:
        with own_thread.looking_at(path):
            self._back.wait()

    def restore(self) -> None:
        self._back.set()
        waiting.until(lambda: not own_thread._calls, "no call hangs")


@pytest.fixture
def dead() -> Iterator[Storage]:
    storage = Storage()
    yield storage
    storage.restore()


async def test_results_and_errors_come_back() -> None:
    assert await own_thread.run(lambda: 7, within=5, what="look") == 7
    with pytest.raises(FileNotFoundError):
        await own_thread.run(lambda: os.stat("/none"), within=5, what="look")


async def test_a_call_that_hangs_is_left_behind(
    monkeypatch: pytest.MonkeyPatch, dead: Storage
) -> None:
    monkeypatch.setattr(own_thread, "LIMIT", 2)
    for path in ("/a", "/b"):
        with pytest.raises(errors.DeadlineExceeded, match=f"look: {path} does not answer"):
            await own_thread.run(functools.partial(dead.look, path), within=0.05, what="look")
    with pytest.raises(errors.ResourceExhausted):
        await own_thread.run(lambda: 7, within=5, what="look")
    dead.restore()
    assert await own_thread.run(lambda: 7, within=5, what="look") == 7


async def test_the_same_place_is_refused_at_once_and_others_are_not(dead: Storage) -> None:
    with pytest.raises(errors.DeadlineExceeded):
        await own_thread.run(lambda: dead.look("/dead"), within=0.05, what="look")
    for _ in range(3):
        with pytest.raises(errors.Unavailable, match="/dead does not answer: an earlier look"):
            await own_thread.run(lambda: dead.look("/dead"), within=5, what="look")
    assert len(own_thread._calls) == 1

    def other() -> str:
        with own_thread.looking_at("/alive"):
            return "there"

    assert await own_thread.run(other, within=5, what="look") == "there"
    dead.restore()
    await own_thread.run(lambda: dead.look("/dead"), within=5, what="look")


async def test_a_thread_that_cannot_be_had_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(errors.ResourceExhausted, match="can't start new thread"):
            await own_thread.run(lambda: 7, within=5, what="look")
    assert not own_thread._calls
