# SPDX-License-Identifier: Apache-2.0
"""Watches a folder of small files: when something in it has changed, and what is half written.

    open for writing ─► IN_MODIFY ─► busy ─► IN_CLOSE_WRITE ─► changed, quiet for a moment ─► wait()
    rename, removal, link ──────────────────────────────────┘

inotify(7) of the folder alone, so a file that is renamed into it counts at once and one that is
written in place when its writer closes it. Where there is no inotify (128 instances a user, and
others use them too) or no folder yet, `works` is False and `wait` ends with its time: its
caller has to look by itself. Nothing outlives the process.
"""

import asyncio
import contextlib
import os
import struct
from collections.abc import Callable
from pathlib import Path

import structlog

from shim import linux

log = structlog.get_logger()
QUIET = 0.1  # seconds without an event: an editor makes several
PATIENCE = 10  # times that long at most
_HEAD = struct.Struct("iIII")
_APPEARED = linux.IN_CREATE | linux.IN_MOVED_TO | linux.IN_CLOSE_WRITE
_GONE = linux.IN_MOVED_FROM | linux.IN_DELETE
_MASK = _APPEARED | _GONE | linux.IN_MODIFY | linux.IN_ONLYDIR


class Watch:
    """A watched folder. `busy` are the names of files that somebody is writing; `writes` counts
    what was seen of that.
    """

    def __init__(self, folder: Path, counts: Callable[[str], bool]) -> None:
        """`counts` says of which file names changes are told."""
        self.busy: set[str] = set()
        self.writes = 0
        self._folder, self._counts = folder, counts
        self._changed = asyncio.Event()
        self._fd, self.works = -1, False

    def open(self) -> None:
        """Begin to watch; without inotify that is logged once."""
        try:
            self._fd = linux.inotify_init()
        except OSError as e:
            log.warning("no inotify: looked at now and then", path=str(self._folder), error=str(e))
            return
        asyncio.get_running_loop().add_reader(self._fd, self.drain)
        self._begin()

    def _begin(self) -> None:
        with contextlib.suppress(OSError):  # there is no such folder yet
            linux.inotify_add_watch(self._fd, os.fspath(self._folder), _MASK)
            self.works = True

    async def wait(self, timeout: float) -> None:
        """Return when something has changed and all is quiet, or after `timeout` seconds."""
        if self._fd >= 0 and not self.works:
            self._begin()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._changed.wait()
        for _ in range(PATIENCE):
            if not self._changed.is_set():
                break
            self._changed.clear()
            await asyncio.sleep(QUIET)

    def drain(self) -> None:
        """Take in what has happened by now."""
        if self._fd < 0:
            return
        with contextlib.suppress(BlockingIOError):
            while events := os.read(self._fd, 1 << 16):
                self._take(events)

    def _take(self, events: bytes) -> None:
        place = 0
        while place < len(events):
            _, mask, _, size = _HEAD.unpack_from(events, place)
            place += _HEAD.size + size
            name = os.fsdecode(events[place - size : place].rstrip(b"\0"))
            self._note(mask, name)

    def _note(self, mask: int, name: str) -> None:
        if mask & linux.IN_Q_OVERFLOW:
            self.busy.clear()
        elif mask & linux.IN_IGNORED:  # the folder is gone
            self.busy.clear()
            self.works = False
        elif not self._counts(name):
            return
        elif mask & linux.IN_MODIFY:
            self.busy.add(name)
            self.writes += 1
            return
        elif not mask & linux.IN_CREATE:
            self.busy.discard(name)
        self._changed.set()

    def close(self) -> None:
        """Watch no more."""
        if self._fd >= 0:
            asyncio.get_running_loop().remove_reader(self._fd)
            os.close(self._fd)
        self._fd, self.works = -1, False
