# SPDX-License-Identifier: Apache-2.0
"""Leftovers of pods whose containerd shim has lost our own shim: processes, state, the home.

All is found by the home (`shim.binary`): a process that has it in the environment is killed, the
binary's `delete` is run for each container that is noted there, and the folder goes last. A home
whose owner lives is left alone. All of it can be done again.
"""

import asyncio
import shutil
import time
from pathlib import Path

import structlog

from cri_server import commands, config, errors, orphans
from shim import binary

log = structlog.get_logger()
_KILL_TIMEOUT, _KILL_PAUSE = 10.0, 0.02  # seconds
_DELETE_TIMEOUT = 10.0


class Shimv2Leftovers:
    """What is left of the pods of one handler, whose homes are below `root`."""

    def __init__(self, handler: config.Handler, root: Path, orphan_host: orphans.Orphans) -> None:
        self._handler, self._root, self._orphans = handler, root, orphan_host

    def known(self, container_id: str) -> bool:
        """Say whether there is something of a container, or of the pod of this id, that nobody
        holds.
        """
        return any(not binary.is_held(str(home)) for home in self._homes(container_id))

    async def clear(self, container_id: str) -> None:
        """Kill a pod's shim with all that it started, and have its binary clean up behind the
        container; behind all of them, and remove the home, if it is the pod's id.

        Raises DeadlineExceeded when something cannot be killed.
        """
        for home in await asyncio.to_thread(self._homes, container_id):
            await self._kill(home)
            await asyncio.to_thread(binary.remove_socket, str(home))
            noted = await asyncio.to_thread(binary.noted, str(home))
            whole = home.name == container_id
            for one in noted if whole else noted.keys() & {container_id}:
                await self._delete(home, one, noted[one])
            if whole:
                await asyncio.to_thread(shutil.rmtree, home, ignore_errors=True)

    def _homes(self, container_id: str) -> list[Path]:
        """Return the homes that know a container, or are the pod's of this id."""
        noted = [link.parent.parent for link in self._root.glob(f"*/bundles/{container_id}")]
        own = self._root / container_id
        return [own] if own.is_dir() else noted

    async def _kill(self, home: Path) -> None:
        """Kill all that has the home in its environment, once its owner has let go of it."""
        deadline = time.monotonic() + _KILL_TIMEOUT
        while await asyncio.to_thread(binary.is_held, str(home)) or await self._orphans.kill(
            binary.mark(str(home))
        ):
            if time.monotonic() > deadline:
                raise errors.DeadlineExceeded(f"what was started for {home} cannot be killed")
            await asyncio.sleep(_KILL_PAUSE)

    async def _delete(self, home: Path, container_id: str, bundle: str) -> None:
        """Run the binary's `delete`; what it cannot do is logged, for nothing lives any more."""
        if await asyncio.to_thread(Path(bundle).is_dir):
            argv = binary.argv(
                self._handler.path, str(home), "delete", wanted=container_id, directory=bundle
            )
            try:
                await commands.run(argv, env=binary.environment(str(home)), timeout=_DELETE_TIMEOUT)
            except (commands.Failed, commands.TimedOut, OSError) as e:
                log.warning("shim does not clean up", container=container_id, error=str(e))
        await asyncio.to_thread(binary.forget, str(home), container_id)
