# SPDX-License-Identifier: Apache-2.0
"""What containers use that run in a kernel of their pod's own, as that kernel says.

The host sees one process for the whole pod, so its cgroups cannot tell containers apart. runsc is
asked instead (`events --stats`), one short process a container, all at once. It tells the CPU time
of each, but the memory of the whole pod (`events` of runsc 2022: the usage of the sandbox), which
is what a container that shares it can be said to use. One that does not answer costs its own
figures and never the list.
"""

import asyncio
from collections.abc import Iterable, Mapping

import msgspec
import structlog

from cri_server import commands, config, handlers, revisions, state, usage

log = structlog.get_logger()
TIMEOUT = 5.0  # seconds: the kubelet asks every ten


class _Number(msgspec.Struct):
    total: int = 0
    usage: int = 0


class _Part(msgspec.Struct):
    usage: _Number


class _Data(msgspec.Struct):
    cpu: _Part
    memory: _Part


class _Event(msgspec.Struct):
    data: _Data


class KernelStats:
    """Asks the runtimes that know."""

    def __init__(self, settings: config.Config, live: handlers.Handlers) -> None:
        self._handlers, self._state = live, settings.server.state

    async def read(self, records: Iterable[state.Container]) -> Mapping[str, usage.Usage | None]:
        """Return the usage of those containers that the host cannot tell, by id; None for one that
        gave no answer.
        """
        asked = [c for c in records if c.pid and self._has_kernel(c.handler)]
        found = await asyncio.gather(*map(self._one, asked))
        return dict(zip((c.id for c in asked), found, strict=True))

    def _has_kernel(self, handler: str) -> bool:
        found = self._handlers.find(handler)
        return found is not None and found.handler.kind == "oci" and found.handler.has_kernel

    async def _one(self, container: state.Container) -> usage.Usage | None:
        handler = self._handlers.of(container.handler)
        root = self._state / "runtimes" / revisions.name_of(container.handler)
        argv = [handler.path, "--root", str(root), *handler.args, "events", "--stats", container.id]
        try:
            said = await commands.run(argv, timeout=TIMEOUT)
            return parsed(said.stdout)
        except (commands.Failed, commands.TimedOut, OSError, msgspec.DecodeError) as e:
            log.warning("no stats from the kernel", container=container.id, error=str(e))
            return None


def parsed(text: bytes) -> usage.Usage:
    """Read what `runsc events --stats` prints. Raises msgspec.DecodeError."""
    data = msgspec.json.decode(text, type=_Event).data
    used = data.memory.usage.usage
    return usage.Usage(cpu=data.cpu.usage.total, memory=used, working_set=used)
