# SPDX-License-Identifier: Apache-2.0
"""Frames that say nothing, as pings that need no answer. A client may send thousands in one go, and
who reads them must come to a point now and then where others can have their turn. Pure.
"""

from collections.abc import Iterable, Iterator
from typing import TypeVar

E = TypeVar("E")
SILENT = 16  # frames


class Idle:
    """Nothing was said for SILENT frames."""


def told(frames: Iterable[Iterable[E]]) -> Iterator[E | Idle]:
    """Yield what frames say, and `Idle` where many in a row say nothing."""
    silent = 0
    for frame in frames:
        silent += 1
        for event in frame:
            silent = 0
            yield event
        if silent == SILENT:
            silent = 0
            yield Idle()
