# SPDX-License-Identifier: Apache-2.0
"""One container, from its bundle to its exit record.

    CREATED ──start──► STARTING ──► RUNNING ──the end──► STOPPED ──delete──► forgotten
                           └────────failure────────────────▲

All that changes the state is in this file. At an exit: what is left of the tree is killed, the
output is read to its end into the log, OOM kills are counted, `exit.json` is on disk (by rename),
and only then anyone is told; the runtime's own clean-up follows and `delete` waits for it. If the
shim dies before `exit.json` is there, the exit is lost (255); what is running then is
`cri_server`'s to kill.
"""

import contextlib
import json
import os
import signal
import time
from collections.abc import Mapping
from enum import StrEnum
from typing import NamedTuple

from shim import cgroup, diagnostics, errors, logfile, loop, oom, reaper, runtimes, stdio
from shim.pb import shim_pb2 as pb

EXIT_FILE = "exit.json"
START_ERROR = 128
_MESSAGE_LIMIT = 1024
_DRAIN_SECONDS = 2.0
_KILL_SECONDS = 10.0


class State(StrEnum):
    """Where a container is in its life."""

    CREATED = "created"
    STARTING = "starting"
    RUNNING = "running"
    STOPPED = "stopped"


_WIRE = {
    State.CREATED: pb.CREATED,
    State.STARTING: pb.CREATED,
    State.RUNNING: pb.RUNNING,
    State.STOPPED: pb.STOPPED,
}


class Spec(NamedTuple):
    """What a container is made from. `owner`: uid and gid of its root on the host."""

    id: str
    bundle: str
    cgroups: Mapping[str, str]
    log_path: str = ""
    terminal: bool = False
    stdin: bool = False
    stdin_once: bool = False
    owner: tuple[int, int] = stdio.ROOT


class Container:
    """A container that the shim answers for. Raises InvalidArgument if its log cannot be opened.

    `kernel` is the one that this one runs in, if any: its cgroup is where the host kills.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        runtime: runtimes.Runtime,
        ledger: oom.Ledger,
        kernel: "Container | None" = None,
    ) -> None:
        self.spec = spec
        self.runtime = runtime
        self.state = State.CREATED
        self.exit: pb.ExitRecord | None = None
        self.cgroup = cgroup.Cgroup(spec.cgroups)
        self._log = logfile.LogFile(spec.log_path)
        self.streams = stdio.Streams(
            terminal=spec.terminal,
            stdin=spec.stdin,
            log=self._log,
            owner=spec.owner,
            fifos=runtime.opens_fifos,
        )
        self._parts: list[cgroup.Cgroup] = []
        self._ledger = ledger
        self._kills = ledger.open(spec.cgroups)
        self._kernel = kernel
        self._kernel_kills = 0
        self._condemned = False
        self._started_at = 0
        self._start_time = 0
        self._lock = loop.Lock()
        self._stopped = loop.Event()
        self._launch: loop.Task[runtimes.Process] | None = None
        self._init: runtimes.Process | None = None
        self._removal: loop.Task[None] | None = None

    # ---- the verbs, in the order of a life

    async def start(self) -> pb.StartResponse:
        """Run it. Raises FailedPrecondition out of turn, the runtime's error when it does not
        start.
        """
        async with self._lock:
            self.require(State.CREATED, verb="start")
            self.state = State.STARTING
            self._kernel_kills = self._kernel.count_kills() if self._kernel else 0
            self._launch = loop.spawn(self._run(), name="start")
            try:
                self._begin(await self._launch.join())
            except BaseException as error:
                reason = _start_error(error)
                await self._fail(reason)
                raise reason from error
        return pb.StartResponse(
            pid=self.pid, started_at=self._started_at, start_time=self._start_time
        )

    async def kill(self, signum: int, *, everything: bool = False) -> None:
        """Signal the init, or kill all. Nothing happens when it has ended; SIGKILL ends a start
        too.
        """
        signum = signal.SIGKILL if everything else signum
        self._condemned |= signum == signal.SIGKILL
        await self._settle_start(abort=signum == signal.SIGKILL)
        if self.state is State.STOPPED:
            return
        self.require(State.RUNNING, verb="kill")
        self.cgroup.thaw()  # a paused process gets no signal
        if self._init:
            await self._init.signal(signum)
        if everything:
            await self.cgroup.kill_all()

    async def wait(self) -> pb.ExitRecord | None:
        """Return how it ended, once its output and the record are on disk.

        None: it was deleted without ever having run.
        """
        await self._stopped.wait()
        return self.exit

    async def delete(self) -> pb.ExitRecord | None:
        """Kill it and remove it from the runtime. Raises DeadlineExceeded if it does not die."""
        await self.end()
        async with self._lock:
            self.streams.close()
            self._log.close()
            self._stopped.set()  # so that `wait` returns for one that never ran
            self._ledger.close(self._kills)
            for name in (runtimes.PID_FILE, runtimes.LOG_FILE, EXIT_FILE):
                with contextlib.suppress(OSError):
                    os.unlink(os.path.join(self.spec.bundle, name))
        return self.exit

    async def update(self, resources: bytes) -> None:
        """Apply LinuxResources (OCI JSON). Raises FailedPrecondition unless running."""
        async with self._lock:
            self.require(State.RUNNING, verb="update")
            await self.runtime.update(self.spec.id, resources)

    async def stats(self) -> tuple[str, bytes]:
        """Return what the runtime counts. Raises FailedPrecondition unless running."""
        self.require(State.RUNNING, verb="count what is used by")
        return await self.runtime.stats(self.spec.id)

    def reopen_log(self) -> None:
        """Begin a new log file at the same path. Raises FailedPrecondition unless running."""
        self.require(State.RUNNING, verb="reopen the log of")
        self._log.reopen()

    def require(self, state: State, *, verb: str) -> None:
        """Raise FailedPrecondition unless the container is in this state."""
        if self.state is not state:
            what = f"cannot {verb} container {self.spec.id}"
            raise errors.FailedPrecondition(f"{what}: it is {self.state}, not {state}")

    @property
    def pid(self) -> int:
        """The host pid of its init, also after the end; 0 when it never ran."""
        return self._init.pid if self._init else 0

    def describe(self) -> pb.Container:
        """Return all that is known of it."""
        return pb.Container(
            id=self.spec.id,
            state=_WIRE[self.state],
            pid=self.pid,
            started_at=self._started_at,
            start_time=self._start_time,
            exit=self.exit,
        )

    def leave_part(self, part: cgroup.Cgroup) -> None:
        """Remember a part of the cgroup that an exec could not remove: a child of it lives on."""
        self._parts = [old for old in self._parts if not old.remove()]
        self._parts.append(part)

    # ---- the beginning

    async def _run(self) -> runtimes.Process:
        bundle = self.spec.bundle

        async def launch(streams: runtimes.Stdio) -> runtimes.Process:
            return await self.runtime.run(self.spec.id, bundle, directory=bundle, stdio=streams)

        return await self.streams.connect(bundle, launch)

    def _begin(self, init: runtimes.Process) -> None:
        self._init = init
        self._started_at = time.time_ns()
        self._start_time = init.start_time
        self.state = State.RUNNING
        loop.spawn(self._watch(init), name="watch")

    async def _settle_start(self, *, abort: bool) -> None:
        """Wait until a start in progress has ended one way or the other."""
        if self.state is State.STARTING and self._launch:
            if abort:
                self._launch.cancel()
            async with self._lock:
                return

    async def _fail(self, error: errors.ShimError) -> None:
        message = " ".join(error.message.split())[:_MESSAGE_LIMIT]
        await self._finish(
            pb.ExitRecord(
                exit_code=START_ERROR,
                finished_at=time.time_ns(),
                reason="StartError",
                message=message,
            )
        )

    # ---- the end

    async def _watch(self, init: runtimes.Process) -> None:
        record = pb.ExitRecord()
        try:
            record.exit_code = await init.wait()
        except errors.ShimError as error:
            record.exit_code, record.reason = reaper.LOST, "Unknown"
            record.message = error.message[:_MESSAGE_LIMIT]
        record.finished_at = time.time_ns()
        await self._finish(record)

    async def _finish(self, record: pb.ExitRecord) -> None:
        self._kills.read()  # at once: systemd may be about to remove the cgroup
        try:
            await self._settle()
        except Exception as error:  # An end must be told, whatever went wrong with the rest.
            diagnostics.report("cannot settle an end", container=self.spec.id, error=error)
        killed = self._kills.last() or self._kills_of_kernel(record)
        if killed or (self._init and self._init.oom_killed):
            record.oom_killed = True
            many = f"{killed or 1} process{'es' * (killed > 1)}"
            record.message = record.message or f"{many} OOM-killed"
        self._write(record)
        self.exit = record
        self.state = State.STOPPED
        self._stopped.set()
        self._removal = loop.spawn(self._remove(), name="remove")

    def count_kills(self) -> int:
        """Return how many processes were OOM-killed in its cgroup, also when that is gone."""
        return self._kills.read()

    def _kills_of_kernel(self, record: pb.ExitRecord) -> int:
        """Return the OOM kills that the kernel it runs in has more than at the start, if they must
        be of this one: its init was killed, and nobody had asked us to.
        """
        killed = record.exit_code == 128 + signal.SIGKILL and not self._condemned
        if not killed or not self._kernel:
            return 0
        return self._kernel.count_kills() - self._kernel_kills

    async def _settle(self) -> None:
        """Kill what the init has left and bring the last output into the log."""
        await self.cgroup.kill_all()
        await self.streams.drain(_DRAIN_SECONDS, patient=False)
        self.streams.close()
        self._log.close()

    def _write(self, record: pb.ExitRecord) -> None:
        """Put the record beside the bundle; waiters are told even if that fails, for they cannot do
        better.
        """
        path = os.path.join(self.spec.bundle, EXIT_FILE)
        fields = {field.name: getattr(record, field.name) for field in record.DESCRIPTOR.fields}
        try:
            with open(f"{path}.new", "w") as file:
                json.dump(fields, file)
            os.rename(f"{path}.new", path)
        except OSError as error:
            diagnostics.report("cannot write an exit record", container=self.spec.id, error=error)

    async def end(self) -> None:
        """Kill it if it runs and wait until the runtime has forgotten it; the record stays.

        Raises DeadlineExceeded when it cannot be killed, the runtime's error when it cannot be
        removed.
        """
        if self.state in (State.STARTING, State.RUNNING):
            await self.kill(signal.SIGKILL, everything=True)
            try:
                async with loop.timeout(_KILL_SECONDS):
                    await self._stopped.wait()
            except TimeoutError:
                raise errors.DeadlineExceeded(
                    f"container {self.spec.id} (pid {self.pid}) does not end after SIGKILL"
                ) from None
        async with self._lock:
            await self._await_removal()

    async def _await_removal(self) -> None:
        """Be sure that the runtime has forgotten it; what failed after the exit is tried again."""
        if self._removal is None:
            return
        try:
            await self._removal.join()
        except errors.ShimError:
            self._removal = loop.spawn(self._remove(), name="remove")
            await self._removal.join()

    async def _remove(self) -> None:
        await self.runtime.delete(self.spec.id)
        self.cgroup.remove()


def _start_error(error: BaseException) -> errors.ShimError:
    if isinstance(error, errors.ShimError):
        return error
    if isinstance(error, loop.Cancelled):
        return errors.FailedPrecondition("killed before it had started")
    return errors.Internal(f"{type(error).__name__}: {error}")
