# SPDX-License-Identifier: Apache-2.0
"""What holds for every RPC: errors become statuses, each call is logged, an accepted mutation runs
to its end.

Until recovery is done every call is answered UNAVAILABLE: an empty list would make the kubelet
believe that all pods are gone. A caller's deadline or disconnect ends the *wait* for a mutation and
not the mutation; calls whose work is for the caller alone (PullImage, ExecSync, the lists) end with
it.
"""

from __future__ import annotations  # grpc's own classes are not generic, their stubs are

import asyncio
import errno
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import structlog
from google.protobuf import message

from cri_server import errors

log = structlog.get_logger()

MUTATIONS = frozenset(
    {
        "RunPodSandbox",
        "StopPodSandbox",
        "RemovePodSandbox",
        "CreateContainer",
        "StartContainer",
        "StopContainer",
        "RemoveContainer",
        "UpdateContainerResources",
        "ReopenContainerLog",
        "UpdateRuntimeConfig",
        "UpdatePodSandboxResources",
        "RemoveImage",
        "Tag",
    }
)
MESSAGE_LIMIT = 4096
_SHORTAGES = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
DRAIN_TIMEOUT = 10.0

Behaviour = Callable[[Any, Any], Awaitable[Any]]
StreamBehaviour = Callable[[Any, Any], AsyncIterator[Any]]


class Edge(grpc.aio.ServerInterceptor):
    """Wraps every handler; `ready` is set when recovery is done."""

    def __init__(self) -> None:
        self.ready = False
        self._wrapped: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
        self._accepted: set[asyncio.Task[Any]] = set()
        self._calls: set[asyncio.Task[Any]] = set()

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        path = handler_call_details.method
        known = self._wrapped.get(path)
        if known is None:
            handler = await continuation(handler_call_details)
            if handler is None:
                return None
            known = self._wrapped[path] = self._wrap(path.rpartition("/")[2], handler)
        return known

    def _wrap(self, name: str, handler: Any) -> grpc.RpcMethodHandler[Any, Any]:
        codec = {
            "request_deserializer": _lenient(handler.request_deserializer),
            "response_serializer": handler.response_serializer,
        }
        if handler.unary_stream is not None:
            streaming = self._stream(name, handler.unary_stream)
            return grpc.unary_stream_rpc_method_handler(streaming, **codec)
        return grpc.unary_unary_rpc_method_handler(self._unary(name, handler.unary_unary), **codec)

    def _unary(self, name: str, behaviour: Behaviour) -> Behaviour:
        async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            began = time.perf_counter()
            self._note_call()
            with structlog.contextvars.bound_contextvars(rpc=name, **_ids(request)):
                try:
                    _check_whole(request)
                    self._check_ready()
                    if name not in MUTATIONS:
                        return await behaviour(request, context)
                    return await asyncio.shield(self._accept(behaviour(request, context)))
                except Exception as e:
                    await context.abort(*_status(e))
                finally:
                    log.debug("rpc", ms=round((time.perf_counter() - began) * 1000, 2))

        return call

    def _stream(self, name: str, behaviour: StreamBehaviour) -> StreamBehaviour:
        async def call(
            request: Any, context: grpc.aio.ServicerContext[Any, Any]
        ) -> AsyncIterator[Any]:
            try:
                _check_whole(request)
                self._check_ready()
                async for item in behaviour(request, context):
                    yield item
            except Exception as e:
                with structlog.contextvars.bound_contextvars(rpc=name):
                    await context.abort(*_status(e))

        return call

    def _note_call(self) -> None:
        task = asyncio.current_task()
        if task is not None:
            self._calls.add(task)
            task.add_done_callback(self._calls.discard)

    def _check_ready(self) -> None:
        if not self.ready:
            raise errors.Unavailable(
                "the server is starting: it recovers the pods of an earlier run"
            )

    def _accept(self, work: Awaitable[Any]) -> asyncio.Task[Any]:
        task = asyncio.ensure_future(work)
        self._accepted.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._accepted.discard(task)
        if not task.cancelled():
            task.exception()  # for whoever still waits; nobody may be left

    async def drain(self) -> None:
        """Wait for calls in progress and for accepted mutations, but not for ever: recovery
        finishes the rest. Streams are not waited for.
        """
        if busy := self._accepted | self._calls:
            await asyncio.wait(busy, timeout=DRAIN_TIMEOUT)


class _Malformed(Exception):
    """Bytes that are no message."""


def _lenient(parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """Return a deserializer that never fails: gRPC would answer UNKNOWN, and print a traceback."""

    def deserialize(data: bytes) -> Any:
        try:
            return parse(data)
        except message.DecodeError as e:
            return _Malformed(str(e))

    return deserialize


def _check_whole(request: Any) -> None:
    if isinstance(request, _Malformed):
        raise errors.InvalidArgument(f"the request cannot be read: {request}")


def _ids(request: Any) -> dict[str, str]:
    """Return the ids that a request names, as fields for every log line of its handling."""
    fields = {"pod_sandbox_id": "pod", "container_id": "container"}
    found = {label: getattr(request, name, "") for name, label in fields.items()}
    return {label: value[:64] for label, value in found.items() if value}


def _status(error: Exception) -> tuple[grpc.StatusCode, str]:
    """Return the status of a failed call, and log it: our own bugs with a traceback."""
    if isinstance(error, ExceptionGroup):
        return _status(error.exceptions[0])
    if isinstance(error, errors.CriError):
        log.info("rpc failed", code=error.code, error=error.message)
        return grpc.StatusCode[error.code], _one_line(error.message)
    if _is_shortage(error):
        log.error("rpc failed", code=errors.ResourceExhausted.code, error=repr(error))
        return grpc.StatusCode.RESOURCE_EXHAUSTED, _one_line(str(error))
    log.error("rpc failed", exc_info=error)
    return grpc.StatusCode.INTERNAL, _one_line(f"{type(error).__name__}: {error}")


def _is_shortage(error: Exception) -> bool:
    """Say whether the host has too little of something; Python tells of threads by words alone."""
    if isinstance(error, OSError):
        return error.errno in _SHORTAGES
    return isinstance(error, MemoryError) or "can't start new thread" in str(error)


def _one_line(text: str) -> str:
    """Return a text for a gRPC status: in percent-encoding, which makes three bytes of each that is
    not plain ASCII, clients take 8 KiB (grpc-core's limit of metadata).
    """
    text = " ".join(text.split())[:MESSAGE_LIMIT]
    size = 0
    for n, c in enumerate(text):
        size += 1 if " " <= c <= "~" and c != "%" else 3 * len(c.encode("utf-8", "surrogatepass"))
        if size > MESSAGE_LIMIT:
            return text[:n]
    return text
