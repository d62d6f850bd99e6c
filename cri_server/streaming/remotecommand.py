# SPDX-License-Identifier: Apache-2.0
"""Exec and attach: a client's streams on one side, the pod's shim on the other.

    client ──stdin, resize──► Peer ──ExecInput──► shim      each step waits until the next one takes
    client ◄──stdout, stderr── Peer ◄──ExecOutput── shim    what it has, so memory stays flat

How it ended is told on the error stream, after all output. A client that goes away detaches, once
the container has what it had sent; the process of an exec goes on then, as with the peers, with its
stdin closed and its output dropped, unless `exec_abandoned_timeout` ends it. When this server ends,
so do the execs that it serves: the shim kills them. Attached containers go on in any case.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass

from google.protobuf.message import Message

from cri_server import errors, shims
from cri_server.streaming import peer, resize, status
from shim import errors as shim_errors
from shim.pb import shim_pb2 as pb

_PART = 16 << 10  # bytes of sizes that are read at once
Send = Callable[[Message], Awaitable[None]]
LEAVING = 30.0  # seconds for a container to read what a client had sent before it went


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """An exec as a client was promised it. `start` is what the shim gets."""

    pod_id: str
    start: pb.ExecStart
    streams: frozenset[str]  # of stdin, stdout, stderr
    terminal: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Attachment:
    """An attach as a client was promised it. `leaves` when stdin's end ends the session."""

    pod_id: str
    start: pb.AttachStart
    streams: frozenset[str]
    terminal: bool
    leaves: bool


# -- exec ------------------------------------------------------------------------------------------


async def exec(
    client: peer.Peer, command: Command, shim_host: shims.Shims, *, abandoned: float
) -> None:
    """Run the command for the client; its process has ended, or was left alone, on return.

    `abandoned` is how many seconds a process may go on when its client has gone; 0 is for ever.
    """
    try:
        code = await _run(client, command, shim_host, abandoned=abandoned)
        said = status.exited(code, client.version)
    except (shim_errors.ShimError, errors.CriError) as e:
        said = status.failure(e.message, client.version)
    await _finish(client, said)


async def _run(
    client: peer.Peer, command: Command, shim_host: shims.Shims, *, abandoned: float
) -> int:
    """Return the exit code. Raises ShimError when there is none."""
    async with _deadline(client, abandoned), shim_host.of(command.pod_id).exec() as call:
        await call.send(pb.ExecInput(start=command.start))
        target = _ExecInput(call.send, terminal=command.terminal)
        async with _inputs(client, target, terminal=command.terminal):
            while (output := await call.recv()) is not None:
                if output.HasField("exit"):
                    return output.exit.exit_code
                await _pass_on(client, output, command.streams)
    raise shim_errors.Internal("the command ended without saying how")


@contextlib.asynccontextmanager
async def _deadline(client: peer.Peer, seconds: float) -> AsyncIterator[None]:
    """End the block, and thereby the exec, some time after the client has gone."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(None) as limit:

        async def watch() -> None:
            await client.closed.wait()
            limit.reschedule(loop.time() + seconds)

        watching = [asyncio.create_task(watch())] if seconds else []
        try:
            yield
        finally:
            for task in watching:
                task.cancel()


# -- attach ----------------------------------------------------------------------------------------


async def attach(client: peer.Peer, wanted: Attachment, shim_host: shims.Shims) -> None:
    """Join client and container until one of them goes, or the client's stdin says so."""
    try:
        await _join(client, wanted, shim_host)
        said = status.success(client.version)
    except (shim_errors.ShimError, errors.CriError) as e:  # the shim's own, or there is none
        said = status.failure(e.message, client.version)
    await _finish(client, said)


async def _join(client: peer.Peer, wanted: Attachment, shim_host: shims.Shims) -> None:
    """Copy both ways until the shim ends the session: that is when the container has ended, or has
    all that the client sent.
    """
    async with shim_host.of(wanted.pod_id).attach() as call:
        await call.send(pb.AttachInput(start=wanted.start))
        async with _inputs(client, _AttachInput(call.send), terminal=wanted.terminal) as feeding:
            following = asyncio.create_task(_follow(client, call.recv, wanted.streams))
            ending = asyncio.create_task(_end(client, wanted, feeding, call.finish))
            leaving = asyncio.create_task(_leave(client))
            try:
                await asyncio.wait({following, leaving}, return_when=asyncio.FIRST_COMPLETED)
                if following.done():
                    following.result()
            finally:
                for task in (following, ending, leaving):
                    task.cancel()


async def _end(
    client: peer.Peer,
    wanted: Attachment,
    feeding: "asyncio.Task[None]",
    finish: Callable[[], Awaitable[None]],
) -> None:
    """Have the shim end the session after the client's stdin, or when the client has gone, too."""
    await asyncio.wait({feeding})
    if not wanted.leaves:
        await client.closed.wait()
    with contextlib.suppress(shim_errors.ShimError):
        await finish()


async def _leave(client: peer.Peer) -> None:
    """Return when a client has gone and the container has had its time for what it had sent."""
    await client.closed.wait()
    await asyncio.sleep(LEAVING)


async def _follow(
    client: peer.Peer,
    receive: Callable[[], Awaitable[pb.AttachOutput | None]],
    streams: frozenset[str],
) -> None:
    while (output := await receive()) is not None:
        if output.HasField("exit"):
            return
        await _pass_on(client, output, streams)


# -- both ------------------------------------------------------------------------------------------


class _ExecInput:
    """What goes to the process of an exec. A terminal has no end of input of its own."""

    def __init__(self, send: Send, *, terminal: bool) -> None:
        self._send, self._terminal = send, terminal

    async def stdin(self, data: bytes) -> None:
        await self._send(pb.ExecInput(stdin=data))

    async def end(self) -> None:
        if not self._terminal:
            await self._send(pb.ExecInput(close_stdin=True))

    async def resize(self, width: int, height: int) -> None:
        await self._send(pb.ExecInput(resize=pb.Resize(width=width, height=height)))


class _AttachInput:
    """What goes to an attached container; the shim knows whether its stdin ends with a client's."""

    def __init__(self, send: Send) -> None:
        self._send = send

    async def stdin(self, data: bytes) -> None:
        await self._send(pb.AttachInput(stdin=data))

    async def end(self) -> None:
        await self._send(pb.AttachInput(close_stdin=True))

    async def resize(self, width: int, height: int) -> None:
        await self._send(pb.AttachInput(resize=pb.Resize(width=width, height=height)))


@contextlib.asynccontextmanager
async def _inputs(
    client: peer.Peer, target: _ExecInput | _AttachInput, *, terminal: bool
) -> AsyncIterator["asyncio.Task[None]"]:
    """Pass on what the client sends while the block runs; yield the task for its stdin."""
    feeding = asyncio.create_task(_feed(client, target))
    sizing = asyncio.create_task(_resize(client, target)) if terminal else None
    try:
        yield feeding
    finally:
        for task in filter(None, (feeding, sizing)):
            task.cancel()


async def _feed(client: peer.Peer, target: _ExecInput | _AttachInput) -> None:
    with contextlib.suppress(shim_errors.ShimError):
        while data := await client.read("stdin"):
            await target.stdin(data)
        await target.end()


def _parts(data: bytes) -> Iterator[bytes]:
    """Cut what a client sent into parts that take no time: between them others have their turn."""
    return (data[at : at + _PART] for at in range(0, len(data), _PART))


async def _resize(client: peer.Peer, target: _ExecInput | _AttachInput) -> None:
    sizes = resize.Sizes()
    with contextlib.suppress(shim_errors.ShimError, peer.Gone):
        while data := await client.read("resize"):
            for part in _parts(data):
                for size in sizes.feed(part):
                    await target.resize(*size)
                await asyncio.sleep(0)
    while await client.read("resize"):  # what is left there would hold up the other streams
        continue


async def _pass_on(
    client: peer.Peer, output: pb.ExecOutput | pb.AttachOutput, streams: frozenset[str]
) -> None:
    """Send output to the client, of the streams that it has asked for."""
    stream = output.WhichOneof("output")
    if stream in streams:
        with contextlib.suppress(peer.Gone):
            await client.write(stream, getattr(output, stream))


async def _finish(client: peer.Peer, said: bytes) -> None:
    with contextlib.suppress(peer.Gone):
        if said:
            await client.write("error", said)
    await client.close()
