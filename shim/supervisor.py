# SPDX-License-Identifier: Apache-2.0
"""One pod: its namespaces and its containers.

What the shim knows is here and in the containers, in memory; what must outlive it is in exit
records, logs and mounts. A verb that fails leaves things as they were, or says in the container's
state what became of it.
"""

from shim import container, diagnostics, errors, loop, oom, reaper, runtimes, sandbox


class Supervisor:
    """The pod of this shim. Verbs on one object wait for each other; different objects do not."""

    def __init__(self, children: reaper.Reaper) -> None:
        self.runtime: runtimes.Runtime  # set once, before the first verb
        self._children = children
        self._ledger = oom.Ledger()
        self._containers: dict[str, container.Container] = {}
        self._lock = loop.Lock()
        self.ending = loop.Event()

    # ---- the sandbox

    async def create_sandbox(self, wanted: sandbox.Namespaces) -> None:
        """Make the namespaces and what the runtime has for a pod, or nothing."""
        async with self._lock:
            await sandbox.create(wanted, self._children)
            try:
                await self.runtime.prepare()
            except BaseException:
                self._release(wanted)
                raise

    async def stop_sandbox(self, paths: list[str]) -> None:
        """Kill every process of the pod, then release its namespaces. Raises the first failure,
        after all.
        """
        async with self._lock:
            stops = [loop.spawn(self._stop(one), name="stop") for one in self.list()]
            failures = [error for stop in stops if (error := await stop.join())]
            try:
                sandbox.release(paths)
            except OSError as error:
                failures.append(errors.Internal(f"cannot release a namespace: {error}"))
            if failures:
                raise failures[0]

    def shut_down(self) -> None:
        """End the shim soon. Raises FailedPrecondition while a container runs."""
        for one in self.list():
            if one.state in (container.State.STARTING, container.State.RUNNING):
                raise errors.FailedPrecondition(f"container {one.spec.id} is {one.state}")
        self.ending.set()

    # ---- containers

    def create(self, spec: container.Spec) -> None:
        """Take a container over. Raises FailedPrecondition when there is one of that id."""
        if spec.id in self._containers:
            raise errors.FailedPrecondition(f"container {spec.id} exists already")
        self._containers[spec.id] = self._make(spec)

    def get(self, container_id: str) -> container.Container:
        """Return a container. Raises NotFound."""
        if container_id not in self._containers:
            raise errors.NotFound(f"container {container_id} is not known to this shim")
        return self._containers[container_id]

    def list(self) -> list[container.Container]:
        """Return all containers, the oldest first: the sandbox container, if there is one."""
        return list(self._containers.values())

    async def delete(self, container_id: str) -> container.Container | None:
        """End and forget a container; return what it was, None when it is not known."""
        try:
            one = self.get(container_id)
        except errors.NotFound:
            return None
        await one.delete()
        self._containers.pop(container_id, None)
        return one

    # ---- inside

    def _make(self, spec: container.Spec) -> container.Container:
        first = next(iter(self.list()), None) if self.runtime.shares_kernel else None
        return container.Container(spec, runtime=self.runtime, ledger=self._ledger, kernel=first)

    async def _stop(self, one: container.Container) -> errors.ShimError | None:
        """End a container and let the runtime forget it; its record stays until `delete`."""
        try:
            await one.end()
        except errors.ShimError as error:
            diagnostics.report("cannot end a container", container=one.spec.id, error=error.message)
            return error
        return None

    def _release(self, wanted: sandbox.Namespaces) -> None:
        try:
            sandbox.release(wanted.paths.values())
        except OSError as error:  # `create_sandbox` fails for the first reason.
            diagnostics.report("cannot undo a sandbox", error=error)
