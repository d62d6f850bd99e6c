# SPDX-License-Identifier: Apache-2.0
"""The socket that takes a terminal, and the terminal's size."""

import fcntl
import os
import socket
import struct
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest

from shim import console, errors, loop


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    master, slave = os.openpty()
    yield master, slave
    os.close(master)
    os.close(slave)


def send(path: str, *descriptors: int) -> None:
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(path)
        socket.send_fds(peer, [b"/dev/ptmx"], list(descriptors))


@pytest.mark.parametrize("depth", [1, 10])
def test_the_master_arrives_wherever_the_folder_is(
    tmp_path: Path, terminal: tuple[int, int], depth: int
) -> None:
    folder = tmp_path.joinpath(*["a" * 20] * depth)
    folder.mkdir(parents=True)
    master, slave = terminal

    async def receive() -> int:
        with console.ConsoleSocket(os.fspath(folder)) as listener:
            assert len(listener.path) < 108
            send(listener.path, master)
            return await listener.receive()

    received = loop.run(receive())
    try:
        assert not os.get_inheritable(received)
        assert not os.get_blocking(received)
        os.write(slave, b"hello")
        assert os.read(received, 100) == b"hello"
    finally:
        os.close(received)
    assert list(folder.iterdir()) == []


def test_a_message_without_a_terminal_is_an_error(tmp_path: Path) -> None:
    async def receive() -> int:
        with console.ConsoleSocket(os.fspath(tmp_path)) as listener:
            with socket.socket(socket.AF_UNIX) as peer:
                peer.connect(listener.path)
                peer.send(b"x")
            return await listener.receive()

    with pytest.raises(errors.Internal, match="no terminal"):
        loop.run(receive())


@pytest.mark.parametrize(
    ("width", "height", "seen"), [(80, 25, (25, 80)), (1 << 20, 0, (0, 65535))]
)
def test_resize(terminal: tuple[int, int], width: int, height: int, seen: tuple[int, int]) -> None:
    master, slave = terminal
    console.resize(master, width, height)
    size = fcntl.ioctl(slave, termios.TIOCGWINSZ, bytes(8))
    assert struct.unpack("HHHH", size)[:2] == seen


def test_resize_of_what_is_no_terminal_is_nothing() -> None:
    ours, theirs = os.pipe()
    console.resize(ours, 1, 1)
    os.close(ours)
    os.close(theirs)
