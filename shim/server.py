# SPDX-License-Identifier: Apache-2.0
"""The shim's service: messages in, one call to the supervisor, messages out. No decision is made
here.

`Shim.serve` is where a forked shim begins and ends. Errors travel by their code; see
`shim.ttrpc.server`.
"""

import contextlib
import os
import signal
import socket
from collections.abc import Iterable, Iterator

from google.protobuf.message import Message

from shim import (
    attach,
    container,
    diagnostics,
    errors,
    exec,
    loop,
    process,
    reaper,
    runtimes,
    sandbox,
    supervisor,
)
from shim.pb import shim_pb2 as pb
from shim.runtimes import oci, sandboxed
from shim.ttrpc import server as ttrpc

SERVICE = "shim.v1.Shim"
VERSION = 1
DEFAULT_TIMEOUT = 120.0  # seconds for one call of an OCI runtime
_ANSWER_SECONDS = 5.0
_ANSWER_LIMIT = 65536
_REHEARSALS = 8


class Shim:
    """All of a shim but its pod. The zygote makes one; each fork of it takes a pod over and serves.

    So its memory is there once, and the forks share it.
    """

    def __init__(self) -> None:
        self.children = reaper.Reaper()
        self._pod = supervisor.Supervisor(self.children)
        self._service = Service(self._pod)
        self._ttrpc = ttrpc.Server(SERVICE, self._service.methods())

    async def rehearse(self) -> None:
        """Live through the life of a container that does nothing, so that what Python does once
        (caches, specialised code) is done here and shared: 0.07 MB less for every shim.
        """
        directory = f"/tmp/cri-zygote-{os.urandom(8).hex()}"  # noqa: S108 - mkdir makes or fails
        os.mkdir(directory, 0o700)
        ours, theirs = socket.socketpair()
        connection = self._ttrpc.connect(theirs.detach())
        self._pod.runtime = make_runtime(_no_runtime(directory), self.children)
        with ours:
            for number, (method, request) in enumerate(_rehearsal(directory) * _REHEARSALS):
                ours.send(ttrpc.call(2 * number + 1, SERVICE, method, request.SerializeToString()))
                await loop.readable(ours.fileno())
                ours.recv(_ANSWER_LIMIT)
        await connection.join()
        for name in os.listdir(directory):
            os.unlink(os.path.join(directory, name))
        os.rmdir(directory)

    async def serve(
        self, listener: socket.socket, told: pb.ForkRequest, *, program: int = -1
    ) -> None:
        """Be the shim of a pod until it is told to end. The listener stays the caller's."""
        os.umask(0o022)  # What runtimes and containers inherit is ours to choose.
        diagnostics.set_context(pod=told.pod_id)
        loop.set_error_hook(_report)
        self._service.pod_id = told.pod_id
        self._pod.runtime = make_runtime(
            told.handler, self.children, pod_id=told.pod_id, program=program
        )
        loop.spawn(self.children.run(), name="reaper")
        accepting = loop.spawn(self._ttrpc.serve(listener), name="accept")
        await self._pod.ending.wait()
        accepting.cancel()
        await self._pod.runtime.close()
        for pid in list(process.descendants(os.getpid())):  # what a runtime has left behind
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        await self._ttrpc.drain(seconds=_ANSWER_SECONDS)


def _no_runtime(directory: str) -> pb.Handler:
    """Return a handler whose every command succeeds and does nothing."""
    return pb.Handler(name="none", kind="oci", path="true", root=directory)


def _rehearsal(directory: str) -> list[tuple[str, Message]]:
    """Return the calls of a pod's life; the start fails, as `true` leaves no pid."""
    log_path = os.path.join(directory, "log")
    return [
        ("Ping", pb.PingRequest()),
        ("CreateSandbox", pb.CreateSandboxRequest()),
        ("Create", pb.CreateRequest(id="x", bundle=directory, log_path=log_path)),
        ("Start", pb.StartRequest(id="x")),
        ("Wait", pb.WaitRequest(id="x")),
        ("State", pb.StateRequest()),
        ("Delete", pb.DeleteRequest(id="x")),
    ]


def preload(kind: str) -> None:
    """Import what only the shims of one kind of handler need, for them to share."""
    if kind == "shim":
        import shim.runtimes.shimv2  # noqa: F401


def make_runtime(
    handler: pb.Handler, children: reaper.Reaper, *, pod_id: str = "", program: int = -1
) -> runtimes.Runtime:
    """Return the runtime of a handler. Options: `timeout`, seconds for one call of it, 120;
    `cgroup_driver`, cgroupfs or systemd; `args`, flags for each call, one a line; `dialect`,
    which command line it is, else the program's name tells; `program`, of which state of its file
    the descriptor `program` is a copy (`sealed`); others are those of a containerd shim.

    Raises InvalidArgument for a kind that this shim does not speak.
    """
    timeout = float(handler.options.get("timeout", "") or DEFAULT_TIMEOUT)
    if handler.kind == "shim":
        from shim.runtimes import shimv2  # see `preload`

        return shimv2.ShimV2(
            handler.name,
            handler.path,
            handler.root,
            pod_id=pod_id,
            options=handler.options,
            children=children,
            timeout=timeout,
        )
    if handler.kind != "oci":
        raise errors.InvalidArgument(f"handler {handler.name}: no runtime of kind {handler.kind!r}")
    dialect = oci.dialect_of(handler.options.get("dialect", "") or handler.name, handler.path)
    make = sandboxed.Sandboxed if dialect.sandboxed else oci.Oci
    return make(
        handler.path,
        handler.root,
        dialect=dialect,
        children=children,
        timeout=timeout,
        systemd=handler.options.get("cgroup_driver") == "systemd",
        args=handler.options.get("args", "").splitlines(),
        handler=handler.name,
        copied=(program, handler.options.get("program", "")),
    )


class Service:
    """The methods of shim.v1.Shim, in the order of shim.proto."""

    def __init__(self, pod: supervisor.Supervisor) -> None:
        self.pod_id = ""
        self._pod = pod

    def methods(self) -> dict[str, ttrpc.Method]:
        """Return the table that the ttrpc server dispatches by."""
        unary = ttrpc.Unary
        return {
            "Ping": unary(request=pb.PingRequest, handler=self.ping),
            "CreateSandbox": unary(request=pb.CreateSandboxRequest, handler=self.create_sandbox),
            "StopSandbox": unary(request=pb.StopSandboxRequest, handler=self.stop_sandbox),
            "Shutdown": unary(request=pb.ShutdownRequest, handler=self.shutdown),
            "Create": unary(request=pb.CreateRequest, handler=self.create),
            "Start": unary(request=pb.StartRequest, handler=self.start),
            "State": unary(request=pb.StateRequest, handler=self.state),
            "Kill": unary(request=pb.KillRequest, handler=self.kill),
            "Wait": unary(request=pb.WaitRequest, handler=self.wait),
            "Delete": unary(request=pb.DeleteRequest, handler=self.delete),
            "Update": unary(request=pb.UpdateRequest, handler=self.update),
            "Stats": unary(request=pb.StatsRequest, handler=self.stats),
            "ReopenLog": unary(request=pb.ReopenLogRequest, handler=self.reopen_log),
            "Exec": ttrpc.Streaming(request=pb.ExecInput, handler=self.exec),
            "Attach": ttrpc.Streaming(request=pb.AttachInput, handler=self.attach),
        }

    async def ping(self, _: pb.PingRequest) -> pb.PingResponse:
        return pb.PingResponse(pod_id=self.pod_id, pid=os.getpid(), version=VERSION)

    async def create_sandbox(self, request: pb.CreateSandboxRequest) -> pb.CreateSandboxResponse:
        await self._pod.create_sandbox(_namespaces(request))
        return pb.CreateSandboxResponse()

    async def stop_sandbox(self, request: pb.StopSandboxRequest) -> pb.StopSandboxResponse:
        await self._pod.stop_sandbox(list(_paths(request.sandbox).values()))
        return pb.StopSandboxResponse()

    async def shutdown(self, _: pb.ShutdownRequest) -> pb.ShutdownResponse:
        self._pod.shut_down()
        return pb.ShutdownResponse()

    async def create(self, request: pb.CreateRequest) -> pb.CreateResponse:
        self._pod.create(
            container.Spec(
                id=request.id,
                bundle=request.bundle,
                log_path=request.log_path,
                terminal=request.terminal,
                stdin=request.stdin,
                stdin_once=request.stdin_once,
                cgroups=dict(request.cgroups),
                owner=(request.uid, request.gid),
            )
        )
        return pb.CreateResponse()

    async def start(self, request: pb.StartRequest) -> pb.StartResponse:
        return await self._pod.get(request.id).start()

    async def state(self, request: pb.StateRequest) -> pb.StateResponse:
        found = [self._pod.get(request.id)] if request.id else self._pod.list()
        return pb.StateResponse(containers=[one.describe() for one in found])

    async def kill(self, request: pb.KillRequest) -> pb.KillResponse:
        await self._pod.get(request.id).kill(request.signal, everything=request.all)
        return pb.KillResponse()

    async def wait(self, request: pb.WaitRequest) -> pb.WaitResponse:
        return pb.WaitResponse(exit=await self._pod.get(request.id).wait())

    async def delete(self, request: pb.DeleteRequest) -> pb.DeleteResponse:
        gone = await self._pod.delete(request.id)
        return pb.DeleteResponse(exit=gone.exit if gone else None)

    async def update(self, request: pb.UpdateRequest) -> pb.UpdateResponse:
        await self._pod.get(request.id).update(request.resources)
        return pb.UpdateResponse()

    async def stats(self, request: pb.StatsRequest) -> pb.StatsResponse:
        type_url, value = await self._pod.get(request.id).stats()
        return pb.StatsResponse(type_url=type_url, value=value)

    async def reopen_log(self, request: pb.ReopenLogRequest) -> pb.ReopenLogResponse:
        self._pod.get(request.id).reopen_log()
        return pb.ReopenLogResponse()

    async def exec(self, stream: ttrpc.Stream) -> None:
        first = await stream.recv()
        _check_start(first)
        start = first.start
        await exec.Exec(self._pod.get(start.id), start, stream).run()

    async def attach(self, stream: ttrpc.Stream) -> None:
        first = await stream.recv()
        _check_start(first)
        start = first.start
        await attach.attach(self._pod.get(start.id), start, stream)


def _check_start(message: pb.ExecInput | pb.AttachInput | None) -> None:
    if message is None or message.WhichOneof("input") != "start":
        raise errors.InvalidArgument("the first input must be `start`")


def _paths(request: pb.CreateSandboxRequest) -> dict[str, str]:
    """Return the namespaces that are the pod's own, user first, for it owns the others."""
    paths = {
        "user": request.user_path,
        "net": request.network_path,
        "ipc": request.ipc_path,
        "uts": request.uts_path,
    }
    return {kind: path for kind, path in paths.items() if path}


def _namespaces(request: pb.CreateSandboxRequest) -> sandbox.Namespaces:
    given = {bool(m) for m in (request.user_path, request.uid_mappings, request.gid_mappings)}
    if len(given) > 1:
        raise errors.InvalidArgument("user_path, uid_mappings, gid_mappings: all or none")
    return sandbox.Namespaces(
        paths=_paths(request),
        hostname=request.hostname,
        sysctls=dict(request.sysctls),
        uid_map=_map(request.uid_mappings),
        gid_map=_map(request.gid_mappings),
    )


def _map(mappings: Iterable[pb.IdMapping]) -> str:
    return "".join(f"{m.container_id} {m.host_id} {m.size}\n" for m in mappings)


def _report(task: str, error: BaseException) -> None:
    diagnostics.report("task failed", task=task, error=repr(error), at=list(_lines(error)))


def _lines(error: BaseException) -> Iterator[str]:
    step = error.__traceback__
    while step is not None:
        yield f"{step.tb_frame.f_code.co_filename}:{step.tb_lineno}"
        step = step.tb_next
