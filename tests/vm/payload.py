# SPDX-License-Identifier: Apache-2.0
"""The guest's second disk: our wheel and those it needs, the tests, deploy/, and a folder for
results.

The sources of `cri_server` and `shim` are not on it: what the guest tests can come from nowhere but
the wheel. Wheels are looked for with the host's pip, for the guest's Python. The disk is made for
one run and read back with debugfs, which needs no mount.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.vm import image

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCES = ("cri_server", "shim", "pyproject.toml", "README.md", "LICENSE")
TOOLS = ("pytest", "pytest-asyncio", "pytest-timeout", "blockbuster", "hypothesis")
SDISTS = ("forbiddenfruit",)  # what these need and nobody offers as a wheel; pure Python
TESTS = ("tests", "bench", "deploy", "proto", "pyproject.toml")
SIZE = "2G"  # sparse
_JUNK = shutil.ignore_patterns("__pycache__", "build")


def make(disk: Path, folder: Path, *, python: str, order: dict[str, Any]) -> None:
    """Make the disk by way of `folder` (new). `order` is what guest.py reads: tests, drivers."""
    (folder / "results").mkdir(parents=True)
    _wheels(folder / "wheels", folder / "tree", python)
    shutil.rmtree(folder / "tree")
    copy(TESTS, folder / "src")
    shutil.copy(Path(__file__).with_name("guest.py"), folder / "guest.py")
    (folder / "order.json").write_text(json.dumps({**order, "tools": tools()}))
    image.make_disk(disk, folder, label="payload", size=SIZE)


def results(disk: Path, target: Path) -> None:
    """Copy the results from the disk into the folder `target` (new)."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".") as home:
        dump = f"rdump /results {home}"
        # What a killed guest wrote may be in the journal only; 1 says that something was mended.
        subprocess.run(["e2fsck", "-p", disk], check=False, capture_output=True)
        subprocess.run(["debugfs", "-R", dump, disk], check=True, capture_output=True)
        Path(home, "results").rename(target)


def copy(names: Sequence[str], target: Path) -> None:
    """Copy files and folders of the repository into `target`."""
    target.mkdir(parents=True)
    for name in names:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=_JUNK, symlinks=True)
        else:
            shutil.copy(source, target / name)


def tools() -> list[str]:
    """Return the requirements that the tests have, as pyproject.toml pins them."""
    table = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    wanted = table["optional-dependencies"]["dev"]
    return [each for each in wanted if re.split(r"[^\w-]", each)[0] in TOOLS]


def _wheels(target: Path, tree: Path, python: str) -> None:
    copy(SOURCES, tree)
    build = ("--no-deps", "--no-build-isolation", "-w", target)
    _pip("wheel", *build, "--no-index", tree)
    ours = next(target.glob("*.whl"))
    _pip("wheel", *build, *SDISTS)
    for_guest = ("--only-binary=:all:", "--python-version", python, "-f", target)
    _pip("download", *for_guest, "-d", target, ours, *tools())


def _pip(verb: str, *arguments: str | Path) -> None:
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", verb, "-q")
    done = subprocess.run(
        [*pip, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        raise SystemExit(f"pip {verb} failed:\n{done.stdout[-4000:]}")
