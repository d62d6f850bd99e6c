# SPDX-License-Identifier: Apache-2.0
"""How files are opened that others may have put there: what `open` takes as its `opener`.

With an opener a descriptor is the file object's from its first moment on. One that is opened before
is lost when `open` refuses it, as it does with a folder.
"""

import os


def at_once(path: str, flags: int) -> int:
    """Open without waiting: a fifo must not hold us up."""
    return os.open(path, flags | os.O_NONBLOCK)
