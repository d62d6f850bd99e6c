# SPDX-License-Identifier: Apache-2.0
"""The server with an end: it kills itself just before the n-th thing that it does to the host.

    python -m tests.lab.crashing FILE serve --config ...

FILE holds n; while it is not there nothing is counted. What counts are audit events (`sys.audit`):
files renamed, made and removed, programs started, connections to shims, steps of recipes. So the
server needs no hook of its own, and counting n up finds every gap between two changes. A folder
that is removed with all in it counts as one; a cgroup, one directory per controller, does not.
"""

import itertools
import os
import signal
import sys
from pathlib import Path

from cri_server import __main__

CHANGES = frozenset(
    {
        "cri_server.step",
        "os.mkdir",
        "os.posix_spawn",
        "os.remove",
        "os.rename",
        "shutil.rmtree",
        "socket.connect",
    }
)
NO_FOLDER = -1  # the last argument of "os.remove" where the path is not below an open folder


def main() -> int:
    """Run `cri-server` with the arguments after FILE."""
    die_at(Path(sys.argv[1]))
    return __main__.main(sys.argv[2:])


def die_at(file: Path) -> None:
    """Watch this process from now on."""
    numbers = itertools.count(1)

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event not in CHANGES or (event == "os.remove" and arguments[-1] != NO_FOLDER):
            return
        if file.exists() and next(numbers) >= int(file.read_text()):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


if __name__ == "__main__":
    sys.exit(main())
