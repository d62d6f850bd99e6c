# SPDX-License-Identifier: Apache-2.0
"""The traffic counters of a network namespace, read from inside it.

A namespace belongs to a thread, so the reading is done in a thread that enters it and then ends: no
thread of a pool is ever left in a pod's network.
"""

import os
import threading
from dataclasses import dataclass

from shim import linux


@dataclass(frozen=True, kw_only=True, slots=True)
class Counters:
    """One interface since it was made; bytes and errors, received and sent."""

    name: str
    rx_bytes: int
    rx_errors: int
    tx_bytes: int
    tx_errors: int


def read(netns: str) -> list[Counters]:
    """Return the counters of every interface but the loopback; none when the namespace is gone."""
    found: list[Counters] = []
    reader = threading.Thread(target=_enter_and_read, args=(netns, found), name="netns counters")
    reader.start()
    reader.join()
    return found


def _enter_and_read(netns: str, found: list[Counters]) -> None:
    try:
        fd = os.open(netns, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        linux.setns(fd, linux.CLONE_NEWNET)
        with open("/proc/thread-self/net/dev") as table:
            found += [_line(line) for line in table.readlines()[2:]]
    except OSError:  # not a namespace any more
        found.clear()
    finally:
        os.close(fd)
    found[:] = [c for c in found if c.name != "lo"]


def _line(line: str) -> Counters:
    """Parse a line of /proc/net/dev: eight receive columns, then eight transmit columns."""
    name, _, rest = line.partition(":")
    columns = [int(word) for word in rest.split()]
    return Counters(
        name=name.strip(),
        rx_bytes=columns[0],
        rx_errors=columns[2],
        tx_bytes=columns[8],
        tx_errors=columns[10],
    )
