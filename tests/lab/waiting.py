# SPDX-License-Identifier: Apache-2.0
"""Waiting for a condition, with a deadline and a name for it.

CRI_TESTS_PATIENCE says how many times slower than hardware this machine is (a guest without KVM);
deadlines, limits of durations and the pauses between two looks are that many times longer.
"""

import os
import time
from collections.abc import Callable
from typing import TypeVar

PATIENCE = float(os.environ.get("CRI_TESTS_PATIENCE", "1"))
T = TypeVar("T")


def patient(seconds: float) -> float:
    """Return what `seconds` on hardware may take here."""
    return seconds * PATIENCE


def until(condition: Callable[[], T | None], what: str, *, seconds: float = 10.0) -> T:
    """Return the first true value of `condition`, asked every 10 ms; AssertionError after
    `seconds`. Both are times of hardware.
    """
    seconds = patient(seconds)
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {seconds:g} s in vain: {what} (last value: {value!r})")
        time.sleep(patient(0.01))
