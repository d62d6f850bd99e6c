# SPDX-License-Identifier: Apache-2.0
"""Channels over WebSocket messages, as Kubernetes numbers them. No I/O; the frames are wsproto's.

    channel.k8s.io           a message: one byte that names the channel, then data
    base64.channel.k8s.io    a message: one character that names the channel ("0" and what comes
                             after it in ASCII), then data in base64
    v5.channel.k8s.io        as the first; byte 255 and a channel end that channel (half close)
    SPDY/3.1+portforward…    a message: bytes of a SPDY connection (KEP-4006)

What a client sends is passed on as it arrives, so a message may be of any length. Whether it is a
text or a binary message says nothing: the peers do not look, and clients send either (that for
Python sends every `str` as text). We send base64 as text, all else as binary.
"""

import base64
import binascii
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import wsproto
from wsproto import events, utilities

from cri_server.streaming import idle

CLOSE = 255  # v5: the next byte is the channel that ends
_ZERO = ord("0")


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """A subprotocol. `version` is that of the remote command protocol."""

    name: str
    version: int
    base64: bool = False
    tunnel: bool = False

    @property
    def channels(self) -> int:
        """How many channels have a name: a byte, or an ASCII character from "0" on."""
        return 128 - _ZERO if self.base64 else CLOSE


EXEC = (
    Protocol(name="v5.channel.k8s.io", version=5),
    Protocol(name="v4.channel.k8s.io", version=4),
    Protocol(name="v4.base64.channel.k8s.io", version=4, base64=True),
    Protocol(name="channel.k8s.io", version=1),
    Protocol(name="base64.channel.k8s.io", version=1, base64=True),
)
FORWARD = (
    Protocol(name="SPDY/3.1+portforward.k8s.io", version=4, tunnel=True),
    Protocol(name="v4.channel.k8s.io", version=4),
    Protocol(name="v4.base64.channel.k8s.io", version=4, base64=True),
)
NONE = Protocol(name="", version=1)  # a client that names no subprotocol


class ProtocolError(Exception):
    """The client sent what cannot be understood: end the connection."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """A part of what the client sends on a channel."""

    channel: int
    data: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """The client sends no more on this channel."""

    channel: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """Bytes to send: to a ping, or to the client's goodbye."""

    data: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Closed:
    """The client has said goodbye."""


Event = Data | Finished | Answer | Closed | idle.Idle


class Connection:
    """The server's end. `accept` comes first."""

    def __init__(self) -> None:
        self.protocol = NONE
        self._frames = wsproto.WSConnection(wsproto.ConnectionType.SERVER)
        self._channel: int | None = None  # of the message that is arriving
        self._text = ""  # base64 that is not yet a whole group

    def accept(self, head: bytes, offered: Sequence[Protocol]) -> bytes | None:
        """Take the HTTP request; return the answer, None when no subprotocol is common.

        Of the client's subprotocols the first that is offered is chosen. Raises ProtocolError for
        a request that is no WebSocket's.
        """
        try:
            self._frames.receive_data(head)
            request = next(iter(self._frames.events()))
        except (utilities.RemoteProtocolError, UnicodeDecodeError, StopIteration) as e:
            raise ProtocolError(f"not a WebSocket request: {e}") from e
        if not isinstance(request, events.Request):
            raise ProtocolError("not a WebSocket request")
        wanted = [p for name in request.subprotocols for p in offered if p.name == name]
        if request.subprotocols and not wanted:
            return None
        self.protocol = wanted[0] if wanted else NONE
        return self._frames.send(events.AcceptConnection(subprotocol=self.protocol.name or None))

    def receive(self, data: bytes) -> Iterator[Event]:
        """Take what has arrived and yield what it says. Raises ProtocolError."""
        try:
            self._frames.receive_data(data)
            yield from idle.told(self._event(event) for event in self._frames.events())
        except utilities.RemoteProtocolError as e:
            raise ProtocolError(str(e)) from e

    def _event(self, event: events.Event) -> Iterator[Event]:
        match event:
            case events.BytesMessage() | events.TextMessage():
                yield from self._message(event.data, finished=event.message_finished)
            case events.Ping() if self._open:
                yield Answer(data=self._frames.send(event.response()))
            case events.CloseConnection():
                if self._frames.state is wsproto.connection.ConnectionState.REMOTE_CLOSING:
                    yield Answer(data=self._frames.send(event.response()))
                yield Closed()

    def _message(self, data: bytes | bytearray | str, *, finished: bool) -> Iterator[Event]:
        """Take a part of a message, which the subprotocol says how to read."""
        if self.protocol.base64:
            yield from self._base64(_ascii(data), finished=finished)
        else:
            yield from self._binary(data.encode() if isinstance(data, str) else bytes(data))
        if finished:
            self._channel, self._text = None, ""

    def _binary(self, data: bytes) -> Iterator[Event]:
        if self.protocol.tunnel:
            yield Data(channel=0, data=data)
            return
        if self._channel is None and data:
            self._channel, data = data[0], data[1:]
        if not data or self._channel is None:
            return
        if self._channel == CLOSE and self.protocol.version >= 5:
            yield Finished(channel=data[0])
        else:
            yield Data(channel=self._channel, data=data)

    def _base64(self, text: str, *, finished: bool) -> Iterator[Event]:
        self._text += text
        if self._channel is None and self._text:
            self._channel, self._text = _named(self._text[0]), self._text[1:]
        whole = len(self._text) if finished else len(self._text) // 4 * 4
        part, self._text = self._text[:whole], self._text[whole:]
        if part and self._channel is not None:
            yield Data(channel=self._channel, data=_decoded(part))

    @property
    def _open(self) -> bool:
        """Whether neither side has said goodbye."""
        return self._frames.state is wsproto.connection.ConnectionState.OPEN

    def send(self, channel: int, data: bytes) -> bytes:
        """Return the message that sends data on a channel, nothing after a goodbye."""
        if not self._open:
            return b""
        if self.protocol.tunnel:
            return self._frames.send(events.BytesMessage(data=data))
        if self.protocol.base64:
            text = f"{chr(_ZERO + channel)}{base64.b64encode(data).decode()}"
            return self._frames.send(events.TextMessage(data=text))
        return self._frames.send(events.BytesMessage(data=bytes((channel,)) + data))

    def close(self) -> bytes:
        """Return our goodbye, nothing when it was said already."""
        return self._frames.send(events.CloseConnection(code=1000)) if self._open else b""


def _named(letter: str) -> int:
    if not (letter.isascii() and letter >= "0"):
        raise ProtocolError(f"{letter!r} names no channel")
    return ord(letter) - _ZERO


def _ascii(data: bytes | bytearray | str) -> str:
    try:
        return data if isinstance(data, str) else data.decode("ascii")
    except UnicodeDecodeError as e:
        raise ProtocolError(f"not base64: {e}") from e


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as e:
        raise ProtocolError(f"not base64: {e}") from e
