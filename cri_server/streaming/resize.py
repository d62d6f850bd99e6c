# SPDX-License-Identifier: Apache-2.0
"""The sizes of a terminal as they come on the resize stream: JSON objects, one after the other."""

import collections
import json
import re

from cri_server.streaming import peer

_LIMIT = 4096  # bytes of one object; clients send about 30
_MOST = 65535  # rows or columns, as the kernel counts them: ioctl_tty(2)
_SPACE = re.compile(r"\s*")
_decoder = json.JSONDecoder()


class Sizes:
    """Collects bytes and gives the last whole sizes."""

    def __init__(self) -> None:
        self._text = ""

    def feed(self, data: bytes) -> tuple[tuple[int, int], ...]:
        """Return width and height of the objects that came whole and say both: the last two. A
        client that wants all drawn anew sends another size and then its own, and the program must
        see that it changed.

        Raises Gone for what cannot become an object.
        """
        text = self._text + data.decode("latin-1")
        found: collections.deque[tuple[int, int]] = collections.deque(maxlen=2)
        at = _begin(text, 0)
        while text[at : at + 1] == "{":
            try:
                document, at = _decoder.raw_decode(text, at)
            except (ValueError, RecursionError):  # not whole, or nothing that we would understand
                break
            found += _size(document)
            at = _begin(text, at)
        self._text = text[at:]
        if len(self._text) > _LIMIT:
            raise peer.Gone("the resize stream is not JSON")
        return tuple(found)


def _begin(text: str, at: int) -> int:
    """Return where the next object begins."""
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _size(document: dict[str, object]) -> tuple[tuple[int, int], ...]:
    """Return the size that an object tells, () where it tells none that can be."""
    width, height = document.get("Width"), document.get("Height")
    if not (isinstance(width, int) and isinstance(height, int)):
        return ()
    return ((width, height),) if 0 < width <= _MOST and 0 < height <= _MOST else ()
