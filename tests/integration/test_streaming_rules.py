# SPDX-License-Identifier: Apache-2.0
"""Who may open a session, and what ends it: each rule of behaviour.md §3 for exec and attach."""

import concurrent.futures
import contextlib
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import time
import urllib.parse
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from cri_server.pb import api_pb2 as api
from tests.fakes import certificates, streams
from tests.fakes.kubelet import Kubelet, Pod, refusal
from tests.integration.conftest import ClientOf, MakeSite
from tests.integration.test_streaming import BOTH, attach_url, exec_url
from tests.lab import server, waiting

pytestmark = [
    pytest.mark.needs("root", "netns", "overlay", "cni", "runc", "docker-registry"),
    pytest.mark.ours,
]
Open = Callable[..., Any]
INVALID = grpc.StatusCode.INVALID_ARGUMENT


@pytest.fixture(params=[streams.Spdy, streams.WebSocket])
def connect(request: pytest.FixtureRequest) -> Open:
    """Return a way to connect to a URL: (url, streams) to a session."""
    kind: Open = request.param
    return kind


def own(
    make_site: MakeSite, client_of: ClientOf, reference: str, *command: str, **settings: Any
) -> tuple[server.Site, Kubelet, str]:
    """Return a server with these settings, its client, and a container that runs a command."""
    site = make_site(server=settings)
    kubelet = client_of(site)
    kubelet.pull(reference)
    container = kubelet.run(kubelet.run_pod(), reference, command or ("sleep", "86400"), stdin=True)
    return site, kubelet, container


def running(token: str) -> list[int]:
    """Return the processes of the host whose command line holds a word."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
        except OSError:  # it has ended
            continue
        if token.encode() in words:
            found.append(int(entry.name))
    return found


# -- what is asked for -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Exec", "Attach"])
def test_requests_that_make_no_sense(kubelet: Kubelet, container: str, kind: str) -> None:
    make = {"Exec": api.ExecRequest, "Attach": api.AttachRequest}[kind]
    call = getattr(kubelet.runtime, kind)

    def code(**fields: Any) -> grpc.StatusCode:
        more = {"cmd": ["true"]} if kind == "Exec" else {}
        return refusal(lambda: call(make(**more, **fields)))[0]

    assert code(stdout=True) is INVALID
    assert code(container_id=container) is INVALID
    assert code(container_id=container, tty=True, stdout=True, stderr=True) is INVALID
    assert code(container_id="0" * 64, stdout=True) is grpc.StatusCode.NOT_FOUND
    kubelet.stop(container)
    stopped = grpc.StatusCode.FAILED_PRECONDITION
    assert code(container_id=container, stdout=True) is stopped


def test_a_command_and_the_containers_own_terminal(kubelet: Kubelet, container: str) -> None:
    nothing = api.ExecRequest(container_id=container, stdout=True)
    assert refusal(lambda: kubelet.runtime.Exec(nothing))[0] is INVALID
    other = api.AttachRequest(container_id=container, stdout=True, tty=True)
    assert refusal(lambda: kubelet.runtime.Attach(other)) == (
        INVALID,
        "tty: the container was made with False",
    )


# -- tokens ----------------------------------------------------------------------------------------


def test_a_flood_of_requests_is_stopped_and_ends_with_the_tokens(
    make_site: MakeSite, client_of: ClientOf, reference: str
) -> None:
    _, kubelet, container = own(make_site, client_of, reference)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        urls = list(pool.map(lambda _: exec_url(kubelet, container, "true"), range(1000)))
    assert len(set(urls)) == 1000
    code, words = refusal(lambda: exec_url(kubelet, container, "true"))
    assert (code, "1000" in words) == (grpc.StatusCode.RESOURCE_EXHAUSTED, True)
    with streams.Spdy(urls[0], (*BOTH, "error")) as session:
        assert streams.exit_code(streams.ending(session)) == 0
    with streams.Spdy(exec_url(kubelet, container, "true"), (*BOTH, "error")) as session:
        assert streams.exit_code(streams.ending(session)) == 0


def test_guesses_and_other_methods(kubelet: Kubelet, container: str, site: server.Site) -> None:
    url = exec_url(kubelet, container, "true")
    base, _, token = url.rpartition("/")
    assert len(token) >= 22  # 128 bits
    guesses = [token[:-1], token.swapcase(), "", "%2e%2e", "x" * 5000, f"{token}/", f"/{token}"]
    paths = [f"{base}/{guess}" for guess in guesses]
    paths += [url.replace("/exec/", f"/{kind}/") + "x" for kind in ("attach", "portforward", "")]
    for path in paths:
        with pytest.raises(streams.Refused) as refused:
            streams.request(path, method="GET")
        assert refused.value.status == 404, path
    for method in ("PUT", "DELETE", "CONNECT", "OPTIONS"):
        with pytest.raises(streams.Refused) as refused:
            streams.request(url, method=method)
        assert refused.value.status == 405
    with streams.Spdy(url, (*BOTH, "error")) as session:  # none of it has used the token
        assert streams.exit_code(streams.ending(session)) == 0
    assert token not in site.log.read_text()


def test_a_token_is_for_the_container_that_it_was_made_for(
    kubelet: Kubelet, pod: Pod, pulled: str
) -> None:
    names = {}
    for name in ("one", "two"):
        container = kubelet.run(pod, pulled, ("sleep", "86400"), name=name)
        kubelet.exec_sync(container, ["touch", f"/{name}"])
        names[name] = exec_url(kubelet, container, "ls", "/")
    for name, other in (("two", b"one\n"), ("one", b"two\n")):
        with streams.Spdy(f"{names[name]}?container={other!r}", (*BOTH, "error")) as session:
            streams.ending(session)
        assert name.encode() in session.received["stdout"].split()
        assert other not in session.received["stdout"]


@pytest.mark.parametrize("upgrade", ["", "h2c", "spdy/2"])
def test_what_is_no_upgrade_is_a_bad_request(
    kubelet: Kubelet, container: str, upgrade: str
) -> None:
    headers = ["Connection: Upgrade", f"Upgrade: {upgrade}"] if upgrade else []
    with pytest.raises(streams.Refused) as refused:
        streams.request(exec_url(kubelet, container, "true"), *headers)
    assert refused.value.status == 400


def test_a_websocket_is_asked_for_with_get(kubelet: Kubelet, container: str) -> None:
    with pytest.raises(streams.Refused) as refused:
        streams.WebSocket(exec_url(kubelet, container, "true"), BOTH, method="POST")
    assert refused.value.status == 400


def test_a_websocket_whose_protocol_is_not_ascii_is_a_bad_request(
    kubelet: Kubelet, container: str
) -> None:
    with pytest.raises(streams.Refused) as refused:
        streams.WebSocket(exec_url(kubelet, container, "true"), BOTH, "v4.channel.k8s.i\u00f6")
    assert refused.value.status == 400


# -- streams ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("stdin", "stdout"), ("stdout", "stdout"), ("resize",), ("",)])
def test_streams_that_were_not_asked_for_end_the_session(
    kubelet: Kubelet, container: str, names: tuple[str, ...]
) -> None:
    url = exec_url(kubelet, container, "touch", "/ran")
    with streams.Spdy(url) as session:
        for number, name in enumerate(names):
            session.open(str(number), streamtype=name)
        while session.step():
            continue
    assert kubelet.exec_sync(container, ["test", "-e", "/ran"]).exit_code == 1


@pytest.mark.parametrize(("wanted", "first"), [({}, b"\x82\1\1"), ({"stdout": False}, b"\x82\1\2")])
def test_a_websocket_begins_with_an_empty_message_on_its_first_channel(
    kubelet: Kubelet, container: str, wanted: dict[str, bool], first: bytes
) -> None:
    url = exec_url(kubelet, container, "sh", "-c", "exec sleep 600", **wanted)
    key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="
    upgrade = ["Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", key]
    connection, _, received = streams.request(url, *upgrade, method="GET")
    with connection:
        while len(received) < len(first):
            received += connection.recv(100)
    assert received == first


def test_streams_that_come_later_are_refused(kubelet: Kubelet, container: str) -> None:
    url = exec_url(kubelet, container, "cat", stdin=True)
    with streams.Spdy(url, ("stdin", *BOTH, "error")) as session:
        session.send("stdin", b"word")
        streams.until(session, "stdout", b"word")
        session.open("late", streamtype="stdin")
        while "late" not in session.was_reset:
            assert session.step()
        session.finish("stdin")
        assert streams.exit_code(streams.ending(session)) == 0


def test_sizes_of_zero_and_nonsense_change_nothing(
    kubelet: Kubelet, container: str, connect: Open
) -> None:
    url = exec_url(kubelet, container, "sh", tty=True, stdin=True)
    bad = [b'{"Width":0,"Height":24}', b'{"Width":9}', b"[1]" * 2000, b'{"a":' * 20_000]
    with connect(url, ("stdin", "stdout", "error", "resize")) as session:
        session.send("resize", json.dumps({"Width": 120, "Height": 33}).encode())
        session.send("stdin", b"until stty size | grep '33 120'; do :; done; echo o''ne\n")
        streams.until(session, "stdout", b"one")
        for part in bad:
            session.send("resize", part)
        session.send("resize", bytes(1 << 20))
        session.send("stdin", b"stty size; exit 4\n")
        assert streams.exit_code(streams.ending(session)) == 4
    assert session.received["stdout"].split().count(b"33") == 2


def test_pings_are_answered_during_a_transfer(kubelet: Kubelet, container: str) -> None:
    url = exec_url(kubelet, container, "cat", "/dev/zero", stderr=False)
    with streams.Spdy(url, ("stdout", "error")) as session:
        for number in (1, 3, 5):
            size = len(session.received["stdout"])
            session.ping(number)
            while number not in session.pongs:
                assert session.step()
                session.received["stdout"] = b""
            assert size >= 0


def test_output_waits_for_a_client_that_is_slow(
    kubelet: Kubelet, container: str, connect: Open
) -> None:
    url = exec_url(kubelet, container, "sh", "-c", "head -c 30000000 /dev/zero; touch /done")
    with connect(url, (*BOTH, "error")) as session:
        streams.until(session, "stdout", b"\0")
        time.sleep(0.5)  # the process is stopped all this time: nothing to wait for
        assert kubelet.exec_sync(container, ["test", "-e", "/done"]).exit_code == 1
        size, going = 0, True
        while going:
            going = session.step()
            size, session.received["stdout"] = size + len(session.received["stdout"]), b""
    assert size == 30_000_000


# -- what ends a session ---------------------------------------------------------------------------


def test_silence_ends_a_session(make_site: MakeSite, client_of: ClientOf, reference: str) -> None:
    _, kubelet, container = own(make_site, client_of, reference, stream_idle_timeout=1.0)
    for kind in (streams.Spdy, streams.WebSocket):
        for url in (
            exec_url(kubelet, container, "sh", "-c", "sleep 2.5; touch /went-on"),
            attach_url(kubelet, container),
        ):
            began = time.monotonic()
            with kind(url, (*BOTH, "error")) as session:
                while session.step():
                    continue
            assert not session.received["error"]
            assert 0.9 < time.monotonic() - began < waiting.patient(5)
    waiting.until(
        lambda: kubelet.exec_sync(container, ["test", "-e", "/went-on"]).exit_code == 0,
        "the process goes on",
    )


@pytest.fixture
def vanish(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Give the clients of this test an address of their own; return what makes their machine
    vanish, so that neither an end nor a reset comes from it.
    """

    def connected(url: str) -> socket.socket:
        parts = urllib.parse.urlsplit(url)
        return socket.create_connection((parts.hostname, parts.port), source_address=(address, 0))

    def drop(verb: str) -> None:
        for way in ("--source", "--destination"):
            rule = [verb, "INPUT", "-i", "lo", way, address, "-j", "DROP"]
            subprocess.run(["iptables", "-w", *rule], check=True)

    address = f"127.{1 + os.getpid() % 250}.77.1"
    monkeypatch.setattr(streams, "connected", connected)
    with contextlib.ExitStack() as stack:

        def vanish() -> None:
            stack.callback(drop, "-D")
            drop("-A")

        yield vanish


@pytest.mark.needs("iptables")
@pytest.mark.parametrize("says", ["nothing", "a line at a time"])
def test_a_client_whose_machine_vanishes_is_noticed(
    make_site: MakeSite,
    client_of: ClientOf,
    reference: str,
    vanish: Callable[[], None],
    says: str,
) -> None:
    soon = {"stream_vanished_timeout": 2.0, "exec_abandoned_timeout": 0.1}
    _, kubelet, container = own(make_site, client_of, reference, **soon)
    token = f"4{os.getpid()}"
    talk = f"while :; do echo x; usleep 100000; done & exec sleep {token}"
    script = talk if says != "nothing" else f"echo x; exec sleep {token}"
    with streams.Spdy(
        exec_url(kubelet, container, "sh", "-c", script), (*BOTH, "error")
    ) as session:
        streams.until(session, "stdout", b"x")
        time.sleep(3)  # longer than the limit: a client that is there is not ended
        assert running(token)
        vanish()
        waiting.until(lambda: not running(token), "it is noticed", seconds=20)


def test_an_abandoned_exec_ends_after_its_grace(
    make_site: MakeSite, client_of: ClientOf, reference: str
) -> None:
    _, kubelet, container = own(make_site, client_of, reference, exec_abandoned_timeout=0.5)
    token = f"3{os.getpid()}"
    url = exec_url(kubelet, container, "sh", "-c", f"sleep {token} & sleep {token}; true")
    with streams.Spdy(url, (*BOTH, "error")):
        waiting.until(lambda: len(running(token)) == 2, "it runs")
    waiting.until(lambda: not running(token), "all of it is ended")
    kubelet.exec_sync(container, ["true"])


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_the_end_of_the_server(
    make_site: MakeSite, client_of: ClientOf, reference: str, end: str
) -> None:
    script = "while read x; do echo got $x; done"
    site, kubelet, container = own(make_site, client_of, reference, "sh", "-c", script)
    token = f"4{os.getpid()}"
    url = exec_url(kubelet, container, "sh", "-c", f"sleep {token} & sleep {token}; true")
    joined = attach_url(kubelet, container, stdin=True)
    unused = exec_url(kubelet, container, "true")
    with (
        streams.Spdy(url, (*BOTH, "error")) as command,
        streams.Spdy(joined, ("stdin", *BOTH, "error")) as attached,
    ):
        attached.send("stdin", b"one\n")
        streams.until(attached, "stdout", b"got one")
        waiting.until(lambda: len(running(token)) == 2, "it runs")
        began = time.monotonic()
        getattr(site, end)()
        assert time.monotonic() - began < waiting.patient(4)
        for session in (command, attached):
            assert ended(session)
    waiting.until(lambda: not running(token), "no orphan of the exec is left")
    site.start()
    with client_of(site) as again:
        with streams.Spdy(
            attach_url(again, container, stdin=True), ("stdin", *BOTH, "error")
        ) as attached:
            attached.send("stdin", b"two\n")
            streams.until(attached, "stdout", b"got two")
        base = attach_url(again, container).partition("/attach/")[0]
        with pytest.raises(streams.Refused, match="404"):
            streams.Spdy(f"{base}/exec/{unused.rpartition('/')[2]}", BOTH)


def ended(session: streams.Spdy) -> bool:
    """Read to the end, which may be a reset."""
    try:
        while session.step():
            continue
    except ConnectionResetError:
        return True
    return True


def test_the_container_ends_during_sessions(kubelet: Kubelet, container: str) -> None:
    url = exec_url(kubelet, container, "sleep", "86400")
    joined = attach_url(kubelet, container)
    with (
        streams.Spdy(url, (*BOTH, "error")) as command,
        streams.WebSocket(joined, (*BOTH, "error")) as attached,
    ):
        waiting.until(lambda: b"86400" in ps(kubelet, container), "it runs")
        kubelet.stop(container)
        assert streams.exit_code(streams.ending(command)) == 128 + signal.SIGKILL
        assert streams.exit_code(streams.ending(attached)) == 0


def ps(kubelet: Kubelet, container: str) -> bytes:
    return b"".join(kubelet.exec_sync(container, ["ps"]).stdout.splitlines()[2:])


# -- TLS -------------------------------------------------------------------------------------------


def handshake(url: str, context: ssl.SSLContext) -> bytes:
    """Return the server's certificate, once it has also answered."""
    with streams.connected(url) as plain, context.wrap_socket(plain) as tls:
        tls.sendall(b"GET /exec/x HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = tls.recv(100)  # TLS 1.3: the server has looked at our certificate by now
        if not answer:
            raise ConnectionResetError
        assert answer.startswith(b"HTTP/1.1 404")
        return tls.getpeercert(binary_form=True) or b""


def trusting(authority: Path, shown: certificates.Certificate | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=authority)
    context.check_hostname = False
    if shown:
        context.load_cert_chain(shown.certificate, shown.key)
    return context


def test_tls_with_client_certificates_and_renewal(
    make_site: MakeSite, client_of: ClientOf, reference: str, tmp_path: Path
) -> None:
    ours = certificates.make(tmp_path, "server", "IP:127.0.0.1")
    client = certificates.make(tmp_path, "client", "DNS:client")
    stranger = certificates.make(tmp_path, "stranger", "DNS:client")
    _, kubelet, container = own(
        make_site,
        client_of,
        reference,
        stream_tls_cert=os.fspath(ours.certificate),
        stream_tls_key=os.fspath(ours.key),
        stream_tls_client_ca=os.fspath(client.certificate),
    )
    url = exec_url(kubelet, container, "cat", stdin=True)
    assert url.startswith("https://127.0.0.1:")
    trusted = trusting(ours.certificate, client)
    first = handshake(url, trusted)
    for shown in (None, stranger):
        with pytest.raises((ssl.SSLError, ConnectionError)):
            handshake(url, trusting(ours.certificate, shown))
    old = trusting(ours.certificate)
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # that is the point
        old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    with pytest.raises((ssl.SSLError, ConnectionError)):
        handshake(url, old)
    for name in ("again", "server"):  # half renewed, then whole
        made = certificates.make(tmp_path, name, "IP:127.0.0.1")
        if name == "again":
            os.replace(made.key, ours.key)
            assert handshake(url, trusted) == first
    renewed = trusting(made.certificate, client)
    assert handshake(url, renewed) != first
    os.replace(client.certificate, tmp_path / "spare.pem")
    shutil.copy(stranger.certificate, client.certificate)  # what the CA's file is called
    assert handshake(url, trusting(made.certificate, stranger)) != first
    with pytest.raises((ssl.SSLError, ConnectionError)):
        handshake(url, renewed)
    os.replace(tmp_path / "spare.pem", client.certificate)
    for kind in (streams.Spdy, streams.WebSocket):
        url = exec_url(kubelet, container, "head", "-c", str(1 << 20), stdin=True)
        with kind(url, ("stdin", *BOTH, "error"), tls=renewed) as session:
            for _ in range(32):
                session.send("stdin", bytes(32 << 10))
            while not session.received["error"]:
                assert session.step()
            assert session.received["stdout"] == bytes(1 << 20)
