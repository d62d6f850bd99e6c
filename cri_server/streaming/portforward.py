# SPDX-License-Identifier: Apache-2.0
"""Port-forward: TCP connections into a pod's network namespace, for a client outside.

    client ──data──► Pair ──► socket made inside the namespace, to 127.0.0.1:port, else [::1]:port
           ◄──error── what went wrong, as text; nothing when all went well

No program of the image takes part. Each connection is a pair of streams and a task of its own; one
that fails leaves the others alone. Everything ends with the client. Where the pod is, and whether
it is ready, is asked for each connection.

A client that ends its half waits for the answer as long as the pod takes: the peers give it a
second, which cuts off whoever sends a request with `nc` and is answered later. When the pod has
ended its half, the client may go on for a second, as with the peers.
"""

import asyncio
import contextlib
import functools
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from cri_server import errors
from cri_server.network import inside
from cri_server.streaming import peer

CONNECT_TIMEOUT = 10.0  # seconds
_CHUNK = 256 << 10  # bytes
_LINGER = 1.0  # seconds that the client may go on when the pod's side has ended
_LOOPBACKS = ("127.0.0.1", "::1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a pod listens: on the loopback of the network that is pinned at `netns`, "" for the
    host's. A pod with a network stack of its own, as VMs and gVisor have, listens where no
    namespace leads; `addresses` are what the host, which must reach every pod, knows it by.
    """

    netns: str
    addresses: tuple[str, ...] = ()

    def ways(self) -> Iterator[tuple[str, str]]:
        """Yield the network to connect from, as `netns`, and the address; in order."""
        for address in _LOOPBACKS:
            yield self.netns, address
        for address in self.addresses:
            yield "", address


Find = Callable[[], Place]  # raises CriError when there is no such pod or it is not ready


class Pair(Protocol):
    """One connection of a client. `closed` is set when the client has given it up, or has gone."""

    port: int
    closed: asyncio.Event

    async def read(self) -> bytes:
        """Return what the client sent, b"" at its end."""

    async def write(self, data: bytes) -> None:
        """Send to the client; returns when it takes it. Raises Gone."""

    async def finish(self) -> None:
        """Say that nothing more comes from the pod. Raises Gone."""

    async def end(self, error: str) -> None:
        """Tell what went wrong, "" for nothing, and end both streams. Raises Gone."""


async def serve(pairs: AsyncIterator[Pair], find: Find) -> None:
    """Forward every pair that comes, until no more come and all have ended."""
    running: set[asyncio.Task[None]] = set()
    try:
        async for pair in pairs:
            task = asyncio.create_task(forward(pair, find), name=f"port-forward {pair.port}")
            running.add(task)
            task.add_done_callback(running.discard)
        if running:
            await asyncio.wait(running)
    finally:
        for task in running:
            task.cancel()


async def forward(pair: Pair, find: Find) -> None:
    """Connect to the pair's port and copy both ways, to the end or until the client gives it up."""
    copying = asyncio.create_task(_forward(pair, find))
    leaving = asyncio.create_task(pair.closed.wait())
    try:
        await asyncio.wait({copying, leaving}, return_when=asyncio.FIRST_COMPLETED)
        problem = copying.result() if copying.done() else ""
        copying.cancel()  # it may be writing to a client that does not read
        await asyncio.wait([copying])
        with contextlib.suppress(peer.Gone):
            await pair.end(problem)
    finally:
        copying.cancel()
        leaving.cancel()


async def _forward(pair: Pair, find: Find) -> str:
    """Return what went wrong, "" for nothing."""
    try:
        sock = await _connect(pair.port, find())
    except errors.CriError as e:
        return e.message
    with sock, contextlib.suppress(peer.Gone):
        return await _copy(pair, sock)
    return ""


async def _connect(port: int, place: Place) -> socket.socket:
    """Return a connection to a port of the pod. Raises Unavailable, DeadlineExceeded."""
    refusals = []
    for netns, address in place.ways():
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                return await _dial(address, port, netns)
        except TimeoutError as e:
            raise errors.DeadlineExceeded(f"{address}:{port}: no answer") from e
        except OSError as e:
            refusals.append(f"{address}: {_words(e)}")
    raise errors.Unavailable(f"cannot connect to port {port} in the pod: {', '.join(refusals)}")


async def _dial(address: str, port: int, netns: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    make = functools.partial(socket.socket, family, socket.SOCK_STREAM)
    sock = await asyncio.to_thread(inside.run, netns, make) if netns else make()
    try:
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, (address, port))
    except BaseException:
        sock.close()
        raise
    return sock


def _words(error: OSError) -> str:
    """Return what the kernel says; asyncio's own words hold the address once more."""
    return os.strerror(error.errno) if error.errno else str(error)


async def _copy(pair: Pair, sock: socket.socket) -> str:
    sending = asyncio.create_task(_to_pod(pair, sock))
    try:
        problem = await _to_client(pair, sock)
        await pair.finish()
        await asyncio.wait([sending], timeout=_LINGER)
        return problem
    finally:
        sending.cancel()
        await asyncio.wait([sending])  # it must let go of the socket before that is closed


async def _to_pod(pair: Pair, sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    with contextlib.suppress(OSError, peer.Gone):  # the pod's end of it is told by what is read
        while data := await pair.read():
            await loop.sock_sendall(sock, data)
            await asyncio.sleep(0)  # neither this nor the read has to wait: let others run too
        sock.shutdown(socket.SHUT_WR)


async def _to_client(pair: Pair, sock: socket.socket) -> str:
    """Copy to the client; return what went wrong, "" for nothing."""
    loop = asyncio.get_running_loop()
    try:
        while data := await loop.sock_recv(sock, _CHUNK):
            await pair.write(data)
            await asyncio.sleep(0)
    except OSError as e:
        return f"port {pair.port} in the pod: {_words(e)}"
    return ""
