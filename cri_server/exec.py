# SPDX-License-Identifier: Apache-2.0
"""Running a command in a container: ExecSync, and what an exec of a client that stays starts from.

The process is the container's own (its user, capabilities, environment, working directory) with
another command line. The shim runs it, kills the whole tree when the time is over or when we hang
up, and reads its output; of each stream the first 16 MiB are kept.
"""

import asyncio
from collections.abc import Sequence

import msgspec

from cri_server import (
    bundles,
    cgroup_prewarm,
    config,
    configjson,
    containers,
    errors,
    shims,
    spec,
    state,
)
from shim import client
from shim.pb import shim_pb2

OUTPUT_LIMIT = 16 << 20
_LONGEST = 1 << 53  # milliseconds; a kubelet may send any int64 of seconds
SHIM_SLACK = 10.0  # seconds that killing a tree takes a shim at most, and some


class _Config(msgspec.Struct):
    """The one part of config.json that an exec starts from."""

    process: dict[str, object]


class Exec:
    """What ExecSync does. `container_id` is an id or a unique prefix of one."""

    def __init__(
        self,
        *,
        settings: config.Config,
        container_host: containers.Containers,
        bundle_host: bundles.Bundles,
        shim_host: shims.Shims,
        prewarm: cgroup_prewarm.Prewarm,
    ) -> None:
        self._prewarm = prewarm
        self._settings, self._containers = settings, container_host
        self._bundles, self._shims = bundle_host, shim_host
        self._decoder = msgspec.json.Decoder(_Config)

    async def sync(
        self, container_id: str, cmd: Sequence[str], *, timeout: float
    ) -> client.ExecResult:
        """Run `cmd` and return its output and exit code; `timeout` in seconds, 0 is no limit.

        Raises NotFound, FailedPrecondition when the container does not run, InvalidArgument without
        a command, DeadlineExceeded when the time is over (a kubelet probe then counts as failed);
        nothing of the exec is left then.
        """
        container = self._containers.running(container_id)
        start = self.start(container, cmd)
        start.timeout_ms = min(max(int(timeout * 1000), 0), _LONGEST)
        done = await self._run(container.pod_id, start)
        if done.timed_out:
            raise errors.DeadlineExceeded(f"command {cmd[0][:200]!r} timed out after {timeout:g} s")
        return done

    def start(
        self,
        container: state.Container,
        cmd: Sequence[str],
        *,
        terminal: bool = False,
        stdin: bool = False,
    ) -> shim_pb2.ExecStart:
        """Return what a shim needs to run `cmd`. Raises InvalidArgument without a command,
        FailedPrecondition for a damaged bundle.
        """
        if not cmd:
            raise errors.InvalidArgument("cmd is empty")
        self._prewarm.start()
        return shim_pb2.ExecStart(
            id=container.id,
            process=self._process(container.id, cmd, terminal=terminal),
            stdin=stdin,
            drain_ms=int(self._settings.runtime.exec_drain_timeout * 1000),
        )

    async def _run(self, pod_id: str, start: shim_pb2.ExecStart) -> client.ExecResult:
        """Have the shim do it; the shim watches the time, and we that the shim does."""
        limit = (start.timeout_ms + start.drain_ms) / 1000 + SHIM_SLACK
        try:
            async with asyncio.timeout(limit if start.timeout_ms else None):
                with shims.translate_errors():
                    return await self._shims.of(pod_id).exec_sync(start, max_bytes=OUTPUT_LIMIT)
        except TimeoutError as e:
            raise errors.DeadlineExceeded(
                f"the shim of pod sandbox {pod_id[:13]} does not answer"
            ) from e

    def _process(self, container_id: str, cmd: Sequence[str], *, terminal: bool) -> bytes:
        try:
            text = (self._bundles.directory(container_id) / configjson.NAME).read_bytes()
            process = self._decoder.decode(text).process
        except (OSError, msgspec.DecodeError) as e:
            raise errors.FailedPrecondition(f"the container's bundle is damaged: {e}") from e
        return msgspec.json.encode(
            spec.process(spec.ExecInput(process=process, cmd=tuple(cmd), tty=terminal))
        )
