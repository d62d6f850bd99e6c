# SPDX-License-Identifier: Apache-2.0
"""OCI runtimes whose containers live in a kernel of the pod's own: gVisor's runsc.

    run --detach     the pod's first container: its pid is that of the kernel, and ends with it
    run --detach     the others: the same pid; `runsc wait` is a child of ours that ends when the
                     container does, and says how
    exec --detach    leaves a process on the host that ends as the one inside does

Signals go by `runsc kill`, one after another in the order in which they were sent. Nothing here is
needed after a shim's death: the kernel dies with its cgroup, and the rest with the kernel.
"""

import json
import os
import signal

from shim import diagnostics, errors, loop, process, runtimes
from shim.runtimes import oci

_SANDBOX_DIED = 128 + signal.SIGKILL  # what becomes of all in it
_ANSWER_LIMIT = 4096
_INTERNAL_PID_FILE = "internal-pid"


class Sandboxed(oci.Oci):
    """Implements `runtimes.Runtime` for the containers of one pod."""

    shares_kernel = True

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self._kernels: set[int] = set()
        self._signals = loop.Lock()

    def send(self, container_id: str, *flags: str, signum: int) -> None:
        """Have a signal sent to a container soon."""
        loop.spawn(self._send(("kill", *flags, container_id, str(signum))), name="signal")

    def kill_tree(self, container_id: str, inner: int) -> None:
        """Have a process in a container killed soon, with its descendants."""
        loop.spawn(self._kill_tree(container_id, inner), name="kill tree")

    async def _kill_tree(self, container_id: str, inner: int) -> None:
        with self._children.launching():
            seen = await self._run(("ps", container_id), stdin=b"")
        for pid in _tree(seen.stdout, inner):
            await self._send(("kill", "--pid", str(pid), container_id, str(int(signal.SIGKILL))))

    async def _send(self, verb: tuple[str, ...]) -> None:
        async with self._signals:
            try:
                await self._command(verb)
            except errors.ShimError as error:  # mostly that it has ended
                diagnostics.report("signal not delivered", verb=verb, error=error.message)

    def _claim_init(self, container_id: str, pid: int) -> runtimes.Process:
        """Watch the guest kernel, which the first container starts; for each later container, watch
        the process that waits for it.
        """
        if pid in self._kernels:
            return self._wait_for(container_id, pid)
        self._kernels.add(pid)
        return super()._claim_init(container_id, pid)

    def _claim_exec(self, container_id: str, pid: int, directory: str) -> runtimes.Process:
        inner = oci.read_pid(os.path.join(directory, _INTERNAL_PID_FILE))
        proxy = super()._claim_exec(container_id, pid, directory)
        return _Process(self, container_id, proxy, pid=pid, inner=inner)

    def _wait_for(self, container_id: str, kernel: int) -> runtimes.Process:
        ours, theirs = os.pipe2(os.O_CLOEXEC)
        try:
            child = process.spawn((*self._base, "wait", container_id), stdout=theirs)
        except OSError as error:
            os.close(ours)
            raise errors.Internal(f"cannot wait for a container: {error.strerror}") from error
        finally:
            os.close(theirs)
        os.close(child.pidfd)
        proxy = self._children.claim(child.pid)
        return _Process(self, container_id, proxy, pid=kernel, answer=ours)

    def _more_of_exec(self, directory: str) -> tuple[str, ...]:
        return ("--internal-pid-file", os.path.join(directory, _INTERNAL_PID_FILE))


class _Process:
    """A process in the pod's kernel; `proxy` is the one that ends with it.

    `pid` is told to others, `answer` is where `runsc wait` writes, -1 for an exec, whose pid inside
    is `inner`.
    """

    oom_killed = False  # the kernel of the host tells, see `shim.oom`

    def __init__(
        self,
        runtime: Sandboxed,
        container_id: str,
        proxy: runtimes.Process,
        *,
        pid: int,
        answer: int = -1,
        inner: int = 0,
    ) -> None:
        self.pid = pid
        self._runtime, self._container_id, self._proxy = runtime, container_id, proxy
        self._answer, self._inner = answer, inner

    @property
    def start_time(self) -> int:
        return process.start_time(self.pid)

    async def wait(self) -> int:
        code = await self._proxy.wait()
        return code if self._answer < 0 else _exit_status(self._answer)

    async def signal(self, signum: int) -> None:
        if signum not in range(1, signal.NSIG):
            raise errors.InvalidArgument(f"cannot send signal {signum}")
        everything = ("--all",) if signum == signal.SIGKILL else ()
        self._runtime.send(self._container_id, *everything, signum=signum)

    async def kill_tree(self) -> None:
        self._runtime.kill_tree(self._container_id, self._inner)

    async def resize(self, width: int, height: int) -> None:
        """Do nothing: a terminal is ours to resize."""

    async def forget(self) -> None:
        """Do nothing: the runtime forgets by itself."""

    async def close_stdin(self) -> None:
        """Do nothing: nobody but us holds its stdin open."""


def _tree(table: bytes, top: int) -> list[int]:
    """Return a process and its descendants, parents first, from what `runsc ps` prints: lines of
    UID, PID, PPID and more, in the order of pids.
    """
    found = [top]
    for line in table.splitlines()[1:]:
        pid, parent = map(int, line.split()[1:3])
        if parent in found:
            found.append(pid)
    return found


def _exit_status(answer: int) -> int:
    """Return what `runsc wait` said, and close the pipe; it says nothing when the kernel died.
    Raises Internal for a status that cannot be.
    """
    try:
        told = json.loads(os.read(answer, _ANSWER_LIMIT))["exitStatus"]
    except (OSError, ValueError, KeyError, TypeError):
        return _SANDBOX_DIED
    finally:
        os.close(answer)
    return runtimes.exit_status(told)
