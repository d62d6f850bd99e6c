# SPDX-License-Identifier: Apache-2.0
"""Whether the kernel killed something in a container for want of memory.

The kernel counts before it kills, and a cgroup outlives its processes until the runtime removes it;
so the counter is read after the exit and before `delete`, and a kill in the first milliseconds
cannot be missed. Only systemd is quicker: it removes a scope as soon as that is empty. The kills
are then still in the count of the group above, the pod's: what is there and what no other container
has told is of the one whose group has gone.

A container may make groups below its own, with limits of its choice (docker in docker, systemd).
A kill there is not the container's end: it counts where the victim was, or where the container's
own limit was reached (behaviour.md §8.1, "prefer memory.events.local").
"""

import os
from collections.abc import Mapping

# (controller, file): v1 counts in the victim's own group, v2 in it and in all above.
_COUNTERS = (("memory", "memory.oom_control"), ("", "memory.events"))


class Ledger:
    """The OOM kills of the containers of one pod."""

    def __init__(self) -> None:
        self._counters: list[Counter] = []
        self._told = 0  # in the pod's count: by containers that are deleted, or before its first

    def open(self, directories: Mapping[str, str]) -> "Counter":
        """Return the counter of a container that is about to start in these cgroups."""
        if not self._counters:  # the first one, also after a zygote's rehearsal
            self._told = above(directories)
        counter = Counter(self, directories)
        self._counters.append(counter)
        return counter

    def close(self, counter: "Counter") -> None:
        """Forget a container that is deleted, not what it has told."""
        if counter in self._counters:
            self._counters.remove(counter)
            self._told += counter.seen

    def untold(self, directories: Mapping[str, str]) -> int:
        """Return the kills in the pod's group that no container has told yet."""
        told = self._told + sum(counter.read() for counter in self._counters)
        return max(0, above(directories) - told)


class Counter:
    """The OOM kills of one container; `seen` is the last count, with those in groups below."""

    __slots__ = ("_directories", "_ledger", "_own", "seen")

    def __init__(self, ledger: Ledger, directories: Mapping[str, str]) -> None:
        self._ledger, self._directories = ledger, directories
        self.seen = self._own = 0

    def read(self) -> int:
        """Return how many processes were killed so far, as far as that was seen."""
        self.seen = max(self.seen, kills(self._directories))
        self._own = max(self._own, own_kills(self._directories))
        return self.seen

    def last(self) -> int:
        """Return how many it were in the end, also when its cgroup has gone meanwhile; without
        those in groups below that did not come of the container's own limit.
        """
        self.read()
        if not any(map(os.path.exists, self._directories.values())):
            more = self._ledger.untold(self._directories)
            self.seen, self._own = self.seen + more, self._own + more
        return self._own


def kills(directories: Mapping[str, str]) -> int:
    """Return how many processes were killed; 0 when there is no memory controller or the group is
    gone.
    """
    for controller, name in _COUNTERS:
        if controller in directories:
            found = _read(os.path.join(directories[controller], name))
            if found is not None:
                return found
    return 0


def own_kills(directories: Mapping[str, str]) -> int:
    """Return how many of `kills` were in the group itself, or all of them once its own limit was
    reached; all on v1, which counts so, and before Linux 5.2.
    """
    if "memory" not in directories and "" in directories:
        local = _fields(os.path.join(directories[""], "memory.events.local"))
        if local.get(b"oom") == 0:
            return local.get(b"oom_kill", 0)
    return kills(directories)


def above(directories: Mapping[str, str]) -> int:
    """Return how many processes were killed in the group that this one is in, itself included; 0 on
    v1, which does not count so.
    """
    own = directories.get("")
    if own is None:
        return 0
    return _read(os.path.join(os.path.dirname(own), "memory.events")) or 0


def _read(path: str) -> int | None:
    """Return the field `oom_kill` of a file, None when it has none."""
    return _fields(path).get(b"oom_kill")


def _fields(path: str) -> Mapping[bytes, int]:
    """Return a file of "name value" lines, {} for one that is not there or holds something else."""
    try:
        with open(path, "rb") as file:
            return {name: int(value) for name, value in map(bytes.split, file)}
    except (OSError, ValueError):
        return {}
