# SPDX-License-Identifier: Apache-2.0
"""A small HTTP/1.1 server on a unix socket, for GET and short answers.

Everything is bounded: connections, the size of a request's head, the time it may take to arrive and
the time an answer may wait for its reader. A request that is no HTTP is answered 400 and its
connection ends. Nothing is kept across a crash but the socket's file, which the next server
replaces; one that somebody still listens on is left alone.
"""

import asyncio
import contextlib
import os
import socket
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import h11
import structlog

from cri_server import errors

log = structlog.get_logger()
MODE = 0o660
MOST_CONNECTIONS = 64
MOST_HEAD = 8192  # bytes of request line and headers
IDLE_TIMEOUT = 120.0  # seconds between requests
SEND_TIMEOUT = 10.0
PIECE = 8192


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a request gets."""

    status: int = 200
    type: str = "text/plain; charset=utf-8"
    body: bytes = b""


class Server:
    """Answers every GET by `answer(path)`; the path is without query, as it was sent."""

    def __init__(self, path: Path, answer: Callable[[str], Answer]) -> None:
        self._path, self._answer = path, answer
        self._connections: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen. Raises FailedPrecondition when the path is taken by somebody alive, OSError."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        await asyncio.to_thread(_make_way, self._path)
        listener = socket.socket(socket.AF_UNIX)
        umask = os.umask(0o777 & ~MODE)
        try:
            listener.bind(os.fspath(self._path))
        except OSError:
            listener.close()
            raise
        finally:
            os.umask(umask)
        self._server = await asyncio.start_unix_server(self._accept, sock=listener)

    async def close(self) -> None:
        """Stop listening, end the connections, remove the socket's file."""
        if self._server is None:
            return
        self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        self._path.unlink(missing_ok=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(self._serve(_Peer(reader, writer)))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _serve(self, peer: "_Peer") -> None:
        """Answer requests until the peer has no more. The root of a connection's task."""
        try:
            if len(self._connections) > MOST_CONNECTIONS:
                await peer.send(_refusal(503, "too many connections"), last=True)
            else:
                while await self._exchange(peer):
                    peer.http.start_next_cycle()
        except OSError:  # gone, or it does not read in time
            pass
        except asyncio.CancelledError:
            peer.writer.transport.abort()
            raise
        except Exception as e:
            log.error("local http failed", path=str(self._path), error=repr(e))
        finally:
            await peer.close()

    async def _exchange(self, peer: "_Peer") -> bool:
        """Answer one request; return whether there may be another."""
        try:
            request = await peer.request()
        except h11.RemoteProtocolError as e:
            await peer.send(_refusal(400, str(e)), last=True)
            return False
        if request is None:
            return False
        if request.method != b"GET":
            await peer.send(_refusal(405, "only GET is served"), last=True)
            return False
        await peer.send(self._answer(request.target.decode("latin-1").partition("?")[0]))
        return peer.http.our_state is h11.DONE and peer.http.their_state is h11.DONE


class _Peer:
    """One connection: h11's state and the streams."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.http = h11.Connection(h11.SERVER, max_incomplete_event_size=MOST_HEAD)

    async def request(self) -> h11.Request | None:
        """Return the next request, None when there is no other. Raises RemoteProtocolError, also
        for one with a body.
        """
        request = None
        async with asyncio.timeout(IDLE_TIMEOUT):
            while True:
                event = self.http.next_event()
                if event is h11.NEED_DATA:
                    self.http.receive_data(await self.reader.read(PIECE))
                elif isinstance(event, h11.Request):
                    request = event
                elif isinstance(event, h11.EndOfMessage):
                    return request
                elif isinstance(event, h11.ConnectionClosed):
                    return None
                else:
                    raise h11.RemoteProtocolError("a request with a body")

    async def send(self, answer: Answer, *, last: bool = False) -> None:
        headers = [("Content-Type", answer.type), ("Content-Length", str(len(answer.body)))]
        if last:
            headers.append(("Connection", "close"))
        if self.http.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return
        head = self.http.send(h11.Response(status_code=answer.status, headers=headers))
        body = self.http.send(h11.Data(data=answer.body))
        self.writer.write((head or b"") + (body or b""))
        self.http.send(h11.EndOfMessage())
        async with asyncio.timeout(SEND_TIMEOUT):
            await self.writer.drain()

    async def close(self) -> None:
        """Send what is left, but do not wait for ever for it to be read."""
        self.writer.close()
        try:
            async with asyncio.timeout(SEND_TIMEOUT):
                await self.writer.wait_closed()
        except OSError:  # broken, or not in time
            self.writer.transport.abort()


def _refusal(status: int, why: str) -> Answer:
    return Answer(status=status, body=f"{why}\n".encode())


def _make_way(path: Path) -> None:
    """Remove the socket of a server that has died. Raises FailedPrecondition for all else."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise errors.FailedPrecondition(f"{path} is there and is no socket")
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(os.fspath(path))
            except ConnectionRefusedError:
                path.unlink()
                return
        raise errors.FailedPrecondition(f"somebody else listens on {path}")
