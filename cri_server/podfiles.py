# SPDX-License-Identifier: Apache-2.0
"""The files and mounts of a pod that its containers share.

    <state>/pods/<pod id>/
        shim.sock           the shim listens here
        ns/{user,ipc,uts}   pinned namespaces
        sandbox/            bundle of the sandbox container, where the pod has one
        shm/                /dev/shm: a tmpfs, unless the pod uses the host's IPC namespace
        hostname  hosts  resolv.conf
        sandbox.json  origins.json    for `cri-server explain`

Other users cannot enter, but for the root of the pod's own user namespace: it is what the OCI
runtime is when it looks for the sandbox container's root.

`create` and `remove` are a pair: `remove` takes away whatever is there and does not ask how far
`create` got. All functions block; callers run them in a thread.
"""

import os
import socket
from collections.abc import Sequence
from pathlib import Path

from cri_server import selinux_relabel, spec, state, trees
from cri_server.pb import api_pb2 as api
from cri_server.spec import why
from shim import mounts

ETC = ("hostname", "hosts", "resolv.conf")
_OPTIONS = "linux.security_context.namespace_options"


class PodFiles:
    """All pod directories below `<state>/pods`."""

    def __init__(self, state_dir: Path) -> None:
        self.root = state_dir / "pods"

    def directory(self, pod_id: str) -> Path:
        return self.root / pod_id

    def paths(self, pod_id: str) -> tuple[str, str, str]:
        """Return where the files of ETC are."""
        hostname, hosts, resolv_conf = (str(self.directory(pod_id) / name) for name in ETC)
        return hostname, hosts, resolv_conf

    def socket(self, pod_id: str) -> Path:
        return self.directory(pod_id) / "shim.sock"

    def bundle(self, pod_id: str) -> Path:
        return self.directory(pod_id) / "sandbox"

    def shm(self, pod: state.Pod) -> str:
        """Return what containers of the pod mount on /dev/shm."""
        if spec.own_ipc(pod.config):
            why.default("sandbox.shm", "a tmpfs that the containers share")
            return str(self.directory(pod.id) / "shm")
        why.pod("sandbox.shm", f"{_OPTIONS}.ipc", "the host's")
        return "/dev/shm"

    def namespaces(self, pod: state.Pod) -> dict[str, str]:
        """Return the paths of the namespaces that the pod's containers join, by OCI type.

        A type that is missing is the host's, except "pid", which then is each container's own
        matter.
        """
        pins = self.directory(pod.id) / "ns"
        _note_namespaces(pod)
        paths = {"network": pod.netns, "uts": str(pins / "uts")} if pod.own_network else {}
        if spec.own_ipc(pod.config):
            paths["ipc"] = str(pins / "ipc")
        if spec.ids(pod.config):
            paths["user"] = self.userns(pod)
        if pod.pid:
            paths["pid"] = f"/proc/{pod.pid}/ns/pid"
        return paths

    def userns(self, pod: state.Pod) -> str:
        """Return where the pod's user namespace is pinned, if it has its own."""
        return str(self.directory(pod.id) / "ns/user")

    def create(self, pod: state.Pod, *, shm_size: int, labels: spec.SelinuxLabels) -> None:
        """Make the directory, its files and the shm mount of `shm_size` bytes; `labels` are the
        pod's for SELinux, and the pod's root is the owner.
        """
        directory, owner = self.directory(pod.id), root_of(pod)
        directory.mkdir(parents=True, mode=0o700, exist_ok=True)
        admit(directory, owner)
        (directory / "ns").mkdir(mode=0o700)
        why.default("sandbox.files[/etc/hostname]", "the pod's host name")
        _write(directory / "hostname", hostname(pod) + "\n", owner)
        why.host("sandbox.files[/etc/hosts]", "a copy of the host's; the kubelet mounts its own")
        _write(directory / "hosts", _read("/etc/hosts") or "127.0.0.1\tlocalhost\n", owner)
        _write(directory / "resolv.conf", resolv_conf(pod.config.dns_config), owner)
        if spec.own_ipc(pod.config):
            belongs = (f"uid={owner[0]}", f"gid={owner[1]}")
            _mount_shm(directory / "shm", shm_size, (*belongs, *labels.mount_options))
        self.relabel(pod.id, labels.mount)

    def relabel(self, pod_id: str, label: str) -> None:
        """Give the files that containers share an SELinux label, "" for none."""
        for path in self.paths(pod_id) if label else ():
            selinux_relabel.relabel(os.path.realpath(path), label)

    def texts(self, pod_id: str) -> dict[str, str]:
        """Return what the pod's containers read in /etc, by path there."""
        paths = zip(ETC, self.paths(pod_id), strict=True)
        return {f"/etc/{name}": _read(path) for name, path in paths}

    def remove(self, pod_id: str) -> None:
        """Take away every mount below the directory, then the directory. Idempotent."""
        directory = self.directory(pod_id)
        for target in mounts.mounts_below(os.fspath(directory)):
            mounts.unmount(target)
        trees.remove(directory)


def _note_namespaces(pod: state.Pod) -> None:
    whose = {True: "the pod's own", False: "the host's"}
    for kind, field in (("network", "network"), ("uts", "network"), ("ipc", "ipc")):
        own = spec.own_ipc(pod.config) if kind == "ipc" else pod.own_network
        why.pod(f"sandbox.namespaces[{kind}]", f"{_OPTIONS}.{field}", whose[own])
    own = spec.ids(pod.config) is not None
    why.pod("sandbox.namespaces[user]", f"{_OPTIONS}.userns_options", whose[own])


def root_of(pod: state.Pod) -> tuple[int, int]:
    """Return uid and gid of the pod's root on the host."""
    mapped = spec.ids(pod.config)
    return mapped.owner(0, 0) if mapped else (0, 0)


def admit(directory: Path, owner: tuple[int, int]) -> None:
    """Let the group of a pod's root pass through a directory of ours, and nobody else."""
    if owner != (0, 0):
        os.chown(directory, 0, owner[1])
        directory.chmod(0o710)


def own_hostname(pod: state.Pod) -> str:
    """Return the name that the pod's UTS namespace gets, "" where that is the host's."""
    return hostname(pod) if pod.own_network else ""


def hostname(pod: state.Pod) -> str:
    """Return the pod's host name: as asked for, the host's on its network, else a short id."""
    if pod.config.hostname:
        why.pod("sandbox.hostname", "hostname")
        return pod.config.hostname
    if pod.own_network:
        why.default("sandbox.hostname", "the request names none: the first digits of the id")
        return pod.id[:12]
    why.pod("sandbox.hostname", f"{_OPTIONS}.network", "the host's")
    return socket.gethostname()


def resolv_conf(dns: api.DNSConfig) -> str:
    """Return the text of /etc/resolv.conf (CRI DNSConfig); an empty config means the host's."""
    why.pod("sandbox.files[/etc/resolv.conf]", "dns_config")
    if not (dns.servers or dns.searches or dns.options):
        why.host("sandbox.files[/etc/resolv.conf]", "a copy of the host's, as dns_config is empty")
        return _read("/etc/resolv.conf")
    lines = [f"search {' '.join(dns.searches)}"] if dns.searches else []
    lines += [f"nameserver {server}" for server in dns.servers]
    lines += [f"options {' '.join(dns.options)}"] if dns.options else []
    return "".join(f"{line}\n" for line in lines)


def _mount_shm(target: Path, size: int, more: Sequence[str]) -> None:
    target.mkdir(mode=0o1777)
    options = ("nosuid", "nodev", "noexec", "mode=1777", f"size={size}", *more)
    mounts.mount_all(
        [mounts.Mount(type="tmpfs", source="shm", target=os.fspath(target), options=options)]
    )


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def _write(path: Path, text: str, owner: tuple[int, int]) -> None:
    path.write_text(text, encoding="utf-8")
    path.chmod(0o644)
    os.chown(path, *owner)
