# SPDX-License-Identifier: Apache-2.0
"""SPDY/3.1 frames, as kubectl and the kubelet speak them to a server. No I/O.

    control  |1| version 3 (15) | type (16) | flags (8) | length (24) | payload
    data     |0| stream (31)                | flags (8) | length (24) | payload

`receive` takes bytes as they come and returns events; the other methods return the bytes to send.
Nothing is collected: the payload of a data frame is passed on as it arrives, so a frame may be as
long as the format allows; control frames and the headers inside them are bounded. The peers' client
knows no flow control but that of TCP, and neither do we: a peer that does not read from the socket
holds the sender back.
"""

import itertools
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum

from cri_server.streaming import idle, spdydict

VERSION = 3
MAX_CONTROL = 16 << 10  # bytes of a control frame: what clients send is below 200
MAX_HEADERS = 32 << 10  # bytes of a header block, decompressed (a bomb stops here)
MAX_STREAMS = 2048  # open at a time
MAX_DATA = 256 << 10  # bytes of a data frame that we send
_HEADER = struct.Struct(">II")
_WORD = struct.Struct(">I")
_FIN, _UNIDIRECTIONAL = 1, 2


class Kind(IntEnum):
    """The types of control frames."""

    SYN_STREAM = 1
    SYN_REPLY = 2
    RST_STREAM = 3
    SETTINGS = 4
    PING = 6
    GOAWAY = 7
    HEADERS = 8
    WINDOW_UPDATE = 9


class Status(IntEnum):
    """Why a stream is reset."""

    PROTOCOL_ERROR = 1
    INVALID_STREAM = 2
    REFUSED_STREAM = 3
    CANCEL = 5
    INTERNAL_ERROR = 6


class ProtocolError(Exception):
    """The connection is of no use any more: end it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Opened:
    """The client has opened a stream; names of headers are in lower case."""

    stream: int
    headers: Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """A part of what the client sends on a stream."""

    stream: int
    data: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """The client sends no more on this stream; it may still read."""

    stream: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Reset:
    """The client has given up a stream."""

    stream: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Pinged:
    """To be answered with `pong`."""

    number: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """The client opened a stream that cannot be: to be answered with `reset`."""

    stream: int
    status: Status


@dataclass(frozen=True, kw_only=True, slots=True)
class GoneAway:
    """The client will open no more streams."""


Event = Opened | Data | Finished | Reset | Pinged | Refused | GoneAway | idle.Idle


@dataclass(slots=True)
class _Stream:
    """Who may still send: `theirs` is the client."""

    ours: bool = True
    theirs: bool = True


@dataclass(slots=True)
class _Payload:
    """The data frame whose payload is arriving."""

    stream: int
    left: int
    fin: bool


@dataclass(slots=True)
class Connection:
    """The server's end of one connection."""

    _buffer: bytes = b""
    _at: int = 0  # where what is not yet taken begins in it
    _payload: _Payload | None = None
    _streams: dict[int, _Stream] = field(default_factory=dict)
    _last: int = 0
    _inflate: "zlib._Decompress" = field(
        default_factory=lambda: zlib.decompressobj(zdict=spdydict.DICTIONARY)
    )
    _deflate: "zlib._Compress" = field(
        default_factory=lambda: zlib.compressobj(zdict=spdydict.DICTIONARY)
    )

    # -- what the client sends --------------------------------------------------------------------

    def receive(self, data: bytes) -> Iterator[Event]:
        """Take what has arrived and yield what it says. Raises ProtocolError."""
        return idle.told(self._receive(data))

    def _receive(self, data: bytes) -> Iterator[Iterable[Event]]:
        self._buffer = self._buffer + data if self._buffer else data  # mostly no copy
        while True:
            if self._payload is not None:
                yield self._receive_payload(self._payload)
            elif (frame := self._next_frame()) is not None:
                yield frame
            if not self._progress():
                self._buffer, self._at = self._buffer[self._at :], 0
                return

    def _progress(self) -> bool:
        """Say whether what is buffered can be taken further."""
        if self._payload is not None:
            return self._at < len(self._buffer) or not self._payload.left
        if len(self._buffer) - self._at < _HEADER.size:
            return False
        first, second = _HEADER.unpack_from(self._buffer, self._at)
        is_data = not first >> 31
        return is_data or len(self._buffer) - self._at >= _HEADER.size + (second & 0xFFFFFF)

    def _next_frame(self) -> Iterator[Event] | None:
        """Take a frame from the buffer: of a data frame the head, of others all."""
        if len(self._buffer) - self._at < _HEADER.size:
            return None
        first, second = _HEADER.unpack_from(self._buffer, self._at)
        flags, length = second >> 24, second & 0xFFFFFF
        if not first >> 31:
            self._at += _HEADER.size
            return self._begin_payload(first, length, fin=bool(flags & _FIN))
        _check_control(first >> 16 & 0x7FFF, length)
        start = self._at + _HEADER.size
        if len(self._buffer) < start + length:
            return None
        self._at = start + length
        payload = self._buffer[start : self._at]
        return self._control(first & 0xFFFF, flags, payload)

    def _begin_payload(self, stream: int, length: int, *, fin: bool) -> Iterator[Event]:
        if not stream or stream > self._last:
            raise ProtocolError(f"data for stream {stream}, which was never opened")
        self._payload = _Payload(stream, length, fin)
        return iter(())

    def _receive_payload(self, payload: _Payload) -> Iterator[Event]:
        """Pass on what there is of a payload; that of a stream which has ended is dropped."""
        data = self._buffer[self._at : self._at + payload.left]
        self._at += len(data)
        payload.left -= len(data)
        known = self._streams.get(payload.stream)
        heard = known is not None and known.theirs
        if data and heard:
            yield Data(stream=payload.stream, data=data)
        if not payload.left:
            self._payload = None
            if payload.fin and heard:
                self._end(payload.stream, theirs=True)
                yield Finished(stream=payload.stream)

    def _control(self, kind: int, flags: int, payload: bytes) -> Iterator[Event]:
        match kind:
            case Kind.SYN_STREAM:
                yield from self._syn_stream(flags, payload)
            case Kind.RST_STREAM:
                stream, _ = _words(payload, 2)
                if self._streams.pop(stream, None) is not None:
                    yield Reset(stream=stream)
            case Kind.PING:
                (number,) = _words(payload, 1)
                if number % 2:  # those of a client are odd; even ones would answer ours
                    yield Pinged(number=number)
            case Kind.GOAWAY:
                yield GoneAway()
            case Kind.HEADERS | Kind.SYN_REPLY:
                self._headers(payload[4:])  # of no use, but the compressor's state is shared
            case Kind.SETTINGS | Kind.WINDOW_UPDATE:
                return
            case _:
                raise ProtocolError(f"frame of unknown type {kind}")

    def _syn_stream(self, flags: int, payload: bytes) -> Iterator[Event]:
        (stream,) = _words(payload[:4], 1)
        stream &= 0x7FFFFFFF
        headers = self._headers(payload[10:])
        if stream % 2 == 0 or stream <= self._last:
            raise ProtocolError(f"stream {stream} cannot be opened after stream {self._last}")
        self._last = stream
        if len(self._streams) >= MAX_STREAMS:
            yield Refused(stream=stream, status=Status.REFUSED_STREAM)
            return
        self._streams[stream] = _Stream(ours=not flags & _UNIDIRECTIONAL)
        yield Opened(stream=stream, headers=headers)
        if flags & _FIN:
            self._end(stream, theirs=True)
            yield Finished(stream=stream)

    def _headers(self, block: bytes) -> dict[str, str]:
        try:
            text = self._inflate.decompress(block, MAX_HEADERS)
        except zlib.error as e:
            raise ProtocolError(f"headers cannot be decompressed: {e}") from e
        if self._inflate.unconsumed_tail:
            raise ProtocolError(f"headers are larger than {MAX_HEADERS} bytes")
        return dict(_pairs(text))

    def _end(self, stream: int, *, theirs: bool) -> None:
        known = self._streams.get(stream)
        if known is None:  # given up by whoever was told of it
            return
        if theirs:
            known.theirs = False
        else:
            known.ours = False
        if not (known.ours or known.theirs):
            del self._streams[stream]

    # -- what we send -----------------------------------------------------------------------------

    def reply(self, stream: int) -> bytes:
        """Accept a stream that was opened."""
        block = self._deflate.compress(_WORD.pack(0)) + self._deflate.flush(zlib.Z_SYNC_FLUSH)
        return _control_frame(Kind.SYN_REPLY, _WORD.pack(stream) + block)

    def send(self, stream: int, data: bytes, *, fin: bool = False) -> bytes:
        """Send on a stream; with `fin` it is the last. Nothing for a stream that has ended."""
        known = self._streams.get(stream)
        if known is None or not known.ours:
            return b""
        view = memoryview(data)
        parts = [view[at : at + MAX_DATA] for at in range(0, len(data), MAX_DATA)]
        if fin:
            parts = parts or [view]
            self._end(stream, theirs=False)
        last = len(parts) - 1
        heads = (
            _HEADER.pack(stream, (_FIN << 24 if fin and n == last else 0) | len(part))
            for n, part in enumerate(parts)
        )
        return b"".join(itertools.chain.from_iterable(zip(heads, parts, strict=True)))

    def reset(self, stream: int, status: Status) -> bytes:
        """Give up a stream, or refuse one."""
        self._streams.pop(stream, None)
        return _control_frame(Kind.RST_STREAM, struct.pack(">II", stream, status))

    def pong(self, number: int) -> bytes:
        """Answer a ping."""
        return _control_frame(Kind.PING, _WORD.pack(number))

    def go_away(self) -> bytes:
        """Tell the client to open no more streams."""
        return _control_frame(Kind.GOAWAY, struct.pack(">II", self._last, 0))


def _check_control(version: int, length: int) -> None:
    if version != VERSION:
        raise ProtocolError(f"SPDY version {version} is not {VERSION}")
    if length > MAX_CONTROL:
        raise ProtocolError(f"a control frame of {length} bytes is larger than {MAX_CONTROL}")


def _control_frame(kind: Kind, payload: bytes) -> bytes:
    return _HEADER.pack(1 << 31 | VERSION << 16 | kind, len(payload)) + payload


def _words(payload: bytes, count: int) -> tuple[int, ...]:
    if len(payload) < 4 * count:
        raise ProtocolError("a control frame is too short")
    return struct.unpack_from(f">{count}I", payload)


def _pairs(text: bytes) -> Iterator[tuple[str, str]]:
    """Parse a header block: a count, then name and value, each with its length before it."""
    (count,) = _words(text, 1)
    at = 4
    for _ in range(count):
        name, at = _string(text, at)
        value, at = _string(text, at)
        yield name.lower(), value


def _string(text: bytes, at: int) -> tuple[str, int]:
    (length,) = _words(text[at : at + 4], 1)
    end = at + 4 + length
    if end > len(text):
        raise ProtocolError("a header is longer than its block")
    return text[at + 4 : end].decode("latin-1"), end
