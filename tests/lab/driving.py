# SPDX-License-Identifier: Apache-2.0
"""Run a coroutine of the shim's own loop in a test, and see that no descriptor is left open."""

import contextlib
import os
from collections.abc import Coroutine, Iterator
from typing import Any

from shim import loop


def drive(work: Coroutine[Any, Any, None], *, seconds: float = 20) -> None:
    """Run `work` to its end, which must come within `seconds`, and see that it leaves no file
    descriptor open.
    """

    async def within() -> None:
        async with loop.timeout(seconds):
            await work

    with keeping_descriptors():
        loop.run(within())


@contextlib.contextmanager
def keeping_descriptors() -> Iterator[None]:
    """See that the block leaves no file descriptor open."""
    before = set(os.listdir("/proc/self/fd"))
    yield
    assert set(os.listdir("/proc/self/fd")) <= before
