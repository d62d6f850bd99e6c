# SPDX-License-Identifier: Apache-2.0
"""CNI plugins that do as a test says, and remember how they were called.

    <directory>/
        bin/NAME  bin/NAME.d/VERB     the plugin (plugin.sh); shell lines that it runs for a verb
        bin/calls/                    one line per call in `log`, environment and input beside it
        net.d/  cache/                configuration and result cache of a `Network`

A verb without lines succeeds and says nothing. `once` makes lines that are used up; `HANG` waits
for ever with a child that does too.
"""

import asyncio
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cri_server import config
from cri_server.network import cni

HANG = 'sleep 1000 & echo $! >"$calls/hanging"; wait'
IFB = {"name": "vethfake"}
ETH0 = {"name": "eth0", "sandbox": "/run/netns/fake"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One call."""

    plugin: str
    verb: str
    pid: int
    env: dict[str, str]
    stdin: dict[str, Any]


class Fakes:
    """A host with fake plugins."""

    def __init__(self, directory: Path) -> None:
        self.bin, self.net, self.cache = (directory / n for n in ("bin", "net.d", "cache"))
        self._calls = self.bin / "calls"
        self._calls.mkdir(parents=True)
        self.net.mkdir()

    def settings(self, **changes: Any) -> config.Network:
        return config.Network(
            conf_dir=self.net, bin_dirs=(self.bin,), cache_dir=self.cache, **changes
        )

    def install(self, name: str, **verbs: str) -> None:
        """Install the plugin `name`, or change what it does."""
        shutil.copy(Path(__file__).with_name("plugin.sh"), self.bin / name)
        (self.bin / name).chmod(0o755)
        (self.bin / f"{name}.d").mkdir(exist_ok=True)
        for verb, lines in verbs.items():
            (self.bin / f"{name}.d" / verb).write_text(lines + "\n")

    def uninstall(self, name: str) -> None:
        (self.bin / name).unlink()

    def configure(
        self, *plugins: str | dict[str, Any], version: str = "1.0.0", name: str = "fakenet"
    ) -> None:
        """Write the only configuration: a list of these plugins."""
        links = [{"type": p} if isinstance(p, str) else p for p in plugins]
        document = {"cniVersion": version, "name": name, "plugins": links}
        (self.net / "10-fake.conflist").write_text(json.dumps(document))

    def calls(self) -> list[Record]:
        """Return all calls in the order in which they were made."""
        log = self._calls / "log"
        lines = log.read_text().splitlines() if log.exists() else []
        return [self._record(*line.split()) for line in lines]

    def verbs(self) -> list[str]:
        """Return all calls as "plugin VERB"."""
        return [f"{r.plugin} {r.verb}" for r in self.calls()]

    def _record(self, plugin: str, verb: str, pid: str) -> Record:
        env = (self._calls / f"{pid}.env").read_text().splitlines()
        stdin = (self._calls / f"{pid}.stdin").read_text()
        return Record(
            plugin=plugin,
            verb=verb,
            pid=int(pid),
            env=dict(line.split("=", 1) for line in env if "=" in line),
            stdin=json.loads(stdin or "{}"),
        )

    def hanging(self) -> list[int]:
        """Return the ids of the plugin in `HANG` and of its child; none before it is there."""
        file = self._calls / "hanging"
        text = file.read_text() if file.exists() else ""
        return [self.calls()[-1].pid, int(text)] if text.strip() else []

    def cached(self) -> list[str]:
        """Return the names in the result cache."""
        folder = self.cache / "results"
        return sorted(p.name for p in folder.iterdir()) if folder.exists() else []


def result(*ips: str, version: str = "1.0.0", **more: Any) -> str:
    """Return lines that print an ADD result with these addresses on eth0."""
    listed: list[dict[str, Any]] = [{"interface": 1, "address": ip} for ip in ips]
    if version < "1.0.0":
        for ip in listed:
            ip["version"] = "6" if ":" in ip["address"] else "4"
    return say({"cniVersion": version, "interfaces": [IFB, ETH0], "ips": listed, **more})


def say(document: object) -> str:
    """Return lines that print JSON."""
    return f"cat <<'JSON'\n{json.dumps(document)}\nJSON"


def fail(message: str, code: int = 100, details: str = "") -> str:
    """Return lines that fail as the CNI specification asks."""
    return say({"code": code, "msg": message, "details": details}) + "\nexit 1"


def once(lines: str) -> str:
    """Return lines that are used up by the first call."""
    return f'rm "$action"\n{lines}'


def attachment(pod_id: str = "pod1", **changes: Any) -> cni.Attachment:
    values = {"pod_id": pod_id, "netns": "", "name": "web", "namespace": "shop", "uid": "u-1"}
    return cni.Attachment(**{**values, **changes})


async def until(condition: Callable[[], object], what: str, *, seconds: float = 10.0) -> None:
    """Wait for a condition without stopping the loop; AssertionError after `seconds`."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    while not condition():
        assert loop.time() < deadline, f"waited {seconds:g} s in vain: {what}"
        await asyncio.sleep(0.005)
