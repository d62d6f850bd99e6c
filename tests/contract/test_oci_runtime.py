# SPDX-License-Identifier: Apache-2.0
"""What every runtime below a shim does: the fake one, runc and crun pass the same tests.

Those whose containers live in a kernel of their own need a shim around them: see
tests/integration/test_handlers.py.

The test process is the subreaper, as a shim is; containers share a busybox root.
"""

import json
import os
import shutil
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from shim import cgroup, console, errors, linux, loop, process, reaper, runtimes, sealed
from shim.runtimes import oci
from tests.fakes import runtime as fakes
from tests.lab import bundle, cgroups, faults, waiting

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
            return fakes.Plain(self.children)
        return oci.Oci(
            path,
            os.fspath(self.folder / "state"),
            dialect=oci.dialect_of("", self.name),
            children=self.children,
            timeout=timeout,
        )

    def prepare(self, *args: str, **options: Any) -> bundle.Bundle:
        return bundle.make(self.folder, self.root, args, **options)

    async def run(self, made: bundle.Bundle, **streams: Any) -> runtimes.Process:
        folder = os.fspath(made.path)
        stdio = runtimes.Stdio(**streams)
        return await self.runtime.run(made.id, folder, directory=folder, stdio=stdio)

    async def exec(self, made: bundle.Bundle, *args: str, part: str = "", **streams: Any) -> int:
        """Run a command in a container to its end; return its exit code."""
        folder = made.path / "exec"
        folder.mkdir()
        (folder / runtimes.PROCESS_FILE).write_text(json.dumps(bundle.process(args)))
        stdio = runtimes.Stdio(**streams)
        started = await self.runtime.exec(
            made.id, directory=os.fspath(folder), cgroup=part, stdio=stdio
        )
        return await started.wait()

    @asynccontextmanager
    async def running(
        self, *args: str, **options: Any
    ) -> AsyncIterator[tuple[bundle.Bundle, runtimes.Process]]:
        """Run a container for the block."""
        made = self.prepare(*(args or FOREVER), **options)
        init = await self.run(made)
        try:
            yield made, init
        finally:
            await self.runtime.delete(made.id)
            await init.wait()

    def drive(self, work: Coroutine[Any, Any, None]) -> None:
        async def within() -> None:
            async with loop.timeout(50):
                await work

        before = set(os.listdir("/proc/self/fd"))
        loop.run(within())
        self.children.sweep()
        assert set(os.listdir("/proc/self/fd")) <= before


@pytest.fixture(scope="session")
def root(hugetlb: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    linux.prctl_set_child_subreaper()
    yield bundle.rootfs(tmp_path_factory.mktemp("root") / "root")
    cgroups.remove(bundle.PARENT)


REAL = ("runc", pytest.param("crun", marks=pytest.mark.needs("crun")))


@pytest.fixture(params=["plain", *REAL])
def lab(request: pytest.FixtureRequest, tmp_path: Path, root: Path) -> Lab:
    return Lab(request.param, tmp_path, root)


@pytest.fixture(params=REAL)
def real(request: pytest.FixtureRequest, tmp_path: Path, root: Path) -> Lab:
    """Return the lab of a runtime that really makes containers."""
    return Lab(request.param, tmp_path, root)


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
        made = lab.prepare("sh", "-c", "cat; echo err >&2; exit 3")
        stdin = process.input_file(b"input")
        with pipe() as (out, stdout), pipe() as (err, stderr):
            init = await lab.run(made, stdin=stdin, stdout=stdout, stderr=stderr)
            os.close(stdin)
            assert await init.wait() == 3
            assert os.read(out, 100) == b"input"
            assert os.read(err, 100) == b"err\n"
        await lab.runtime.delete(made.id)

    lab.drive(work())


def test_a_terminal_comes_by_the_console_socket(lab: Lab) -> None:
    async def work() -> None:
        made = lab.prepare("sh", "-c", "tty; exec sleep 60", terminal=True)
        with console.ConsoleSocket(os.fspath(made.path)) as listener:
            init = await lab.run(made, console=listener.path)
            master = await listener.receive()
        await loop.readable(master)
        assert os.read(master, 100).startswith(b"/dev/pts/")
        os.close(master)
        await lab.runtime.delete(made.id)
        assert await init.wait() in (129, 137)  # the hang-up may be first

    lab.drive(work())


def test_an_end_before_run_returns_is_not_lost(lab: Lab) -> None:
    async def work() -> None:
        for code in (0, 1, 77):
            made = lab.prepare("sh", "-c", f"exit {code}")
            assert await (await lab.run(made)).wait() == code
            await lab.runtime.delete(made.id)

    lab.drive(work())


def test_a_missing_program_is_named(lab: Lab) -> None:
    async def work() -> None:
        made = lab.prepare("no-such-program")
        with pytest.raises(errors.ShimError, match=r"no-such-program.*not found") as caught:
            await lab.run(made)
        assert "\n" not in caught.value.message
        await lab.runtime.delete(made.id)

    lab.drive(work())


def test_an_id_is_used_once(lab: Lab) -> None:
    async def work() -> None:
        async with lab.running() as (made, _):
            with pytest.raises(errors.ShimError, match=r"exist"):
                await lab.run(made)

    lab.drive(work())


# -- exec ------------------------------------------------------------------------------------------


def test_exec_is_a_process_in_the_container(lab: Lab) -> None:
    async def work() -> None:
        async with lab.running() as (made, init):
            with pipe() as (out, stdout):
                assert await lab.exec(made, "sh", "-c", "echo hi; exit 5", stdout=stdout) == 5
                assert os.read(out, 100) == b"hi\n"
            await init.signal(0)

    lab.drive(work())


def test_exec_joins_the_namespaces(real: Lab) -> None:
    async def work() -> None:
        async with real.running("sh", "-c", "hostname inside; exec sleep 60") as (made, _):
            await loop.sleep(0.1)
            with pipe() as (out, stdout):
                await real.exec(made, "hostname", stdout=stdout)
                assert os.read(out, 100) == b"inside\n"

    real.drive(work())


def test_exec_of_a_missing_program_is_named(lab: Lab) -> None:
    async def work() -> None:
        async with lab.running() as (made, _):
            with pytest.raises(errors.ShimError, match=r"no-such-program.*not found"):
                await lab.exec(made, "no-such-program")

    lab.drive(work())


def test_exec_in_what_does_not_run_is_an_error(lab: Lab) -> None:
    async def work() -> None:
        made = lab.prepare("true")
        with pytest.raises(errors.ShimError, match=r"does not exist|No such file"):
            await lab.exec(made, "true")

    lab.drive(work())


def test_an_exec_can_have_a_part_of_the_cgroup(real: Lab) -> None:
    async def work() -> None:
        async with real.running() as (made, _):
            part = cgroup.Cgroup(made.cgroups).part("exec-1")
            if not real.runtime.can_split_cgroups(part.controller):
                return
            controller = part.create()
            name = f"{controller}:exec-1" if controller else "exec-1"
            with pipe() as (out, stdout):
                await real.exec(made, "cat", "/proc/self/cgroup", part=name, stdout=stdout)
                assert b"/exec-1" in os.read(out, 4096)
            assert part.remove()

    real.drive(work())


# -- update, delete --------------------------------------------------------------------------------


def test_update_sets_resources(lab: Lab) -> None:
    async def work() -> None:
        async with lab.running() as (made, _):
            await lab.runtime.update(made.id, b'{"pids": {"limit": 33}}')
            if lab.name != "plain":
                assert made.pids_limit() == "33"

    lab.drive(work())


def test_update_of_nonsense_is_an_error(lab: Lab) -> None:
    async def work() -> None:
        async with lab.running() as (made, _):
            with pytest.raises(errors.ShimError):
                await lab.runtime.update(made.id, b"nonsense")

    lab.drive(work())


def test_delete_kills_what_runs_and_may_be_repeated(lab: Lab) -> None:
    async def work() -> None:
        made = lab.prepare(*FOREVER)
        init = await lab.run(made)
        await lab.runtime.delete(made.id)
        assert await init.wait() == 137
        await lab.runtime.delete(made.id)
        await lab.runtime.delete("never-was-there")
        assert not cgroup.Cgroup(made.cgroups).processes()

    lab.drive(work())


# -- runtimes that misbehave -----------------------------------------------------------------------


@pytest.fixture
def odd(tmp_path: Path, root: Path) -> Callable[..., Lab]:
    """Return a function that makes a lab with runc whose verbs do something first."""

    def make(*, timeout: float = 30, **verbs: str) -> Lab:
        folder = tmp_path / "odd"
        folder.mkdir()
        faults.handler(folder, **verbs)
        lab = Lab("runc", tmp_path, root)
        lab.runtime = lab.make(os.fspath(folder / "odd-runc"), timeout)
        return lab

    return make


@pytest.mark.parametrize("verb", ["run", "exec", "delete"])
def test_a_runtime_that_hangs_is_killed_with_its_children(
    odd: Callable[..., Lab], verb: str
) -> None:
    lab = odd(timeout=0.5, **{verb: "sleep 321 & setsid sleep 321 & wait"})

    async def work() -> None:
        made = lab.prepare(*FOREVER)
        verbs: dict[str, Callable[[], Coroutine[Any, Any, object]]] = {
            "run": lambda: lab.run(made),
            "exec": lambda: lab.exec(made, "true"),
            "delete": lambda: lab.runtime.delete(made.id),
        }
        with pytest.raises(errors.DeadlineExceeded, match=f"{verb} did not end within 0.5 s"):
            await verbs[verb]()

    lab.drive(work())
    waiting.until(lambda: not faults.processes("sleep", "321"), "its children are dead")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("exit 7", "odd-runc run ended with status 7 and said nothing"),
        ("kill -9 $$", "odd-runc run ended with signal 9 and said nothing"),
        ("exit 0", "the runtime reported success but no pid"),
    ],
)
def test_a_runtime_that_says_nothing(odd: Callable[..., Lab], line: str, message: str) -> None:
    lab = odd(run=line)

    async def work() -> None:
        with pytest.raises(errors.ShimError, match=message):
            await lab.run(lab.prepare("true"))

    lab.drive(work())


def test_a_runtime_that_talks_without_end(odd: Callable[..., Lab]) -> None:
    lab = odd(delete="head -c 5000000 /dev/zero | tr '\\0' x >&2; echo the end >&2; exit 1")

    async def work() -> None:
        with pytest.raises(errors.ShimError) as caught:
            await lab.runtime.delete("c1")
        assert len(caught.value.message) <= runtimes.MESSAGE_LIMIT

    lab.drive(work())


def test_a_runtime_that_is_not_there(tmp_path: Path, root: Path) -> None:
    lab = Lab("runc", tmp_path, root)
    lab.runtime = lab.make("/no/such/runtime", 30)

    async def work() -> None:
        with pytest.raises(errors.FailedPrecondition, match="cannot run /no/such/runtime"):
            await lab.run(lab.prepare("true"))

    lab.drive(work())


@pytest.mark.needs("crun")
def test_a_copy_is_run_while_the_file_is_what_was_copied(tmp_path: Path, root: Path) -> None:
    """The file is not crun at all: what succeeds was run from the copy."""
    program = tmp_path / "crun"
    shutil.copy("/bin/false", program)
    copy = sealed.copy(process.find("crun"))
    lab = Lab("crun", tmp_path, root)
    lab.runtime = oci.Oci(
        os.fspath(program),
        os.fspath(tmp_path / "state"),
        dialect=oci.DIALECTS["crun"],
        children=lab.children,
        timeout=30,
        copied=(copy, sealed.identity(os.fspath(program))),
    )

    async def work() -> None:
        async with lab.running() as (made, _):
            assert await lab.exec(made, "sh", "-c", "exit 5") == 5
        os.utime(program)
        with pytest.raises(errors.ShimError, match="crun run ended with status 1"):
            await lab.run(lab.prepare("true"))

    lab.drive(work())
    os.close(copy)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (b"", ""),
        (b"plain\nwords\n", "words"),
        (b'{"level":"error","msg":"the reason"}\n', "the reason"),
        (b'{"level":"error","msg":"why"}\n{"level":"warning","msg":"by the way"}\n', "why"),
        (b'{"level":"info","msg":"only this"}\n', "only this"),
        (b'{"level":"error","msg":"two\\nlines"}', "two lines"),
        (b"runc run failed: unable to start container process: exec: no", "exec: no"),
        (b"exec failed: unable to start container process: chdir: no", "chdir: no"),
        (b'{"level":"ERROR","message":"why"}\n{"level":"WARN","message":"by the way"}\n', "why"),
        (b'{"level":"ERROR","message":"error in executing command: no"}', "no"),  # youki
        (b'{"level":"error"}', '{"level":"error"}'),
        (b"[1, 2]", "[1, 2]"),
        (b"\xff\n", "\ufffd"),
        (b"[" * 100_000, "[" * runtimes.MESSAGE_LIMIT),
    ],
)
def test_the_last_error_of_what_a_runtime_said(said: bytes, message: str) -> None:
    assert runtimes.last_error(said) == message
