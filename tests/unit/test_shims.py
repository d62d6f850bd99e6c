# SPDX-License-Identifier: Apache-2.0
"""Which shim counts as dead: real ones that are slow, mute or gone, and a want of descriptors."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cri_server import (
    cgroups,
    config,
    errors,
    handler_set,
    handlers,
    host,
    podfiles,
    revisions,
    shims,
)
from cri_server import state as records
from cri_server.pb import api_pb2 as api
from shim import client, process
from tests.lab import scarcity, waiting

pytestmark = pytest.mark.needs("root")
HANDLER = config.Handler(path="/bin/false", dialect="runc")
SLOW, MUTE = 30.0, 0.3


class Server:
    """The shims of one life of a server, and of the lives before it."""

    def __init__(self, folder: Path, zygotes: client.Zygotes) -> None:
        self._folder, self._zygotes = folder, zygotes
        self.shims = self.restarted()

    def restarted(self) -> shims.Shims:
        settings = config.Config(runtime=config.Runtime(default="runc"))
        revision = revisions.make("runc", HANDLER)
        facts = {revision.key: host.RuntimeFacts(path=HANDLER.path)}
        live = handlers.Handlers(
            settings,
            facts=host.probe(cgroups.detect(), {}),
            now=handler_set.HandlerSet(current={"runc": revision}, facts=facts),
            store=revisions.Store(self._folder),
        )
        self.key = revision.key
        self.shims = shims.Shims(
            settings,
            live=live,
            zygotes=self._zygotes,
            files=podfiles.PodFiles(self._folder),
            driver="cgroupfs",
        )
        return self.shims

    def pod(self) -> records.Pod:
        wanted = api.PodSandboxConfig()
        return records.new_pod(wanted, runtime_handler="", handler=self.key, now=1)


@pytest.fixture
async def zygotes() -> AsyncIterator[client.Zygotes]:
    made = client.Zygotes()
    yield made
    await made.close()


@pytest.fixture
def server(tmp_path: Path, zygotes: client.Zygotes) -> Server:
    return Server(tmp_path, zygotes)


@contextlib.asynccontextmanager
async def forked(server: Server) -> AsyncIterator[tuple[str, int]]:
    """Give the id of a pod that an earlier server forked a shim for, and the pid of that."""
    pod = server.pod()
    pid, started = await server.shims.fork(pod)
    await server.shims.close()
    server.restarted()
    yield pod.id, pid
    server.shims.kill(pod.id)
    await server.shims.close()
    waiting.until(lambda: not process.alive(pid, started), "the shim has ended")


async def test_a_slow_shim_is_waited_for(server: Server) -> None:
    async with forked(server) as (pod_id, pid):
        os.kill(pid, signal.SIGSTOP)
        adopting = asyncio.create_task(server.shims.adopt(pod_id, unresponsive_after=SLOW))
        also = asyncio.create_task(server.shims.reconnect(pod_id, unresponsive_after=SLOW))
        await asyncio.wait([adopting, also], timeout=MUTE)
        assert not adopting.done()
        os.kill(pid, signal.SIGCONT)
        shim = await adopting
        assert (await shim.ping(timeout=10)).pid == pid
        assert await also
        assert server.shims.of(pod_id) is shim


async def test_a_mute_shim_is_given_up(server: Server) -> None:
    async with forked(server) as (pod_id, pid):
        started = process.start_time(pid)
        shim = await server.shims.adopt(pod_id)
        os.kill(pid, signal.SIGSTOP)
        server.shims.kill_if_unresponsive(pod_id, unresponsive_after=MUTE)
        server.shims.kill_if_unresponsive(pod_id, unresponsive_after=MUTE)
        await asyncio.wait_for(shim.closed, 10)
        assert not await server.shims.reconnect(pod_id)
        await asyncio.to_thread(
            waiting.until, lambda: not process.alive(pid, started), "the shim has ended"
        )


async def test_a_suspect_that_answers_goes_free(server: Server) -> None:
    async with forked(server) as (pod_id, pid):
        shim = await server.shims.adopt(pod_id)
        os.kill(pid, signal.SIGSTOP)
        server.shims.kill_if_unresponsive(pod_id, unresponsive_after=SLOW)
        await asyncio.sleep(0)
        os.kill(pid, signal.SIGCONT)
        assert (await shim.ping(timeout=10)).pid == pid
        assert server.shims.of(pod_id) is shim


async def test_a_lack_of_descriptors_is_no_death_of_a_shim(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shims, "AGAIN", 0.05)
    async with forked(server) as (pod_id, pid):
        with scarcity.no_descriptors():
            adopting = asyncio.create_task(server.shims.adopt(pod_id, unresponsive_after=MUTE))
            await asyncio.wait([adopting], timeout=3 * MUTE)
            assert not adopting.done()
        assert (await (await adopting).ping(timeout=10)).pid == pid


async def test_a_shim_that_is_gone_is_not_waited_for(server: Server) -> None:
    async with forked(server) as (pod_id, pid):
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(errors.Unavailable):
            await asyncio.wait_for(server.shims.adopt(pod_id, unresponsive_after=SLOW), 10)
        assert not await server.shims.reconnect(pod_id)


class Unreachable(client.Zygotes):
    """Forks shims whose socket is gone at once."""

    pid = 0

    async def fork(
        self, pod_id: str, socket_path: str, *, handler: client.HandlerSpec, program: int = -1
    ) -> int:
        self.pid = await super().fork(pod_id, socket_path, handler=handler, program=program)
        os.unlink(socket_path)
        return self.pid


async def test_a_shim_that_was_never_reached_can_be_killed(tmp_path: Path) -> None:
    zygotes = Unreachable()
    server = Server(tmp_path, zygotes)
    pod = server.pod()
    with pytest.raises(errors.Unavailable):
        await server.shims.fork(pod)
    started = process.start_time(zygotes.pid)
    server.shims.kill(pod.id)
    await asyncio.to_thread(
        waiting.until, lambda: not process.alive(zygotes.pid, started), "the shim has ended"
    )
    await server.shims.close()
