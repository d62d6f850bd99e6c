# SPDX-License-Identifier: Apache-2.0
"""The shims of all pods: fork one, find it again after a restart, ask it, stop it, notice its
death.

A shim outlives the server. What ties them together is the socket in the pod's directory, and
nothing else: `adopt` connects to it and makes sure that the pod's own shim answers. A shim that
died leaves namespaces and processes behind, which the callers remove by themselves (`netns`,
`cgroups`, `bundles.bury`).
"""

import asyncio
import contextlib
import os
import signal
from collections.abc import Awaitable, Callable, Iterator

import structlog

from cri_server import config, errors, host, podfiles, state
from shim import client, mounts
from shim import errors as shim_errors
from shim.pb import shim_pb2

log = structlog.get_logger()
PROTOCOL_VERSION = 1
CONNECT_TIMEOUT = (
    5.0  # seconds: a stopped shim must not keep the server from starting (hazards R07)
)
STOP_TIMEOUT = 30.0

_CODES: dict[int, type[errors.CriError]] = {
    shim_errors.InvalidArgument.code: errors.InvalidArgument,
    shim_errors.DeadlineExceeded.code: errors.DeadlineExceeded,
    shim_errors.NotFound.code: errors.NotFound,
    shim_errors.FailedPrecondition.code: errors.FailedPrecondition,
    shim_errors.Unimplemented.code: errors.Unimplemented,
    shim_errors.Internal.code: errors.Internal,
    shim_errors.Unavailable.code: errors.Unavailable,
}


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Raise what a shim says as one of our errors: same code, same message."""
    try:
        yield
    except shim_errors.ShimError as e:
        raise _CODES.get(e.code, errors.Unknown)(e.message) from e


class Shims:
    """Connections to shims by pod id."""

    def __init__(
        self,
        settings: config.Config,
        *,
        zygote: client.Zygote,
        files: podfiles.PodFiles,
        facts: host.Host,
    ) -> None:
        self._settings, self._zygote = settings, zygote
        self._files, self._facts = files, facts
        self._clients: dict[str, client.ShimClient] = {}
        self._pids: dict[str, int] = {}
        self._watchers: dict[str, asyncio.Task[None]] = {}

    def of(self, pod_id: str) -> client.ShimClient:
        """Return the connection to a pod's shim. Raises Unavailable when it is gone."""
        found = self._clients.get(pod_id)
        if found is None:
            raise errors.Unavailable(f"the shim of pod sandbox {pod_id[:13]} is gone")
        return found

    async def fork(self, pod: state.Pod) -> int:
        """Start the pod's shim, connect to it and return its pid."""
        path = str(self._files.socket(pod.id))
        handler = self.handler(pod.handler)
        features = self._facts.runtimes[pod.handler].features
        with translated():
            pid = await self._zygote.fork(pod.id, path, handler=handler, features=features)
            await self._connect(pod.id)
        return pid

    async def adopt(self, pod_id: str) -> client.ShimClient:
        """Connect to the shim of a pod that an earlier server started. Raises Unavailable when it
        is not there.
        """
        with translated():
            try:
                async with asyncio.timeout(CONNECT_TIMEOUT):
                    return await self._connect(pod_id)
            except (OSError, TimeoutError) as e:
                raise errors.Unavailable(f"shim of pod sandbox {pod_id[:13]}: {e!r}") from e

    async def _connect(self, pod_id: str) -> client.ShimClient:
        shim = await client.ShimClient.connect(str(self._files.socket(pod_id)))
        answer = await shim.ping()
        if answer.pod_id != pod_id or answer.version != PROTOCOL_VERSION:
            shim.close()
            raise errors.Unavailable(f"another shim answers for pod sandbox {pod_id[:13]}")
        self._clients[pod_id] = shim
        self._pids[pod_id] = answer.pid
        return shim

    async def reconnect(self, pod_id: str) -> bool:
        """Say whether the shim is still there, with a new connection if the old one is lost."""
        known = self._clients.get(pod_id)
        if known is not None and not known.closed.done():
            return True
        try:
            await self.adopt(pod_id)
        except errors.Unavailable:
            self._clients.pop(pod_id, None)
            return False
        return True

    def kill(self, pod_id: str) -> None:
        """Kill a shim that does not answer; what was in its pod is then found dead or buried."""
        pid = self._pids.get(pod_id)
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def watch(self, pod: state.Pod, ended: Callable[[str], Awaitable[None]]) -> None:
        """Call `ended(pod id)` once when the shim or the sandbox container ends by itself."""
        task = asyncio.create_task(self._watch(pod, ended), name=f"watch {pod.id[:13]}")
        self._watchers[pod.id] = task
        task.add_done_callback(lambda _: self._watchers.pop(pod.id, None))

    async def _watch(self, pod: state.Pod, ended: Callable[[str], Awaitable[None]]) -> None:
        while True:
            shim = self._clients[pod.id]
            if pod.pid and await _init_ended(shim, pod.id):
                break
            await asyncio.wait([shim.closed])
            if not await self.reconnect(pod.id):
                break
        self._watchers.pop(pod.id, None)  # `ended` may stop this pod, which must not cancel us
        await ended(pod.id)

    async def stop(self, pod: state.Pod, request: shim_pb2.CreateSandboxRequest) -> bool:
        """Kill what is left in the pod, release its namespaces and end the shim. OK when it is gone
        already.

        Returns whether a living shim did it; if not, the sandbox container is left to the caller.
        """
        watcher = self._watchers.pop(pod.id, None)
        if watcher is not None:
            watcher.cancel()
        shim = self._clients.get(pod.id)
        alive = shim is not None and await self._stop(pod.id, shim, request)
        for path in (request.uts_path, request.ipc_path):  # what a dead shim left pinned
            if path:
                await asyncio.to_thread(mounts.unmount, path)
        return alive

    async def _stop(
        self, pod_id: str, shim: client.ShimClient, request: shim_pb2.CreateSandboxRequest
    ) -> bool:
        alive = False
        try:
            async with asyncio.timeout(STOP_TIMEOUT):
                await shim.stop_sandbox(shim_pb2.StopSandboxRequest(sandbox=request))
                await shim.shutdown()
                await asyncio.shield(shim.closed)
            alive = True
        except shim_errors.Unavailable:
            log.info("shim was gone already", pod=pod_id)
        except TimeoutError:
            log.error("shim does not stop: killed", pod=pod_id)
            self.kill(pod_id)
        except shim_errors.ShimError as e:
            raise errors.Internal(f"shim: {e.message}") from e
        self._clients.pop(pod_id, None)
        self._pids.pop(pod_id, None)
        shim.close()
        return alive

    def handler(self, name: str) -> client.HandlerSpec:
        """Return what a shim must know of a handler. Raises InvalidArgument when it is not
        configured any more.
        """
        found = self._settings.handler(name)
        return client.HandlerSpec(
            name=name,
            kind=found.kind,
            path=found.path,
            root=str(self._settings.server.state / "runtimes" / name),
            options={"timeout": self._settings.runtime.runtime_timeout, **found.options},
        )

    async def close(self) -> None:
        """Let go of every shim; they and their pods live on."""
        for watcher in list(self._watchers.values()):
            watcher.cancel()
        for shim in self._clients.values():
            shim.close()
        await self._zygote.close()


async def _init_ended(shim: client.ShimClient, pod_id: str) -> bool:
    """Wait for the end of a pod's init; False when the shim was lost before."""
    try:
        await shim.wait(shim_pb2.WaitRequest(id=pod_id))
    except shim_errors.ShimError as e:
        return not isinstance(e, shim_errors.Unavailable)
    return True
