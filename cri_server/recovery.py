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
Afterwards what is on no record, or on one that cannot be read, is ended and swept away: the kubelet
cannot see it, so it will make another. One pod that cannot be recovered does not stop another: it
stays listed NOTREADY. The server answers UNAVAILABLE until `run` is done.

A shim that does not answer within 5 s is not dead: its pod stays listed as it was, who wants its
containers waits, and the above is done when the shim speaks, or was mute for `shims.MUTE` seconds
and was killed.
"""

import asyncio
import contextlib
import time
from collections.abc import Iterable
from pathlib import Path

import structlog

from cri_server import (
    bundles,
    containers,
    errors,
    names,
    podfiles,
    pods,
    remains,
    shims,
    snapshots,
    state,
)
from shim import process
from shim.pb import shim_pb2

log = structlog.get_logger()
AT_ONCE = 16
POD_TIMEOUT = 60.0


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
        remains_host: remains.Remains,
        files: podfiles.PodFiles,
        layers: snapshots.Snapshots,
    ) -> None:
        self._store, self._pods, self._containers, self._shims = (
            store,
            pod_host,
            container_host,
            shim_host,
        )
        self._bundles, self._remains = bundle_host, remains_host
        self._files, self._snapshots = files, layers
        self._late: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Bring memory, disk and processes to one state."""
        began = time.perf_counter()
        limit = asyncio.Semaphore(AT_ONCE)
        every = self._store.pods()
        await asyncio.gather(*(self._one(pod, limit) for pod in every))
        await asyncio.gather(*(self._stray(pod_id, limit) for pod_id in self._unrecorded()))
        await self._sweep()
        log.info("recovered", pods=len(every), ms=round((time.perf_counter() - began) * 1000))

    async def _one(self, pod: state.Pod, limit: asyncio.Semaphore) -> None:
        async with limit:
            try:
                async with asyncio.timeout(POD_TIMEOUT):
                    await self._recover(pod)
            except Exception as e:
                await self._not_recovered(pod, e)

    async def _not_recovered(self, pod: state.Pod, error: Exception) -> None:
        log.error("pod sandbox not recovered", pod=pod.id, error=repr(error))
        await self._pods.give_up(pod.id)

    async def _recover(self, pod: state.Pod) -> None:
        if pod.state is not state.PodState.READY:  # a plugin may be at work, and outlive its DEL
            await asyncio.to_thread(process.kill_orphans, f"CNI_CONTAINERID={pod.id}")
        if pod.state in (state.PodState.CREATING, state.PodState.FAILED):
            log.info("pod sandbox was half made: released", pod=pod.id)
            await self._adopt(pod, shims.CONNECT_TIMEOUT)
            await self._pods.release(pod)
            return
        finding = asyncio.create_task(self._adopt(pod, shims.MUTE))
        settling = asyncio.create_task(self._settle(pod.id, finding))
        await asyncio.wait([finding], timeout=shims.CONNECT_TIMEOUT)
        if finding.done():
            await settling
        else:
            log.warning("shim does not answer: its pod is recovered when it does", pod=pod.id)
            late = asyncio.create_task(self._later(pod, settling), name=f"recover {pod.id[:13]}")
            self._late.add(late)
            late.add_done_callback(self._late.discard)

    async def _later(self, pod: state.Pod, settling: "asyncio.Task[None]") -> None:
        try:
            await settling
            log.info("pod sandbox recovered late", pod=pod.id)
        except Exception as e:
            await self._not_recovered(pod, e)

    async def _settle(self, pod_id: str, finding: "asyncio.Task[containers.Seen]") -> None:
        """Bring a pod and its containers to what the shim says, as soon as it says it."""
        known = self._store.containers(pod_id)
        await asyncio.gather(*(self._container(c, finding) for c in known))
        with contextlib.suppress(errors.NotFound):  # it was removed meanwhile
            await self._take_up(self._store.pod(pod_id), await finding)

    async def _take_up(self, pod: state.Pod, seen: containers.Seen) -> None:
        if seen is not None:
            known = {c.id for c in self._store.containers(pod.id)}
            await self._forget_strays(pod, seen.keys() - known - {pod.id})
        if pod.state is state.PodState.READY and seen is None:
            log.warning("pod sandbox did not survive", pod=pod.id)
            await self._pods.give_up(pod.id)
        elif pod.state is state.PodState.READY:
            self._pods.watch(pod)

    async def _container(
        self, container: state.Container, finding: "asyncio.Task[containers.Seen]"
    ) -> None:
        try:
            await self._containers.recover(container, asyncio.shield(finding))
        except Exception as e:
            log.error("container not recovered", container=container.id, error=repr(e))

    async def _forget_strays(self, pod: state.Pod, strays: Iterable[str]) -> None:
        """End the containers of a pod whose records cannot be read."""
        for container_id in strays:
            log.warning("container without a record: ended", pod=pod.id, container=container_id)
            async with self._shims.asked(pod.id) as shim:
                await shim.delete(shim_pb2.DeleteRequest(id=container_id))

    async def _adopt(self, pod: state.Pod, mute: float) -> containers.Seen:
        """Return what the pod's shim knows of its containers, None when there is no shim or it has
        said nothing for `mute` seconds.
        """
        self._shims.remember(pod)
        if pod.boot_id != state.boot_id() or not self._files.socket(pod.id).exists():
            return None
        try:
            await self._shims.adopt(pod.id, mute=mute)
            async with self._shims.asked(pod.id, mute=mute) as shim:
                answer = await shim.state(shim_pb2.StateRequest())
        except errors.CriError as e:
            log.warning("shim not adopted", pod=pod.id, error=e.message)
            self._shims.kill(pod.id)  # what it holds is lost already, and it may wake up
            return None
        return {c.id: c for c in answer.containers}

    # -- what is on no record ---------------------------------------------------------------------

    def _unrecorded(self) -> set[str]:
        """Return the ids of pods that left something but no record which can be read."""
        of_containers = {c.pod_id for c in self._store.containers()}
        left = _names(self._files.root) | of_containers | self._store.unreadable
        return {i for i in left if names.is_id(i)} - {p.id for p in self._store.pods()}

    async def _stray(self, pod_id: str, limit: asyncio.Semaphore) -> None:
        """Release such a pod, as if all that a record may tell were in it."""
        async with limit:
            log.warning("pod sandbox without a record: released", pod=pod_id)
            pod = self._pods.unrecorded(pod_id)
            try:
                async with asyncio.timeout(POD_TIMEOUT):
                    await self._adopt(pod, shims.CONNECT_TIMEOUT)
                    await self._pods.release(pod)
            except Exception as e:
                log.error("pod sandbox not released", pod=pod_id, error=repr(e))

    async def _sweep(self) -> None:
        """Remove what a killed server left of containers and no record names."""
        pod_ids = {p.id for p in self._store.pods()}
        container_ids = {c.id for c in self._store.containers()}
        for handler, container_id in self._remains.in_runtimes():
            if container_id not in pod_ids | container_ids:
                log.warning("swept from runtime", handler=handler, container=container_id)
                await self._end(handler, container_id)
        for name in _names(self._files.root) - pod_ids:
            log.info("swept pod directory", pod=name)
            await asyncio.to_thread(self._files.remove, name)
        for name in _names(self._bundles.root) - container_ids:
            log.info("swept bundle", container=name)
            await asyncio.to_thread(self._bundles.sweep, name)
        await asyncio.to_thread(self._snapshots.sweep, container_ids)

    async def _end(self, handler: str, container_id: str) -> None:
        try:
            bundle = self._bundles.directory(container_id)
            await self._remains.destroy_unrecorded(handler, container_id, bundle)
        except errors.CriError as e:
            log.error("container not ended", container=container_id, error=e.message)


def _names(directory: Path) -> set[str]:
    return {p.name for p in directory.iterdir()} if directory.exists() else set()
