# SPDX-License-Identifier: Apache-2.0
"""At start: what is on record meets what is alive.

    pod record    its shim answers                      its shim is gone (killed, or rebooted)
    creating      released                              released
    failed        released                              released
    ready         adopted; its containers as below      stopped, its containers dead
    stopped       adopted, for a later removal          its containers dead

    container     the shim says
    created       created: to be started anew; running, stopped: the start is finished
    running       running: followed; stopped: its exit record; unknown: dead
    none          ended and forgotten

A dead container has the exit record that its shim left on disk, else 255 with reason Unknown.
What is on no record, or on one that cannot be read, is ended and swept away: the kubelet cannot see
it, so it will make another. One pod that cannot be recovered does not stop another: it stays listed
NOTREADY. The server answers UNAVAILABLE until `run` is done. That waits for nothing but our own
shims: a hung runtime or plugin is left to tasks behind it (`close` ends them). Until those are
through, calls for the same pod or container wait for them, by its lock.

A shim that does not answer within 5 s is not dead: its pod stays listed as it was, calls for its
containers wait, and the above is done when the shim speaks, or said nothing for
`shims.UNRESPONSIVE_TIMEOUT` seconds and was killed.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path
from typing import NamedTuple

import structlog

from cri_server import (
    bundles,
    containers,
    errors,
    leftovers,
    names,
    orphans,
    podfiles,
    pods,
    shims,
    snapshots,
    state,
)
from shim.pb import shim_pb2

log = structlog.get_logger()
AT_ONCE = 16
POD_TIMEOUT = 60.0
PATIENCE = 5.0  # seconds that runtimes and plugins have before the server serves without them
KILL_PAUSE = 0.02
Finding = asyncio.Task[containers.Seen]  # of what a pod's shim knows


class Recovery:
    """Runs once, before the first RPC is answered."""

    def __init__(
        self,
        *,
        store: state.Store,
        pod_host: pods.Pods,
        container_host: containers.Containers,
        shim_host: shims.Shims,
        bundle_host: bundles.Bundles,
        leftover_host: leftovers.Leftovers,
        orphan_host: orphans.Orphans,
        files: podfiles.PodFiles,
        layers: snapshots.Snapshots,
    ) -> None:
        self._store, self._pods, self._containers, self._shims = (
            store,
            pod_host,
            container_host,
            shim_host,
        )
        self._bundles, self._leftovers = bundle_host, leftover_host
        self._files, self._snapshots, self._orphans = files, layers, orphan_host
        self._tasks: set[asyncio.Task[None]] = set()
        self._findings: list[Finding] = []

    async def run(self) -> None:
        """Bring memory, disk and processes to one state.

        Returns when every record is true whose shim answers, and what runs is followed. The rest
        needs runtimes, plugins or shims, which may hang: they have PATIENCE altogether, then it
        goes on behind the server's first calls.
        """
        began = time.perf_counter()
        every, rubbish = self._store.pods(), self._rubbish()
        limit = asyncio.Semaphore(AT_ONCE)
        self._findings = [asyncio.create_task(self._find(pod)) for pod in every]
        await asyncio.gather(*map(self._settle, every, self._findings))
        await self._end_plugins(every)
        for pod, finding in zip(every, self._findings, strict=True):
            self._restore(pod, finding, limit)
        self._begin(self._clean(rubbish, limit))
        late = set(self._tasks)
        if late:
            left = began + PATIENCE - time.perf_counter()
            _, late = await asyncio.wait(late, timeout=max(left, 0.0))
        ms = round((time.perf_counter() - began) * 1000)
        log.info("recovered", pods=len(every), still_cleaning=len(late), ms=ms)

    async def close(self) -> None:
        """Leave what is not cleaned up yet to the next start."""
        unfinished = [*self._tasks, *self._findings]
        for task in unfinished:
            task.cancel()
        await asyncio.gather(*unfinished, return_exceptions=True)

    def _begin(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work, name="recovery")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- pods on record ---------------------------------------------------------------------------

    async def _find(self, pod: state.Pod) -> containers.Seen:
        """Return what the pod's shim knows, None without one. Nobody waits long for what is not
        wanted any more.
        """
        wanted = pod.state in (state.PodState.READY, state.PodState.STOPPED)
        try:
            return await self._adopt(
                pod, shims.UNRESPONSIVE_TIMEOUT if wanted else shims.CONNECT_TIMEOUT
            )
        except Exception as e:
            log.error("pod sandbox not recovered", pod=pod.id, error=repr(e))
            return None

    async def _settle(self, pod: state.Pod, finding: Finding) -> None:
        """Have the record say how it is with a pod, at once if its shim answers soon."""
        await asyncio.wait([finding], timeout=shims.CONNECT_TIMEOUT)
        if finding.done():
            await self._take_up(pod, finding.result())
        else:
            log.warning("shim does not answer: its pod is recovered when it does", pod=pod.id)
            self._begin(self._settle_late(pod.id, finding))

    async def _settle_late(self, pod_id: str, finding: Finding) -> None:
        seen = await asyncio.shield(finding)
        with contextlib.suppress(errors.NotFound):  # it was removed meanwhile
            async with self._pods.held(pod_id):
                await self._take_up(self._store.pod(pod_id), seen)
            log.info("pod sandbox recovered late", pod=pod_id)

    async def _take_up(self, pod: state.Pod, seen: containers.Seen) -> None:
        """Watch a pod that lives. What was half made is listed NOTREADY from now on: nobody may
        take it for the whole.
        """
        if pod.state is state.PodState.READY and seen is not None:
            self._pods.watch(pod)
        elif pod.state in (state.PodState.READY, state.PodState.CREATING):
            log.warning("pod sandbox did not survive", pod=pod.id, was=pod.state)
            await self._pods.give_up(pod.id)

    async def _end_plugins(self, every: Iterable[state.Pod]) -> None:
        """Kill the plugins of an earlier server that are at work for a pod: they would outlive the
        DEL that comes next.
        """
        boot = state.boot_id()
        found = [p for p in every if p.state is not state.PodState.READY and p.boot_id == boot]
        try:
            async with asyncio.timeout(PATIENCE):
                await asyncio.gather(*(self._end_plugin(pod.id) for pod in found))
        except TimeoutError:
            log.error("plugins of an earlier server not ended")

    async def _end_plugin(self, pod_id: str) -> None:
        while True:
            if not await self._orphans.kill(f"CNI_CONTAINERID={pod_id}"):
                return
            await asyncio.sleep(KILL_PAUSE)

    def _restore(self, pod: state.Pod, finding: Finding, limit: asyncio.Semaphore) -> None:
        """Begin to bring all that is in a pod to what its record says."""
        if pod.state in (state.PodState.CREATING, state.PodState.FAILED):
            self._begin(self._release(pod.id, limit))
            return
        known = self._store.containers(pod.id)
        for container in known:
            self._begin(self._container(container, finding))
        self._begin(self._forget_strays(pod, {pod.id, *(c.id for c in known)}, finding))

    async def _release(self, pod_id: str, limit: asyncio.Semaphore) -> None:
        """Take back what was half made; a call that removes it too waits."""
        try:
            async with limit, asyncio.timeout(POD_TIMEOUT), self._pods.held(pod_id):
                pod = self._store.pod(pod_id)
                log.info("pod sandbox was half made: released", pod=pod_id)
                await self._pods.release(pod)
        except errors.NotFound:  # somebody was quicker
            return
        except Exception as e:
            log.error("pod sandbox not released", pod=pod_id, error=repr(e))

    async def _container(self, container: state.Container, finding: Finding) -> None:
        try:
            await self._containers.recover(container, asyncio.shield(finding))
        except Exception as e:
            log.error("container not recovered", container=container.id, error=repr(e))

    async def _forget_strays(self, pod: state.Pod, known: set[str], finding: Finding) -> None:
        """End the containers of a pod whose records cannot be read."""
        for stray in (await asyncio.shield(finding) or {}).keys() - known:
            await self._forget_stray(pod, stray)

    async def _forget_stray(self, pod: state.Pod, container_id: str) -> None:
        log.warning("container without a record: ended", pod=pod.id, container=container_id)
        try:
            async with asyncio.timeout(POD_TIMEOUT), self._shims.calling(pod.id) as shim:
                await shim.delete(shim_pb2.DeleteRequest(id=container_id))
        except Exception as e:
            log.error("container not ended", container=container_id, error=repr(e))

    async def _adopt(self, pod: state.Pod, unresponsive_after: float) -> containers.Seen:
        """Return what the pod's shim knows of its containers, None when there is no shim or it has
        said nothing for `unresponsive_after` seconds.
        """
        self._shims.remember(pod)
        if pod.boot_id != state.boot_id() or not self._files.socket(pod.id).exists():
            return None
        try:
            await self._shims.adopt(pod.id, unresponsive_after=unresponsive_after)
            async with self._shims.calling(pod.id, unresponsive_after=unresponsive_after) as shim:
                answer = await shim.state(shim_pb2.StateRequest())
        except errors.CriError as e:
            log.warning("shim not adopted", pod=pod.id, error=e.message)
            self._shims.kill(pod.id)  # what it holds is lost already, and it may wake up
            return None
        return {c.id: c for c in answer.containers}

    # -- what is on no record ---------------------------------------------------------------------

    def _rubbish(self) -> "_Rubbish":
        """Return what no record names. Found before anything is served, so nothing of it is new."""
        pod_ids = {p.id for p in self._store.pods()}
        container_ids = {c.id for c in self._store.containers()}
        known = pod_ids | container_ids
        of_containers = {c.pod_id for c in self._store.containers()}
        left = _names(self._files.root) | of_containers | self._store.unreadable
        return _Rubbish(
            pods=tuple({i for i in left if names.is_id(i)} - pod_ids),
            in_runtimes=tuple(x for x in self._leftovers.in_runtimes() if x[1] not in known),
            folders=tuple(_names(self._files.root) - pod_ids),
            bundles=tuple(
                (_names(self._bundles.root) | self._snapshots.writables()) - container_ids
            ),
        )

    async def _clean(self, found: "_Rubbish", limit: asyncio.Semaphore) -> None:
        """Remove it; one thing that cannot be removed keeps no other."""
        await asyncio.gather(*(self._stray(pod_id, limit) for pod_id in found.pods))
        await asyncio.gather(*(self._end(*one, limit) for one in found.in_runtimes))
        for name in found.folders:
            await self._swept(self._files.remove, name)
        for name in found.bundles:
            await self._swept(self._bundles.sweep, name)

    async def _stray(self, pod_id: str, limit: asyncio.Semaphore) -> None:
        """Release a pod that left something but no record which can be read, as if all that a
        record may tell were in it.
        """
        async with limit:
            log.warning("pod sandbox without a record: released", pod=pod_id)
            pod = self._pods.unrecorded(pod_id)
            try:
                async with asyncio.timeout(POD_TIMEOUT):
                    await self._adopt(pod, shims.CONNECT_TIMEOUT)
                    await self._pods.release(pod)
            except Exception as e:
                log.error("pod sandbox not released", pod=pod_id, error=repr(e))

    async def _end(self, handler: str, container_id: str, limit: asyncio.Semaphore) -> None:
        async with limit:
            log.warning("swept from runtime", handler=handler, container=container_id)
            bundle = self._bundles.directory(container_id)
            try:
                await self._leftovers.kill_and_delete_unrecorded(handler, container_id, bundle)
            except Exception as e:
                log.error("container not ended", container=container_id, error=repr(e))

    async def _swept(self, remove: Callable[[str], None], name: str) -> None:
        log.info("swept", name=name)
        try:
            await asyncio.to_thread(remove, name)
        except Exception as e:
            log.error("not swept", name=name, error=repr(e))


class _Rubbish(NamedTuple):
    """What a killed server has left: ids of pods and containers, names of folders."""

    pods: tuple[str, ...]
    in_runtimes: tuple[tuple[str, str], ...]  # handler and id
    folders: tuple[str, ...]
    bundles: tuple[str, ...]


def _names(directory: Path) -> set[str]:
    return {p.name for p in directory.iterdir()} if directory.exists() else set()
