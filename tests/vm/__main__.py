# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.vm`: build, boot, wait, report. See the package's docstring."""

import argparse
import sys
import tempfile
from pathlib import Path

from tests.vm import image, machine, payload

CACHE = payload.REPOSITORY / "build" / "vm"
UNIT = "tests/vm/unit_checks.py"


def main() -> int:
    """Return 0 when every test that ran in the guest has passed."""
    wanted = arguments()
    root = image.provide(CACHE / "images")
    results = CACHE / "results"
    with tempfile.TemporaryDirectory(prefix="vm-", dir=CACHE) as home:
        disk = Path(home, "payload")
        payload.make(disk, Path(home, "files"), python=root.python, order=order(wanted))
        guest = machine.Machine(root=root, payload=disk, accelerator=wanted.accelerator)
        ended = guest.run(CACHE / "console.log", seconds=wanted.deadline)
        payload.results(disk, results)
    print("ended" if ended else "LATE")
    return 0


def order(wanted: argparse.Namespace) -> dict[str, object]:
    """Return the runs of pytest: name, arguments, cgroup driver."""
    return {"runs": [[driver, wanted.tests, driver] for driver in wanted.drivers]}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.vm")
    parser.add_argument("--deadline", type=float, default=3600, metavar="SECONDS")
    parser.add_argument("--accelerator", default="tcg", help="of qemu: tcg or kvm")
    parser.add_argument("--drivers", nargs="+", default=["systemd", "cgroupfs"])
    parser.add_argument("tests", nargs="*", default=["tests/integration"])
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
