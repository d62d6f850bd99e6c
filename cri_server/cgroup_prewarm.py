# SPDX-License-Identifier: Apache-2.0
"""Time that OCI runtimes need not wait for: the kernel's grace period before a process moves.

The first write to any `cgroup.procs` after a pause waits for an RCU grace period, 5 to 15 ms, in
which nothing else of the start goes on (cgroup_threadgroup_rwsem, a percpu_rw_semaphore); for about
10 ms after a write the next costs nothing. So when a container or an exec is about to be started we
write our own pid into the cgroup that we are in, which moves nothing. Hosts whose cgroups are
mounted with `favordynmods` have no such wait, and lose nothing.
"""

import asyncio
import contextlib
import os
from collections.abc import Mapping
from pathlib import Path


class Prewarm:
    """Of this process: one write at a time, in a thread. `mounts`: see `cgroups.Hierarchy`."""

    def __init__(self, mounts: Mapping[str, Path]) -> None:
        self._mounts = mounts
        self._pending: asyncio.Future[None] | None = None

    def start(self) -> None:
        """Say that a process will be moved in some milliseconds. Returns at once."""
        if self._pending is None or self._pending.done():
            loop = asyncio.get_running_loop()
            self._pending = loop.run_in_executor(None, stay, self._mounts)

    async def close(self) -> None:
        """Wait for the write in progress."""
        if self._pending:
            await self._pending


def stay(mounts: Mapping[str, Path]) -> None:
    """Move this process to where it is. Blocks for the grace period; a server that may not write
    does without.
    """
    with contextlib.suppress(OSError):
        if file := _own(mounts):
            file.write_text(str(os.getpid()))


def _own(mounts: Mapping[str, Path]) -> Path | None:
    """Return a cgroup.procs that has us, asked anew each time, for somebody may have moved us."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        for name in set(names.split(",")) & set(mounts):
            file = mounts[name] / path[1:] / "cgroup.procs"
            if str(os.getpid()) in file.read_text().split():  # seen from a cgroup namespace: not
                return file
    return None
