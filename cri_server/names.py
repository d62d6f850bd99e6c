# SPDX-License-Identifier: Apache-2.0
"""Ids, and the names that make a repeated request find the first one.

The kubelet repeats RunPodSandbox and CreateContainer with the same metadata when an answer did not
reach it. `Attempts` maps such a name to the one task that works on it: the repeat waits for that
task instead of making a second object. A finished object is found by its name in `state`, so an
attempt lives only as long as its task.
"""

import asyncio
import secrets
from collections.abc import Callable, Collection, Coroutine, Hashable

from cri_server import errors
from cri_server.pb import api_pb2 as api

POD = "POD"  # the container name of a sandbox
ID_BYTES = 32
CLOSE_TIMEOUT = 10.0


def new_id() -> str:
    """Return 64 lower-case hex digits; cAdvisor recognises containers by that shape."""
    return secrets.token_hex(ID_BYTES)


def is_id(text: str) -> bool:
    """Say whether `text` could have come from `new_id`."""
    return len(text) == 2 * ID_BYTES and not text.strip("0123456789abcdef")


def kubernetes(container: str, pod: api.PodSandboxMetadata, attempt: int) -> str:
    """Return what cAdvisor and older tools call a container: k8s_NAME_POD_NAMESPACE_UID_ATTEMPT."""
    return f"k8s_{container}_{pod.name}_{pod.namespace}_{pod.uid}_{attempt}"


def resolve(wanted: str, ids: Collection[str], kind: str) -> str:
    """Return the one id that starts with `wanted`.

    Raises NotFound when there is none (also for an empty string), InvalidArgument when it is
    ambiguous.
    """
    if wanted in ids:
        return wanted
    matches = [i for i in ids if i.startswith(wanted)] if wanted else []
    if not matches:
        raise errors.NotFound(f"{kind} {wanted[:80]!r} not found")
    if len(matches) > 1:
        raise errors.InvalidArgument(f"{kind} id {wanted!r} is ambiguous: {len(matches)} match")
    return matches[0]


class Attempts:
    """The tasks that are making an object right now, by the object's name."""

    def __init__(self) -> None:
        self._tasks: dict[Hashable, asyncio.Task[str]] = {}

    async def join(self, name: Hashable, make: Callable[[], Coroutine[None, None, str]]) -> str:
        """Return the id that the attempt under `name` ends with, starting `make()` if there is
        none.

        A caller that is cancelled leaves the attempt running: it was accepted, it runs to its end.
        """
        task = self._tasks.get(name)
        if task is None:
            task = asyncio.create_task(make(), name=f"attempt {name}")
            self._tasks[name] = task
            task.add_done_callback(lambda done: self._ended(name, done))
        return await asyncio.shield(task)

    async def close(self) -> None:
        """Cancel the attempts and wait until they have taken back what they made."""
        for task in self._tasks.values():
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks.values(), timeout=CLOSE_TIMEOUT)

    def _ended(self, name: Hashable, task: asyncio.Task[str]) -> None:
        del self._tasks[name]
        if not task.cancelled():
            task.exception()  # whoever still waits gets it; with nobody left it is no news
