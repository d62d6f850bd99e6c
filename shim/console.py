# SPDX-License-Identifier: Apache-2.0
"""The pseudo-terminal of a process: the runtime makes it inside the container and sends us the
master end.

The console socket lives for one launch; its file is in the bundle and is removed with the exec or
the container.
"""

import fcntl
import os
import socket
import struct
import termios

from shim import errors, loop

_PATH_LIMIT = 107  # sun_path without its zero, see unix(7)


class ConsoleSocket:
    """A listening socket that takes one descriptor. Use as a context manager.

    `path` is what a runtime is given: where the real path is too long, one that leads through our
    /proc/self/fd.
    """

    def __init__(self, directory: str) -> None:
        self._file = os.path.join(directory, "console.sock")
        self._directory = os.open(directory, os.O_PATH | os.O_DIRECTORY)
        self.path = self._file
        if len(os.fsencode(self._file)) > _PATH_LIMIT:
            self.path = f"/proc/{os.getpid()}/fd/{self._directory}/console.sock"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.setblocking(False)
        self._socket.bind(self.path)
        self._socket.listen(1)

    def __enter__(self) -> "ConsoleSocket":
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        os.close(self._directory)
        os.unlink(self._file)

    async def receive(self) -> int:
        """Return the master end, non-blocking; it is the caller's. The runtime sends it while it
        starts.
        """
        await loop.readable(self._socket.fileno())
        peer, _ = self._socket.accept()
        with peer:
            peer.setblocking(False)
            await loop.readable(peer.fileno())
            _, fds, _, _ = socket.recv_fds(peer, 4096, 1)
        if not fds:
            raise errors.Internal("the runtime sent no terminal")
        os.set_blocking(fds[0], False)
        os.set_inheritable(fds[0], False)
        return fds[0]


def resize(master: int, width: int, height: int) -> None:
    """Set the size in characters; nothing happens when the terminal is gone."""
    size = struct.pack("HHHH", min(height, 0xFFFF), min(width, 0xFFFF), 0, 0)
    try:
        fcntl.ioctl(master, termios.TIOCSWINSZ, size)
    except OSError:
        return
