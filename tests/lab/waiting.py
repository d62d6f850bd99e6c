# SPDX-License-Identifier: Apache-2.0
"""Waiting for a condition, with a deadline and a name for it."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def until(condition: Callable[[], T | None], what: str, *, seconds: float = 10.0) -> T:
    """Return the first true value of `condition`, asked every 10 ms; AssertionError after
    `seconds`.
    """
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {seconds:g} s in vain: {what} (last value: {value!r})")
        time.sleep(0.01)
