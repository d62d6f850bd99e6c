# SPDX-License-Identifier: Apache-2.0
"""`cri-server reset`: every pod ends, then the server, then what it kept is removed.

    1  refuse     while a kubelet is connected: it would make its pods anew
    2  server     the one that runs; where none does, one in this process on a socket of its own,
                  which takes up what a dead one left, as any start does
    3  pods       each container has the grace to end; StopPodSandbox and RemovePodSandbox give back
                  network, mounts, cgroups and records
    4  server     its unit is stopped, or it gets SIGTERM
    5  folders    what is ours below root and state, and the socket; what is not ours stays

A pod that cannot be removed ends it before 4: its record is what a next try needs. Each step can be
repeated, so a reset that was interrupted is run again. Images go, since they can be pulled again.
Configuration, unit and program are `deploy/uninstall.sh`'s.
"""

import asyncio
import contextlib
import dataclasses
import errno
import os
import signal
import stat
import sys
import time
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

from cri_server import commands, config, errors, logs, sockets, trees
from cri_server.pb import api_pb2 as api
from cri_server.services import client
from shim import mounts, process

KUBELET = "kubelet"
OF_ROOT = (
    "blobs", "containers", "empty", "handlers", "images", "layers", "pods", "tmp", "writable",
)  # fmt: skip
OF_STATE = ("pods", "containers", "runtimes")
PRIVATE = "reset.sock"
AT_ONCE = 8  # pods
PATIENCE = 120.0  # seconds for a server that starts
STOP_TIMEOUT = 90.0  # seconds, more than the unit's TimeoutStopSec
REMOVE_TIMEOUT = 300.0  # seconds for the network of one pod, on top of the grace


class Stuck(Exception):
    """What keeps the reset from going on, for a person."""


def run(settings: config.Config, *, grace: int, force: bool) -> int:
    """Reset; say what is done; return the exit status. `grace` is in seconds, for each container;
    `force` goes on although a kubelet is connected."""
    logs.configure("error", settings.server.log_format)
    process.keep_descriptors()
    os.umask(0o022)
    try:
        if not force:
            _refuse_kubelet(settings)
        asyncio.run(_reset(settings, grace))
    except (Stuck, client.Refused, errors.CriError, OSError) as e:
        print(f"cri-server: reset: {e}", file=sys.stderr)
        return 1
    return 0


def _refuse_kubelet(settings: config.Config) -> None:
    connected = sockets.clients(_path(settings))
    pids = [str(pid) for pid, name in connected.items() if name == KUBELET]
    if pids:
        raise Stuck(
            f"a kubelet is connected (pid {', '.join(pids)}): drain the node, stop it, or --force"
        )


async def _reset(settings: config.Config, grace: int) -> None:
    pid = sockets.listener(_path(settings))
    if pid is not None:
        await _end_pods(settings.server.listen, grace)
        await _end_server(pid)
        if sockets.listener(_path(settings)) is not None:
            raise Stuck("the server was started anew by somebody else: stop that first")
    # None ran; or pods were made while it went, by a kubelet that was not heeded.
    if _pods(settings) if pid is not None else _remains(settings):
        async with _own_server(settings) as address:
            await _end_pods(address, grace)
    await asyncio.to_thread(_remove_folders, settings)


def _path(settings: config.Config) -> Path:
    return Path(settings.server.listen.removeprefix("unix://"))


def _remains(settings: config.Config) -> bool:
    """Say whether a server has ever been here: one that starts makes these folders."""
    return any((settings.server.root / name).exists() for name in OF_ROOT)


def _pods(settings: config.Config) -> bool:
    return any((settings.server.root / "pods").glob("*.json"))


@contextlib.asynccontextmanager
async def _own_server(settings: config.Config) -> AsyncIterator[str]:
    """Have a server in this process for the block; its recovery ends what no record names."""
    from cri_server import server

    print("no server runs: taking up what is left")
    address = f"unix://{settings.server.state / PRIVATE}"
    private = dataclasses.replace(settings.server, listen=address, crio_socket="")
    async with server.running(dataclasses.replace(settings, server=private)):
        yield address


# ---- pods


async def _end_pods(address: str, grace: int) -> None:
    async with client.connect(address, patience=PATIENCE) as peer:
        listed = await client.said(lambda: peer.runtime.ListPodSandbox(api.ListPodSandboxRequest()))
        gate = asyncio.Semaphore(AT_ONCE)
        failed = await asyncio.gather(
            *(_end_pod(peer, pod, grace, gate) for pod in listed.items), return_exceptions=True
        )
        told = [f"pod {p.id[:13]}: {e}" for p, e in zip(listed.items, failed, strict=True) if e]
        if told:
            raise Stuck(f"{len(told)} pods not removed, nothing else was: {'; '.join(told)}")


async def _end_pod(
    peer: client.Client, pod: api.PodSandbox, grace: int, gate: asyncio.Semaphore
) -> None:
    async with gate:
        wanted = api.ContainerFilter(pod_sandbox_id=pod.id)
        inside = await client.said(
            lambda: peer.runtime.ListContainers(api.ListContainersRequest(filter=wanted))
        )
        await asyncio.gather(*(_stop(peer, c, grace) for c in inside.containers))
        stop = api.StopPodSandboxRequest(pod_sandbox_id=pod.id)
        remove = api.RemovePodSandboxRequest(pod_sandbox_id=pod.id)
        await client.said(lambda: peer.runtime.StopPodSandbox(stop, timeout=REMOVE_TIMEOUT))
        await client.said(lambda: peer.runtime.RemovePodSandbox(remove, timeout=REMOVE_TIMEOUT))
        print(f"removed pod {pod.metadata.namespace}/{pod.metadata.name} {pod.id[:13]}")


async def _stop(peer: client.Client, container: api.Container, grace: int) -> None:
    request = api.StopContainerRequest(container_id=container.id, timeout=grace)
    await client.said(lambda: peer.runtime.StopContainer(request, timeout=grace + REMOVE_TIMEOUT))


# ---- the server


async def _end_server(pid: int) -> None:
    """Stop the unit whose main process this is, else the process. Raises Stuck, CriError."""
    unit = await _unit(pid)
    if unit:
        await commands.run(["systemctl", "stop", unit], timeout=STOP_TIMEOUT)
    else:
        started = process.start_time(pid)
        os.kill(pid, signal.SIGTERM)
        await _wait_end(pid, started)
    print(f"stopped the server ({unit or f'pid {pid}'})")


async def _unit(pid: int) -> str:
    """Return the service whose main process this is, "" when it is none's."""
    for unit in _services(pid):
        asked = ["systemctl", "show", "--property=MainPID", "--value", unit]
        shown = await commands.run(asked, timeout=STOP_TIMEOUT)
        if shown.stdout.decode().strip() == str(pid):
            return unit
    return ""


def _services(pid: int) -> set[str]:
    """Return the services in whose cgroup a process is, where systemd is the init."""
    if not Path("/run/systemd/system").is_dir():
        return set()
    lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    return {line.rpartition("/")[2] for line in lines if line.endswith(".service")}


async def _wait_end(pid: int, started: int) -> None:
    deadline = time.monotonic() + STOP_TIMEOUT
    while process.alive(pid, started):
        if time.monotonic() > deadline:
            raise Stuck(f"the server (pid {pid}) does not end")
        await asyncio.sleep(0.05)


# ---- folders


def _remove_folders(settings: config.Config) -> None:
    server = settings.server
    for folder in (server.state, server.root):
        for point in mounts.mounts_below(os.fspath(folder)):
            if Path(point) != folder:  # a file system of its own is the administrator's
                mounts.unmount(point)
    socket = _path(settings)
    _remove_ours(server.state, (*OF_STATE, PRIVATE, *_within(socket, server.state)))
    _remove_ours(server.root, OF_ROOT)
    for path in (socket, Path(server.crio_socket)):
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISSOCK(path.lstat().st_mode):
                path.unlink()


def _within(path: Path, folder: Path) -> tuple[str, ...]:
    return (path.name,) if path.parent == folder else ()


def _remove_ours(folder: Path, names: Iterable[str]) -> None:
    """Remove what is ours in a folder, and the folder when that was all. Raises OSError."""
    for name in names:
        trees.remove(folder / name)
    try:
        folder.rmdir()
        print(f"removed {folder}")
    except FileNotFoundError:
        pass
    except OSError as e:
        if e.errno not in (errno.ENOTEMPTY, errno.EBUSY):
            raise
        others = ", ".join(sorted(os.listdir(folder))) or "it is a mount point"
        print(f"left {folder}: {others}")
