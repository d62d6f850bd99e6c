# SPDX-License-Identifier: Apache-2.0
"""Our server and Debian's containerd, side by side: `make bench`, `make bench-streams`.

    python -m bench.peers pods|streams [options of bench.pods or bench.streams]

Both get the same runc, the same CNI configuration (bridge and portmap), the same registry and
image, and folders of their own that are removed at the end. The pause image that containerd needs
is made from Debian's catatonit.
"""

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench import page, pods, streams
from tests.fakes import kubelet
from tests.lab import cgroups, image, network, registry, server, waiting

KINDS = {"pods": pods, "streams": streams}
SHIM = "containerd-shim-runc-v2"  # a handler too, by the shim that containerd runs runc by
HANDLERS = {"pods": f"runc,crun,{SHIM}", "streams": "runc"}
CONTAINERD = """\
version = 2
root = "{home}/root"
state = "{home}/run"
disabled_plugins = ["io.containerd.internal.v1.opt"]

[grpc]
address = "{home}/cri.sock"

[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{pause}"
restrict_oom_score_adj = true

[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/usr/lib/cni"
conf_dir = "{conf}"

[plugins."io.containerd.grpc.v1.cri".registry]
config_path = "{hosts}"

[plugins."io.containerd.grpc.v1.cri".containerd]
default_runtime_name = "runc"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
"""


def main() -> int:
    """Set both up, measure, take both down."""
    kind = sys.argv.pop(1)
    options = _options(KINDS[kind].arguments(), kind)
    rows = _measure(kind, options)
    misses = pods.missed(rows, KINDS[kind].LIMITS)
    if options.page:
        page.write(kind, rows, misses)
    if options.page and kind == "pods":
        page.plot("performance", rows)
    return pods.report(rows, misses, as_json=options.json)


def _options(parser: argparse.ArgumentParser, kind: str) -> argparse.Namespace:
    parser.add_argument("--ours-only", action="store_true", help="leave containerd out")
    parser.add_argument("--page", action="store_true", help="write the result into docs/")
    parser.add_argument(
        "--handlers",
        type=_handlers,
        default=_handlers(HANDLERS[kind]),
        help=f"handlers of ours, side by side; the first is judged ({HANDLERS[kind]})",
    )
    return parser.parse_args()


def _measure(kind: str, options: argparse.Namespace) -> list[pods.Row]:
    net = network.own("crib")
    with contextlib.ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp")))
        if "ours-crun" in options.handlers:  # unmounted last, when no cgroup is left in it
            stack.enter_context(cgroups.hugetlb())
        stack.callback(cgroups.remove, f"/{net.name}")
        stack.callback(net.remove)
        sockets, reference = _set_up(stack, home, net, options)
        parent = f"/{net.name}"
        rows: list[pods.Row] = KINDS[kind].run(sockets, reference, options, cgroup_parent=parent)
        return rows


def _set_up(
    stack: contextlib.ExitStack, home: Path, net: network.Network, options: argparse.Namespace
) -> tuple[dict[str, str], str]:
    store = stack.enter_context(registry.run(home / "registry"))
    reference = store.push(image.busybox(), "bench/busybox")
    pause = store.push(pause_image(), "bench/pause")
    hosts, conf = store.hosts(home / "certs.d"), net.write(home / "net.d")
    settings: dict[str, dict[str, Any]] = {
        "server": {"log_level": "info"},
        "network": {"conf_dir": os.fspath(conf)},
        "images": {"registry_config_dirs": [os.fspath(hosts)]},
        "runtime": {"default": "runc"},
        f"runtimes.{SHIM}": {"kind": "shim"},
    }
    site = stack.enter_context(server.site(settings, prefix="crib-"))
    site.start()
    sockets = {name: f"{site.endpoint}#{chosen}" for name, chosen in options.handlers.items()}
    if not options.ours_only:
        text = CONTAINERD.format(home=home / "c", pause=pause, conf=conf, hosts=hosts)
        sockets["containerd"] = stack.enter_context(containerd(home / "c", text))
    return sockets, reference


def _handlers(text: str) -> dict[str, str]:
    """Return the handlers of "crun,runc" by the names that they have in the table."""
    return {f"ours-{handler.removeprefix('containerd-')}": handler for handler in text.split(",")}


def pause_image() -> image.Image:
    """Make the image of containerd's sandbox containers: catatonit, told to pause."""
    program = Path(shutil.which("catatonit") or "catatonit")
    entry = image.Entry(name="pause", data=program.read_bytes(), mode=0o755)
    return image.image([image.tar([entry])], {"Entrypoint": ["/pause", "-P"]})


@contextlib.contextmanager
def containerd(home: Path, config: str) -> Iterator[str]:
    """Run containerd with `config` in `home`; yields its endpoint when it is ready."""
    home.mkdir(parents=True)
    (home / "config.toml").write_text(config)
    program = shutil.which("containerd") or "containerd"
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(
            [program, "--config", home / "config.toml"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    endpoint = f"unix://{home}/cri.sock"
    try:
        waiting.until(lambda: kubelet.is_ready(endpoint), "containerd is ready", seconds=30)
        yield endpoint
    finally:
        process.terminate()
        process.wait(timeout=30)


if __name__ == "__main__":
    sys.exit(main())
