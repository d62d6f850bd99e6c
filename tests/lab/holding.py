# SPDX-License-Identifier: Apache-2.0
"""The server with a gate: it stops before it renames a file into a folder, until it may go on.

    python -m tests.lab.holding GATE FOLDER serve --config ...

GATE is a FIFO (`Gate`); while it is not there nothing is held. The thread that is about to rename
waits for the FIFO's end, and all other threads go on. Renames are how the server makes things true
(`sys.audit`, "os.rename"), so it needs no hook of its own.
"""

import os
import sys
from pathlib import Path

from cri_server import __main__
from tests.lab import server, waiting


class Gate:
    """The test's side: closed by `shut`, `wait` until somebody stands before it, then `open`."""

    def __init__(self, path: Path) -> None:
        self._path, self._fd = path, -1

    def shut(self) -> None:
        os.mkfifo(self._path)

    def wait(self) -> None:
        """Wait until a rename is held; the next one will not be."""
        self._fd = waiting.until(self._visitor, "a rename is held")
        self._path.unlink()

    def _visitor(self) -> int | None:
        try:
            return os.open(self._path, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # ENXIO: nobody has it open
            return None

    def open(self) -> None:
        os.close(self._fd)


def gated(site: server.Site, folder: Path) -> Gate:
    """Have a site's server, started anew, with a gate before `folder`."""
    site.kill()
    gate = site.home / "gate"
    site.program = (sys.executable, "-m", "tests.lab.holding", os.fspath(gate), os.fspath(folder))
    site.start()
    return Gate(gate)


def main() -> int:
    """Run `cri-server` with the arguments after FOLDER."""
    hold_at(Path(sys.argv[1]), f"{sys.argv[2]}/")
    return __main__.main(sys.argv[3:])


def hold_at(gate: Path, folder: str) -> None:
    """Watch this process from now on."""

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event == "os.rename" and str(arguments[1]).startswith(folder) and gate.exists():
            gate.read_bytes()

    sys.addaudithook(hook)


if __name__ == "__main__":
    sys.exit(main())
