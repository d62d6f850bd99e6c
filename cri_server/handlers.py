# SPDX-License-Identifier: Apache-2.0
"""The handlers: those of now, by name, and those of the pods that there are, by key.

    name, from a request ─► key ─► into the records of pod and containers
    key, from a record   ─► of, facts, defaults: as they were when the pod was made

A change of the configuration gives `apply` another set of handlers; what pods hold on to stays, in
memory and on disk (`revisions`), until `sweep` finds that nobody holds on to it. Nothing here waits
but for the disk, once for each revision that gets its first pod.
"""

import asyncio
import dataclasses
from collections.abc import Collection
from pathlib import Path

import structlog

from cri_server import (
    capability,
    config,
    dropins,
    errors,
    handler_set,
    host,
    limits,
    revisions,
    spec,
)
from cri_server.network import conf
from cri_server.pb import api_pb2 as api

log = structlog.get_logger()


class Handlers:
    """All handlers that somebody may mean."""

    def __init__(
        self,
        settings: config.Config,
        *,
        facts: host.Host,
        now: handler_set.HandlerSet,
        store: revisions.Store,
    ) -> None:
        """`facts` are those of the host, whatever runtimes are in them."""
        self.default = settings.runtime.default
        self._settings, self._store = settings, store
        self._kept: dict[str, revisions.Revision] = {}
        self._kept_facts: dict[str, host.RuntimeFacts] = {}
        self._written: set[str] = set()
        self._host, self._now = facts, handler_set.HandlerSet()
        self.apply(now)

    # -- of now -----------------------------------------------------------------------------------

    @property
    def host_facts(self) -> host.Host:
        """The facts of the host, with those of the runtimes by name and by key."""
        return self._host

    @property
    def now(self) -> handler_set.HandlerSet:
        return self._now

    @property
    def names(self) -> tuple[str, ...]:
        """The handlers that a pod can ask for."""
        return tuple(self._now.current)

    @property
    def problems(self) -> tuple[dropins.Problem, ...]:
        return self._now.problems

    def key(self, name: str) -> str:
        """Return the key of the handler called `name`, of the default one for "" (CRI
        RunPodSandbox.runtime_handler).

        Raises InvalidArgument for a name that is not configured, FailedPrecondition for one whose
        drop-in cannot be used.
        """
        return self._now.revision(name or self.default).key

    def apply(self, now: handler_set.HandlerSet) -> None:
        """Have these be the handlers of now; pods keep theirs."""
        before = self._now
        for revision in before.current.values():
            self._kept[revision.key] = revision
            self._kept_facts[revision.key] = before.facts[revision.key]
        facts = {**self._kept_facts, **now.facts, **handler_set.named(now)}
        self._host = dataclasses.replace(self._host, runtimes=facts)
        self._now = handler_set.with_shortfalls(now, self._host)

    # -- of a pod ---------------------------------------------------------------------------------

    def find(self, key: str) -> revisions.Revision | None:
        """Return a revision by key or name; of a name that is gone, one that pods still have."""
        name = revisions.name_of(key)
        current = self._now.current.get(name)
        if current is not None and key in (name, current.key):
            return current
        if key != name:
            return self._kept.get(key)
        return next((r for r in reversed(self._kept.values()) if r.name == name), None)

    def revision(self, key: str) -> revisions.Revision:
        """Return what a record's key means. Raises InvalidArgument when it is lost."""
        return self.find(key) or self._now.revision(revisions.name_of(key) or self.default)

    def of(self, key: str) -> config.Handler:
        """Return the settings that a record's key means. Raises as `revision`."""
        return self.revision(key).handler

    def facts(self, key: str) -> spec.HostFacts:
        """Return what the spec functions need to know, for containers of this handler."""
        return self._host.facts(key)

    def label(self, key: str, option: str) -> str:
        """Return what people call an option of a handler, "" where it has its default."""
        return self.revision(key).label(option)

    def defaults(self, key: str) -> spec.Defaults:
        """Return what the handler gives to containers that do not ask."""
        found = self.revision(key)
        wanted = found.handler
        return spec.Defaults(
            capabilities=capability.chosen(wanted.default_capabilities),
            capabilities_key=found.label("default_capabilities"),
            rlimits=limits.rlimits(wanted.default_rlimits),
            rlimits_key=found.label("default_rlimits"),
            pids_limit=wanted.default_pids_limit,
            pids_key=found.label("default_pids_limit"),
            unified=wanted.default_unified,
            unified_key=found.label("default_unified"),
            cgroup_writable_key=found.label("cgroup_writable"),
            no_host_devices_key=_no_host_devices(found),
            seccomp=found.seccomp,
            seccomp_key=found.label("seccomp_profile"),
            seccomp_audit_key=self._audits(found),
        )

    def place(self, key: str) -> conf.Place | None:
        """Return where the network of the handler's pods is described, None for that of all."""
        return place(self.of(key), self._settings.network)

    def places(self) -> list[conf.Place | None]:
        """Return each place of a network once: that of all, and those of handlers of now."""
        own = (self.place(r.key) for r in self._now.current.values())
        return list(dict.fromkeys((None, *own)))

    def check_memory(self, key: str, asked: api.LinuxContainerResources) -> None:
        """Refuse a memory limit with which no container of the handler could start."""
        least, limit = limits.size(self.of(key).min_memory), asked.memory_limit_in_bytes
        if 0 < limit < least:
            where = f"less than {least}, {self.label(key, 'min_memory')}"
            raise errors.InvalidArgument(f"memory_limit_in_bytes: {limit} is {where}")

    def _audits(self, found: revisions.Revision) -> str:
        lacks = self._host.why_no_seccomp_audit(found.key)
        return "" if lacks else found.label("seccomp_audit")

    # -- on disk ----------------------------------------------------------------------------------

    async def keep(self, key: str) -> None:
        """Have the revision on disk, before a record names it. Raises OSError."""
        if key not in self._written:
            await asyncio.to_thread(self._store.write, self.revision(key))
            self._written.add(key)

    async def recall(self) -> None:
        """Read what an earlier server kept, and ask the programs."""
        kept = {r.key: r for r in await asyncio.to_thread(lambda: list(self._store.read()))}
        self._written |= kept.keys()
        gone = {key: r for key, r in kept.items() if key not in self._now.facts}
        self._kept |= gone
        self._kept_facts |= await host.runtimes({key: r.handler for key, r in gone.items()})
        self.apply(self._now)

    async def sweep(self, in_use: Collection[str]) -> None:
        """Forget the revisions that are not of now and no record names."""
        now = {r.key for r in self._now.current.values()}
        known = self._kept.keys() | await asyncio.to_thread(self._store.keys)
        for key in known - set(in_use) - now:
            log.debug("handler of earlier pods forgotten", handler=key)
            await asyncio.to_thread(self._store.forget, key)
            self._written.discard(key)
            self._kept.pop(key, None)
            self._kept_facts.pop(key, None)


def _no_host_devices(found: revisions.Revision) -> str:
    """Return the key that keeps the host's devices out of privileged containers, "" if none does.

    Where nobody says, a kernel of the pod's own does: runsc knows other devices than the host, and
    kata plugs each block device that is in a spec into the machine.
    """
    asked = found.handler.privileged_without_host_devices
    if asked == "":
        return f"[runtimes.{found.name}] dialect" if found.handler.has_guest_kernel else ""
    return found.label("privileged_without_host_devices") if asked else ""


def place(wanted: config.Handler, common: config.Network) -> conf.Place | None:
    """Return where the network of a handler's pods is described, None for that of all."""
    if not (wanted.cni_conf_dir or wanted.cni_conf_file):
        return None
    return conf.Place(Path(wanted.cni_conf_dir or common.conf_dir), wanted.cni_conf_file)
