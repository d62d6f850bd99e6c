# SPDX-License-Identifier: Apache-2.0
"""What containers use that run in a kernel of their pod's own, as that kernel says.

The host sees one process for the whole pod, so its cgroups cannot tell containers apart. runsc is
asked instead (`events --stats`), one short process a container, all at once. It tells the CPU time
of each, but the memory of the whole pod (`events` of runsc 2022: the usage of the sandbox), which
is what a container that shares it can be said to use. A containerd shim is asked through the pod's
own (`Stats`). One that does not answer costs its own figures and never the list.
"""

import asyncio
from collections.abc import Iterable, Mapping

import msgspec
import structlog
from google.protobuf import message

from cri_server import commands, config, errors, handlers, revisions, shims, state, usage
from shim import errors as shim_errors
from shim.pb import shim_pb2
from shim.pb.containerd import cgroups_v1_pb2, cgroups_v2_pb2

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


class GuestStats:
    """Asks the runtimes that know."""

    def __init__(
        self, settings: config.Config, live: handlers.Handlers, shim_host: shims.Shims
    ) -> None:
        self._handlers, self._state = live, settings.server.state
        self._shims = shim_host

    async def read(self, records: Iterable[state.Container]) -> Mapping[str, usage.Usage | None]:
        """Return the usage of those containers that the host cannot tell, by id; None for one that
        gave no answer.
        """
        asked = [c for c in records if c.pid and self._has_guest_kernel(c.handler)]
        found = await asyncio.gather(*map(self._one, asked))
        return dict(zip((c.id for c in asked), found, strict=True))

    def _has_guest_kernel(self, handler: str) -> bool:
        found = self._handlers.find(handler)
        return found is not None and found.handler.has_guest_kernel

    async def _one(self, container: state.Container) -> usage.Usage | None:
        handler = self._handlers.of(container.handler)
        if handler.kind == "shim":
            return await self._of_shim(container)
        root = self._state / "runtimes" / revisions.name_of(container.handler)
        argv = [handler.path, "--root", str(root), *handler.args, "events", "--stats", container.id]
        try:
            said = await commands.run(argv, timeout=TIMEOUT)
            return parsed(said.stdout)
        except (commands.Failed, commands.TimedOut, OSError, msgspec.DecodeError) as e:
            log.warning("no stats from the kernel", container=container.id, error=str(e))
            return None

    async def _of_shim(self, container: state.Container) -> usage.Usage | None:
        request = shim_pb2.StatsRequest(id=container.id)
        try:
            answer = await self._shims.of(container.pod_id).stats(request, timeout=TIMEOUT)
            return counted(answer.type_url, answer.value)
        except (errors.CriError, shim_errors.ShimError, message.DecodeError) as e:
            log.warning("no stats from the shim", container=container.id, error=str(e))
            return None


def counted(type_url: str, value: bytes) -> usage.Usage:
    """Read the Metrics of a containerd shim. Raises DecodeError, also for an unknown type."""
    kind = type_url.rpartition("/")[2]
    if kind == cgroups_v1_pb2.Metrics.DESCRIPTOR.full_name:
        return _counted_v1(cgroups_v1_pb2.Metrics.FromString(value))
    if kind == cgroups_v2_pb2.Metrics.DESCRIPTOR.full_name:
        return _counted_v2(cgroups_v2_pb2.Metrics.FromString(value))
    raise message.DecodeError(f"no metrics that are known: {type_url[:80]!r}")


def _counted_v1(found: cgroups_v1_pb2.Metrics) -> usage.Usage:
    memory = found.memory
    return usage.Usage(
        cpu=found.cpu.usage.total,
        memory=memory.usage.usage,
        working_set=max(memory.usage.usage - memory.total_inactive_file, 0),
        rss=memory.total_rss,
        cache=memory.total_cache,
        limit=_limit(memory.usage.limit),
        faults=memory.total_pg_fault,
        major_faults=memory.total_pg_maj_fault,
    )


def _counted_v2(found: cgroups_v2_pb2.Metrics) -> usage.Usage:
    memory = found.memory
    return usage.Usage(
        cpu=found.cpu.usage_usec * 1000,
        memory=memory.usage,
        working_set=max(memory.usage - memory.inactive_file, 0),
        rss=memory.anon,
        cache=memory.file,
        limit=_limit(memory.usage_limit),
        faults=memory.pgfault,
        major_faults=memory.pgmajfault,
    )


def _limit(said: int) -> int | None:
    return said if 0 < said < usage.UNLIMITED else None


def parsed(text: bytes) -> usage.Usage:
    """Read what `runsc events --stats` prints. Raises msgspec.DecodeError."""
    data = msgspec.json.decode(text, type=_Event).data
    used = data.memory.usage.usage
    return usage.Usage(cpu=data.cpu.usage.total, memory=used, working_set=used)
