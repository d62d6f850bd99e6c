# SPDX-License-Identifier: Apache-2.0
"""Drive any number of CRI sockets through the same work, in alternating rounds, and compare them.

    python -m bench.pods --image registry.test/bench/busybox ours=unix:///… containerd=unix:///…
    python -m bench.pods --image … crun=unix:///…#crun runc=unix:///…#runc containerd=unix:///…

What comes after "#" is the handler (RuntimeClass.handler) of the pods; without it, the default.

Ratios are to the last socket. `LIMITS` say what the first one is judged by, and what sockets of
certain names are; the exit status is 1 when one is missed. Every pod that is started is removed
again, whatever fails. Times are of the calls alone, in milliseconds, seen by a client: medians over
the rounds.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from bench import memory
from cri_server.pb import api_pb2 as api
from tests.fakes import kubelet

T = TypeVar("T")
COMMAND = ("sleep", "86400")
UP = ("RunPodSandbox", "CreateContainer", "StartContainer")
DOWN = ("StopContainer", "RemoveContainer", "StopPodSandbox", "RemovePodSandbox")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of the table: a name, its unit, and one value for each socket."""

    name: str
    unit: str
    values: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Limit:
    """What a row of the socket `name` (the first, if empty) may be: `of` is "ratio", to the socket
    `to` (the last, if empty), or "value", in the row's unit. Where there are no such sockets there
    is no limit.
    """

    row: str
    of: str
    name: str = ""
    to: str = ""
    most: float | None = None
    least: float | None = None

    def found(self, row: Row) -> float | None:
        """Return what the limit is for, None where there is none."""
        names = list(row.values)
        judged, reference = row.values.get(self.name or names[0]), self.to or names[-1]
        if self.of == "value" or judged is None:
            return judged
        base = row.values.get(reference)
        return judged / base if base and reference != (self.name or names[0]) else None

    def met_by(self, found: float) -> bool:
        """Tell whether `found` keeps the limit."""
        return (self.most is None or found <= self.most) and (
            self.least is None or found >= self.least
        )


LIMITS = (
    Limit(row="pod up", of="ratio", most=0.60),
    Limit(row="pod down", of="ratio", most=0.75),
    Limit(row="ExecSync", of="ratio", most=1.0),
    Limit(row="pods per second", of="ratio", least=1.3),
    Limit(row="ListContainers", of="value", most=3.0),
    Limit(row="ListContainerStats", of="ratio", most=0.6),
    Limit(row="private memory per pod", of="value", most=2.0),
    Limit(row="server's resident memory", of="value", most=90.0),
    Limit(row="pod up", of="ratio", name="ours-crun", to="containerd", most=0.45),
    Limit(row="pod up", of="ratio", name="ours-crun", to="ours-runc", most=0.75),
    Limit(row="ExecSync", of="ratio", name="ours-crun", to="containerd", most=0.35),
    Limit(row="pod up", of="ratio", name="ours-shim-runc-v2", to="containerd", most=1.15),
)


@dataclass(kw_only=True, slots=True)
class Subject:
    """One runtime under measurement: its client and the samples so far, by row."""

    name: str
    client: kubelet.Kubelet
    image: str
    handler: str = ""
    samples: dict[str, list[float]] = field(default_factory=dict)

    def add(self, row: str, value: float) -> None:
        self.samples.setdefault(row, []).append(value)

    @contextlib.contextmanager
    def timed(self, row: str) -> Iterator[None]:
        """Add the milliseconds that the block takes."""
        begin = time.perf_counter()
        yield
        self.add(row, (time.perf_counter() - begin) * 1e3)

    # -- one pod -----------------------------------------------------------------------------------

    def up(self) -> tuple[kubelet.Pod, str]:
        """Bring up a pod with one container, each call timed."""
        with self.timed("pod up"):
            with self.timed("RunPodSandbox"):
                pod = self.client.run_pod(handler=self.handler)
            config = self.client.container_config(self.image, COMMAND)
            with self.timed("CreateContainer"):
                container = self.client.create(pod, config)
            with self.timed("StartContainer"):
                self.client.start(container)
        return pod, container

    def down(self, pod: kubelet.Pod, container: str) -> None:
        """Stop without grace and remove, each call timed."""
        with self.timed("pod down"):
            with self.timed("StopContainer"):
                self.client.stop(container, timeout=0)
            with self.timed("RemoveContainer"):
                self.client.remove(container)
            with self.timed("StopPodSandbox"):
                self.client.stop_pod(pod.id)
            with self.timed("RemovePodSandbox"):
                request = api.RemovePodSandboxRequest(pod_sandbox_id=pod.id)
                self.client.runtime.RemovePodSandbox(request)

    def use(self, container: str) -> None:
        """Exec and stats, timed."""
        for _ in range(3):
            with self.timed("ExecSync"):
                self.client.exec_sync(container, ["true"])
            with self.timed("ContainerStats"):
                request = api.ContainerStatsRequest(container_id=container)
                self.client.runtime.ContainerStats(request)

    # -- many pods ---------------------------------------------------------------------------------

    def throughput(self, *, workers: int, pods: int) -> None:
        """Bring `pods` pods up and down, `workers` at a time, and add the pods per second."""
        quiet = dataclasses.replace(self, samples={})

        def cycle(_number: int) -> None:
            quiet.down(*quiet.up())

        begin = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            list(pool.map(cycle, range(pods)))
        self.add("pods per second", pods / (time.perf_counter() - begin))

    def crowd(self, *, pods: int, lists: int) -> None:
        """Bring `pods` pods up at once, list them, weigh the runtime, and bring them down.

        One pod is up before: what the first costs and no other, the server has for all.
        """
        quiet = dataclasses.replace(self, samples={})
        up = [quiet.up()]
        before = self._weigh(up)
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            up += pool.map(lambda _: quiet.up(), range(pods))
            self._lists(lists)
            after = self._weigh(up)
            list(pool.map(lambda pair: quiet.down(*pair), up))
        self.add("private memory per pod", (after.private - before.private) / 1024 / pods)
        self.add("server's resident memory", after.server / 1024)

    def _weigh(self, up: Sequence[tuple[kubelet.Pod, str]]) -> memory.Weight:
        ids, containers = {pod.id for pod, _ in up}, {container for _, container in up}
        return memory.weigh(self.client.endpoint, pods=ids, containers=containers)

    def _lists(self, times: int) -> None:
        calls: Mapping[str, Callable[[], Any]] = {
            "ListPodSandbox": lambda: self.client.pods(),
            "ListContainers": lambda: self.client.containers(),
            "ListContainerStats": lambda: self.client.runtime.ListContainerStats(
                api.ListContainerStatsRequest()
            ),
        }
        for name, call in calls.items():
            for _ in range(times):
                with self.timed(name):
                    call()


# -- the whole run ---------------------------------------------------------------------------------


def measure(subjects: Sequence[Subject], options: argparse.Namespace) -> list[Row]:
    """Put all subjects through the work, taking turns, and return the table."""
    for subject in subjects:
        subject.client.pull(subject.image)
        subject.down(*subject.up())  # warm: the first pod makes the bridge
        subject.samples.clear()
    for turn in turns(subjects, options.rounds):
        pod, container = turn.up()
        turn.use(container)
        turn.down(pod, container)
    for turn in turns(subjects, options.parallel_rounds):
        turn.throughput(workers=options.parallel, pods=options.parallel * 3)
    for turn in turns(subjects, 1):
        turn.crowd(pods=options.pods, lists=20)
    return table(subjects)


def turns(subjects: Sequence[T], rounds: int) -> Iterator[T]:
    """Yield every subject once a round, each round in the other direction."""
    for number in range(rounds):
        yield from subjects if number % 2 == 0 else reversed(subjects)


def table(subjects: Sequence[Subject]) -> list[Row]:
    """Return the medians of all samples."""
    units = {"pods per second": "1/s", "private memory per pod": "MiB"}
    units["server's resident memory"] = "MiB"
    order = ("pod up", *UP, "pod down", *DOWN, "ExecSync", "ContainerStats", "pods per second")
    many = ("ListPodSandbox", "ListContainers", "ListContainerStats")
    names = (*order, *many, "private memory per pod", "server's resident memory")
    return rows(subjects, names, units)


def rows(subjects: Sequence[Subject], names: Sequence[str], units: Mapping[str, str]) -> list[Row]:
    """Return the medians of the samples of these names; a unit that is not told is "ms"."""
    return [
        Row(
            name=name,
            unit=units.get(name, "ms"),
            values={s.name: statistics.median(s.samples[name]) for s in subjects},
        )
        for name in names
    ]


def missed(rows: Sequence[Row], limits: Sequence[Limit]) -> list[str]:
    """Return a sentence for each limit that is not kept."""
    by_name = {row.name: row for row in rows}
    out = []
    for limit in limits:
        found = limit.found(by_name[limit.row])
        if found is None or limit.met_by(found):
            continue
        bound = f"at most {limit.most}" if limit.most is not None else f"at least {limit.least}"
        whose = f" of {limit.name} to {limit.to}" if limit.name else ""
        out.append(f"{limit.row}: {limit.of}{whose} {found:.2f}, wanted {bound}")
    return out


def show(rows: Sequence[Row]) -> str:
    """Return the table as text: a column for each socket, then the ratios to the last."""
    names = list(rows[0].values)
    heads = [*names, *(f"{name}/{names[-1]}" for name in names[:-1])]
    lines = [f"{'':30}" + "".join(f"{head:>22}" for head in heads)]
    for row in rows:
        last = row.values[names[-1]]
        cells = [f"{row.values[name]:.2f} {row.unit}" for name in names]
        cells += [f"{row.values[name] / last:.2f}" if last else "-" for name in names[:-1]]
        lines.append(f"{row.name:30}" + "".join(f"{cell:>22}" for cell in cells))
    return "\n".join(lines)


def report(rows: Sequence[Row], misses: Sequence[str], *, as_json: bool) -> int:
    """Print the table and what was missed; return the exit status."""
    if as_json:
        print(json.dumps({"rows": [dataclasses.asdict(row) for row in rows], "missed": misses}))
    else:
        print(show(rows))
        print("\n".join(f"MISSED {miss}" for miss in misses) or "all limits kept")
    return 1 if misses else 0


def arguments() -> argparse.ArgumentParser:
    """Return the options that `bench.pods` and `bench.peers` share."""
    parser = argparse.ArgumentParser(description="Compare CRI runtimes by the work of pods.")
    parser.add_argument("--rounds", type=int, default=20, help="pods one at a time (20)")
    parser.add_argument("--parallel", type=int, default=8, help="pods at a time (8)")
    parser.add_argument("--parallel-rounds", type=int, default=4, help="rounds of that (4)")
    parser.add_argument("--pods", type=int, default=32, help="pods up for lists and memory (32)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


@contextlib.contextmanager
def subjects(
    sockets: Mapping[str, str], image: str, *, cgroup_parent: str
) -> Iterator[list[Subject]]:
    """Give a subject for each name → endpoint, with #HANDLER; their pods are removed at the end."""
    with contextlib.ExitStack() as stack:
        made = []
        for name, endpoint in sockets.items():
            address, _, handler = endpoint.partition("#")
            client = kubelet.Kubelet(address, cgroup_parent=cgroup_parent, prefix=f"bench-{name}")
            stack.callback(client.close)
            stack.callback(client.remove_own_pods)
            subject = Subject(name=name, client=client, image=image, handler=handler)
            made.append(subject)
        yield made


def run(
    sockets: Mapping[str, str], image: str, options: argparse.Namespace, *, cgroup_parent: str
) -> list[Row]:
    """Measure name → endpoint and return the table."""
    with subjects(sockets, image, cgroup_parent=cgroup_parent) as made:
        return measure(made, options)


def command(
    parser: argparse.ArgumentParser, runner: Callable[..., list[Row]], limits: Sequence[Limit]
) -> int:
    """Parse the command line of a benchmark on given sockets, run it and report."""
    parser.add_argument("--image", required=True, help="an image with busybox's applets")
    parser.add_argument("--cgroup-parent", default="", help="parent of the pods' cgroups")
    parser.add_argument("sockets", nargs="+", metavar="NAME=unix://SOCKET[#HANDLER]")
    options = parser.parse_args()
    sockets = dict(socket.split("=", 1) for socket in options.sockets)
    rows = runner(sockets, options.image, options, cgroup_parent=options.cgroup_parent)
    return report(rows, missed(rows, limits), as_json=options.json)


if __name__ == "__main__":
    sys.exit(command(arguments(), run, LIMITS))
