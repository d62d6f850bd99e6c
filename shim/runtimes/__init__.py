# SPDX-License-Identifier: Apache-2.0
"""What a shim asks of the thing that really makes containers, whatever its protocol.

A runtime keeps its own state below its root and survives a shim; a shim holds nothing of a runtime
but this object. Every verb ends within the handler's time limit or raises DeadlineExceeded with
everything killed that it started. Failures carry the runtime's own words, in one line.
"""

import json
from typing import NamedTuple, Protocol

from shim import errors

MESSAGE_LIMIT = 1024
# Where runc was when it failed; what comes after it tells a user more.
_WHERE = (
    "error in executing command: ", "runc run failed: ", "exec failed: ",
    "unable to start container process: ", "error during container init: ",
)  # fmt: skip


# The files of a launch in the directory that it is given; whoever gives it removes them.
PROCESS_FILE = "process.json"
PID_FILE = "pid"
LOG_FILE = "runtime.log"


class Stdio(NamedTuple):
    """What a process gets as standard streams: descriptors (None: /dev/null), or a console socket's
    path.

    `fifos`: the streams that are not None are FIFOs in this directory, called stdin, stdout and
    stderr, for a runtime that `opens_fifos`. It makes the terminal, where there is one, by itself,
    and pipes of its own, if it does, for `owner`.
    """

    stdin: int | None = None
    stdout: int | None = None
    stderr: int | None = None
    console: str = ""
    fifos: str = ""
    terminal: bool = False
    owner: tuple[int, int] = (0, 0)


class Process(Protocol):
    """A process that a runtime has started, wherever its kernel is; an init or an exec's. `wait`
    once.
    """

    pid: int  # on the host

    @property
    def start_time(self) -> int:
        """Field 22 of /proc/<pid>/stat, 0 when the process has gone already."""

    @property
    def oom_killed(self) -> bool:
        """Whether the runtime has told that something was killed for want of memory."""

    async def wait(self) -> int:
        """Return the exit code, 128+n for signal n. Raises ShimError when it cannot be known."""

    async def signal(self, signum: int) -> None:
        """Send a signal; nothing happens when it has ended. Raises InvalidArgument."""

    async def kill_tree(self) -> None:
        """Kill it with what it has started, as far as that is known."""

    async def resize(self, width: int, height: int) -> None:
        """Set the size of a terminal that the runtime made."""

    async def close_stdin(self) -> None:
        """Let the process read the end of a stdin that the runtime holds open too."""

    async def forget(self) -> None:
        """Have the runtime let go of an exec whose output has been read; not before, for it may cut
        that off. Only where it `opens_fifos`.
        """


class Runtime(Protocol):
    """The verbs of a container's life. `directory` is where a verb may put its files; the caller
    removes it. `shares_kernel`: the first container is what all others run in. `opens_fifos`: it
    takes streams by name, see `Stdio`.
    """

    shares_kernel: bool
    opens_fifos: bool

    async def prepare(self) -> None:
        """Start what the runtime itself keeps running for the pod, unless a container must."""

    async def run(self, container_id: str, bundle: str, *, directory: str, stdio: Stdio) -> Process:
        """Create and start a container; return its init."""

    async def exec(
        self, container_id: str, *, directory: str, cgroup: str, stdio: Stdio
    ) -> Process:
        """Start the process in `directory`/process.json inside a container.

        `cgroup` is an existing part of the container's, as "[controller:]name"; empty: the
        container's own.
        """

    async def update(self, container_id: str, resources: bytes) -> None:
        """Apply LinuxResources (OCI JSON)."""

    async def stats(self, container_id: str) -> tuple[str, bytes]:
        """Return what a container uses, as the type and the bytes of a containerd Metrics message.

        Raises Unimplemented where the host's cgroups tell.
        """

    async def delete(self, container_id: str) -> None:
        """Remove the container, killing what is left. Nothing happens when it does not exist."""

    def can_split_cgroups(self, controller: str) -> bool:
        """Say whether `exec` takes a part of the cgroup in this hierarchy ("" for v2)."""

    async def close(self) -> None:
        """End what the runtime itself keeps running for the pod, when the pod has ended."""


def exit_status(told: object) -> int:
    """Return the status that a runtime tells of a process (wait(2): 0 to 255). Raises Internal for
    one that cannot be.
    """
    if not isinstance(told, int) or not 0 <= told <= 255:
        raise errors.Internal(f"the runtime says that it ended with {str(told)[:80]!r}")
    return told


class Silent(errors.ShimError):
    """The runtime failed and its log does not say why; its stderr may."""


def last_error(said: bytes) -> str:
    """Return the last error of a runtime's log or stderr, in one line of at most 1 KiB; "" when
    there is none.

    Where runc was comes off: the first words are for users. Lines are JSON objects with `level` and
    `msg` (runc, crun and runsc with --log-format json) or `message` (youki), or plain text.
    """
    last = ""
    for line in said.decode(errors="replace").splitlines():
        level, text = _parse(line)
        if text and (level in ("error", "fatal", "panic") or not last):
            last = text
    for words in _WHERE:
        last = last.removeprefix(words)
    return " ".join(last.split())[:MESSAGE_LIMIT]


def _parse(line: str) -> tuple[str, str]:
    try:
        record = json.loads(line)
        text = record["msg"] if "msg" in record else record["message"]
        return str(record.get("level", "error")).lower(), str(text)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "error", line.strip()
