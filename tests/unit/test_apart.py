# SPDX-License-Identifier: Apache-2.0
"""A call that hangs costs its own thread and nothing else."""

import os
import threading

import pytest

from cri_server import apart, errors


async def test_results_and_errors_come_back() -> None:
    assert await apart.call(lambda: 7, within=5, what="look") == 7
    with pytest.raises(FileNotFoundError):
        await apart.call(lambda: os.stat("/none"), within=5, what="look")


async def test_a_call_that_hangs_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "LIMIT", 2)
    end = threading.Event()
    try:
        for _ in range(2):
            with pytest.raises(errors.DeadlineExceeded, match="look does not answer"):
                await apart.call(end.wait, within=0.05, what="look")
        with pytest.raises(errors.ResourceExhausted):
            await apart.call(lambda: 7, within=5, what="look")
    finally:
        end.set()
        for thread in list(apart._busy):
            thread.join(5)
    assert await apart.call(lambda: 7, within=5, what="look") == 7
