# SPDX-License-Identifier: Apache-2.0
"""Events of pods and containers (CRI GetContainerEvents; hazards R30)."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import grpc
import pytest

from cri_server.pb import api_pb2 as api
from tests.fakes.kubelet import Kubelet, Pod
from tests.lab import waiting
from tests.lab.server import Site

CREATED, STARTED, STOPPED, DELETED = (
    api.CONTAINER_CREATED_EVENT,
    api.CONTAINER_STARTED_EVENT,
    api.CONTAINER_STOPPED_EVENT,
    api.CONTAINER_DELETED_EVENT,
)
pytestmark = pytest.mark.needs("root", "netns", "overlay", "cni", "runc", "docker-registry")
LIFE = [CREATED, STARTED, STOPPED, DELETED]
BULKY = {"note": "x" * 200_000}  # in an annotation of the pod, which every event carries
BULK = 80  # lives of containers: more than what gRPC buffers and a reader may leave unread
Client = Callable[[Site], Kubelet]


@contextlib.contextmanager
def reading(kubelet: Kubelet, *, seconds: float = 60) -> Iterator[Any]:
    """Have a stream that begins now; it is a response iterator of grpc."""
    stream = kubelet.streams.GetContainerEvents(api.GetEventsRequest(), timeout=seconds)
    stream.initial_metadata()  # sent when the server has begun to listen for us
    yield stream
    stream.cancel()


def until_deleted(stream: Any, last: str) -> list[api.ContainerEventResponse]:
    """Read up to the DELETED event of `last`."""
    found = []
    for event in stream:
        found.append(event)
        if (event.container_id, event.container_event_type) == (last, DELETED):
            return found
    raise AssertionError("the stream ended")


def kinds(events: list[api.ContainerEventResponse]) -> Mapping[str, list[int]]:
    """Return the types of the events of each id, in their order."""
    found: dict[str, list[int]] = {}
    for event in events:
        found.setdefault(event.container_id, []).append(event.container_event_type)
    return found


def test_a_life_is_told_in_order(kubelet: Kubelet, pulled: str) -> None:
    with reading(kubelet) as stream:
        pod = kubelet.run_pod()
        container = kubelet.run(pod, pulled, ("true",))
        kubelet.wait_exit(container)
        kubelet.remove(container)
        kubelet.remove_pod(pod.id)
        events = [e for e in until_deleted(stream, pod.id) if of_pod(e, pod)]

    assert kinds(events) == {pod.id: LIFE, container: LIFE}
    times = [e.created_at for e in events]
    assert times == sorted(set(times))
    assert abs(times[-1] - time.time_ns()) < 60_000_000_000


def of_pod(event: api.ContainerEventResponse, pod: Pod) -> bool:
    return event.pod_sandbox_status.id == pod.id


def test_each_event_has_the_statuses_of_that_moment(kubelet: Kubelet, pulled: str) -> None:
    with reading(kubelet) as stream:
        pod = kubelet.run_pod()
        container = kubelet.run(pod, pulled, ("sh", "-c", "exit 3"))
        kubelet.wait_exit(container)
        kubelet.remove_pod(pod.id)
        events = [e for e in until_deleted(stream, pod.id) if of_pod(e, pod)]

    assert all(e.pod_sandbox_status.metadata == pod.config.metadata for e in events)
    own = {e.container_event_type: e for e in events if e.container_id == container}
    seen = {kind: [s.state for s in own[kind].containers_statuses] for kind in LIFE}
    assert seen == {
        CREATED: [api.CONTAINER_CREATED],
        STARTED: [api.CONTAINER_RUNNING],
        STOPPED: [api.CONTAINER_EXITED],
        DELETED: [],
    }
    assert own[STOPPED].containers_statuses[0].exit_code == 3
    last = events[-1].pod_sandbox_status
    assert (last.state, last.labels) == (api.SANDBOX_NOTREADY, pod.config.labels)


def test_all_containers_of_the_pod_are_in_every_event(kubelet: Kubelet, pulled: str) -> None:
    pod = kubelet.run_pod()
    first = kubelet.run(pod, pulled, ("sleep", "86400"), name="first")
    with reading(kubelet) as stream:
        second = kubelet.create(pod, kubelet.container_config(pulled, name="second"))
        event = next(e for e in stream if of_pod(e, pod))

    assert {s.id for s in event.containers_statuses} == {first, second}


def test_a_start_that_fails_is_a_stop(kubelet: Kubelet, pulled: str) -> None:
    pod = kubelet.run_pod()
    with reading(kubelet) as stream:
        container = kubelet.create(pod, kubelet.container_config(pulled, ("/not/there",)))
        with pytest.raises(grpc.RpcError):
            kubelet.start(container)
        kubelet.remove(container)
        events = [e for e in until_deleted(stream, container) if of_pod(e, pod)]

    assert kinds(events)[container] == [CREATED, STOPPED, DELETED]
    assert events[1].containers_statuses[0].reason == "StartError"


def test_a_hundred_readers_see_the_same(kubelet: Kubelet, pod: Pod, pulled: str) -> None:
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(reading(kubelet)) for _ in range(100)]
        container = kubelet.create(pod, kubelet.container_config(pulled))
        kubelet.remove(container)
        seen = [kinds(until_deleted(s, container))[container] for s in streams]

    assert seen == [[CREATED, DELETED]] * 100


def test_a_reader_that_does_not_read_loses_its_stream_visibly(
    kubelet: Kubelet, pulled: str
) -> None:
    pod = kubelet.run_pod(kubelet.pod_config(annotations=BULKY))
    with reading(kubelet) as lazy, reading(kubelet) as eager:
        for n in range(BULK):
            container = kubelet.create(pod, kubelet.container_config(pulled, name=f"c{n}"))
            kubelet.remove(container)
            assert kinds(until_deleted(eager, container))[container] == [CREATED, DELETED]

        with pytest.raises(grpc.RpcError) as caught:
            list(lazy)
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.ours
def test_a_stop_of_the_server_ends_the_streams_at_once(
    make_site: Callable[..., Site], client_of: Client, reference: str
) -> None:
    site = make_site()
    client = client_of(site)
    client.pull(reference)
    pod = client.run_pod(client.pod_config(annotations=BULKY))
    with reading(client) as idle, reading(client) as stuck:
        for n in range(BULK):
            client.remove(client.create(pod, client.container_config(reference, name=f"c{n}")))
        waiting.until(lambda: "too slow" in site.log.read_text(), "a reader is given up")
        began = time.monotonic()
        assert site.stop() == 0
        assert time.monotonic() - began < waiting.patient(5)

        for stream in (idle, stuck):
            with pytest.raises(grpc.RpcError) as caught:
                list(stream)
            assert caught.value.code() != grpc.StatusCode.INTERNAL


@pytest.mark.ours
def test_an_end_that_recovery_finds_is_told(
    make_site: Callable[..., Site], client_of: Client, reference: str
) -> None:
    site = make_site()
    client = client_of(site)
    client.pull(reference)
    pod = client.run_pod()
    container = client.run(pod, reference, ("sleep", "86400"))
    site.kill()
    site.start()
    with reading(client) as stream:
        client.stop(container)
        event = next(stream)

    assert (event.container_id, event.container_event_type) == (container, STOPPED)
