# SPDX-License-Identifier: Apache-2.0
"""The door of the shim, the only thing that cri_server sees of it: make one, find one, talk to it.

    Zygotes.fork(pod_id, socket_path, handler=...) ─► pid       the shim serves on socket_path
    ShimClient.connect(socket_path) ─► typed verbs, exec_sync, exec, attach

Neither holds anything that matters: a shim outlives the server that forked it, and a new server
finds it by connecting to the socket path and asking `ping`. Every failure is a
`shim.errors.ShimError` with the code that the shim gave; Unavailable when it cannot be reached.
"""

import asyncio
import contextlib
import errno
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from google.protobuf.message import DecodeError

from shim import errors, process
from shim.pb import shim_pb2 as pb
from shim.ttrpc import address
from shim.ttrpc import client as ttrpc

if TYPE_CHECKING:
    from google.protobuf.message import Message

SERVICE = "shim.v1.Shim"
HandlerSpec = pb.Handler

_START_SECONDS = 30.0
_FORK_SECONDS = 10.0
_STOP_SECONDS = 2.0
_MESSAGE_LIMIT = 256 << 10
_BACKLOG = 4096  # an exec is a connection: all probes of a pod may come at once

R = TypeVar("R", bound="Message")


class _ZygoteFailed(errors.Unavailable):
    """Another zygote may do better."""


class Zygote:
    """Forks shims. Starts its process on demand and again when it has died; one fork at a time."""

    def __init__(self, kind: str = "oci", *, stderr: int = 2) -> None:
        """`kind` is that of the handlers whose shims come from here. `stderr` is the descriptor
        that the zygote and its shims write JSON log lines to.
        """
        self._kind, self._stderr = kind, stderr
        self._lock = asyncio.Lock()
        self._child: process.Child | None = None
        self._ready = False  # whether it has said so
        self._socket: socket.socket | None = None
        self._ended = asyncio.Event()
        self._ended.set()

    async def start(self) -> None:
        """Start the process and wait until it is ready. Raises Unavailable; one that is only late
        goes on, and `fork` finds it.
        """
        async with self._lock:
            try:
                await self._ensure()
            except OSError as error:  # also TimeoutError
                raise errors.Unavailable(f"the zygote is not ready: {error!r}") from error

    async def fork(
        self,
        pod_id: str,
        socket_path: str,
        *,
        handler: HandlerSpec,
        program: int = -1,
    ) -> int:
        """Make a shim that serves on `socket_path` and return its pid.

        `program` is a sealed copy of the handler's (shim/sealed.py), and stays the caller's. The
        socket's directory is made when it is missing and is the pod's directory to the shim.
        Asking again for a pod whose shim runs gives that shim's pid. Raises Unavailable.
        """
        told = pb.ForkRequest(pod_id=pod_id, pod_dir=os.path.dirname(socket_path), handler=handler)
        try:
            async with self._lock:
                with contextlib.suppress(_ZygoteFailed):
                    return await self._fork(told, socket_path, program)
                return await self._fork(told, socket_path, program)
        except FileExistsError:  # it may be of the attempt that failed, a moment ago
            return await _pid_of(socket_path, pod_id)
        except OSError as error:  # of the socket
            raise errors.of_the_other(error, "no shim") from error

    async def close(self) -> None:
        """End the process; its shims live on."""
        async with self._lock:
            await self._stop()

    async def _fork(self, told: pb.ForkRequest, socket_path: str, program: int) -> int:
        """Try once, on a new socket. After a failure nothing more comes of it: the zygote is dead,
        and if it had forked a shim before then that one is found on the socket.
        """
        with _listen(socket_path) as listener:
            sent = [listener.fileno(), *([program] if program >= 0 else [])]
            try:
                await self._ensure()
                return await self._ask(told, sent)
            except (OSError, DecodeError, errors.Unavailable) as error:  # also TimeoutError
                await self._kill()
                raise _ZygoteFailed(f"no shim: the zygote failed: {error!r}") from error

    async def _ask(self, told: pb.ForkRequest, descriptors: list[int]) -> int:
        socket.send_fds(self._control(), [told.SerializeToString()], descriptors)
        async with asyncio.timeout(_FORK_SECONDS):
            while True:
                reply = pb.ForkReply.FromString(await self._receive())
                if reply.pod_id == told.pod_id:  # else it is for somebody who was cancelled
                    return reply.pid

    async def _receive(self) -> bytes:
        data = await asyncio.get_running_loop().sock_recv(self._control(), _MESSAGE_LIMIT)
        if not data:
            raise errors.Unavailable("the zygote has ended")
        return data

    def _control(self) -> socket.socket:
        if self._socket is None:
            raise errors.Unavailable("the zygote has ended")
        return self._socket

    async def _ensure(self) -> None:
        if self._child is None:
            await self._launch()
        if not self._ready:
            async with asyncio.timeout(_START_SECONDS):
                await self._receive()
            self._ready = True

    async def _launch(self) -> None:
        await self._stop()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        self._socket = ours
        with theirs:
            argv = _argv(3, self._kind)
            child = process.spawn(argv, fds={3: theirs.fileno()}, stderr=self._stderr)
        self._child, self._ready = child, False
        self._ended.clear()
        asyncio.get_running_loop().add_reader(child.pidfd, self._reap, child)

    def _reap(self, child: process.Child) -> None:
        asyncio.get_running_loop().remove_reader(child.pidfd)
        process.reap(child)
        self._child = None
        self._ended.set()

    async def _stop(self) -> None:
        """Close the socket, which ends the process, and see it reaped."""
        control, self._socket = self._socket, None
        if control is not None:
            control.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_STOP_SECONDS):
                await self._ended.wait()
        await self._kill()

    async def _kill(self) -> None:
        """End the process at once, and see it reaped: what it has not done it will not do later."""
        if self._child is not None:
            signal.pidfd_send_signal(self._child.pidfd, signal.SIGKILL)
            await self._ended.wait()


class Zygotes:
    """A zygote for each kind of handler: what only containerd shims need (3 MiB of protocols) is in
    no other pod's memory, and is not imported anew for each of theirs.
    """

    def __init__(self) -> None:
        self._zygotes: dict[str, Zygote] = {}

    async def start(self, kinds: Iterable[str]) -> None:
        """Start those of these kinds; others start when they are needed. Raises Unavailable."""
        await asyncio.gather(*(self._of(kind).start() for kind in kinds))

    async def fork(
        self, pod_id: str, socket_path: str, *, handler: HandlerSpec, program: int = -1
    ) -> int:
        """Make a shim, see `Zygote.fork`."""
        zygote = self._of(handler.kind)
        return await zygote.fork(pod_id, socket_path, handler=handler, program=program)

    async def close(self) -> None:
        """End the processes; their shims live on."""
        await asyncio.gather(*(zygote.close() for zygote in self._zygotes.values()))

    def _of(self, kind: str) -> Zygote:
        return self._zygotes.setdefault(kind, Zygote(kind))


def _argv(fd: int, kind: str) -> list[str]:
    """Return the zygote's command; by path, so that its code is ours wherever that is."""
    main = os.path.join(os.path.dirname(os.path.abspath(__file__)), "__main__.py")
    return [sys.executable, "-I", main, "zygote", str(fd), kind]


def _listen(path: str) -> socket.socket:
    """Return a listening socket that only root reaches. FileExistsError: a shim serves it."""
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    try:
        with address.usable(path) as name:
            _remove_stale(name)
            listener.bind(name)
            os.chmod(name, 0o600)  # before it listens nobody can connect
        listener.listen(_BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def _remove_stale(name: str) -> None:
    with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(FileNotFoundError):
        probe.setblocking(False)
        try:
            probe.connect(name)
        except ConnectionRefusedError:
            os.unlink(name)
            return
        except BlockingIOError:  # its queue is full
            pass
        raise FileExistsError(errno.EEXIST, "a shim serves there already", name)


async def _pid_of(socket_path: str, pod_id: str) -> int:
    shim = await ShimClient.connect(socket_path)
    try:
        answer = await shim.ping(timeout=_FORK_SECONDS)
    finally:
        shim.close()
    if answer.pod_id != pod_id:
        raise errors.FailedPrecondition(f"{socket_path} belongs to the shim of pod {answer.pod_id}")
    return answer.pid


@dataclass(frozen=True, kw_only=True, slots=True)
class ExecResult:
    """How an exec ended and what it said, each stream cut at the caller's limit."""

    stdout: bytes
    stderr: bytes
    exit_code: int
    timed_out: bool


class ShimClient:
    """One shim. The verbs are those of proto/shim/v1/shim.proto, where they are explained.

    All share one connection, whose loss sets `closed` and ends what is in progress with
    Unavailable; a new client must be connected then. `timeout` is in seconds, None waits for ever;
    a call that is late or cancelled goes on in the shim.
    """

    def __init__(self, socket_path: str, connection: ttrpc.Connection) -> None:
        self.socket_path = socket_path
        self._connection = connection

    @classmethod
    async def connect(cls, socket_path: str) -> "ShimClient":
        """Connect to a shim. Raises Unavailable; says nothing about who it is, `ping` does."""
        return cls(socket_path, await ttrpc.Connection.connect(socket_path))

    @property
    def closed(self) -> "asyncio.Future[None]":
        """Done when the connection is lost or was closed."""
        return self._connection.closed

    def close(self) -> None:
        """Close the connection; the shim goes on."""
        self._connection.close()

    async def call(
        self,
        method: str,
        request: "Message",
        response: type[R],
        *,
        timeout: float | None = None,
    ) -> R:
        """Call any unary method."""
        return await self._connection.call(SERVICE, method, request, response, timeout)

    async def ping(self, *, timeout: float | None = None) -> pb.PingResponse:
        return await self.call("Ping", pb.PingRequest(), pb.PingResponse, timeout=timeout)

    async def create_sandbox(
        self,
        request: pb.CreateSandboxRequest,
        *,
        timeout: float | None = None,
    ) -> pb.CreateSandboxResponse:
        return await self.call("CreateSandbox", request, pb.CreateSandboxResponse, timeout=timeout)

    async def stop_sandbox(
        self,
        request: pb.StopSandboxRequest,
        *,
        timeout: float | None = None,
    ) -> pb.StopSandboxResponse:
        return await self.call("StopSandbox", request, pb.StopSandboxResponse, timeout=timeout)

    async def shutdown(self, *, timeout: float | None = None) -> pb.ShutdownResponse:
        return await self.call(
            "Shutdown", pb.ShutdownRequest(), pb.ShutdownResponse, timeout=timeout
        )

    async def create(
        self,
        request: pb.CreateRequest,
        *,
        timeout: float | None = None,
    ) -> pb.CreateResponse:
        return await self.call("Create", request, pb.CreateResponse, timeout=timeout)

    async def start(
        self,
        request: pb.StartRequest,
        *,
        timeout: float | None = None,
    ) -> pb.StartResponse:
        return await self.call("Start", request, pb.StartResponse, timeout=timeout)

    async def state(
        self,
        request: pb.StateRequest,
        *,
        timeout: float | None = None,
    ) -> pb.StateResponse:
        return await self.call("State", request, pb.StateResponse, timeout=timeout)

    async def stats(
        self,
        request: pb.StatsRequest,
        *,
        timeout: float | None = None,
    ) -> pb.StatsResponse:
        return await self.call("Stats", request, pb.StatsResponse, timeout=timeout)

    async def kill(
        self,
        request: pb.KillRequest,
        *,
        timeout: float | None = None,
    ) -> pb.KillResponse:
        return await self.call("Kill", request, pb.KillResponse, timeout=timeout)

    async def wait(
        self,
        request: pb.WaitRequest,
        *,
        timeout: float | None = None,
    ) -> pb.WaitResponse:
        return await self.call("Wait", request, pb.WaitResponse, timeout=timeout)

    async def delete(
        self,
        request: pb.DeleteRequest,
        *,
        timeout: float | None = None,
    ) -> pb.DeleteResponse:
        return await self.call("Delete", request, pb.DeleteResponse, timeout=timeout)

    async def update(
        self,
        request: pb.UpdateRequest,
        *,
        timeout: float | None = None,
    ) -> pb.UpdateResponse:
        return await self.call("Update", request, pb.UpdateResponse, timeout=timeout)

    async def reopen_log(
        self,
        request: pb.ReopenLogRequest,
        *,
        timeout: float | None = None,
    ) -> pb.ReopenLogResponse:
        return await self.call("ReopenLog", request, pb.ReopenLogResponse, timeout=timeout)

    @contextlib.asynccontextmanager
    async def exec(self) -> AsyncIterator[ttrpc.Stream[pb.ExecOutput]]:
        """Open an exec of its own connection; send ExecInput, `start` first. Leaving the block
        kills it.
        """
        async with self._stream("Exec", pb.ExecOutput) as stream:
            yield stream

    @contextlib.asynccontextmanager
    async def attach(self) -> AsyncIterator[ttrpc.Stream[pb.AttachOutput]]:
        """Open an attach of its own connection; send AttachInput, `start` first. Leaving it
        detaches.
        """
        async with self._stream("Attach", pb.AttachOutput) as stream:
            yield stream

    async def exec_sync(self, start: pb.ExecStart, *, max_bytes: int = 16 << 20) -> ExecResult:
        """Run a process to its end; output over `max_bytes` per stream is read and dropped.

        Cancelling kills the process and its descendants. Raises ShimError when it could not be run.
        """
        stdout, stderr = bytearray(), bytearray()
        async with self.exec() as stream:
            await stream.send(pb.ExecInput(start=start))
            while (output := await stream.recv()) is not None:
                if output.HasField("exit"):
                    return ExecResult(
                        stdout=bytes(stdout),
                        stderr=bytes(stderr),
                        exit_code=output.exit.exit_code,
                        timed_out=output.exit.timed_out,
                    )
                stdout += output.stdout[: max_bytes - len(stdout)]
                stderr += output.stderr[: max_bytes - len(stderr)]
        raise errors.Internal("the shim ended an exec without saying how")

    @contextlib.asynccontextmanager
    async def _stream(self, method: str, response: type[R]) -> AsyncIterator[ttrpc.Stream[R]]:
        connection = await ttrpc.Connection.connect(self.socket_path)
        try:
            yield await connection.stream(SERVICE, method, response)
        finally:
            connection.close()
