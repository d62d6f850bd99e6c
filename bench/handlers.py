# SPDX-License-Identifier: Apache-2.0
"""A pod of each handler side by side: which kernel it has, how soon it is up, what it weighs.

    python -m bench.handlers [--page]

The server is one of our own with the handlers of the tests (`tests.lab.handlers`), crun's cgroup
hierarchy included. Start times are medians over the rounds, from RunPodSandbox to the end of
StartContainer. Memory is what all processes of the runtime have for themselves with the pod, less
what they had without it; what runs inside the container does not count, but for a kernel of the
pod's own, which the runtime brought along. `--page` puts the result into docs/runtimes.md.
"""

import argparse
import contextlib
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench import memory
from tests.fakes import kubelet
from tests.lab import cgroups, handlers, image, network, registry, server

NAMES = ("runc", "crun", "runsc", "containerd-shim-runc-v2")
COMMAND = ("sleep", "86400")
PAGE = Path(__file__).parents[1] / "docs" / "runtimes.md"
BEGIN, END = "<!-- side by side: written by bench.handlers -->", "<!-- end of side by side -->"
LINES = 3  # of dmesg


class Pod(NamedTuple):
    """What one handler's pod shows: `start` in milliseconds, `weight` in KiB."""

    handler: str
    uname: str
    dmesg: str
    start: float
    weight: int


def main() -> int:
    """Measure what is installed, print it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--page", action="store_true", help="write the result into docs/")
    options = parser.parse_args()
    with lab() as (client, reference):
        found = [look(client, reference, name, options.rounds) for name in NAMES if there(name)]
    text = report(found)
    print(text)
    if options.page:
        write(text)
    return 0


def there(name: str) -> bool:
    """Tell whether a handler's program is installed."""
    return shutil.which(name) is not None


@contextlib.contextmanager
def lab() -> Iterator[tuple[kubelet.Kubelet, str]]:
    """Stand up a registry, a network and a server; yield a client and the name of an image."""
    with contextlib.ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp")))
        stack.enter_context(cgroups.hugetlb())
        net = network.own("crih")
        stack.callback(cgroups.remove, f"/{net.name}")
        stack.callback(net.remove)
        store = stack.enter_context(registry.run(home / "registry"))
        reference = store.push(image.busybox(), "bench/busybox")
        settings: dict[str, dict[str, Any]] = {
            "network": {"conf_dir": os.fspath(net.write(home / "net.d"))},
            "images": {"registry_config_dirs": [os.fspath(store.hosts(home / "certs.d"))]},
            "runtime": {"default": "runc"},
            **handlers.tables(home, *filter(there, NAMES)),
        }
        site = stack.enter_context(server.site(settings, prefix="crih-"))
        site.start()
        client = kubelet.Kubelet(site.endpoint, cgroup_parent=f"/{net.name}", prefix="side")
        stack.callback(client.close)
        stack.callback(client.remove_own_pods)
        client.pull(reference)
        client.run_pod()  # the pages that the zygote has alone until a first shim shares them
        yield client, reference


def look(client: kubelet.Kubelet, reference: str, handler: str, rounds: int) -> Pod:
    """Bring pods of a handler up and down; look into the last one."""
    times = []
    for _ in range(rounds):
        before = weigh(client, {})
        began = time.perf_counter()
        pod = client.run_pod(handler=handler)
        container = client.run(pod, reference, COMMAND)
        times.append((time.perf_counter() - began) * 1e3)
        weight = weigh(client, {pod.id: container}) - before
        uname, dmesg = (said(client, container, words) for words in (("uname", "-a"), ("dmesg",)))
        client.remove_pod(pod.id)
    return Pod(
        handler=handler,
        uname=uname,
        dmesg="\n".join(dmesg.splitlines()[:LINES]) or "(not allowed)",
        start=statistics.median(times),
        weight=weight,
    )


def weigh(client: kubelet.Kubelet, pods: dict[str, str]) -> int:
    """Return the private memory of the runtime's processes in KiB, those inside left out."""
    found = memory.weigh(client.endpoint, pods=set(pods), containers=set(pods.values()))
    return found.private


def said(client: kubelet.Kubelet, container: str, command: Sequence[str]) -> str:
    """Return what a command prints inside."""
    return client.exec_sync(container, command).stdout.decode(errors="replace").strip()


def report(found: Sequence[Pod]) -> str:
    """Return a Markdown table of the figures, and what each pod says of its kernel."""
    head = ["| handler | pod up | memory of the runtime |", "| --- | --- | --- |"]
    rows = [f"| {p.handler} | {p.start:.0f} ms | {p.weight / 1024:.1f} MiB |" for p in found]
    return "\n".join([*head, *rows, *(_session(pod) for pod in found)])


def _session(pod: Pod) -> str:
    lines = ["$ uname -a", pod.uname, f"$ dmesg | head -{LINES}", pod.dmesg]
    indented = "\n".join(f"    {line}" for text in lines for line in text.splitlines())
    return f"\n{pod.handler}:\n\n{indented}"


def write(text: str) -> None:
    """Put the result between the marks of the page."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


if __name__ == "__main__":
    sys.exit(main())
