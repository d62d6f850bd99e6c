# SPDX-License-Identifier: Apache-2.0
"""The worker processes of one pull: started early, used for layer after layer, ended with the pull.

    Workers.run(job) ──► a waiting Worker, or a new one ──► one line of JSON in, one line out

A process per layer would cost more than most layers do (60 ms to start, measured). A job may take
as long as it needs, but not stand still: a worker that uses no processor time has stalled. A worker
whose job was cancelled, stalled or crashed is killed with its group and reaped, never used again.
When the server dies its workers die too (PR_SET_PDEATHSIG), so nothing writes below tmp/ when the
next server cleans up there.
"""

import asyncio
import contextlib
import fcntl
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from cri_server import errors
from shim import process

_COMMAND = (sys.executable, "-I", "-m", "cri_server.images.worker")
_PIPE = 1 << 20  # bytes; a job names at most 500 folders, so it always fits
_END_SECONDS = 5.0  # how long to wait for a killed process; one in the kernel may never come


class Workers:
    """At most `limit` workers at once. Belongs to one event loop."""

    def __init__(self, limit: int, *, patience: float) -> None:
        """`patience` is in seconds, for a job that stands still."""
        self._slots, self._patience = asyncio.Semaphore(limit), patience
        self._idle: list[_Worker] = []
        self._closed = False

    def warm(self, count: int) -> None:
        """Start workers that will be needed soon."""
        while len(self._idle) < count:
            self._idle.append(_Worker())

    async def run(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Have a job done and return the answer. Raises DeadlineExceeded, Internal."""
        async with self._slots:
            worker = self._idle.pop() if self._idle else _Worker()
            done = False
            try:
                answer = await self._watched(worker, job)
                done = True
            finally:
                if not done or self._closed:
                    await worker.end()
            if not self._closed:
                self._idle.append(worker)
            return answer

    async def _watched(self, worker: "_Worker", job: Mapping[str, Any]) -> dict[str, Any]:
        asking = asyncio.create_task(worker.ask(job))
        spent = -1
        try:
            while not (await asyncio.wait([asking], timeout=self._patience))[0]:
                before, spent = spent, worker.spent()
                if spent == before:
                    raise errors.DeadlineExceeded(
                        f"unpacking a layer has stood still for {self._patience:g} s"
                    )
            return asking.result()
        finally:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    async def close(self) -> None:
        """End the workers that wait; those at work for another pull end after their job."""
        self._closed = True
        while self._idle:
            await self._idle.pop().end()


class _Worker:
    """One process and the pipes to it."""

    def __init__(self) -> None:
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
            requests, self._requests = os.pipe()
            theirs.callback(os.close, requests)
            ours.callback(os.close, self._requests)
            self._answers, answers = os.pipe()
            ours.callback(os.close, self._answers)
            theirs.callback(os.close, answers)
            self._stderr = os.memfd_create("stderr")
            ours.callback(os.close, self._stderr)
            fcntl.fcntl(self._requests, fcntl.F_SETPIPE_SZ, _PIPE)
            self._child = process.spawn(
                _COMMAND, stdin=requests, stdout=answers, stderr=self._stderr
            )
            self._files = ours.pop_all()

    async def ask(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Send a job and wait for the answer. Raises Internal when the process ends instead."""
        try:
            os.write(self._requests, msgspec.json.encode(job) + b"\n")
        except BrokenPipeError:
            raise self._died() from None
        loop = asyncio.get_running_loop()
        line = bytearray()
        while not line.endswith(b"\n"):
            readable = loop.create_future()
            loop.add_reader(self._answers, _wake, readable)
            try:
                await readable
            finally:
                loop.remove_reader(self._answers)
            data = os.read(self._answers, 1 << 16)
            if not data:
                raise self._died()
            line += data
        return msgspec.json.decode(line, type=dict[str, Any])

    def spent(self) -> int:
        """Return the processor time that it has used, in clock ticks (proc(5), stat, 14 and 15)."""
        fields = Path(f"/proc/{self._child.pid}/stat").read_bytes().rpartition(b")")[2].split()
        return int(fields[11]) + int(fields[12])

    async def end(self) -> None:
        """Kill it and all that belongs to it; at work or not, it has nothing to lose."""
        process.kill_group(self._child)
        loop = asyncio.get_running_loop()
        ended = loop.create_future()
        loop.add_reader(self._child.pidfd, self._reap, ended)
        self._files.close()
        await asyncio.wait([ended], timeout=_END_SECONDS)

    def _reap(self, ended: "asyncio.Future[None]") -> None:
        asyncio.get_running_loop().remove_reader(self._child.pidfd)
        process.reap(self._child)
        ended.set_result(None)

    def _died(self) -> errors.Internal:
        said = os.pread(self._stderr, 4096, max(0, os.fstat(self._stderr).st_size - 1024))
        text = " ".join(said.decode(errors="replace").split()) or "it said nothing"
        return errors.Internal(f"the process that unpacks a layer ended: {text}")


def _wake(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)
