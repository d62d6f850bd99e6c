# SPDX-License-Identifier: Apache-2.0
"""The way to the end of a container: its stop signal, a grace period, SIGKILL until it is dead.

It goes on when its callers go away, and ends with the container; asked again it can only
become shorter. With the server it ends: the kubelet asks again. That the container has ended is
told by `Containers.follow`.

A signal goes through the shim. One that is slow, as its log's disk may be, costs nobody's life: the
grace period goes on, and after it this one container is killed without it.
"""

import asyncio
import contextlib
import signal
import time

import structlog

from cri_server import errors, leftovers, shims, state
from shim.pb import shim_pb2

log = structlog.get_logger()
KILL_TIMEOUT = 10.0  # seconds: a shim never waits to deliver a signal, but its disk may stall
KILL_AGAIN = 1.0  # seconds until the first repeated SIGKILL; doubled up to the other
KILL_AGAIN_MOST = 60.0


class Escalation:
    """One way to the end of a container: signal, grace, SIGKILL until it is dead."""

    def __init__(
        self,
        shim_host: shims.Shims,
        leftover_host: leftovers.Leftovers,
        container: state.Container,
        ended: asyncio.Event,
    ) -> None:
        self._shims, self._leftovers = shim_host, leftover_host
        self._container, self._ended = container, ended
        self._deadline = float("inf")
        self._shortened = asyncio.Event()
        self.task = asyncio.create_task(self._run(), name=f"stop {container.id[:13]}")

    async def shorten(self, timeout: float) -> None:
        """End the grace period in `timeout` seconds if that is sooner; wait for the end."""
        self._deadline = min(self._deadline, time.monotonic() + timeout)
        self._shortened.set()
        await asyncio.shield(self.task)

    async def _run(self) -> None:
        await self._shortened.wait()
        if (left := self._deadline - time.monotonic()) > 0:
            await self._signal(self._container.stop_signal, timeout=min(left, KILL_TIMEOUT))
            await self._grace()
        pause = KILL_AGAIN
        while not self._ended.is_set():
            await self._kill()
            await self._wait(pause)
            pause = min(pause * 2, KILL_AGAIN_MOST)

    async def _grace(self) -> None:
        while not self._ended.is_set() and (left := self._deadline - time.monotonic()) > 0:
            self._shortened.clear()
            either = [
                asyncio.create_task(self._ended.wait()),
                asyncio.create_task(self._shortened.wait()),
            ]
            await asyncio.wait(either, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            for task in either:
                task.cancel()

    async def _wait(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ended.wait(), seconds)

    async def _kill(self) -> None:
        """Kill all of the container; from here if the shim cannot be told."""
        if await self._signal(signal.SIGKILL, everything=True):
            return
        try:
            if await self._leftovers.kill(self._container):
                log.warning("killed without its shim", container=self._container.id)
        except OSError as e:
            log.error("container not killed", container=self._container.id, error=str(e))

    async def _signal(
        self, number: int, *, everything: bool = False, timeout: float = KILL_TIMEOUT
    ) -> bool:
        """Have the shim send a signal; return whether it did. One that goes on saying nothing is
        killed.
        """
        request = shim_pb2.KillRequest(id=self._container.id, signal=number, all=everything)
        pod_id = self._container.pod_id
        try:
            with shims.translate_errors():
                await self._shims.of(pod_id).kill(request, timeout=timeout)
        except errors.CriError as e:  # a lost shim ends the container through `_follow`
            log.warning("signal not delivered", container=self._container.id, error=e.message)
            if isinstance(e, errors.DeadlineExceeded):
                self._shims.kill_if_unresponsive(pod_id)
            return False
        return True
