# SPDX-License-Identifier: Apache-2.0
"""A pinned network namespace: is it there, and take it away.

The shim makes and pins it (a bind mount of its nsfs file on /run/netns/<pod id>) and brings up its
loopback. The pin outlives every process and not a reboot, after which at most an empty file is
left; `remove` takes that away too.
"""

import contextlib
import os

from shim import mounts


def exists(path: str) -> bool:
    """Say whether a namespace is pinned at `path`: a file of nsfs, not the empty file below it."""
    try:
        # All namespaces of a kernel live on one nsfs, so its device number tells.
        return os.stat(path).st_dev == os.stat("/proc/self/ns/net").st_dev
    except OSError:
        return False


def remove(path: str) -> None:
    """Unpin what is at `path`; "" and a path where nothing is are fine. Raises OSError."""
    if path:
        mounts.unmount(path)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
