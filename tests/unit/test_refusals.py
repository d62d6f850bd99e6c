# SPDX-License-Identifier: Apache-2.0
"""shim.runtimes.refusals: a gRPC server that has no service."""

import itertools
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim import loop, process
from shim.runtimes import refusals
from shim.runtimes.refusals import ACK, END_HEADERS, END_STREAM, frame

REPOSITORY = Path(__file__).parents[2]
LISTENER = 3
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
REFUSAL = refusals.UNIMPLEMENTED
SETTINGS, PING, HEADERS, DATA = (
    refusals.SETTINGS,
    refusals.PING,
    refusals.HEADERS,
    refusals.DATA,
)
TALK = [
    (PREFACE, frame(SETTINGS, 0, 0)),
    (frame(SETTINGS, 0, 0, b"\x00\x03\x00\x00\x00\x64"), frame(SETTINGS, ACK, 0)),
    (frame(SETTINGS, ACK, 0), b""),
    (
        frame(HEADERS, END_HEADERS, 1, b"whatever"),
        frame(HEADERS, END_HEADERS | END_STREAM, 1, REFUSAL),
    ),
    (frame(DATA, END_STREAM, 1, b"12345"), frame(refusals.WINDOW_UPDATE, 0, 0, b"\0\0\0\5")),
    (frame(DATA, END_STREAM, 1), b""),
    (frame(PING, 0, 0, b"12345678"), frame(PING, ACK, 0, b"12345678")),
    (frame(HEADERS, END_STREAM, 3, b"long"), b""),
    (
        frame(refusals.CONTINUATION, END_HEADERS, 3, b"er"),
        frame(HEADERS, END_HEADERS | END_STREAM, 3, REFUSAL),
    ),
    (frame(HEADERS, END_HEADERS | END_STREAM, 3, b"trailers of what was answered"), b""),
]
ASKED, ANSWERED = (b"".join(side) for side in zip(*TALK, strict=True))
METHOD = "/containerd.services.containers.v1.Containers/Get"


@given(cuts=st.lists(st.integers(0, len(ASKED))))
def test_every_request_is_refused_whatever_the_pieces(cuts: list[int]) -> None:
    conversation, said, ends = refusals.Conversation(), b"", sorted({0, *cuts, len(ASKED)})
    for start, end in itertools.pairwise(ends):
        said += conversation.receive(ASKED[start:end])
    assert said == ANSWERED


@pytest.mark.parametrize(
    "said", [b"GET / HTTP/1.1", b"\0\0\0\0", PREFACE + frame(DATA, 0, 1, bytes(16385))]
)
def test_what_is_no_http2_ends_the_conversation(said: bytes) -> None:
    with pytest.raises(refusals.Garbage):
        refusals.Conversation().receive(said)


@pytest.fixture
def path(tmp_path: Path) -> Iterator[str]:
    """Where a process of its own refuses."""
    name = str(tmp_path / "grpc")
    env = {**process.DEFAULT_ENV, "PYTHONPATH": str(REPOSITORY)}
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(name)
        listener.listen()
        command = [sys.executable, "-P", __file__]
        child = process.spawn(command, env=env, stderr=2, fds={LISTENER: listener.fileno()})
    yield name
    process.kill_group(child)
    process.reap(child)


def test_a_client_connects_and_is_told_that_nothing_is_implemented(path: str) -> None:
    with grpc.insecure_channel(f"unix://{path}") as channel:
        grpc.channel_ready_future(channel).result(timeout=10)
        ask: Any = channel.unary_unary(METHOD)
        for request in (b"", bytes(100_000), b"again"):
            with pytest.raises(grpc.RpcError, match="no containerd here") as refused:
                ask(request, timeout=10)
            assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_who_talks_nonsense_is_hung_up_on_and_others_are_not(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as nonsense:
        nonsense.connect(path)
        nonsense.sendall(b"hello?")
        assert nonsense.recv(1) == b""
    with grpc.insecure_channel(f"unix://{path}") as channel:
        grpc.channel_ready_future(channel).result(timeout=10)


if __name__ == "__main__":
    loop.run(refusals.serve(socket.socket(fileno=LISTENER)))
