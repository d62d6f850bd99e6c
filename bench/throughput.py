# SPDX-License-Identifier: Apache-2.0
"""A client that is faster than any server of streams: big reads and writes, frames only counted.

It opens sessions with `tests.fakes.streams` and takes their sockets over. What it sends is made
before the clock runs; of what it receives it looks at the heads of frames and at nothing else.
"""

import base64
import os
import socket
import struct
import time
from collections.abc import Callable

from tests.fakes import spdy, streams

_PART = 32 << 10  # bytes of a frame that we send, as Go's io.Copy makes them
_BATCH = 32  # frames in one call of send(2)
_READ = 1 << 20

Heads = Callable[[bytes, int], tuple[int, int, int] | None]  # → head's length, payload's, channel


def spdy_head(text: bytes, at: int) -> tuple[int, int, int] | None:
    """Look at a SPDY frame; the channel of a control frame is -1."""
    if len(text) - at < 8:
        return None
    first, second = struct.unpack_from(">II", text, at)
    return 8, second & 0xFFFFFF, -1 if first >> 31 else first


def websocket_head(text: bytes, at: int) -> tuple[int, int, int] | None:
    """Look at a WebSocket frame from a server (RFC 6455 §5.2); its channel is the first byte."""
    if len(text) - at < 11:
        return None
    length, size = text[at + 1] & 0x7F, 2
    if length == 126:
        length, size = struct.unpack_from(">H", text, at + 2)[0], 4
    elif length == 127:
        length, size = struct.unpack_from(">Q", text, at + 2)[0], 10
    return (size + 1, length - 1, text[at + size]) if length else (size, 0, -1)


class Counter:
    """Counts the payload that arrives on one channel."""

    def __init__(
        self, connection: socket.socket, heads: Heads, channel: int, received: bytes = b""
    ) -> None:
        self.total = 0
        self._connection, self._heads, self._channel = connection, heads, channel
        self._left, self._counts, self._rest = 0, False, b""
        self._take(received)

    def until(self, size: int) -> None:
        """Return when this many bytes have come; ConnectionError when they never will."""
        while self.total < size:
            data = self._connection.recv(_READ)
            if not data:
                raise ConnectionError(f"ended after {self.total} of {size} bytes")
            self._take(self._rest + data if self._rest else data)

    def _take(self, text: bytes) -> None:
        at = 0
        while at < len(text):
            if not self._left:
                head = self._heads(text, at)
                if head is None:
                    break
                at, self._left, self._counts = at + head[0], head[1], head[2] == self._channel
            step = min(self._left, len(text) - at)
            self.total += step if self._counts else 0
            at, self._left = at + step, self._left - step
        self._rest = text[at:]


def spdy_sender(connection: socket.socket, stream: int, size: int) -> Callable[[], None]:
    """Return what sends `size` bytes on a SPDY stream."""
    return _sender(connection, spdy.data(stream, bytes(_PART)), size)


def websocket_sender(connection: socket.socket, size: int) -> Callable[[], None]:
    """Return what sends `size` bytes as stdin. The mask is one of bytes that differ, so a server
    has all of its work.
    """
    return _sender(connection, _masked(b"\0" + bytes(_PART)), size)


def _masked(payload: bytes) -> bytes:
    mask = b"\x01\x23\x45\x67"
    pad = (mask * (len(payload) // 4 + 1))[: len(payload)]
    number = int.from_bytes(payload, "big") ^ int.from_bytes(pad, "big")
    head = struct.pack(">BBH", 0x82, 0xFE, len(payload))
    return head + mask + number.to_bytes(len(payload), "big")


def _sender(connection: socket.socket, frame: bytes, size: int) -> Callable[[], None]:
    batch = frame * _BATCH

    def send() -> None:
        for _ in range(size // (_PART * _BATCH)):
            connection.sendall(batch)

    return send


def rate(size: int, work: Callable[[], None]) -> float:
    """Return the MiB per second at which `work` moves `size` bytes."""
    begin = time.perf_counter()
    work()
    return size / (1 << 20) / (time.perf_counter() - begin)


# -- the four directions ---------------------------------------------------------------------------


def download(url: str, size: int) -> float:
    """Read an exec's stdout over SPDY."""
    with streams.Spdy(url, ("stdout", "error")) as session:
        counter = Counter(session.connection, spdy_head, session.streams["stdout"])
        return rate(size, lambda: counter.until(size))


def download_websocket(url: str, size: int) -> float:
    """Read an exec's stdout over WebSocket."""
    connection, rest = _websocket(url)
    with connection:
        counter = Counter(connection, websocket_head, 1, rest)
        return rate(size, lambda: counter.until(size))


def upload(url: str, size: int) -> float:
    """Feed an exec's stdin over SPDY, to its end."""
    with streams.Spdy(url, ("stdin", "stdout", "error")) as session:
        connection = session.connection
        feed = spdy_sender(connection, session.streams["stdin"], size)
        counter = Counter(connection, spdy_head, session.streams["error"])

        def send() -> None:
            feed()
            session.finish("stdin")

        return rate(size, lambda: _send_and_wait(send, counter))


def upload_websocket(url: str, size: int) -> float:
    """Feed an exec's stdin over WebSocket."""
    connection, rest = _websocket(url)
    with connection:
        send = websocket_sender(connection, size)
        counter = Counter(connection, websocket_head, 3, rest)
        return rate(size, lambda: _send_and_wait(send, counter))


def _websocket(url: str) -> tuple[socket.socket, bytes]:
    """Connect; return the connection and what came after the head of the answer."""
    connection, _, rest = streams.request(
        url,
        *("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13"),
        f"Sec-WebSocket-Key: {base64.b64encode(os.urandom(16)).decode()}",
        f"Sec-WebSocket-Protocol: {streams.V4}",
        method="GET",
    )
    return connection, rest


def forward_download(url: str, port: int, size: int) -> float:
    """Read from a port of the pod."""
    with streams.Spdy(url, (), "portforward.k8s.io") as session:
        _open_pair(session, port)
        counter = Counter(session.connection, spdy_head, session.streams["data"])
        return rate(size, lambda: counter.until(size))


def forward_upload(url: str, port: int, size: int) -> float:
    """Write to a port of the pod, whose server answers `size` bytes with one."""
    with streams.Spdy(url, (), "portforward.k8s.io") as session:
        _open_pair(session, port)
        send = spdy_sender(session.connection, session.streams["data"], size)
        counter = Counter(session.connection, spdy_head, session.streams["data"])
        return rate(size, lambda: _send_and_wait(send, counter))


def _send_and_wait(send: Callable[[], None], counter: Counter) -> None:
    send()
    counter.until(1)


def _open_pair(session: streams.Spdy, port: int) -> None:
    for kind in ("error", "data"):
        session.open(kind, streamtype=kind, port=str(port), requestid="0")


def first_byte(url: Callable[[], str]) -> float:
    """Return the milliseconds from the RPC to the first byte of a terminal's output."""
    begin = time.perf_counter()
    with streams.Spdy(url(), ("stdin", "stdout", "error", "resize")) as session:
        Counter(session.connection, spdy_head, session.streams["stdout"]).until(1)
        took = (time.perf_counter() - begin) * 1e3
        session.finish("stdin")
        streams.ending(session)
    return took
