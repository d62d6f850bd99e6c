# SPDX-License-Identifier: Apache-2.0
"""How a containerd shim is started, and what is left to do when it is dead.

Its command line and its home are `shim.binary`'s. Three generations answer `start` in three ways:
an address, JSON, a BootstrapResult (containerd core/runtime/v2/README.md). The first two want
nothing on stdin, or options; the youngest insists on BootstrapParams; so it is asked without first,
and again with them when it refuses.
"""

import contextlib
import json
import os
import re
import shutil
from typing import Any, NamedTuple

from google.protobuf import any_pb2
from google.protobuf.message import DecodeError

from shim import binary, diagnostics, errors, loop, process, reaper, runtimes
from shim.pb.containerd import bootstrap_pb2

EVENTS = "events"
_CONFIG, _OCI_VERSION = "config.json", "1.0.2"
_ANNOTATION = "io.kubernetes.cri."
_OUTPUT_LIMIT = 64 << 10
_TAIL = 4096
_KILL_SECONDS, _KILL_PAUSE = 5.0, 0.02
_DELETE_SECONDS = 10.0
_ADDRESS = re.compile(r"(unix://)?[/@\0][^\s\0]+")
_SUN_PATH = 107


# A field that an Any does not have and in BootstrapParams is no text. Without it, options pass for
# BootstrapParams of another shim in containerd 2.3 (pkg/shim), which then looks no further.
_NO_PARAMS = b"\x22\x01\xff"


class Answer(NamedTuple):
    """Where a shim listens (a socket's path; NUL first: abstract) and which Task API it speaks."""

    address: str
    version: int


class Launcher:
    """Starts the shim of a pod, which is told `options`, and cleans up behind it. All errors name
    handler and binary.
    """

    def __init__(
        self,
        name: str,
        path: str,
        root: str,
        *,
        pod_id: str,
        children: reaper.Reaper,
        timeout: float,
        options: any_pb2.Any | None = None,
    ) -> None:
        self.home = binary.home(root, pod_id)
        self.said = b""
        self._who = f"handler {name}: {os.path.basename(path)}"
        self._path = path
        self._pod_id = pod_id
        self._children = children
        self._timeout = timeout
        self._options = options
        self._log: loop.Task[None] | None = None
        self._held = -1

    def named(self, what: str) -> str:
        """Return a message that says who it is about."""
        return f"{self._who} {what}"

    def settle(self) -> str:
        """Make the home, once; return a name by which others find the events socket in it."""
        if self._held < 0:
            self._held = binary.make(self.home)
            self._open_log()
        return self._reachable(os.path.join(self.home, EVENTS))

    async def start(self, bundle: str) -> Answer:
        """Start the shim, which sends its events to a socket in its home. Without a bundle all that
        it learns of the pod is the id.
        """
        events = self.settle()
        self._write_config(bundle)
        done = await self._start(events, old_stdin(self._options))
        if done.returncode:
            again = await self._start(events, self._params(events).SerializeToString())
            done = done if again.returncode else again
        if done.returncode:
            raise errors.FailedPrecondition(self.named(_how_ended("start", done)))
        return self._parse(done.stdout)

    def _write_config(self, bundle: str) -> None:
        if bundle:
            shutil.copy(os.path.join(bundle, _CONFIG), self.home)
            return
        annotations = {
            f"{_ANNOTATION}container-type": "sandbox", f"{_ANNOTATION}sandbox-id": self._pod_id,
        }  # fmt: skip
        with open(os.path.join(self.home, _CONFIG), "w") as file:
            json.dump({"ociVersion": _OCI_VERSION, "annotations": annotations}, file)

    async def delete(self, container_id: str, bundle: str) -> None:
        """Have the binary remove what a dead shim has left of a container. One that cannot is
        logged: what it had started is dead, and files and cgroups go with the container.
        """
        try:
            done = await self._command("delete", container_id, bundle, timeout=_DELETE_SECONDS)
            wrong = _how_ended("delete", done) if done.returncode else ""
        except errors.ShimError as error:
            wrong = error.message
        if wrong:
            diagnostics.report("no clean-up", container=container_id, error=self.named(wrong))

    async def bury(self) -> None:
        """Kill the shim with all that it has started, and remove its socket. Raises
        DeadlineExceeded.
        """
        try:
            async with loop.timeout(_KILL_SECONDS):
                while process.kill_orphans(binary.mark(self.home)):
                    await loop.sleep(_KILL_PAUSE)
        except TimeoutError:
            raise errors.DeadlineExceeded(self.named("does not die")) from None
        binary.remove_socket(self.home)

    def remove(self) -> None:
        """Remove the home, and let go of it."""
        if self._log is not None:
            self._log.cancel()
            self._log = None
        shutil.rmtree(self.home, ignore_errors=True)
        if self._held >= 0:
            os.close(self._held)
            self._held = -1

    def last_words(self) -> str:
        """Return the last error that it logged, "" when there is none."""
        lines = [x for x in self.said.splitlines() if re.search(rb"level=(error|fatal|panic)", x)]
        return runtimes.last_error(lines[-1]) if lines else ""

    async def _start(self, events: str, stdin: bytes) -> loop.Finished:
        return await self._command(
            "start", self._pod_id, self.home, timeout=self._timeout, events=events, stdin=stdin
        )

    async def _command(
        self,
        verb: str,
        wanted: str,
        bundle: str,
        *,
        timeout: float,
        events: str = "",
        stdin: bytes = b"",
    ) -> loop.Finished:
        if "/" in self._path and not os.access(self._path, os.X_OK):
            raise errors.FailedPrecondition(self.named(f"cannot run: {self._path} is no program"))
        grpc = self._grpc()
        argv = binary.argv(self._path, self.home, verb, wanted=wanted, directory=bundle, grpc=grpc)
        try:
            with self._children.launching():
                return await loop.run_command(
                    argv, stdin=stdin, timeout=timeout, max_output=_OUTPUT_LIMIT,
                    env=binary.environment(self.home, events, grpc),
                )  # fmt: skip
        except TimeoutError as error:
            text = f"{verb} did not end within {timeout:g} s and was killed"
            raise errors.DeadlineExceeded(self.named(text)) from error
        except OSError as error:
            raise errors.FailedPrecondition(self.named(f"cannot run: {error.strerror}")) from error

    def _params(self, events: str) -> bootstrap_pb2.BootstrapParams:
        return bootstrap_pb2.BootstrapParams(
            instance_id=self._pod_id,
            namespace=binary.NAMESPACE,
            containerd_ttrpc_address=events,
            containerd_grpc_address=self._grpc(),
            containerd_binary="/bin/true",
            extensions=[bootstrap_pb2.Extension(value=self._options)] if self._options else (),
        )

    def _parse(self, said: bytes) -> Answer:
        version, address, protocol = read_answer(said)
        if not _ADDRESS.fullmatch(address):
            raise errors.FailedPrecondition(
                self.named(f"start printed {said[:80]!r}, which is no address of a unix socket")
            )
        name = address.removeprefix("unix://")
        is_path = address.startswith("unix:///")  # without a scheme it is abstract
        if is_path:
            binary.note_socket(self.home, name)
        if version not in (2, 3) or protocol != "ttrpc":
            text = (
                f"speaks version {version} of the Task API over {protocol}; known: 2, 3 over ttrpc"
            )
            raise errors.FailedPrecondition(self.named(text))
        return Answer(name if is_path else "\0" + name.lstrip("@\0"), version)

    def _grpc(self) -> str:
        return self._reachable(os.path.join(self.home, binary.GRPC))

    def _reachable(self, path: str) -> str:
        """Return a name by which others find our socket; a long path by way of our descriptor."""
        if len(os.fsencode(path)) <= _SUN_PATH:
            return path
        return f"/proc/{os.getpid()}/fd/{self._held}/{os.path.basename(path)}"

    def _open_log(self) -> None:
        """Be the reader of its log, without which older shims do not start."""
        path = os.path.join(self.home, "log")
        os.mkfifo(path, 0o700)
        self._log = loop.spawn(self._listen(os.open(path, os.O_RDWR | os.O_NONBLOCK)), name="log")

    async def _listen(self, fd: int) -> None:
        try:
            while True:
                await loop.readable(fd)
                self.said = (self.said + os.read(fd, _TAIL))[-_TAIL:]
        except loop.Cancelled:
            return
        finally:
            os.close(fd)


def old_stdin(options: any_pb2.Any | None) -> bytes:
    """Return what `start` reads where it wants no BootstrapParams."""
    return options.SerializeToString() + _NO_PARAMS if options else b""


def read_answer(said: bytes) -> tuple[int, str, str]:
    """Return version, address and protocol of what `start` printed; "" for what is not there."""
    text = said.decode(errors="replace").strip()
    if text.startswith("{"):
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            found = json.loads(text)
            return int(found["version"]), str(found["address"]), str(found["protocol"])
    if not _ADDRESS.fullmatch(text):
        with contextlib.suppress(DecodeError, UnicodeDecodeError):
            result = bootstrap_pb2.BootstrapResult.FromString(said)
            return result.version, result.address, result.protocol
    return 2, text, "ttrpc"


def of_sandbox(bundle: str) -> dict[str, Any]:
    """Return what the Sandbox API wants to know of a sandbox, which its config.json tells."""
    with open(os.path.join(bundle, _CONFIG), "rb") as file:
        spec = json.load(file)
    paths = {ns["type"]: ns.get("path", "") for ns in spec["linux"]["namespaces"]}
    return {
        "netns_path": paths.get("network", ""),
        "annotations": spec.get("annotations", {}),
    }


def _how_ended(verb: str, done: loop.Finished) -> str:
    how = f"status {done.returncode}" if done.returncode > 0 else f"signal {-done.returncode}"
    said = runtimes.last_error(done.stderr) or runtimes.last_error(done.stdout)
    return f"{verb} ended with {how}" + (f": {said}" if said else " and said nothing")
