# SPDX-License-Identifier: Apache-2.0
"""What the signals tell: which settings differ, and where a task stands."""

import asyncio
import dataclasses
from pathlib import Path

from cri_server import config, signals


def test_what_differs_is_named() -> None:
    before = config.parse({"runtimes": {"a": {"path": "a"}, "b": {"path": "b"}}})
    after = config.parse(
        {
            "server": {"log_level": "debug"},
            "network": {"bin_dirs": ["/x"]},
            "runtimes": {"a": {"path": "z"}, "c": {"path": "c"}},
        }
    )
    assert signals.differences(before, before) == []
    assert signals.differences(before, dataclasses.replace(before, drop_ins=Path("/x"))) == []
    assert signals.differences(before, after) == [
        "server.log_level",
        "network.bin_dirs",
        "runtimes.a",
        "runtimes.b",
        "runtimes.c",
    ]


async def test_the_places_of_a_task_lead_to_what_it_waits_for() -> None:
    never = asyncio.Event()

    async def inner() -> None:
        await never.wait()

    async def outer() -> None:
        await inner()

    task = asyncio.create_task(outer())
    await asyncio.sleep(0)
    found = [place.split(" ") for place in signals.places(task.get_coro())]
    task.cancel()
    assert [name.rpartition(".")[2] for _, name in found] == ["outer", "inner", "wait"]
    files = [where.partition(":")[0] for where, _ in found]
    assert files == ["test_signals.py", "test_signals.py", "locks.py"]
