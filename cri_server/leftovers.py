# SPDX-License-Identifier: Apache-2.0
"""Leftovers of containers that have no shim: processes, cgroups, what the OCI runtime remembers.

A shim ends its containers itself and has the runtime forget them. Where it is gone, or never was
told, that is done here, from outside: kill what is in the cgroup, then `delete` it. All of it can
be done again; nothing is kept in memory.
"""

import asyncio
import os
import time
from pathlib import Path

import structlog
from google.protobuf import json_format

from cri_server import (
    cgroups,
    commands,
    config,
    configjson,
    errors,
    handlers,
    leftovers_shimv2,
    names,
    orphans,
    revisions,
    state,
)
from shim.pb import shim_pb2

log = structlog.get_logger()
KILL_TIMEOUT = 10.0  # seconds until one that cannot be killed is an error


class Leftovers:
    """What is left of containers, by handler, container id and cgroup path."""

    def __init__(
        self,
        settings: config.Config,
        live: handlers.Handlers,
        groups: cgroups.Cgroups,
        orphan_host: orphans.Orphans,
    ) -> None:
        self._settings, self._handlers, self._groups = settings, live, groups
        self._orphans = orphan_host

    async def kill_and_read_exit(
        self, container: state.Container, bundle: Path
    ) -> shim_pb2.ExitRecord:
        """End a container whose shim is gone; return the shim's exit record or the lost one's.

        Raises DeadlineExceeded when it cannot be killed. A runtime that fails is left to `remove`.
        """
        await self._kill(container.handler, container.id, container.cgroups_path)
        try:
            await self._forget(container.handler, container.id, container.cgroups_path)
        except errors.CriError as e:
            log.warning("runtime does not forget", container=container.id, error=e.message)
        try:
            text = (bundle / "exit.json").read_text()
            return json_format.Parse(text, shim_pb2.ExitRecord(), ignore_unknown_fields=True)
        except (OSError, ValueError, json_format.ParseError):
            return shim_pb2.ExitRecord(
                exit_code=255,
                finished_at=time.time_ns(),
                reason="Unknown",
                message="the exit code was lost with the shim",
            )

    async def kill(self, container: state.Container) -> bool:
        """Kill what is in a container's cgroup, once; return whether there was anything. For one
        whose shim is too slow to do it. Raises OSError.
        """
        return await asyncio.to_thread(self._groups.kill, container.cgroups_path)

    async def remove(self, handler: str, container_id: str, cgroups_path: str) -> None:
        """Kill what is in a container's cgroup and have the OCI runtime forget the container;
        nothing of it there is fine.
        """
        if self._known(handler, container_id, cgroups_path):
            await self.kill_and_delete(handler, container_id, cgroups_path)

    async def kill_and_delete(self, handler: str, container_id: str, cgroups_path: str) -> None:
        """Do the work of `remove`, also where only a runtime at work tells of the container."""
        await self._kill(handler, container_id, cgroups_path)
        await self._forget(handler, container_id, cgroups_path)

    def has_shim_folder(self, handler: str) -> bool:
        """Say whether every pod of a handler has something here, though it has no sandbox
        container.
        """
        return self._shims(handler) is not None

    def in_runtimes(self) -> list[tuple[str, str]]:
        """Return handler and id of every container that an OCI runtime has state of."""
        places = (self._settings.server.state / "runtimes").glob("*/*")
        found = {(p.parent.name, p.name.partition("_")[0]) for p in places}  # "_": those of runsc
        return sorted((handler, name) for handler, name in found if names.is_id(name))

    async def kill_and_delete_unrecorded(
        self, handler: str, container_id: str, bundle: Path
    ) -> None:
        """Do the work of `kill_and_delete` for a container of which only the bundle tells."""
        try:
            cgroups_path = str(configjson.read(bundle)["linux"]["cgroupsPath"])
        except (OSError, ValueError, TypeError, KeyError):
            cgroups_path = ""
        await self.kill_and_delete(handler, container_id, cgroups_path)

    async def _kill(self, handler: str, container_id: str, cgroups_path: str) -> None:
        """Kill an OCI runtime that is still at work on the container, and what is in its cgroup."""
        deadline = time.monotonic() + KILL_TIMEOUT
        words = self._runtime_root(handler), container_id
        if shims := self._shims(handler):
            await shims.clear(container_id)
        while await self._orphans.kill(*words) or await asyncio.to_thread(
            self._groups.kill, cgroups_path
        ):
            if time.monotonic() > deadline:
                raise errors.DeadlineExceeded(f"container {container_id[:13]} cannot be killed")
            await asyncio.sleep(0.02)

    async def _forget(self, handler: str, container_id: str, cgroups_path: str) -> None:
        if not self._known(handler, container_id, cgroups_path):
            return
        found, root = self._handlers.of(handler), self._runtime_root(handler)
        if found.kind == "oci":  # what a containerd shim knew went as it was killed
            argv = [found.path, "--root", root, *found.args, "delete", "--force", container_id]
            await commands.run(argv, timeout=self._settings.runtime.runtime_timeout)
        await asyncio.to_thread(self._groups.remove_all, cgroups_path)

    def _known(self, handler: str, container_id: str, cgroups_path: str) -> bool:
        """Say whether the runtime, or a cgroup, still has something of the container."""
        root, found = self._runtime_root(handler), self._handlers.find(handler)
        if (shims := self._shims(handler)) and shims.known(container_id):
            return True
        if found is not None and found.handler.kind == "oci" and found.handler.has_guest_kernel:
            # "<id>_sandbox:<id of the pod>.state"
            return any(Path(root).glob(f"{container_id}_*"))
        places = [f"{root}/{container_id}"]
        places += self._groups.every(cgroups_path).values() if cgroups_path else []
        return any(map(os.path.exists, places))

    def _shims(self, handler: str) -> leftovers_shimv2.Shimv2Leftovers | None:
        found = self._handlers.find(handler)
        if found is None or found.handler.kind != "shim":
            return None
        root = Path(self._runtime_root(handler))
        return leftovers_shimv2.Shimv2Leftovers(found.handler, root, self._orphans)

    def _runtime_root(self, handler: str) -> str:
        return str(self._settings.server.state / "runtimes" / revisions.name_of(handler))
