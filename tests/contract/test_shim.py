# SPDX-License-Identifier: Apache-2.0
"""A real shim, forked from a real zygote, with real containers: all that shim.proto promises."""

import asyncio
import json
import os
import re
import shutil
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cri_server import guest_stats, usage
from shim import client, errors
from shim.pb import shim_pb2 as pb
from tests.conftest import Marks
from tests.lab import bundle, cgroups, faults, waiting

FOREVER = ("sh", "-c", "trap 'exit 9' TERM; while :; do sleep 0.05; done")
SIZED = 'until [ "$(stty size 2>&1)" = "30 100" ]; do sleep 0.01; done; echo sized'
POD = "pod-1"

pytestmark = pytest.mark.needs("root", "runc", "busybox")


class Pod:
    """A shim and what a server would keep for it."""

    def __init__(self, shim: client.ShimClient, pid: int, folder: Path, root: Path) -> None:
        self.shim = shim
        self.pid = pid
        self.folder = folder
        self.root = root

    async def create(self, *args: str, **options: Any) -> bundle.Bundle:
        """Create a container; `options` are those of `bundle.make` and of CreateRequest."""
        names = ("stdin", "stdin_once", "log_path", "cgroups")
        ours = {k: options.pop(k) for k in names if k in options}
        made = bundle.make(self.folder / "containers", self.root, args or FOREVER, **options)
        request = pb.CreateRequest(
            id=made.id,
            bundle=os.fspath(made.path),
            terminal=options.get("terminal", False),
            **{"log_path": os.fspath(made.log), "cgroups": made.cgroups, **ours},
        )
        await self.shim.create(request)
        return made

    async def run(self, *args: str, **options: Any) -> bundle.Bundle:
        made = await self.create(*args, **options)
        await self.shim.start(pb.StartRequest(id=made.id))
        return made

    async def kill(self, made: bundle.Bundle, number: int, **more: Any) -> None:
        await self.shim.kill(pb.KillRequest(id=made.id, signal=number, **more))

    async def wait(self, made: bundle.Bundle) -> pb.ExitRecord:
        return (await self.shim.wait(pb.WaitRequest(id=made.id), timeout=waiting.patient(20))).exit

    async def state(self, made: bundle.Bundle) -> pb.Container:
        [found] = (await self.shim.state(pb.StateRequest(id=made.id))).containers
        return found

    async def delete(self, made: bundle.Bundle) -> pb.DeleteResponse:
        return await self.shim.delete(pb.DeleteRequest(id=made.id), timeout=waiting.patient(20))

    async def exec(self, made: bundle.Bundle, *args: str, **limits: int) -> client.ExecResult:
        times: dict[str, Any] = {
            "timeout_ms": milliseconds(20),
            "drain_ms": milliseconds(2),
            **limits,
        }
        return await self.shim.exec_sync(exec_start(made, *args, **times))

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))


def milliseconds(seconds: float) -> int:
    """Return what the protocol wants for `seconds` of hardware."""
    return int(waiting.patient(seconds) * 1000)


def exec_start(
    made: bundle.Bundle, *args: str, terminal: bool = False, **more: Any
) -> pb.ExecStart:
    process = json.dumps(bundle.process(args, terminal=terminal)).encode()
    return pb.ExecStart(id=made.id, process=process, **more)


@pytest.fixture(scope="session")
def root(hugetlb: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield bundle.rootfs(tmp_path_factory.mktemp("root") / "root")
    cgroups.remove(bundle.PARENT)


@pytest.fixture
async def zygote() -> AsyncIterator[client.Zygote]:
    made = client.Zygote()
    await made.start()
    yield made
    await made.close()


SHIM = "containerd-shim-runc-v2"
OF_CONTAINERD = {"init.pid", "log.json", "options.json", "runtime"}  # go with the bundle
RUNTIMES = (
    "runc",
    pytest.param("crun", marks=pytest.mark.needs("crun")),
    pytest.param(SHIM, marks=pytest.mark.needs(SHIM)),
)


@pytest.fixture(params=RUNTIMES)
def runtime(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def pods(
    zygote: client.Zygote, tmp_path: Path, root: Path, marks: Marks
) -> AsyncIterator[Callable[..., Any]]:
    """Return a function that forks a shim with an OCI runtime; all are ended in the end."""
    marks.add(os.fspath(tmp_path))
    made: list[Pod] = []

    async def fork(path: str = "runc", **options: str) -> Pod:
        socket = os.fspath(tmp_path / f"pod{len(made)}" / "shim.sock")
        path = shutil.which(path) or path
        if "containerd-shim" in path:
            options["dialect"] = "runc"
        handler = client.HandlerSpec(
            name="test",
            path=path,
            root=os.fspath(tmp_path / "state"),
            kind="shim" if "containerd-shim" in path else "oci",
            options=options,
        )
        pid = await zygote.fork(POD, socket, handler=handler)
        made.append(Pod(await client.ShimClient.connect(socket), pid, tmp_path, root))
        await made[-1].shim.ping()  # it is up
        return made[-1]

    yield fork
    for pod in made:
        await end(pod)


async def end(pod: Pod) -> None:
    if not faults.alive(pod.pid):
        return
    shim = await client.ShimClient.connect(pod.shim.socket_path)
    await shim.stop_sandbox(pb.StopSandboxRequest(), timeout=waiting.patient(20))
    for one in (await shim.state(pb.StateRequest())).containers:
        await shim.delete(pb.DeleteRequest(id=one.id), timeout=waiting.patient(20))
    await shim.shutdown(timeout=waiting.patient(5))
    waiting.until(lambda: not faults.alive(pod.pid), "the shim has ended")
    pod.shim.close()
    shim.close()


@pytest.fixture
async def pod(pods: Callable[..., Any], runtime: str) -> Pod:
    """Return the shim of a pod, with runc and then with crun."""
    made: Pod = await pods(runtime)
    return made


@pytest.fixture
async def one(pods: Callable[..., Any]) -> Pod:
    """Return the shim of a pod with runc, for what does not depend on the runtime."""
    made: Pod = await pods()
    return made


# -- containers ------------------------------------------------------------------------------------


async def test_the_shim_says_who_it_is(one: Pod) -> None:
    answer = await one.shim.ping()
    assert (answer.pod_id, answer.pid, answer.version) == (POD, one.pid, 1)
    assert faults.name_of(one.pid) == "cri-shim"


async def test_a_life(pod: Pod) -> None:
    script = f"echo hello; echo oops >&2; sleep {waiting.patient(0.1):g}; exit 3"
    made = await pod.create("sh", "-c", script)
    assert (await pod.state(made)).state == pb.CREATED
    started = await pod.shim.start(pb.StartRequest(id=made.id))
    running = await pod.state(made)
    assert running.state == pb.RUNNING
    assert (running.pid, running.started_at, running.start_time) == (
        started.pid,
        started.started_at,
        started.start_time,
    )
    waits = await asyncio.gather(*(pod.wait(made) for _ in range(5)))
    assert {record.exit_code for record in waits} == {3}
    assert sorted(made.lines()) == [("stderr", "F", "oops"), ("stdout", "F", "hello")]
    assert json.loads((made.path / "exit.json").read_text())["exit_code"] == 3
    assert (await pod.state(made)).state == pb.STOPPED
    assert (await pod.delete(made)).exit == waits[0]
    assert not any(map(os.path.exists, made.cgroups.values()))
    left = {path.name for path in made.path.iterdir()} - OF_CONTAINERD
    assert left == {"config.json", "logs"}
    assert not (await pod.delete(made)).HasField("exit")
    with pytest.raises(errors.NotFound):
        await pod.state(made)


async def test_a_missing_program(pod: Pod) -> None:
    first = await pod.run("true")  # a containerd shim, and our connections with it, stay
    await pod.wait(first)
    await pod.delete(first)
    before = pod.descriptors()
    made = await pod.create("no-such-program")
    with pytest.raises(errors.ShimError, match=r"no-such-program.*not found"):
        await pod.shim.start(pb.StartRequest(id=made.id))
    record = await pod.wait(made)
    assert (record.exit_code, record.reason) == (128, "StartError")
    assert "no-such-program" in record.message
    assert "\n" not in record.message
    assert record.finished_at > 0
    with pytest.raises(errors.FailedPrecondition):
        await pod.shim.start(pb.StartRequest(id=made.id))
    await pod.delete(made)
    assert pod.descriptors() == before


async def test_a_quick_end_is_not_lost(pod: Pod) -> None:
    for code in range(10):
        made = await pod.run("sh", "-c", f"exit {code}")
        assert (await pod.wait(made)).exit_code == code
        await pod.delete(made)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 9), (signal.SIGKILL, 137)])
async def test_signals(pod: Pod, number: int, code: int) -> None:
    made = await pod.run("sh", "-c", f"echo up; {FOREVER[2]}")
    await asyncio.to_thread(waiting.until, lambda: made.lines(), "it is up")
    await pod.kill(made, number)
    assert (await pod.wait(made)).exit_code == code
    await pod.kill(made, number)


async def test_delete_kills(pod: Pod) -> None:
    made = await pod.run()
    assert (await pod.delete(made)).exit.exit_code == 137


async def test_the_tree_of_a_container_without_pid_namespace(pod: Pod) -> None:
    script = "sleep 654 & setsid sleep 654 & exec sleep 654"
    made = await pod.run("sh", "-c", script, namespaces=("mount", "ipc", "uts"))
    await asyncio.to_thread(
        waiting.until, lambda: len(faults.processes("sleep", "654")) == 3, "three of them"
    )
    await pod.kill(made, signal.SIGKILL)
    assert (await pod.wait(made)).exit_code == 137
    waiting.until(lambda: not faults.processes("sleep", "654"), "all are dead")
    await pod.delete(made)
    waiting.until(
        lambda: all(faults.name_of(child) == SHIM[:15] for child in faults.children(pod.pid)),
        "no zombie is left",
    )


async def test_orphans_are_buried(one: Pod) -> None:
    script = "for i in 1 2 3; do (sleep 0.05 &); done; exec sleep 60"
    made = await one.run("sh", "-c", script, namespaces=("mount", "ipc", "uts"))
    container = (await one.state(made)).pid
    await asyncio.to_thread(
        waiting.until, lambda: faults.children(one.pid) == [container], "no zombie is left"
    )


async def test_kill_everything(pod: Pod) -> None:
    made = await pod.run("sh", "-c", "sleep 655 & exec sleep 655")
    await pod.kill(made, 0, all=True)
    assert (await pod.wait(made)).exit_code == 137
    assert faults.processes("sleep", "655") == []


async def test_update(pod: Pod) -> None:
    made = await pod.run()
    request = pb.UpdateRequest(id=made.id, resources=b'{"pids": {"limit": 44}}')
    await pod.shim.update(request)
    assert made.pids_limit() == "44"


async def test_a_containerd_shim_counts_what_the_cgroups_of_the_host_do(
    pod: Pod, runtime: str
) -> None:
    made = await pod.run()
    request = pb.StatsRequest(id=made.id)
    if runtime != SHIM:
        with pytest.raises(errors.Unimplemented):
            await pod.shim.stats(request)
        return
    answer = await pod.shim.stats(request)
    counted = guest_stats.counted(answer.type_url, answer.value)
    own = usage.read(made.cgroups)
    assert own is not None
    assert 0 < (counted.cpu or 0) <= (own.cpu or 0)
    assert counted.memory == pytest.approx(own.memory, abs=1 << 20)


async def test_an_id_is_taken_once(one: Pod) -> None:
    made = await one.create()
    with pytest.raises(errors.FailedPrecondition, match="exists"):
        await one.shim.create(pb.CreateRequest(id=made.id, bundle=os.fspath(made.path)))


# -- memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["exec tail /dev/zero", "tail /dev/zero; exit 1"])
async def test_out_of_memory(one: Pod, script: str) -> None:
    made = await one.run("sh", "-c", script, resources={"memory": {"limit": 16 << 20}})
    record = await one.wait(made)
    assert record.exit_code != 0
    assert (record.oom_killed, record.message) == (True, "1 process OOM-killed")


async def test_a_kill_is_not_out_of_memory(one: Pod) -> None:
    made = await one.run(resources={"memory": {"limit": 64 << 20}})
    await one.kill(made, signal.SIGKILL)
    assert not (await one.wait(made)).oom_killed


@pytest.mark.parametrize("by_us", [False, True])
async def test_out_of_memory_is_told_when_systemd_has_removed_the_cgroup_already(
    one: Pod, tmp_path: Path, by_us: bool
) -> None:
    counter = tmp_path / "memory.events"
    counter.write_text("oom_kill 5\n")
    made = await one.run(cgroups={"": os.fspath(tmp_path / "gone.scope")})
    counter.write_text("oom_kill 6\n")
    if by_us:
        await one.kill(made, signal.SIGKILL)
    else:
        os.kill((await one.state(made)).pid, signal.SIGKILL)
    assert (await one.wait(made)).oom_killed


async def test_a_kill_by_another_is_not_out_of_memory(one: Pod, tmp_path: Path) -> None:
    (tmp_path / "memory.events").write_text("oom_kill 5\n")
    made = await one.run(cgroups={"": os.fspath(tmp_path / "gone.scope")})
    os.kill((await one.state(made)).pid, signal.SIGKILL)
    assert not (await one.wait(made)).oom_killed


# -- logs ------------------------------------------------------------------------------------------


async def test_reopen_loses_and_doubles_nothing(one: Pod) -> None:
    script = "i=0; while [ ! -e /tmp/enough ]; do echo $i; i=$((i+1)); done"
    made = await one.run("sh", "-c", script)
    logs: list[Path] = []
    for number in range(5):
        logs.append(made.log.with_name(f"0.log.{number}"))
        made.log.rename(logs[-1])
        await one.shim.reopen_log(pb.ReopenLogRequest(id=made.id))
        size = logs[-1].stat().st_size
        assert made.log.exists()
        await grown(made, 1)
        assert logs[-1].stat().st_size == size
    (one.root / "tmp/enough").touch()
    await one.wait(made)
    lines = [line for log in (*logs, made.log) for line in log.read_text().splitlines()]
    assert [int(line.split()[3]) for line in lines] == list(range(len(lines)))
    assert len(lines) > 1000
    with pytest.raises(errors.FailedPrecondition):
        await one.shim.reopen_log(pb.ReopenLogRequest(id=made.id))


async def test_a_flood_is_written_in_little_memory(one: Pod) -> None:
    size = 100_000_000
    made = await one.run("sh", "-c", f"head -c {size} /dev/zero | tr '\\0' x; echo")
    await one.wait(made)
    with made.log.open("rb") as log:
        contents = [line.split(b" ", 3)[2:] for line in log]
    assert sum(len(content) - 1 for _, content in contents) == size
    assert {tag for tag, _ in contents[:-1]} == {b"P"}
    assert contents[-1][0] == b"F"
    assert peak(one.pid) < 50 << 20
    made.log.unlink()


async def test_output_goes_on_without_a_client(one: Pod) -> None:
    made = await one.run("sh", "-c", "i=0; while [ $i -lt 50000 ]; do echo $i; i=$((i+1)); done")
    one.shim.close()
    one.shim = await client.ShimClient.connect(one.shim.socket_path)
    await one.wait(made)
    assert len(made.lines()) == 50000


async def test_without_a_log_output_is_discarded(one: Pod) -> None:
    made = await one.run("sh", "-c", "head -c 1000000 /dev/zero", log_path="")
    assert (await one.wait(made)).exit_code == 0


async def test_a_log_that_is_a_link_is_refused(one: Pod, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "target")
    with pytest.raises(errors.InvalidArgument, match="cannot open the log"):
        await one.create(log_path=os.fspath(link))
    assert not (tmp_path / "target").exists()


# -- exec ------------------------------------------------------------------------------------------


def assert_no_exec_left(made: bundle.Bundle) -> None:
    """Also right after the answer, for which the client does not wait until all is cleaned."""
    waiting.until(lambda: not list(made.path.glob("exec-*")), "the exec's folder is gone")


async def test_exec(pod: Pod) -> None:
    made = await pod.run()
    result = await pod.exec(made, "sh", "-c", "echo out; echo err >&2; exit 4")
    assert (result.stdout, result.stderr, result.exit_code) == (b"out\n", b"err\n", 4)
    assert not result.timed_out
    assert_no_exec_left(made)


async def test_exec_of_a_missing_program(pod: Pod) -> None:
    made = await pod.run()
    with pytest.raises(errors.ShimError, match=r"no-such-program.*not found"):
        await pod.exec(made, "no-such-program")
    assert_no_exec_left(made)


async def test_exec_that_takes_too_long_leaves_nothing(pod: Pod) -> None:
    made = await pod.run()
    script = "sleep 656 & setsid sleep 656 & echo begun; sleep 656"
    begin = asyncio.get_running_loop().time()
    result = await pod.exec(made, "sh", "-c", script, timeout_ms=milliseconds(0.5))
    assert asyncio.get_running_loop().time() - begin < waiting.patient(1.5)
    assert (result.stdout, result.exit_code, result.timed_out) == (b"begun\n", 137, True)
    waiting.until(lambda: not faults.processes("sleep", "656"), "the tree is dead")
    assert (await pod.state(made)).state == pb.RUNNING
    assert (await pod.exec(made, "true")).exit_code == 0


async def test_an_exec_whose_process_left_its_session_dies_whole(one: Pod) -> None:
    made = await one.run()
    script = "setsid sh -c 'setsid sleep 657 & sleep 657' & sleep 0.1; exit 0"
    result = await one.exec(
        made, "sh", "-c", f"({script}); sleep 657", timeout_ms=milliseconds(0.5)
    )
    assert result.timed_out
    waiting.until(lambda: not faults.processes("sleep", "657"), "the tree is dead")


async def test_a_child_that_keeps_the_pipe_is_left_alive(pod: Pod) -> None:
    made = await pod.run()
    begin = asyncio.get_running_loop().time()
    result = await pod.exec(made, "sh", "-c", f"sleep {waiting.patient(3)} & echo $!", drain_ms=200)
    assert asyncio.get_running_loop().time() - begin < waiting.patient(2)
    assert (result.exit_code, result.timed_out) == (0, False)
    alive = await pod.exec(made, "kill", "-0", result.stdout.decode().strip())
    assert alive.exit_code == 0


async def test_a_part_of_the_cgroup_goes_when_its_last_process_has_gone(one: Pod) -> None:
    made = await one.run()
    for _ in range(5):
        await one.exec(made, "sh", "-c", "sleep 0.1 >/dev/null 2>&1 &")
        await asyncio.to_thread(waiting.until, lambda: not busy(made), "the children have ended")
    await one.exec(made, "sh", "-c", "sleep 0.1 >/dev/null 2>&1 &")
    await asyncio.to_thread(waiting.until, lambda: len(made.parts()) <= 1, "the older parts go")


async def test_an_exec_dies_with_its_client(pod: Pod) -> None:
    made = await pod.run()
    async with pod.shim.exec() as stream:
        script = "setsid sleep 658 & sleep 658"
        await stream.send(pb.ExecInput(start=exec_start(made, "sh", "-c", script)))
        first = await stream.recv()
        assert first is not None
        assert first.started > 0
        await asyncio.to_thread(
            waiting.until, lambda: len(faults.processes("sleep", "658")) == 2, "both sleep"
        )
    await asyncio.to_thread(
        waiting.until, lambda: not faults.processes("sleep", "658"), "the tree is dead"
    )
    await asyncio.to_thread(
        waiting.until, lambda: not list(made.path.glob("exec-*")), "the folder is gone"
    )


async def test_an_exec_whose_client_leaves_at_once(one: Pod) -> None:
    made = await one.run()
    before = one.descriptors()
    for _ in range(5):
        async with one.shim.exec() as stream:
            await stream.send(pb.ExecInput(start=exec_start(made, "sleep", "659")))
    await one.exec(made, "true")  # the others have been accepted before
    await asyncio.to_thread(
        waiting.until, lambda: one.descriptors() == before, "no descriptor is left"
    )
    waiting.until(lambda: not faults.processes("sleep", "659"), "nothing is left of them")
    assert_no_exec_left(made)


async def test_exec_with_input(pod: Pod) -> None:
    made = await pod.run()
    async with pod.shim.exec() as stream:
        await stream.send(pb.ExecInput(start=exec_start(made, "cat", stdin=True)))
        text = os.urandom(1 << 20)
        sending = asyncio.create_task(send_all(stream, text))
        received, code = await receive(stream)
        await sending
    assert received == text
    assert code == 0


async def send_all(stream: Any, text: bytes) -> None:
    for at in range(0, len(text), 30_000):
        await stream.send(pb.ExecInput(stdin=text[at : at + 30_000]))
    await stream.send(pb.ExecInput(close_stdin=True))


async def receive(stream: Any) -> tuple[bytes, int]:
    """Return the output and the exit code of an exec."""
    received = b""
    while (output := await stream.recv()) is not None:
        received += output.stdout
        if output.HasField("exit"):
            return received, output.exit.exit_code
    raise AssertionError("the exec ended without an exit")


async def test_exec_with_a_terminal(pod: Pod) -> None:
    made = await pod.run()
    async with pod.shim.exec() as stream:
        script = f"{SIZED}; read word; echo got $word; exit 6"
        start = exec_start(made, "sh", "-c", script, terminal=True, stdin=True)
        await stream.send(pb.ExecInput(start=start))
        await stream.send(pb.ExecInput(resize=pb.Resize(width=100, height=30)))
        await stream.send(pb.ExecInput(stdin=b"it\n"))
        received, code = await receive(stream)
    assert re.fullmatch(rb"(it\r\n)?sized\r\n(it\r\n)?got it\r\n", received)
    assert code == 6


async def test_many_at_once(one: Pod) -> None:
    made = await one.run()
    before = one.descriptors()
    results = await asyncio.gather(*(one.exec(made, "sh", "-c", f"exit {n}") for n in range(30)))
    assert [result.exit_code for result in results] == list(range(30))
    await asyncio.to_thread(
        waiting.until, lambda: one.descriptors() == before, "no descriptor is left"
    )


async def test_exec_needs_a_running_container(one: Pod) -> None:
    made = await one.create()
    with pytest.raises(errors.FailedPrecondition):
        await one.exec(made, "true")
    start = pb.ExecStart(id="unknown", process=b"{}")
    with pytest.raises(errors.NotFound):
        await one.shim.exec_sync(start)


@pytest.mark.parametrize("process", [b"", b"nonsense", b"[]"])
async def test_exec_of_what_is_no_process(one: Pod, process: bytes) -> None:
    made = await one.run()
    with pytest.raises(errors.InvalidArgument):
        await one.shim.exec_sync(pb.ExecStart(id=made.id, process=process))


async def test_the_first_message_must_be_start(one: Pod) -> None:
    async with one.shim.exec() as stream:
        await stream.send(pb.ExecInput(stdin=b"x"))
        with pytest.raises(errors.InvalidArgument):
            await stream.recv()


async def test_the_container_may_end_during_an_exec(pod: Pod) -> None:
    made = await pod.run()
    running = asyncio.create_task(pod.exec(made, "sleep", "666"))
    await asyncio.to_thread(
        waiting.until, lambda: faults.processes("sleep", "666"), "the exec runs"
    )
    await pod.kill(made, signal.SIGKILL)
    assert (await running).exit_code == 137
    assert (await pod.wait(made)).exit_code == 137


# -- attach ----------------------------------------------------------------------------------------


async def attached(
    shim: client.ShimClient, made: bundle.Bundle, received: bytearray, **streams: bool
) -> None:
    """Attach until the end; the output goes to `received` as it comes."""
    async with shim.attach() as stream:
        await stream.send(pb.AttachInput(start=pb.AttachStart(id=made.id, **streams)))
        while (output := await stream.recv()) is not None:
            received += output.stdout + output.stderr
            if output.HasField("exit"):
                return
    raise AssertionError("the attach ended without an exit")


async def test_all_who_are_attached_see_all_output(one: Pod) -> None:
    script = "while read x && [ $x != end ]; do echo out $x; echo err $x >&2; done"
    made = await one.run("sh", "-c", script, stdin=True)
    seen: list[bytearray] = [bytearray() for _ in "abc"]
    clients = [
        asyncio.create_task(attached(one.shim, made, into, stdout=into is not seen[2], stderr=True))
        for into in seen
    ]
    async with one.shim.attach() as stream:
        await stream.send(pb.AttachInput(start=pb.AttachStart(id=made.id, stdin=True)))
        while not all(seen):  # from then on all three are attached
            await stream.send(pb.AttachInput(stdin=b"early\n"))
            await asyncio.sleep(0.01)
        await stream.send(pb.AttachInput(stdin=b"word\nend\n"))
        await one.wait(made)
    await asyncio.gather(*clients)
    assert [b"out word\n" in bytes(one) for one in seen] == [True, True, False]
    assert all(b"err word\n" in bytes(one) for one in seen)
    assert b"out" not in seen[2]
    assert ("stdout", "F", "out word") in made.lines()


async def test_stdin_once_ends_with_the_first_client(one: Pod) -> None:
    made = await one.run("sh", "-c", "cat; echo end", stdin=True, stdin_once=True)
    async with one.shim.attach() as stream:
        await stream.send(pb.AttachInput(start=pb.AttachStart(id=made.id, stdin=True)))
        await stream.send(pb.AttachInput(stdin=b"one\n"))
        await asyncio.to_thread(waiting.until, made.log.read_text, "the line is logged")
    await one.wait(made)
    assert [content for _, _, content in made.lines()] == ["one", "end"]


async def test_without_stdin_once_a_client_leaves_stdin_open(one: Pod) -> None:
    made = await one.run("sh", "-c", "read a; echo $a; read b; echo $b", stdin=True)
    for number, word in enumerate((b"one\n", b"two\n"), start=1):
        async with one.shim.attach() as stream:
            await stream.send(pb.AttachInput(start=pb.AttachStart(id=made.id, stdin=True)))
            await stream.send(pb.AttachInput(stdin=word))
            await stream.send(pb.AttachInput(close_stdin=True))
            await grown(made, number)
    await one.wait(made)
    assert [content for _, _, content in made.lines()] == ["one", "two"]


@pytest.mark.parametrize("once", [False, True])
async def test_a_client_that_sends_no_more_leaves_when_all_is_written(
    one: Pod, *, once: bool
) -> None:
    script = "sleep 0.3; head -c 200000 | wc -c; exec sleep 60"
    made = await one.run("sh", "-c", script, stdin=True, stdin_once=once)
    async with one.shim.attach() as stream:
        await stream.send(pb.AttachInput(start=pb.AttachStart(id=made.id, stdin=True)))
        await stream.send(pb.AttachInput(stdin=bytes(200_000)))
        await stream.finish()
        async with asyncio.timeout(waiting.patient(5)):
            assert await stream.recv() is None
    await asyncio.to_thread(waiting.until, lambda: "200000" in made.log.read_text(), "all is read")
    await one.kill(made, signal.SIGKILL)
    await one.wait(made)


async def test_a_terminal_is_attached_and_resized(one: Pod) -> None:
    script = "read x; stty size; read x; exit 5"
    made = await one.run("sh", "-c", script, terminal=True, stdin=True)
    async with one.shim.attach() as stream:
        start = pb.AttachStart(id=made.id, stdin=True, stdout=True)
        await stream.send(pb.AttachInput(start=start))
        await stream.send(pb.AttachInput(resize=pb.Resize(width=111, height=22)))
        await stream.send(pb.AttachInput(stdin=b"\n"))
        received = b""
        while b"22 111" not in received:
            output = await stream.recv()
            assert output is not None
            received += output.stdout
        await stream.send(pb.AttachInput(stdin=b"\n"))
        assert (await one.wait(made)).exit_code == 5
    assert {stream for stream, _, _ in made.lines()} == {"stdout"}


async def test_clients_of_a_silent_container_leave_nothing(one: Pod) -> None:
    made = await one.run("sleep", "60", stdin=True)
    before = one.descriptors()
    for _ in range(50):
        async with one.shim.attach() as stream:
            start = pb.AttachStart(id=made.id, stdin=True, stdout=True, stderr=True)
            await stream.send(pb.AttachInput(start=start))
    await asyncio.to_thread(
        waiting.until, lambda: one.descriptors() == before, "no descriptor is left"
    )
    await one.kill(made, signal.SIGKILL)
    await one.wait(made)


async def test_a_client_that_reads_nothing_does_not_delay_the_end(one: Pod) -> None:
    made = await one.run("sh", "-c", "sleep 0.3; head -c 300000 /dev/zero; exec sleep 60")
    init = (await one.state(made)).pid
    async with one.shim.attach() as stream:
        start = pb.AttachStart(id=made.id, stdout=True)
        await stream.send(pb.AttachInput(start=start))
        await asyncio.to_thread(
            waiting.until, lambda: faults.name_of(init) != "sh", "all is written, and nobody reads"
        )
        assert logged(made) > 0
        await one.kill(made, signal.SIGKILL)
        begin = asyncio.get_running_loop().time()
        await one.wait(made)
        assert asyncio.get_running_loop().time() - begin < waiting.patient(5)
    assert logged(made) == 300_000


# -- the pod ---------------------------------------------------------------------------------------


def sandbox_request(pod: Pod, **more: Any) -> pb.CreateSandboxRequest:
    folder = pod.folder / "ns"
    folder.mkdir(exist_ok=True)
    paths = {f"{kind}_path": os.fspath(folder / kind) for kind in ("network", "ipc", "uts")}
    return pb.CreateSandboxRequest(**{**paths, "hostname": "pod-1", **more})


def pins(request: pb.CreateSandboxRequest) -> list[str]:
    paths = (request.network_path, request.ipc_path, request.uts_path)
    mounts = Path("/proc/self/mountinfo").read_text()
    return [path for path in paths if f" {path} " in mounts]


async def test_a_sandbox_is_made_and_released(one: Pod) -> None:
    request = sandbox_request(one, sysctls={"net.ipv4.ip_default_ttl": "31"})
    await one.shim.create_sandbox(request)
    assert len(pins(request)) == 3
    for _ in range(2):
        await one.shim.stop_sandbox(pb.StopSandboxRequest(sandbox=request))
        assert pins(request) == []
        assert not exists(request.network_path)


async def test_a_bad_sysctl_makes_nothing(one: Pod) -> None:
    for sysctls in ({"net.ipv4.no_such": "1"}, {"vm.swappiness": "1"}):
        [name] = sysctls
        with pytest.raises(errors.ShimError, match=name):
            await one.shim.create_sandbox(sandbox_request(one, sysctls=sysctls))
        assert pins(sandbox_request(one)) == []


async def test_mappings_need_a_path(one: Pod) -> None:
    mapping = [pb.IdMapping(container_id=0, host_id=100000, size=1000)]
    with pytest.raises(errors.InvalidArgument, match="user_path"):
        await one.shim.create_sandbox(sandbox_request(one, uid_mappings=mapping))


@pytest.mark.needs("catatonit")
async def test_a_sandbox_container(pod: Pod) -> None:
    made = bundle.make(pod.folder / "containers", pod.root, ("catatonit", "-P"))
    shutil.copy2(str(shutil.which("catatonit")), pod.root / "bin")
    request = sandbox_request(pod)
    await pod.shim.create_sandbox(request)
    await pod.shim.create(pb.CreateRequest(id=made.id, bundle=os.fspath(made.path)))
    pid = (await pod.shim.start(pb.StartRequest(id=made.id))).pid
    waiting.until(lambda: faults.name_of(pid) == "catatonit", "it runs")
    assert (await pod.state(made)).state == pb.RUNNING
    with pytest.raises(errors.FailedPrecondition, match="is running"):
        await pod.shim.shutdown()
    os.kill(pid, signal.SIGKILL)
    assert (await pod.wait(made)).exit_code == 137
    await pod.shim.stop_sandbox(pb.StopSandboxRequest(sandbox=request))


async def test_stop_ends_every_container(pod: Pod) -> None:
    request = sandbox_request(pod)
    await pod.shim.create_sandbox(request)
    running = [await pod.run("sh", "-c", "trap '' TERM; sleep 661 & wait") for _ in range(3)]
    await pod.shim.stop_sandbox(pb.StopSandboxRequest(sandbox=request))
    for made in running:
        assert (await pod.wait(made)).exit_code == 137
        assert (await pod.state(made)).state == pb.STOPPED
    assert faults.processes("sleep", "661") == []
    assert pins(request) == []


async def test_shutdown_ends_the_shim(one: Pod) -> None:
    made = await one.run()
    with pytest.raises(errors.FailedPrecondition, match="is running"):
        await one.shim.shutdown()
    await one.delete(made)
    await one.shim.shutdown()
    await one.shim.closed
    await asyncio.to_thread(waiting.until, lambda: not faults.alive(one.pid), "it has ended")
    assert not exists(one.shim.socket_path)


# -- runtimes that misbehave -----------------------------------------------------------------------


@pytest.fixture
def odd(tmp_path: Path, pods: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that makes a pod with runc whose verbs do something first."""

    async def make(**options: str) -> tuple[Pod, Path]:
        folder = tmp_path / "odd"
        folder.mkdir()
        faults.handler(folder)
        return await pods(os.fspath(folder / "odd-runc"), **options), folder

    return make


async def test_a_start_that_hangs_ends_in_time_and_disturbs_nobody(
    odd: Callable[..., Any],
) -> None:
    seconds = f"{waiting.patient(1):g}"
    pod, folder = await odd(timeout=seconds)
    other = await pod.run()
    faults.break_(folder, run="sleep 662 & wait")
    made = await pod.create()
    starting = asyncio.create_task(pod.shim.start(pb.StartRequest(id=made.id)))
    await asyncio.to_thread(waiting.until, lambda: faults.processes("sleep", "662"), "it hangs")
    assert (await pod.exec(other, "true")).exit_code == 0
    await pod.shim.ping(timeout=waiting.patient(0.5))
    with pytest.raises(errors.DeadlineExceeded, match=f"did not end within {seconds} s"):
        await starting
    assert (await pod.wait(made)).reason == "StartError"
    waiting.until(lambda: not faults.processes("sleep", "662"), "nothing is left of it")


async def test_a_start_that_hangs_can_be_killed(odd: Callable[..., Any]) -> None:
    pod, folder = await odd()
    faults.break_(folder, run="sleep 663 & wait")
    made = await pod.create()
    starting = asyncio.create_task(pod.shim.start(pb.StartRequest(id=made.id)))
    await asyncio.to_thread(waiting.until, lambda: faults.processes("sleep", "663"), "it hangs")
    await pod.kill(made, signal.SIGKILL)
    with pytest.raises(errors.FailedPrecondition, match="killed before"):
        await starting
    assert (await pod.wait(made)).exit_code == 128
    waiting.until(lambda: not faults.processes("sleep", "663"), "nothing is left of it")


async def test_an_exec_that_hangs_ends_in_time(odd: Callable[..., Any]) -> None:
    pod, folder = await odd()
    made = await pod.run()
    faults.break_(folder, exec="sleep 664 & wait")
    result = await pod.exec(made, "true", timeout_ms=milliseconds(0.3))
    assert result.timed_out
    waiting.until(lambda: not faults.processes("sleep", "664"), "nothing is left of it")


async def test_a_runtime_that_only_talks_on_stderr(odd: Callable[..., Any]) -> None:
    pod, folder = await odd()
    faults.break_(folder, run="echo the reason >&2; exit 1")
    made = await pod.create()
    with pytest.raises(errors.ShimError, match=r"^the reason$"):
        await pod.shim.start(pb.StartRequest(id=made.id))
    assert (await pod.wait(made)).message == "the reason"


async def test_a_megabyte_of_stderr_blocks_nobody(odd: Callable[..., Any]) -> None:
    pod, folder = await odd()
    faults.break_(folder, run="head -c 1000000 /dev/zero | tr '\\0' y >&2; exit 1")
    made = await pod.create()
    with pytest.raises(errors.ShimError):
        await pod.shim.start(pb.StartRequest(id=made.id))
    assert len((await pod.wait(made)).message) <= 1024


async def test_a_delete_that_hangs_does_not_hold_back_the_exit(odd: Callable[..., Any]) -> None:
    pod, folder = await odd(timeout=f"{waiting.patient(1):g}")
    made = await pod.run("true")
    faults.break_(folder, delete="sleep 665 & wait")
    await pod.kill(made, signal.SIGKILL)
    await pod.wait(made)
    with pytest.raises(errors.DeadlineExceeded):
        await pod.delete(made)
    faults.mend(folder)
    await pod.delete(made)


async def grown(made: bundle.Bundle, lines: int) -> None:
    """Wait until the log file that is written now has that many lines."""
    await asyncio.to_thread(
        waiting.until,
        lambda: made.log.read_bytes().count(b"\n") >= lines,
        f"the log has {lines} lines",
    )


def logged(made: bundle.Bundle) -> int:
    """Return how many bytes of output the log holds: a line has 40 beside them."""
    return sum(len(line) - 40 for line in made.log.read_bytes().splitlines())


def exists(path: str) -> bool:
    return os.path.exists(path)


def busy(made: bundle.Bundle) -> bool:
    """Tell whether processes are in the parts that execs have of the cgroup; an empty part may go
    while we look.
    """
    return any(usage.text(part, "cgroup.procs") for part in made.parts())


def peak(pid: int) -> int:
    """Return the most memory that a process ever had, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+)", status)[0]) << 10
