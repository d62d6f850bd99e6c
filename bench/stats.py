# SPDX-License-Identifier: Apache-2.0
"""What the calls that a kubelet or a scraper repeats for ever cost with a hundred containers.

    python -m bench.stats unix:///run/cri-server/cri-server.sock --image registry.test/bench/busybox

Times are in milliseconds and seen by a client, the server's CPU time beside them: on a busy machine
that is the steadier of the two. Exit status 1 when ListContainerStats misses its limit by its best
time. The pods are removed again, whatever fails.
"""

import argparse
import concurrent.futures
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench import memory
from cri_server.pb import api_pb2 as api
from tests.fakes import kubelet

COMMAND = ("sleep", "86400")
LIMIT = 25.0  # milliseconds for 100 containers
TICK = 1000 / os.sysconf("SC_CLK_TCK")


def main() -> int:
    """Make the containers, measure, print a table."""
    options = _options()
    with kubelet.Kubelet(options.endpoint, prefix="statsbench") as client:
        client.pull(options.image)
        try:
            count = crowd(client, options)
            best = measure(client, options.rounds)
        finally:
            client.remove_own_pods()
    allowed = LIMIT * count / 100
    print(
        f"{count} containers: ListContainerStats {best:.1f} ms at best, {allowed:.1f} are allowed"
    )
    return 0 if best <= allowed else 1


def crowd(client: kubelet.Kubelet, options: argparse.Namespace) -> int:
    """Bring up the pods, some containers in each; return how many containers."""

    def one(_number: int) -> None:
        pod = client.run_pod()
        for number in range(options.containers):
            client.run(pod, options.image, COMMAND, name=f"c{number}")

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(one, range(options.pods)))
    return int(options.pods * options.containers)


def measure(client: kubelet.Kubelet, rounds: int) -> float:
    """Print the cost of each call; return the best time of ListContainerStats."""
    runtime = client.runtime
    calls: dict[str, Callable[[], Any]] = {
        "ListContainers": client.containers,
        "ListContainerStats": lambda: runtime.ListContainerStats(api.ListContainerStatsRequest()),
        "ListPodSandboxStats": lambda: runtime.ListPodSandboxStats(
            api.ListPodSandboxStatsRequest()
        ),
        "ListPodSandboxMetrics": lambda: runtime.ListPodSandboxMetrics(
            api.ListPodSandboxMetricsRequest()
        ),
    }
    server = memory.server_pid(client.endpoint)
    print(f"{'call':24}{'best':>8}{'median':>8}{'CPU':>8}   (ms)")
    best = {}
    for name, call in calls.items():
        cpu, times = cpu_time(server), [timed(call) for _ in range(rounds)]
        used = (cpu_time(server) - cpu) / rounds
        best[name] = min(times)
        print(f"{name:24}{min(times):8.1f}{statistics.median(times):8.1f}{used:8.1f}")
    return best["ListContainerStats"]


def timed(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1000


def cpu_time(pid: int) -> float:
    """Return the CPU time of a process in milliseconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * TICK


def _options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("endpoint")
    parser.add_argument("--image", required=True)
    parser.add_argument("--pods", type=int, default=20)
    parser.add_argument("--containers", type=int, default=5, help="in each pod")
    parser.add_argument("--rounds", type=int, default=30)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
