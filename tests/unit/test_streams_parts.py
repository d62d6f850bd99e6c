# SPDX-License-Identifier: Apache-2.0
"""The small parts of streaming: mailboxes, terminal sizes, statuses."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from typing import NoReturn, Self, cast

import pytest

from cri_server import errors, shims
from cri_server.streaming import peer, remotecommand, resize, status
from shim.pb import shim_pb2 as pb

NONE: frozenset[str] = frozenset()


async def test_a_full_mailbox_holds_the_sender_until_it_is_read() -> None:
    box = peer.Mailbox()
    await box.put(bytes(peer.MAILBOX + 1))
    waiting = asyncio.create_task(box.put(b"more"))
    await asyncio.sleep(0)
    assert not waiting.done()
    assert len(await box.get()) == peer.MAILBOX + 1
    await waiting
    assert await box.get() == b"more"


@pytest.mark.parametrize("end", [peer.Mailbox.end, peer.Mailbox.drop])
async def test_the_end_wakes_who_waits(end: object) -> None:
    box = peer.Mailbox()
    reading = asyncio.create_task(box.get())
    await asyncio.sleep(0)
    end(box)  # type: ignore[operator]
    assert await reading == b""
    await box.put(b"late")
    assert await box.get() == b""


async def test_what_nobody_reads_is_dropped_and_holds_nobody() -> None:
    box = peer.Mailbox()
    await box.put(bytes(peer.MAILBOX + 1))
    waiting = asyncio.create_task(box.put(b"more"))
    await asyncio.sleep(0)
    box.drop()
    await waiting
    assert await box.get() == b""


@pytest.mark.parametrize(
    ("parts", "size"),
    [
        ([b'{"Width":80,"Height":24}'], ((80, 24),)),
        ([b'{"Width":80,', b'"Height":24}\n'], ((80, 24),)),
        ([b'{"Width":80,"Height":24} {"Width":81,"Height":25}'], ((80, 24), (81, 25))),
        ([b'{"Width":7,"Height":7}', b'{"Width":8,"Height":2}{}'], ((8, 2),)),
        ([b'{"Width":0,"Height":24}'], ()),
        ([b'{"Width":-1,"Height":24}{"Width":70000,"Height":1}{}'], ()),
    ],
)
def test_terminal_sizes(parts: list[bytes], size: tuple[tuple[int, int], ...]) -> None:
    sizes = resize.Sizes()
    assert [sizes.feed(part) for part in parts][-1] == size


def test_many_sizes_take_no_longer_each_than_few() -> None:
    def seconds(number: int) -> float:
        began = time.process_time()
        resize.Sizes().feed(b"{}" * number)
        return (time.process_time() - began) / number

    assert seconds(128 << 10) < 5 * max(seconds(4 << 10), 1e-6)


def test_what_is_no_size_ends_the_session() -> None:
    sizes = resize.Sizes()
    assert sizes.feed(b"{garbage" * 500) == ()
    with pytest.raises(peer.Gone):
        sizes.feed(b"{garbage" * 100)


async def test_an_exec_whose_shim_is_gone_ends_with_a_status() -> None:
    class Client:
        version = 4

        def __init__(self) -> None:
            self.closed, self.told = asyncio.Event(), b""

        async def read(self, _stream: str) -> bytes:
            return b""

        async def write(self, stream: str, data: bytes) -> None:
            assert stream == "error"
            self.told += data

        async def close(self) -> None:
            self.closed.set()

    class Shims:
        def of(self, pod_id: str) -> NoReturn:
            raise errors.Unavailable(f"pod {pod_id} has no shim")

    command, attachment = (
        remotecommand.Command(pod_id="p", start=pb.ExecStart(), streams=NONE, terminal=False),
        attaching(leaves=False),
    )
    gone = cast("shims.Shims", Shims())
    of_exec, of_attach = Client(), Client()
    await remotecommand.exec(of_exec, command, gone, abandoned=0)
    await remotecommand.attach(of_attach, attachment, gone)
    for client in (of_exec, of_attach):
        assert json.loads(client.told)["message"] == "pod p has no shim"
        assert client.closed.is_set()


class Leaving:
    """A client that has left; this is what it sent before."""

    version = 4

    def __init__(self, *sent: bytes) -> None:
        self._sent = list(sent)
        self.closed = asyncio.Event()
        self.closed.set()

    async def read(self, stream: str) -> bytes:
        return self._sent.pop(0) if stream == "stdin" and self._sent else b""

    async def write(self, _stream: str, _data: bytes) -> NoReturn:
        raise peer.Gone

    async def close(self) -> None:
        return


class Slow:
    """A shim, and an attach to it, that takes its time for each message, or for ever for all."""

    def __init__(self, *, stuck: bool = False) -> None:
        self.taken, self._stuck, self._finished = b"", stuck, asyncio.Event()

    def of(self, _pod_id: str) -> Self:
        return self

    @contextlib.asynccontextmanager
    async def attach(self) -> AsyncIterator[Self]:
        yield self

    async def send(self, message: pb.AttachInput) -> None:
        await asyncio.sleep(0.01)
        self.taken += message.stdin

    async def finish(self) -> None:
        if not self._stuck:
            self._finished.set()

    async def recv(self) -> None:
        await self._finished.wait()


def attaching(*, leaves: bool) -> remotecommand.Attachment:
    return remotecommand.Attachment(
        pod_id="p", start=pb.AttachStart(), streams=NONE, terminal=False, leaves=leaves
    )


@pytest.mark.parametrize("leaves", [False, True])
async def test_what_a_client_sent_before_it_left_reaches_the_container(*, leaves: bool) -> None:
    shim = Slow()
    client = Leaving(b"one ", b"two ", b"three")
    async with asyncio.timeout(5):
        await remotecommand.attach(client, attaching(leaves=leaves), cast("shims.Shims", shim))
    assert shim.taken == b"one two three"


async def test_a_container_that_does_not_read_keeps_no_session(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(remotecommand, "LEAVING", 0.05)
    stuck = cast("shims.Shims", Slow(stuck=True))
    async with asyncio.timeout(5):
        await remotecommand.attach(Leaving(b"data"), attaching(leaves=True), stuck)


def test_statuses_by_version() -> None:
    assert json.loads(status.exited(0, 4)) == {"metadata": {}, "status": "Success"}
    assert status.exited(0, 3) == b""
    assert json.loads(status.exited(3, 5))["details"] == {
        "causes": [{"reason": "ExitCode", "message": "3"}]
    }
    assert status.exited(3, 1) == b"command terminated with non-zero exit code: 3"
    assert json.loads(status.failure("no such file", 4))["code"] == 500
    assert status.failure("no such file", 2) == b"no such file"
