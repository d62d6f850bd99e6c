# SPDX-License-Identifier: Apache-2.0
"""The shims of all pods: fork one, find it again after a restart, ask it, stop it, notice its
death.

A shim outlives the server. What ties them together is the socket in the pod's directory, and
nothing else: `adopt` connects to it and makes sure that the pod's own shim answers. A shim that
died leaves namespaces and processes behind, which the callers remove by themselves (`netns`,
`cgroups`, `leftovers.Leftovers`).

With a shim goes its pod, so one that is slow is waited for: a shim writes logs, and their disk may
stall. It is gone when nobody serves its socket, and given up when it has not answered for
`UNRESPONSIVE_TIMEOUT` seconds.
"""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Literal

import structlog

from cri_server import config, errors, handlers, podfiles, programs, revisions, state
from shim import client, mounts, process
from shim import errors as shim_errors
from shim.pb import shim_pb2

log = structlog.get_logger()
PROTOCOL_VERSION = 1
CONNECT_TIMEOUT = (
    5.0  # seconds: a stopped shim must not keep the server from starting (hazards R07)
)
# Seconds after which a shim that says nothing is killed; its log's disk may be slow.
UNRESPONSIVE_TIMEOUT = 60.0
UNRESPONSIVE_TIMEOUT_AT_STOP = 10.0  # the same when its pod is to end anyway
AGAIN = 1.0  # seconds until a shim is looked for again that could not be asked

_CODES: dict[int, type[errors.CriError]] = {
    shim_errors.InvalidArgument.code: errors.InvalidArgument,
    shim_errors.DeadlineExceeded.code: errors.DeadlineExceeded,
    shim_errors.NotFound.code: errors.NotFound,
    shim_errors.ResourceExhausted.code: errors.ResourceExhausted,
    shim_errors.FailedPrecondition.code: errors.FailedPrecondition,
    shim_errors.Unimplemented.code: errors.Unimplemented,
    shim_errors.Internal.code: errors.Internal,
    shim_errors.Unavailable.code: errors.Unavailable,
}


@contextlib.contextmanager
def translate_errors() -> Iterator[None]:
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
        live: handlers.Handlers,
        zygotes: client.Zygotes,
        files: podfiles.PodFiles,
        driver: Literal["cgroupfs", "systemd"],
    ) -> None:
        self._settings, self._handlers, self._zygotes = settings, live, zygotes
        self._files, self._driver = files, driver
        self._programs = programs.Programs()
        self._clients: dict[str, client.ShimClient] = {}
        self._pids: dict[str, tuple[int, int]] = {}  # with the start time: a pid is used again
        self._watchers: dict[str, asyncio.Task[None]] = {}
        self._suspects: dict[tuple[str, float], asyncio.Task[None]] = {}
        self._given_up: set[str] = set()

    def of(self, pod_id: str) -> client.ShimClient:
        """Return the connection to a pod's shim. Raises Unavailable when it is gone."""
        found = self._clients.get(pod_id)
        if found is None:
            raise errors.Unavailable(f"the shim of pod sandbox {pod_id[:13]} is gone")
        return found

    @contextlib.asynccontextmanager
    async def calling(
        self, pod_id: str, *, unresponsive_after: float = UNRESPONSIVE_TIMEOUT
    ) -> AsyncIterator[client.ShimClient]:
        """Give a pod's shim for a call that may take long; what it says becomes one of our errors.

        Raises Unavailable when it is gone. One that does not even answer a ping for
        `unresponsive_after` seconds is killed, which ends the call: what it was doing must not come
        true later, unseen.
        """
        shim = self.of(pod_id)
        watchdog = asyncio.create_task(
            self._ping_regularly(pod_id, shim, unresponsive_after), name="watchdog"
        )
        try:
            with translate_errors():
                yield shim
        finally:
            watchdog.cancel()

    async def _ping_regularly(self, pod_id: str, shim: client.ShimClient, within: float) -> None:
        answers = True
        while answers:
            await asyncio.sleep(within / 2)
            answers = await self._answers(pod_id, shim, within / 2)

    async def _answers(self, pod_id: str, shim: client.ShimClient, within: float) -> bool:
        """Say whether a shim is there; one that says nothing for `within` seconds is killed."""
        try:
            await shim.ping(timeout=within)
        except shim_errors.DeadlineExceeded:
            log.error("shim does not answer: killed, with all in its pod", pod=pod_id)
            self.kill(pod_id)
            return False
        except shim_errors.Unavailable:
            return False
        return True

    def kill_if_unresponsive(
        self, pod_id: str, *, unresponsive_after: float = UNRESPONSIVE_TIMEOUT
    ) -> None:
        """Kill the pod's shim unless it says something within `unresponsive_after` seconds; do not
        wait for it.

        For a caller that has waited in vain, but not for long enough to condemn the whole pod.
        """
        key = (pod_id, unresponsive_after)
        if key not in self._suspects:
            task = asyncio.create_task(
                self._check_suspect(pod_id, unresponsive_after), name=f"suspect {pod_id[:13]}"
            )
            self._suspects[key] = task
            task.add_done_callback(lambda _: self._suspects.pop(key))

    async def _check_suspect(self, pod_id: str, within: float) -> None:
        if await self.reconnect(pod_id, unresponsive_after=within) and (
            shim := self._clients.get(pod_id)
        ):
            await self._answers(pod_id, shim, within)

    async def fork(self, pod: state.Pod) -> tuple[int, int]:
        """Start the pod's shim, connect to it and return its pid and start time."""
        path = str(self._files.socket(pod.id))
        handler = self.handler(pod.handler)
        wanted = self._handlers.of(pod.handler)
        with translate_errors():
            async with self._programs.lent(wanted) as program:
                handler.options["program"] = program.identity
                pid = await self._zygotes.fork(pod.id, path, handler=handler, program=program.fd)
            self._pids[pod.id] = _identity(pid)  # first: it is there whether we reach it or not
            self._clients[pod.id] = await client.ShimClient.connect(path)
        return self._pids[pod.id]

    def remember(self, pod: state.Pod) -> None:
        """Know a shim by its record, so that it can be killed when it does not answer."""
        if pod.boot_id == state.boot_id() and pod.shim_pid:
            self._pids[pod.id] = (pod.shim_pid, pod.shim_start_time)

    async def adopt(
        self, pod_id: str, *, unresponsive_after: float = UNRESPONSIVE_TIMEOUT
    ) -> client.ShimClient:
        """Connect to the shim of a pod that an earlier server started.

        Raises Unavailable when it is not there, or no longer: one that says nothing for
        `unresponsive_after` seconds is killed. What we lack ourselves says nothing about it, and is
        waited for.
        """
        deadline = time.monotonic() + unresponsive_after
        while True:
            try:
                return await self._connect(pod_id, max(deadline - time.monotonic(), 0.0))
            except errors.ResourceExhausted as e:
                log.warning("shim not found out about", pod=pod_id, error=e.message)
                deadline = time.monotonic() + unresponsive_after
            except errors.DeadlineExceeded as e:
                if time.monotonic() >= deadline:
                    log.error("shim does not answer: killed, with all in its pod", pod=pod_id)
                    self.kill(pod_id)
                    raise errors.Unavailable(e.message) from e
            await asyncio.sleep(AGAIN)

    async def _connect(self, pod_id: str, within: float) -> client.ShimClient:
        with translate_errors():
            shim = await client.ShimClient.connect(str(self._files.socket(pod_id)))
            try:
                answer = await shim.ping(timeout=within)
                if answer.pod_id != pod_id or answer.version != PROTOCOL_VERSION:
                    raise errors.Unavailable(f"another shim answers for pod sandbox {pod_id[:13]}")
                self._pids[pod_id] = _identity(answer.pid)
            except BaseException:
                shim.close()
                raise
        if (known := self._connected(pod_id)) is not None:  # others have looked for it too
            shim.close()
            return known
        self._clients[pod_id] = shim
        return shim

    def _connected(self, pod_id: str) -> client.ShimClient | None:
        known = self._clients.get(pod_id)
        return known if known is not None and not known.closed.done() else None

    async def reconnect(
        self, pod_id: str, *, unresponsive_after: float = UNRESPONSIVE_TIMEOUT
    ) -> bool:
        """Say whether the shim is still there, with a new connection if the old one is lost; as
        `adopt` it waits until that is known.
        """
        if self._connected(pod_id) is not None:
            return True
        try:
            if pod_id not in self._given_up:
                await self.adopt(pod_id, unresponsive_after=unresponsive_after)
                return True
        except errors.Unavailable:
            self._clients.pop(pod_id, None)
        return False

    def kill(self, pod_id: str) -> None:
        """Kill a shim that does not answer, and give it up: one that hangs in the kernel dies when
        it wakes. What was in its pod is then found dead or gone.
        """
        self._given_up.add(pod_id)
        pid, start_time = self._pids.get(pod_id, (0, 0))
        if pid and process.alive(pid, start_time):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if (shim := self._clients.pop(pod_id, None)) is not None:
            shim.close()  # which ends every call

    def watch(self, pod: state.Pod, ended: Callable[[str], Awaitable[None]]) -> None:
        """Call `ended(pod id)` once when the shim or the sandbox container ends by itself."""
        task = asyncio.create_task(self._watch(pod, ended), name=f"watch {pod.id[:13]}")
        self._watchers[pod.id] = task
        task.add_done_callback(lambda _: self._watchers.pop(pod.id, None))

    async def _watch(self, pod: state.Pod, ended: Callable[[str], Awaitable[None]]) -> None:
        while await self.reconnect(pod.id):
            shim = self._clients[pod.id]
            if pod.pid and await _init_ended(shim, pod.id):
                break
            await asyncio.wait([shim.closed])
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
        found = await self.reconnect(pod.id, unresponsive_after=UNRESPONSIVE_TIMEOUT_AT_STOP)
        alive = found and await self._stop(pod.id, request)
        if not alive:
            self.kill(pod.id)  # it may be there and not answer
        self._pids.pop(pod.id, None)
        self._given_up.discard(pod.id)
        for path in (
            request.uts_path,
            request.ipc_path,
            request.user_path,
        ):  # what a dead shim left pinned
            if path:
                await asyncio.to_thread(mounts.unmount, path)
        return alive

    async def _stop(self, pod_id: str, request: shim_pb2.CreateSandboxRequest) -> bool:
        alive = True
        try:
            async with self.calling(
                pod_id, unresponsive_after=UNRESPONSIVE_TIMEOUT_AT_STOP
            ) as shim:
                await shim.stop_sandbox(shim_pb2.StopSandboxRequest(sandbox=request))
                await shim.shutdown()
                await asyncio.shield(shim.closed)
        except errors.Unavailable as e:
            log.info("shim was gone before its pod", pod=pod_id, error=e.message)
            alive = False
        if (shim_left := self._clients.pop(pod_id, None)) is not None:
            shim_left.close()
        return alive

    def handler(self, key: str) -> client.HandlerSpec:
        """Return what a shim must know of a handler. Raises as `Handlers.of`."""
        found, name = self._handlers.of(key), revisions.name_of(key)
        options = {
            "timeout": str(found.timeout(self._settings.runtime.runtime_timeout)),
            "cgroup_driver": self._driver,
            "dialect": found.dialect,
            "sandbox": "container" if found.has_sandbox else "namespaces",
            "args": "\n".join(found.args),
            **{f"shim.{key}": value for key, value in found.shim_options.items()},
        }
        return client.HandlerSpec(
            name=name,
            kind=found.kind,
            path=found.path,
            root=str(self._settings.server.state / "runtimes" / name),
            options=options,
        )

    async def close(self) -> None:
        """Let go of every shim; they and their pods live on."""
        for task in [*self._watchers.values(), *self._suspects.values()]:
            task.cancel()
        for shim in self._clients.values():
            shim.close()
        self._programs.close()
        await self._zygotes.close()


def _identity(pid: int) -> tuple[int, int]:
    """Return a shim's pid and start time. Raises a ShimError, see `errors.of_the_other`."""
    try:
        return pid, process.start_time(pid)
    except OSError as e:
        raise shim_errors.of_the_other(e, f"shim {pid}") from e


async def _init_ended(shim: client.ShimClient, pod_id: str) -> bool:
    """Wait for the end of a sandbox container; False when the shim was lost before."""
    try:
        await shim.wait(shim_pb2.WaitRequest(id=pod_id))
    except shim_errors.ShimError as e:
        return not isinstance(e, shim_errors.Unavailable)
    return True
