# SPDX-License-Identifier: Apache-2.0
"""SPDY/3.1 frames: what clients send is understood however it is cut, and bounded."""

import hashlib
import itertools
import struct
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cri_server.streaming import spdy, spdydict
from tests.fakes import spdy as fake

HEADERS = {"streamtype": "stdin", "port": "80"}


def events(*frames: bytes) -> list[spdy.Event]:
    return list(spdy.Connection().receive(b"".join(frames)))


def joined(found: Sequence[spdy.Event]) -> list[spdy.Event]:
    """Put together what was passed on in parts."""
    result: list[spdy.Event] = []
    for event in found:
        last = result[-1] if result else None
        if not isinstance(event, spdy.Data) or not isinstance(last, spdy.Data):
            result.append(event)
        elif last.stream == event.stream:
            result[-1] = spdy.Data(stream=event.stream, data=last.data + event.data)
    return result


def test_the_dictionary_is_that_of_the_draft() -> None:
    digest = "51d27341373f923f3cd88e1eb7162aeaa3723d7585ff2399201dc06498407f02"
    assert hashlib.sha256(spdydict.DICTIONARY).hexdigest() == digest


def test_a_stream_from_its_opening_to_its_end() -> None:
    client = fake.Client()
    assert events(client.open(1, HEADERS), fake.data(1, b"hello"), fake.data(1, b"", fake.FIN)) == [
        spdy.Opened(stream=1, headers=HEADERS),
        spdy.Data(stream=1, data=b"hello"),
        spdy.Finished(stream=1),
    ]


def test_the_compressor_is_one_for_the_connection() -> None:
    client = fake.Client()
    names = [{"streamtype": name, "requestid": "0"} for name in ("error", "data", "error", "data")]
    opened = events(*(client.open(2 * n + 1, headers) for n, headers in enumerate(names)))
    assert [event.headers for event in opened if isinstance(event, spdy.Opened)] == names


def test_names_of_headers_are_lower_case() -> None:
    [opened] = events(fake.Client().open(1, {"StreamType": "Error"}))
    assert opened == spdy.Opened(stream=1, headers={"streamtype": "Error"})


def test_pings_of_the_client_are_answered_and_others_ignored() -> None:
    found = events(
        fake.control(fake.PING, struct.pack(">I", 7)),
        fake.control(fake.PING, struct.pack(">I", 8)),
        fake.control(fake.SETTINGS, struct.pack(">I", 0)),
        fake.control(fake.WINDOW_UPDATE, struct.pack(">II", 1, 5)),
        fake.control(fake.GOAWAY, struct.pack(">II", 0, 0)),
    )
    assert found == [spdy.Pinged(number=7), spdy.GoneAway()]
    [pong] = fake.parse(spdy.Connection().pong(7))
    assert (pong.kind, pong.number) == (fake.PING, 7)


def test_a_reset_stream_is_forgotten_and_its_data_dropped() -> None:
    connection = spdy.Connection()
    reset = fake.control(fake.RST_STREAM, struct.pack(">II", 1, 5))
    found = list(connection.receive(fake.Client().open(1) + reset + fake.data(1, b"late")))
    assert found == [spdy.Opened(stream=1, headers={}), spdy.Reset(stream=1)]
    assert connection.send(1, b"more") == b""


def test_each_side_ends_its_half() -> None:
    connection = spdy.Connection()
    list(connection.receive(fake.Client().open(1) + fake.data(1, b"", fake.FIN)))
    [last] = fake.parse(connection.send(1, b"out", fin=True))
    assert last == fake.Frame(0, 1, fake.FIN, b"out")
    assert connection.send(1, b"more") == b""
    assert list(connection.receive(fake.data(1, b"late"))) == []


def test_what_we_send_is_cut_and_only_the_last_part_ends_the_stream() -> None:
    connection = spdy.Connection()
    list(connection.receive(fake.Client().open(1)))
    sent = bytes(range(256)) * 1000
    frames = list(fake.parse(connection.send(1, sent, fin=True)))
    assert b"".join(frame.payload for frame in frames) == sent
    assert max(len(frame.payload) for frame in frames) <= spdy.MAX_DATA
    assert [frame.flags for frame in frames] == [0] * (len(frames) - 1) + [fake.FIN]


def test_a_frame_of_16_mib_is_passed_on_as_it_comes() -> None:
    connection = spdy.Connection()
    list(connection.receive(fake.Client().open(1)))
    head = struct.pack(">II", 1, (1 << 24) - 1)
    assert list(connection.receive(head + b"abc")) == [spdy.Data(stream=1, data=b"abc")]
    assert list(connection.receive(b"def")) == [spdy.Data(stream=1, data=b"def")]


def test_the_reply_accepts_the_stream() -> None:
    connection = spdy.Connection()
    list(connection.receive(fake.Client().open(1)))
    [reply] = fake.parse(connection.reply(1))
    assert (reply.kind, reply.number) == (fake.SYN_REPLY, 1)


def test_too_many_streams_are_refused_and_the_rest_goes_on() -> None:
    client, connection = fake.Client(), spdy.Connection()
    opened = b"".join(client.open(2 * n + 1) for n in range(spdy.MAX_STREAMS + 1))
    found = list(connection.receive(opened))
    last = 2 * spdy.MAX_STREAMS + 1
    assert found[-1] == spdy.Refused(stream=last, status=spdy.Status.REFUSED_STREAM)
    assert list(connection.receive(fake.data(1, b"x"))) == [spdy.Data(stream=1, data=b"x")]
    [reset] = fake.parse(connection.reset(1, spdy.Status.CANCEL))
    assert (reset.kind, reset.payload) == (fake.RST_STREAM, struct.pack(">II", 1, 5))
    assert spdy.Opened(stream=last + 2, headers={}) in connection.receive(client.open(last + 2))


def test_a_stream_that_begins_with_its_end_may_be_given_up_at_once() -> None:
    connection = spdy.Connection()
    found = []
    for event in connection.receive(fake.Client().open(1, flags=fake.FIN) + fake.data(1, b"x")):
        found.append(event)
        connection.reset(1, spdy.Status.REFUSED_STREAM)
    assert found == [spdy.Opened(stream=1, headers={}), spdy.Finished(stream=1)]


STREAM = st.integers(0, 3)
FLAGS = st.sampled_from([0, fake.FIN])
STEP = st.one_of(
    st.tuples(st.just("open"), st.integers(0, 3)),
    st.tuples(st.just("data"), STREAM, st.binary(max_size=9), FLAGS),
    st.tuples(st.just("reset"), STREAM),
    st.tuples(st.just("ping"), STREAM),
    st.tuples(st.just("goodbye")),
)
REACTIONS = ("", "reply", "send", "finish", "reset")


class Talk:
    """A client's frames, in any order that the format allows."""

    def __init__(self) -> None:
        self.client, self.last = fake.Client(), -1

    def frame(self, step: tuple[Any, ...]) -> bytes:
        match step:
            case "open", flags:
                self.last += 2
                return self.client.open(self.last, HEADERS, flags)
            case "data", number, payload, flags if 2 * number + 1 <= self.last:
                return fake.data(2 * number + 1, payload, flags)
            case "reset", number:
                return fake.control(fake.RST_STREAM, struct.pack(">II", 2 * number + 1, 5))
            case "ping", number:
                return fake.control(fake.PING, struct.pack(">I", number))
            case "goodbye":
                return fake.control(fake.GOAWAY, struct.pack(">II", 0, 0))
        return b""


def react(connection: spdy.Connection, how: str, stream: int) -> bytes:
    match how:
        case "reply":
            return connection.reply(stream)
        case "send" | "finish":
            return connection.send(stream, b"out", fin=how == "finish")
        case "reset":
            return connection.reset(stream, spdy.Status.CANCEL)
    return b""


@given(
    steps=st.lists(STEP, max_size=30),
    reactions=st.lists(st.tuples(st.sampled_from(REACTIONS), STREAM), min_size=1, max_size=20),
    at_once=st.integers(1, 8),
)
def test_no_order_of_frames_is_a_surprise(
    steps: list[tuple[Any, ...]], reactions: list[tuple[str, int]], at_once: int
) -> None:
    """Whatever we do while frames come, nothing is raised, and what has ended is not heard again
    in either direction.
    """
    connection, talk, whims = spdy.Connection(), Talk(), itertools.cycle(reactions)
    frames = [talk.frame(step) for step in steps]
    opened, unheard, unsaid = set[int](), set[int](), set[int]()
    for first in range(0, len(frames), at_once):
        for event in connection.receive(b"".join(frames[first : first + at_once])):
            match event:
                case spdy.Opened():
                    opened.add(event.stream)
                case spdy.Data():
                    assert event.stream not in unheard
                case spdy.Finished() | spdy.Reset():
                    unheard.add(event.stream)
                    unsaid |= {event.stream} if isinstance(event, spdy.Reset) else set()
            how, number = next(whims)
            if (stream := 2 * number + 1) not in opened:
                continue
            said = react(connection, how, stream)
            if how in ("send", "finish"):
                assert not (said and stream in unsaid)
            unsaid |= {stream} if how in ("finish", "reset") else set()
            unheard |= {stream} if how == "reset" else set()


BOMB = fake.Client().block({"a": "0" * (1 << 20)})
BAD = {
    "another version": fake.control(fake.PING, b"\0\0\0\1", version=2),
    "an unknown type": fake.control(5, b""),
    "a long control frame": struct.pack(">II", 0x80030004, spdy.MAX_CONTROL + 1),
    "data for no stream": fake.data(0, b"x"),
    "data for a stream never opened": fake.data(5, b"x"),
    "an even stream": fake.Client().open(2),
    "a stream again": (lambda c: c.open(3) + c.open(3))(fake.Client()),
    "a stream before another": (lambda c: c.open(3) + c.open(1))(fake.Client()),
    "headers that are no zlib": fake.control(fake.SYN_STREAM, bytes(10) + b"garbage"),
    "a header bomb": fake.control(fake.SYN_STREAM, struct.pack(">IIH", 1, 0, 0) + BOMB),
    "a short frame": fake.control(fake.PING, b"\0"),
    "a short opening": fake.control(fake.SYN_STREAM, b"\0\0\0\1"),
}


@pytest.mark.parametrize("frames", BAD.values(), ids=BAD.keys())
def test_what_is_no_spdy_ends_the_connection(frames: bytes) -> None:
    with pytest.raises(spdy.ProtocolError):
        events(frames)


@pytest.mark.parametrize("count", [1, 5, 0xFFFFFFFF])
def test_a_header_block_that_lies_about_its_lengths(count: int) -> None:
    client = fake.Client()
    text = struct.pack(">II", count, 0xFFFFFF)
    block = client._deflate.compress(text) + client._deflate.flush(2)
    with pytest.raises(spdy.ProtocolError):
        events(fake.control(fake.SYN_STREAM, struct.pack(">IIH", 1, 0, 0) + block))


@given(cuts=st.lists(st.integers(1, 40), min_size=1, max_size=60))
def test_where_the_bytes_are_cut_does_not_matter(cuts: list[int]) -> None:
    client = fake.Client()
    sent = (
        client.open(1, HEADERS)
        + fake.data(1, b"some data", 0)
        + client.open(3, {"streamtype": "error"}, fake.FIN)
        + fake.control(fake.PING, struct.pack(">I", 1))
        + fake.data(1, b"", fake.FIN)
    )
    connection, at = spdy.Connection(), 0
    found: list[spdy.Event] = []
    for size in (*cuts, len(sent)):
        found += connection.receive(sent[at : at + size])
        at += size
    assert joined(found) == joined(events(sent))


@given(noise=st.binary(max_size=200))
def test_noise_is_an_error_or_nothing_and_costs_no_memory(noise: bytes) -> None:
    connection = spdy.Connection()
    try:
        for _ in range(20):
            list(connection.receive(noise))
    except spdy.ProtocolError:
        return
    assert len(connection._buffer) <= spdy.MAX_CONTROL + 8
