# SPDX-License-Identifier: Apache-2.0
"""Channels in WebSocket messages: understood however they are cut, and bounded."""

import base64
import contextlib
from collections.abc import Sequence

import pytest
import wsproto
from hypothesis import given
from hypothesis import strategies as st
from wsproto import events

from cri_server.streaming import idle, websocket

HEAD = (
    "GET /exec/x HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)


def head(*protocols: str) -> bytes:
    names = f"Sec-WebSocket-Protocol: {', '.join(protocols)}\r\n" if protocols else ""
    return f"{HEAD}{names}\r\n".encode()


def opened(protocol: str) -> websocket.Connection:
    connection = websocket.Connection()
    wanted = [protocol] if protocol else []
    answer = connection.accept(head(*wanted), (*websocket.EXEC, *websocket.FORWARD))
    assert answer is not None
    assert answer.startswith(b"HTTP/1.1 101")
    return connection


def sent(*messages: events.Event) -> bytes:
    client = wsproto.connection.Connection(wsproto.ConnectionType.CLIENT)
    return b"".join(client.send(message) for message in messages)


def joined(found: Sequence[websocket.Event]) -> list[tuple[int, bytes]]:
    """Put together what was passed on in parts; None for an end."""
    result: list[tuple[int, bytes]] = []
    for event in found:
        assert isinstance(event, websocket.Data)
        if result and result[-1][0] == event.channel:
            result[-1] = (event.channel, result[-1][1] + event.data)
        else:
            result.append((event.channel, event.data))
    return result


def test_the_clients_first_choice_that_is_offered_is_taken() -> None:
    connection = websocket.Connection()
    answer = connection.accept(
        head("v9.x", "v4.channel.k8s.io", "v5.channel.k8s.io"), websocket.EXEC
    )
    assert answer is not None
    assert b"v4.channel.k8s.io" in answer
    assert connection.protocol.version == 4


def test_nothing_in_common_is_told_apart_from_nothing_asked() -> None:
    assert websocket.Connection().accept(head("v9.x"), websocket.EXEC) is None
    connection = websocket.Connection()
    assert connection.accept(head(), websocket.EXEC) is not None
    assert connection.protocol is websocket.NONE


@given(cuts=st.lists(st.integers(1, 30), min_size=1, max_size=40), data=st.binary(max_size=300))
def test_where_the_bytes_are_cut_does_not_matter(cuts: list[int], data: bytes) -> None:
    messages = sent(
        events.BytesMessage(data=b"\0first" + data), events.BytesMessage(data=b"\4second")
    )
    connection, at = opened("v4.channel.k8s.io"), 0
    found: list[websocket.Event] = []
    for size in (*cuts, len(messages)):
        found += connection.receive(messages[at : at + size])
        at += size
    assert joined(found) == [(0, b"first" + data), (4, b"second")]


def test_a_message_in_fragments_has_one_channel() -> None:
    parts = [
        events.BytesMessage(data=b"\0one", message_finished=False),
        events.BytesMessage(data=b"two", message_finished=False),
        events.BytesMessage(data=b"three"),
    ]
    found = list(opened("v4.channel.k8s.io").receive(sent(*parts)))
    assert joined(found) == [(0, b"onetwothree")]


@given(data=st.binary(max_size=400), cut=st.integers(0, 600))
def test_base64_is_decoded_in_parts(data: bytes, cut: int) -> None:
    message = sent(events.TextMessage(data="0" + base64.b64encode(data).decode()))
    connection = opened("v4.base64.channel.k8s.io")
    found = [*connection.receive(message[:cut]), *connection.receive(message[cut:])]
    assert joined(found) == ([(0, data)] if data else [])


def test_half_close_is_version_5() -> None:
    end = sent(events.BytesMessage(data=bytes((255, 0))))
    assert list(opened("v5.channel.k8s.io").receive(end)) == [websocket.Finished(channel=0)]
    assert list(opened("v4.channel.k8s.io").receive(end)) == [
        websocket.Data(channel=255, data=b"\0")
    ]


def test_pings_are_answered_and_goodbyes_returned() -> None:
    connection = opened("v4.channel.k8s.io")
    [pong] = connection.receive(sent(events.Ping(payload=b"p")))
    assert isinstance(pong, websocket.Answer)
    found = list(connection.receive(sent(events.CloseConnection(code=1000))))
    assert isinstance(found[-1], websocket.Closed)
    assert connection.close() == b""
    assert connection.send(1, b"late") == b""


def test_pings_after_our_goodbye_are_let_be() -> None:
    connection = opened("v4.channel.k8s.io")
    assert connection.close()
    assert list(connection.receive(sent(events.Ping(payload=b"p")))) == []
    found = list(connection.receive(sent(events.CloseConnection(code=1000))))
    assert found == [websocket.Closed()]


@pytest.mark.parametrize(
    "protocol", ["", "channel.k8s.io", "v4.channel.k8s.io", "v5.channel.k8s.io"]
)
@given(text=st.text(max_size=60), cut=st.integers(0, 300))
def test_a_text_message_is_its_bytes(protocol: str, text: str, cut: int) -> None:
    message = sent(events.TextMessage(data="\0" + text))
    connection = opened(protocol)
    found = [*connection.receive(message[:cut]), *connection.receive(message[cut:])]
    assert joined(found) == ([(0, text.encode())] if text else [])


def test_text_goes_through_a_tunnel() -> None:
    connection = opened("SPDY/3.1+portforward.k8s.io")
    found = list(connection.receive(sent(events.TextMessage(data="\0\1"))))
    assert joined(found) == [(0, b"\0\1")]


def test_base64_comes_in_binary_messages_too() -> None:
    connection = opened("v4.base64.channel.k8s.io")
    assert joined(list(connection.receive(sent(events.BytesMessage(data=b"0aGk="))))) == [
        (0, b"hi")
    ]
    with pytest.raises(websocket.ProtocolError):
        list(connection.receive(sent(events.BytesMessage(data=b"0\xff\xff\xff\xff"))))


PROTOCOLS = [p.name for p in (websocket.NONE, *websocket.EXEC, *websocket.FORWARD)]


@given(protocol=st.sampled_from(PROTOCOLS), noise=st.binary(max_size=200))
def test_noise_ends_the_connection_or_is_nothing(protocol: str, noise: bytes) -> None:
    connection = opened(protocol)
    with contextlib.suppress(websocket.ProtocolError):
        for _ in range(20):
            if websocket.Closed() in connection.receive(noise):
                return


# What a client may send, and what we may do meanwhile: None is to send, b"" to say goodbye.
STEP = st.one_of(
    st.binary(max_size=30).map(lambda data: sent(events.BytesMessage(data=data))),
    st.text(max_size=30).map(lambda text: sent(events.TextMessage(data=text))),
    st.binary(max_size=99).map(lambda data: sent(events.Ping(payload=data))),
    st.just(sent(events.CloseConnection(code=1000))),
    st.sampled_from([None, b""]),
)


@given(protocol=st.sampled_from(PROTOCOLS), steps=st.lists(STEP, max_size=30))
def test_no_order_of_frames_is_a_surprise(protocol: str, steps: list[bytes | None]) -> None:
    connection, silent = opened(protocol), False
    for step in steps:
        if not step:
            said = connection.send(1, b"out") if step is None else connection.close()
            assert bool(said) != silent
            silent |= step == b""
            continue
        try:
            found = list(connection.receive(step))
        except websocket.ProtocolError:
            return
        if websocket.Closed() in found:
            assert not connection.send(1, b"late")
            return


@pytest.mark.parametrize("text", ["/aGk=", "0not base64!", "²aGk="])
def test_bad_base64_ends_the_connection(text: str) -> None:
    connection = opened("base64.channel.k8s.io")
    with pytest.raises(websocket.ProtocolError):
        list(connection.receive(sent(events.TextMessage(data=text))))


def test_a_protocol_that_is_not_ascii() -> None:
    with pytest.raises(websocket.ProtocolError):
        websocket.Connection().accept(head("v4.channel.k8s.io", "v\u00e9"), websocket.EXEC)


def test_a_request_that_is_no_websockets() -> None:
    with pytest.raises(websocket.ProtocolError):
        websocket.Connection().accept(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n", websocket.EXEC)


def test_a_crowd_of_frames_that_say_nothing_is_told_now_and_then() -> None:
    connection = opened("v4.channel.k8s.io")
    found = list(connection.receive(sent(*(events.Pong() for _ in range(100)))))
    assert [type(event) for event in found] == [idle.Idle] * (100 // idle.SILENT)
