# SPDX-License-Identifier: Apache-2.0
"""ttrpc frames: one table for writer and reader, fed in any pieces."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.ttrpc import frames

TABLE = [
    (frames.Frame(1, frames.REQUEST, 0, b""), "00000000 00000001 01 00"),
    (frames.Frame(3, frames.REQUEST, frames.REMOTE_OPEN, b"ab"), "00000002 00000003 01 02 6162"),
    (frames.Frame(258, frames.RESPONSE, 0, b"\x00"), "00000001 00000102 02 00 00"),
    (
        frames.Frame(5, frames.DATA, frames.REMOTE_CLOSED | frames.NO_DATA, b""),
        "00000000 00000005 03 05",
    ),
]
WIRE = b"".join(bytes.fromhex(text) for _, text in TABLE)


def drain(decoder: frames.Decoder) -> list[frames.Frame | frames.Oversized]:
    return list(iter(decoder.next, None))


@pytest.mark.parametrize(("frame", "text"), TABLE)
def test_a_frame_is_written_as_the_protocol_draws_it(frame: frames.Frame, text: str) -> None:
    written = frames.encode(frame.stream, frame.type, frame.flags, frame.payload)
    assert written == bytes.fromhex(text)


@given(cuts=st.lists(st.integers(0, len(WIRE))))
def test_frames_are_read_whatever_the_pieces(cuts: list[int]) -> None:
    decoder, found, ends = frames.Decoder(), [], sorted({0, *cuts, len(WIRE)})
    for start, end in itertools.pairwise(ends):
        decoder.receive(WIRE[start:end])
        found += drain(decoder)
    assert found == [frame for frame, _ in TABLE]


@pytest.mark.parametrize("piece", [7, 65536, 1 << 23])
def test_an_oversized_frame_is_told_and_skipped(piece: int) -> None:
    length = frames.MAX_PAYLOAD + 1
    head = bytes.fromhex(f"{length:08x} 00000007 01 00")
    wire = head + bytes(length if piece > 7 else 0)
    decoder = frames.Decoder()
    found = []
    for start in range(0, len(wire), piece):
        decoder.receive(wire[start : start + piece])
        found += drain(decoder)
    assert found == [frames.Oversized(7, frames.REQUEST, 0, length)]
    if piece == 7:
        decoder.receive(bytes(length))
    decoder.receive(WIRE)
    assert drain(decoder) == [frame for frame, _ in TABLE]


def test_the_largest_payload_passes_and_one_more_is_refused() -> None:
    payload = bytes(frames.MAX_PAYLOAD)
    decoder = frames.Decoder()
    decoder.receive(frames.encode(1, frames.DATA, 0, payload))
    assert drain(decoder) == [frames.Frame(1, frames.DATA, 0, payload)]
    with pytest.raises(frames.TooLarge):
        frames.encode(1, frames.DATA, 0, payload + b"x")
