# SPDX-License-Identifier: Apache-2.0
"""Bad clients of the streaming server: what they cost, and that others do not notice them (hazards
V80 to V91, R28, R29).
"""

import concurrent.futures
import contextlib
import itertools
import json
import os
import random
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from bench import leaks, memory
from cri_server.pb import api_pb2 as api
from cri_server.streaming import spdydict
from tests.fakes import forwards, spdy, streams
from tests.fakes.kubelet import Kubelet, Pod, refusal
from tests.integration.test_portforward import fds
from tests.integration.test_streaming import BOTH, attach_url, exec_url
from tests.lab import faults, server, waiting

pytestmark = [
    pytest.mark.needs("root", "netns", "overlay", "cni", "runc", "docker-registry"),
    pytest.mark.ours,
]
STORM = float(os.environ.get("CRI_TESTS_STORM", "8"))  # seconds; 300 is what hazards.md asks for
ROUNDS = int(os.environ.get("CRI_TESTS_STREAMS", "60"))  # 5000 is what hazards.md asks for
HEAD = b"GET /exec/x HTTP/1.1\r\nHost: x\r\n"


@pytest.fixture
def bystander(kubelet: Kubelet, pod: Pod, pulled: str, site: server.Site) -> Iterator[streams.Spdy]:
    """Return an exec of `cat` that lives through the test; the server answers Version within a
    second all the time, and holds no more descriptors at the end than at the beginning.
    """
    container = kubelet.run(pod, pulled, ("sleep", "86400"), name="bystander")
    url = exec_url(kubelet, container, "cat", stdin=True)
    with streams.Spdy(url, ("stdin", *BOTH, "error")) as session, answering(kubelet):
        talk(session, b"before")
        before = fds(site)
        yield session
        waiting.until(lambda: fds(site) <= before, f"{before} descriptors as before", seconds=20)
        talk(session, b"after")
        session.finish("stdin")
        assert streams.exit_code(streams.ending(session)) == 0


def talk(session: streams.Spdy, word: bytes) -> None:
    session.send("stdin", word)
    streams.until(session, "stdout", word)


@contextlib.contextmanager
def answering(kubelet: Kubelet) -> Iterator[None]:
    """See that Version is answered within a second, all the time."""
    slowest, done = [0.0], threading.Event()

    def ask() -> None:
        while not done.wait(0.05):
            began = time.monotonic()
            kubelet.runtime.Version(api.VersionRequest())
            slowest.append(time.monotonic() - began)

    asking = threading.Thread(target=ask)
    asking.start()
    yield
    done.set()
    asking.join()
    assert max(slowest) < waiting.patient(1)


def raw(url: str, data: bytes) -> bytes:
    """Send bytes to the server as they are and return what it answers, to the end."""
    with streams.connected(url) as connection:
        connection.settimeout(waiting.patient(15))
        answer = b""
        with contextlib.suppress(ConnectionError):
            connection.sendall(data)
            while part := connection.recv(65536):
                answer += part
        return answer


# -- HTTP ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"400"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"405"),
        (b"GET /exec/x HTTP/1.1\r\n\r\n", b"400"),  # no Host
        (HEAD + b"A b: c\r\n\r\n", b"400"),
        (HEAD + b"A: b\x00c\r\n\r\n", b"400"),
        (HEAD + b"A: " + b"b" * 40_000, b"431"),
        (HEAD + b"A: b\r\n" * 100_000 + b"\r\n", b"431"),
        (HEAD + b"Content-Length: x\r\n\r\n", b"400"),
        (HEAD.replace(b"\r", b"") + b"\n", b"404"),
        (HEAD.replace(b"\r", b"") + b"\r\n", b"404"),
    ],
)
def test_heads_that_are_none(
    kubelet: Kubelet, container: str, bystander: Any, head: bytes, status: bytes
) -> None:
    answer = raw(exec_url(kubelet, container, "true"), head)
    assert not answer or answer.split()[1] == status  # a reset may overtake the answer


def test_a_crowd_that_says_nothing_keeps_nobody_out(
    kubelet: Kubelet, container: str, site: server.Site, bystander: Any
) -> None:
    url = exec_url(kubelet, container, "echo", "hello")
    before = fds(site)
    with contextlib.ExitStack() as crowd:
        for number in range(600):
            each = crowd.enter_context(streams.connected(url))
            each.sendall(HEAD[: number % len(HEAD)])
        waiting.until(lambda: fds(site) <= before + 256, "no more than 256 strangers are heard")
        with streams.Spdy(url, (*BOTH, "error")) as session:
            assert streams.exit_code(streams.ending(session)) == 0
        waiting.until(lambda: fds(site) <= before, "their time is over", seconds=15)


# -- frames ----------------------------------------------------------------------------------------


def syn(number: int, block: bytes) -> bytes:
    return spdy.control(spdy.SYN_STREAM, struct.pack(">IIBB", number, 0, 0, 0) + block)


def deflated(text: bytes) -> bytes:
    packer = zlib.compressobj(9, zdict=spdydict.DICTIONARY)
    return packer.compress(text) + packer.flush(zlib.Z_SYNC_FLUSH)


SPDY_FRAMES = {
    "unknown type": spdy.control(77, b""),
    "version 2": spdy.control(spdy.PING, bytes(4), version=2),
    "long control": struct.pack(">II", 0x80030001, 0xFFFFFF),
    "data of no stream": spdy.data(99, b"x"),
    "even stream": syn(2, deflated(bytes(4))),
    "no zlib": syn(1, b"garbage"),
    "bomb": syn(1, deflated(struct.pack(">I", 1) + bytes(8 << 20))),
    "many headers": syn(1, deflated(struct.pack(">I", 1 << 31) + bytes(20_000))),
    "long header": syn(1, deflated(struct.pack(">II", 1, 1 << 31))),
    "short": spdy.control(spdy.RST_STREAM, b"\0"),
}


@pytest.mark.parametrize("frame", SPDY_FRAMES.values(), ids=SPDY_FRAMES)
def test_spdy_that_is_none_ends_its_session_alone(
    kubelet: Kubelet, container: str, bystander: Any, frame: bytes
) -> None:
    with streams.Spdy(exec_url(kubelet, container, "true")) as session:
        session.connection.sendall(frame)
        with contextlib.suppress(ConnectionResetError):
            while session.step():
                continue


WEBSOCKET_FRAMES = {
    "unmasked": b"\x82\x02\x00x",
    "reserved bits": b"\xf2\x81aaaa\x00",
    "reserved opcode": b"\x83\x81aaaa\x00",
    "long ping": b"\x89\xfe\x10\x00aaaa",
    "fragmented ping": b"\x09\x81aaaaa",
    "text that is none": b"\x81\x82aaaa\x9e\x9e",
    "continuation of nothing": b"\x80\x81aaaaa",
    "close code 1": b"\x88\x82aaaa" + bytes((0x61, 0x60)),
}


@pytest.mark.parametrize("frame", WEBSOCKET_FRAMES.values(), ids=WEBSOCKET_FRAMES)
def test_websocket_that_is_none_ends_its_session_alone(
    kubelet: Kubelet, container: str, bystander: Any, frame: bytes
) -> None:
    url = exec_url(kubelet, container, "cat", stdin=True)
    with streams.WebSocket(url, (*BOTH, "error")) as session:
        session.connection.sendall(frame)
        assert ends(session.connection)
    waiting.until(lambda: not execs(kubelet, container), "cat has read the end of its stdin")


def ends(connection: socket.socket) -> bool:
    """Read to the end, which may be a reset; TimeoutError when there is none."""
    with contextlib.suppress(ConnectionResetError):
        while connection.recv(65536):
            continue
    return True


def execs(kubelet: Kubelet, container: str) -> int:
    return kubelet.exec_sync(container, ["pidof", "cat"]).exit_code == 0


def test_noise(kubelet: Kubelet, container: str, bystander: Any) -> None:
    noise = random.Random(0)
    for number in range(60):
        kind = (streams.Spdy, streams.WebSocket)[number % 2]
        with kind(exec_url(kubelet, container, "true")) as session:
            with contextlib.suppress(ConnectionError):
                session.connection.sendall(noise.randbytes(noise.randrange(5000)))
            if number % 3 == 0:
                forwards.break_off(session)


def test_pings_whose_answers_nobody_reads(
    kubelet: Kubelet, container: str, site: server.Site, bystander: Any
) -> None:
    before = memory.resident(site.pid)
    url = exec_url(kubelet, container, "cat", stdin=True)
    with streams.Spdy(url, ("stdin", *BOTH, "error")) as session:
        session.connection.settimeout(1)
        pings = spdy.control(spdy.PING, struct.pack(">I", 1)) * 10_000
        for _ in range(30):  # 300,000 pings, 3.6 MB of answers
            try:
                session.connection.sendall(pings)
            except TimeoutError:  # we are held back
                break
        assert memory.resident(site.pid) - before < 16 << 10


def test_resets_in_a_row_cost_nothing(
    kubelet: Kubelet, pod: Pod, site: server.Site, bystander: Any
) -> None:
    before = memory.resident(site.pid)
    request = api.PortForwardRequest(pod_sandbox_id=pod.id, port=[1])
    with forwards.Spdy(kubelet.runtime.PortForward(request).url) as session:
        reader = threading.Thread(target=lambda: ends(session.connection))
        reader.start()
        for number in range(5000):
            session.open("data", streamtype="data", port="1", requestid=str(number))
            session.reset("data")
        session.connection.shutdown(socket.SHUT_WR)
        reader.join()
    assert memory.resident(site.pid) - before < 16 << 10


# -- clients that go -------------------------------------------------------------------------------


def test_attaches_to_a_silent_container_that_break_off(
    kubelet: Kubelet, container: str, site: server.Site, bystander: Any
) -> None:
    def once(number: int) -> None:
        kind = (streams.Spdy, streams.WebSocket)[number % 2]
        url = attach_url(kubelet, container, stdin=number % 3 == 0)
        names = (*(("stdin",) if number % 3 == 0 else ()), *BOTH, "error")
        session = kind(url, names)
        (forwards.break_off, lambda s: s.close())[number // 2 % 2](session)

    with nothing_left(site, container):
        several(once)


def test_terminal_execs_that_fail_and_resize(
    kubelet: Kubelet, container: str, site: server.Site, bystander: Any
) -> None:
    def once(number: int) -> None:
        kind = (streams.Spdy, streams.WebSocket)[number % 2]
        url = exec_url(kubelet, container, "/nope", tty=True, stdin=True)
        with kind(url, ("stdin", "stdout", "error", "resize")) as session:
            session.send("resize", json.dumps({"Width": 80 + number, "Height": 24}).encode())
            assert streams.ending(session)["reason"] == "InternalError"

    with nothing_left(site, container):
        several(once)


@contextlib.contextmanager
def nothing_left(site: server.Site, container: str) -> Iterator[None]:
    """See that server and shim hold no more descriptors after the block, and the bundle no exec."""
    shim = leaks.shim_of(container)
    of_server, of_shim = fds(site), count(shim)
    yield
    waiting.until(
        lambda: fds(site) <= of_server and count(shim) <= of_shim, "nothing is left of them"
    )
    assert not list(bundle_of(container).glob("exec-*"))


def several(once: Callable[[int], None], *, at_once: int = 4) -> None:
    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        for _ in pool.map(once, range(ROUNDS)):
            continue


def count(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def bundle_of(container: str) -> Path:
    [found] = Path("/tmp").glob(f"cri-*/run/containers/{container}")
    return found


def test_a_storm_of_execs(
    kubelet: Kubelet, container: str, site: server.Site, bystander: Any
) -> None:
    """R28, as fast as this host can: every tenth leaves a child that holds stdout, every tenth
    takes too long.
    """
    token = f"5{os.getpid()}"
    until = time.monotonic() + STORM

    def once(number: int) -> None:
        began = time.monotonic()
        if number % 10 == 0:  # takes the drain's 2 s, and no longer
            said = kubelet.exec_sync(container, ["sh", "-c", "sleep 5 & echo started"])
            assert (said.stdout, said.exit_code) == (b"started\n", 0)
            assert time.monotonic() - began < waiting.patient(4.5)
        elif number % 10 == 1:
            late = ["sh", "-c", f"sleep {token} & setsid sleep {token} & sleep {token}"]
            code, _ = refusal(lambda: kubelet.exec_sync(container, late, timeout=1))
            assert code is grpc.StatusCode.DEADLINE_EXCEEDED
            assert time.monotonic() - began < waiting.patient(2)
        else:
            assert kubelet.exec_sync(container, ["true"]).exit_code == 0

    def again(first: int) -> int:
        for number in itertools.count(first):
            once(number)
            if time.monotonic() > until:
                return number - first
        raise AssertionError

    many = int(24 / waiting.PATIENCE)  # an exec is work for its processor alone
    before = leaks.Held.of(site.pid)
    with nothing_left(site, container), concurrent.futures.ThreadPoolExecutor(many) as pool:
        done = sum(pool.map(again, range(many)))
        print(f"{done / STORM:.0f} execs a second")
        waiting.until(lambda: not faults.processes("sleep", token), "those trees are dead")
    pool_of_asyncio = 4 + (os.cpu_count() or 1)
    assert leaks.Held.of(site.pid).threads <= before.threads + pool_of_asyncio


@pytest.mark.parametrize("kind", [streams.Spdy, streams.WebSocket])
def test_a_gibibyte_for_a_client_that_does_not_read(
    kubelet: Kubelet, container: str, site: server.Site, kind: Any
) -> None:
    shim = leaks.shim_of(container)
    url = exec_url(kubelet, container, "head", "-c", str(1 << 30), "/dev/zero", stderr=False)
    before = memory.resident(site.pid), memory.resident(shim)
    with kind(url, ("stdout", "error")) as session:
        streams.until(session, "stdout", b"\0")
        moved = [written(container)]
        waiting.until(lambda: still(moved, container), "the process is held up")
        assert memory.resident(site.pid) - before[0] < 8 << 10  # KiB
        assert memory.resident(shim) - before[1] < 2 << 10
        assert kubelet.exec_sync(container, ["pidof", "head"]).exit_code == 0


def written(container: str) -> int:
    """Return how much the `head` of a container has written."""
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (
                container in (entry / "cgroup").read_text()
                and (entry / "comm").read_text() == "head\n"
            ):
                line = (entry / "io").read_text().split("wchar: ")[1]
                return int(line.split()[0])
    return 0


def still(moved: list[int], container: str) -> bool:
    """Say whether nothing was written for the last 20 looks."""
    moved.append(written(container))
    return len(moved) > 20 and moved[-1] > 0 and len(set(moved[-20:])) == 1
