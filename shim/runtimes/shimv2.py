# SPDX-License-Identifier: Apache-2.0
"""Any containerd-shim-*-v2 (runc-v2, kata, runsc, wasm) as a runtime: one per pod, by its Task API.

    shim ──ttrpc: Task v2 or v3──► containerd-shim-x-v2 ──► containers, a VM
      ▲  ◄────────FIFOs───────────          │
      └──────ttrpc: Events.Forward──────────┘

It is started with the pod, or with its sandbox container, whose config.json tells a shim what the
pod is; it serves all containers, and ends with the pod. What it says is checked before we act on
it: a pid that is not below us is a lie. When it is lost, or does not answer when it must,
everything that it had started is killed, its own `delete` cleans up, and its containers have ended
with 255.

A pod's sandbox container, where there is one, is asked for by the Sandbox API if the shim answered
`start` with version 3 and has that API, else it is a container like others.
"""

import contextlib
import os
from collections.abc import Mapping

from google.protobuf import any_pb2, empty_pb2

from shim import binary, diagnostics, errors, loop, reaper, runtimes
from shim.pb.containerd import sandbox_pb2, task_pb2, task_v2_pb2
from shim.runtimes import bootstrap, shimlink, shimoptions, shimprocess

_SPEC = "types.containerd.io/opencontainers/runtime-spec/1/"
_TRIES, _TRY_SECONDS = 30, 0.1
_SANDBOX_API = 3  # the version of `start`'s answer from which it may be there


class ShimV2:
    """Implements `runtimes.Runtime`. `options` are the handler's, see `shimoptions`."""

    shares_kernel = False
    opens_fifos = True

    def __init__(
        self,
        name: str,
        path: str,
        root: str,
        *,
        pod_id: str,
        options: Mapping[str, str],
        children: reaper.Reaper,
        timeout: float,
    ) -> None:
        self._home = binary.home(root, pod_id)
        self._given, self._options = options, self._packed(options)
        launcher = bootstrap.Launcher(
            name,
            path,
            root,
            pod_id=pod_id,
            children=children,
            timeout=timeout,
            options=self._options if shimoptions.at_start(options) else None,
        )
        self._link = shimlink.Link(launcher, pod_id=pod_id, timeout=timeout)
        self._pod_id = pod_id
        self._has_sandbox = options.get("sandbox") == "container"
        self._bundles: dict[str, str] = {}
        self._is_sandbox = False  # that of the Sandbox API

    # ---- the verbs

    async def prepare(self) -> None:
        """Start the shim, so that one that cannot be started is no pod's."""
        if not self._has_sandbox:
            await self._link.start("")

    async def run(
        self, container_id: str, bundle: str, *, directory: str, stdio: runtimes.Stdio
    ) -> runtimes.Process:
        """Create and start a container; return its init."""
        if container_id in self._bundles:
            raise errors.ShimError(f"container {container_id} exists already")
        await self._link.start(bundle)
        binary.note(self._home, container_id, bundle)
        self._bundles[container_id] = bundle
        if container_id == self._pod_id and self._link.version >= _SANDBOX_API:
            with contextlib.suppress(errors.Unimplemented):
                return await self._run_sandbox(bundle)
        return await self._run_task(container_id, bundle, stdio)

    async def exec(
        self, container_id: str, *, directory: str, cgroup: str, stdio: runtimes.Stdio
    ) -> runtimes.Process:
        """Start the process in `directory`/process.json inside a container."""
        exec_id = os.path.basename(directory)
        spec = any_pb2.Any(type_url=f"{_SPEC}Process", value=_read_process(directory))
        request = task_v2_pb2.ExecProcessRequest(
            id=container_id, exec_id=exec_id, terminal=stdio.terminal, spec=spec
        )
        _name_streams(request, stdio)
        start = task_v2_pb2.StartRequest(id=container_id, exec_id=exec_id)
        try:
            await self._link.ask("Exec", request, empty_pb2.Empty)
            started = await self._link.ask("Start", start, task_v2_pb2.StartResponse)
            return await self._started(container_id, exec_id, started.pid)
        except BaseException:
            loop.spawn(self._abandon(container_id, exec_id), name="abandoned exec")
            raise

    async def update(self, container_id: str, resources: bytes) -> None:
        """Apply LinuxResources (OCI JSON)."""
        packed = any_pb2.Any(type_url=f"{_SPEC}LinuxResources", value=resources)
        request = task_v2_pb2.UpdateTaskRequest(id=container_id, resources=packed)
        await self._link.ask("Update", request, empty_pb2.Empty)

    async def stats(self, container_id: str) -> tuple[str, bytes]:
        """Return what the shim counts: Metrics of containerd's cgroups v1 or v2."""
        request = task_v2_pb2.StatsRequest(id=container_id)
        answer = await self._link.ask("Stats", request, task_v2_pb2.StatsResponse)
        return answer.stats.type_url, answer.stats.value

    async def delete(self, container_id: str) -> None:
        """Remove the container, killing what is left. Nothing happens when it does not exist."""
        bundle = self._bundles.get(container_id)
        if bundle is None:
            return
        if self._link.alive:
            await self._delete(container_id)
        if not self._link.alive:
            await self._link.bury()
            await self._link.launcher.delete(container_id, bundle)
        self._bundles.pop(container_id, None)
        binary.forget(self._home, container_id)
        self._link.forget(container_id)

    def can_split_cgroups(self, controller: str) -> bool:
        """Say no: the Task API has no word for it."""
        return False

    async def close(self) -> None:
        """End the shim and remove its home."""
        await self._link.close()

    # ---- starting

    def _packed(
        self, options: Mapping[str, str], owner: tuple[int, int] = (0, 0)
    ) -> any_pb2.Any | None:
        return shimoptions.packed(options, state=f"{self._home}/runc", owner=owner)

    async def _run_task(
        self, container_id: str, bundle: str, stdio: runtimes.Stdio
    ) -> shimprocess.Task:
        request = task_v2_pb2.CreateTaskRequest(
            id=container_id,
            bundle=bundle,
            terminal=stdio.terminal,
            options=self._packed(self._given, stdio.owner),
        )
        _name_streams(request, stdio)
        created = await self._link.ask("Create", request, task_v2_pb2.CreateTaskResponse)
        start = task_v2_pb2.StartRequest(id=container_id)
        started = await self._link.ask("Start", start, task_v2_pb2.StartResponse)
        return await self._started(container_id, "", started.pid or created.pid)

    async def _run_sandbox(self, bundle: str) -> shimprocess.Sandbox:
        create = sandbox_pb2.CreateSandboxRequest(
            sandbox_id=self._pod_id,
            bundle_path=bundle,
            options=self._options,
            **bootstrap.of_sandbox(bundle),
        )
        await self._link.ask(
            "CreateSandbox", create, sandbox_pb2.CreateSandboxResponse, service=shimlink.SANDBOX
        )
        self._is_sandbox = True
        start = sandbox_pb2.StartSandboxRequest(sandbox_id=self._pod_id)
        started = await self._link.ask(
            "StartSandbox", start, sandbox_pb2.StartSandboxResponse, service=shimlink.SANDBOX
        )
        made = shimprocess.Sandbox(self._link, self._pod_id, started.pid)
        if not (made.start_time and shimlink.is_ours(made.pid)):
            raise self._liar(made.pid)
        return made

    async def _started(self, container_id: str, exec_id: str, pid: int) -> shimprocess.Task:
        """Return a process whose pid is true, or whose end is."""
        made = shimprocess.Task(self._link, container_id, exec_id, pid)
        if made.start_time and shimlink.is_ours(pid):
            return made
        request = task_v2_pb2.StateRequest(id=container_id, exec_id=exec_id)
        with contextlib.suppress(errors.NotFound):
            for _ in range(_TRIES):  # it may have ended, and the shim not know yet
                state = await self._link.ask("State", request, task_v2_pb2.StateResponse)
                if state.status == task_pb2.STOPPED:
                    return made
                if shimprocess.start_time(pid):
                    break
                await loop.sleep(_TRY_SECONDS)
        raise self._liar(pid)

    def _liar(self, pid: int) -> errors.ShimError:
        text = f"says that it has started process {pid}, which is none of its own"
        return errors.Internal(self._link.named(text))

    # ---- ending

    async def _abandon(self, container_id: str, exec_id: str) -> None:
        """End an exec of which it is not known how far it has come: its start may be under way, and
        until then there is nothing to kill.
        """
        request = task_v2_pb2.StateRequest(id=container_id, exec_id=exec_id)
        with contextlib.suppress(errors.ShimError):
            for _ in range(_TRIES):
                state = await self._link.ask("State", request, task_v2_pb2.StateResponse)
                made = shimprocess.Task(self._link, container_id, exec_id, state.pid)
                if state.status == task_pb2.RUNNING:
                    await made.kill_tree()
                else:
                    await made.forget()  # the last thing that it is asked, unless it begins to run
                await loop.sleep(_TRY_SECONDS)

    async def _delete(self, container_id: str) -> None:
        """Remove a container from a living shim, which dies if it cannot."""
        try:
            try:
                await self._ask_delete(container_id)
            except errors.NotFound:
                return
            except errors.ShimError:  # it may run still
                await self._end(container_id)
                await self._ask_delete(container_id)
        except errors.NotFound:
            return
        except (errors.ShimError, TimeoutError) as error:
            diagnostics.report("containerd shim killed", container=container_id, error=str(error))
            await self._link.bury()

    async def _end(self, container_id: str) -> None:
        init = shimprocess.Task(self._link, container_id, "", 0)
        await init.kill_tree()
        async with loop.timeout(shimprocess.END_SECONDS):
            await init.wait()

    async def _ask_delete(self, container_id: str) -> None:
        if container_id == self._pod_id and self._is_sandbox:
            shutdown = sandbox_pb2.ShutdownSandboxRequest(sandbox_id=container_id)
            await self._link.ask(
                "ShutdownSandbox",
                shutdown,
                sandbox_pb2.ShutdownSandboxResponse,
                timeout=shimprocess.END_SECONDS,
                service=shimlink.SANDBOX,
            )
            return
        request = task_v2_pb2.DeleteRequest(id=container_id)
        await self._link.ask(
            "Delete", request, task_v2_pb2.DeleteResponse, timeout=shimprocess.END_SECONDS
        )


def _read_process(directory: str) -> bytes:
    with open(os.path.join(directory, runtimes.PROCESS_FILE), "rb") as file:
        return file.read()


def _name_streams(
    request: task_v2_pb2.CreateTaskRequest | task_v2_pb2.ExecProcessRequest, stdio: runtimes.Stdio
) -> None:
    for stream in ("stdin", "stdout", "stderr"):
        if getattr(stdio, stream) is not None:
            setattr(request, stream, os.path.join(stdio.fifos, stream))
