# SPDX-License-Identifier: Apache-2.0
"""runc, crun, runsc and youki by their command line: one method per verb, the differences as data.

A container is made with `run --detach`, one runtime process instead of the two of `create` and
`start`. Standard streams are handed through: a detached runtime leaves them to the container. What
the runtime itself has to say comes from its log file, not from those streams.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from shim import errors, loop, reaper, runtimes, sealed

_OUTPUT_LIMIT = 64 << 10
_LOG_TAIL = 16 << 10


class Dialect(NamedTuple):
    """In what an OCI runtime's command line differs from the others'. `{log}` stands for the log
    file.

    `sandboxed`: containers are processes of a kernel of the pod's own, which the pod's first
    container starts; the host sees neither their pids nor their ends (see `sandboxed.py`).
    """

    log_flags: tuple[str, ...] = ("--log", "{log}", "--log-format", "json")
    # The hierarchies ("v1", "v2") in which `exec --cgroup` takes "[controller:]name".
    exec_cgroups: frozenset[str] = frozenset()
    update_flags: tuple[str, ...] = ("--resources", "-")
    updates: bool = True
    sandboxed: bool = False


DIALECTS: Mapping[str, Dialect] = {
    # test_an_exec_can_have_a_part_of_the_cgroup: what runc and crun do with --cgroup.
    "runc": Dialect(exec_cgroups=frozenset({"v1", "v2"})),
    # --log in the form that crun 1.8 is run with in the tests.
    "crun": Dialect(
        log_flags=("--log", "file:{log}", "--log-format", "json"), exec_cgroups=frozenset({"v2"})
    ),
    # `runsc help` (2022): there is no `update`, and `exec` has no --cgroup; one limit holds for
    # the kernel with all that runs in it (google/gvisor#10264).
    "runsc": Dialect(updates=False, sandboxed=True),
    # Read, never run (youki-dev/youki at 0.7.0, crates/liboci-cli/src): the flags are runc's. exec
    # --cgroup is ignored up to 0.6 and since then a path without a controller: not used.
    "youki": Dialect(),
}


def dialect_of(name: str, path: str) -> Dialect:
    """Return the dialect of this name, else the one that the program's file name tells, else that
    of runc.
    """
    return DIALECTS.get(name) or DIALECTS.get(os.path.basename(path)) or DIALECTS["runc"]


class Oci:
    """An OCI runtime at `path` with its state below `root`; implements `runtimes.Runtime`.

    With `systemd` cgroups are scopes that systemd is asked for, "slice:prefix:name" in config.json.
    `args` are flags of the handler's configuration, before the verb. What the program itself gets
    wrong is told with the `handler` that it serves. `copied` is a descriptor of a sealed copy of
    the program, and the `sealed.identity` of the file when it was made.
    """

    shares_kernel = False
    opens_fifos = False

    def __init__(
        self,
        path: str,
        root: str,
        *,
        dialect: Dialect,
        children: reaper.Reaper,
        timeout: float,
        systemd: bool = False,
        args: Sequence[str] = (),
        handler: str = "",
        copied: tuple[int, str] = (-1, ""),
    ) -> None:
        self._base = (path, "--root", root, *(("--systemd-cgroup",) if systemd else ()), *args)
        self._who = f"handler {handler}: {path}" if handler else path
        self._path, self._copied = path, copied
        self._dialect = dialect
        self._children = children
        self._timeout = timeout

    async def prepare(self) -> None:
        """Do nothing: it keeps nothing running."""

    async def run(
        self, container_id: str, bundle: str, *, directory: str, stdio: runtimes.Stdio
    ) -> runtimes.Process:
        """Create and start a container; return its init."""
        with self._children.launching():
            pid = await self._launch(
                ("run", "--detach", "--bundle", bundle), (container_id,), directory, stdio
            )
            return self._claim_init(container_id, pid)

    async def exec(
        self, container_id: str, *, directory: str, cgroup: str, stdio: runtimes.Stdio
    ) -> runtimes.Process:
        """Start the process in `directory`/process.json inside a container."""
        process_file = os.path.join(directory, runtimes.PROCESS_FILE)
        part = ("--cgroup", cgroup) if cgroup else ()
        with self._children.launching():
            pid = await self._launch(
                ("exec", "--detach", "--process", process_file, *self._more_of_exec(directory)),
                (*part, container_id), directory, stdio,
            )  # fmt: skip
            return self._claim_exec(container_id, pid, directory)

    async def update(self, container_id: str, resources: bytes) -> None:
        """Apply LinuxResources (OCI JSON). Raises Unimplemented where the runtime cannot."""
        if not self._dialect.updates:
            what = "cannot change the limits of a running container"
            raise errors.Unimplemented(f"{self._who} {what}")
        await self._command(("update", *self._dialect.update_flags, container_id), stdin=resources)

    async def stats(self, container_id: str) -> tuple[str, bytes]:
        """Raise Unimplemented: the host's cgroups tell."""
        raise errors.Unimplemented("an OCI runtime counts nothing")

    async def delete(self, container_id: str) -> None:
        """Remove the container, killing what is left. Nothing happens when it does not exist."""
        await self._command(("delete", "--force", container_id))

    def can_split_cgroups(self, controller: str) -> bool:
        """Say whether `exec` takes a part of the cgroup in this hierarchy ("" for v2)."""
        return ("v1" if controller else "v2") in self._dialect.exec_cgroups

    async def close(self) -> None:
        """Do nothing: it keeps nothing running."""

    def _claim_init(self, container_id: str, pid: int) -> runtimes.Process:
        return self._claim(pid)

    def _claim_exec(self, container_id: str, pid: int, directory: str) -> runtimes.Process:
        return self._claim(pid)

    def _claim(self, pid: int) -> runtimes.Process:
        """Watch a process by its host pid. Raises Internal for one that was not started for us."""
        try:
            return self._children.claim(pid)
        except errors.Internal as error:
            raise errors.Internal(f"{self._who}: {error.message}") from error

    def _more_of_exec(self, directory: str) -> tuple[str, ...]:
        """Return further flags of `exec`."""
        return ()

    async def _launch(
        self, verb: Sequence[str], rest: Sequence[str], directory: str, stdio: runtimes.Stdio
    ) -> int:
        """Run a verb that leaves a process and return that one's host pid."""
        pid_file = os.path.join(directory, runtimes.PID_FILE)
        argv = (*verb, "--pid-file", pid_file, *_console(stdio), *rest)
        await self._run_logged(argv, directory, stdio)
        return self._pid(directory)

    async def _run_logged(self, verb: Sequence[str], directory: str, stdio: runtimes.Stdio) -> None:
        log = os.path.join(directory, runtimes.LOG_FILE)
        flags = [flag.replace("{log}", log) for flag in self._dialect.log_flags]
        with _open_null() as null:
            done = await self._run(
                verb,
                flags=flags,
                stdin=null if stdio.stdin is None else stdio.stdin,
                stdout=null if stdio.stdout is None else stdio.stdout,
                stderr=null if stdio.stderr is None else stdio.stderr,
            )
        if done.returncode:
            raise self._failure(verb[0], done, _read_log(log))

    async def _command(self, verb: Sequence[str], *, stdin: bytes = b"") -> None:
        with self._children.launching():
            done = await self._run(verb, stdin=stdin)
        if done.returncode:
            raise self._failure(verb[0], done, done.stderr)

    async def _run(
        self,
        verb: Sequence[str],
        *,
        flags: Sequence[str] = (),
        stdin: bytes | int,
        stdout: int | None = None,
        stderr: int | None = None,
    ) -> loop.Finished:
        argv = (*self._base, *flags, *verb)
        try:
            return await loop.run_command(
                argv, stdin=stdin, stdout=stdout, stderr=stderr,
                timeout=self._timeout, max_output=_OUTPUT_LIMIT, program=self._program(),
            )  # fmt: skip
        except TimeoutError as error:
            raise errors.DeadlineExceeded(
                f"{self._who} {verb[0]} did not end within {self._timeout:g} s and was killed"
            ) from error
        except OSError as error:
            raise errors.FailedPrecondition(f"cannot run {self._who}: {error.strerror}") from error

    def _program(self) -> str:
        """Return the copy of the program while it is one of the file that is there, else ""."""
        fd, of = self._copied
        return f"/proc/self/fd/{fd}" if fd >= 0 and sealed.identity(self._path) == of else ""

    def _failure(self, verb: str, done: loop.Finished, said: bytes) -> errors.ShimError:
        if message := runtimes.last_error(said):
            return errors.ShimError(message)
        code = done.returncode
        how = f"status {code}" if code > 0 else f"signal {-code}"
        return runtimes.Silent(f"{self._who} {verb} ended with {how} and said nothing")

    def _pid(self, directory: str) -> int:
        try:
            return read_pid(os.path.join(directory, runtimes.PID_FILE))
        except errors.Internal as error:
            raise errors.Internal(f"{self._who}: {error.message}") from error


def read_pid(path: str) -> int:
    """Return the number in a pid file. Raises Internal when there is none."""
    try:
        with open(path, "rb") as file:
            return int(file.read(32))
    except (OSError, ValueError) as error:
        raise errors.Internal("the runtime reported success but no pid") from error


def _read_log(path: str) -> bytes:
    """Return the last 16 KiB of what the runtime logged."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _LOG_TAIL))
            return file.read(_LOG_TAIL)
    except FileNotFoundError:
        return b""


@contextlib.contextmanager
def _open_null() -> Iterator[int]:
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    try:
        yield null
    finally:
        os.close(null)


def _console(stdio: runtimes.Stdio) -> tuple[str, ...]:
    return ("--console-socket", stdio.console) if stdio.console else ()
