# SPDX-License-Identifier: Apache-2.0
"""The network of pods: attach, detach, and whether there is one.

    attach   configuration, plugins there ─► intent in the cache ─► ADD ─► result in the cache
                                                                     └─ fails ─► DEL ─► entry away
    detach   entry from the cache ─► DEL, with the configuration of that time ─► entry away

A DEL is owed as long as the cache has an entry, so a kill at any instruction loses nothing:
`detach` again, by the next StopPodSandbox or by recovery, gives back what was allocated, also after
a reboot and without any configuration. An entry that is lost, or that a power loss broke, is made
up for from the pod's record and the configuration of today. A caller that goes away ends the plugin
that it waits for, not the DEL that follows. Operations of one pod wait for each other, those of
different pods do not. The namespace itself is made by the shim and removed by `netns`.
"""

import asyncio
import dataclasses
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import structlog

from cri_server import config, errors, locks, side_by_side
from cri_server.network import cache, conf, netns, plugin, poller, result, verbs
from cri_server.network.attachment import (  # callers know it as cni.Attachment
    ASKED_BY,
    Attachment,
)

__all__ = ["IFNAME", "Attachment", "Network", "NetworkStatus", "Result"]

log = structlog.get_logger()
IFNAME = "eth0"
NOT_READY = "NetworkPluginNotReady"
PORTMAP = {"type": "portmap", "capabilities": {"portMappings": True}}
GC_TIMEOUT = 10.0  # seconds: pods that are to be attached wait meanwhile
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkStatus:
    """CRI's NetworkReady condition. `message` may warn although `ready`."""

    ready: bool
    reason: str
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What a pod got: its addresses, the primary first, and the last plugin's answer as it is."""

    ips: tuple[str, ...]
    raw: dict[str, object]


class _Side(NamedTuple):
    """One place of configurations, and what its plugins say of themselves."""

    directory: conf.Directory
    poller: poller.Poller


class Network:
    """The network that the first valid file of the configuration directory describes, and those of
    handlers that have their own place (`conf.Place`; None is the directory for all).
    """

    def __init__(self, settings: config.Network) -> None:
        self._settings = settings
        self._plugins = plugin.Plugins(settings.bin_dirs)
        self._cache = cache.Cache(settings.cache_dir)
        self._sides: dict[conf.Place, _Side] = {}
        self._locks, self._changes = locks.Locks(), locks.Shared()
        self._running: set[asyncio.Task[Any]] = set()

    def _side(self, place: conf.Place | None) -> _Side:
        wanted = place or conf.Place(self._settings.conf_dir)
        if wanted not in self._sides:
            asker = poller.Poller(self._ask_status)
            self._sides[wanted] = _Side(conf.Directory(*wanted), asker)
        return self._sides[wanted]

    # -- status -----------------------------------------------------------------------------------

    def status(self, place: conf.Place | None = None) -> NetworkStatus:
        """Say whether a pod can be attached now. Quick, waits for nothing; call it in the loop."""
        side = self._side(place)
        loaded = side.directory.load()
        problem = self._problem(side, loaded)
        if not problem and loaded.chain is not None:
            verdict = side.poller.verdict(loaded.chain)
            problem = "the CNI plugins have not answered STATUS yet" if verdict is None else verdict
        warnings = [f"skipped {reason}" for reason in loaded.skipped]
        message = "; ".join(filter(None, [problem, *warnings]))
        reason = NOT_READY if problem else ""
        return NetworkStatus(ready=not problem, reason=reason, message=message)

    def _problem(self, side: _Side, loaded: conf.Loaded) -> str:
        if loaded.chain is None:
            return f"no valid CNI configuration in {side.directory.place}"
        return self._plugins.missing(loaded.chain)

    async def _ask_status(self, chain: conf.Chain) -> None:
        await verbs.status(self._plugins, chain, timeout=self._settings.status_timeout)

    def info(self) -> dict[str, object]:
        """Return what `crictl info` shows, ready for JSON."""
        loaded = self._side(None).directory.load()
        return {
            "confDir": str(self._settings.conf_dir),
            "binDirs": [str(d) for d in self._settings.bin_dirs],
            "skipped": list(loaded.skipped),
            "status": dataclasses.asdict(self.status()),
            "network": _describe(loaded.chain, self._plugins) if loaded.chain else None,
        }

    async def versions(self) -> dict[str, tuple[str, ...]]:
        """Return the versions of CNI that each plugin speaks (VERSION). Raises as `attach` does."""
        chain = self._usable(None)
        return await verbs.versions(self._plugins, chain, timeout=self._settings.status_timeout)

    def _usable(self, place: conf.Place | None) -> conf.Chain:
        side = self._side(place)
        loaded = side.directory.load()
        problem = self._problem(side, loaded)
        if problem or loaded.chain is None:
            raise errors.Unavailable("; ".join([f"network not ready: {problem}", *loaded.skipped]))
        return loaded.chain

    # -- attach -----------------------------------------------------------------------------------

    async def attach(self, attachment: Attachment, place: conf.Place | None = None) -> Result:
        """Give the pod an interface and addresses on the network of a place, or leave nothing
        behind.

        Raises Unavailable when there is no usable network, InvalidArgument for what cannot be
        passed to plugins or none of them takes, DeadlineExceeded when they take too long, Internal
        when they fail; the message says so if undoing failed too, and then a `detach` is owed. When
        cancelled, the undo goes on by itself.
        """
        return await self._own(self._attach(attachment, place), cancel=True)

    async def _own(self, work: Coroutine[Any, Any, T], *, cancel: bool) -> T:
        """Run `work` in a task of ours; the caller's cancellation is passed on to it or not."""
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if cancel:
                task.cancel()
            raise

    async def _attach(self, attachment: Attachment, place: conf.Place | None) -> Result:
        async with self._locks.held(attachment.pod_id), self._changes.shared():
            # To its end: what it has written is what a `detach` goes by.
            chain, entry = await side_by_side.uninterrupted(
                asyncio.to_thread(self._begin, attachment, place)
            )
            try:
                answer = await verbs.add(
                    self._plugins, chain, _call(entry), timeout=self._settings.add_timeout
                )
                ips = _addresses(chain, answer, self._settings.ip_pref)
                whole = dataclasses.replace(entry, result=answer)
                await side_by_side.uninterrupted(asyncio.to_thread(self._record, whole))
            except BaseException as e:
                await self._undo(entry, e)
                raise
        return Result(ips=ips, raw=answer)

    def _begin(
        self, attachment: Attachment, place: conf.Place | None
    ) -> tuple[conf.Chain, cache.Entry]:
        """Choose the network and record the intent."""
        wanted = attachment.capabilities()
        chain = self._with_portmap(self._usable(place), wanted)
        entry = cache.Entry(
            network=chain.name,
            container_id=attachment.pod_id,
            ifname=IFNAME,
            netns=attachment.netns,
            config=chain.source,
            args=attachment.args(),
            capabilities=wanted,
        )
        _check_heard(chain, entry)
        self._record(entry)
        return chain, entry

    def _with_portmap(self, chain: conf.Chain, wanted: Mapping[str, object]) -> conf.Chain:
        """Return the chain, for a pod with host ports with the portmap plugin at its end where that
        is installed and no other would see to them: CRI-O's own configurations leave it out.
        """
        if "portMappings" not in wanted or chain.accepts("portMappings") or not chain.standard:
            return chain
        return chain.extended(PORTMAP) if self._plugins.find("portmap") else chain

    def _record(self, entry: cache.Entry) -> None:
        try:
            self._cache.write(entry)
        except OSError as e:
            raise errors.Internal(f"CNI cache of {entry.file_name}: {e.strerror}") from e

    async def _undo(self, entry: cache.Entry, cause: BaseException) -> None:
        """Take back a failed ADD. Raises the cause with the failure added when that fails too."""
        try:
            await self._delete(entry, entry.netns)
        except errors.CriError as e:
            log.warning("cni undo failed", pod=entry.container_id, error=e.message)
            if isinstance(cause, errors.CriError):
                both = f"{cause.message}; undoing it failed too: {e.message}"
                raise type(cause)(both) from cause

    # -- detach -----------------------------------------------------------------------------------

    async def detach(self, attachment: Attachment, place: conf.Place | None = None) -> None:
        """Take the pod off its network; nothing attached is fine, so is a namespace that is gone.
        `place` is where the network is described now, for a pod whose cache entry is lost.

        Runs to its end when cancelled. Raises DeadlineExceeded, Unavailable or Internal when a
        plugin failed; then the rest was done nevertheless, and another `detach` is owed.
        """
        await self._own(self._detach(attachment, place), cancel=False)

    async def _detach(self, attachment: Attachment, place: conf.Place | None) -> None:
        async with self._locks.held(attachment.pod_id), self._changes.shared():
            failures: list[errors.CriError] = []
            for entry in await asyncio.to_thread(self._owed, attachment, place):
                try:
                    await self._delete(entry, attachment.netns)
                except errors.CriError as e:
                    failures.append(e)
            await asyncio.to_thread(self._cache.remove_unfinished, attachment.pod_id, IFNAME)
            verbs.raise_all(failures)

    def _owed(self, attachment: Attachment, place: conf.Place | None) -> list[cache.Entry]:
        """Return the entries of a pod, each with all that a DEL needs as far as that is known."""
        found = self._cache.find(attachment.pod_id, IFNAME)
        if not found and attachment.result:
            found = [cache.Entry(network="", container_id=attachment.pod_id, ifname=IFNAME)]
        return [e if _chain_of(e) else self._mended(e, attachment, place) for e in found]

    def _mended(
        self, entry: cache.Entry, attachment: Attachment, place: conf.Place | None
    ) -> cache.Entry:
        """Complete an entry whose file is lost or broken, unless there is no network today."""
        log.warning("cni cache entry lost or broken", pod=attachment.pod_id, network=entry.network)
        chain = self._of_today(entry.network, place)
        if chain is None:
            return entry
        capabilities = entry.capabilities or attachment.capabilities()
        return dataclasses.replace(
            entry,
            network=chain.name,
            config=self._with_portmap(chain, capabilities).source,
            args=entry.args or attachment.args(),
            capabilities=capabilities,
            result=entry.result or attachment.result or None,
        )

    def _of_today(self, network: str, place: conf.Place | None) -> conf.Chain | None:
        """Return the chain of a network as it is now: that of its name, else that of the place,
        under the name of that time, by which plugins such as host-local keep their books.
        """
        own = self._side(place).directory.load().chain
        self._side(None)
        others = (side.directory.load().chain for side in tuple(self._sides.values()))
        same = next((c for c in (own, *others) if c and c.name == network), None)
        return same or (own.renamed(network) if own and network else own)

    async def _delete(self, entry: cache.Entry, netns_path: str) -> None:
        """Run DEL for an entry and forget it."""
        there = await asyncio.to_thread(netns.exists, netns_path)
        chain = _chain_of(entry)
        if chain is not None:
            # An empty CNI_NETNS means that it is gone (CNI specification §2, DEL).
            call = dataclasses.replace(_call(entry), netns=netns_path if there else "")
            timeout = self._settings.del_timeout
            await verbs.delete(self._plugins, chain, call, entry.result, timeout=timeout)
        await asyncio.to_thread(self._cache.remove, entry)

    # -- the rest ---------------------------------------------------------------------------------

    async def check(self, attachment: Attachment) -> None:
        """Ask the plugins whether the attachment is as they left it (CHECK).

        Raises NotFound when the pod is not attached, else what the first plugin that objects says.
        """
        entries = await asyncio.to_thread(self._cache.find, attachment.pod_id, IFNAME)
        for entry in entries:
            chain = _chain_of(entry)
            if chain is not None and entry.result is not None:
                call = dataclasses.replace(_call(entry), netns=attachment.netns)
                timeout = self._settings.del_timeout
                return await verbs.check(self._plugins, chain, call, entry.result, timeout=timeout)
        raise errors.NotFound(f"pod {attachment.pod_id} is not attached to a network")

    async def collect(self, place: conf.Place | None = None) -> None:
        """Have the plugins free what no cache entry, ours or another runtime's, accounts for (GC).

        Waits until nothing is attached or detached, and holds that up for GC_TIMEOUT at most: no
        other verb may run beside it (CNI specification §2, GC). Raises as `attach` does.
        """
        async with self._changes.alone():
            chain = self._usable(place)
            entries = await asyncio.to_thread(lambda: list(self._cache.of_network(chain.name)))
            valid = [(e.container_id, e.ifname) for e in entries]
            timeout = min(GC_TIMEOUT, self._settings.del_timeout)
            await verbs.collect(self._plugins, chain, valid, timeout=timeout)

    def usable(self, place: conf.Place | None) -> bool:
        """Say whether a place has a configuration whose plugins are there."""
        side = self._side(place)
        return not self._problem(side, side.directory.load())

    async def close(self) -> None:
        """Stop asking for STATUS and wait for what outlived its caller. Cancel callers first."""
        for side in self._sides.values():
            await side.poller.close()
        if self._running:
            await asyncio.wait(self._running)


def _chain_of(entry: cache.Entry) -> conf.Chain | None:
    """Return the configuration of that time, None where it is lost."""
    try:
        return conf.parse(entry.config)
    except conf.Invalid:
        return None


def _call(entry: cache.Entry) -> plugin.Call:
    return plugin.Call(
        container_id=entry.container_id,
        ifname=entry.ifname,
        netns=entry.netns,
        args=entry.args,
        capabilities=entry.capabilities,
    )


def _check_heard(chain: conf.Chain, entry: cache.Entry) -> None:
    """Refuse host ports and bandwidths that no plugin takes.

    Plugins that are not of the CNI project are given the benefit of the doubt: agents such as
    Cilium's and OVN-Kubernetes' read both from the API server.
    """
    for name in ASKED_BY.keys() & entry.capabilities:
        if chain.accepts(name):
            continue
        message = f"{ASKED_BY[name]}: no plugin of {chain.path} has the capability {name}"
        if chain.standard:
            raise errors.InvalidArgument(message)
        log.warning("left to the network's own agent", pod=entry.container_id, reason=message)


def _addresses(
    chain: conf.Chain, answer: dict[str, object], preference: result.Preference
) -> tuple[str, ...]:
    try:
        return result.addresses(answer, IFNAME, preference)
    except conf.Invalid as e:
        last = chain.plugins[-1].type
        raise errors.Internal(plugin.failure(chain.name, last, plugin.Verb.ADD, str(e))) from e


def _describe(chain: conf.Chain, plugins: plugin.Plugins) -> dict[str, object]:
    links = [{"path": plugins.find(p.type), "config": dict(p.document)} for p in chain.plugins]
    return {
        "file": chain.path,
        "name": chain.name,
        "cniVersion": chain.version,
        "plugins": links,
    }
