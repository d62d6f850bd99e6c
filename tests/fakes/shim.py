# SPDX-License-Identifier: Apache-2.0
"""A containerd shim that does as a script says: a process of its own, real ttrpc, runc below.

    containerd-shim-fake-v2 ... start    ──spawn──► python -m tests.fakes.shim SCRIPT serve ...
            └── answers as the script says               └── Task v2 and v3, Sandbox

`install` writes the program and the script, which is read anew at each step, so that a test can
change it while the shim lives:

    start     address, json, protobuf; fail, garbage, nothing, nobody (listens), hang
    version   2 or 3, of the Task API; for json and protobuf
    sandbox   whether it has the Sandbox API
    delete    fail, hang
    daemon    whether Create needs containerd's socket, as in runwasi
    at        by method: die, hang, garbage, {"error": text, "code": 13}, {"sleep": seconds},
              {"pid": a lie}, {"after": "die"} when all is done but not said
"""

import argparse
import asyncio
import contextlib
import fcntl
import itertools
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from google.protobuf import any_pb2, empty_pb2
from google.protobuf.message import DecodeError, Message

from shim import linux
from shim.pb import ttrpc_pb2
from shim.pb.containerd import bootstrap_pb2, cgroups_v2_pb2, sandbox_pb2, task_pb2, task_v2_pb2

NAME = "containerd-shim-fake-v2"
HEADER = struct.Struct(">IIBB")
REQUEST, RESPONSE = 1, 2
NOT_FOUND, UNIMPLEMENTED, INTERNAL = 5, 12, 13
NAME_OF_MODULE = "tests.fakes.shim"
HOME = Path(__file__).parents[2]
NUMBERS = itertools.count()


def install(folder: Path, **script: Any) -> Path:
    """Write the program and its script into a folder; return the program's path."""
    program = folder / NAME
    (folder / "script.json").write_text(json.dumps(script))
    program.write_text(
        f"#!/bin/sh\nPYTHONPATH={HOME} exec {sys.executable} -m {NAME_OF_MODULE} "
        f'{folder / "script.json"} "$@"\n'
    )
    program.chmod(0o755)
    return program


# -- its command line ------------------------------------------------------------------------------


def main() -> int:
    script, *rest = sys.argv[1:]
    parser = argparse.ArgumentParser()
    for flag in ("namespace", "address", "publish-binary", "id", "bundle", "fd"):
        parser.add_argument(f"-{flag}", default="")
    parser.add_argument("-v", action="store_true")
    parser.add_argument("verb", nargs="?")
    given = parser.parse_args(rest)
    if given.v:
        print(f"{NAME}:\n  Version:  0.1")
        return 0
    if given.verb == "serve":
        asyncio.run(Shim(Path(script), given.id, given.address).serve(int(given.fd)))
        return 0
    verbs = {"start": start, "delete": delete}
    return verbs[given.verb](json.loads(Path(script).read_text()), given, script)


def start(script: Mapping[str, Any], given: argparse.Namespace, path: str) -> int:
    """Start what serves and say where, or do what the script wants instead."""
    how = script.get("start", "address")
    annotations = json.loads(Path("config.json").read_text())["annotations"]
    assert annotations["io.kubernetes.cri.sandbox-id"] == given.id
    if how == "hang":
        signal.pause()
    if how == "fail":
        print("no VM on this host", file=sys.stderr)
        return 3
    name = f"/tmp/fake-shim-{given.id[:16]}.sock"
    if how == "nobody":
        print(f"unix://{name}")
    if how in ("nobody", "nothing"):
        return 0
    said = sys.stdin.buffer.read()
    if how == "protobuf" and not is_told(said, given.id):
        print("no BootstrapParams on stdin", file=sys.stderr)
        return 1
    Path(f"{path}.stdin").write_bytes(said)
    if how != "garbage":
        listen(name, given, path)
    sys.stdout.buffer.write(answer(how, f"unix://{name}", script.get("version", 2)))
    return 0


def is_told(said: bytes, pod_id: str) -> bool:
    """Say whether these are BootstrapParams, which options can look like (containerd does)."""
    with contextlib.suppress(DecodeError):
        return bootstrap_pb2.BootstrapParams.FromString(said).instance_id == pod_id
    return False


def listen(name: str, given: argparse.Namespace, script: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener, open(f"{script}.log", "ab") as log:
        listener.bind(name)
        listener.listen()
        fd = listener.fileno()
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                NAME_OF_MODULE,
                script,
                "-id",
                given.id,
                "-fd",
                str(fd),
                "-address",
                given.address,
                "serve",
            ],
            pass_fds=[fd],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            start_new_session=True,
        )


def answer(how: str, address: str, version: int) -> bytes:
    if how == "json":
        return json.dumps({"version": version, "address": address, "protocol": "ttrpc"}).encode()
    if how == "protobuf":
        made = bootstrap_pb2.BootstrapResult(version=version, address=address, protocol="ttrpc")
        return made.SerializeToString()
    return b"\x01\x02 VMM panicked: \xff" if how == "garbage" else address.encode()


def delete(script: Mapping[str, Any], given: argparse.Namespace, _: str) -> int:
    """Remove what a dead shim has left of a container."""
    how = script.get("delete", "")
    if how == "hang":
        signal.pause()
    if how == "fail":
        print("cannot remove the VM", file=sys.stderr)
        return 1
    root = os.path.join(os.environ["CRI_SHIM_HOME"], "fake")
    runc = ["runc", "--root", root, "delete", "--force", given.id]
    subprocess.run(runc, check=False, capture_output=True)
    return 0


# -- its services ----------------------------------------------------------------------------------


class Failure(Exception):
    """An answer with a status."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class Process:
    """An init or an exec."""

    def __init__(self, request: Any, directory: str) -> None:
        self.request, self.directory = request, directory
        self.pid = self.code = 0
        self.master = -1
        self.ended = asyncio.Event()

    def status(self) -> "task_pb2.Status.ValueType":
        if self.ended.is_set():
            return task_pb2.STOPPED
        return task_pb2.RUNNING if self.pid else task_pb2.CREATED

    async def watch(self) -> None:
        """Wait for its end, as its subreaper."""
        pidfd, loop = os.pidfd_open(self.pid), asyncio.get_running_loop()
        over = asyncio.Event()
        loop.add_reader(pidfd, over.set)
        await over.wait()
        loop.remove_reader(pidfd)
        end = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)  # noqa: ASYNC222 - it has ended
        assert end is not None
        os.close(pidfd)
        exited = end.si_code == os.CLD_EXITED
        self.code = end.si_status if exited else 128 + end.si_status
        self.ended.set()


class Shim:
    """The shim of one pod."""

    def __init__(self, script: Path, pod_id: str, containerd: str) -> None:
        self.script_path, self.pod_id, self.containerd = script, pod_id, containerd
        self.processes: dict[tuple[str, str], Process] = {}
        self.tasks: set[asyncio.Task[None]] = set()
        self.over = asyncio.Event()

    @property
    def script(self) -> Mapping[str, Any]:
        found: dict[str, Any] = json.loads(self.script_path.read_text())
        return found

    async def serve(self, fd: int) -> None:
        linux.prctl_set_child_subreaper()
        listener = socket.socket(fileno=fd)
        server = await asyncio.start_unix_server(self.connection, sock=listener)
        async with server:
            await self.over.wait()
        os._exit(0)

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                length, stream, _, _ = HEADER.unpack(await reader.readexactly(HEADER.size))
                payload = await reader.readexactly(length)
                self.spawn(self.call(stream, payload, writer))

    def spawn(self, coro: Any) -> None:
        task = asyncio.create_task(coro)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def call(self, stream: int, payload: bytes, writer: asyncio.StreamWriter) -> None:
        request = ttrpc_pb2.Request.FromString(payload)
        response = ttrpc_pb2.Response()
        try:
            response.payload = await self.dispatch(request)
        except Failure as e:
            response.status.code, response.status.message = e.code, str(e)
        said = response.SerializeToString()
        if self.script.get("at", {}).get(request.method) == "garbage":
            said = b"\xff\xff\xff"
        writer.write(HEADER.pack(len(said), stream, RESPONSE, 0) + said)
        await writer.drain()
        if request.method == "Shutdown":
            self.over.set()

    async def dispatch(self, request: ttrpc_pb2.Request) -> bytes:
        is_sandbox = request.service == "containerd.runtime.sandbox.v1.Sandbox"
        version = self.script.get("version", 2)
        if is_sandbox and not self.script.get("sandbox"):
            raise Failure(UNIMPLEMENTED, f"service {request.service}")
        if not is_sandbox and request.service != f"containerd.task.v{version}.Task":
            raise Failure(UNIMPLEMENTED, f"service {request.service}")
        do = METHODS.get(request.method)
        if do is None:
            raise Failure(UNIMPLEMENTED, f"method {request.method}")
        how = self.script.get("at", {}).get(request.method, {})
        await self.misbehave(how)
        message = getattr(sandbox_pb2 if is_sandbox else task_v2_pb2, do[0])
        made: Message = await do[1](self, message.FromString(request.payload))
        if isinstance(how, dict) and "pid" in how:
            made.pid = how["pid"]  # type: ignore[attr-defined]
        if isinstance(how, dict) and how.get("after") == "die":
            os._exit(1)
        return made.SerializeToString()

    async def misbehave(self, how: Any) -> None:
        if how == "die":
            os._exit(1)
        if how == "hang":
            await asyncio.Event().wait()
        if isinstance(how, dict) and "error" in how:
            raise Failure(how.get("code", INTERNAL), how["error"])
        if isinstance(how, dict) and "sleep" in how:
            await asyncio.sleep(how["sleep"])

    # -- what it does --------------------------------------------------------------------------

    def of(self, request: Any) -> Process:
        key = (request.id, getattr(request, "exec_id", ""))
        if key not in self.processes:
            raise Failure(NOT_FOUND, f"process {key} not found")
        return self.processes[key]

    async def runc(self, *argv: str, stdin: bytes = b"", streams: Any = None) -> None:
        """Run runc, which takes descriptors from `streams`; its last words are the failure."""
        log = f"fake-{next(NUMBERS)}.log"
        base = ["runc", "--root", "fake", "--log", log, "--log-format", "json"]
        given = streams or {
            "stdin": asyncio.subprocess.PIPE, "stdout": asyncio.subprocess.DEVNULL,
            "stderr": asyncio.subprocess.DEVNULL,
        }  # fmt: skip
        done = await asyncio.create_subprocess_exec(*base, *argv, **given)
        await done.communicate(None if streams else stdin)
        said = take(log)
        if done.returncode:
            raise Failure(INTERNAL, json.loads(said.splitlines()[-1])["msg"] if said else "runc")

    async def launch(self, process: Process, argv: list[str], rest: list[str]) -> None:
        pid_file = os.path.join(process.directory, "fake.pid")
        with contextlib.ExitStack() as stack:
            terminal: list[str] = []
            receiver = None
            if getattr(process.request, "terminal", False):
                receiver = stack.enter_context(ConsoleSocket(process.directory))
                terminal = ["--console-socket", receiver.path]
            streams = {name: stack.enter_context(opened(process, name)) for name in STREAMS}
            await self.runc(
                *argv, "--detach", "--pid-file", pid_file, *terminal, *rest, streams=streams
            )
            if receiver:
                process.master = receiver.receive()
                copy_terminal(process)
        process.pid = int(take(pid_file))
        self.spawn(process.watch())

    async def connect(self, _: Any) -> Message:
        return task_v2_pb2.ConnectResponse(shim_pid=os.getpid(), version="fake")

    async def create(self, request: Any) -> Message:
        if self.script.get("daemon"):
            await self.look_for_containerd()
        self.processes[request.id, ""] = Process(request, request.bundle)
        return task_v2_pb2.CreateTaskResponse(pid=0)

    async def look_for_containerd(self) -> None:
        """Connect to containerd and ask for a container; that it has none must be its own word."""
        import grpc  # for this alone: others should start soon

        assert os.environ["GRPC_ADDRESS"] == self.containerd
        async with grpc.aio.insecure_channel(f"unix://{self.containerd}") as channel:
            await asyncio.wait_for(channel.channel_ready(), 5)
            get: Any = channel.unary_unary("/containerd.services.containers.v1.Containers/Get")
            call = get(b"", timeout=5)
            if await call.code() is not grpc.StatusCode.UNIMPLEMENTED:
                raise Failure(INTERNAL, f"containerd says {await call.details()}")

    async def exec(self, request: Any) -> Message:
        directory = os.path.join(os.getcwd(), f"exec-{request.id[:8]}-{request.exec_id}")
        os.mkdir(directory)
        write(os.path.join(directory, "process.json"), request.spec.value)
        self.processes[request.id, request.exec_id] = Process(request, directory)
        return empty_pb2.Empty()

    async def start(self, request: Any) -> Message:
        process = self.of(request)
        if request.exec_id:
            file = os.path.join(process.directory, "process.json")
            await self.launch(process, ["exec", "--process", file], [request.id])
        else:
            if where := self.script.get("cgroup"):
                move(process.directory, where)
            await self.launch(process, run(process.directory), [request.id])
        return task_v2_pb2.StartResponse(pid=process.pid)

    async def state(self, request: Any) -> Message:
        process = self.of(request)
        return task_v2_pb2.StateResponse(
            id=request.id, pid=process.pid, status=process.status(), exit_status=process.code
        )

    async def wait(self, request: Any) -> Message:
        process = self.of(request)
        await process.ended.wait()
        return task_v2_pb2.WaitResponse(exit_status=process.code)

    async def kill(self, request: Any) -> Message:
        process = self.of(request)
        if process.ended.is_set() or not process.pid:
            raise Failure(NOT_FOUND, "process already finished")
        if request.all:
            await self.runc("kill", "--all", request.id, str(request.signal))
        else:
            os.kill(process.pid, request.signal)
        return empty_pb2.Empty()

    async def delete(self, request: Any) -> Message:
        process = self.of(request)
        if process.pid and not process.ended.is_set():
            raise Failure(9, "it is running")
        if request.exec_id:
            shutil.rmtree(process.directory)
        else:
            await self.runc("delete", "--force", request.id)
        del self.processes[request.id, request.exec_id]
        return task_v2_pb2.DeleteResponse(exit_status=process.code)

    async def update(self, request: Any) -> Message:
        await self.runc("update", "--resources", "-", request.id, stdin=request.resources.value)
        return empty_pb2.Empty()

    async def stats(self, request: Any) -> Message:
        self.of(request)
        made = cgroups_v2_pb2.Metrics()
        made.cpu.usage_usec, made.memory.usage = 1234, 45 << 20
        made.memory.inactive_file, made.memory.usage_limit = 5 << 20, 64 << 20
        packed = any_pb2.Any(type_url=made.DESCRIPTOR.full_name, value=made.SerializeToString())
        return task_v2_pb2.StatsResponse(stats=packed)

    async def resize(self, request: Any) -> Message:
        size = struct.pack("HHHH", request.height, request.width, 0, 0)
        fcntl.ioctl(self.of(request).master, termios.TIOCSWINSZ, size)
        return empty_pb2.Empty()

    async def nothing(self, _: Any) -> Message:
        return empty_pb2.Empty()

    # -- the Sandbox API -----------------------------------------------------------------------

    async def create_sandbox(self, request: Any) -> Message:
        assert request.annotations["io.kubernetes.cri.container-type"] == "sandbox"
        self.processes[request.sandbox_id, ""] = Process(request, request.bundle_path)
        return sandbox_pb2.CreateSandboxResponse()

    async def start_sandbox(self, request: Any) -> Message:
        process = self.processes[request.sandbox_id, ""]
        await self.launch(process, run(process.directory), [request.sandbox_id])
        return sandbox_pb2.StartSandboxResponse(pid=process.pid)

    async def wait_sandbox(self, request: Any) -> Message:
        process = self.processes[request.sandbox_id, ""]
        await process.ended.wait()
        return sandbox_pb2.WaitSandboxResponse(exit_status=process.code)

    async def stop_sandbox(self, request: Any) -> Message:
        await self.runc("kill", "--all", request.sandbox_id, "9")
        return sandbox_pb2.StopSandboxResponse()

    async def shut_sandbox_down(self, request: Any) -> Message:
        await self.runc("delete", "--force", request.sandbox_id)
        del self.processes[request.sandbox_id, ""]
        return sandbox_pb2.ShutdownSandboxResponse()


METHODS: Mapping[str, tuple[str, Any]] = {
    "Connect": ("ConnectRequest", Shim.connect),
    "Create": ("CreateTaskRequest", Shim.create),
    "Exec": ("ExecProcessRequest", Shim.exec),
    "Start": ("StartRequest", Shim.start),
    "State": ("StateRequest", Shim.state),
    "Wait": ("WaitRequest", Shim.wait),
    "Kill": ("KillRequest", Shim.kill),
    "Delete": ("DeleteRequest", Shim.delete),
    "Update": ("UpdateTaskRequest", Shim.update),
    "Stats": ("StatsRequest", Shim.stats),
    "ResizePty": ("ResizePtyRequest", Shim.resize),
    "CloseIO": ("CloseIORequest", Shim.nothing),
    "Shutdown": ("ShutdownRequest", Shim.nothing),
    "CreateSandbox": ("CreateSandboxRequest", Shim.create_sandbox),
    "StartSandbox": ("StartSandboxRequest", Shim.start_sandbox),
    "WaitSandbox": ("WaitSandboxRequest", Shim.wait_sandbox),
    "StopSandbox": ("StopSandboxRequest", Shim.stop_sandbox),
    "ShutdownSandbox": ("ShutdownSandboxRequest", Shim.shut_sandbox_down),
}
STREAMS = ("stdin", "stdout", "stderr")


def take(path: str) -> str:
    """Return what is in a file, which is then gone; "" if there is none."""
    try:
        text = Path(path).read_text()
        os.unlink(path)
    except FileNotFoundError:
        return ""
    return text


def write(path: str, data: bytes) -> None:
    Path(path).write_bytes(data)


# -- streams ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def opened(process: Process, name: str) -> Any:
    """Yield the descriptor that runc hands to a process; with a terminal it has none of ours."""
    path = getattr(process.request, name, "")
    if getattr(process.request, "terminal", False) or not path:
        path = os.devnull
    fd = os.open(path, os.O_RDONLY if name == "stdin" else os.O_WRONLY)
    try:
        yield fd
    finally:
        os.close(fd)


def move(bundle: str, cgroup: str) -> None:
    """Have a container be in another cgroup than was asked for."""
    file = Path(bundle, "config.json")
    config = json.loads(file.read_text())
    config["linux"]["cgroupsPath"] = cgroup
    file.write_text(json.dumps(config))


def run(bundle: str) -> list[str]:
    """Return runc's arguments to run a bundle, whose cgroup is systemd's if it is asked for as
    "slice:prefix:name".
    """
    config = json.loads(Path(bundle, "config.json").read_text())
    scope = ":" in config["linux"].get("cgroupsPath", "")
    return [*(["--systemd-cgroup"] if scope else []), "run", "--bundle", bundle]


class ConsoleSocket:
    """Where runc sends the master of a terminal."""

    def __init__(self, folder: str) -> None:
        self.path = os.path.join("/tmp", f"fake-console-{os.getpid()}-{id(self)}")
        self.listener = socket.socket(socket.AF_UNIX)

    def __enter__(self) -> "ConsoleSocket":
        self.listener.bind(self.path)
        self.listener.listen()
        return self

    def __exit__(self, *_: object) -> None:
        self.listener.close()
        os.unlink(self.path)

    def receive(self) -> int:
        accepted, _ = self.listener.accept()
        with accepted:
            _, [master], _, _ = socket.recv_fds(accepted, 4096, 1)
        return master


def copy_terminal(process: Process) -> None:
    """Copy between the terminal and the FIFOs until one side has ended, in threads."""
    request = process.request
    pairs = [(process.master, os.open(request.stdout, os.O_WRONLY))]
    if request.stdin:
        pairs.append((os.open(request.stdin, os.O_RDONLY), process.master))
    for source, target in pairs:
        threading.Thread(target=copy, args=(source, target), daemon=True).start()


def copy(source: int, target: int) -> None:
    with contextlib.suppress(OSError):
        while data := os.read(source, 4096):
            os.write(target, data)
    if not os.isatty(target):
        os.close(target)


if __name__ == "__main__":
    sys.exit(main())
