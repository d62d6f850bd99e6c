# SPDX-License-Identifier: Apache-2.0
"""The files and mounts of a pod that its containers share.

    <state>/pods/<pod id>/
        shim.sock           the shim listens here
        ns/{ipc,uts}        pinned namespaces
        sandbox/            bundle of the sandbox container, where the pod has one
        shm/                /dev/shm: a tmpfs, unless the pod uses the host's IPC namespace
        hostname  hosts  resolv.conf

`create` and `remove` are a pair: `remove` takes away whatever is there and does not ask how far
`create` got. All functions block; callers run them in a thread.
"""

import os
import shutil
import socket
from collections.abc import Sequence
from pathlib import Path

from cri_server import relabel, spec, state
from cri_server.pb import api_pb2 as api
from shim import mounts


class PodFiles:
    """All pod directories below `<state>/pods`."""

    def __init__(self, state_dir: Path) -> None:
        self.root = state_dir / "pods"

    def directory(self, pod_id: str) -> Path:
        return self.root / pod_id

    def socket(self, pod_id: str) -> Path:
        return self.directory(pod_id) / "shim.sock"

    def bundle(self, pod_id: str) -> Path:
        return self.directory(pod_id) / "sandbox"

    def shm(self, pod: state.Pod) -> str:
        """Return what containers of the pod mount on /dev/shm."""
        return str(self.directory(pod.id) / "shm") if own_ipc(pod.config) else "/dev/shm"

    def namespaces(self, pod: state.Pod) -> dict[str, str]:
        """Return the paths of the namespaces that the pod's containers join, by OCI type.

        A type that is missing is the host's, except "pid", which then is each container's own
        matter.
        """
        pins = self.directory(pod.id) / "ns"
        paths = {"network": pod.netns, "uts": str(pins / "uts")} if pod.own_network else {}
        if own_ipc(pod.config):
            paths["ipc"] = str(pins / "ipc")
        if pod.pid:
            paths["pid"] = f"/proc/{pod.pid}/ns/pid"
        return paths

    def create(self, pod: state.Pod, *, shm_size: int, labels: spec.Labels) -> None:
        """Make the directory, its files and the shm mount of `shm_size` bytes; `labels` are the
        pod's for SELinux.
        """
        directory = self.directory(pod.id)
        (directory / "ns").mkdir(parents=True, mode=0o700)
        _write(directory / "hostname", hostname(pod) + "\n")
        _write(directory / "hosts", _read("/etc/hosts") or "127.0.0.1\tlocalhost\n")
        _write(directory / "resolv.conf", resolv_conf(pod.config.dns_config))
        if own_ipc(pod.config):
            _mount_shm(directory / "shm", shm_size, labels.mount_options)
        self.relabel(pod.id, labels.mount)

    def relabel(self, pod_id: str, label: str) -> None:
        """Give the files that containers share an SELinux label, "" for none."""
        for name in ("hostname", "hosts", "resolv.conf") if label else ():
            relabel.relabel(os.path.realpath(self.directory(pod_id) / name), label)

    def remove(self, pod_id: str) -> None:
        """Take away every mount below the directory, then the directory. Idempotent."""
        directory = self.directory(pod_id)
        for target in mounts.mounts_below(os.fspath(directory)):
            mounts.unmount(target)
        shutil.rmtree(directory, ignore_errors=False) if directory.exists() else None


def own_ipc(config: api.PodSandboxConfig) -> bool:
    options = config.linux.security_context.namespace_options
    return options.ipc != api.NamespaceMode.NODE


def hostname(pod: state.Pod) -> str:
    """Return the pod's host name: as asked for, the host's on its network, else a short id."""
    if pod.config.hostname:
        return pod.config.hostname
    return pod.id[:12] if pod.own_network else socket.gethostname()


def resolv_conf(dns: api.DNSConfig) -> str:
    """Return the text of /etc/resolv.conf (CRI DNSConfig); an empty config means the host's."""
    if not (dns.servers or dns.searches or dns.options):
        return _read("/etc/resolv.conf")
    lines = [f"search {' '.join(dns.searches)}"] if dns.searches else []
    lines += [f"nameserver {server}" for server in dns.servers]
    lines += [f"options {' '.join(dns.options)}"] if dns.options else []
    return "".join(f"{line}\n" for line in lines)


def _mount_shm(target: Path, size: int, label: Sequence[str]) -> None:
    target.mkdir(mode=0o1777)
    options = ("nosuid", "nodev", "noexec", "mode=1777", f"size={size}", *label)
    mounts.mount_all(
        [mounts.Mount(type="tmpfs", source="shm", target=os.fspath(target), options=options)]
    )


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    path.chmod(0o644)
