# SPDX-License-Identifier: Apache-2.0
"""What a shim says on stderr: whole JSON lines, and never a wait."""

import json
import os
from collections.abc import Iterator

import pytest

from shim import diagnostics


@pytest.fixture
def stderr() -> Iterator[int]:
    """Return the reading end of a pipe that is descriptor 2 meanwhile."""
    ours, theirs = os.pipe()
    saved = os.dup(2)
    os.dup2(theirs, 2)
    os.close(theirs)
    yield ours
    os.dup2(saved, 2)
    os.close(saved)
    os.close(ours)


def test_a_line_is_json(stderr: int) -> None:
    diagnostics.report("something happened", container="c1", error=OSError(2, "gone"))
    line = json.loads(os.read(stderr, 65536))
    assert line["event"] == "something happened"
    assert line["container"] == "c1"
    assert "gone" in line["error"]
    assert line["time"] > 0


def test_a_line_fits_into_one_write(stderr: int) -> None:
    diagnostics.report("long", text="x" * 100_000)
    assert len(os.read(stderr, 200_000)) <= 4096


def test_a_full_pipe_is_not_waited_for(stderr: int) -> None:
    os.set_blocking(2, False)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(2, b"x" * 4096)
    os.set_blocking(2, True)
    diagnostics.report("nobody listens")


def test_a_broken_pipe_is_no_error(stderr: int) -> None:
    broken, end = os.pipe()
    saved = os.dup(2)
    os.close(broken)
    os.dup2(end, 2)
    try:
        diagnostics.report("too late")
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(end)
