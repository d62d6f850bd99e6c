# SPDX-License-Identifier: Apache-2.0
"""Orphans are found and killed, whatever else hangs on the host."""

import asyncio
import errno
import os
import signal
import threading

import pytest

from cri_server import orphans, own_thread
from shim import process
from tests.lab import waiting


async def test_one_look_answers_all_who_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    candidates = process.candidates

    def counted(words: list[str]) -> object:
        looks.append(1)
        return candidates(words)

    monkeypatch.setattr(process, "candidates", counted)
    marks = [os.urandom(8).hex() for _ in range(20)]
    children = [process.spawn(["sleep", "1000"], env={"MARK": mark}) for mark in marks[:2]]
    host = orphans.Orphans()
    found = await asyncio.gather(*(host.kill(f"MARK={mark}") for mark in marks))
    assert found == [True, True, *[False] * 18]
    assert [process.reap(child) for child in children] == [-signal.SIGKILL] * 2
    assert len(looks) == 1


async def test_a_process_that_cannot_be_read_is_passed_by(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orphans, "LOOK_TIMEOUT", 0.5)
    stuck = process.spawn(["sleep", "1000"])
    thawed = threading.Event()
    read = process.words_of

    def hanging(pid: int) -> frozenset[bytes]:
        if pid == stuck.pid:
            thawed.wait()
        return read(pid)

    monkeypatch.setattr(process, "words_of", hanging)
    mark = os.urandom(8).hex()
    child = process.spawn(["sleep", "1000"], env={"MARK": mark})
    host = orphans.Orphans()
    try:
        assert await host.kill(f"MARK={mark}")  # given up: it cannot be told
        assert await host.kill(f"MARK={mark}") in (True, False)
        assert process.reap(child) == -signal.SIGKILL
        assert not await host.kill(f"MARK={mark}")
        assert len(own_thread._calls) == 1
    finally:
        thawed.set()
        process.kill_group(stuck)
        process.reap(stuck)
        waiting.until(lambda: not own_thread._calls, "no look hangs")


async def test_without_descriptors_it_cannot_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(path: str) -> list[str]:
        raise OSError(errno.EMFILE, "Too many open files", path)

    host = orphans.Orphans()
    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", none_left)
        assert await host.kill("MARK=x")
    assert not await host.kill(f"MARK={os.urandom(8).hex()}")
