# SPDX-License-Identifier: Apache-2.0
"""Cutting a list into the messages of a Stream* call."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

from google.protobuf import message

T = TypeVar("T", bound=message.Message)
MOST = 1000  # items per message
MOST_BYTES = 1 << 20  # a kubelet accepts 16 MiB


def cut(items: Sequence[T]) -> Iterator[Sequence[T]]:
    """Yield the items in parts; an empty list is one empty part, a huge item a part of its own."""
    part: list[T] = []
    size = 0
    for item in items:
        more = item.ByteSize()
        if part and (len(part) == MOST or size + more > MOST_BYTES):
            yield part
            part, size = [], 0
        part.append(item)
        size += more
    yield part
