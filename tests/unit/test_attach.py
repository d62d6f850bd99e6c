# SPDX-License-Identifier: Apache-2.0
"""A client that has joined a container: dropped with an error when it takes nothing."""

import contextlib
from pathlib import Path
from typing import Any, cast

import pytest

from shim import attach, container, errors, loop, stdio
from shim.pb import shim_pb2 as pb
from tests.lab import driving
from tests.unit.test_container import Case


class Stuck:
    """A client that sends nothing and takes nothing."""

    async def recv(self) -> pb.AttachInput | None:
        await loop.Event().wait()
        return None

    async def send(self, message: pb.AttachOutput) -> None:
        await loop.Event().wait()


class Taking(Stuck):
    """A client that takes what comes."""

    def __init__(self) -> None:
        self.taken: list[pb.AttachOutput] = []

    async def send(self, message: pb.AttachOutput) -> None:
        self.taken.append(message)


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


def test_who_has_not_all_output_at_the_containers_end_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(container, "_DRAIN_SECONDS", 0.1)
    case = Case(tmp_path, "sleep 0.2; head -c 50000 /dev/zero; exit 3")

    async def work() -> None:
        await case.it.start()
        slow, other = Stuck(), Taking()
        late = loop.spawn(attach.attach(case.it, pb.AttachStart(stdout=True), slow))
        fine = loop.spawn(attach.attach(case.it, pb.AttachStart(stderr=True), other))
        with pytest.raises(errors.DeadlineExceeded, match="detached"):
            await late.join()
        await fine.join()
        assert [message.exit.exit_code for message in other.taken] == [3]
        await case.end()

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
