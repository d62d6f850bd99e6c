# SPDX-License-Identifier: Apache-2.0
"""The kernel says who listens on a unix socket, and who is connected to it."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from cri_server import sockets


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[Path]:
    """Return the path of a socket that this process listens on and never accepts from."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.fspath(tmp_path / "sock"))
        server.listen()
        yield tmp_path / "sock"


def test_the_listener_is_known_though_it_accepts_nobody(listening: Path) -> None:
    assert sockets.listener(listening) == os.getpid()


def test_nobody_listens_at_a_path_without_or_with_a_dead_socket(tmp_path: Path) -> None:
    assert sockets.listener(tmp_path / "none") is None
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(os.fspath(tmp_path / "dead"))
    assert sockets.listener(tmp_path / "dead") is None


def test_who_is_connected_is_named_while_it_is(listening: Path) -> None:
    name = Path("/proc/self/comm").read_text().strip()
    assert sockets.clients(listening) == {}
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(os.fspath(listening))
        assert sockets.clients(listening) == {os.getpid(): name}
    assert sockets.clients(listening.with_name("other")) == {}
