# SPDX-License-Identifier: Apache-2.0
"""The HTTP side of a streaming connection: one request, answered by an upgrade or an error."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus

import h11

LIMIT = 32 << 10  # bytes of a request's head
TIMEOUT = 10.0  # seconds for it to arrive


class Rejected(Exception):
    """The connection cannot be served: answer with `status` and end it."""

    def __init__(
        self, status: HTTPStatus, why: str, headers: Sequence[tuple[str, str]] = ()
    ) -> None:
        super().__init__(why)
        self.status, self.why, self.headers = status, why, headers


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """A request. `raw` is its bytes, `rest` what came after it; names are in lower case."""

    method: str
    path: str
    headers: tuple[tuple[str, str], ...]
    raw: bytes
    rest: bytes

    def all(self, name: str) -> list[str]:
        """Return the values of a header, in order; a value may be a list with commas."""
        found = [value for key, value in self.headers if key == name]
        return [word.strip() for value in found for word in value.split(",")]

    def upgrade(self) -> str:
        """Return what the client wants the connection to become, in lower case."""
        asked = [word.lower() for word in self.all("upgrade")]
        connection = {word.lower() for word in self.all("connection")}
        return asked[0] if asked and "upgrade" in connection else ""


async def read(reader: asyncio.StreamReader) -> Head:
    """Read a request's head. Raises Rejected for a bad one, TimeoutError, OSError."""
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=LIMIT)
    received = b""
    async with asyncio.timeout(TIMEOUT):
        while True:
            try:
                event = connection.next_event()
            except h11.RemoteProtocolError as e:
                raise Rejected(HTTPStatus(e.error_status_hint), str(e)) from e
            if isinstance(event, h11.Request):
                break
            data = await reader.read(LIMIT)
            received += data
            connection.receive_data(data)
            if not data:
                raise ConnectionResetError("the client left before its request was whole")
    rest, _ = connection.trailing_data
    return _head(event, received, end=len(received) - len(rest))


def _head(request: h11.Request, received: bytes, *, end: int) -> Head:
    return Head(
        method=request.method.decode(),
        path=request.target.decode().partition("?")[0],
        headers=tuple((n.decode(), v.decode("latin-1")) for n, v in request.headers),
        raw=received[:end],
        rest=received[end:],
    )


def answer(status: HTTPStatus, headers: Sequence[tuple[str, str]], body: str = "") -> bytes:
    """Return a whole response; 101 has no body."""
    text = body.encode()
    length = (
        [] if status == HTTPStatus.SWITCHING_PROTOCOLS else [("Content-Length", str(len(text)))]
    )
    lines = [f"HTTP/1.1 {status.value} {status.phrase}"]
    lines += [f"{name}: {value}" for name, value in (*headers, *length)]
    return "\r\n".join((*lines, "", "")).encode() + text
