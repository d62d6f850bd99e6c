# SPDX-License-Identifier: Apache-2.0
"""The ends of processes that an OCI runtime left to us: each exit is delivered once, by pidfd,
never by number.

A shim is a child subreaper, so a container's init, an exec's process and, where a container shares
the host's pid namespace, their orphans become its children. The first two are claimed by number as
soon as the runtime has told it; while a runtime is at work nobody knows which zombie is to be
claimed, so strays are reaped only between. The exits of a shim that died are lost; `cri_server`
reports them as 255.
"""

import contextlib
import os
import signal
from collections.abc import Iterator

from shim import errors, linux, loop, process

LOST = 255  # the exit code of a process that was never our child
_ADOPTION_TRIES, _ADOPTION_SECONDS = 1000, 0.002


class Process:
    """A claimed process. `wait` once; it ends the claim. `signal` is harmless when the process has
    ended. Implements `shim.runtimes.Process`.
    """

    oom_killed = False  # the kernel's counters tell, see `shim.oom`

    def __init__(self, reaper: "Reaper", pid: int) -> None:
        self._pidfd = _open(pid)
        self.pid = pid
        self._reaper = reaper
        reaper.claimed[pid] = self

    async def wait(self) -> int:
        """Return the exit code, 128+n when signal n ended it, once it has ended; its number is free
        then.
        """
        await loop.readable(self._pidfd)
        code = await _exit_code(self._pidfd)
        self._reaper.claimed.pop(self.pid, None)
        pidfd, self._pidfd = self._pidfd, -1
        os.close(pidfd)
        self._reaper.sweep()
        return code

    @property
    def start_time(self) -> int:
        """When it started, in clock ticks since boot."""
        return process.start_time(self.pid)

    async def signal(self, signum: int) -> None:
        """Send a signal. Raises InvalidArgument for a number that is none."""
        self._send(signum)

    def _send(self, signum: int) -> None:
        if self._pidfd < 0:
            return
        try:
            signal.pidfd_send_signal(self._pidfd, signum)
        except ProcessLookupError:
            return
        except (OSError, ValueError) as error:
            raise errors.InvalidArgument(f"cannot send signal {signum}: {error}") from error

    async def kill_tree(self) -> None:
        """Kill it with its process group and its descendants; nothing happens when it has ended."""
        if self._pidfd >= 0:
            process.kill_group(process.Child(pid=self.pid, pidfd=self._pidfd))
            self._send(signal.SIGKILL)  # it need not lead a group: crun's exec does not

    async def resize(self, width: int, height: int) -> None:
        """Do nothing: a terminal is ours to resize."""

    async def forget(self) -> None:
        """Do nothing: nobody else knows of it."""

    async def close_stdin(self) -> None:
        """Do nothing: nobody but us holds its stdin open."""


def _open(pid: int) -> int:
    """Return a pidfd of a process below us: a runtime that lies must not have us kill another."""
    try:
        pidfd = os.pidfd_open(pid)
    except (OSError, OverflowError) as error:
        raise errors.Internal(f"process {pid} was gone before it could be watched") from error
    with contextlib.suppress(ProcessLookupError):
        if process.descends(pid, os.getpid()):
            return pidfd
    os.close(pidfd)
    raise errors.Internal(f"process {pid} is not one that was started for us")


async def _exit_code(pidfd: int) -> int:
    """Return the exit code of an ended process.

    The helper with which crun detaches may end after the container: it is the parent until then.
    """
    for _ in range(_ADOPTION_TRIES):
        with contextlib.suppress(ChildProcessError):
            end = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)  # noqa: ASYNC222 - it returns at once
            if end is not None:
                return end.si_status if end.si_code == os.CLD_EXITED else 128 + end.si_status
        if not _exists(pidfd):
            break
        await loop.sleep(_ADOPTION_SECONDS)
    return LOST


def _exists(pidfd: int) -> bool:
    """Say whether nobody has waited for a process yet."""
    try:
        signal.pidfd_send_signal(pidfd, 0)
    except ProcessLookupError:
        return False
    return True


class Reaper:
    """Watches claimed processes and buries strays. One per shim."""

    def __init__(self) -> None:
        self.claimed: dict[int, Process] = {}
        self._launching = 0

    def claim(self, pid: int) -> Process:
        """Watch a process that a runtime has just started. Raises Internal if it does not exist."""
        return Process(self, pid)

    @contextlib.contextmanager
    def launching(self) -> Iterator[None]:
        """Keep every zombie while a child of ours runs that may still tell whose it is."""
        self._launching += 1
        try:
            yield
        finally:
            self._launching -= 1
            self.sweep()

    def sweep(self) -> None:
        """Reap what has ended and belongs to nobody."""
        while not self._launching:
            try:
                end = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                if end is None or end.si_pid in self.claimed:
                    return  # A claimed one is reaped by its owner, who sweeps again.
                os.waitid(os.P_PID, end.si_pid, os.WEXITED | os.WNOHANG)
            except ChildProcessError:
                return

    async def run(self) -> None:
        """Become a subreaper and sweep whenever a child ends, until cancelled.

        SIGCHLD must have a handler (the zygote's), for without one nothing is written to the pipe.
        """
        linux.prctl_set_child_subreaper()
        ours, wakeup = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        previous = signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        try:
            while True:
                await loop.readable(ours)
                os.read(ours, 4096)
                self.sweep()
        finally:
            signal.set_wakeup_fd(previous)
            os.close(ours)
            os.close(wakeup)
