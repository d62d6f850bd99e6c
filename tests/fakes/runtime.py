# SPDX-License-Identifier: Apache-2.0
"""An OCI runtime whose containers are plain processes: no namespaces, no root, no executable.

It passes the contract of runtimes (tests/contract/test_oci_runtime.py) as far as processes go, so
tests of what is above it mean something without runc. Faults are asked for: `failures` by verb.
"""

import contextlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shim import errors, loop, process, reaper, runtimes


class Plain:
    """Implements `shim.runtimes.Runtime`.

    `failures`: an error per verb ("run", "exec", "update", "delete") that is raised from now on;
    `gates`: an event per verb that it waits for first. `calls` is what was asked, in order.
    """

    shares_kernel = False
    opens_fifos = False

    def __init__(self, children: reaper.Reaper) -> None:
        self._reaper = children
        self.failures: dict[str, errors.ShimError] = {}
        self.gates: dict[str, loop.Event] = {}
        self.calls: list[tuple[str, str]] = []
        self.resources: dict[str, Any] = {}
        self._children: dict[str, list[process.Child]] = {}

    async def prepare(self) -> None:
        """Do nothing."""

    async def run(
        self, container_id: str, bundle: str, *, directory: str, stdio: runtimes.Stdio
    ) -> reaper.Process:
        """Start the command of `bundle`/config.json."""
        await self._begin("run", container_id)
        if container_id in self._children:
            raise errors.ShimError(f"container with id exists: {container_id}")
        return self._spawn(container_id, _load(bundle, "config.json")["process"], stdio)

    async def exec(
        self, container_id: str, *, directory: str, cgroup: str, stdio: runtimes.Stdio
    ) -> reaper.Process:
        """Start the command of `directory`/process.json."""
        await self._begin("exec", container_id)
        if container_id not in self._children:
            raise errors.ShimError("container does not exist")
        return self._spawn(container_id, _load(directory, runtimes.PROCESS_FILE), stdio)

    async def update(self, container_id: str, resources: bytes) -> None:
        """Remember the resources."""
        await self._begin("update", container_id)
        try:
            self.resources.update(json.loads(resources))
        except ValueError as error:
            raise errors.ShimError(f"cannot read the resources: {error}") from error

    async def stats(self, container_id: str) -> tuple[str, bytes]:
        """Raise Unimplemented: nothing is counted."""
        raise errors.Unimplemented("nothing is counted")

    async def delete(self, container_id: str) -> None:
        """Kill what is left of a container, with its descendants."""
        await self._begin("delete", container_id)
        for child in self._children.pop(container_id, []):
            with contextlib.suppress(ProcessLookupError):
                process.kill_group(child)
            os.close(child.pidfd)

    def can_split_cgroups(self, controller: str) -> bool:
        """Say no: there are no cgroups."""
        return False

    async def close(self) -> None:
        """Do nothing."""

    async def _begin(self, verb: str, container_id: str) -> None:
        self.calls.append((verb, container_id))
        if verb in self.gates:
            await self.gates[verb].wait()
        if verb in self.failures:
            raise self.failures[verb]

    def _spawn(
        self, container_id: str, wanted: dict[str, Any], stdio: runtimes.Stdio
    ) -> reaper.Process:
        argv = wanted["args"]
        if shutil.which(argv[0]) is None:
            raise errors.ShimError(f'exec: "{argv[0]}": executable file not found in $PATH')
        with streams(stdio) as (stdin, stdout, stderr), self._reaper.launching():
            child = process.spawn(argv, stdin=stdin, stdout=stdout, stderr=stderr)
            self._children.setdefault(container_id, []).append(child)
            return self._reaper.claim(child.pid)


def _load(folder: str, name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(Path(folder, name).read_text())
    return loaded


@contextlib.contextmanager
def streams(stdio: runtimes.Stdio) -> Iterator[tuple[int | None, int | None, int | None]]:
    """Yield the three descriptors: with a console those of a new terminal, whose master is sent."""
    if not stdio.console:
        yield stdio.stdin, stdio.stdout, stdio.stderr
        return
    master, slave = os.openpty()
    try:
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(stdio.console)
            socket.send_fds(peer, [b"/dev/ptmx"], [master])
        yield slave, slave, slave
    finally:
        os.close(master)
        os.close(slave)
