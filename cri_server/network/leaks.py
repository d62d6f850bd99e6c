# SPDX-License-Identifier: Apache-2.0
"""Addresses that a crash leaked, given back by the plugins themselves (CNI's GC).

In the background: at start, or as soon as there is a network, and then daily (behaviour.md §6).
What fails is tried again the next day. Nothing is remembered over a restart.
"""

import time
from collections.abc import Callable, Iterable

import structlog

from cri_server import errors
from cri_server.network import cni, conf

log = structlog.get_logger()
DAY = 86_400.0


class Leaks:
    """Those of the networks of all places; `places` tells which there are now."""

    def __init__(
        self, network: cni.Network, places: Callable[[], Iterable[conf.Place | None]]
    ) -> None:
        self._network, self._places = network, places
        self._next: dict[conf.Place | None, float] = {}

    async def look(self) -> None:
        """Collect where it is time and there is a network. Waits for plugins; call it often."""
        for place in self._places():
            if time.monotonic() >= self._next.get(place, 0.0) and self._network.usable(place):
                await self._collect(place)
                self._next[place] = time.monotonic() + DAY

    async def _collect(self, place: conf.Place | None) -> None:
        try:
            await self._network.collect(place)
        except (errors.CriError, OSError) as e:
            log.info("no CNI garbage collection", reason=str(e))
