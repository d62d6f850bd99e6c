# SPDX-License-Identifier: Apache-2.0
"""Run a command as the init of all that it starts: `python -m tests.lab.init COMMAND...`

Orphans become children of this process (PR_SET_CHILD_SUBREAPER), which reaps them, so that a test
run sees the same as a host whose init works. What still lives when the command has ended was left
behind: it is named, killed, and makes the run fail.
"""

import os
import signal
import sys
from pathlib import Path

from shim import linux, process

WHO = "CRI_TESTS_INIT"  # in the command's environment: our pid


def main(argv: list[str]) -> int:
    """Run `argv`; returns its exit status, or 1 when it left processes behind."""
    linux.prctl_set_child_subreaper()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal tells the command too
    environment = {**os.environ, WHO: str(os.getpid())}
    command = os.posix_spawnp(argv[0], argv, environment, setsigdef=[signal.SIGINT])
    signal.signal(signal.SIGTERM, lambda number, _frame: os.kill(command, number))
    status = os.waitstatus_to_exitcode(_reap_until(command))
    left = children()
    for pid, words in left.items():
        print(f"left behind: process {pid}: {words}", file=sys.stderr)
        os.kill(pid, signal.SIGKILL)
    return status or (1 if left else 0)


def has_below(pid: int) -> bool:
    """Tell whether a process descends from the one that `main` runs in; without one, or when the
    process has ended, nobody can say that it does not.
    """
    try:
        return WHO not in os.environ or process.descends(pid, int(os.environ[WHO]))
    except ProcessLookupError:
        return True


def children() -> dict[int, str]:
    """Return the living children of this process with their command lines."""
    _reap_the_dead()
    pids = Path("/proc/thread-self/children").read_text().split()
    return {int(pid): _words(pid) for pid in pids}


def _reap_until(command: int) -> int:
    while True:
        pid, status = os.waitpid(-1, 0)
        if pid == command:
            return status


def _reap_the_dead() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def _words(pid: str) -> str:
    try:
        return (
            Path("/proc", pid, "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        )
    except OSError:
        return "(ended)"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
