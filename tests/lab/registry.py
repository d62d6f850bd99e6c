# SPDX-License-Identifier: Apache-2.0
"""A real registry (Debian's docker-registry) on a free loopback port, with its data in a given
folder.

`hosts` writes the containerd-style `hosts.toml` that makes a made-up domain mean this registry, so
that references look as they do in production. Ends with the block; its folder is the caller's to
remove.
"""

import contextlib
import http.client
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.lab import image, waiting

DOMAIN = "registry.test"
CONFIG = """\
version: 0.1
log: {{level: error, accesslog: {{disabled: true}}}}
storage: {{filesystem: {{rootdirectory: "{data}"}}, delete: {{enabled: true}}}}
http: {{addr: "{address}"}}
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Registry:
    """A running registry: `address` is "127.0.0.1:port"."""

    address: str
    pid: int

    def push(self, what: image.Image, name: str, *, tag: str = "latest") -> str:
        """Store an image and return its reference by tag under DOMAIN."""
        image.push(what, self.address, name, tag)
        return f"{DOMAIN}/{name}:{tag}"

    def hosts(self, folder: Path, *domains: str) -> Path:
        """Write `<folder>/<domain>/hosts.toml` for DOMAIN and `domains`; returns `folder`."""
        for domain in (DOMAIN, *domains):
            (folder / domain).mkdir(parents=True, exist_ok=True)
            (folder / domain / "hosts.toml").write_text(
                f'server = "http://{self.address}"\n\n[host."http://{self.address}"]\n'
                'capabilities = ["pull", "resolve"]\n'
            )
        return folder


@contextlib.contextmanager
def run(folder: Path) -> Iterator[Registry]:
    """Run a registry that keeps its data below `folder`; yields when it answers."""
    folder.mkdir(parents=True, exist_ok=True)
    address = f"127.0.0.1:{free_port()}"
    config = folder / "registry.yml"
    config.write_text(CONFIG.format(data=folder / "data", address=address))
    program = shutil.which("docker-registry") or "docker-registry"
    with (folder / "registry.log").open("wb") as log:
        process = subprocess.Popen(
            [program, "serve", config],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, "OTEL_TRACES_EXPORTER": "none"},
            start_new_session=True,
        )
    try:
        waiting.until(lambda: _answers(address, process), "the registry answers", seconds=20)
        yield Registry(address=address, pid=process.pid)
    finally:
        process.terminate()
        process.wait(timeout=20)


def free_port() -> int:
    """Return a TCP port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _answers(address: str, process: "subprocess.Popen[bytes]") -> bool:
    if process.poll() is not None:
        raise RuntimeError(f"docker-registry ended with status {process.returncode}")
    connection = http.client.HTTPConnection(address, timeout=5)
    try:
        connection.request("GET", "/v2/")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()
