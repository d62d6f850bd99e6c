# SPDX-License-Identifier: Apache-2.0
"""Whether the kernel killed something in a container for want of memory.

The kernel counts before it kills, and a cgroup outlives its processes until the runtime removes it;
so the counter is read after the exit and before `delete`, and a kill in the first milliseconds
cannot be missed. Only systemd is quicker: it removes a scope as soon as that is empty. The kills
are then still in the count of the group above, the pod's, next to those of its other containers.
"""

import os
from collections.abc import Mapping

# (controller, file): v1 counts in the victim's own group, v2 in it and in all above.
_COUNTERS = (("memory", "memory.oom_control"), ("", "memory.events"))


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


def above(directories: Mapping[str, str]) -> int:
    """Return how many processes were killed in the group that this one is in, itself included; 0 on
    v1, which does not count so.
    """
    own = directories.get("")
    if own is None:
        return 0
    return _read(os.path.join(os.path.dirname(own), "memory.events")) or 0


def _read(path: str) -> int | None:
    """Return the field `oom_kill` of a file of "name value" lines, None when it has none."""
    try:
        with open(path, "rb") as file:
            fields = dict(line.split() for line in file)
    except (OSError, ValueError):
        return None
    value = fields.get(b"oom_kill")
    return None if value is None else int(value)
