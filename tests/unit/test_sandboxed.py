# SPDX-License-Identifier: Apache-2.0
"""shim.runtimes.sandboxed: what it reads of runsc's words. The rest is in test_handlers.py."""

import os

import pytest

from shim.runtimes import sandboxed

TABLE = b"""\
UID       PID       PPID      C         TTY       STIME     TIME      CMD
0         2         0         2         ?         00:47     10ms      sleep
0         3         0         0         ?         00:47     0s        sh
0         4         3         2         ?         00:47     10ms      sh
0         5         4         3         ?         00:47     0s        sleep
"""


@pytest.mark.parametrize(("top", "tree"), [(3, [3, 4, 5]), (2, [2]), (5, [5]), (9, [9])])
def test_a_tree_is_a_process_with_its_descendants(top: int, tree: list[int]) -> None:
    assert sandboxed._tree(TABLE, top) == tree


def test_no_table_is_the_process_alone() -> None:
    assert sandboxed._tree(b"", 7) == [7]


@pytest.mark.parametrize(
    ("said", "code"),
    [(b'{"id":"c1","exitStatus":7}\n', 7), (b"", 137), (b"loading: no", 137), (b"{}", 137)],
)
def test_the_exit_status_is_what_wait_said_or_that_of_a_dead_kernel(said: bytes, code: int) -> None:
    ours, theirs = os.pipe()
    os.write(theirs, said)
    os.close(theirs)

    assert sandboxed._exit_status(ours) == code
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.close(ours)
