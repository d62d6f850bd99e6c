# SPDX-License-Identifier: Apache-2.0
"""Clients of port-forward, as kubectl and older ones: SPDY, SPDY in a WebSocket, and the channels
of a WebSocket. All name the streams of the n-th connection "data<n>" and "error<n>".
"""

import base64
import os
import socket
import struct
from collections.abc import Sequence
from typing import Any

import wsproto
from wsproto import events

from tests.fakes import streams

PROTOCOL = "portforward.k8s.io"


class Spdy(streams.Spdy):
    """Over SPDY/3.1."""

    def __init__(self, url: str, ports: Sequence[int] = ()) -> None:
        super().__init__(url, (), PROTOCOL)
        for number, port in enumerate(ports):
            self.pair(number, port)

    def pair(self, number: int, port: int, **more: str) -> None:
        """Open both streams of a connection."""
        headers = {"port": str(port), "requestid": str(number), **more}
        self.open(f"error{number}", streamtype="error", **headers)
        self.finish(f"error{number}")  # as kubectl does
        self.open(f"data{number}", streamtype="data", **headers)


class Tunnel(Spdy):
    """Over SPDY/3.1 in a WebSocket (KEP-4006)."""

    def _connect(self, url: str, protocol: str, method: str) -> tuple[Any, str, bytes]:
        inner = _Inner(url, f"SPDY/3.1+{protocol}")
        return inner, inner.head, b""


class _Inner:
    """A WebSocket that looks like a socket: each message is some bytes."""

    def __init__(self, url: str, protocol: str) -> None:
        key = base64.b64encode(os.urandom(16)).decode()
        headers = ["Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13"]
        headers += [f"Sec-WebSocket-Key: {key}", f"Sec-WebSocket-Protocol: {protocol}"]
        self.socket, self.head, rest = streams.request(url, *headers, method="GET")
        self._frames = wsproto.connection.Connection(wsproto.ConnectionType.CLIENT)
        self._frames.receive_data(rest)

    def sendall(self, data: bytes) -> None:
        self.socket.sendall(self._frames.send(events.BytesMessage(data=data)))

    def recv(self, size: int) -> bytes:
        while True:
            found = list(self._frames.events())
            data = b"".join(bytes(e.data) for e in found if isinstance(e, events.BytesMessage))
            if data or any(isinstance(e, events.CloseConnection) for e in found):
                return data
            if not (data := self.socket.recv(size)):
                return b""
            self._frames.receive_data(data)

    def settimeout(self, seconds: float) -> None:
        self.socket.settimeout(seconds)

    def setsockopt(self, *options: Any) -> None:
        self.socket.setsockopt(*options)

    def close(self) -> None:
        self.socket.close()


class Channels(streams.WebSocket):
    """Over the channels of a WebSocket, which know no half close. The server says a channel's port
    in its first two bytes.
    """

    def __init__(self, url: str, ports: Sequence[int] = (), protocol: str = streams.V4) -> None:
        names = [f"{kind}{number}" for number in range(len(ports)) for kind in ("data", "error")]
        super().__init__(url, (), protocol, names=names)
        for name, port in zip(names, (p for p in ports for _ in range(2)), strict=True):
            streams.until(self, name, struct.pack("<H", port))
            self.received[name] = self.received[name][2:]


def break_off(client: Any) -> None:
    """Leave with a reset, as a killed machine's firewall would."""
    client.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
