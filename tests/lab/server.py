# SPDX-License-Identifier: Apache-2.0
"""The real server as a subprocess, on temporary folders, with a socket of its own.

`Site` is where a server lives; it can be started, killed and started again on the same folders,
which is how crashes are tested. Shims outlive the server on purpose: whoever made pods removes them
through the socket. Paths are short, since the path of a shim's socket (state, pod id) must fit into
107 bytes.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fakes import kubelet
from tests.lab import waiting

SECRET = f"secret-{os.urandom(12).hex()}"  # in every server's environment; it must never come out


@dataclass(kw_only=True, slots=True)
class Site:
    """The folders of one server below `home`, its settings, and its process while it runs.

    `program` is what is run in place of `cri-server`, with the same arguments; `umask` is what it
    inherits, -1 for ours.
    """

    home: Path
    settings: Mapping[str, Mapping[str, Any]]
    program: Sequence[str] = ()
    umask: int = -1
    process: "subprocess.Popen[bytes] | None" = field(default=None, init=False)

    @property
    def endpoint(self) -> str:
        return f"unix://{self.home}/cri.sock"

    @property
    def log(self) -> Path:
        """What the server has written to stderr, over all its lives."""
        return self.home / "server.log"

    @property
    def root(self) -> Path:
        return self.home / "root"

    @property
    def state(self) -> Path:
        return self.home / "run"

    def start(self, *, wait: bool = True) -> None:
        """Start the server; with `wait`, return when it serves and says that it is ready."""
        config = self.home / "config.toml"
        config.write_text(toml(self._complete()))
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*(self.program or [command()]), "serve", "--config", config],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "CRI_TESTS_SECRET": SECRET},
                start_new_session=True,
                umask=self.umask,
            )
        if wait:
            waiting.until(self._ready, "the server is ready", seconds=30)

    def stop(self) -> int:
        """End the server with SIGTERM and return its exit status."""
        return self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End the server with SIGKILL, as a crash would."""
        self._end(signal.SIGKILL)

    def wait_death(self) -> int:
        """Return the exit status when the server has ended by itself."""
        process, self.process = self.process, None
        assert process is not None, "the server is not running"
        return process.wait(timeout=waiting.patient(30))

    @property
    def pid(self) -> int:
        assert self.process is not None, "the server is not running"
        return self.process.pid

    def _end(self, number: signal.Signals) -> int:
        process, self.process = self.process, None
        if process is None:
            return 0
        process.send_signal(number)
        return process.wait(timeout=waiting.patient(30))

    def _ready(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise AssertionError(f"the server ended with {self.process.returncode}:\n{self.tail()}")
        return kubelet.is_ready(self.endpoint)

    def tail(self, size: int = 4000) -> str:
        """The end of the server's log, for messages."""
        return self.log.read_bytes()[-size:].decode(errors="replace")

    def _complete(self) -> dict[str, dict[str, Any]]:
        server = {
            "listen": self.endpoint,
            "root": os.fspath(self.root),
            "state": os.fspath(self.state),
            "log_level": "debug",
            "log_format": "json",
        }
        given = {name: dict(table) for name, table in self.settings.items()}
        return {**given, "server": {**server, **given.get("server", {})}}


@contextlib.contextmanager
def site(settings: Mapping[str, Mapping[str, Any]], *, prefix: str = "cri-") -> Iterator[Site]:
    """Make the folders of a server and remove them, and the server if it still runs, at the end."""
    home = Path(tempfile.mkdtemp(prefix=prefix, dir="/tmp"))
    home.chmod(0o711)  # the roots of pods with user namespaces look for their containers below it
    made = Site(home=home, settings=settings)
    try:
        yield made
    finally:
        made.stop()
        shutil.rmtree(home, onerror=_keep_what_is_mounted)


def command() -> str:
    """Return the installed `cri-server` of this interpreter's environment."""
    return os.fspath(Path(sys.executable).parent / "cri-server")


def toml(document: Mapping[str, Mapping[str, Any]]) -> str:
    """Write tables of strings, numbers, booleans, lists of strings and tables of such as TOML
    (JSON's scalars are TOML's).
    """
    lines = []
    for table, values in document.items():
        lines.append(f"[{table}]")
        lines += [f"{key} = {_value(value)}" for key, value in values.items()]
    return "\n".join(lines) + "\n"


def _value(value: object) -> str:
    if not isinstance(value, Mapping):
        return json.dumps(value)
    return f"{{ {', '.join(f'{key} = {_value(inner)}' for key, inner in value.items())} }}"


def _keep_what_is_mounted(_function: object, path: str, error: Any) -> None:
    print(f"left behind: {path}: {error[1]}", file=sys.stderr)
