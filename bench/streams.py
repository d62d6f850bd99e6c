# SPDX-License-Identifier: Apache-2.0
"""Drive any number of CRI sockets through the same exec and port-forward sessions, in alternating
rounds, and compare them.

    python -m bench.streams --image registry.test/bench/busybox ours=unix:///… containerd=unix:///…

Ratios are to the last socket; the first one is judged by `LIMITS`, as in `bench.pods`. Throughput
is what a client gets that does nothing but count. "ExecSync over runc" is the call less 1.05 times
`runc exec` of the same command in the same container, run in turns with it.
"""

import argparse
import contextlib
import dataclasses
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from bench import memory, pods, throughput
from cri_server.pb import api_pb2 as api
from tests.fakes import kubelet
from tests.lab import waiting

DOWN, UP = 7000, 7001  # ports of the pod: one sends zeros, one takes all and then sends a byte
ROOTS = (
    "{state}/run/runtimes/runc",
    "/run/cri-server/runtimes/runc",
    "/run/containerd/runc/k8s.io",
)
RATES = (
    "exec output",
    "exec input",
    "exec output, WebSocket",
    "exec input, WebSocket",
    "port-forward from the pod",
    "port-forward to the pod",
)
LIMITS = (
    pods.Limit(row="ExecSync over runc", of="value", most=3.0),
    pods.Limit(row="first byte of exec -it", of="ratio", most=1.0),
    *(pods.Limit(row=row, of="ratio", least=1.0) for row in RATES),
    pods.Limit(row="memory", of="value", most=16.0),
)
UNITS = {**dict.fromkeys(RATES, "MiB/s"), "memory": "MiB"}
ORDER = ("ExecSync", "runc exec", "ExecSync over runc", "first byte of exec -it", *RATES, "memory")


@dataclasses.dataclass(kw_only=True, slots=True)
class Streamer:
    """One runtime under measurement, with a pod up for all of it."""

    subject: pods.Subject
    pod: kubelet.Pod
    container: str
    root: str  # runc's, "" when it is not to be found
    size: int

    # -- small -------------------------------------------------------------------------------------

    def exec_sync(self, times: int) -> None:
        """ExecSync of `true` and `runc exec` of the same, in turns."""
        for _ in range(times):
            call = _ms(lambda: self.subject.client.exec_sync(self.container, ["true"]))
            own = _ms(self._runc_exec)
            self.subject.add("ExecSync", call)
            self.subject.add("runc exec", own)
            self.subject.add("ExecSync over runc", call - 1.05 * own)

    def _runc_exec(self) -> None:
        argv = ["runc", "--root", self.root, "exec", self.container, "true"]
        subprocess.run(argv, check=True, capture_output=True, stdin=subprocess.DEVNULL)

    def first_bytes(self, times: int) -> None:
        """`echo` in a terminal, from the RPC on."""
        for _ in range(times):
            took = throughput.first_byte(lambda: self._exec("echo", "x", stdin=True, tty=True))
            self.subject.add("first byte of exec -it", took)

    # -- large -------------------------------------------------------------------------------------

    def transfers(self) -> None:
        """Move `size` bytes every way; the memory is the worst of all."""
        send = ("dd", "if=/dev/zero", "bs=64k", f"count={self.size >> 16}")
        take = ("sh", "-c", f"dd {_taking(self.size)} | tail -c 1")
        works: Sequence[Callable[[], float]] = (
            lambda: throughput.download(self._exec(*send), self.size),
            lambda: throughput.upload(self._exec("tail", "-c", "1", stdin=True), self.size),
            lambda: throughput.download_websocket(self._exec(*send), self.size),
            lambda: throughput.upload_websocket(self._exec(*take, stdin=True), self.size),
            lambda: throughput.forward_download(self._forward(DOWN), DOWN, self.size),
            lambda: throughput.forward_upload(self._forward(UP), UP, self.size),
        )
        for row, work in zip(RATES, works, strict=True):
            with memory.growth(
                self.subject.client.endpoint, pods={self.pod.id}, containers={self.container}
            ) as grown:
                self.subject.add(row, _or_none(work))
            self.subject.add("memory", grown[0])

    def _exec(self, *cmd: str, **fields: bool) -> str:
        request = api.ExecRequest(container_id=self.container, cmd=cmd, stdout=True, **fields)
        return self.subject.client.runtime.Exec(request).url

    def _forward(self, port: int) -> str:
        request = api.PortForwardRequest(pod_sandbox_id=self.pod.id, port=[port])
        return self.subject.client.runtime.PortForward(request).url


def _or_none(work: Callable[[], float]) -> float:
    """Return the rate, 0 for a server that ends the session before all is there."""
    try:
        return work()
    except (ConnectionError, TimeoutError) as e:
        print(f"a transfer broke off: {e}", file=sys.stderr)
        return 0.0


def _ms(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e3


# -- the whole run ---------------------------------------------------------------------------------


@contextlib.contextmanager
def streamer(subject: pods.Subject, size: int) -> Iterator[Streamer]:
    """Bring up a pod whose container serves both ports, and give it for streaming."""
    client = subject.client
    client.pull(subject.image)
    pod = client.run_pod()
    container = client.run(pod, subject.image, _servers(size))
    waiting.until(lambda: _listens(client, container), "the pod's servers listen", seconds=10)
    yield Streamer(
        subject=subject,
        pod=pod,
        container=container,
        root=_root(client.endpoint, container),
        size=size,
    )


def _servers(size: int) -> tuple[str, ...]:
    send = f"nc -ll -p {DOWN} -e dd if=/dev/zero bs=64k count={size >> 16}"
    take = f"nc -ll -p {UP} -e sh -c 'dd {_taking(size)} | tail -c 1'"
    return ("sh", "-c", f"{send} & {take} & wait")


def _taking(size: int) -> str:
    """Return the arguments of a dd that ends by itself: peers take a half close for the end."""
    return f"bs=64k iflag=fullblock count={size >> 16} 2>/dev/null"


def _listens(client: kubelet.Kubelet, container: str) -> bool:
    table = client.exec_sync(container, ["cat", "/proc/net/tcp", "/proc/net/tcp6"]).stdout
    return all(f":{port:04X} 0000".encode() in table for port in (DOWN, UP))


def _root(endpoint: str, container: str) -> str:
    """Return the folder in which a runtime's runc keeps this container."""
    state = str(Path(endpoint.removeprefix("unix://")).parent)
    for pattern in ROOTS:
        root = Path(pattern.format(state=state))
        if (root / container).is_dir():
            return str(root)
    raise FileNotFoundError(f"runc's folder of {container} is in none of {ROOTS}")


def measure(subjects: Sequence[pods.Subject], options: argparse.Namespace) -> list[pods.Row]:
    """Put all subjects through the work, taking turns, and return the table."""
    with contextlib.ExitStack() as stack:
        size = options.mib << 20
        all_ = [stack.enter_context(streamer(subject, size)) for subject in subjects]
        for turn in pods.turns(all_, options.rounds):
            turn.exec_sync(5)
            turn.first_bytes(5)
        for turn in pods.turns(all_, options.transfers):
            turn.transfers()
    return pods.rows(subjects, ORDER, UNITS)


def arguments() -> argparse.ArgumentParser:
    """Return the options that `bench.streams` and `bench.peers` share."""
    parser = argparse.ArgumentParser(description="Compare CRI runtimes by exec and port-forward.")
    parser.add_argument("--rounds", type=int, default=10, help="of five small execs (10)")
    parser.add_argument("--transfers", type=int, default=4, help="rounds of all directions (4)")
    parser.add_argument("--mib", type=int, default=1024, help="size of a transfer (1024)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def run(
    sockets: Mapping[str, str], image: str, options: argparse.Namespace, *, cgroup_parent: str
) -> list[pods.Row]:
    """Measure name → endpoint and return the table."""
    with pods.subjects(sockets, image, cgroup_parent=cgroup_parent) as subjects:
        return measure(subjects, options)


if __name__ == "__main__":
    sys.exit(pods.command(arguments(), run, LIMITS))
