# SPDX-License-Identifier: Apache-2.0
"""A client that joins the standard streams of a running container until either of them goes.

The container never ends because of a client, and a client that leaves takes nothing with it but,
where the container was made with `stdin_once`, its stdin. One that says that it sends no more
leaves when all that it sent is written; one that is lost, at once.
"""

import contextlib
from collections.abc import Set as AbstractSet
from typing import Protocol

from shim import container, errors, loop
from shim.pb import shim_pb2 as pb


class Client(Protocol):
    """The caller. `recv` gives None when nothing more will come; whoever runs the call cancels it
    when lost.
    """

    async def recv(self) -> pb.AttachInput | None:
        """Return the next input."""

    async def send(self, message: pb.AttachOutput) -> None:
        """Pass output on. Raises Unavailable when the client is gone."""


async def attach(owner: container.Container, start: pb.AttachStart, client: Client) -> None:
    """Serve a client until the container has ended, and tell it how, or until the client leaves.

    Raises FailedPrecondition, DeadlineExceeded when the client was dropped because it takes no
    output, or too slowly at the container's end.
    """
    owner.require(container.State.RUNNING, verb="attach to")
    session = _Session(start, client)
    owner.streams.add(session)
    listener = loop.spawn(_listen(owner, start, client, session.over), name="attach input")
    waiting = loop.spawn(session.wait(owner), name="attach end")
    try:
        await session.over.wait()
        if session.dropped or session.misses(owner.streams.withheld):
            raise errors.DeadlineExceeded("output was not read for too long: detached")
        if session.record:
            await client.send(pb.AttachOutput(exit=session.record))
    finally:
        listener.cancel()
        waiting.cancel()
        owner.streams.remove(session)
        await _leave_stdin(owner, start)


class _Session:
    """The output that a client asked for, as one of the `stdio.Sink`s."""

    def __init__(self, start: pb.AttachStart, client: Client) -> None:
        self._start = start
        self._client = client
        self.over = loop.Event()
        self.dropped = False
        self.record: pb.ExitRecord | None = None

    def misses(self, withheld: AbstractSet[str]) -> bool:
        """Say whether one of these streams was asked for."""
        return any(getattr(self._start, stream) for stream in withheld)

    async def wait(self, owner: container.Container) -> None:
        """Wait for the container's end; `over` is set then, or when the client was dropped."""
        self.record = await owner.wait()
        self.over.set()

    async def output(self, stream: str, data: bytes) -> None:
        try:
            await self._send(stream, data)
        except loop.Cancelled as error:
            if error.scope:  # a time-out: `stdio` will not call again
                self.dropped = True
                self.over.set()
            raise

    async def _send(self, stream: str, data: bytes) -> None:
        if stream == "stdout" and self._start.stdout:
            await self._client.send(pb.AttachOutput(stdout=data))
        if stream == "stderr" and self._start.stderr:
            await self._client.send(pb.AttachOutput(stderr=data))


async def _listen(
    owner: container.Container, start: pb.AttachStart, client: Client, over: loop.Event
) -> None:
    """Take input until the client has no more; all of it is written when `over` is set."""
    with contextlib.suppress(errors.ShimError):
        while (message := await client.recv()) is not None:
            match message.WhichOneof("input"):
                case "stdin" if start.stdin:
                    await owner.streams.write_stdin(message.stdin)
                case "resize":
                    owner.streams.resize(message.resize.width, message.resize.height)
                case "close_stdin":  # sizes of the terminal may still come
                    await _leave_stdin(owner, start)
        over.set()


async def _leave_stdin(owner: container.Container, start: pb.AttachStart) -> None:
    if start.stdin and owner.spec.stdin_once:
        await owner.streams.close_stdin()
