# SPDX-License-Identifier: Apache-2.0
"""Telling readers that pods and containers come and go (CRI GetContainerEvents).

    pods, containers ── publish ──► the pod described, once ──► a queue per reader ──► its stream

An event is published when its fact is on record. Each carries the pod's status and the statuses of
all its containers as they are at that moment; a sandbox is a container of its own id here, as the
kubelet expects. Times strictly increase, so that they also number the events of one server.

Nobody waits for a reader: one that leaves more than a bound of events unread loses them all and its
stream ends with ResourceExhausted, so that it knows to list again. What happens while nobody reads
is not kept, and neither is what happens while the server is down: a reader begins with a list.
"""

import asyncio
import collections
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Self, TypeAlias

import structlog

from cri_server import errors
from cri_server.pb import api_pb2 as api

log = structlog.get_logger()
Kind: TypeAlias = "api.ContainerEventType.ValueType"
Described = tuple[api.PodSandboxStatus, Sequence[api.ContainerStatus]]

CREATED, STARTED, STOPPED, DELETED = (
    api.ContainerEventType.CONTAINER_CREATED_EVENT,
    api.ContainerEventType.CONTAINER_STARTED_EVENT,
    api.ContainerEventType.CONTAINER_STOPPED_EVENT,
    api.ContainerEventType.CONTAINER_DELETED_EVENT,
)
MOST_EVENTS = 1000  # that a reader may leave unread
MOST_BYTES = 8 << 20


class Events:
    """The one place where events are published and read. Belongs to the loop's thread."""

    def __init__(self, describe: Callable[[str], Described]) -> None:
        """`describe` gives the statuses of a pod and its containers; it may raise NotFound."""
        self._describe = describe
        self._readers: set[Reader] = set()
        self._latest = 0
        self._closed = False

    def publish(self, kind: Kind, of: str, *, pod: str) -> None:
        """Tell every reader what happened to the container or sandbox `of` in `pod`."""
        if not self._readers:
            return
        try:
            of_pod, of_containers = self._describe(pod)
        except errors.NotFound:  # a pod that is not listed; its events would not be understood
            return
        self._latest = max(time.time_ns(), self._latest + 1)
        self._hand_out(
            api.ContainerEventResponse(
                container_id=of,
                container_event_type=kind,
                created_at=self._latest,
                pod_sandbox_status=of_pod,
                containers_statuses=of_containers,
            )
        )

    def _hand_out(self, event: api.ContainerEventResponse) -> None:
        size = event.ByteSize()
        for reader in self._readers:
            reader.put(event, size)

    @contextlib.contextmanager
    def reader(self) -> Iterator["Reader"]:
        """Have a reader of all events from now on, for the block. Raises Unavailable at the end."""
        reader = Reader()
        if self._closed:
            reader.end()
        self._readers.add(reader)
        try:
            yield reader
        finally:
            self._readers.discard(reader)

    def close(self) -> None:
        """End every stream: the server stops."""
        self._closed = True
        for reader in self._readers:
            reader.end()


class Reader:
    """The events that one subscriber has not read yet, oldest first; an asynchronous iterator.

    It ends with ResourceExhausted after a loss, with Unavailable when the server stops.
    """

    def __init__(self) -> None:
        self._unread: collections.deque[tuple[api.ContainerEventResponse, int]] = (
            collections.deque()
        )
        self._bytes = 0
        self._news = asyncio.Event()
        self._error: errors.CriError | None = None

    def put(self, event: api.ContainerEventResponse, size: int) -> None:
        """Keep an event for the subscriber, or lose all where it has left too much unread."""
        if self._error is not None:
            return
        self._news.set()
        fits = len(self._unread) < MOST_EVENTS and self._bytes + size <= MOST_BYTES
        if fits or not self._unread:
            self._unread.append((event, size))
            self._bytes += size
            return
        log.warning("event reader too slow: its stream ends", unread=len(self._unread))
        self._unread.clear()
        self._error = errors.ResourceExhausted(
            f"{MOST_EVENTS} events or {MOST_BYTES >> 20} MiB were not read: events are lost"
        )

    def end(self) -> None:
        """Let the subscriber read what there is, and no more."""
        self._error = self._error or errors.Unavailable("the server stops")
        self._news.set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> api.ContainerEventResponse:
        while not self._unread:
            if self._error is not None:
                raise self._error
            self._news.clear()
            await self._news.wait()
        event, size = self._unread.popleft()
        self._bytes -= size
        return event
