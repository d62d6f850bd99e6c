# SPDX-License-Identifier: Apache-2.0
"""A Debian root file system with systemd, what pods need, and a kernel: made once, kept, never
written to. There is one for each kind of guest; kinds differ in their security module.

The packages come from the Debian sources that the host's apt is configured with, so the guest has
the host's release. An image is kept under the digest of its recipe and those sources; a half-made
one has another name until it is whole.
"""

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PACKAGES = (
    "systemd-sysv", "dbus", "udev", "kmod", "linux-image-cloud-amd64", "apparmor",
    "iproute2", "iptables", "containernetworking-plugins", "runc", "crun", "catatonit",
    "containerd", "docker-registry", "busybox-static", "curl", "python3", "python3-venv",
    "libstdc++6",
)  # fmt: skip
UNNEEDED = ("doc", "man", "locale", "info", "bash-completion", "lintian")
SIZE = "4G"  # sparse
UNIT = """\
[Unit]
Description=The tests of cri-server
After=multi-user.target
RequiresMountsFor=/payload
[Service]
Type=oneshot
ExecStart=/usr/bin/python3 /payload/guest.py
ExecStopPost=/bin/systemctl poweroff --no-block
StandardOutput=tty
StandardError=tty
TTYPath=/dev/ttyS0
"""
FILES = {
    "etc/fstab": "LABEL=root / ext4 defaults 0 0\nLABEL=payload /payload ext4 defaults 0 0\n",
    "etc/hostname": "guest\n",
    "etc/hosts": "127.0.0.1 localhost guest\n::1 localhost\n",
    "etc/systemd/system/tests.service": UNIT,
}
LINKS = {
    "etc/systemd/system/multi-user.target.wants/tests.service": "/etc/systemd/system/tests.service",
    "etc/systemd/system/serial-getty@ttyS0.service": "/dev/null",
    "etc/systemd/system/containerd.service": "/dev/null",  # only its shim is wanted
    "etc/systemd/system/apt-daily.timer": "/dev/null",
    "etc/systemd/system/apt-daily-upgrade.timer": "/dev/null",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """A kind of guest: its kernel's `parameters`, packages beside the usual ones, and what else
    `furnish` does to its root folder, which `recipe` decides.
    """

    parameters: str
    packages: tuple[str, ...] = ()
    furnish: Callable[[Path], None] | None = None
    recipe: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Image:
    """The files of a guest; `python` is the version of its python3, as "3.11"."""

    parameters: str
    disk: Path
    kernel: Path
    initrd: Path
    python: str


def provide(cache: Path, kind: Kind) -> Image:
    """Return the image of today's recipe, from `cache` when it is there. Raises
    CalledProcessError.
    """
    sources = debian_sources()
    recipe = [*sources, *PACKAGES, *UNNEEDED, *FILES.items(), *LINKS.items(), SIZE]
    recipe += [*kind.packages, *kind.recipe]
    folder = cache / hashlib.sha256(repr(recipe).encode()).hexdigest()[:16]
    if not folder.is_dir():
        _build(sources, kind, folder)
    python = (folder / "python").read_text().strip()
    names = {name: folder / name for name in ("disk", "kernel", "initrd")}
    return Image(**names, python=python, parameters=kind.parameters)


def debian_sources() -> list[str]:
    """Return one sources.list line for each part of Debian that the host's apt knows."""
    asked = "$(ORIGIN)|$(REPO_URI)|$(RELEASE)|$(COMPONENT)"
    command = ["apt-get", "indextargets", "--format", asked, "Created-By: Packages"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    fields = (line.split("|") for line in done.stdout.splitlines())
    found = [f"deb {uri} {suite} {part}" for origin, uri, suite, part in fields
             if origin == "Debian"]  # fmt: skip
    if not found:
        raise SystemExit("the host's apt knows no source of Debian packages (apt-get update?)")
    return list(dict.fromkeys(found))


def _build(sources: list[str], kind: Kind, folder: Path) -> None:
    print("vm: making the guest's root file system (a minute, once)", flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="making-", dir=folder.parent) as home:
        made, root = Path(home, "made"), Path(home, "root")
        made.mkdir()
        _bootstrap(sources, PACKAGES + kind.packages, root)
        _furnish(root)
        if kind.furnish:
            kind.furnish(root)
        _split(root, made)
        made.rename(folder)


def _bootstrap(sources: list[str], packages: tuple[str, ...], root: Path) -> None:
    suite = min((line.split()[2] for line in sources), key=len)
    options = ["--quiet", "--mode=root", "--variant=essential", f"--include={','.join(packages)}"]
    options += [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in UNNEEDED]
    options += ["--dpkgopt=force-unsafe-io", f"--aptopt={_host_apt(root.parent)}"]
    _run("mmdebstrap", *options, suite, root, *sources)


def _host_apt(folder: Path) -> Path:
    """Write how the host's apt fetches (proxies, certificates, dates) for the guest's apt."""
    command = ["apt-config", "dump", "Acquire"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    file = folder / "apt.conf"
    file.write_text('Acquire::Languages "none";\n' + done.stdout)
    return file


def _furnish(root: Path) -> None:
    (root / "payload").mkdir()
    for name, text in FILES.items():
        (root / name).write_text(text)
    for name, target in LINKS.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).symlink_to(target)


def _split(root: Path, made: Path) -> None:
    """Turn a root folder into disk, kernel and initrd."""
    version = "import sys; print('%d.%d' % sys.version_info[:2])"
    asked = subprocess.run(
        ["chroot", root, "python3", "-c", version], check=True, capture_output=True, text=True
    )
    (made / "python").write_text(asked.stdout)
    for name, pattern in (("kernel", "vmlinuz-*"), ("initrd", "initrd.img-*")):
        shutil.move(next((root / "boot").glob(pattern)), made / name)
    make_disk(made / "disk", root, label="root", size=SIZE)


def make_disk(disk: Path, folder: Path, *, label: str, size: str) -> None:
    """Write an ext4 file system with the contents of `folder`; nothing is mounted for it."""
    _run("mkfs.ext4", "-q", "-L", label, "-d", folder, "-E", "lazy_itable_init=1", disk, size)


def _run(program: str, *arguments: str | os.PathLike[str]) -> None:
    command = [program, *(os.fspath(a) for a in arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"{program} failed:\n{done.stdout[-4000:]}")
