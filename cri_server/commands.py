# SPDX-License-Identifier: Apache-2.0
"""Run a program to its end from the event loop: the server's one runner.

Started by `shim.process.spawn` (posix_spawn, a session of its own), watched by pidfd and pipes on
the loop itself: no thread, no child watcher, half the overhead of asyncio.create_subprocess_exec.
When time is up or the caller is cancelled the whole process group is killed and reaped. A crash of
the server leaves a started program to itself; whoever starts something that changes the host writes
down the intent first.
"""

import asyncio
import contextlib
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cri_server import errors
from shim import process

_CHUNK = 65536
_DRAIN_SECONDS = 2.0  # how long to read on when a daemon that the program left holds its pipes
_KILL_SECONDS = 5.0  # how long to wait for a killed process; one in the kernel may never come
_SHOWN = 1024  # bytes of stderr in a message


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """How a program ended; `returncode` is -n when signal n killed it; output cut at the limit."""

    argv: tuple[str, ...]
    returncode: int
    stdout: bytes
    stderr: bytes

    def describe(self) -> str:
        """Return the end of what it said, in one line."""
        said = (self.stderr.strip() or self.stdout.strip())[-_SHOWN:]
        return " ".join(said.decode(errors="replace").split())


class Failed(errors.Internal):
    """The program could not be started or ended with a code other than 0; `finished` has it all."""

    def __init__(self, finished: Finished) -> None:
        name = os.path.basename(finished.argv[0])
        said = finished.describe() or "it said nothing"
        super().__init__(f"{name} failed with {finished.returncode}: {said}")
        self.finished = finished

    @property
    def command(self) -> str:
        """Return the command for a person to paste into a shell."""
        return shlex.join(self.finished.argv)


class TimedOut(errors.DeadlineExceeded):
    """The program was killed after its time; `finished` has what it had said until then."""

    def __init__(self, finished: Finished, seconds: float) -> None:
        name = os.path.basename(finished.argv[0])
        super().__init__(
            f"{name} was killed after {seconds:g} s: {finished.describe()}".rstrip(": ")
        )
        self.finished = finished


async def run(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    stdin: bytes = b"",
    timeout: float | None,
    check: bool = True,
    max_output: int = 1 << 20,
) -> Finished:
    """Run a program and return how it ended. `env` is its whole environment (None: a minimal one).

    Output beyond `max_output` bytes per stream is read and dropped. `timeout` in seconds, None for
    none. Raises Failed (a code other than 0 only with `check`) and TimedOut.
    """
    program = _start(argv, env, stdin, max_output)
    try:
        async with asyncio.timeout(timeout):
            returncode = await asyncio.shield(program.ended)
        await program.drained()
    except BaseException as error:
        await program.destroy()
        if isinstance(error, TimeoutError):
            raise TimedOut(program.finished(-9), timeout or 0) from None
        raise
    finally:
        program.stop_reading()
    finished = program.finished(returncode)
    if check and returncode:
        raise Failed(finished)
    return finished


def _start(
    argv: Sequence[str], env: Mapping[str, str] | None, stdin: bytes, max_output: int
) -> "_Program":
    """Start a program; what cannot be started fails with the shell's codes 126 and 127."""
    try:
        with contextlib.ExitStack() as theirs:
            source = None
            if stdin:
                source = process.input_file(stdin)
                theirs.callback(os.close, source)
            with contextlib.ExitStack() as ours:
                stdout = _Output(max_output, ours, theirs)
                stderr = _Output(max_output, ours, theirs)
                child = process.spawn(
                    argv, env=env, stdin=source, stdout=stdout.child_fd, stderr=stderr.child_fd
                )
                ours.pop_all()  # from here on the outputs close themselves
    except OSError as error:
        code = 127 if isinstance(error, FileNotFoundError) else 126
        text = str(error).encode()
        failed = Finished(argv=tuple(argv), returncode=code, stdout=b"", stderr=text)
        raise Failed(failed) from error
    return _Program(argv, child, (stdout, stderr))


class _Program:
    """A running program and what it has said so far."""

    def __init__(
        self, argv: Sequence[str], child: process.Child, outputs: "tuple[_Output, _Output]"
    ) -> None:
        self._argv = tuple(argv)
        self._child = child
        self._outputs = outputs
        self._loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[int] = self._loop.create_future()
        self._loop.add_reader(child.pidfd, self._reap)
        for output in outputs:
            output.start(self._loop)

    def _reap(self) -> None:
        self._loop.remove_reader(self._child.pidfd)
        code = process.reap(self._child)
        if not self.ended.done():
            self.ended.set_result(code)

    async def drained(self) -> None:
        """Wait for the end of the output, for a while."""
        waiting = [output.ended for output in self._outputs if not output.ended.done()]
        if waiting:
            await asyncio.wait(waiting, timeout=_DRAIN_SECONDS)

    async def destroy(self) -> None:
        """Kill what has not ended, and see it reaped; the loop reaps what the kernel holds back."""
        if self.ended.done():
            return
        process.kill_group(self._child)
        await asyncio.wait([self.ended], timeout=_KILL_SECONDS)

    def stop_reading(self) -> None:
        for output in self._outputs:
            output.stop()

    def finished(self, returncode: int) -> Finished:
        stdout, stderr = (bytes(output.data) for output in self._outputs)
        return Finished(argv=self._argv, returncode=returncode, stdout=stdout, stderr=stderr)


class _Output:
    """The reading end of a pipe, collected up to a limit."""

    def __init__(
        self, limit: int, ours: contextlib.ExitStack, theirs: contextlib.ExitStack
    ) -> None:
        self.data = bytearray()
        self.ended: asyncio.Future[None]
        self._limit = limit
        self._fd, self.child_fd = os.pipe()
        ours.callback(os.close, self._fd)
        theirs.callback(os.close, self.child_fd)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.ended = loop.create_future()
        loop.add_reader(self._fd, self._read)

    def _read(self) -> None:
        chunk = os.read(self._fd, _CHUNK)
        if chunk:
            self.data += chunk[: self._limit - len(self.data)]
        else:
            self.stop()

    def stop(self) -> None:
        """Stop reading; the second time nothing happens."""
        if not self.ended.done():
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self.ended.set_result(None)
