# SPDX-License-Identifier: Apache-2.0
"""Unix socket paths of any length: the kernel takes 107 bytes, a state directory may need more."""

import contextlib
import os
from collections.abc import Iterator

_SUN_PATH = 107  # bytes without the final NUL, see unix(7)


@contextlib.contextmanager
def usable(path: str) -> Iterator[str]:
    """Give a name for `path` that bind and connect take while the block lasts."""
    if len(os.fsencode(path)) <= _SUN_PATH:
        yield path
        return
    directory, name = os.path.split(path)
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{fd}/{name}"
    finally:
        os.close(fd)
