# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.vm`: build, boot, wait, report. See the package's docstring."""

import argparse
import concurrent.futures
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.vm import image, machine, payload, policy, report

CACHE = payload.REPOSITORY / "build" / "vm"
RESULTS = CACHE / "results"
PARTS = CACHE / "parts"  # of runs with a choice of tests, which no page shows
PAGE = payload.REPOSITORY / "docs" / "guest-run.md"
TAIL = 60  # lines of the console to show again when the guest did not come to its end
HERE = "tests/integration"
DEPLOYED = f"{HERE}/test_deployed.py"
# What has to do with cgroups, or with what happens to a node: with each driver. The rest: once.
DRIVEN = tuple(
    f"{HERE}/test_{name}.py"
    for name in ("server", "pods", "containers", "exec", "resources", "stats", "ends")
)
# Handlers, whatever they are and however they behave.
HANDLERS = tuple(
    f"{HERE}/test_{name}.py" for name in ("handlers", "live_handlers", "odd_handlers", "fake_shim")
)
# The node, when things go wrong for it.
NODE = tuple(f"{HERE}/test_{name}.py" for name in ("recovery", "faults", "liveness", "reset"))
# What has to do with users, and with images and requests that mean harm.
USERS = tuple(
    f"{HERE}/test_{name}.py"
    for name in ("userns", "userns_parts", "hostile_users", "hostile_images", "hostile_requests")
)
# These restart the server some hundred times: hours in emulation.
LONG = {
    "node": f"--deselect={HERE}/test_recovery.py::test_killed_at_every_step",
    "users": f"--deselect={HERE}/test_userns.py::test_no_kill_costs_a_file_of_a_volume",
}
CLIENTS = tuple(
    f"{HERE}/test_{name}.py"
    for name in ("streaming", "streaming_rules", "streaming_hazards", "portforward")
)
APART = (*DRIVEN, *HANDLERS, *NODE, *USERS, *CLIENTS, DEPLOYED)
OTHERS = (HERE, *(f"--ignore={path}" for path in APART))
# What has to do with labels.
LABELLED = (
    f"{HERE}/test_selinux.py",
    f"{HERE}/test_isolation.py::test_v29_a_file_over_hosts_is_not_relabelled",
    f"{HERE}/test_security.py::test_a_malformed_label_is_refused_with_and_without_selinux",
    *(f"tests/unit/test_{name}.py" for name in ("selinux_host", "selinux_relabel", "spec_selinux")),
)
KERNEL = ("tests/unit/test_mounts.py", "tests/unit/test_linux.py", "tests/contract")
APPARMOR = image.Kind(parameters="apparmor=1 security=apparmor")
SELINUX = policy.kind()
BOOTS = (  # the longest first; each has the deadline for itself
    (APPARMOR, ("others",)),
    (APPARMOR, ("handlers",)),
    (APPARMOR, ("node",)),
    (APPARMOR, ("users",)),
    (APPARMOR, ("clients",)),
    (APPARMOR, ("unit", "systemd")),
    (APPARMOR, ("kernel", "cgroupfs")),
    (SELINUX, ("selinux-unit", "selinux")),
)
RUNS = tuple(name for _, names in BOOTS for name in names)
ENGINE = "container_engine_t"  # as what the deployed server runs there
# What the deployed unit is asked by.
SOCKET = {
    "CRI_ENDPOINT": "unix:///run/cri-server/cri-server.sock",
    "CRI_CERTS_DIR": "/etc/containerd/certs.d",
}


def main() -> int:
    """Return 0 when every test that ran in the guests has passed."""
    wanted = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the guests end with us
    if wanted.tests:
        shutil.rmtree(PARTS, ignore_errors=True)
    boots = boot_all(wanted, PARTS if wanted.tests else RESULTS)
    if wanted.page:
        PAGE.write_text(report.page(report.latest(RESULTS, RUNS)))
    told = report.latest(RESULTS, wanted.runs) if wanted.again else boots
    print(report.page(told).removeprefix(report.PAGE))
    return 0 if told and all(run.good for each in told for run in each.runs) else 1


def boot_all(wanted: argparse.Namespace, results: Path) -> list[report.Boot]:
    """Boot the guests that the runs need, `wanted.guests` at a time."""
    stop = threading.Event()
    with concurrent.futures.ThreadPoolExecutor(wanted.guests) as pool:
        booting = []
        for kind, name, here in boots_of(wanted):
            root = image.provide(CACHE / "images", kind)
            booting.append(pool.submit(boot, wanted, root, name, here, results, stop))
        try:
            return [each.result() for each in booting]
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def boots_of(wanted: argparse.Namespace) -> Iterator[tuple[image.Kind, str, list[dict[str, Any]]]]:
    """Yield what guests to boot: of what kind, by what name, for which runs."""
    todo = again(wanted) if wanted.again else plan(wanted)
    for kind, names in together() if wanted.again else BOOTS:
        if here := [run for run in todo if run["name"] in names]:
            yield kind, here[0]["name"] + (f"-{report.AGAIN}" if wanted.again else ""), here


def together() -> list[tuple[image.Kind, tuple[str, ...]]]:
    """Return BOOTS with one guest of each kind."""
    return [
        (kind, tuple(name for each, names in BOOTS if each == kind for name in names))
        for kind in (APPARMOR, SELINUX)
    ]


def again(wanted: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the runs of what failed when it ran last, of those tests alone."""
    last = [run for each in report.latest(RESULTS, RUNS) for run in each.runs]
    failed = {run.name: [*dict.fromkeys(map(report.node_id, run.left))] for run in last}
    todo = [{**run, "tests": failed.get(run["name"])} for run in plan(wanted)]
    return [run for run in todo if run["tests"]]


def boot(
    wanted: argparse.Namespace,
    root: image.Image,
    name: str,
    todo: list[dict[str, Any]],
    results: Path,
    stop: threading.Event,
) -> report.Boot:
    """Boot a guest for these runs; leave what it says in a new folder of `results`."""
    folder = results / f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{name}"
    with tempfile.TemporaryDirectory(prefix="run-", dir=CACHE) as home:
        disk, console = Path(home, "payload"), Path(home, "console.log")
        payload.make(disk, Path(home, "files"), python=root.python, order={"runs": todo})
        guest = machine.Machine(
            name=name, root=root, payload=disk, accelerator=wanted.accelerator, cpus=wanted.cpus
        )
        in_time = guest.run(console, seconds=wanted.deadline, stop=stop)
        payload.results(disk, folder)
        (folder / report.PLAN).write_text(json.dumps(todo))
        shutil.move(console, folder)
    found = report.boot(folder)
    print(f"{name}: results: {folder}")
    if not in_time:
        print(f"{name}: the guest was killed after {wanted.deadline:g} s")
    if not in_time or any(run.missing for run in found.runs):
        lines = (folder / "console.log").read_text(errors="replace").splitlines()[-TAIL:]
        print("\n".join([f"{name}: the end of the guest's console:", *lines]))
    return found


def plan(wanted: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the runs of pytest, in order: name, arguments, cgroup driver, further environment."""
    if wanted.tests:
        parts = {"systemd": "systemd", "cgroupfs": "cgroupfs", "selinux": "systemd"}
        domains = {"selinux": ENGINE}
        return [
            _run(run, wanted.tests, parts[run], domains.get(run, ""))
            for run in wanted.runs
            if run in parts
        ]
    known = {
        "unit": _run("unit", [DEPLOYED], "systemd", **SOCKET),
        "systemd": _run("systemd", DRIVEN, "systemd"),
        "cgroupfs": _run("cgroupfs", DRIVEN, "cgroupfs"),
        "handlers": _run("handlers", HANDLERS, "systemd"),
        "node": _run("node", (*NODE, LONG["node"]), "systemd"),
        "clients": _run("clients", CLIENTS, "systemd"),
        "users": _run("users", (*USERS, LONG["users"]), "systemd"),
        "others": _run("others", OTHERS, "systemd"),
        "kernel": _run("kernel", KERNEL, "cgroupfs"),
        "selinux-unit": _run("selinux-unit", [DEPLOYED], "systemd", **SOCKET),
        "selinux": _run("selinux", LABELLED, "systemd", ENGINE),
    }
    return [known[name] for name in wanted.runs]


def _run(
    name: str, tests: Sequence[str], driver: str, domain: str = "", **env: str
) -> dict[str, Any]:
    return {"name": name, "tests": [*tests], "driver": driver, "domain": domain, "env": env}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.vm", description=__doc__)
    parser.add_argument(
        "--deadline", type=float, default=7200, metavar="SECONDS", help="of a guest"
    )
    parser.add_argument("--accelerator", default="tcg", help="of qemu: tcg or kvm")
    parser.add_argument("--runs", nargs="+", default=RUNS, choices=RUNS, help="these alone")
    parser.add_argument(
        "--again", action="store_true", help="of these runs what failed the last time"
    )
    parser.add_argument("--guests", type=int, default=os.cpu_count(), metavar="N", help="at a time")
    parser.add_argument("--cpus", type=int, default=1, help="that a guest has: more would spin")
    parser.add_argument(
        "--page", action="store_true", help="write docs/guest-run.md, of the last of each run"
    )
    parser.add_argument("tests", nargs="*", help="pytest's arguments, in place of the whole plan")
    wanted = parser.parse_args()
    if wanted.tests and (wanted.page or wanted.again):
        parser.error("--page and --again are of whole runs")
    return wanted


if __name__ == "__main__":
    sys.exit(main())
