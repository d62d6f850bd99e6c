# SPDX-License-Identifier: Apache-2.0
"""TCP servers of the test itself inside a pod's network, so that no image needs a program for it.

Each connection is handled in a thread of its own. A server and its connections end with its block.
"""

import contextlib
import select
import socket
import threading
from collections.abc import Callable, Iterator

from cri_server.network import inside

Handler = Callable[[socket.socket], None]


@contextlib.contextmanager
def listening(netns: str, handler: Handler, *, address: str = "127.0.0.1") -> Iterator[int]:
    """Have a server in the namespace at `netns`, "" for the host's; give its port."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET

    def make() -> socket.socket:
        return socket.create_server((address, 0), family=family, backlog=256)

    server = inside.run(netns, make) if netns else make()
    accepted: list[socket.socket] = []
    thread = threading.Thread(target=_accept, args=(server, handler, accepted), daemon=True)
    thread.start()
    try:
        yield int(server.getsockname()[1])
    finally:
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
        server.close()
        for connection in accepted:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def _accept(server: socket.socket, handler: Handler, accepted: list[socket.socket]) -> None:
    with contextlib.suppress(OSError):
        while True:
            connection, _ = server.accept()
            accepted.append(connection)
            threading.Thread(target=_handle, args=(connection, handler), daemon=True).start()


def _handle(connection: socket.socket, handler: Handler) -> None:
    with connection, contextlib.suppress(OSError):
        handler(connection)


def echo(connection: socket.socket) -> None:
    """Send back what comes, until its end."""
    while data := connection.recv(65536):
        connection.sendall(data)


def endless(connection: socket.socket) -> None:
    """Send until nobody takes it."""
    while True:
        connection.sendall(bytes(65536))


def silent(connection: socket.socket) -> None:
    """Neither read nor write nor close, whatever the other side does."""
    poll = select.poll()
    poll.register(connection, 0)  # of its own accord it tells of an end of both halves: poll(2)
    poll.poll(60_000)
