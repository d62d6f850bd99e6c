# SPDX-License-Identifier: Apache-2.0
"""Clients of the streaming server as kubectl is one, over SPDY or WebSocket, on blocking sockets.

Both have the same verbs, so that a test can be held against either. Whoever waits has a deadline.
"""

import base64
import contextlib
import json
import os
import socket
import ssl
import struct
import urllib.parse
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, Self

import wsproto
from wsproto import events

from tests.fakes import spdy
from tests.lab import waiting

TIMEOUT = waiting.patient(20.0)
V4 = "v4.channel.k8s.io"
CHANNELS = ("stdin", "stdout", "stderr", "error", "resize")


class Refused(Exception):
    """The server did not upgrade the connection; `status` is its answer's."""

    def __init__(self, status: int, head: str, body: str) -> None:
        super().__init__(f"{status}: {body}")
        self.status, self.head, self.body = status, head, body


class Session(Protocol):
    """An exec or attach. `received` collects what comes, by stream."""

    received: dict[str, bytes]

    def send(self, stream: str, data: bytes) -> None: ...
    def finish(self, stream: str) -> None: ...
    def say_goodbye(self) -> None: ...
    def step(self) -> bool: ...
    def close(self) -> None: ...


def until(session: Session, stream: str, wanted: bytes) -> None:
    """Read until `wanted` was received on `stream`; AssertionError when the session ends before."""
    while wanted not in session.received[stream]:
        going = session.step()  # the last that comes may come with the end
        assert going or wanted in session.received[stream], f"it ended with {session.received}"


def ending(session: Session) -> dict[str, Any]:
    """Read to the end and return the Status object of the error stream, {} when there is none."""
    while session.step():
        pass
    said = session.received["error"]
    return dict(json.loads(said)) if said else {}


def exit_code(status: dict[str, Any]) -> int:
    """Return the exit code that a Status tells."""
    if status["status"] == "Success":
        return 0
    assert status["reason"] == "NonZeroExitCode", status
    [cause] = status["details"]["causes"]
    assert cause["reason"] == "ExitCode"
    return int(cause["message"])


def connected(url: str) -> socket.socket:
    """Return a connection to the server of a URL."""
    parts = urllib.parse.urlsplit(url)
    assert parts.hostname is not None
    return socket.create_connection((parts.hostname, parts.port or 80), timeout=TIMEOUT)


def request(
    url: str, *headers: str, method: str = "POST", tls: ssl.SSLContext | None = None
) -> tuple[socket.socket, str, bytes]:
    """Send a request; return the connection, the head of the 101 answer and what came after it.

    Raises Refused for any other answer.
    """
    parts = urllib.parse.urlsplit(url)
    connection = connected(url)
    if tls:
        connection = tls.wrap_socket(connection)
    lines = [f"{method} {parts.path} HTTP/1.1", f"Host: {parts.netloc}", *headers, "", ""]
    connection.sendall("\r\n".join(lines).encode())
    answer = b""
    while b"\r\n\r\n" not in answer and (data := connection.recv(65536)):
        answer += data
    head, _, rest = answer.partition(b"\r\n\r\n")
    status = int(head.split()[1])
    if status != 101:
        with contextlib.suppress(OSError):
            while data := connection.recv(65536):
                rest += data
        connection.close()
        raise Refused(status, head.decode(), rest.decode())
    return connection, head.decode(), rest


class Spdy:
    """A client over SPDY/3.1; `streams` are opened at once, "error" among them.

    `ended` and `was_reset` are the streams that the server has finished or given up, `pongs` the
    pings that it has answered.
    """

    def __init__(
        self,
        url: str,
        streams: Sequence[str] = (),
        protocol: str = V4,
        *,
        method: str = "POST",
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._tls = tls
        self.connection, self.head, self._rest = self._connect(url, protocol, method)
        self.frames = spdy.Client()
        self._next = 1
        self.streams: dict[str, int] = {}
        self._names: dict[int, str] = {}
        self.received: dict[str, bytes] = {}
        self.ended: set[str] = set()
        self.was_reset: set[str] = set()
        self.pongs: list[int] = []
        for name in streams:
            self.open(name, streamtype=name)

    def _connect(self, url: str, protocol: str, method: str) -> tuple[Any, str, bytes]:
        headers = ["Connection: Upgrade", "Upgrade: SPDY/3.1"]
        headers += [f"X-Stream-Protocol-Version: {protocol}"] if protocol else []
        return request(url, *headers, method=method, tls=self._tls)

    def open(self, name: str, **headers: str) -> None:
        """Open a stream; what comes on it is collected under `name`."""
        self.streams[name], self._next = self._next, self._next + 2
        self._names[self.streams[name]] = name
        self.received[name] = b""
        self.connection.sendall(self.frames.open(self.streams[name], headers))

    def send(self, stream: str, data: bytes) -> None:
        self.connection.sendall(spdy.data(self.streams[stream], data))

    def finish(self, stream: str) -> None:
        self.connection.sendall(spdy.data(self.streams[stream], b"", spdy.FIN))

    def ping(self, number: int) -> None:
        self.connection.sendall(spdy.control(spdy.PING, struct.pack(">I", number)))

    def say_goodbye(self) -> None:
        self.connection.sendall(spdy.control(spdy.GOAWAY, bytes(8)))

    def reset(self, stream: str) -> None:
        payload = struct.pack(">II", self.streams[stream], 5)
        self.connection.sendall(spdy.control(spdy.RST_STREAM, payload))

    def step(self) -> bool:
        """Take one frame; False at the end of the connection."""
        frame = self._frame()
        if frame is None:
            return False
        name = self._names.get(frame.number)
        if frame.kind == spdy.PING:
            self.pongs.append(frame.number)
        elif frame.kind == spdy.RST_STREAM and name:
            self.was_reset.add(name)
        elif frame.kind == 0 and name:
            self.received[name] += frame.payload
            if frame.flags & spdy.FIN:
                self.ended.add(name)
        return True

    def _frame(self) -> spdy.Frame | None:
        while len(self._rest) < 8 or len(self._rest) < 8 + _length(self._rest):
            data = self.connection.recv(65536)
            if not data:
                return None
            self._rest += data
        end = 8 + _length(self._rest)
        frame, self._rest = self._rest[:end], self._rest[end:]
        return next(spdy.parse(frame))

    def close(self) -> None:
        self.connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _length(frame: bytes) -> int:
    return int(struct.unpack_from(">I", frame, 4)[0] & 0xFFFFFF)


class WebSocket:
    """A client over WebSocket; the streams are those of the request, `names` their names by
    channel. `as_text` is how messages are sent, by default as the protocol says.
    """

    def __init__(
        self,
        url: str,
        streams: Sequence[str] = (),
        protocol: str = V4,
        *,
        method: str = "GET",
        names: Sequence[str] = CHANNELS,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.names = names
        key = base64.b64encode(os.urandom(16)).decode()
        headers = ["Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13"]
        headers += [f"Sec-WebSocket-Key: {key}"]
        headers += [f"Sec-WebSocket-Protocol: {protocol}"] if protocol else []
        self.connection, self.head, rest = request(url, *headers, method=method, tls=tls)
        self.protocol = protocol
        self.as_text = "base64" in protocol
        self._frames = wsproto.connection.Connection(wsproto.ConnectionType.CLIENT)
        self._frames.receive_data(rest)
        self._events = self._frames.events()
        self.received: dict[str, bytes] = dict.fromkeys((*names, *streams), b"")
        self._ended = False

    def send(self, stream: str, data: bytes) -> None:
        self._send(bytes((self.names.index(stream),)) + data)

    def finish(self, stream: str) -> None:
        assert self.protocol.startswith("v5"), "older protocols have no half close"
        self._send(bytes((255, CHANNELS.index(stream))))

    def _send(self, message: bytes) -> None:
        if "base64" in self.protocol:
            message = bytes((48 + message[0],)) + base64.b64encode(message[1:])
        kind = (
            events.TextMessage(message.decode()) if self.as_text else events.BytesMessage(message)
        )
        self.connection.sendall(self._frames.send(kind))

    def say_goodbye(self) -> None:
        self.connection.sendall(self._frames.send(events.CloseConnection(code=1000)))

    def step(self) -> bool:
        """Take what comes next; False at the end of the connection."""
        message = b""
        for event in self._next_events():
            match event:
                case events.BytesMessage():
                    message += bytes(event.data)
                    if event.message_finished:
                        self.received[self.names[message[0]]] += message[1:]
                        message = b""
                case events.TextMessage():
                    data = base64.b64decode(event.data[1:])
                    self.received[self.names[ord(event.data[0]) - 48]] += data
                case events.CloseConnection():
                    with contextlib.suppress(OSError):
                        self.connection.sendall(self._frames.send(event.response()))
                    return False
        return not self._ended

    def _next_events(self) -> Iterator[events.Event]:
        found = list(self._frames.events())
        while not found or (
            isinstance(found[-1], events.Message) and not found[-1].message_finished
        ):
            data = self.connection.recv(65536)
            self._ended = not data
            if not data:
                break
            self._frames.receive_data(data)
            found += self._frames.events()
        return iter(found)

    def close(self) -> None:
        self.connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
