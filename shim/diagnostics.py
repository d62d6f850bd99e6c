# SPDX-License-Identifier: Apache-2.0
"""What a shim has to say to people: JSON lines on the stderr that it inherited.

A line is written whole or not at all, and never waited for: the reader may be a server that has
just died.
"""

import json
import os
import select
import time

_LIMIT = (
    4000  # below PIPE_BUF: such a write to a pipe that polls writable does not block, see pipe(7)
)

_context: dict[str, object] = {}


def set_context(**fields: object) -> None:
    """Add these fields (the pod's id) to every line from now on."""
    _context.update(fields)


def report(event: str, **fields: object) -> None:
    """Write one line: a constant text and the fields that make it particular."""
    line = json.dumps({"time": time.time_ns(), "event": event, **_context, **fields}, default=str)
    poll = select.poll()
    poll.register(2, select.POLLOUT)
    try:
        if any(ready & select.POLLOUT for _, ready in poll.poll(0)):
            os.write(2, line.encode()[:_LIMIT] + b"\n")
    except OSError:
        return  # It is too late to tell anyone.
