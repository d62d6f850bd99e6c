# SPDX-License-Identifier: Apache-2.0
"""The processes of a cgroup as /proc shows them: how many, what they have open, what they may open.

All functions block; the walk over descriptors is bounded, and gives nothing rather than half of it.
Processes end while they are looked at: one that is gone counts as nothing.
"""

import os
import resource
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from shim import cgroup

MOST_LOOKED_AT = 50_000  # descriptors of one container


@dataclass(frozen=True, kw_only=True, slots=True)
class Processes:
    """Counts; None where there is too much to count."""

    number: int
    descriptors: int | None
    sockets: int | None
    open_files_limit: int | None  # RLIMIT_NOFILE (soft) of the init; None also for no limit


def read(directories: Mapping[str, str], init: int) -> Processes:
    """Look at the processes in a cgroup and below, and at its first process."""
    pids = cgroup.Cgroup(directories).processes()
    descriptors, sockets = _descriptors(pids)
    return Processes(
        number=len(pids),
        descriptors=descriptors,
        sockets=sockets,
        open_files_limit=_open_files_limit(init),
    )


def _descriptors(pids: Iterable[int]) -> tuple[int | None, int | None]:
    descriptors = sockets = 0
    for pid in pids:
        links = _links(f"/proc/{pid}/fd", MOST_LOOKED_AT - descriptors)
        if links is None:
            return None, None
        descriptors += len(links)
        sockets += sum(link.startswith("socket:") for link in links)
    return descriptors, sockets


def _links(directory: str, most: int) -> list[str] | None:
    try:
        numbers = os.listdir(directory)
    except OSError:
        return []
    if len(numbers) > most:
        return None
    return [link for n in numbers if (link := _readlink(f"{directory}/{n}"))]


def _readlink(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _open_files_limit(pid: int) -> int | None:
    try:
        soft, _ = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    except OSError:
        return None
    return None if soft == resource.RLIM_INFINITY else soft
