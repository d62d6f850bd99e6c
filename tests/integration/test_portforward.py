# SPDX-License-Identifier: Apache-2.0
"""Port-forward as kubectl sees it: over SPDY, SPDY in a WebSocket, and WebSocket channels
(behaviour.md §3). The servers in the pods are the test's own.
"""

import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from cri_server.pb import api_pb2 as api
from tests.fakes import forwards, shim, spdy, streams
from tests.fakes.kubelet import Kubelet, Pod, refusal
from tests.lab import server, waiting
from tests.lab.listening import echo, endless, listening, silent

pytestmark = [
    pytest.mark.needs("root", "netns", "overlay", "cni", "runc", "docker-registry"),
    pytest.mark.ours,  # the namespace's path is in our verbose status
]
Open = Callable[..., Any]
SPDY = [forwards.Spdy, forwards.Tunnel]


@pytest.fixture(params=[*SPDY, forwards.Channels])
def connect(request: pytest.FixtureRequest) -> Open:
    """Return a way to connect to a URL: (url, ports) to a session."""
    kind: Open = request.param
    return kind


@pytest.fixture
def unharmed(site: server.Site) -> Iterator[None]:
    """Fail a test after which the server holds more descriptors than before."""
    before = fds(site)
    yield
    waiting.until(lambda: fds(site) <= before, f"{before} descriptors as before")


def fds(site: server.Site) -> int:
    return len(os.listdir(f"/proc/{site.pid}/fd"))


def netns(kubelet: Kubelet, pod: Pod) -> str:
    info = json.loads(kubelet.pod_status(pod.id, verbose=True).info["info"])
    return str(info["netns"])


def url(kubelet: Kubelet, pod: Pod, *ports: int) -> str:
    request = api.PortForwardRequest(pod_sandbox_id=pod.id, port=ports)
    return str(kubelet.runtime.PortForward(request).url)


def test_a_pod_must_be_named(kubelet: Kubelet) -> None:
    request = api.PortForwardRequest(pod_sandbox_id="", port=[80])
    code, text = refusal(lambda: kubelet.runtime.PortForward(request))
    assert (code, "pod_sandbox_id" in text) == (grpc.StatusCode.INVALID_ARGUMENT, True)


def flood(session: Any) -> None:
    while True:
        session.send("data0", bytes(32768))


def drained(session: Any, name: str, size: int) -> bytes:
    """Read until `size` bytes have come on a stream."""
    while len(session.received[name]) < size:
        assert session.step(), f"the session ended after {len(session.received[name])} bytes"
    return bytes(session.received[name])


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_a_port_of_the_pods_loopback(
    kubelet: Kubelet, pod: Pod, connect: Open, address: str, unharmed: None
) -> None:
    with listening(netns(kubelet, pod), echo, address=address) as port:
        with connect(url(kubelet, pod, port), [port]) as session:
            session.send("data0", b"hello")
            streams.until(session, "data0", b"hello")
        with pytest.raises(ConnectionRefusedError):  # it is not the host's
            socket.create_connection((address, port), timeout=5)


def test_a_pod_on_the_hosts_network(kubelet: Kubelet, pulled: str, connect: Open) -> None:
    config = kubelet.pod_config()
    config.linux.security_context.namespace_options.network = api.NODE
    pod = kubelet.run_pod(config)
    with (
        listening("", echo) as port,
        connect(url(kubelet, pod, port), [port]) as session,
    ):
        session.send("data0", b"hello")
        streams.until(session, "data0", b"hello")


def test_large_transfers_both_ways_at_once(
    kubelet: Kubelet, pod: Pod, connect: Open, unharmed: None
) -> None:
    content = os.urandom(6 << 20)

    def send() -> None:
        for at in range(0, len(content), 32768):
            session.send("data0", content[at : at + 32768])

    with (
        listening(netns(kubelet, pod), echo) as port,
        connect(url(kubelet, pod, port), [port]) as session,
    ):
        sender = threading.Thread(target=send)
        sender.start()
        assert drained(session, "data0", len(content)) == content
        sender.join()


@pytest.mark.parametrize("kind", SPDY)
def test_sixty_connections_to_three_ports_in_one_session(
    kubelet: Kubelet, pod: Pod, kind: Open, unharmed: None
) -> None:
    inside = netns(kubelet, pod)
    with (
        listening(inside, echo) as one,
        listening(inside, echo) as two,
        listening(inside, echo, address="::1") as three,
        kind(url(kubelet, pod, one, two, three)) as session,
    ):
        for number in range(60):
            session.pair(number, (one, two, three)[number % 3])
        for number in range(60):
            session.send(f"data{number}", f"this is {number};".encode() * 100)
        for number in range(60):
            said = f"this is {number};".encode() * 100
            assert drained(session, f"data{number}", len(said)) == said
            session.finish(f"data{number}")
        while len(session.ended) < 120:
            assert session.step()
        assert not any(session.received[f"error{number}"] for number in range(60))


@pytest.mark.parametrize(
    ("protocol", "count"), [(streams.V4, 60), ("v4.base64.channel.k8s.io", 39)]
)
def test_many_ports_over_channels(
    kubelet: Kubelet, pod: Pod, protocol: str, count: int, unharmed: None
) -> None:
    with listening(netns(kubelet, pod), echo) as port:
        ports = [port] * count
        with forwards.Channels(url(kubelet, pod, *ports), ports, protocol) as session:
            for number in range(count):
                session.send(f"data{number}", f"this is {number};".encode())
            for number in range(count):
                streams.until(session, f"data{number}", f"this is {number};".encode())


@pytest.mark.parametrize(
    ("protocol", "count"), [(streams.V4, 128), ("v4.base64.channel.k8s.io", 41)]
)
def test_more_ports_than_channels_are_refused(
    kubelet: Kubelet, pod: Pod, protocol: str, count: int
) -> None:
    with pytest.raises(streams.Refused, match="ports") as refused:
        forwards.Channels(url(kubelet, pod, *range(1, count + 1)), [], protocol)
    assert refused.value.status == 400


@pytest.mark.parametrize("kind", SPDY)
def test_the_client_ends_its_half_and_gets_the_answer(
    kubelet: Kubelet, pod: Pod, kind: Open
) -> None:
    def count(connection: socket.socket) -> None:
        size = 0
        while data := connection.recv(65536):
            size += len(data)
        connection.sendall(b"%d bytes" % size)

    with (
        listening(netns(kubelet, pod), count) as port,
        kind(url(kubelet, pod, port), [port]) as session,
    ):
        for _ in range(50):
            session.send("data0", bytes(10_000))
        session.finish("data0")
        while "error0" not in session.ended:
            assert session.step()
        assert session.received["data0"] == b"500000 bytes"
        assert session.ended == {"data0", "error0"}


@pytest.mark.parametrize("kind", SPDY)
def test_the_pod_ends_its_half_and_the_client_may_go_on(
    kubelet: Kubelet, pod: Pod, kind: Open
) -> None:
    got: list[bytes] = []

    def halve(connection: socket.socket) -> None:
        connection.sendall(b"all")
        connection.shutdown(socket.SHUT_WR)
        while data := connection.recv(65536):
            got.append(data)

    with (
        listening(netns(kubelet, pod), halve) as port,
        kind(url(kubelet, pod, port), [port]) as session,
    ):
        while "data0" not in session.ended:
            assert session.step()
        session.send("data0", b"late")
        waiting.until(lambda: b"".join(got) == b"late", "the pod has what came late")


def test_nobody_listens(kubelet: Kubelet, pod: Pod, connect: Open, unharmed: None) -> None:
    with listening(netns(kubelet, pod), echo) as port:
        with connect(url(kubelet, pod, 1, port), [1, port]) as session:
            streams.until(session, "error0", b"port 1 in the pod")
            streams.until(session, "error0", b"Connection refused")
            session.send("data1", b"still there")
            streams.until(session, "data1", b"still there")
        assert session.received["error1"] == b""


@pytest.mark.parametrize("port", ["", "0", "65536", "-1", "http", "1 ", "\u0663"])
def test_a_bad_port_is_reset(kubelet: Kubelet, pod: Pod, port: str) -> None:
    with forwards.Spdy(url(kubelet, pod)) as session:
        session.open("data0", streamtype="data", port=port.encode().decode("latin-1"))
        while "data0" not in session.was_reset:
            assert session.step()


def test_an_unknown_or_repeated_stream_is_reset(kubelet: Kubelet, pod: Pod) -> None:
    with forwards.Spdy(url(kubelet, pod)) as session:
        session.open("stdin", streamtype="stdin", port="80", requestid="1")
        session.open("one", streamtype="data", port="80", requestid="2")
        session.open("two", streamtype="data", port="80", requestid="2")
        while session.was_reset != {"stdin", "one", "two"}:
            assert session.step()


def test_a_client_that_sends_no_request_ids(kubelet: Kubelet, pod: Pod) -> None:
    with (
        listening(netns(kubelet, pod), echo) as port,
        forwards.Spdy(url(kubelet, pod, port)) as session,
    ):
        for number in range(3):
            for kind in ("error", "data"):
                session.open(f"{kind}{number}", streamtype=kind, port=str(port))
            session.send(f"data{number}", b"hello %d" % number)
            streams.until(session, f"data{number}", b"hello %d" % number)


@pytest.mark.parametrize("kind", SPDY)
@pytest.mark.parametrize("handler", [silent, endless])
def test_a_stream_that_is_reset_ends_its_connection_and_no_other(
    kubelet: Kubelet, pod: Pod, site: server.Site, kind: Open, handler: Any
) -> None:
    inside = netns(kubelet, pod)
    with (
        listening(inside, handler) as port,
        listening(inside, echo) as other,
        kind(url(kubelet, pod, other, port), [other]) as session,
    ):
        session.send("data0", b"one")
        streams.until(session, "data0", b"one")
        before = fds(site)
        session.pair(1, port)
        waiting.until(lambda: fds(site) == before + 1, "it is connected")
        session.reset("data1")
        waiting.until(lambda: fds(site) == before, "the connection into the pod is closed")
        while "error1" not in session.ended:  # kubectl waits for it
            assert session.step()
        session.send("data0", b"two")
        streams.until(session, "data0", b"onetwo")


@pytest.mark.parametrize("handler", [silent, endless, echo])
@pytest.mark.parametrize("leave", [forwards.break_off, lambda session: session.close()])
def test_a_client_that_vanishes_frees_everything(
    kubelet: Kubelet,
    pod: Pod,
    site: server.Site,
    connect: Open,
    handler: Any,
    leave: Any,
    unharmed: None,
) -> None:
    before = fds(site)
    with listening(netns(kubelet, pod), handler) as port:
        session = connect(url(kubelet, pod, port, port), [port, port])
        session.send("data0", b"hello")
        waiting.until(lambda: fds(site) >= before + 3, "it is connected")
        leave(session)
        waiting.until(lambda: fds(site) <= before, "all is closed, whatever the pod does")


def test_a_client_that_vanishes_while_it_is_held_back(
    kubelet: Kubelet, pod: Pod, site: server.Site, connect: Open
) -> None:
    before = fds(site)
    with listening(netns(kubelet, pod), silent) as port:
        session = connect(url(kubelet, pod, port), [port])
        session.connection.settimeout(0.3)
        with pytest.raises(TimeoutError):
            flood(session)
        forwards.break_off(session)
        waiting.until(lambda: fds(site) <= before, "all is closed, unread", seconds=20)


def test_what_cannot_be_forwarded_is_refused(kubelet: Kubelet, pod: Pod) -> None:
    for port in (-1, 65536):
        assert refusal(lambda p=port: url(kubelet, pod, p))[0] is grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[misc]
    kubelet.stop_pod(pod.id)
    assert refusal(lambda: url(kubelet, pod, 80))[0] is grpc.StatusCode.FAILED_PRECONDITION
    missing = Pod(id="0" * 64, config=pod.config)
    assert refusal(lambda: url(kubelet, missing, 80))[0] is grpc.StatusCode.NOT_FOUND


def test_a_pod_that_is_stopped_is_not_forwarded_to(kubelet: Kubelet, pulled: str) -> None:
    """On the host's network, where the port would still be there."""
    config = kubelet.pod_config()
    config.linux.security_context.namespace_options.network = api.NODE
    pod = kubelet.run_pod(config)
    with listening("", echo) as port:
        late = url(kubelet, pod, port)
        with forwards.Spdy(url(kubelet, pod, port), [port]) as session:
            session.send("data0", b"hello")
            streams.until(session, "data0", b"hello")
            kubelet.stop_pod(pod.id)
            session.pair(1, port)
            streams.until(session, "error1", b"is not ready")
        with forwards.Spdy(late, [port]) as session:
            streams.until(session, "error0", b"is not ready")


@pytest.mark.needs("catatonit")
@pytest.mark.parametrize("address", ["127.0.0.1", ""])
def test_a_pod_with_a_kernel_is_reached_at_its_own_address_too(
    make_site: Callable[..., server.Site],
    client_of: Callable[[server.Site], Kubelet],
    home: Path,
    pulled: str,
    address: str,
) -> None:
    """Called a VM, whose kernel has the pod's address and does not have our loopback."""
    folder = home / f"machine{len(address)}"
    folder.mkdir()
    handler = {"kind": "shim", "path": os.fspath(shim.install(folder)), "dialect": "kata"}
    kubelet = client_of(make_site(**{"runtimes.machine": handler}))
    pod = kubelet.run_pod(kubelet.pod_config(), handler="machine")
    own = address or kubelet.pod_status(pod.id).status.network.ip
    with (
        listening(netns(kubelet, pod), echo, address=own) as port,
        forwards.Spdy(url(kubelet, pod, port), [port]) as session,
    ):
        session.send("data0", b"hello")
        streams.until(session, "data0", b"hello")


def test_the_clients_goodbye_lets_its_connections_go_on(kubelet: Kubelet, pod: Pod) -> None:
    with (
        listening(netns(kubelet, pod), echo) as port,
        forwards.Spdy(url(kubelet, pod, port), [port]) as session,
    ):
        session.send("data0", b"one")
        streams.until(session, "data0", b"one")
        session.connection.sendall(spdy.control(spdy.GOAWAY, bytes(8)))
        session.send("data0", b"two")
        streams.until(session, "data0", b"onetwo")
