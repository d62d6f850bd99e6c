# SPDX-License-Identifier: Apache-2.0
"""At start: what is on record meets what is alive.

    pod record    its shim answers                      its shim is gone (killed, or rebooted)
    creating      released                              released
    failed        released                              released
    ready         adopted; its containers as below      stopped, its containers dead
    stopped       adopted, for a later removal          its containers dead

    container     the shim says
    created       created: started anew; running, stopped: the start is finished
    running       running: followed; stopped: its exit record; unknown: dead

A dead container has the exit record that its shim left on disk, else 255 with reason Unknown.
Afterwards what is on no record is swept away. One pod that cannot be recovered does not stop
another: it stays listed NOTREADY. The server answers UNAVAILABLE until `run` is done.
"""

import asyncio
import time
from pathlib import Path

import structlog

from cri_server import bundles, containers, errors, podfiles, pods, shims, snapshots, state
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
        files: podfiles.PodFiles,
        layers: snapshots.Snapshots,
    ) -> None:
        self._store, self._pods, self._containers, self._shims = (
            store,
            pod_host,
            container_host,
            shim_host,
        )
        self._bundles, self._files, self._snapshots = bundle_host, files, layers

    async def run(self) -> None:
        """Bring memory, disk and processes to one state."""
        began = time.perf_counter()
        limit = asyncio.Semaphore(AT_ONCE)
        every = self._store.pods()
        await asyncio.gather(*(self._one(pod, limit) for pod in every))
        for container in self._store.containers():
            if container.pod_id not in {p.id for p in every}:
                await self._containers.remove(container.id)
        await asyncio.to_thread(self._sweep)
        log.info("recovered", pods=len(every), ms=round((time.perf_counter() - began) * 1000))

    async def _one(self, pod: state.Pod, limit: asyncio.Semaphore) -> None:
        async with limit:
            try:
                async with asyncio.timeout(POD_TIMEOUT):
                    await self._recover(pod)
            except Exception as e:
                log.error("pod sandbox not recovered", pod=pod.id, error=repr(e))
                await self._pods.give_up(pod.id)

    async def _recover(self, pod: state.Pod) -> None:
        if pod.state in (state.PodState.CREATING, state.PodState.FAILED):
            log.info("pod sandbox was half made: released", pod=pod.id)
            await self._adopt(pod)
            await self._pods.release(pod)
            return
        seen = await self._adopt(pod)
        for container in self._store.containers(pod.id):
            await self._containers.recover(container, (seen or {}).get(container.id))
        if pod.state is state.PodState.READY and seen is None:
            log.warning("pod sandbox did not survive", pod=pod.id)
            await self._pods.give_up(pod.id)
        elif pod.state is state.PodState.READY:
            self._pods.watch(pod)

    async def _adopt(self, pod: state.Pod) -> dict[str, shim_pb2.Container] | None:
        """Return what the pod's shim knows of its containers, None when there is no shim."""
        if pod.boot_id != state.boot_id() or not self._files.socket(pod.id).exists():
            return None
        try:
            shim = await self._shims.adopt(pod.id)
            with shims.translated():
                answer = await shim.state(shim_pb2.StateRequest())
        except errors.CriError as e:
            log.warning("shim not adopted", pod=pod.id, error=e.message)
            return None
        return {c.id: c for c in answer.containers}

    def _sweep(self) -> None:
        """Remove what a killed server left and no record names."""
        pod_ids = {p.id for p in self._store.pods()}
        container_ids = {c.id for c in self._store.containers()}
        for name in _names(self._files.root) - pod_ids:
            log.info("swept pod directory", pod=name)
            self._files.remove(name)
        for name in _names(self._bundles.root) - container_ids:
            log.info("swept bundle", container=name)
            self._bundles.sweep(name)
        self._snapshots.sweep(container_ids)


def _names(directory: Path) -> set[str]:
    return {p.name for p in directory.iterdir()} if directory.exists() else set()
