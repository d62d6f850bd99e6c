# SPDX-License-Identifier: Apache-2.0
"""What a shim says on stderr: whole JSON lines, and never a wait."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ours, theirs = os.pipe()
    yield ours, theirs
    for fd in (ours, theirs):
        with suppress(OSError):
            os.close(fd)


def say(stderr: int, *lines: str) -> int:
    """Run Python lines with this descriptor as stderr; return the exit code."""
    code = "\n".join(("from shim import diagnostics", *lines))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, stderr=stderr, timeout=20, check=False
    )
    return done.returncode


def test_a_line_is_json(pipe: tuple[int, int]) -> None:
    say(
        pipe[1],
        "diagnostics.set_context(pod='p1')",
        "diagnostics.report('it happened', container='c1', error=OSError(2, 'gone'))",
    )
    line = json.loads(os.read(pipe[0], 65536))
    assert line.pop("time") > 0
    assert line == {
        "event": "it happened",
        "pod": "p1",
        "container": "c1",
        "error": "[Errno 2] gone",
    }


def test_a_line_fits_into_one_write(pipe: tuple[int, int]) -> None:
    say(pipe[1], "diagnostics.report('long', text='x' * 100_000)")
    assert len(os.read(pipe[0], 200_000)) <= 4096


def test_a_full_pipe_is_not_waited_for(pipe: tuple[int, int]) -> None:
    os.set_blocking(pipe[1], False)
    with suppress(BlockingIOError):
        while True:
            os.write(pipe[1], b"x" * 4096)
    os.set_blocking(pipe[1], True)
    assert say(pipe[1], "diagnostics.report('nobody listens')") == 0


def test_a_broken_pipe_is_no_error(pipe: tuple[int, int]) -> None:
    os.close(pipe[0])
    assert say(pipe[1], "diagnostics.report('too late')") == 0
