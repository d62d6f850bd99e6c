# SPDX-License-Identifier: Apache-2.0
"""A blob on its way to a sink, over as many connections and hosts as it takes.

Goes on with `Range` where a connection was cut; a host that ignores Range or gives another one is
asked for the whole, and what is here already is skipped. Never hands on more than the descriptor's
size. The digest is the sink's to verify: bytes that it has taken cannot be taken back.
"""

import contextlib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass

from cri_server.images import documents, session, transport, wire

MAX_WITHOUT_PROGRESS = 3  # attempts in a row that bring nothing, as in containerd
MAX_SMALL = 100  # attempts of one transfer that bring little; a peer could go on for ever
SMALL = 64 << 10  # bytes
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18}|\*)")

Sink = Callable[[bytes], object]  # or a coroutine function


@dataclass(kw_only=True, slots=True)
class Transfer:
    """One transfer; `offset` is how many bytes the sink has."""

    descriptor: documents.Descriptor
    sink: Sink
    offset: int

    async def run(self, at: session.Session) -> None:
        """Bring all that is still missing from one host."""
        fruitless, small, ranges = 0, 0, True
        while self.offset < self.descriptor.size:
            before = self.offset
            try:
                await self._once(at, ranges=ranges)
            except (wire.Broken, _NoRange) as error:
                brought = self.offset - before
                fruitless = 0 if brought else fruitless + 1
                small += brought < SMALL
                if fruitless >= (MAX_WITHOUT_PROGRESS if at.patient else 1) or small >= MAX_SMALL:
                    raise
                ranges = ranges and not isinstance(error, _NoRange)
                await at.pause(max(fruitless, 1))

    async def _once(self, at: session.Session, *, ranges: bool) -> None:
        asked = ranges and self.offset > 0
        headers = (("Range", f"bytes={self.offset}-"),) if asked else ()
        try:
            response = await at.ask("blobs", self.descriptor.digest, headers=headers)
        except session.Status as error:
            if asked and error.status == 416:
                raise _NoRange(str(error)) from error
            raise
        with contextlib.closing(response):
            await self._copy(response, skip=self._start(response, asked=asked))

    def _start(self, response: transport.Response, *, asked: bool) -> int:
        """Return how many bytes of a response to skip: all that we have, when Range was ignored."""
        size, length = self.descriptor.size, response.length
        if response.status == 206 and asked:
            match = _CONTENT_RANGE.fullmatch(response.header("content-range"))
            if not match or int(match[1]) != self.offset or match[2] not in {"*", str(size)}:
                raise _NoRange(f"{response.host} sent another range than it was asked for")
            if length is not None and length > size - self.offset:
                raise wire.Invalid(f"{response.host} sent more than the {size} bytes of the blob")
            return 0
        if response.status != 200:
            raise wire.Invalid(f"{response.host} answered {response.status} for a blob")
        if length is not None and length != size:
            raise wire.Invalid(f"{response.host} has {length} bytes of a blob of {size}")
        return self.offset

    async def _copy(self, response: transport.Response, *, skip: int) -> None:
        while data := await response.receive():
            skipped = min(skip, len(data))
            skip -= skipped
            data = data[skipped:]
            if len(data) > self.descriptor.size - self.offset:
                raise wire.Invalid(
                    f"{response.host} sent more than the {self.descriptor.size} bytes of the blob"
                )
            self.offset += len(data)
            if data and inspect.isawaitable(waiting := self.sink(data)):
                await waiting
        if self.offset < self.descriptor.size:
            raise wire.Broken(
                f"{response.host} sent less than the {self.descriptor.size} bytes of the blob"
            )


class _NoRange(wire.Broken):
    """The host cannot resume: ask for the whole, and skip."""
