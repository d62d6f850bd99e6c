# SPDX-License-Identifier: Apache-2.0
"""The sizes of a terminal as they come on the resize stream: JSON objects, one after the other."""

import json

from cri_server.streaming import peer

_LIMIT = 4096  # bytes of one object; clients send about 30
_MOST = 65535  # rows or columns, as the kernel counts them: ioctl_tty(2)
_decoder = json.JSONDecoder()


class Sizes:
    """Collects bytes and gives the last whole size."""

    def __init__(self) -> None:
        self._text = ""

    def feed(self, data: bytes) -> tuple[int, int] | None:
        """Return width and height if a whole object has come that says both; the latest counts.

        Raises Gone for what cannot become one.
        """
        self._text += data.decode("latin-1")
        size = None
        while (text := self._text.lstrip()) and text[0] == "{":
            try:
                document, end = _decoder.raw_decode(text)
            except (ValueError, RecursionError):  # not whole, or nothing that we would understand
                break
            self._text = text[end:]
            size = _size(document) or size
        if len(self._text) > _LIMIT:
            raise peer.Gone("the resize stream is not JSON")
        return size


def _size(document: dict[str, object]) -> tuple[int, int] | None:
    width, height = document.get("Width"), document.get("Height")
    if not (isinstance(width, int) and isinstance(height, int)):
        return None
    return (width, height) if 0 < width <= _MOST and 0 < height <= _MOST else None
