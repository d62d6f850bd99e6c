# SPDX-License-Identifier: Apache-2.0
"""What every runtime below a shim does: the fake one, runc and crun pass the same tests.

The test process is the subreaper, as a shim is; containers share a busybox root.
"""

import json
import os
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from shim import cgroup, console, errors, linux, loop, reaper, runtimes
from shim.runtimes import oci
from tests.fakes import runtime as fakes
from tests.lab import bundle, cgroups, faults

FOREVER = ("sh", "-c", "sleep 60")

pytestmark = pytest.mark.needs("root", "runc", "busybox")


class Lab:
    """A runtime, a place for bundles, and the reaper that sees their ends."""

    def __init__(self, name: str, folder: Path, root: Path, timeout: float = 30) -> None:
        self.name = name
        self.folder = folder
        self.root = root
        self.children = reaper.Reaper()
        self.runtime = self.make(name, timeout)

    def make(self, path: str, timeout: float) -> runtimes.Runtime:
        if path == "plain":
            return fakes.Plain()
        return oci.Oci(
            path,
            os.fspath(self.folder / "state"),
            dialect=oci.dialect_of(self.name, path),
            children=self.children,
            timeout=timeout,
        )

    def bundle(self, *args: str, **options: Any) -> bundle.Bundle:
        return bundle.make(self.folder, self.root, args, **options)

    async def run(self, made: bundle.Bundle, **streams: Any) -> reaper.Process:
        folder = os.fspath(made.path)
        stdio = runtimes.Stdio(**streams)
        with self.children.launching():
            pid = await self.runtime.run(made.id, folder, directory=folder, stdio=stdio)
            return self.children.claim(pid)

    async def exec(self, made: bundle.Bundle, *args: str, part: str = "", **streams: Any) -> int:
        """Run a command in a container to its end; return its exit code."""
        folder = made.path / "exec"
        folder.mkdir()
        (folder / runtimes.PROCESS_FILE).write_text(json.dumps(bundle.process(args)))
        stdio = runtimes.Stdio(**streams)
        with self.children.launching():
            pid = await self.runtime.exec(
                made.id, directory=os.fspath(folder), cgroup=part, stdio=stdio
            )
            process = self.children.claim(pid)
        return await process.wait()

    @asynccontextmanager
    async def running(
        self, *args: str, **options: Any
    ) -> AsyncIterator[tuple[bundle.Bundle, reaper.Process]]:
        """Run a container for the block."""
        made = self.bundle(*(args or FOREVER), **options)
        process = await self.run(made)
        try:
            yield made, process
        finally:
            await self.runtime.delete(made.id)
            await process.wait()

    def drive(self, work: Coroutine[Any, Any, None]) -> None:
        async def within() -> None:
            async with loop.timeout(50):
                await work

        before = set(os.listdir("/proc/self/fd"))
        loop.run(within())
        self.children.sweep()
        assert set(os.listdir("/proc/self/fd")) <= before


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    linux.prctl_set_child_subreaper()
    yield bundle.rootfs(tmp_path_factory.mktemp("root") / "root")
    cgroups.remove(bundle.PARENT)


@pytest.fixture(params=["plain", "runc", pytest.param("crun", marks=pytest.mark.needs("crun"))])
def lab(request: pytest.FixtureRequest, tmp_path: Path, root: Path) -> Lab:
    if request.param == "crun":
        request.getfixturevalue("crun")
    return Lab(request.param, tmp_path, root)


@pytest.fixture
def real(lab: Lab) -> Lab:
    """Return the lab of a runtime that really makes containers."""
    if lab.name == "plain":
        pytest.skip("the fake runtime has no namespaces")
    return lab


@contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    ours, theirs = os.pipe()
    try:
        yield ours, theirs
    finally:
        os.close(ours)
        os.close(theirs)


# -- run -------------------------------------------------------------------------------------------


def test_a_container_gets_the_streams_and_gives_an_exit_code(lab: Lab) -> None:
    async def work() -> None:
        made = lab.bundle("sh", "-c", "cat; echo err >&2; exit 3")
        with pipe() as (stdin, feed), pipe() as (out, stdout), pipe() as (err, stderr):
            os.write(feed, b"input")
            os.set_blocking(feed, False)
            process = await lab.run(made, stdin=stdin, stdout=stdout, stderr=stderr)
            assert os.read(out, 100) == b"input"
            os.close(os.dup2(os.open("/dev/null", os.O_WRONLY), feed))
            os.open("/dev/null", os.O_WRONLY)
            assert await process.wait() == 3
            assert os.read(err, 100) == b"err\n"
        await lab.runtime.delete(made.id)

    lab.drive(work())
