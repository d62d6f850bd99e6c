# SPDX-License-Identifier: Apache-2.0
"""`make run`: the server with its embedded defaults, and one pod brought up through its socket.

An image is made from the host's static busybox and pulled from a registry on loopback; a pod on a
bridge network runs its httpd. Then the server goes on until Ctrl-C, or ends at once with `--once`.
Either way all that was made is taken away again, and the exit status is 1 when something stays
(tests/residue.py). A host that has a CNI configuration keeps it; one without gets
`10-bridge.conflist` for the time of the run. Nothing survives a SIGKILL in an orderly way: the next
run finds the pod through the server and removes it.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from cri_server import config
from cri_server.pb import api_pb2 as api
from tests import residue
from tests.fakes import kubelet
from tests.lab import cgroups, image, network, registry, server, waiting

HERE = Path(__file__).resolve().parent
CONFLIST = HERE / "10-bridge.conflist"
DEFAULTS = config.Config()
ENDPOINT = DEFAULTS.server.listen
CGROUP = "/cri-server-demo"
SCRIPT = "echo httpd listens on port 80; exec httpd -f -p 80 -h /var/www"
T = TypeVar("T")

NEXT = """
The server goes on; Ctrl-C ends it and takes everything away. To look around:

    crictl --runtime-endpoint {endpoint} pods
    crictl --runtime-endpoint {endpoint} exec -s {container} ps
    crictl --runtime-endpoint {endpoint} logs {container}
    curl http://{address}/

and for a kubelet:

    kubelet --container-runtime-endpoint={endpoint}

The server's log: {log}
"""


def main() -> int:
    """Run the demonstration; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--once", action="store_true", help="end after the demonstration")
    options = parser.parse_args()
    if kubelet.is_ready(ENDPOINT):
        print(f"a server is running on {ENDPOINT} already", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, _interrupt)
    before = residue.take()
    folders = (DEFAULTS.server.root, DEFAULTS.server.state)
    marks = [*map(os.fspath, folders), CGROUP]
    with contextlib.ExitStack() as stack:
        marks.append(_demonstrate(stack, once=options.once))
    return _judge(residue.left(before, marks=marks, alone=False))


def _demonstrate(stack: contextlib.ExitStack, *, once: bool) -> str:
    """Do it all, leaving the clean-up on `stack`; returns the id of the pod that was there."""
    home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cri-demo-")))
    stack.enter_context(_folders_as_before())
    settings = _network(stack, home)
    stack.callback(cgroups.remove, CGROUP)
    log = home / "server.log"
    _timed("server started", lambda: stack.enter_context(_server(home, settings, log)))
    client = kubelet.Kubelet(ENDPOINT, cgroup_parent=CGROUP, prefix="demo")
    stack.callback(client.close)
    stack.callback(client.remove_own_pods)
    client.remove_own_pods()  # of a run that was killed
    reference = _pull(stack, client, home)
    pod, container = _run_pod(client, reference)
    address = client.pod_status(pod.id).status.network.ip
    _show(client, pod, container, address)
    if not once:
        words = {"endpoint": ENDPOINT, "container": container[:13], "address": address, "log": log}
        print(NEXT.format(**words), flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
    _timed("pod removed", client.remove_own_pods)
    client.remove_image(reference)
    return pod.id


# -- the parts, in the order of the demonstration --------------------------------------------------


def _network(stack: contextlib.ExitStack, home: Path) -> str:
    """Return the TOML of the server's configuration; "" means the embedded defaults.

    A host without a CNI configuration gets ours, in a temporary folder, for the time of the run.
    """
    folder = DEFAULTS.network.conf_dir
    if folder.is_dir() and any(
        p.suffix in (".conf", ".conflist", ".json") for p in folder.iterdir()
    ):
        print(f"the pod network is the one of {folder}")
        return ""
    document = json.loads(CONFLIST.read_text())
    bridge = document["plugins"][0]["bridge"]
    print(f"no CNI configuration in {folder}: using {CONFLIST.name} with the bridge {bridge}")
    if not Path("/sys/class/net", bridge).exists():
        stack.callback(network.remove, bridge=bridge, name=document["name"])
    (home / "net.d").mkdir()
    shutil.copy(CONFLIST, home / "net.d")
    return server.toml({"network": {"conf_dir": os.fspath(home / "net.d")}})


@contextlib.contextmanager
def _server(home: Path, settings: str, log: Path) -> Iterator[None]:
    command = [server.command(), "serve"]
    if settings:
        (home / "config.toml").write_text(settings)
        command += ["--config", os.fspath(home / "config.toml")]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    try:
        waiting.until(lambda: _is_up(process, log), "the server is ready", seconds=30)
        yield
    finally:
        process.terminate()
        process.wait(timeout=30)


def _is_up(process: "subprocess.Popen[bytes]", log: Path) -> bool:
    if process.poll() is not None:
        raise SystemExit(f"the server ended with {process.returncode}:\n{log.read_text()}")
    return kubelet.is_ready(ENDPOINT)


def _pull(stack: contextlib.ExitStack, client: kubelet.Kubelet, home: Path) -> str:
    store = stack.enter_context(registry.run(home / "registry"))
    image.push(image.busybox(), store.address, "demo/busybox", "latest")
    reference = f"{store.address}/demo/busybox:latest"
    found = _timed("image pulled", lambda: client.pull(reference))
    print(f"    {reference} is {found}")
    return reference


def _run_pod(client: kubelet.Kubelet, reference: str) -> tuple[kubelet.Pod, str]:
    pod = _timed("pod sandbox up", client.run_pod)
    run = _timed(
        "container up", lambda: client.run(pod, reference, ["sh", "-c", SCRIPT], name="web")
    )
    client.wait_log(run, "httpd")
    return pod, run


def _show(client: kubelet.Kubelet, pod: kubelet.Pod, container: str, address: str) -> None:
    print(f"    pod {pod.id[:13]} has the address {address}")
    for line in client.log(container):
        print(f"    its log: {line.time} {line.stream} {line.tag} {line.text}")
    command = ["wget", "-q", "-O", "-", "http://127.0.0.1/"]
    done = _timed("exec", lambda: client.exec_sync(container, command))
    print(f"    wget in the container, status {done.exit_code}: {done.stdout.decode().strip()}")
    stats = client.runtime.ContainerStats(api.ContainerStatsRequest(container_id=container)).stats
    memory = stats.memory.working_set_bytes.value / 1024
    cpu = stats.cpu.usage_core_nano_seconds.value / 1e6
    print(f"    its stats: {memory:.0f} KiB of memory, {cpu:.1f} ms of CPU")


def _timed(what: str, do: Callable[[], T]) -> T:
    begin = time.perf_counter()
    result = do()
    print(f"{what:16} {(time.perf_counter() - begin) * 1e3:8.1f} ms", flush=True)
    return result


# -- as before -------------------------------------------------------------------------------------


@contextlib.contextmanager
def _folders_as_before() -> Iterator[None]:
    """Remove the server's default folders at the end, unless they were there."""
    new = [p for p in (DEFAULTS.server.root, DEFAULTS.server.state) if not p.exists()]
    try:
        yield
    finally:
        for folder in new:
            shutil.rmtree(folder, ignore_errors=True)


def _judge(left: list[str]) -> int:
    for line in left:
        print(f"left behind: {line}", file=sys.stderr)
    if not left:
        print("nothing is left behind")
    return 1 if left else 0


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
