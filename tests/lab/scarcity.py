# SPDX-License-Identifier: Apache-2.0
"""A process that has no descriptor left: this one, for a block, or a server, while a file is there.

    python -m tests.lab.scarcity FILE serve --config ...

The server lacks them from the moment when it begins to look for shims (`sys.audit`) until FILE is
gone; what it had open by then goes on to work.
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
    once = iter((True,))

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event == "socket.connect" and file.exists() and next(once, False):
            stack.enter_context(no_descriptors())
            threading.Thread(target=wait, daemon=True).start()

    stack = contextlib.ExitStack()

    def wait() -> None:
        while os.access(file, os.F_OK):  # which needs no descriptor
            time.sleep(0.02)
        stack.close()

    sys.addaudithook(hook)


if __name__ == "__main__":
    sys.exit(main())
