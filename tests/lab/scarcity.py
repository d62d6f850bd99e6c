# SPDX-License-Identifier: Apache-2.0
"""A process that has no descriptor left: this one, for a block, or a server, while a file is there.

    python -m tests.lab.scarcity FILE serve --config ...

FILE holds how a path ends. The server lacks them from the moment when it connects to such a path,
or lists such a folder (`sys.audit`), until FILE is gone; what is open by then works on.
"""

import contextlib
import os
import resource
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from cri_server import __main__

EVENTS = ("os.listdir", "socket.connect")  # the path is the last argument


@contextlib.contextmanager
def no_descriptors() -> Iterator[None]:
    """Have every open() in this process fail with EMFILE for the block."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def main() -> int:
    """Run `cri-server` with the arguments after FILE."""
    lack_while(Path(sys.argv[1]))
    return __main__.main(sys.argv[2:])


def lack_while(file: Path) -> None:
    """Watch this process from now on."""
    plenty = contextlib.ExitStack()
    scarce = threading.Event()

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event not in EVENTS or scarce.is_set() or not file.exists():
            return
        if str(arguments[-1]).endswith(file.read_text()):
            scarce.set()
            plenty.enter_context(no_descriptors())
            threading.Thread(target=wait, daemon=True).start()

    def wait() -> None:
        while os.access(file, os.F_OK):  # which needs no descriptor
            time.sleep(0.02)
        plenty.close()
        scarce.clear()

    sys.addaudithook(hook)


if __name__ == "__main__":
    sys.exit(main())
