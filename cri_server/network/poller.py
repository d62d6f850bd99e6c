# SPDX-License-Identifier: Apache-2.0
"""Asks plugins for their STATUS in the background, so that nobody waits for one that hangs.

    verdict(chain) ─► starts or wakes the task, answers from memory
              └─ ask(chain) ─► remember ─► wait a while, or for another chain ─► again

While a new chain is asked for the first time the verdict on the old one stands. Nothing outlives
the process.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import structlog

from cri_server import errors
from cri_server.network import conf

log = structlog.get_logger()
WHEN_READY, WHEN_NOT = 10.0, 2.0  # seconds between two questions


class Poller:
    """The verdict of a chain's plugins on themselves."""

    def __init__(self, ask: Callable[[conf.Chain], Awaitable[None]]) -> None:
        """`ask` raises a CriError when the plugins say no; it has its own time limit."""
        self._ask = ask
        self._chain: conf.Chain | None = None
        self._verdict: str | None = None
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def verdict(self, chain: conf.Chain) -> str | None:
        """Return why the network is not ready: "" when it is, None when no answer is known yet.

        A chain that knows no STATUS (CNI before 1.1.0) is ready, and the task ends. Call it in the
        event loop.
        """
        wanted = chain if chain.speaks("1.1.0") else None
        if wanted is not self._chain:
            self._chain = wanted
            self._changed.set()
        if wanted is None:
            return ""
        if self._task is None or self._task.done():
            self._verdict = None
            self._task = asyncio.create_task(self._run(), name="cni status")
        return self._verdict

    async def _run(self) -> None:
        while (chain := self._chain) is not None:
            self._changed.clear()
            verdict = await self._answer(chain)
            if verdict != self._verdict:
                log.info("cni status", network=chain.name, verdict=verdict or "ready")
            self._verdict = verdict
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(WHEN_NOT if verdict else WHEN_READY):
                    await self._changed.wait()

    async def _answer(self, chain: conf.Chain) -> str:
        try:
            await self._ask(chain)
        except errors.CriError as e:
            return e.message
        except Exception as e:
            log.exception("cni status", network=chain.name)
            return f"{type(e).__name__}: {e}"
        return ""

    async def close(self) -> None:
        """End the task, and the plugin that it waits for."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
