# SPDX-License-Identifier: Apache-2.0
"""Keeps the handlers as the drop-ins say, while the server runs.

    conf.d changes ─► quiet, nothing half written ─► handler_set.load ─► handlers.apply

The folder is watched; what cannot be (a profile, a program that is installed later, a folder that
is not there yet) is looked at every few seconds, by names, times and sizes. A look during which
somebody began to write is thrown away. Nothing is written here, and nobody waits for it: pods are
made with the handlers of the last look.
"""

import asyncio

import structlog

from cri_server import config, dropins, handler_set, handlers, watch

log = structlog.get_logger()
EVERY = 2.0  # seconds between looks at what is not watched


class Reloader:
    """The task that follows a folder of drop-ins; without a folder it does nothing."""

    def __init__(self, settings: config.Config, live: handlers.Handlers) -> None:
        self._settings, self._live = settings, live
        self._folder = settings.drop_ins
        self._seen: tuple[object, ...] = ()
        self._pending: tuple[object, ...] = ()
        self._busy: frozenset[str] = frozenset()
        self._told: set[str] = set()

    async def run(self) -> None:
        """Follow the folder for ever. The root of a task of its own."""
        self._tell()
        if self._folder is None:
            return
        watched = watch.Watch(self._folder, dropins.is_one)
        watched.open()
        try:
            while True:
                try:
                    await self._look(watched)
                except Exception as e:
                    log.error("drop-ins not looked at", path=str(self._folder), error=repr(e))
                await watched.wait(EVERY)
        finally:
            watched.close()

    async def _look(self, watched: watch.Watch) -> None:
        watched.drain()
        stamps = await asyncio.to_thread(self._stamps)
        busy, writes = frozenset(watched.busy), watched.writes
        if (stamps, busy) == (self._seen, self._busy):
            return
        if not watched.works and stamps != self._pending:  # it may be half written: once more
            self._pending = stamps
            return
        found = await handler_set.load(self._settings, self._live.now, busy=busy)
        watched.drain()
        if writes != watched.writes:
            return
        self._seen, self._busy = stamps, busy
        self._apply(found)

    def _stamps(self) -> tuple[object, ...]:
        return dropins.stamps(self._folder, self._live.now.paths) if self._folder else ()

    def _apply(self, found: handler_set.HandlerSet) -> None:
        for what, name in handler_set.differences(self._live.now, found):
            after = found.current.get(name)
            log.info(what, handler=name, file=after.source if after else "")
        self._live.apply(found)
        self._tell()

    def _tell(self) -> None:
        """Log each problem once, and that there are none any more."""
        messages = {p.message: p for p in self._live.problems}
        for message in messages.keys() - self._told:
            effect = self._effect(messages[message])
            log.error("drop-in cannot be used", error=message, effect=effect)
        if self._told and not messages:
            log.info("drop-ins are in order")
        self._told = set(messages)

    def _effect(self, problem: dropins.Problem) -> str:
        if not problem.holds:
            return "the rest of it is in force"
        return "refused" if problem.handler in self._live.now.refused else "as before"
