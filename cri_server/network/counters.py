# SPDX-License-Identifier: Apache-2.0
"""The traffic counters of network namespaces, read from inside them.

A namespace belongs to a thread, so the reading is done in a thread that enters one after the other
and then ends: no thread of a pool is ever left in a pod's network.
"""

import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass

from shim import linux


@dataclass(frozen=True, kw_only=True, slots=True)
class Counters:
    """One interface since it was made: bytes, packets, errors and drops, received and sent."""

    name: str
    rx_bytes: int
    rx_packets: int
    rx_errors: int
    rx_dropped: int
    tx_bytes: int
    tx_packets: int
    tx_errors: int
    tx_dropped: int


def read(namespaces: Iterable[str]) -> dict[str, list[Counters]]:
    """Return the counters of every interface but the loopback, by the path of the namespace.

    One that is gone is left out.
    """
    found: dict[str, list[Counters]] = {}
    reader = threading.Thread(
        target=_enter_and_read, args=(tuple(namespaces), found), name="netns counters"
    )
    reader.start()
    reader.join()
    return found


def _enter_and_read(namespaces: Iterable[str], found: dict[str, list[Counters]]) -> None:
    for path in namespaces:
        try:
            found[path] = _read_inside(path)
        except OSError:  # not there, or not a namespace any more
            found.pop(path, None)


def _read_inside(path: str) -> list[Counters]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        linux.setns(fd, linux.CLONE_NEWNET)
    finally:
        os.close(fd)
    with open("/proc/thread-self/net/dev") as table:
        lines = [_line(line) for line in table.readlines()[2:]]
    return [c for c in lines if c.name != "lo"]


def _line(line: str) -> Counters:
    """Parse a line of /proc/net/dev: eight receive columns, then eight transmit columns."""
    name, _, rest = line.partition(":")
    columns = [int(word) for word in rest.split()]
    return Counters(
        name=name.strip(),
        rx_bytes=columns[0],
        rx_packets=columns[1],
        rx_errors=columns[2],
        rx_dropped=columns[3],
        tx_bytes=columns[8],
        tx_packets=columns[9],
        tx_errors=columns[10],
        tx_dropped=columns[11],
    )
