# SPDX-License-Identifier: Apache-2.0
"""A client that has joined a container: dropped with an error when it takes nothing."""

import contextlib
from typing import Any, cast

import pytest

from shim import attach, container, errors, loop, stdio
from shim.pb import shim_pb2 as pb
from tests.lab import driving


class Stuck:
    """A client that sends nothing and takes nothing."""

    async def recv(self) -> pb.AttachInput | None:
        await loop.Event().wait()
        return None

    async def send(self, message: pb.AttachOutput) -> None:
        await loop.Event().wait()


class Sending(Stuck):
    """A client that sends these."""

    def __init__(self, *messages: pb.AttachInput) -> None:
        self._messages = list(messages)

    async def recv(self) -> pb.AttachInput | None:
        return self._messages.pop(0) if self._messages else await super().recv()


class Running:
    """As much of a container as an attach asks for; it never ends."""

    def __init__(self, *, terminal: bool = False) -> None:
        self.streams = stdio.Streams(terminal=terminal, stdin=False)

    def require(self, *_: Any, **__: Any) -> None:
        return

    spec: Any = None

    async def wait(self) -> None:
        await loop.Event().wait()


def test_a_client_that_takes_nothing_is_detached_with_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stdio, "_STALL_SECONDS", 0.05)
    owner = cast("container.Container", Running())

    async def work() -> None:
        joined = loop.spawn(attach.attach(owner, pb.AttachStart(stdout=True), Stuck()))
        await loop.sleep(0.01)
        await owner.streams._deliver("stdout", b"output")
        with pytest.raises(errors.DeadlineExceeded, match="detached"):
            await joined.join()

    driving.drive(work())


def test_sizes_of_the_terminal_come_after_the_end_of_stdin() -> None:
    running = Running(terminal=True)
    owner = cast("container.Container", running)
    size = pb.Resize(width=120, height=33)
    client = Sending(pb.AttachInput(close_stdin=True), pb.AttachInput(resize=size))

    async def work() -> None:
        joined = loop.spawn(attach.attach(owner, pb.AttachStart(stdout=True), client))
        while running.streams._size != (120, 33):
            await loop.sleep(0.001)
        joined.cancel()
        with contextlib.suppress(loop.Cancelled):
            await joined.join()

    driving.drive(work())
