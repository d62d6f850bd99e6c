# SPDX-License-Identifier: Apache-2.0
"""A second process in a running container, for as long as one client listens.

The process gets a part of the container's cgroup where the runtime can do that, so that a time-out
or a lost client ends its whole tree; elsewhere its session and its descendants are killed. Files
are below `<bundle>/exec-<n>` and gone at the end, whatever the end is. An exec does not survive its
client, nor the shim.
"""

import contextlib
import itertools
import json
import os
import signal
from typing import Protocol

from shim import cgroup, container, diagnostics, errors, loop, runtimes, stdio
from shim.pb import shim_pb2 as pb

_numbers = itertools.count(1)
_KILLED_SECONDS = 2.0


class Client(Protocol):
    """The caller. `recv` gives None when nothing more will come; whoever runs the call cancels it
    when lost.
    """

    async def recv(self) -> pb.ExecInput | None:
        """Return the next input."""

    async def send(self, message: pb.ExecOutput) -> None:
        """Pass output on. Raises Unavailable when the client is gone."""


class Exec:
    """One exec. Raises FailedPrecondition when the container is not running, InvalidArgument for
    bad JSON.
    """

    def __init__(self, owner: container.Container, start: pb.ExecStart, client: Client) -> None:
        owner.require(container.State.RUNNING, verb="exec in")
        name = f"exec-{next(_numbers)}"
        self._owner = owner
        self._start = start
        self._client = client
        self._directory = os.path.join(owner.spec.bundle, name)
        self._part = owner.cgroup.part(name) if _splits(owner) else cgroup.Cgroup({})
        self._streams = stdio.Streams(
            terminal=_terminal(start.process),
            stdin=start.stdin,
            owner=owner.spec.owner,
            waits=True,
            fifos=owner.runtime.opens_fifos,
        )
        self._process: runtimes.Process | None = None
        self._end: loop.Task[int] | None = None

    async def run(self) -> None:
        """Start it, serve the client to the end, say how it ended. Raises the runtime's error."""
        self._streams.add(self)
        listener = loop.spawn(self._listen(), name="exec input")
        try:
            timed_out = await self._serve()
            # First the answer, for which a client waits; the next request still finds all cleaned.
            await self._client.send(pb.ExecOutput(exit=self._result(timed_out=timed_out)))
        finally:
            listener.cancel()
            self._clean_up()

    async def output(self, stream: str, data: bytes) -> None:
        """Pass output on to the client, as one of the `stdio.Sink`s."""
        message = pb.ExecOutput(stdout=data) if stream == "stdout" else pb.ExecOutput(stderr=data)
        await self._client.send(message)

    # ---- the process

    async def _serve(self) -> bool:
        """Start it and pass its output on to the end; return whether its time was over."""
        main = loop.spawn(self._main(), name="exec")
        try:
            timed_out = not await self._ends_in_time(main)
            await self._drain(timed_out=timed_out)
        except BaseException:
            await self._kill(main)
            raise
        return timed_out

    async def _main(self) -> None:
        """Start the process and wait for its end. Nothing but `_kill` cancels this."""
        with contextlib.suppress(loop.Cancelled):
            self._process = await self._launch()
            # A task of its own, so that the process is reaped whatever becomes of this one.
            self._end = loop.spawn(self._process.wait(), name="exec end")
            await self._client.send(pb.ExecOutput(started=self._process.pid))
            await self._end.join()

    async def _launch(self) -> runtimes.Process:
        self._write_process()
        part = self._make_part()

        async def launch(streams: runtimes.Stdio) -> runtimes.Process:
            return await self._owner.runtime.exec(
                self._owner.spec.id, directory=self._directory, cgroup=part, stdio=streams
            )

        return await self._streams.connect(self._directory, launch)

    def _write_process(self) -> None:
        os.mkdir(self._directory, 0o700)
        with open(os.path.join(self._directory, runtimes.PROCESS_FILE), "wb") as file:
            file.write(self._start.process)

    def _make_part(self) -> str:
        """Make the cgroup; return its name as runtimes want it, "" when there is none to be had."""
        if not self._part.directories:
            return ""
        try:
            controller = self._part.create()
        except OSError as error:
            diagnostics.report("no cgroup for an exec", container=self._owner.spec.id, error=error)
            return ""
        name = os.path.basename(self._directory)
        return f"{controller}:{name}" if controller else name

    async def _ends_in_time(self, main: loop.Task[None]) -> bool:
        limit = self._start.timeout_ms / 1000 if self._start.timeout_ms else None
        try:
            async with loop.timeout(limit):
                await main.join()
        except TimeoutError:
            await self._kill(main)
            return False
        return True

    async def _kill(self, main: loop.Task[None]) -> None:
        """End the runtime if it is still at work, then the process with all its descendants."""
        main.cancel()
        with contextlib.suppress(errors.ShimError, OSError):
            await main.join()
        try:
            if self._process:
                await self._process.kill_tree()
        finally:
            await self._part.kill_all()
        if self._end:
            with contextlib.suppress(TimeoutError):
                async with loop.timeout(_KILLED_SECONDS):
                    await self._end.join()

    async def _drain(self, *, timed_out: bool) -> None:
        seconds = _KILLED_SECONDS if timed_out else self._start.drain_ms / 1000
        await self._streams.drain(seconds, patient=True)

    def _result(self, *, timed_out: bool) -> pb.ExecExit:
        ended = self._end is not None and self._end.done
        code = self._end.result() if self._end and ended else 128 + signal.SIGKILL
        return pb.ExecExit(exit_code=code, timed_out=timed_out)

    def _clean_up(self) -> None:
        self._streams.close()
        _remove_directory(self._directory)
        if self._part.directories and not self._part.remove():
            self._owner.leave_part(self._part)

    # ---- the client

    async def _listen(self) -> None:
        """Take input until the client has no more, which ends the process's stdin."""
        with contextlib.suppress(errors.ShimError):
            while (message := await self._client.recv()) is not None:
                match message.WhichOneof("input"):
                    case "stdin":
                        await self._streams.write_stdin(message.stdin)
                    case "resize":
                        self._streams.resize(message.resize.width, message.resize.height)
                    case "close_stdin":
                        await self._streams.close_stdin()
            await self._streams.close_stdin()


def _terminal(process_json: bytes) -> bool:
    try:
        return bool(json.loads(process_json).get("terminal"))
    except (ValueError, AttributeError, RecursionError) as error:
        raise errors.InvalidArgument(f"the process is not an OCI process: {error}") from error


def _splits(owner: container.Container) -> bool:
    return owner.runtime.can_split_cgroups(owner.cgroup.controller)


def _remove_directory(path: str) -> None:
    """Remove a directory of files, as far as that is possible."""
    with contextlib.suppress(OSError):
        for name in os.listdir(path):
            os.unlink(os.path.join(path, name))
        os.rmdir(path)
