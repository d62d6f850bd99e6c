# SPDX-License-Identifier: Apache-2.0
"""The connection to a pod's containerd shim: started when it is needed, asked, buried when lost.

    our shim ──ttrpc: Task v2 or v3, Sandbox──► containerd-shim-x-v2
        ▲                                               │
        └──────ttrpc: Events.Forward; gRPC: refused─────┘

A shim that is lost takes its containers with it: `bury` kills whatever it had started. A later
`start` begins with a new one.
"""

import contextlib
import os
import socket
from typing import TypeVar

from google.protobuf import empty_pb2
from google.protobuf.message import DecodeError, Message

from shim import binary, errors, loop, process, runtimes
from shim.pb.containerd import events_pb2, task_events_pb2, task_v2_pb2
from shim.runtimes import bootstrap, refusals
from shim.ttrpc import address, caller, server

R = TypeVar("R", bound=Message)

SANDBOX = "containerd.runtime.sandbox.v1.Sandbox"
HANDLERS_OWN = -1.0  # a timeout: the handler's
_EVENTS = "containerd.services.events.ttrpc.v1.Events"
_CONNECT_SECONDS = 10.0
_SHUTDOWN_SECONDS = 5.0


class Link:
    """The shim of one pod. Errors name handler and binary, unless they are the shim's own words."""

    def __init__(self, launcher: bootstrap.Launcher, *, pod_id: str, timeout: float) -> None:
        self.launcher = launcher
        self.version = 0  # of the Task API
        self.pid = 0  # what it says of itself
        self._pod_id = pod_id
        self._timeout = timeout
        self._lock = loop.Lock()
        self._connection: caller.Connection | None = None
        self._listening: list[loop.Task[None]] = []
        self._killed: set[str] = set()  # containers in which something was killed for memory

    @property
    def alive(self) -> bool:
        """Whether there is a shim that can be asked."""
        return self._connection is not None and not self._connection.closed.is_set()

    async def start(self, bundle: str) -> None:
        """Start the shim and connect to it, unless that is done; leave nothing when it fails."""
        async with self._lock:
            if self.alive:
                return
            try:
                if self._connection:
                    await self.bury()
                self._listen()
                answer = await self.launcher.start(bundle)
                self.version = answer.version
                await self._connect(answer.address)
            except BaseException:
                await self.bury()
                raise

    async def ask(
        self,
        method: str,
        request: Message,
        response: type[R],
        *,
        timeout: float | None = HANDLERS_OWN,
        service: str = "",
    ) -> R:
        """Call a service, the Task service if none is named. Raises what came back, and Unavailable
        or DeadlineExceeded. A timeout of None is for ever.
        """
        connection = self._connection
        if connection is None or connection.closed.is_set():
            raise errors.Unavailable(self.named("has ended"))
        service = service or f"containerd.task.v{self.version}.Task"
        limit = self._timeout if timeout == HANDLERS_OWN else timeout
        try:
            return await connection.call(service, method, request, response, timeout=limit)
        except (errors.DeadlineExceeded, errors.Internal, errors.Unavailable) as error:
            if connection.closed.is_set():
                raise errors.Unavailable(self._lost(method)) from error
            raise type(error)(self.named(f"{method}: {error.message}")) from error
        except errors.ShimError as error:
            raise type(error)(runtimes.last_error(error.message.encode())) from error

    async def bury(self) -> None:
        """Kill what is left of a shim that is lost or that does not do as it is told."""
        if self._connection is not None:
            self._connection.close()
            await self._connection.closed.wait()
            self._connection = None
        await self.launcher.bury()

    async def close(self) -> None:
        """Have the shim end, kill it when it does not, and remove its home."""
        connection = self._connection
        if connection is not None and self.alive:
            request = task_v2_pb2.ShutdownRequest(id=self._pod_id, now=True)
            # It may end before it has answered.
            with contextlib.suppress(errors.ShimError, TimeoutError):
                async with loop.timeout(_SHUTDOWN_SECONDS):
                    await self.ask("Shutdown", request, empty_pb2.Empty)
                    await connection.closed.wait()
        await self.bury()
        for listening in self._listening:
            listening.cancel()
        self.launcher.remove()

    def named(self, what: str) -> str:
        """Return a message that says who it is about."""
        return self.launcher.named(what)

    def was_killed(self, container_id: str) -> bool:
        """Say whether the shim has told of an OOM kill in the container."""
        return container_id in self._killed

    def forget(self, container_id: str) -> None:
        """Remember a container no more."""
        self._killed.discard(container_id)

    # ---- connecting

    async def _connect(self, name: str) -> None:
        metadata = {"containerd-namespace-ttrpc": binary.NAMESPACE}
        try:
            self._connection = await caller.connect(
                name, timeout=_CONNECT_SECONDS, metadata=metadata
            )
        except errors.Unavailable as error:
            raise errors.Unavailable(self.named(error.message)) from error
        request = task_v2_pb2.ConnectRequest(id=self._pod_id)
        try:
            found = await self.ask("Connect", request, task_v2_pb2.ConnectResponse)
        except (errors.DeadlineExceeded, errors.Unavailable, errors.Unimplemented, caller.Garbage):
            raise
        except errors.ShimError:
            return  # some know nothing of a pod that has no container yet
        self.pid = found.shim_pid
        if found.shim_pid and not is_ours(found.shim_pid):
            text = f"says that it is process {found.shim_pid}, which is another's"
            raise errors.FailedPrecondition(self.named(text))

    def _lost(self, method: str) -> str:
        words = self.launcher.last_words()
        return self.named(f"ended during {method}" + (f": {words}" if words else ""))

    # ---- being containerd

    def _listen(self) -> None:
        """Take the events that shims send, for one whose events nobody takes keeps them for ever;
        and be the containerd that some want to reach.
        """
        if self._listening:
            return
        self.launcher.settle()
        events, grpc = self._listener(bootstrap.EVENTS), self._listener(binary.GRPC)
        self._listening = [
            loop.spawn(self._take_events(events), name="events"),
            loop.spawn(self._refuse(grpc), name="gRPC"),
        ]

    def _listener(self, name: str) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX)
        with address.usable(os.path.join(self.launcher.home, name)) as usable:
            listener.bind(usable)
        listener.listen()
        return listener

    async def _refuse(self, listener: socket.socket) -> None:
        with contextlib.suppress(loop.Cancelled):
            await refusals.serve(listener)

    async def _take_events(self, listener: socket.socket) -> None:
        forward = server.Unary(request=events_pb2.ForwardRequest, handler=self._take)
        with listener, contextlib.suppress(loop.Cancelled):
            await server.Server(_EVENTS, {"Forward": forward}).serve(listener)

    async def _take(self, request: events_pb2.ForwardRequest) -> empty_pb2.Empty:
        """Remember OOM kills; of exits `Wait` tells."""
        if request.envelope.topic == "/tasks/oom":
            with contextlib.suppress(DecodeError):
                event = task_events_pb2.TaskOOM.FromString(request.envelope.event.value)
                self._killed.add(event.container_id)
        return empty_pb2.Empty()


def is_ours(pid: int) -> bool:
    """Say whether a process descends from this one, the subreaper of all that a shim starts."""
    try:
        return process.descends(pid, os.getpid())
    except ProcessLookupError:
        return False
