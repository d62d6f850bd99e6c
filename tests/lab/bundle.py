# SPDX-License-Identifier: Apache-2.0
"""OCI bundles with a busybox root, made by hand, for tests that talk to a shim or an OCI runtime
directly.

A bundle is a folder with config.json and rootfs; its cgroup is below `/cri-test-<pid>` of every
hierarchy. The maker removes the folder, the runtime removes the cgroup.
"""

import json
import os
import shutil
import subprocess
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.lab import cgroups

PATH = "PATH=/bin"
PARENT = f"/cri-test-{os.getpid()}"
CAPABILITIES = ["CAP_CHOWN", "CAP_KILL", "CAP_SETUID", "CAP_SETGID", "CAP_SYS_ADMIN", "CAP_NET_RAW"]
_MOUNTS = (
    ("/proc", "proc", "proc", ()),
    ("/dev", "tmpfs", "tmpfs", ("nosuid", "strictatime", "mode=755", "size=65536k")),
    ("/dev/pts", "devpts", "devpts", ("nosuid", "noexec", "newinstance", "ptmxmode=0666")),
    ("/dev/shm", "tmpfs", "shm", ("nosuid", "noexec", "nodev", "mode=1777")),
    ("/sys", "sysfs", "sysfs", ("nosuid", "noexec", "nodev", "ro")),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Bundle:
    """A container that can be run. `cgroups`: controller ("" for v2) to directory, as in
    shim.proto.
    """

    id: str
    path: Path
    cgroups: Mapping[str, str]

    @property
    def log(self) -> Path:
        """Where tests let the container log."""
        return self.path / "logs" / "0.log"

    def pids_limit(self) -> str:
        """Return the limit that its cgroup has."""
        directory = self.cgroups.get("pids") or self.cgroups[""]
        return Path(directory, "pids.max").read_text().strip()

    def parts(self) -> list[str]:
        """Return what execs have of its cgroup."""
        paths = (os.path.join(d, n) for d in self.cgroups.values() for n in os.listdir(d))
        return [path for path in paths if os.path.basename(path).startswith("exec-")]

    def lines(self) -> list[tuple[str, str, str]]:
        """Return the log as (stream, tag, content)."""
        records = [line.split(" ", 3)[1:] for line in self.log.read_text().splitlines()]
        return [(stream, tag, content) for stream, tag, content in records]


def rootfs(where: Path) -> Path:
    """Make a root with busybox under the names of its applets; containers may share it."""
    (where / "bin").mkdir(parents=True)
    for name in ("proc", "dev", "sys", "tmp", "etc"):
        (where / name).mkdir()
    busybox = where / "bin/busybox"
    shutil.copy2(shutil.which("busybox") or "busybox", busybox)
    applets = subprocess.run([busybox, "--list"], check=True, capture_output=True, text=True)
    for applet in applets.stdout.split():
        if applet != "busybox":
            (where / "bin" / applet).symlink_to("busybox")
    return where


def make(
    where: Path,
    root: Path,
    args: Sequence[str],
    *,
    terminal: bool = False,
    namespaces: Sequence[str] = ("pid", "mount", "ipc", "uts"),
    resources: Mapping[str, Any] | None = None,
) -> Bundle:
    """Write a bundle that runs `args` in `root`; namespaces that are not named are the host's."""
    container_id = uuid.uuid4().hex * 2
    path = where / container_id
    path.mkdir(parents=True)
    below = f"{PARENT}/{container_id}"
    config = {
        "ociVersion": "1.0.2",
        "root": {"path": str(root), "readonly": False},
        "process": process(args, terminal=terminal),
        "mounts": [_mount(*mount) for mount in _MOUNTS],
        "linux": {
            "cgroupsPath": below,
            "namespaces": [{"type": name} for name in namespaces],
            "resources": dict(resources or {}),
        },
    }
    (path / "config.json").write_text(json.dumps(config))
    return Bundle(id=container_id, path=path, cgroups=directories(below))


def process(args: Sequence[str], *, terminal: bool = False) -> dict[str, Any]:
    """Return an OCI process."""
    sets = ("bounding", "effective", "permitted")
    return {
        "terminal": terminal,
        "user": {"uid": 0, "gid": 0},
        "args": list(args),
        "env": [PATH],
        "cwd": "/",
        "capabilities": dict.fromkeys(sets, CAPABILITIES),
        "oomScoreAdj": 0,
    }


def directories(below: str) -> dict[str, str]:
    """Return controller to directory for a cgroup path; "" where v2 is all there is."""
    mounts = cgroups.hierarchies()
    if mounts == [Path("/sys/fs/cgroup")]:
        return {"": f"/sys/fs/cgroup{below}"}
    plain = [mount for mount in mounts if mount.name not in ("unified", "systemd")]
    return {name: f"{mount}{below}" for mount in plain for name in mount.name.split(",")}


def _mount(target: str, kind: str, source: str, options: Sequence[str]) -> dict[str, Any]:
    return {"destination": target, "type": kind, "source": source, "options": list(options)}
