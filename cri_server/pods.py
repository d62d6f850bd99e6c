# SPDX-License-Identifier: Apache-2.0
"""Pod sandboxes: run, stop, remove, status, list.

A sandbox is a directory of files, a cgroup, a shim, a set of pinned namespaces and a network. There
is no pause process; only a pod whose containers share a PID namespace has a process, its sandbox
container.

Running a pod is the recipe in `_run`; its undo, StopPodSandbox, RemovePodSandbox and recovery all
end in `_halt` and `release`, which remove whatever is there, each resource even when another
failed. What could not be removed keeps its record and is listed NOTREADY, so that the kubelet, or
the next start, tries again.
"""

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import structlog

from cri_server import (
    cgroups,
    config,
    containers,
    errors,
    events,
    handlers,
    host,
    imagevolumes,
    inventory,
    leftovers,
    limits,
    locks,
    names,
    origins,
    podfiles,
    podstatus,
    revisions,
    sandbox_container,
    selinux_host,
    shims,
    side_by_side,
    spec,
    state,
    steps,
)
from cri_server.network import cni, conf, netns
from cri_server.pb import api_pb2 as api
from cri_server.spec import why
from shim.pb import shim_pb2

log = structlog.get_logger()


class _Started(NamedTuple):
    """The shim of a pod, and the pid of its sandbox container or 0."""

    shim_pid: int
    start_time: int
    pid: int


class _NetworkEvents(NamedTuple):
    """What has become of a pod's network: `made` its namespace, `attached` by the CNI plugins."""

    made: asyncio.Event
    attached: asyncio.Event


class Pods:
    """What RunPodSandbox and its relatives do. `pod_id` is an id or a unique prefix of one."""

    def __init__(
        self,
        *,
        settings: config.Config,
        live: handlers.Handlers,
        store: state.Store,
        files: podfiles.PodFiles,
        groups: cgroups.Cgroups,
        network: cni.Network,
        shim_host: shims.Shims,
        container_host: containers.Containers,
        leftover_host: leftovers.Leftovers,
        sandbox_host: sandbox_container.SandboxContainers,
        volumes: imagevolumes.ImageVolumes,
        event_host: events.Events,
    ) -> None:
        self._settings, self._handlers = settings, live
        self._store, self._files = store, files
        self._events = event_host
        self._groups, self._network, self._shims = groups, network, shim_host
        self._containers, self._leftovers = container_host, leftover_host
        self._volumes, self._sandboxes = volumes, sandbox_host
        self._attempts, self._locks = names.Attempts(), locks.Locks()
        self._selinux_levels = selinux_host.Levels(store.selinux_levels)
        self._ending: set[asyncio.Task[None]] = set()

    # -- run --------------------------------------------------------------------------------------

    async def run(self, config: api.PodSandboxConfig, handler: str) -> str:
        """Bring a pod sandbox to ready and return its id, or leave nothing behind.

        The same metadata again waits for the attempt in flight or returns the finished pod
        (design.md §4). Raises InvalidArgument for a config that can never work, Unavailable when
        there is no network yet, FailedPrecondition for a handler whose program does not work.
        """
        key = self._handlers.key(handler)
        served_by, facts = self._handlers.of(key), self._handlers.facts(key)
        spec.validate_sandbox(config, facts)
        if served_by.dialect == "runsc":
            spec.check_sentry_sysctls(config, host_stack=served_by.uses_host_stack)
        allowed = served_by.allowed(served_by.pod_annotations, config.annotations)
        spec.check_pod_annotations(config, allowed, facts)
        await self._sandboxes.check_profiles(config, facts)
        known = self._handlers.host_facts.runtimes.get(key)
        await host.check_runtime(revisions.name_of(key), served_by, known)
        m = config.metadata
        name = (m.name, m.namespace, m.uid, m.attempt)
        return await self._attempts.join(name, lambda: self._run(name, config, handler, key))

    async def _run(
        self, name: state.PodName, config: api.PodSandboxConfig, handler: str, key: str
    ) -> str:
        earlier = self._store.pod_named(name)
        if earlier is not None and earlier.state is not state.PodState.FAILED:
            return earlier.id
        if earlier is not None:
            await self.remove(earlier.id)
        pod = await self._begin(config, handler, key)
        try:
            await self._make(pod)
        except BaseException as e:
            log.warning("pod sandbox failed", pod=pod.id, error=str(e))
            await self._undo(pod)
            raise
        for kind in (events.CREATED, events.STARTED):  # for a sandbox they are one moment
            self._events.publish(kind, pod.id, pod=pod.id)
        return pod.id

    async def _begin(self, config: api.PodSandboxConfig, handler: str, key: str) -> state.Pod:
        """Record the intent, with what has to be taken back if we are killed at the next line."""
        pod = state.new_pod(
            config,
            runtime_handler=handler,
            handler=key,
            now=self._store.pod_time(config.metadata),
        )
        made = self._groups.missing(self._groups.pod_parent(pod.id, config.linux.cgroup_parent))
        network: Mapping[str, object] | None = {} if pod.own_network else None
        await self._handlers.keep(key)
        with self._selinux_level(config) as level:
            return await self._store.put_pod(
                dataclasses.replace(
                    pod,
                    cgroups_made=made,
                    mark=self._mark(pod),
                    network=network,
                    selinux_level=level,
                )
            )

    def _mark(self, pod: state.Pod) -> str:
        """Return the empty cgroup by which cAdvisor finds the pod, "" where it needs none."""
        marked = self._settings.server.crio_socket and not self._sandboxes.needed(pod)
        return self._sandboxes.cgroup(pod) if marked else ""

    def _selinux_level(
        self, config: api.PodSandboxConfig
    ) -> contextlib.AbstractContextManager[str]:
        if self._handlers.host_facts.selinux is None:
            return contextlib.nullcontext("")
        return self._selinux_levels.held(spec.asked_level(config))

    async def _make(self, pod: state.Pod) -> None:
        """Make all that a pod is, two things at a time.

            netns ─┬─ CNI ADD ───────────────────────────────────────┐
                   └─ files → shim → ipc, uts → sandbox container ───┴─ record READY

        In a pod with a user namespace of its own the shim makes the netns too, and CNI waits for
        that. A guest kernel takes its addresses at start: its sandbox container waits for CNI.
        """
        recipe = steps.Steps("pod sandbox made", pod=pod.id)
        network = _NetworkEvents(asyncio.Event(), asyncio.Event())
        if pod.own_network and not spec.ids(pod.config):  # else it belongs to the user namespace
            with recipe.step("network namespace"):
                sysctls = self._sysctls(pod, network=True)
                await asyncio.to_thread(netns.create, pod.netns, sysctls)
            network.made.set()
        result, started = await side_by_side.both(
            self._attach(pod, network, recipe), self._start_shim(pod, network, recipe)
        )
        with recipe.step("record"):
            await self._store.put_pod(
                dataclasses.replace(
                    pod,
                    state=state.PodState.READY,
                    ips=result.ips if result else (),
                    network=result.raw if result else None,
                    shim_pid=started.shim_pid,
                    shim_start_time=started.start_time,
                    pid=started.pid,
                )
            )
        self.watch(self._store.pod(pod.id))
        if pod.mark:
            await asyncio.to_thread(self._groups.mark, pod.mark)
        recipe.done()

    def _create_files(self, pod: state.Pod) -> None:
        with why.recorded() as found:
            size, init = self._shm_size(pod), self._sandboxes.needed(pod)
            labels = spec.labels_of_pod(
                pod.config, pod.selinux_level, self._handlers.facts(pod.handler)
            )
            self._files.create(pod, shm_size=size, labels=labels)
            document = inventory.of(
                pod, self._files, self._groups, shm_size=size, labels=labels, init=init
            )
        origins.write(self._files.directory(pod.id), found, document=document)

    def _shm_size(self, pod: state.Pod) -> int:
        handler = self._handlers.of(pod.handler)
        allowed = handler.allowed(handler.pod_annotations, pod.config.annotations)
        key = self._handlers.label(pod.handler, "default_shm_size")
        return spec.shm_size(allowed, limits.size(handler.default_shm_size), key=key)

    async def _attach(
        self, pod: state.Pod, network: "_NetworkEvents", recipe: steps.Steps
    ) -> cni.Result | None:
        result = None
        if pod.own_network:
            await network.made.wait()
            with recipe.step("network"):
                result = await self._network.attach(
                    self._attachment(pod), self._handlers.place(pod.handler)
                )
            await self._set_up_interface(pod)
        network.attached.set()
        return result

    async def _set_up_interface(self, pod: state.Pod) -> None:
        """Write the sysctls that were not there before CNI's ADD."""
        if sysctls := self._sysctls(pod, network=True, device=True):
            await asyncio.to_thread(netns.write, pod.netns, sysctls)

    async def _start_shim(
        self, pod: state.Pod, network: "_NetworkEvents", recipe: steps.Steps
    ) -> "_Started":
        """Make the pod's files, then start its shim, which makes the other namespaces, and the
        sandbox container if any.

        What is under way when the network fails comes to its end first: of a shim half born nobody
        would know, and a thread that goes on would write beside the undo.
        """
        with recipe.step("files"):
            await side_by_side.uninterrupted(asyncio.to_thread(self._create_files, pod))
        with recipe.step("shim"):
            shim_pid, start_time = await side_by_side.uninterrupted(self._shims.fork(pod))
        with recipe.step("namespaces"):
            async with self._shims.calling(pod.id) as shim:
                await shim.create_sandbox(self._sandbox_request(pod))
        network.made.set()
        if self._handlers.of(pod.handler).has_guest_kernel:  # which takes its addresses at start
            await network.attached.wait()
        with recipe.step("init"):
            return _Started(shim_pid, start_time, await self._sandboxes.start(pod))

    async def _undo(self, pod: state.Pod) -> None:
        """Release a pod whose creation failed; if that fails too it stays listed NOTREADY."""
        try:
            await self.release(pod)
        except Exception as e:
            log.error("pod sandbox left for a later removal", pod=pod.id, error=str(e))
            await self._store.note_pod(dataclasses.replace(pod, state=state.PodState.FAILED))

    # -- stop and remove --------------------------------------------------------------------------

    async def stop(self, pod_id: str) -> None:
        """End every container and give back the network (CRI StopPodSandbox). OK when unknown or
        stopped, and when all is ended but CNI's DEL failed: no namespace refers to it any more.
        """
        with contextlib.suppress(errors.NotFound):
            pod = self._listed(pod_id)
            async with self._locks.held(pod.id):
                await self._stop(self._store.pod(pod.id))

    async def _stop(self, pod: state.Pod) -> errors.CriError | None:
        """End what runs; return why the network could not be given back, None when it was.

        Then the record keeps it, and `settle_networks` tries again.
        """
        if pod.state is state.PodState.STOPPED and pod.network is None and not pod.shim_pid:
            return None
        if pod.state is state.PodState.READY:
            pod = await self._note_stopped(pod)
        owed = await self._halt(pod)
        network = pod.network if owed else None
        await self._store.note_pod(dataclasses.replace(pod, network=network, shim_pid=0, pid=0))
        return owed

    async def _note_stopped(self, pod: state.Pod) -> state.Pod:
        noted = await self._store.note_pod(
            dataclasses.replace(pod, state=state.PodState.STOPPED, stopped_at=time.time_ns())
        )
        self._events.publish(events.STOPPED, pod.id, pod=pod.id)
        return noted

    async def remove(self, pod_id: str) -> None:
        """Stop the pod and remove all that is its own (CRI RemovePodSandbox). OK when unknown.

        Raises what the CNI plugins said while they do not give the network back; until then the pod
        is listed.
        """
        with contextlib.suppress(errors.NotFound):
            pod = self._listed(pod_id)
            async with self._locks.held(pod.id):
                if owed := await self._stop(self._store.pod(pod.id)):
                    raise owed
                await self._free(self._store.pod(pod.id))
                self._events.publish(events.DELETED, pod.id, pod=pod.id)
                await self._store.forget_pod(pod.id)

    async def _halt(self, pod: state.Pod) -> errors.CriError | None:
        """End what runs; containers first, then the network, then the shim with the namespaces.

        What the CNI plugins did not give back is no failure: its reason is returned.
        """
        async with contextlib.AsyncExitStack() as each:  # pushed last, run first; all are run
            each.push_async_callback(self._volumes.remove, pod.id)
            each.push_async_callback(asyncio.to_thread, netns.remove, pod.netns)
            each.push_async_callback(asyncio.to_thread, self._groups.remove_all, pod.mark)
            each.push_async_callback(self._stop_shim, pod)
            try:
                await self._containers.stop_all(pod.id)
            finally:
                owed = await self._detach(pod)
        return owed

    async def release(self, pod: state.Pod) -> None:
        """Remove whatever of a pod exists; the undo of `run` and recovery end here."""
        await self._free(pod)
        await self._store.forget_pod(pod.id)

    async def _free(self, pod: state.Pod) -> None:
        """Remove whatever of a pod exists but its record. Raises also when a CNI DEL is owed."""
        async with contextlib.AsyncExitStack() as each:
            each.push_async_callback(self._groups.remove, pod.cgroups_made)
            each.push_async_callback(asyncio.to_thread, self._files.remove, pod.id)
            each.push_async_callback(self._volumes.remove, pod.id)  # of a container made meanwhile
            each.push_async_callback(self._containers.remove_all, pod.id)
            owed = await self._halt(pod)
        if owed:
            raise owed

    async def _stop_shim(self, pod: state.Pod) -> None:
        if not await self._shims.stop(pod, self._release_request(pod)):
            await self._kill_sandbox(pod)

    async def _kill_sandbox(self, pod: state.Pod) -> None:
        """End what a dead shim has left of the pod itself. Its bundle tells where: the cgroup
        driver may be another one by now.
        """
        if self._sandboxes.needed(pod) or self._leftovers.has_shim_folder(pod.handler):
            bundle = self._files.bundle(pod.id)
            await self._leftovers.kill_and_delete_unrecorded(pod.handler, pod.id, bundle)

    async def _detach(self, pod: state.Pod) -> errors.CriError | None:
        """Give the network back; return why that failed."""
        if pod.network is None:
            return None
        try:
            await self._network.detach(self._attachment(pod), self._place(pod))
        except errors.CriError as e:
            log.warning("network not given back: owed", pod=pod.id, error=e.message)
            return e
        return None

    def _place(self, pod: state.Pod) -> conf.Place | None:
        """Return where the pod's network is described now; that of all when its handler is lost."""
        found = self._handlers.find(pod.handler)
        return handlers.place(found.handler, self._settings.network) if found else None

    async def settle_networks(self) -> bool:
        """Try again to give back the networks of pods that were stopped without; say whether all
        are. One pod after the other, for a plugin may take its time to fail.
        """
        for pod in filter(_owes, self._store.pods()):
            try:
                await self.stop(pod.id)
            except Exception as e:
                log.error("pod sandbox not stopped", pod=pod.id, error=repr(e))
        return not any(map(_owes, self._store.pods()))

    # -- update -----------------------------------------------------------------------------------

    async def update(self, request: api.UpdatePodSandboxResourcesRequest) -> None:
        """Remember the pod's overhead and resources (CRI UpdatePodSandboxResources).

        What is not in the request stays. The pod's cgroup is the kubelet's, which writes it itself.
        Raises NotFound, InvalidArgument that names the field, Unimplemented for a pod with a kernel
        of its own: its size is that of its start, which its runtime changes with the containers'.
        """
        pod = self._listed(request.pod_sandbox_id)
        if self._handlers.of(pod.handler).has_guest_kernel:
            name = revisions.name_of(pod.handler)
            raise errors.Unimplemented(f"handler {name}: a pod's resources are those of its start")
        spec.check_pod_update(request, self._handlers.facts(pod.handler))
        async with self._locks.held(pod.id):
            pod = self._store.pod(pod.id)
            if request.HasField("overhead"):
                pod = dataclasses.replace(pod, overhead=state.raw_limits(request.overhead))
            if request.HasField("resources"):
                pod = dataclasses.replace(pod, resources=state.raw_limits(request.resources))
            await self._store.put_pod(pod)

    # -- death behind our back --------------------------------------------------------------------

    def watch(self, pod: state.Pod) -> None:
        """Notice when the pod's shim or its sandbox container ends."""
        self._shims.watch(pod, self._sandbox_ended)

    async def _sandbox_ended(self, pod_id: str) -> None:
        """Report a pod whose shim, sandbox container or network namespace is gone as NOTREADY, with
        nothing in it running. The root of a task of its own.
        """
        try:
            await self._end(pod_id)
        except Exception as e:
            log.error("pod sandbox ended by itself, its end did not", pod=pod_id, error=repr(e))

    async def _end(self, pod_id: str) -> None:
        async with self._locks.held(pod_id):
            with contextlib.suppress(errors.NotFound):
                pod = self._store.pod(pod_id)
                if pod.state is state.PodState.READY:
                    log.warning("pod sandbox ended by itself", pod=pod_id)
                    await self._note_stopped(pod)
                    await self._containers.stop_all(pod_id)
                    if not await self._shims.reconnect(pod_id):
                        await self._kill_sandbox(pod)

    async def give_up(self, pod_id: str) -> None:
        """List a pod that could not be recovered as NOTREADY, so that the kubelet removes it."""
        with contextlib.suppress(errors.NotFound):
            pod = self._store.pod(pod_id)
            half_made = pod.state is state.PodState.CREATING
            now = state.PodState.FAILED if half_made else state.PodState.STOPPED
            await self._store.note_pod(
                dataclasses.replace(pod, state=now, stopped_at=time.time_ns())
            )
            if not half_made:
                self._events.publish(events.STOPPED, pod.id, pod=pod.id)

    def held(self, pod_id: str) -> contextlib.AbstractAsyncContextManager[None]:
        """Keep stops and removals of a pod waiting for a block; for recovery."""
        return self._locks.held(pod_id)

    def unrecorded(self, pod_id: str) -> state.Pod:
        """Return a record to release a pod by, when its own is lost."""
        unknown = api.PodSandboxConfig()
        pod = state.new_pod(unknown, runtime_handler="", handler="", now=0)
        handler = self._settings.runtime.default
        return dataclasses.replace(pod, id=pod_id, handler=handler, network={})

    async def check_networks(self) -> None:
        """Stop the pods whose network namespace was taken away from outside (hazards R13).

        Waits for none of them: one that cannot be killed must not hide the next.
        """
        for pod in self._store.pods():
            if pod.state is state.PodState.READY and pod.netns and not netns.exists(pod.netns):
                task = asyncio.create_task(self._sandbox_ended(pod.id), name=f"end {pod.id[:13]}")
                self._ending.add(task)
                task.add_done_callback(self._ending.discard)

    async def close(self) -> None:
        """Give up the pods in creation, before what their undo needs is closed."""
        await self._attempts.close()

    # -- look -------------------------------------------------------------------------------------

    def status(self, pod_id: str) -> api.PodSandboxStatus:
        """Return the CRI status. Raises NotFound."""
        return podstatus.status(self._listed(pod_id))

    def list(self, selector: api.PodSandboxFilter) -> Sequence[api.PodSandbox]:
        """Return the pods that match every part of the filter; an unknown id matches none."""
        return [podstatus.item(p) for p in self.matching(selector)]

    def matching(self, selector: api.PodSandboxFilter) -> Sequence[state.Pod]:
        """Return the records behind `list`."""
        return [p for p in self._store.pods() if podstatus.matches(p, selector)]

    def record(self, pod_id: str) -> state.Pod:
        """Return the record behind a listed pod. Raises NotFound."""
        return self._listed(pod_id)

    def _listed(self, pod_id: str) -> state.Pod:
        pod = self._store.pod(pod_id)
        if not podstatus.visible(pod):
            raise errors.NotFound(f"pod sandbox {pod_id[:80]!r} not found")
        return pod

    # -- what the shim and the CNI plugins are asked ----------------------------------------------

    def _sandbox_request(self, pod: state.Pod) -> shim_pb2.CreateSandboxRequest:
        request = self._release_request(pod)
        request.hostname = podfiles.own_hostname(pod)
        mapped = spec.ids(pod.config)
        if mapped is None:
            request.network_path = ""  # it is there already
            request.sysctls.update(self._sysctls(pod, network=False))
            return request
        every = spec.sysctls(pod.config)
        request.sysctls.update({n: v for n, v in every.items() if not netns.is_of_device(n)})
        request.uid_mappings.add(host_id=mapped.uid, size=mapped.uids)
        request.gid_mappings.add(host_id=mapped.gid, size=mapped.gids)
        return request

    def _sysctls(self, pod: state.Pod, *, network: bool, device: bool = False) -> dict[str, str]:
        """Return the sysctls of the pod's network namespace, apart those of its `device`, or those
        of the others; none for a virtual machine, which sets them itself (`spec.sandbox`).
        """
        if self._handlers.of(pod.handler).is_machine:
            return {}
        every = spec.sysctls(pod.config)
        wanted = (network, device)
        return {
            name: value
            for name, value in every.items()
            if (name.startswith("net."), netns.is_of_device(name)) == wanted
        }

    def _release_request(self, pod: state.Pod) -> shim_pb2.CreateSandboxRequest:
        """Return what names the namespaces; all that the shim needs to release them."""
        pins = self._files.namespaces(pod)
        return shim_pb2.CreateSandboxRequest(
            network_path=pins.get("network", ""),
            uts_path=pins.get("uts", ""),
            ipc_path=pins.get("ipc", ""),
            user_path=pins.get("user", ""),
        )

    def _attachment(self, pod: state.Pod) -> cni.Attachment:
        m = pod.config.metadata
        return cni.Attachment(
            pod_id=pod.id,
            netns=pod.netns,
            name=m.name,
            namespace=m.namespace,
            uid=m.uid,
            port_mappings=tuple(pod.config.port_mappings),
            dns=pod.config.dns_config,
            annotations=dict(pod.config.annotations),
            cgroup_parent=pod.config.linux.cgroup_parent,
            result=pod.network or {},
        )


def _owes(pod: state.Pod) -> bool:
    """Say whether nothing of a pod runs any more but its network was never given back."""
    ended = pod.state in (state.PodState.STOPPED, state.PodState.FAILED)
    return ended and pod.network is not None and not pod.shim_pid
