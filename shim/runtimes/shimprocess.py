# SPDX-License-Identifier: Apache-2.0
"""What a containerd shim has started, as `runtimes.Process`: a container's init, an exec, a
sandbox.

The shim is asked to wait, to signal and to resize. No process is signalled by a number that a shim
told, but for the tree of an exec that is seen to be in a container: the Task API knows only its
first process. When the shim is lost, nothing lives any more that it had started.
"""

import contextlib
import os
import signal
from collections.abc import AsyncIterator, Iterator

from google.protobuf import empty_pb2

from shim import diagnostics, errors, loop, process, runtimes
from shim.pb.containerd import sandbox_pb2, task_v2_pb2
from shim.runtimes import shimlink

# Less than what a container is given to end (shim.container).
_KILL_SECONDS, _SILENCE_SECONDS = 6.0, 4.0
END_SECONDS = 10.0
_TRIES, _PAUSE = 50, 0.01


class _Process:
    """A pid that was told, and the shim that told it."""

    def __init__(self, link: shimlink.Link, container_id: str, pid: int) -> None:
        self.pid = pid
        self.start_time = start_time(pid)
        self._link = link
        self._container_id = container_id

    @property
    def oom_killed(self) -> bool:
        """Whether the shim has told of an OOM kill."""
        return self._link.was_killed(self._container_id)

    async def resize(self, width: int, height: int) -> None:
        """Do nothing: no terminal."""

    async def close_stdin(self) -> None:
        """Do nothing: no stdin."""

    async def forget(self) -> None:
        """Do nothing: no exec."""

    @contextlib.asynccontextmanager
    async def _waiting(self) -> AsyncIterator[None]:
        """Bury the shim when a wait fails since it is lost."""
        try:
            yield
        except errors.ShimError:
            if not self._link.alive:
                await self._link.bury()
                await self._end_stranded()
            raise

    async def _end_stranded(self) -> None:
        """Kill what a lost shim has left, which need not be in the cgroup that was asked for, and
        see it end, half a second at most.
        """
        who = process.Identity(self.pid, self.start_time)
        for _ in range(_TRIES):
            if not (process.alive(*who) and shimlink.is_ours(who.pid)):
                return
            process.kill_tree(who)
            await loop.sleep(_PAUSE)

    @contextlib.asynccontextmanager
    async def _killing(self, signum: int, exec_id: str = "") -> AsyncIterator[None]:
        """Take it as done when it has ended; a shim that does not pass SIGKILL on in time, or not
        to an init, is killed itself.
        """
        try:
            yield
        except (errors.NotFound, errors.Unavailable):
            return
        except errors.ShimError as error:
            if signum != signal.SIGKILL:
                raise
            diagnostics.report(
                "not killed", container=self._container_id, exec=exec_id, error=error.message
            )
            if isinstance(error, errors.DeadlineExceeded) or not exec_id:
                await self._link.bury()


class Task(_Process):
    """A container's init (no `exec_id`) or an exec."""

    def __init__(self, link: shimlink.Link, container_id: str, exec_id: str, pid: int) -> None:
        super().__init__(link, container_id, pid)
        self._ids = {"id": container_id, "exec_id": exec_id}
        self._over = False
        self._insisting = False

    async def wait(self) -> int:
        """Return the exit code. Raises Unavailable when the shim is lost."""
        request = task_v2_pb2.WaitRequest(**self._ids)
        try:
            async with self._waiting():
                ended = await self._link.ask(
                    "Wait", request, task_v2_pb2.WaitResponse, timeout=None
                )
        finally:
            self._over = True
        return runtimes.exit_status(ended.exit_status)

    async def signal(self, signum: int) -> None:
        """Send a signal. Raises InvalidArgument for a number that is none."""
        if signum not in range(signal.NSIG):
            raise errors.InvalidArgument(f"cannot send signal {signum}")
        await self._kill(signum)

    async def kill_tree(self) -> None:
        """Kill it; an init with all that is in its container, an exec with what it has started."""
        if self._ids["exec_id"]:
            with _tree(self.pid, self.start_time):
                await self._kill(signal.SIGKILL)
        else:
            await self._kill(signal.SIGKILL, everything=True)

    async def resize(self, width: int, height: int) -> None:
        """Set the size of its terminal."""
        request = task_v2_pb2.ResizePtyRequest(**self._ids, width=width, height=height)
        await self._link.ask("ResizePty", request, empty_pb2.Empty)

    async def close_stdin(self) -> None:
        """Have the shim close its own end of the stdin FIFO."""
        request = task_v2_pb2.CloseIORequest(**self._ids, stdin=True)
        await self._link.ask("CloseIO", request, empty_pb2.Empty)

    async def _kill(self, signum: int, *, everything: bool = False) -> None:
        request = task_v2_pb2.KillRequest(**self._ids, signal=signum, all=everything)
        async with self._killing(signum, self._ids["exec_id"]):
            await self._link.ask("Kill", request, empty_pb2.Empty, timeout=_KILL_SECONDS)
        if signum == signal.SIGKILL and self.start_time and not self._insisting:
            self._insisting = True
            loop.spawn(self._insist(), name="insist")

    async def _insist(self) -> None:
        """Bury a shim that does not tell of an end that everybody can see."""
        await loop.sleep(_SILENCE_SECONDS)
        if not self._over and self._link.alive and not process.alive(self.pid, self.start_time):
            diagnostics.report("containerd shim killed: it tells of no end", **self._ids)
            await self._link.bury()

    async def forget(self) -> None:
        """Have the shim remember an exec no more; runc's cuts off what it has not copied within two
        seconds from then.
        """
        if not self._ids["exec_id"]:
            return
        request = task_v2_pb2.DeleteRequest(**self._ids)
        with contextlib.suppress(errors.ShimError):
            await self._link.ask("Delete", request, task_v2_pb2.DeleteResponse, timeout=END_SECONDS)


class Sandbox(_Process):
    """A sandbox of the Sandbox API: it can be stopped, and that is all."""

    async def wait(self) -> int:
        """Return the exit code. Raises Unavailable when the shim is lost."""
        request = sandbox_pb2.WaitSandboxRequest(sandbox_id=self._container_id)
        async with self._waiting():
            ended = await self._link.ask(
                "WaitSandbox",
                request,
                sandbox_pb2.WaitSandboxResponse,
                timeout=None,
                service=shimlink.SANDBOX,
            )
        return runtimes.exit_status(ended.exit_status)

    async def signal(self, signum: int) -> None:
        """Stop it, whatever the signal."""
        await self.kill_tree()

    async def kill_tree(self) -> None:
        """Stop it with all that is in it."""
        request = sandbox_pb2.StopSandboxRequest(sandbox_id=self._container_id)
        async with self._killing(signal.SIGKILL):
            await self._link.ask(
                "StopSandbox",
                request,
                sandbox_pb2.StopSandboxResponse,
                timeout=_KILL_SECONDS,
                service=shimlink.SANDBOX,
            )


@contextlib.contextmanager
def _tree(pid: int, start_time: int) -> Iterator[None]:
    """Kill the descendants of a process after the block, which kills the process, if they are on
    this host and in a container.
    """
    below = list(process.descendants(pid)) if _is_inside(pid, start_time) else []
    held = [(os.pidfd_open(one), one) for one in below if os.path.exists(f"/proc/{one}")]
    yield
    for fd, _ in held:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(fd, signal.SIGKILL)
        os.close(fd)


def _is_inside(pid: int, start_time: int) -> bool:
    """Say whether it is the process that was told, a descendant of ours, and not in the host's
    mount namespace, as shims and virtual machines are.
    """
    try:
        same = os.readlink(f"/proc/{pid}/ns/mnt") == os.readlink("/proc/self/ns/mnt")
    except OSError:
        return False
    return not same and process.alive(pid, start_time) and shimlink.is_ours(pid)


def start_time(pid: int) -> int:
    """Return field 22 of /proc/<pid>/stat, 0 when there is no such process."""
    try:
        return process.start_time(pid) if pid else 0
    except ProcessLookupError:
        return 0
