# SPDX-License-Identifier: Apache-2.0
"""What sessions leave behind in the server and in the shim of their pod: nothing.

    python -m bench.leaks --image IMAGE unix://SOCKET [--sessions 1000]

Opens that many sessions of each kind, half of which break off in the middle (a quarter each by a
reset and by a plain end), and prints file descriptors, threads and resident memory before and
after. A session that is left shows as descriptors: each has one at least.
"""

import argparse
import concurrent.futures
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import memory
from cri_server.pb import api_pb2 as api
from tests.fakes import forwards, kubelet, streams
from tests.lab import listening

WARM = 3.0  # seconds until what was made to warm up is gone
SETTLED = 20.0  # seconds in which everything has to be as before
BOTH = ("stdout", "stderr", "error")


@dataclass(frozen=True, slots=True)
class Held:
    """What a process holds."""

    fds: int
    threads: int
    resident: int  # KiB

    @classmethod
    def of(cls, pid: int) -> "Held":
        fds, threads = (len(os.listdir(f"/proc/{pid}/{name}")) for name in ("fd", "task"))
        return cls(fds, threads, memory.resident(pid))


@dataclass(frozen=True, kw_only=True, slots=True)
class Lab:
    """A pod with a container that sleeps, and a port in it where a server echoes."""

    client: kubelet.Kubelet
    pod: str
    container: str
    port: int

    def exec(self, kind: Any, cmd: str, number: int, *, tty: bool = False) -> None:
        wanted = api.ExecRequest(
            container_id=self.container, cmd=[cmd], stdin=True, stdout=True, stderr=not tty, tty=tty
        )
        names = ("stdin", "stdout", "error", "resize") if tty else ("stdin", *BOTH)
        with kind(self.client.runtime.Exec(wanted).url, names) as session:
            if tty:
                session.send("resize", json.dumps({"Width": 80, "Height": 24 + number}).encode())
            else:
                session.send("stdin", b"word")
            if number % 2:
                return _leave(session, number)
            if cmd == "cat":
                streams.until(session, "stdout", b"word")
            else:
                streams.ending(session)

    def attach(self, kind: Any, number: int) -> None:
        wanted = api.AttachRequest(container_id=self.container, stdout=True, stderr=True)
        with kind(self.client.runtime.Attach(wanted).url, BOTH) as session:
            if number % 2:
                _leave(session, number)

    def forward(self, kind: Any, number: int) -> None:
        wanted = api.PortForwardRequest(pod_sandbox_id=self.pod, port=[self.port])
        with kind(self.client.runtime.PortForward(wanted).url, [self.port]) as session:
            session.send("data0", b"word")
            if number % 2:
                return _leave(session, number)
            streams.until(session, "data0", b"word")


def _leave(session: Any, number: int) -> None:
    if number % 4 == 1:
        forwards.break_off(session)


KINDS: dict[str, Callable[[Lab, int], None]] = {
    "exec, SPDY": lambda lab, n: lab.exec(streams.Spdy, "cat", n),
    "exec, WebSocket": lambda lab, n: lab.exec(streams.WebSocket, "cat", n),
    "exec with terminal that fails, SPDY": lambda lab, n: lab.exec(
        streams.Spdy, "/none", n, tty=True
    ),
    "attach, SPDY": lambda lab, n: lab.attach(streams.Spdy, n),
    "attach, WebSocket": lambda lab, n: lab.attach(streams.WebSocket, n),
    "port-forward, SPDY": lambda lab, n: lab.forward(forwards.Spdy, n),
    "port-forward, SPDY in WebSocket": lambda lab, n: lab.forward(forwards.Tunnel, n),
    "port-forward, WebSocket": lambda lab, n: lab.forward(forwards.Channels, n),
}


def measure(lab: Lab, pids: tuple[int, int], work: Callable[[Lab, int], None], count: int) -> str:
    """Return the cells of a row: both processes before and after `count` sessions."""
    for number in range(20):  # what is made once is made now
        work(lab, number)
    time.sleep(WARM)
    before = [Held.of(pid) for pid in pids]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for _ in pool.map(lambda number: work(lab, number), range(count)):
            continue
    deadline = time.monotonic() + SETTLED
    while time.monotonic() < deadline:
        after = [Held.of(pid) for pid in pids]
        if all(
            (a.fds, a.threads) <= (b.fds, b.threads) for a, b in zip(after, before, strict=True)
        ):
            break
        time.sleep(0.1)
    return " | ".join(
        f"{b.fds} → {a.fds} | {b.threads} → {a.threads} | {b.resident / 1024:.1f} → "
        f"{a.resident / 1024:.1f}"
        for b, a in zip(before, after, strict=True)
    )


def shim_of(container: str) -> int:
    """Return the pid of the shim of a container: the parent of its init."""
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if container in (entry / "cgroup").read_text():
                return int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    raise LookupError(f"no process of {container}")


def main() -> int:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--image", required=True, help="an image with busybox's applets")
    parser.add_argument("--sessions", type=int, default=1000, help="of each kind")
    parser.add_argument("endpoint", metavar="unix://SOCKET")
    options = parser.parse_args()
    with (
        kubelet.Kubelet(options.endpoint, prefix="leaks") as client,
        contextlib.ExitStack() as ends,
    ):
        ends.callback(client.remove_own_pods)
        pod = client.run_pod()
        container = client.run(pod, options.image, ("sleep", "86400"))
        netns = json.loads(client.pod_status(pod.id, verbose=True).info["info"])["netns"]
        port = ends.enter_context(listening.listening(netns, listening.echo))
        lab = Lab(client=client, pod=pod.id, container=container, port=port)
        pids = memory.server_pid(options.endpoint), shim_of(container)
        print("| session | server: fds | threads | MiB | shim: fds | threads | MiB |")
        print("|---|---|---|---|---|---|---|")
        for name, work in KINDS.items():
            print(f"| {name} | {measure(lab, pids, work, options.sessions)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
