# SPDX-License-Identifier: Apache-2.0
"""Unit tests run with an alarm: a call that may wait on the
event loop from inside `cri_server` is an error.

Quick calls on local files (a stat, a small read, a rename) are let through: the server makes them
on the loop on purpose, where a thread would cost more than the call. What may wait for somebody
else is not.
"""

from collections.abc import Iterator

import blockbuster
import pytest

FILES = ("os.", "io.", "builtins.")


@pytest.fixture(autouse=True)
def _alarm() -> Iterator[None]:
    alarm = blockbuster.BlockBuster("cri_server")
    for name, function in alarm.functions.items():
        if not name.startswith(FILES):
            function.activate()
    yield
    alarm.deactivate()
