# SPDX-License-Identifier: Apache-2.0
"""One run of one plugin: environment and JSON in, JSON out, and what its failure means.

A plugin is a program in one of the plugin directories. It runs in the server's environment plus
CNI_*, in a process group of its own that is killed as a whole when its time is up or its caller is
cancelled. Every error names the network, the plugin and the verb, and carries the first line of
what the plugin said. Nothing is remembered here.
"""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import msgspec
import structlog

from cri_server import commands, errors
from cri_server.network import conf
from shim import process

log = structlog.get_logger()
MAX_OUTPUT = 1 << 20
TRY_AGAIN_LATER = 11  # CNI specification, "Error"
NOT_AVAILABLE = (50, 51)  # the same, for STATUS


class Verb(StrEnum):
    """CNI_COMMAND."""

    ADD = "ADD"
    DEL = "DEL"
    CHECK = "CHECK"
    STATUS = "STATUS"
    GC = "GC"
    VERSION = "VERSION"


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """For whom plugins are run. `capabilities` are all that the runtime has to say, unfiltered."""

    container_id: str
    ifname: str
    netns: str
    args: tuple[tuple[str, str], ...] = ()
    capabilities: Mapping[str, object] = field(default_factory=dict)

    def environment(self) -> dict[str, str]:
        return {
            "CNI_CONTAINERID": self.container_id,
            "CNI_IFNAME": self.ifname,
            "CNI_NETNS": self.netns,
            "CNI_ARGS": ";".join(f"{key}={value}" for key, value in self.args),
        }


class Plugins:
    """The plugin directories; the first that has a program wins."""

    def __init__(self, directories: Sequence[Path]) -> None:
        self._directories = tuple(os.fspath(d) for d in directories)
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("CNI_")}
        # Portmap and others look for iptables in PATH, and a service's may lack /usr/sbin.
        path = ":".join(filter(None, (inherited.get("PATH"), process.DEFAULT_PATH)))
        self._environment = {
            **process.DEFAULT_ENV,
            **inherited,
            "PATH": path,
            "CNI_PATH": ":".join(self._directories),
        }

    def find(self, name: str) -> str:
        """Return the path of a plugin's program, "" when no directory has it."""
        for directory in self._directories:
            candidate = f"{directory}/{name}"
            if os.path.isfile(candidate) and os.access(candidate, os.X_OK):
                return candidate
        return ""

    def missing(self, chain: conf.Chain) -> str:
        """Say which plugins of a chain are not installed; "" when all are."""
        absent = [f"{p.type!r}" for p in chain.plugins if not self.find(p.type)]
        return f"CNI plugin {', '.join(absent)} not found in {self._where()}" if absent else ""

    async def run(
        self,
        verb: Verb,
        name: str,
        *,
        network: str,
        document: Mapping[str, object],
        call: Call | None = None,
        timeout: float,
    ) -> bytes:
        """Run the plugin `name` and return what it printed, at most MAX_OUTPUT bytes.

        Raises Unavailable when it is not installed or says "try again later", DeadlineExceeded
        after `timeout` seconds, Internal when it fails otherwise.
        """
        began = time.perf_counter()
        program = self.find(name)
        if not program:
            raise errors.Unavailable(failure(network, name, verb, f"not found in {self._where()}"))
        try:
            finished = await commands.run(
                [program],
                env=self._environment_of(verb, call),
                stdin=msgspec.json.encode(document),
                timeout=max(timeout, 0.0),
                check=False,
                max_output=MAX_OUTPUT,
            )
        except commands.TimedOut as e:
            raise errors.DeadlineExceeded(
                failure(network, name, verb, f"no answer in {timeout:.3g} s, killed")
            ) from e
        except commands.Failed as e:  # it could not be started
            raise errors.Internal(failure(network, name, verb, e.finished.describe())) from e
        log.debug("cni plugin ran", verb=verb, plugin=name, network=network, ms=_since(began))
        if finished.returncode != 0:
            raise _failed(network, name, verb, finished)
        return finished.stdout

    def _environment_of(self, verb: Verb, call: Call | None) -> dict[str, str]:
        return {**self._environment, "CNI_COMMAND": verb, **(call.environment() if call else {})}

    def _where(self) -> str:
        return " or ".join(self._directories)


def failure(network: str, name: str, verb: Verb, reason: str) -> str:
    """Return the message of an error: where, who, what, why."""
    return f"CNI network {network!r}: plugin {name!r}: {verb} failed: {brief(reason)}"


def brief(text: str, limit: int = 300) -> str:
    """Return the first line that is not blank, printable and not too long."""
    line = next((line for line in text[:10_000].splitlines() if line.strip()), "").strip()
    clean = "".join(c if c.isprintable() else "?" for c in line)
    return clean if len(clean) <= limit else f"{clean[:limit]}..."


def _failed(network: str, name: str, verb: Verb, finished: commands.Finished) -> errors.CriError:
    code, reason = _reason(finished)
    later = code == TRY_AGAIN_LATER or code in NOT_AVAILABLE
    kind = errors.Unavailable if later else errors.Internal
    return kind(failure(network, name, verb, reason))


def _reason(finished: commands.Finished) -> tuple[int, str]:
    """Return CNI's error code (0: none) and the reason: the error object, else what was printed."""
    try:
        answer = conf.decode(finished.stdout)
    except conf.Invalid:
        answer = {}
    said = [answer.get("msg"), answer.get("details")]
    lines = [brief(text) for text in said if isinstance(text, str) and text.strip()]
    if lines:
        number = answer.get("code")
        return (number if isinstance(number, int) else 0), ": ".join(lines)
    code = finished.returncode
    how = f"signal {-code}" if code < 0 else f"exit {code}"
    printed = brief((finished.stderr or finished.stdout).decode(errors="replace"))
    return 0, f"{how}: {printed}" if printed else how


def _since(began: float) -> float:
    return round((time.perf_counter() - began) * 1000, 2)
