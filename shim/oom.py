# SPDX-License-Identifier: Apache-2.0
"""Whether the kernel killed something in a container for want of memory.

The kernel counts before it kills, and a cgroup outlives its processes until the runtime removes it;
so the counter is read once, after the exit and before `delete`, and a kill in the first
milliseconds cannot be missed.
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


def _read(path: str) -> int | None:
    """Return the field `oom_kill` of a file of "name value" lines, None when it has none."""
    try:
        with open(path, "rb") as file:
            fields = dict(line.split() for line in file)
    except (OSError, ValueError):
        return None
    value = fields.get(b"oom_kill")
    return None if value is None else int(value)
