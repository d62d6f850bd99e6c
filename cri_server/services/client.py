# SPDX-License-Identifier: Apache-2.0
"""A client of a running server, for our own command line: CRI's calls and ours over one channel.

A server that is starting, or is about to be, is waited for. What it refuses is raised as `Refused`,
with its words; nobody else has to know gRPC.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

import grpc

from cri_server.pb import api_pb2 as api
from cri_server.pb import api_pb2_grpc
from cri_server.services import archives

if TYPE_CHECKING:
    from cri_server.pb.api_pb2_grpc import RuntimeServiceAsyncStub

T = TypeVar("T")
POLL = 0.3  # seconds
CALL = 10.0  # seconds that a Version may take


class Refused(Exception):
    """What the server answered, or that nobody did. `code` is the name of a gRPC status code."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Client:
    """The two services. Calls go through `said`, or raise gRPC's own errors."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.runtime: RuntimeServiceAsyncStub = api_pb2_grpc.RuntimeServiceStub(channel)
        self.archives = archives.Client(channel)


@contextlib.asynccontextmanager
async def connect(address: str, *, patience: float = 0.0) -> AsyncIterator[Client]:
    """Have a server that answers for the block; wait `patience` seconds for one.

    Raises Refused (UNAVAILABLE) when there is none then.
    """
    options = [("grpc.max_reconnect_backoff_ms", 200), ("grpc.initial_reconnect_backoff_ms", 100)]
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        client, deadline = Client(channel), time.monotonic() + patience
        while True:
            try:
                await said(lambda: client.runtime.Version(api.VersionRequest(), timeout=CALL))
                break
            except Refused as e:
                if e.code != "UNAVAILABLE" or time.monotonic() >= deadline:
                    raise Refused(e.code, f"no server answers on {address}: {e}") from e
            await asyncio.sleep(POLL)
        yield client


async def said(call: Callable[[], Awaitable[T]]) -> T:
    """Return what a call returns. Raises Refused."""
    try:
        return await call()
    except grpc.aio.AioRpcError as e:
        raise Refused(e.code().name, e.details() or e.code().name) from e
