# SPDX-License-Identifier: Apache-2.0
"""Run a coroutine of the shim's own loop in a test."""

import os
from collections.abc import Coroutine
from typing import Any

from shim import loop


def drive(work: Coroutine[Any, Any, None], *, seconds: float = 20) -> None:
    """Run `work` to its end, which must come within `seconds`, and see that it leaves no file
    descriptor open.
    """

    async def within() -> None:
        async with loop.timeout(seconds):
            await work

    before = set(os.listdir("/proc/self/fd"))
    loop.run(within())
    assert set(os.listdir("/proc/self/fd")) <= before
