# SPDX-License-Identifier: Apache-2.0
"""Cutting a list into the messages of a Stream* call."""

from collections.abc import Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")
SIZE = 1000  # items per message; far below the 16 MiB that a kubelet accepts


def cut(items: Sequence[T]) -> Iterable[Sequence[T]]:
    """Yield the items in parts; an empty list is one empty part."""
    return (items[n : n + SIZE] for n in range(0, max(len(items), 1), SIZE))
