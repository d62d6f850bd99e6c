# SPDX-License-Identifier: Apache-2.0
"""The handlers under test, by the program that each needs: sections of the configuration."""

from pathlib import Path
from typing import Any

import pytest

from tests.fakes import shim

# ptrace and the host's network stack because they work on a machine without KVM and within a
# network namespace that is not this kernel's own.
HANDLERS: dict[str, dict[str, Any]] = {
    "runc": {},
    "crun": {},
    "runsc": {"args": ["--platform=ptrace", "--network=host"]},
    "containerd-shim-runc-v2": {"kind": "shim"},
}
KERNELS = ("runsc",)  # the containers of a pod share a kernel that is not the host's

# What runc's shim of Debian is not: slow as a VM, of the latest protocols.
HANDLERS[shim.NAME] = {"kind": "shim", "sandbox": "container"}
SCRIPT = {
    "start": "protobuf", "version": 3, "sandbox": True, "at": {"StartSandbox": {"sleep": 0.5}},
}  # fmt: skip

NO_SUCH = "no-such-flag"


def needs(name: str) -> pytest.MarkDecorator:
    """Return the mark of a test with a handler."""
    return pytest.mark.needs("runc" if name == shim.NAME else name)


def tables(home: Path, *names: str) -> dict[str, dict[str, Any]]:
    """Return the sections of handlers; the programs of fakes are written to `home`."""
    return {f"runtimes.{name}": {**HANDLERS[name], "path": _path(name, home)} for name in names}


def odd(home: Path, *names: str) -> dict[str, dict[str, Any]]:
    """Return sections odd-NAME with something that the program does not know, NO_SUCH."""
    return {
        f"runtimes.odd-{name}": {**HANDLERS[name], "path": _path(name, home), **_odd(name)}
        for name in names
    }


def _odd(name: str) -> dict[str, Any]:
    if name == shim.NAME:
        return {"path": f"/{NO_SUCH}"}
    if HANDLERS[name].get("kind") == "shim":
        return {"options": {"BinaryName": NO_SUCH}}
    return {"args": [f"--{NO_SUCH}"]}


def _path(name: str, home: Path) -> str:
    return str(shim.install(home, **SCRIPT)) if name == shim.NAME else name
