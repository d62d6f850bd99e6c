# SPDX-License-Identifier: Apache-2.0
"""Channels in WebSocket messages: understood however they are cut, and bounded."""

import base64
from collections.abc import Sequence

import pytest
import wsproto
from hypothesis import given
from hypothesis import strategies as st
from wsproto import events

from cri_server.streaming import websocket

HEAD = (
    "GET /exec/x HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)


def head(*protocols: str) -> bytes:
    names = f"Sec-WebSocket-Protocol: {', '.join(protocols)}\r\n" if protocols else ""
    return f"{HEAD}{names}\r\n".encode()


def opened(protocol: str) -> websocket.Connection:
    connection = websocket.Connection()
    answer = connection.accept(head(protocol), (*websocket.EXEC, *websocket.FORWARD))
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


def test_text_where_bytes_were_agreed_on_ends_the_connection() -> None:
    connection = opened("v4.channel.k8s.io")
    with pytest.raises(websocket.ProtocolError):
        list(connection.receive(sent(events.TextMessage(data="0aGk="))))


def test_noise_ends_the_connection() -> None:
    assert list(opened("v4.channel.k8s.io").receive(b"\xff" * 20))[-1] == websocket.Closed()


@pytest.mark.parametrize("text", ["/aGk=", "0not base64!", "²aGk="])
def test_bad_base64_ends_the_connection(text: str) -> None:
    connection = opened("base64.channel.k8s.io")
    with pytest.raises(websocket.ProtocolError):
        list(connection.receive(sent(events.TextMessage(data=text))))


def test_a_request_that_is_no_websockets() -> None:
    with pytest.raises(websocket.ProtocolError):
        websocket.Connection().accept(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n", websocket.EXEC)
