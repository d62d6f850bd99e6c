# SPDX-License-Identifier: Apache-2.0
"""Events: bounds, order, ends."""

import asyncio
import itertools
import time

import pytest

from cri_server import errors, events
from cri_server.pb import api_pb2 as api

STATUS = api.PodSandboxStatus(id="p", metadata=api.PodSandboxMetadata(name="pod"))


def describe(pod_id: str) -> events.Described:
    if pod_id != "p":
        raise errors.NotFound("no such pod")
    return STATUS, [api.ContainerStatus(id="c")]


async def unread(reader: events.Reader) -> list[api.ContainerEventResponse]:
    """Return what a reader has waiting."""
    found = []
    try:
        while True:
            found.append(await asyncio.wait_for(anext(reader), 0.01))
    except TimeoutError:
        return found


async def test_times_strictly_increase_whatever_the_clock_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = itertools.chain([100, 100, 50], itertools.repeat(200))
    host = events.Events(describe)
    with host.reader() as reader:
        monkeypatch.setattr(time, "time_ns", lambda: next(clock))
        for _ in range(4):
            host.publish(events.CREATED, "c", pod="p")

        assert [e.created_at for e in await unread(reader)] == [100, 101, 102, 200]


async def test_a_pod_that_is_not_listed_has_no_events() -> None:
    host = events.Events(describe)
    with host.reader() as reader:
        host.publish(events.STOPPED, "c", pod="gone")

        assert await unread(reader) == []


async def test_too_many_unread_events_are_lost_and_the_reader_is_told() -> None:
    host = events.Events(describe)
    with host.reader() as lazy, host.reader() as eager:
        for _ in range(events.MOST_EVENTS + 1):
            host.publish(events.CREATED, "c", pod="p")
            await anext(eager)
        host.publish(events.STOPPED, "c", pod="p")

        with pytest.raises(errors.ResourceExhausted):
            await anext(lazy)
        assert [e.container_event_type for e in await unread(eager)] == [events.STOPPED]


async def test_too_many_unread_bytes_are_lost_but_one_event_always_fits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(events, "MOST_BYTES", 1)
    host = events.Events(describe)
    with host.reader() as reader:
        host.publish(events.CREATED, "c", pod="p")
        assert len(await unread(reader)) == 1
        for _ in range(2):
            host.publish(events.CREATED, "c", pod="p")
        with pytest.raises(errors.ResourceExhausted):
            await anext(reader)


async def test_the_end_comes_after_what_was_published() -> None:
    host = events.Events(describe)
    with host.reader() as reader:
        host.publish(events.CREATED, "c", pod="p")
        host.close()

        assert (await anext(reader)).container_id == "c"
        with pytest.raises(errors.Unavailable):
            await anext(reader)
    with host.reader() as late, pytest.raises(errors.Unavailable):
        await anext(late)
