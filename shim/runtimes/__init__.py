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
    """

    stdin: int | None = None
    stdout: int | None = None
    stderr: int | None = None
    console: str = ""


class Process(Protocol):
    """A process of a container that a shim watches, wherever its kernel is. `wait` once."""

    pid: int

    async def wait(self) -> int:
        """Return the exit code, 128+n when signal n ended it, once it has ended."""

    def signal(self, signum: int) -> None:
        """Have a signal sent; nothing happens when it has ended. Raises InvalidArgument for a
        number that is none.
        """

    def kill_tree(self) -> None:
        """Kill it with its descendants; nothing happens when it has ended."""


class Claims(Protocol):
    """Who watches processes by their host pid: the shim's reaper."""

    def claim(self, pid: int) -> Process:
        """Watch a process that has just started."""


class Runtime(Protocol):
    """The verbs of a container's life. `directory` is where a verb may put its files; the caller
    removes it. `shares_kernel`: the first container is what all others run in.
    """

    shares_kernel: bool

    async def run(self, container_id: str, bundle: str, *, directory: str, stdio: Stdio) -> int:
        """Create and start a container; return the host pid of what ends with its init."""

    async def exec(self, container_id: str, *, directory: str, cgroup: str, stdio: Stdio) -> int:
        """Start the process in `directory`/process.json inside a container; return the host pid of
        what ends with it.

        `cgroup` is an existing part of the container's, as "[controller:]name"; empty: the
        container's own.
        """

    def claim(self, pid: int, children: Claims) -> Process:
        """Watch what `run` or `exec` has just returned, before anybody else reaps it."""

    async def update(self, container_id: str, resources: bytes) -> None:
        """Apply LinuxResources (OCI JSON)."""

    async def delete(self, container_id: str) -> None:
        """Remove the container, killing what is left. Nothing happens when it does not exist."""

    def can_split_cgroups(self, controller: str) -> bool:
        """Say whether `exec` takes a part of the cgroup in this hierarchy ("" for v2)."""


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
