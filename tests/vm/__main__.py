# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.vm`: build, boot, wait, report. See the package's docstring."""

import argparse
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.vm import image, machine, payload, report

CACHE = payload.REPOSITORY / "build" / "vm"
CONSOLE = CACHE / "console.log"
RESULTS = CACHE / "results"
PAGE = payload.REPOSITORY / "docs" / "guest-run.md"
TAIL = 60  # lines of the console to show again when the guest did not come to its end
HERE = "tests/integration"
DEPLOYED = f"{HERE}/test_deployed.py"
# What has to do with cgroups, or with what happens to a node: with each driver. The rest: once.
DRIVEN = tuple(
    f"{HERE}/test_{name}.py"
    for name in ("server", "pods", "containers", "exec", "resources", "stats", "ends")
)
OTHERS = (HERE, *(f"--ignore={path}" for path in (*DRIVEN, DEPLOYED)))
KERNEL = ("tests/unit/test_mounts.py", "tests/unit/test_linux.py", "tests/contract")
RUNS = ("unit", "systemd", "cgroupfs", "others", "kernel")
# What the deployed unit is asked by.
SOCKET = {
    "CRI_ENDPOINT": "unix:///run/cri-server/cri-server.sock",
    "CRI_CERTS_DIR": "/etc/containerd/certs.d",
}


def main() -> int:
    """Return 0 when every test that ran in the guest has passed."""
    wanted = arguments()
    todo = plan(wanted)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the guest ends with us
    root = image.provide(CACHE / "images")
    with tempfile.TemporaryDirectory(prefix="run-", dir=CACHE) as home:
        disk = Path(home, "payload")
        payload.make(disk, Path(home, "files"), python=root.python, order={"runs": todo})
        guest = machine.Machine(root=root, payload=disk, accelerator=wanted.accelerator)
        in_time = guest.run(CONSOLE, seconds=wanted.deadline)
        payload.results(disk, RESULTS)
    found = report.runs(RESULTS, todo)
    if wanted.page:
        PAGE.write_text(report.page(RESULTS, found))
    return verdict(wanted, found, in_time=in_time)


def plan(wanted: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the runs of pytest, in order: name, arguments, cgroup driver, further environment."""
    if wanted.tests:
        drivers = [run for run in wanted.runs if run in ("systemd", "cgroupfs")]
        return [_run(driver, wanted.tests, driver) for driver in drivers]
    known = {
        "unit": _run("unit", [DEPLOYED], "systemd", **SOCKET),
        "systemd": _run("systemd", DRIVEN, "systemd"),
        "cgroupfs": _run("cgroupfs", DRIVEN, "cgroupfs"),
        "others": _run("others", OTHERS, "systemd"),
        "kernel": _run("kernel", KERNEL, "cgroupfs"),
    }
    return [known[name] for name in wanted.runs]


def _run(name: str, tests: Sequence[str], driver: str, **env: str) -> dict[str, Any]:
    return {"name": name, "tests": [*tests], "driver": driver, "env": env}


def verdict(wanted: argparse.Namespace, found: list[report.Run], *, in_time: bool) -> int:
    """Say what came of it; the console's end too, when the guest did not come to its own."""
    if not in_time or any(run.missing for run in found):
        lines = CONSOLE.read_text(errors="replace").splitlines()[-TAIL:]
        print("\n".join(["the end of the guest's console:", *lines]))
    if not in_time:
        print(f"the guest was killed after {wanted.deadline:g} s")
    print(report.page(RESULTS, found).removeprefix(report.PAGE))
    print(f"console: {CONSOLE}; results: {RESULTS}")
    return 0 if in_time and all(run.good for run in found) else 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.vm", description=__doc__)
    parser.add_argument("--deadline", type=float, default=7200, metavar="SECONDS")
    parser.add_argument("--accelerator", default="tcg", help="of qemu: tcg or kvm")
    parser.add_argument("--runs", nargs="+", default=RUNS, choices=RUNS, help="these alone")
    parser.add_argument("--page", action="store_true", help="write docs/guest-run.md")
    parser.add_argument("tests", nargs="*", help="pytest's arguments, in place of the whole plan")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
