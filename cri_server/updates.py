# SPDX-License-Identifier: Apache-2.0
"""UpdateContainerResources: other limits for a container that is created or runs.

The order is kernel, config.json, record: a kill in between leaves a record that differs from what
is asked for, so the repeat does it again. What went wrong half-way is put back, for the same
reason: the record is what the next request is compared with, and one that changes nothing costs no
process and no write.

The OCI runtime writes the limits, so that systemd's units and the runtime's own state agree; what
it leaves out is written here, and oom_score_adj, which is the processes' own. Nothing is locked
here: `containers` sees to it that one operation at a time works on a container.
"""

import asyncio
import contextlib
import dataclasses
import itertools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec
import structlog

from cri_server import (
    bundles,
    cgroups,
    configjson,
    errors,
    handlers,
    shims,
    spec,
    state,
    usage,
)
from cri_server.pb import api_pb2 as api
from cri_server.spec import why
from shim import cgroup
from shim.pb import shim_pb2

log = structlog.get_logger()
_PERIOD = 100000  # microseconds of cpu_period, as the kernel has it and CRI's default is


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Change:
    """From one set of limits to another, for one container."""

    container: state.Container
    before: spec.Resources
    after: spec.Resources
    scores: tuple[int, int]  # oom_score_adj before and after
    wanted: api.LinuxContainerResources

    @property
    def memory(self) -> int:
        """The new memory limit in bytes if it is lower than the old one, else 0."""
        new = self.after.get("memory", {}).get("limit", -1)
        old = self.before.get("memory", {}).get("limit", -1)
        return new if new > 0 and (old < 0 or new < old) else 0


def in_force(container: state.Container) -> api.LinuxContainerResources:
    """Return the resources of a container as they are now: for its status, and to merge into."""
    return state.limits(container.resources, container.config.linux.resources)


class Updates:
    """Changes the limits of containers."""

    def __init__(
        self,
        *,
        live: handlers.Handlers,
        store: state.Store,
        groups: cgroups.Cgroups,
        bundle_host: bundles.Bundles,
        shim_host: shims.Shims,
    ) -> None:
        self._handlers, self._store, self._groups = live, store, groups
        self._bundles, self._shims = bundle_host, shim_host

    async def apply(self, container: state.Container, asked: api.LinuxContainerResources) -> None:
        """Merge `asked` into the limits of a container.

        Raises InvalidArgument that names the field, FailedPrecondition for a container that has
        ended and for a memory limit below what is in use, else what the OCI runtime said. After a
        failure the old limits hold.
        """
        if container.finished_at:
            raise errors.FailedPrecondition(
                f"container {container.id[:13]} has ended: its resources cannot be updated"
            )
        self._handlers.check_memory(container.handler, asked)
        change = self._change(container, asked)
        if change.wanted == in_force(container):
            return
        await asyncio.to_thread(self._check_bundle, container)
        if container.started_at:
            await self._set(change)
        await asyncio.to_thread(self._write, change)
        async with self._store.changing(container.id) as current:
            text = state.raw_limits(change.wanted)
            await self._store.put_container(dataclasses.replace(current, resources=text))
        log.info("resources updated", container=container.id, limits=change.after)

    def _check_bundle(self, container: state.Container) -> None:
        """See that the new limits can be written, before the kernel has them. Raises
        FailedPrecondition.
        """
        try:
            configjson.read(self._bundles.directory(container.id))
        except (OSError, ValueError) as e:
            raise errors.FailedPrecondition(f"the container's bundle is damaged: {e}") from e

    def _change(self, container: state.Container, asked: api.LinuxContainerResources) -> _Change:
        facts = self._handlers.facts(container.handler)
        defaults = self._handlers.defaults(container.handler)
        now = in_force(container)
        wanted = spec.merged(now, asked)
        return _Change(
            container=container,
            before=spec.resources(now, facts, defaults),
            after=spec.resources(wanted, facts, defaults),
            scores=(spec.oom_score_adj(now, facts), spec.oom_score_adj(wanted, facts)),
            wanted=wanted,
        )

    def _write(self, change: _Change) -> None:
        """Bring config.json up to date, from which a start and an exec take what they need."""
        container = change.container
        facts = self._handlers.facts(container.handler)
        with why.recorded() as found:
            spec.resources(change.wanted, facts, self._handlers.defaults(container.handler))
            score = spec.oom_score_adj(change.wanted, facts)
        bundle = self._bundles.directory(container.id)
        configjson.limit(bundle, change.after, oom_score_adj=score, found=found)

    # -- in a running container -------------------------------------------------------------------

    async def _set(self, change: _Change) -> None:
        if change.before != change.after:
            await self._limit(change)
        before, after = change.scores
        if before != after:
            directories = self._groups.directories(change.container.cgroups_path)
            await asyncio.to_thread(_rescore, directories, before, after)

    async def _limit(self, change: _Change) -> None:
        await asyncio.to_thread(self._check_memory, change)
        try:
            await self._run(change.container, change.after)
        except (errors.Unavailable, errors.FailedPrecondition):  # nothing is left that has limits
            raise
        except errors.CriError:
            with contextlib.suppress(errors.CriError):
                await self._run(change.container, spec.restored(change.before, change.after))
            raise

    def _check_memory(self, change: _Change) -> None:
        """Refuse a limit that would have the kernel kill (v2) or that it would refuse (v1)."""
        if not change.memory:
            return
        used = usage.read(self._groups.directories(change.container.cgroups_path))
        if used is not None and (used.working_set or 0) > change.memory:
            raise errors.FailedPrecondition(
                f"memory_limit_in_bytes: {change.memory} is less than the {used.working_set} in use"
            )

    async def _run(self, container: state.Container, limits: spec.Resources) -> None:
        """Have the runtime set the limits, and then write what it would not."""
        directories = self._groups.directories(container.cgroups_path)
        dialect = self._handlers.of(container.handler).dialect
        told, files = split(limits, directories, dialect)
        request = shim_pb2.UpdateRequest(id=container.id, resources=msgspec.json.encode(told))
        async with self._shims.calling(container.pod_id) as shim:
            await shim.update(request)
        await asyncio.to_thread(_write_all, files)


def split(
    limits: spec.Resources, directories: Mapping[str, str], dialect: str
) -> tuple[spec.Resources, dict[str, str]]:
    """Return what the runtime is told to set, and the files that are written after it."""
    files = dict(_pages(limits, directories))
    if dialect == "crun" and limits.get("cpu", {}).get("quota") == -1:
        if "cpu" not in directories:
            return _with_period(limits), files
        files[f"{directories['cpu']}/cpu.cfs_quota_us"] = "-1"
        return spec.resources_at_start(limits), files
    return limits, files


def _pages(limits: spec.Resources, directories: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield the files of both accounts of hugepages, faults and reservations: runc updates none."""
    v2 = "" in directories
    last = "max" if v2 else "limit_in_bytes"
    for page, account in itertools.product(limits.get("hugepageLimits", ()), ("", "rsvd.")):
        directory = directories["" if v2 else "hugetlb"]
        yield f"{directory}/hugetlb.{page['pageSize']}.{account}{last}", str(page["limit"])


def _with_period(limits: spec.Resources) -> spec.Resources:
    """Name the period too: without one crun leaves cpu.max of cgroup v2 as it is."""
    return {**limits, "cpu": {"period": _PERIOD, **limits["cpu"]}}


def _rescore(directories: Mapping[str, str], before: int, after: int) -> None:
    """Give the processes that still have the oom_score_adj of before another; some have set their
    own. Twice, for a child that is born meanwhile has its parent's. Raises Unknown.
    """
    for _ in range(2):
        for pid in cgroup.Cgroup(directories).processes():
            path = Path(f"/proc/{pid}/oom_score_adj")
            try:
                if int(path.read_text()) == before:
                    path.write_text(str(after))
            except (FileNotFoundError, ProcessLookupError):
                continue
            except OSError as e:
                raise errors.Unknown(f"oom_score_adj: {after}: {e.strerror}") from e


def _write_all(files: Mapping[str, str]) -> None:
    """Write cgroup files; one that the kernel does not have is no limit. Raises Unknown."""
    for path, text in files.items():
        try:
            _write(path, text)
        except FileNotFoundError:
            continue
        except OSError as e:
            raise errors.Unknown(f"{Path(path).name}: {text}: {e.strerror}") from e


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
