# SPDX-License-Identifier: Apache-2.0
"""The verbs of CNI over a chain of plugins: which order, which input, how much time.

    ADD     first to last; each gets the result of the one before
    DEL     last to first; each gets the result of ADD; goes on after a failure, then reports all
    CHECK   first to last; each gets the result of ADD
    STATUS, GC, VERSION   concern no container

The plugins of a chain run one after the other (CNI specification §3). Nothing is remembered: what a
DEL needs is the caller's to keep, and a DEL may be repeated. Errors are those of
`plugin.Plugins.run`.
"""

import asyncio
from collections.abc import Iterable, Mapping

from cri_server import errors
from cri_server.network import conf, plugin, result

Result = Mapping[str, object]
RESERVE = 5.0  # seconds of a DEL's time that each plugin yet to come is left with


async def add(
    plugins: plugin.Plugins, chain: conf.Chain, call: plugin.Call, *, timeout: float
) -> dict[str, object]:
    """Attach a container and return the last plugin's result in the chain's version.

    `timeout` is for the whole chain. After an error a DEL is owed. Raises Internal also for an
    answer that is no result.
    """
    deadline = _now() + timeout
    answer: dict[str, object] | None = None
    for link in chain.plugins:
        printed = await plugins.run(
            plugin.Verb.ADD,
            link.type,
            network=chain.name,
            document=_document(chain, link, call, answer),
            call=call,
            timeout=deadline - _now(),
        )
        answer = _answer(chain, link, printed)
    return answer or {}


def _document(
    chain: conf.Chain, link: conf.Plugin, call: plugin.Call | None, previous: Result | None
) -> dict[str, object]:
    """Return what a plugin reads: its configuration, completed (CNI specification §3)."""
    document = {**link.document, "cniVersion": chain.version, "name": chain.name}
    if call is not None:
        granted = {k: v for k, v in call.capabilities.items() if link.accepts(k)}
        document |= {"runtimeConfig": granted} if granted else {}
    if previous is not None:
        document["prevResult"] = previous
    return document


def _answer(chain: conf.Chain, link: conf.Plugin, printed: bytes) -> dict[str, object]:
    try:
        if not printed.strip():
            raise conf.Invalid("it printed no result")
        if len(printed) >= plugin.MAX_OUTPUT:
            raise conf.Invalid(f"it printed more than {plugin.MAX_OUTPUT} bytes")
        return result.convert(conf.decode(printed), chain.version)
    except conf.Invalid as e:
        text = printed[:80].decode(errors="replace")
        reason = f"{e}: {text!r}" if text.strip() else str(e)
        message = plugin.failure(chain.name, link.type, plugin.Verb.ADD, reason)
        raise errors.Internal(message) from e


async def delete(
    plugins: plugin.Plugins,
    chain: conf.Chain,
    call: plugin.Call,
    previous: Result | None,
    *,
    timeout: float,
) -> None:
    """Detach a container; "it is not there" is success. `previous` is what ADD answered, if it did.

    A hung plugin does not use up the time of the others. Raises Internal with every failure.
    """
    deadline = _now() + timeout
    known = previous if chain.speaks("0.4.0") else None
    failures: list[errors.CriError] = []
    for left, link in zip(range(len(chain.plugins), 0, -1), reversed(chain.plugins), strict=True):
        try:
            await plugins.run(
                plugin.Verb.DEL,
                link.type,
                network=chain.name,
                document=_document(chain, link, call, known),
                call=call,
                timeout=_share(deadline - _now(), left),
            )
        except errors.CriError as e:
            failures.append(e)
    raise_all(failures)


def _share(remaining: float, left: int) -> float:
    """Return the seconds that the next of `left` plugins may take: the others keep a reserve."""
    return max(remaining / left, remaining - RESERVE * (left - 1))


def raise_all(failures: list[errors.CriError]) -> None:
    """Raise the one failure, or all as one Internal; nothing when there is none."""
    if len(failures) == 1:
        raise failures[0]
    if failures:
        raise errors.Internal("; ".join(e.message for e in failures))


async def check(
    plugins: plugin.Plugins,
    chain: conf.Chain,
    call: plugin.Call,
    previous: Result,
    *,
    timeout: float,
) -> None:
    """Ask every plugin whether the attachment is as ADD left it; the first that says no is raised.

    A chain before 0.4.0, or with "disableCheck", is not asked.
    """
    deadline = _now() + timeout
    for link in chain.plugins if chain.speaks("0.4.0") and not chain.disable_check else ():
        await plugins.run(
            plugin.Verb.CHECK,
            link.type,
            network=chain.name,
            document=_document(chain, link, call, previous),
            call=call,
            timeout=deadline - _now(),
        )


async def status(plugins: plugin.Plugins, chain: conf.Chain, *, timeout: float) -> None:
    """Ask every plugin whether it could ADD now (from 1.1.0 on); the first "no" is raised."""
    deadline = _now() + timeout
    for link in chain.plugins if chain.speaks("1.1.0") else ():
        await plugins.run(
            plugin.Verb.STATUS,
            link.type,
            network=chain.name,
            document=_document(chain, link, None, None),
            timeout=deadline - _now(),
        )


async def collect(
    plugins: plugin.Plugins,
    chain: conf.Chain,
    valid: Iterable[tuple[str, str]],
    *,
    timeout: float,
) -> None:
    """Have every plugin free what belongs to no attachment in `valid` (container id, interface).

    Only from 1.1.0 on; no other verb may run on the network meanwhile. Raises Internal with every
    failure.
    """
    deadline = _now() + timeout
    attachments = [{"containerID": container, "ifname": ifname} for container, ifname in valid]
    failures: list[errors.CriError] = []
    for link in chain.plugins if chain.speaks("1.1.0") and not chain.disable_gc else ():
        document = _document(chain, link, None, None)
        try:
            await plugins.run(
                plugin.Verb.GC,
                link.type,
                network=chain.name,
                document={**document, "cni.dev/valid-attachments": attachments},
                timeout=deadline - _now(),
            )
        except errors.CriError as e:
            failures.append(e)
    raise_all(failures)


async def versions(
    plugins: plugin.Plugins, chain: conf.Chain, *, timeout: float
) -> dict[str, tuple[str, ...]]:
    """Return the versions of CNI that each plugin of a chain says it speaks."""
    spoken: dict[str, tuple[str, ...]] = {}
    for link in chain.plugins:
        printed = await plugins.run(
            plugin.Verb.VERSION,
            link.type,
            network=chain.name,
            document={"cniVersion": chain.version},
            call=plugin.Call(container_id="none", ifname="none", netns="none"),
            timeout=timeout,
        )
        spoken[link.type] = _versions(chain, link, printed)
    return spoken


def _versions(chain: conf.Chain, link: conf.Plugin, printed: bytes) -> tuple[str, ...]:
    try:
        supported = conf.decode(printed).get("supportedVersions")
    except conf.Invalid as e:
        message = plugin.failure(chain.name, link.type, plugin.Verb.VERSION, str(e))
        raise errors.Internal(message) from e
    return tuple(v for v in supported if isinstance(v, str)) if isinstance(supported, list) else ()


def _now() -> float:
    return asyncio.get_running_loop().time()
