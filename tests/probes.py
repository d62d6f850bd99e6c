# SPDX-License-Identifier: Apache-2.0
"""What this machine can do, found out by trying it.

A test says `@pytest.mark.needs("root", "runc")`. A probe returns "" or the reason why not; each is
asked once. `ALLOWED` are the things that a machine may truly lack: tests that need them are skipped
even where CRI_TESTS_REQUIRE=all makes every other skip a failure.
"""

import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from cri_server import apparmor, userns
from shim import linux

ALLOWED = frozenset(
    {
        "apparmor",
        "selinux",
        "selinux-enforced",
        "systemd",
        "deployed",
        "cgroup-v1",
        "cgroup-v2",
        "kvm",
        "sys_resource",
        "userns",
        "id-mapped-tmpfs",
    }
)
PROBES: dict[str, Callable[[], str]] = {}


def probe(name: str) -> Callable[[Callable[[], str]], Callable[[], str]]:
    """Register a function as the probe of `name`."""

    def register(function: Callable[[], str]) -> Callable[[], str]:
        PROBES[name] = functools.cache(function)
        return PROBES[name]

    return register


def missing(name: str) -> str:
    """Return why this machine lacks `name`, or ""; a name without a probe is that of a command."""
    if name in PROBES:
        return PROBES[name]()
    return "" if shutil.which(name) else f"{name} is not installed"


@probe("root")
def _root() -> str:
    return "" if os.geteuid() == 0 else "not root"


@probe("netns")
def _netns() -> str:
    ip = shutil.which("ip")
    if ip is None:
        return "ip is not installed"
    name = f"probe-{os.getpid()}"
    added = subprocess.run([ip, "netns", "add", name], capture_output=True, text=True, check=False)
    if added.returncode == 0:
        subprocess.run([ip, "netns", "delete", name], check=True)
    return added.stderr.strip()


@probe("overlay")
def _overlay() -> str:
    with tempfile.TemporaryDirectory(prefix="probe-") as folder:
        low, up, work, top = (Path(folder, name) for name in ("low", "up", "work", "top"))
        for path in (low, up, work, top):
            path.mkdir()
        options = f"lowerdir={low},upperdir={up},workdir={work}"
        try:
            linux.mount("overlay", os.fspath(top), "overlay", 0, options)
        except OSError as e:
            return f"overlay: {e}"
        linux.umount2(os.fspath(top), 0)
    return ""


@probe("userns")
def _userns() -> str:
    temporary = Path(tempfile.gettempdir())
    old = host_version() < userns.LAYERS
    return "overlayfs takes no id-mapped layers" if old else userns.why_not(temporary, temporary)


@probe("id-mapped-tmpfs")
def _id_mapped_tmpfs() -> str:
    return "" if host_version() >= (6, 3) else "tmpfs takes no mapped ids before Linux 6.3"


def host_version() -> tuple[int, ...]:
    """Return the first two numbers of the kernel's release."""
    return tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])


@probe("cni")
def _cni() -> str:
    folders = (Path("/opt/cni/bin"), Path("/usr/lib/cni"))
    return "" if any((f / "bridge").exists() for f in folders) else "no CNI plugins"


@probe("apparmor")
def _apparmor() -> str:
    """Tell whether profiles are enforced and can be loaded."""
    if not apparmor.supported():
        return "the kernel has no AppArmor"
    return "" if apparmor.parser() else "apparmor_parser is not installed"


@probe("selinux")
def _selinux() -> str:
    return "" if Path("/sys/fs/selinux/enforce").exists() else "the kernel has no SELinux"


@probe("selinux-enforced")
def _selinux_enforced() -> str:
    enforce = Path("/sys/fs/selinux/enforce")
    enforced = enforce.exists() and enforce.read_text() == "1"
    return "" if enforced else "no SELinux policy is enforced"


@probe("systemd")
def _systemd() -> str:
    return "" if Path("/run/systemd/system").is_dir() else "systemd is not the init"


@probe("deployed")
def _deployed() -> str:
    """Tell whether the tests are held against the unit of deploy/, which they may then restart."""
    if os.environ.get("CRI_ENDPOINT") != "unix:///run/cri-server/cri-server.sock":
        return "CRI_ENDPOINT is not the socket of deploy/'s unit"
    asked = ["systemctl", "is-active", "cri-server"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else f"cri-server.service is {done.stdout.strip()}"


@probe("cgroup-v2")
def _cgroup_v2() -> str:
    v2 = Path("/sys/fs/cgroup/cgroup.controllers").exists()
    return "" if v2 else "cgroup v1 or hybrid"


@probe("cgroup-v1")
def _cgroup_v1() -> str:
    return "" if PROBES["cgroup-v2"]() else "cgroup v2"


@probe("cgroup2")
def _cgroup2() -> str:
    mounted = " - cgroup2 " in Path("/proc/self/mountinfo").read_text()
    return "" if mounted else "no cgroup v2 hierarchy is mounted"


@probe("kvm")
def _kvm() -> str:
    return "" if os.access("/dev/kvm", os.W_OK) else "no /dev/kvm"


@probe("sys_resource")
def _sys_resource() -> str:
    status = Path("/proc/self/status").read_text()
    effective = next(int(line.split()[1], 16) for line in status.splitlines() if "CapEff" in line)
    return "" if effective & 1 << 24 else "CAP_SYS_RESOURCE is not to be had"
