# SPDX-License-Identifier: Apache-2.0
"""Containers: create, start, stop, remove, status, list, reopen log.

CreateContainer prepares everything on disk (`bundles`) and starts no process. StartContainer hands
the bundle to the pod's shim. From then on the shim is the one who knows: `_follow` waits for its
word that the container has ended, and by then the log is complete and the exit record is on disk.

StopContainer starts one `escalation` per container (signal, grace period, SIGKILL) that runs to its
end also when the caller goes away; a later call can only shorten it.
"""

import asyncio
import contextlib
import dataclasses
import functools
import posixpath
import signal
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TypeVar

import structlog

from cri_server import (
    bundles,
    cgroup_prewarm,
    container_plan,
    containerstatus,
    errors,
    escalation,
    events,
    handlers,
    imagevolumes,
    leftovers,
    locks,
    names,
    shims,
    spec,
    state,
    steps,
    updates,
)
from cri_server.images import gc
from cri_server.images import store as images
from cri_server.pb import api_pb2 as api
from cri_server.spec import checks
from shim import errors as shim_errors
from shim.pb import shim_pb2

log = structlog.get_logger()
CREATED, RUNNING, EXITED = (
    api.ContainerState.CONTAINER_CREATED,
    api.ContainerState.CONTAINER_RUNNING,
    api.ContainerState.CONTAINER_EXITED,
)
T = TypeVar("T")
MESSAGE_LIMIT = 1024  # characters of a message in a status, as of those that shims tell
Seen = Mapping[str, shim_pb2.Container] | None  # what a shim knows; None: there is no shim


class Containers:
    """What CreateContainer and its relatives do. Each id may be a unique prefix of one."""

    def __init__(
        self,
        *,
        live: handlers.Handlers,
        store: state.Store,
        image_store: images.Store,
        collector: gc.Collector,
        bundle_host: bundles.Bundles,
        leftover_host: leftovers.Leftovers,
        shim_host: shims.Shims,
        update_host: updates.Updates,
        event_host: events.Events,
        prewarm: cgroup_prewarm.Prewarm,
    ) -> None:
        self._handlers, self._store, self._events = live, store, event_host
        self._prewarm = prewarm
        self._images, self._collector = image_store, collector
        self._bundles, self._shims = bundle_host, shim_host
        self._updates, self._leftovers = update_host, leftover_host
        self._attempts, self._locks = names.Attempts(), locks.Locks()
        self._running: dict[str, asyncio.Event] = {}  # set when the container has ended
        self._stopping: dict[str, escalation.Escalation] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    # -- create -----------------------------------------------------------------------------------

    async def create(self, pod_id: str, config: api.ContainerConfig) -> str:
        """Prepare a container in a ready pod and return its id, or leave nothing behind.

        Raises NotFound for the pod or the image, FailedPrecondition for a pod that is not ready,
        InvalidArgument for a config that can never work; all before anything is made.
        """
        pod = self._ready_pod(pod_id)
        self._prewarm.start()  # it is mostly started at once
        if not (config.metadata.name and config.image.image):
            raise errors.InvalidArgument("config.metadata.name or config.image.image is missing")
        image = self._image(config.image.image)
        facts = self._handlers.facts(pod.handler)
        spec.validate_container(config, pod.config, facts, image=image.config)
        self._handlers.check_memory(pod.handler, config.linux.resources)
        self._check_annotations(pod, config)
        log_path(pod.config, config)
        config, volumes = imagevolumes.resolve(config, self._images)
        now = self._store.container_time(pod.id, config.metadata.name)
        container = _new(pod, config, image, now=now)
        plan = container_plan.ContainerPlan(
            pod=pod, container=container, image=image, facts=facts, volumes=volumes
        )
        return await self._attempts.join(container.name, lambda: self._create(plan))

    def _check_annotations(self, pod: state.Pod, config: api.ContainerConfig) -> None:
        """Refuse what does not count; the pod's too, for the configuration may have changed."""
        handler, facts = self._handlers.of(pod.handler), self._handlers.facts(pod.handler)
        of_pod = handler.allowed(handler.pod_annotations, pod.config.annotations)
        spec.check_pod_annotations(pod.config, of_pod, facts)
        own = handler.allowed(handler.container_annotations, config.annotations)
        spec.check_container_annotations(config, own, facts)

    def _ready_pod(self, pod_id: str) -> state.Pod:
        pod = self._store.pod(pod_id)
        if pod.state is not state.PodState.READY:
            raise errors.FailedPrecondition(f"pod sandbox {pod.id[:13]} is not ready")
        return pod

    def _image(self, name: str) -> images.Image:
        image = self._images.find(name)
        if image is None:
            raise errors.NotFound(f"image {name[:200]!r} is not present: pull it first")
        return image

    async def _create(self, plan: container_plan.ContainerPlan) -> str:
        earlier = self._store.container_named(plan.container.name)
        if earlier is not None and earlier.complete:
            return earlier.id
        if earlier is not None:
            await self.remove(earlier.id)
        layers = {layer for i in (plan.image, *plan.volumes.values()) for layer in i.layers}
        async with self._collector.claim(layers):  # a RemoveImage comes before us or after us
            container = await self._store.put_container(plan.container)
            async with self._locks.held(container.id):  # a removal waits until it is made or undone
                return await self._make(plan)

    async def _make(self, plan: container_plan.ContainerPlan) -> str:
        pod, container = plan.pod, plan.container
        recipe = steps.Steps("container made", pod=pod.id, container=container.id)
        try:
            target = self._target(pod, container.config)
            whole = dataclasses.replace(plan, target_pid=target)
            container = await self._bundles.create(whole, recipe)
            with recipe.step("record"):
                self._ready_pod(pod.id)  # it may have been stopped meanwhile
                await self._store.put_container(dataclasses.replace(container, complete=True))
        except BaseException as e:
            log.warning("container failed", pod=pod.id, container=container.id, error=str(e))
            await self._undo(container, str(e))
            raise
        recipe.done()
        self._publish(events.CREATED, container)
        return container.id

    def _target(self, pod: state.Pod, config: api.ContainerConfig) -> int:
        """Return the pid whose PID namespace the container joins (NamespaceMode TARGET), 0 for
        none.
        """
        options = config.linux.security_context.namespace_options
        if options.pid != api.NamespaceMode.TARGET:
            return 0
        target = self._store.container(options.target_id)
        whole = target.id == options.target_id  # the kubelet's, never a beginning that may fit
        if not whole or target.pod_id != pod.id or target.state != RUNNING:
            raise errors.InvalidArgument(
                f"target_id {options.target_id[:80]!r} is not running in this pod"
            )
        return target.pid

    async def _undo(self, container: state.Container, why: str) -> None:
        """Release a container whose creation failed; if that fails too it stays listed, EXITED."""
        try:
            await self._bundles.remove(container)
            await self._store.forget_container(container)
        except Exception as e:
            log.error("container left for a later removal", container=container.id, error=str(e))
            await self._store.note_container(_ended(container, 128, "StartError", why))

    # -- start ------------------------------------------------------------------------------------

    async def start(self, container_id: str) -> None:
        """Run a created container (CRI StartContainer).

        A failure leaves it EXITED with exit code 128, reason StartError and the runtime's message,
        so that the kubelet can show it. Raises NotFound, FailedPrecondition when it is not in state
        CREATED, else what the runtime said.
        """
        container = self._store.container(container_id)
        async with self._locks.held(container.id):
            container = self._store.container(container.id)
            if container.state != CREATED:
                raise errors.FailedPrecondition(
                    f"container {container.id[:13]} is {_state_name(container)}: cannot be started"
                )
            try:
                await self._start(container)
            finally:
                await self._bundles.let_go(container.id)

    async def _start(self, container: state.Container) -> None:
        self._prewarm.start()
        recipe = steps.Steps("container started", pod=container.pod_id, container=container.id)
        try:
            answer = await self._run(container, recipe)
        except Exception as e:
            await self._not_started(container, e)
            raise
        with recipe.step("record"):
            running = await self._store.note_container(_started(container, answer))
        self._publish(events.STARTED, running)
        self.follow(running)
        recipe.done()

    async def _run(self, container: state.Container, recipe: steps.Steps) -> shim_pb2.StartResponse:
        pod = self._ready_pod(container.pod_id)
        async with self._shims.calling(pod.id) as shim:
            with recipe.step("shim create"):
                await shim.create(self._bundles.request(container, pod))
            with recipe.step("runtime run"):
                return await shim.start(shim_pb2.StartRequest(id=container.id))

    async def _not_started(self, container: state.Container, error: Exception) -> None:
        """Record a failed start, once nothing of it can come true any more."""
        if isinstance(error, errors.Unavailable):  # what the shim has begun may go on without it
            if await self._shims.reconnect(container.pod_id):
                return  # it is this server that ends; the next one asks it what became of the start
            await self._lost(container)
        elif not isinstance(error, errors.CriError):  # a bug of ours, at whatever point
            with contextlib.suppress(errors.CriError):
                await self._forget_in_shim(container)
        why = (error.message if isinstance(error, errors.CriError) else repr(error))[:MESSAGE_LIMIT]
        await self._store.note_container(_ended(container, 128, "StartError", why))
        self._publish(events.STOPPED, container)

    def _publish(self, kind: events.Kind, container: state.Container) -> None:
        self._events.publish(kind, container.id, pod=container.pod_id)

    def follow(self, container: state.Container) -> "asyncio.Task[None]":
        """Record the container's end when the shim tells it. Used at start, and by recovery for
        what still runs.
        """
        self._running[container.id] = asyncio.Event()
        task = asyncio.create_task(self._follow(container), name=f"follow {container.id[:13]}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _follow(self, container: state.Container) -> None:
        """See a container to its end, whatever fails on the way: nobody else would tell of it, and
        a call that stops it waits for that. The root of a task of its own.
        """
        see = functools.partial(self._see_end, container)
        await _persist(see, "end of a container not told", container.id)

    async def _see_end(self, container: state.Container) -> None:
        await self._ended(container.id, await self._end(container))

    async def _end(self, container: state.Container) -> shim_pb2.ExitRecord:
        """Wait for a container's end, at its shim or, if that is lost, by our own doing."""
        while True:
            try:
                shim = self._shims.of(container.pod_id)
                return (await shim.wait(shim_pb2.WaitRequest(id=container.id))).exit
            except (errors.Unavailable, shim_errors.Unavailable):
                if not await self._shims.reconnect(container.pod_id):
                    return await self._lost(container)
            except shim_errors.NotFound:  # another shim: it knows nothing of this container
                return await self._lost(container)

    async def _lost(self, container: state.Container) -> shim_pb2.ExitRecord:
        """Kill what nobody watches any more; tries until it is dead, for only then has it ended."""
        log.warning("container lost with its shim", container=container.id)
        bundle = self._bundles.directory(container.id)
        end = functools.partial(self._leftovers.kill_and_read_exit, container, bundle)
        return await _persist(end, "container not killed", container.id)

    async def _ended(self, container_id: str, record: shim_pb2.ExitRecord) -> None:
        reason = record.reason or _reason(record)
        async with self._store.changing(container_id) as container:
            ended = dataclasses.replace(
                container,
                finished_at=state.end(container, record.finished_at),
                exit_code=record.exit_code,
                reason=reason,
                message=record.message,
            )
            await self._store.note_container(ended)
        log.info(
            "container exited",
            pod=container.pod_id,
            container=container_id,
            code=record.exit_code,
            reason=reason,
        )
        self._publish(events.STOPPED, ended)
        self._running.pop(container_id).set()

    async def recover(self, container: state.Container, finding: Awaitable[Seen]) -> None:
        """Bring a record of an earlier server to what its shim says, and wait for its end if that
        has come. It may take until after the server is ready: calls that start, stop or remove
        the container meanwhile wait.
        """
        async with self._locks.held(container.id):
            seen = (await finding or {}).get(container.id)
            following = await self._recover(container, seen)
        if following is not None and (seen is None or seen.state != shim_pb2.RUNNING):
            await asyncio.wait([following])

    async def _recover(
        self, container: state.Container, seen: shim_pb2.Container | None
    ) -> "asyncio.Task[None] | None":
        """Return what follows the container, None where there is nothing to follow; `seen` is None
        when no shim knows it.
        """
        if not container.complete:
            await self._undo(container, "the server was killed while it made this container")
        elif container.finished_at:
            await self._bundles.let_go(container.id)
        elif seen is not None and seen.state in (shim_pb2.RUNNING, shim_pb2.STOPPED):
            noted = await self._store.note_container(_started(container, seen))
            following = self.follow(noted)
            await self._bundles.let_go(container.id)
            return following
        elif container.started_at:
            return self.follow(container)
        elif seen is not None:  # the start had not come far: the next one begins anew
            await self._forget_in_shim(container)
        return None

    # -- update -----------------------------------------------------------------------------------

    async def update(self, request: api.UpdateContainerResourcesRequest) -> None:
        """Change the limits of a container that is created or runs (CRI UpdateContainerResources).

        Raises NotFound, and what `Updates.apply` raises.
        """
        container = self._store.container(request.container_id)
        spec.check_update(request)
        async with self._locks.held(container.id):
            await self._updates.apply(self._store.container(container.id), request.linux)

    # -- stop -------------------------------------------------------------------------------------

    async def stop(self, container_id: str, timeout: float) -> None:
        """End a container: its stop signal, `timeout` seconds of grace, SIGKILL. OK when unknown or
        not running.

        Returns when the process is gone. A negative timeout counts as 0, which kills at once.
        """
        with contextlib.suppress(errors.NotFound):
            container, timeout = self._store.container(container_id), max(timeout, 0.0)
            ended = self._running.get(container.id)
            if ended is None:
                ended = await self._after_start(container, timeout)
            if ended is not None:
                await self._escalation(container, ended).shorten(timeout)

    async def _after_start(
        self, container: state.Container, timeout: float
    ) -> asyncio.Event | None:
        """Let a start in flight end; after `timeout` seconds it has to. None: it does not run."""
        settled = asyncio.create_task(self._settled(container.id))
        while True:
            await asyncio.wait([settled], timeout=timeout)
            if settled.done():
                return settled.result()
            await self._abort_start(container)
            timeout = escalation.KILL_AGAIN

    async def _settled(self, container_id: str) -> asyncio.Event | None:
        async with self._locks.held(container_id):
            return self._running.get(container_id)

    async def _abort_start(self, container: state.Container) -> None:
        """Have the shim end a start. That there is none yet, or none any more, is fine."""
        request = shim_pb2.KillRequest(id=container.id, signal=signal.SIGKILL, all=True)
        with contextlib.suppress(errors.CriError), shims.translate_errors():
            shim = self._shims.of(container.pod_id)
            await shim.kill(request, timeout=escalation.KILL_TIMEOUT)

    def _escalation(
        self, container: state.Container, ended: asyncio.Event
    ) -> escalation.Escalation:
        known = self._stopping.get(container.id)
        if known is None:
            known = escalation.Escalation(self._shims, self._leftovers, container, ended)
            self._stopping[container.id] = known
            known.task.add_done_callback(lambda _: self._stopping.pop(container.id))
        return known

    async def stop_all(self, pod_id: str) -> None:
        """Kill every container of the pod (CRI StopPodSandbox: no grace)."""
        known = self._store.containers(pod_id)
        if any(container.id in self._running for container in known):
            self._shims.kill_if_unresponsive(
                pod_id, unresponsive_after=shims.UNRESPONSIVE_TIMEOUT_AT_STOP
            )
        async with asyncio.TaskGroup() as group:
            for container in known:
                if container.id in self._running:
                    group.create_task(self.stop(container.id, 0))
                elif container.complete:  # else who makes it finds the pod stopped, and undoes it
                    group.create_task(self._give_up_start(container.id))

    async def _give_up_start(self, container_id: str) -> None:
        """See to it that a container does not run, and that its volumes can be unmounted: it will
        never start any more.
        """
        await self.stop(container_id, 0)  # a start may be in flight
        async with self._locks.held(container_id):
            await self._bundles.let_go(container_id)

    # -- remove -----------------------------------------------------------------------------------

    async def remove(self, container_id: str) -> None:
        """Kill the container if it runs and remove all that is its own, but the log. OK when
        unknown.
        """
        with contextlib.suppress(errors.NotFound):
            container = self._store.container(container_id)
            while True:
                await self.stop(container.id, 0)
                if await self._removed(container.id):
                    break
            await self._collector.collect_owed()

    async def _removed(self, container_id: str) -> bool:
        """Remove a container unless it runs, which a start just before us may have caused."""
        async with self._locks.held(container_id):
            if container_id in self._running:
                return False
            container = self._store.container(container_id)
            await self._forget_in_shim(container)
            await self._bundles.remove(container)
            await self._store.forget_container(container)
            self._publish(events.DELETED, container)
            return True

    async def _forget_in_shim(self, container: state.Container) -> None:
        """Have the shim and the OCI runtime let go of a container; nothing to do without a shim."""
        with contextlib.suppress(errors.Unavailable):
            async with self._shims.calling(container.pod_id) as shim:
                await shim.delete(shim_pb2.DeleteRequest(id=container.id))

    async def remove_all(self, pod_id: str) -> None:
        """Remove every container of the pod, each one even when another fails."""
        async with contextlib.AsyncExitStack() as each:
            for container in self._store.containers(pod_id):
                each.push_async_callback(self.remove, container.id)

    async def close(self) -> None:
        """Stop following containers, which run on; before the connections to shims are closed."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # -- log --------------------------------------------------------------------------------------

    async def reopen_log(self, container_id: str) -> None:
        """Write to the log path anew from now on (CRI ReopenContainerLog, after the kubelet renamed
        the file).
        """
        container = self.running(container_id)
        async with self._shims.calling(container.pod_id) as shim:
            await shim.reopen_log(shim_pb2.ReopenLogRequest(id=container.id))

    # -- look -------------------------------------------------------------------------------------

    def record(self, container_id: str) -> state.Container:
        """Return the record of a container. Raises NotFound."""
        return self._store.container(container_id)

    def running(self, container_id: str) -> state.Container:
        """Return the record of a container that runs. Raises NotFound, FailedPrecondition."""
        container = self._store.container(container_id)
        if container.state != RUNNING:
            raise errors.FailedPrecondition(
                f"container {container.id[:13]} is not running: {_state_name(container)}"
            )
        return container

    def list(self, selector: api.ContainerFilter) -> Sequence[api.Container]:
        """Return the containers that match every part of the filter; unknown ids match none."""
        return [containerstatus.item(c) for c in self.matching(selector)]

    def matching(self, selector: api.ContainerFilter) -> Sequence[state.Container]:
        """Return the records behind `list`."""
        return [c for c in self._store.containers() if containerstatus.matches(c, selector)]

    def of_pod(self, pod_id: str) -> Sequence[state.Container]:
        """Return the records of one pod's containers."""
        return [c for c in self._store.containers(pod_id) if containerstatus.visible(c)]

    def status(self, container_id: str) -> api.ContainerStatus:
        """Return the CRI status. Raises NotFound."""
        return containerstatus.status(self._store.container(container_id))

    def statuses(self, pod_id: str) -> Sequence[api.ContainerStatus]:
        """Return the statuses of all containers of a pod."""
        return [
            containerstatus.status(c)
            for c in self._store.containers(pod_id)
            if containerstatus.visible(c)
        ]


def log_path(pod: api.PodSandboxConfig, config: api.ContainerConfig) -> str:
    """Return the absolute log path, "" when output is discarded.

    Raises InvalidArgument for a path that leaves the pod's log directory (hazards V25), or is below
    none, or holds a control character.
    """
    if not config.log_path:
        return ""
    if not pod.log_directory:
        where = "the pod has no log_directory that it could be below"
        raise errors.InvalidArgument(f"log_path {config.log_path[:200]!r}: {where}")
    path = posixpath.normpath(posixpath.join(pod.log_directory, config.log_path.lstrip("/")))
    inside = posixpath.normpath(pod.log_directory).rstrip("/") + "/"
    if not path.startswith(inside):
        raise errors.InvalidArgument(f"log_path {config.log_path[:200]!r} leaves the log directory")
    if any(ord(c) < 32 or ord(c) == 127 for c in path):
        raise errors.InvalidArgument(f"log_path {config.log_path[:200]!r}: control character")
    return checks.sized(path, "log_path")


async def _persist(attempt: Callable[[], Awaitable[T]], failure: str, container_id: str) -> T:
    """Do it until it succeeds; each failure is logged, whatever it is."""
    pause = escalation.KILL_AGAIN
    while True:
        try:
            return await attempt()
        except Exception as e:
            log.error(failure, container=container_id, error=repr(e))
        await asyncio.sleep(pause)
        pause = min(pause * 2, escalation.KILL_AGAIN_MOST)


def _new(
    pod: state.Pod, config: api.ContainerConfig, image: images.Image, *, now: int
) -> state.Container:
    return state.Container(
        id=names.new_id(),
        pod_id=pod.id,
        handler=pod.handler,
        config=config,
        raw=state.raw_config(config),
        created_at=now,
        boot_id=state.boot_id(),
        image_id=image.id,
        image_ref=next(iter(image.repo_digests), image.id),
        image_name=next(iter(image.repo_tags), config.image.user_specified_image or image.id),
        layers=image.layers,
        log_path=log_path(pod.config, config),
        stop_signal=spec.stop_signal(config, image.config),
    )


def _started(
    container: state.Container, seen: shim_pb2.StartResponse | shim_pb2.Container
) -> state.Container:
    return dataclasses.replace(
        container,
        pid=seen.pid,
        start_time=seen.start_time,
        started_at=max(seen.started_at or time.time_ns(), container.created_at),
    )


def _ended(container: state.Container, code: int, reason: str, message: str) -> state.Container:
    return dataclasses.replace(
        container,
        finished_at=state.end(container, 0),
        exit_code=code,
        reason=reason,
        message=message,
    )


def _reason(record: shim_pb2.ExitRecord) -> str:
    if record.oom_killed:
        return "OOMKilled"
    return "Error" if record.exit_code else "Completed"


def _state_name(container: state.Container) -> str:
    return api.ContainerState.Name(container.state)
