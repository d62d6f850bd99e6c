# SPDX-License-Identifier: Apache-2.0
"""The set of handlers that there are now, from the configuration file and its drop-ins.

    files ─► names ─► seccomp profiles ─► the programs answer ─► HandlerSet
                 └────────┴── what is wrong holds its handler as it was before

A set is a frozen value made from the one before, so that a handler is of the old state or of the
new, never of both. A drop-in takes the place of a handler of its name in the file, as a whole. What
is wrong with a handler leaves its earlier state; without one, the handler is refused: one of that
name from elsewhere might isolate less. The default handler does not go away.
"""

import asyncio
import dataclasses
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from cri_server import cgroups, config, dropins, errors, host, revisions, sources
from cri_server.spec import seccompfile


@dataclass(frozen=True, kw_only=True, slots=True)
class HandlerSet:
    """`current` are the handlers by name, `facts` what their programs said, `refused` the names
    that are in a drop-in that cannot be used, with the reason.
    """

    current: Mapping[str, revisions.Revision] = field(default_factory=dict)
    facts: Mapping[str, host.RuntimeFacts] = field(default_factory=dict)
    problems: tuple[dropins.Problem, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    paths: tuple[str, ...] = ()  # what else to look at for changes: profiles and programs

    def revision(self, name: str) -> revisions.Revision:
        """Return the handler called `name`. Raises InvalidArgument when there is none,
        FailedPrecondition when its drop-in cannot be used.
        """
        if name in self.current:
            return self.current[name]
        if name in self.refused:
            raise errors.FailedPrecondition(f"runtime_handler {name!r}: {self.refused[name]}")
        known = ", ".join(sorted(self.current))
        raise errors.InvalidArgument(f"runtime_handler {name!r} is not configured (known: {known})")


async def load(
    settings: config.Config, before: HandlerSet | None = None, *, busy: Collection[str] = ()
) -> HandlerSet:
    """Return the handlers of now; files in `busy` are being written and count as they were.

    Raises ConfigError, at the first load only, for what is wrong in the configuration file, and for
    a default handler that is nowhere.
    """
    loading = _Loading(settings, before, busy)
    await asyncio.to_thread(loading.read)
    await loading.ask()
    loading.keep_default()
    return loading.result()


class _Loading:
    """A set that is not complete yet."""

    def __init__(
        self, settings: config.Config, before: HandlerSet | None, busy: Collection[str]
    ) -> None:
        self._settings, self._busy = settings, busy
        self._before, self._first = before or HandlerSet(), before is None
        self._found: dict[str, revisions.Revision] = {}
        self._facts: dict[str, host.RuntimeFacts] = {}
        self._problems: list[dropins.Problem] = []
        self._held: dict[str, str] = {}  # with the reason
        self._paths: dict[str, None] = {}

    # -- what the files say -----------------------------------------------------------------------

    def read(self) -> None:
        """Read drop-ins and profiles; blocks."""
        folder = self._settings.drop_ins
        read = dropins.read(folder) if folder is not None else dropins.DropIns()
        ours = {n: e for n, e in read.handlers.items() if e.file not in self._busy}
        self._problems += [p for p in read.problems if p.file not in self._busy]
        self._hold(read)
        for name, handler in self._settings.runtimes.items():
            if name not in ours and name not in self._held:
                self._revise(name, handler, "")
        for name, entry in ours.items():
            if name not in self._held:
                self._revise(name, entry.handler, entry.file)

    def _hold(self, read: dropins.DropIns) -> None:
        self._held |= read.held
        for name, revision in self._before.current.items():
            if revision.source in read.broken or revision.source in self._busy:
                self._held.setdefault(name, "its drop-in cannot be read")

    def _revise(self, name: str, handler: config.Handler, source: str) -> None:
        self._paths[handler.path] = None
        profile = None
        if lacking := _without_v2(handler):
            self._wrong(name, source, f"{lacking}: this host has no cgroup v2")
            return
        try:
            if handler.seccomp_profile:
                self._paths[handler.seccomp_profile] = None
                read = sources.seccomp_profile(handler.seccomp_profile)
                profile = seccompfile.checked(read, handler.seccomp_profile)
        except errors.InvalidArgument as e:
            self._wrong(name, source, f"seccomp_profile: {e.message}")
        else:
            self._found[name] = revisions.make(name, handler, source=source, seccomp=profile)

    def _wrong(self, name: str, source: str, reason: str) -> None:
        """Note what is wrong with one handler, which then stays as it was."""
        folder = self._settings.drop_ins
        where = f"{folder / source}: " if folder and source else ""
        message = f"{where}[runtimes.{name}]: {reason}"
        if self._first and not source:
            raise config.ConfigError(message)
        self._problems.append(dropins.Problem(file=source, handler=name, message=message))
        self._held[name] = message
        self._found.pop(name, None)

    # -- what the programs say --------------------------------------------------------------------

    async def ask(self) -> None:
        """Ask the programs; that of a drop-in must answer. One in the configuration file that has
        answered once is believed.
        """
        asked = {r.key: r.handler for r in self._found.values() if not self._believed(r)}
        self._facts = {**self._before.facts, **await host.runtimes(asked)}
        for name, revision in list(self._found.items()):
            error = self._facts[revision.key].error
            if error and revision.source:
                self._wrong(name, revision.source, f"path: {revision.handler.path}: {error}")

    def _believed(self, revision: revisions.Revision) -> bool:
        known = self._before.facts.get(revision.key)
        return not revision.source and known is not None and not known.error

    # -- the result -------------------------------------------------------------------------------

    def keep_default(self) -> None:
        """Hold the default handler where it would go away: nothing else may take its place. Nor is
        there a start without it.
        """
        name = self._settings.runtime.default
        if self._first and name and name not in {**self._found, **self._held}:
            known = ", ".join(self._found) or "none"
            raise config.ConfigError(f"runtime.default: no handler {name!r} (known: {known})")
        if name in self._before.current and name not in {**self._found, **self._held}:
            source = self._before.current[name].source
            self._wrong(name, source, "is gone, but it is the default: it stays until a restart")

    def result(self) -> HandlerSet:
        before = self._before.current
        held = {name: before[name] for name in self._held if name in before}
        current = {**self._found, **held}
        facts = {**self._facts, **{r.key: self._before.facts[r.key] for r in held.values()}}
        return HandlerSet(
            current={name: current[name] for name in self._order(current)},
            facts={r.key: facts[r.key] for r in current.values()},
            problems=tuple(self._problems),
            refused={n: why for n, why in self._held.items() if n not in before},
            paths=tuple(self._paths),
        )

    def _order(self, names: Collection[str]) -> Iterator[str]:
        """Yield those of the file as they stand there, then the others by name."""
        yield from (name for name in self._settings.runtimes if name in names)
        yield from sorted(set(names) - set(self._settings.runtimes))


def _without_v2(handler: config.Handler) -> str:
    """Return the option that is for cgroup v2 alone, "" for none, or where the host has it."""
    asked = {"cgroup_writable": handler.cgroup_writable, "default_unified": handler.default_unified}
    needs = [option for option, value in asked.items() if value]
    return needs[0] if needs and cgroups.detect().mode != "v2" else ""


def named(found: HandlerSet) -> dict[str, host.RuntimeFacts]:
    """Return the facts of the handlers of now by their names."""
    return {name: found.facts[r.key] for name, r in found.current.items()}


def differences(before: HandlerSet, after: HandlerSet) -> Iterator[tuple[str, str]]:
    """Yield (what happened, handler) for the log."""
    for name, revision in after.current.items():
        earlier = before.current.get(name)
        if earlier is None:
            yield "handler added", name
        elif earlier.key != revision.key:
            yield "handler changed", name
    for name in before.current:
        if name not in after.current:
            yield "handler removed", name


def with_shortfalls(now: HandlerSet, facts: host.Host) -> HandlerSet:
    """Return the set with a problem for each handler that does not get all that it asks for."""
    found = []
    for name, revision in now.current.items():
        lack = facts.why_no_seccomp_audit(name) if revision.handler.seccomp_audit else ""
        if lack:
            message = f"[runtimes.{name}] seccomp_audit: {lack}: the profile is enforced instead"
            problem = dropins.Problem(
                file=revision.source, handler=name, message=message, holds=False
            )
            found.append(problem)
    problems = (*(p for p in now.problems if p.holds), *found)
    return dataclasses.replace(now, problems=problems)
