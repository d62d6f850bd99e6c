# SPDX-License-Identifier: Apache-2.0
"""An image registry on loopback that does as it is told, however evil.

    with registry.run() as there:
        layer = there.add_blob("team/app", b"...")
        there.on("/v2/team/app/blobs/", Cut(1000), Ok())      # first request, second and later ones
        there.requests                                        # what was asked, with headers

Left alone it is a registry: images can be pushed to it and pulled from it, which
tests/contract/test_registry.py holds against the real one. `on` lays behaviours over paths: each
request whose path starts with the prefix takes the next one, and the last one stays.
"""

import contextlib
import hashlib
import http.server
import json
import re
import socket
import ssl
import struct
import threading
import urllib.parse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_PATH = re.compile(r"/v2/(?P<repo>.+)/(?P<kind>blobs|manifests)/(?P<name>[^/]+)")
_UPLOAD = re.compile(r"/v2/(?P<repo>.+)/blobs/uploads/[^/]*")


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What a client asked; header names in lower case."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str] = field(repr=False)
    body: bytes = b""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """A document or blob as a descriptor."""

    digest: str
    media_type: str
    size: int
    body: bytes = field(repr=False)


class Behaviour(Protocol):
    """One way to answer."""

    def answer(self, to: "Handler") -> None:
        """Write what the client gets."""


@dataclass(frozen=True, slots=True)
class Ok:
    """Behave; `headers` are laid over the right ones, None takes one away."""

    headers: Mapping[str, str | None] = field(default_factory=dict)
    ranges: bool = True

    def answer(self, to: "Handler") -> None:
        to.serve(self.headers, ranges=self.ranges)


@dataclass(frozen=True, slots=True)
class Say:
    """Answer with a status, headers and a body of the test's choice."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""

    def answer(self, to: "Handler") -> None:
        to.say(self.status, {"Content-Length": str(len(self.body)), **self.headers}, self.body)


@dataclass(frozen=True, slots=True)
class Raw:
    """Write these bytes and close."""

    data: bytes

    def answer(self, to: "Handler") -> None:
        to.wfile.write(self.data)
        to.close_connection = True


@dataclass(frozen=True, slots=True)
class Cut:
    """Behave up to `after` bytes of the body, then close, or `reset`."""

    after: int
    reset: bool = False

    def answer(self, to: "Handler") -> None:
        to.limit = self.after
        to.serve({}, ranges=True)
        to.hang_up(reset=self.reset)


@dataclass(frozen=True, slots=True)
class Stall:
    """Send `after` bytes of the body, or nothing at all (None), and hold till the end."""

    after: int | None = None

    def answer(self, to: "Handler") -> None:
        if self.after is not None:
            to.limit = self.after
            to.serve({}, ranges=True)
            to.wfile.flush()
        to.registry.hold()
        to.close_connection = True


@dataclass(frozen=True, slots=True)
class Drip:
    """Behave, `piece` bytes at a time, each when the test's `step` is released once more."""

    piece: int
    step: threading.Semaphore

    def answer(self, to: "Handler") -> None:
        to.piece, to.step = self.piece, self.step
        to.serve({}, ranges=True)


@dataclass(frozen=True, slots=True)
class Guard:
    """Behave for whoever sends this Authorization; answer others with 401 and a challenge."""

    authorization: str
    challenge: str

    def answer(self, to: "Handler") -> None:
        if to.headers.get("Authorization") == self.authorization:
            to.serve({}, ranges=True)
        else:
            to.say(401, {"WWW-Authenticate": self.challenge, "Content-Length": "0"}, b"")


class Registry:
    """What is stored, what was asked, and how to answer."""

    def __init__(self) -> None:
        self.address = ""  # "127.0.0.1:port"
        self.scheme = "http"
        self.requests: list[Request] = []
        self.inside: ssl.SSLContext | None = None  # as a proxy: who answers in a tunnel
        self.connections: set[socket.socket] = set()
        self._blobs: dict[tuple[str, str], Stored] = {}
        self._manifests: dict[tuple[str, str], Stored] = {}
        self._plans: list[tuple[str, list[Behaviour]]] = []
        self._ended = threading.Event()
        self._lock = threading.Lock()

    def on(self, prefix: str, *behaviours: Behaviour) -> None:
        """Answer requests below a path as told, one after the other; the last one stays."""
        with self._lock:
            self._plans.insert(0, (prefix, list(behaviours)))

    def add_blob(self, repo: str, body: bytes) -> Stored:
        """Store a blob; returns its descriptor."""
        stored = Stored(
            digest=digest(body), media_type="application/octet-stream", size=len(body), body=body
        )
        self._blobs[repo, stored.digest] = stored
        return stored

    def add_manifest(
        self, repo: str, tag: str, body: bytes | object, media_type: str = MANIFEST
    ) -> Stored:
        """Store a document (bytes, or what json makes of it) under a tag and its digest."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        stored = Stored(digest=digest(data), media_type=media_type, size=len(data), body=data)
        self._manifests[repo, tag] = self._manifests[repo, stored.digest] = stored
        return stored

    def add_image(self, repo: str, tag: str, *layers: bytes) -> Stored:
        """Store a manifest with its layers and a config that names no diff ids."""
        config = self.add_blob(repo, b'{"architecture":"amd64","os":"linux"}')
        blobs = [self.add_blob(repo, layer) for layer in layers]
        document = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": _descriptor(config, "application/vnd.oci.image.config.v1+json"),
            "layers": [_descriptor(b, "application/vnd.oci.image.layer.v1.tar") for b in blobs],
        }
        return self.add_manifest(repo, tag, document)

    def paths(self, method: str = "GET") -> list[str]:
        """Return the paths that were asked for, in order."""
        return [each.path for each in self.requests if each.method == method]

    def find(self, path: str) -> Stored | None:
        """Return what a path names."""
        match = _PATH.fullmatch(path)
        if not match:
            return None
        shelf = self._blobs if match["kind"] == "blobs" else self._manifests
        return shelf.get((match["repo"], match["name"]))

    def plan(self, path: str) -> Behaviour:
        """Return the behaviour for a request, and use it up unless it is the last."""
        with self._lock:
            for prefix, behaviours in self._plans:
                if path.startswith(prefix):
                    return behaviours.pop(0) if len(behaviours) > 1 else behaviours[0]
        return Ok()

    def hold(self) -> None:
        """Wait until the registry ends."""
        self._ended.wait(60)

    def end(self) -> None:
        """Let go of all that is held, and hang up."""
        self._ended.set()
        self.hang_up()

    def hang_up(self) -> None:
        """Close all connections, and wait until that is done."""
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def digest(body: bytes) -> str:
    """Return the `sha256:…` name of some bytes."""
    return f"sha256:{hashlib.sha256(body).hexdigest()}"


@contextlib.contextmanager
def run(*, tls: ssl.SSLContext | None = None) -> Iterator[Registry]:
    """Run a registry on a free port of loopback until the block ends."""
    there = Registry()
    server = _Server(("127.0.0.1", 0), Handler)
    server.registry, server.tls = there, tls
    there.address = f"127.0.0.1:{server.server_address[1]}"
    there.scheme = "https" if tls else "http"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), name="fake registry")
    thread.start()
    try:
        yield there
    finally:
        there.end()
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = False
    registry: Registry
    tls: ssl.SSLContext | None

    def finish_request(self, request: object, client_address: object) -> None:
        assert isinstance(request, socket.socket)
        request.settimeout(20)
        with contextlib.suppress(OSError):  # a client that hangs up is part of the game
            secured = self.tls.wrap_socket(request, server_side=True) if self.tls else request
            Handler(secured, ("", 0), self)

    def handle_error(self, request: object, client_address: object) -> None:
        """Stay silent: what the client saw is what counts."""


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or kept connections wait 40 ms for each other
    server: _Server

    def setup(self) -> None:
        """Read and write on what `request` is now: a socket, or the inside of its tunnel."""
        super().setup()
        self.registry.connections.add(self.connection)
        self.limit: int | None = None
        self.piece = 1 << 16
        self.step: threading.Semaphore | None = None

    def finish(self) -> None:
        super().finish()
        self.registry.connections.discard(self.connection)
        self.connection.close()

    @property
    def registry(self) -> Registry:
        return self.server.registry

    def handle_one_request(self) -> None:
        """Serve a request; a client that starts with TLS is sent away."""
        if not isinstance(self.connection, ssl.SSLSocket):
            first = self.connection.recv(1, socket.MSG_PEEK)
            if first == b"\x16":
                self.close_connection = True
                return
        super().handle_one_request()

    def do_GET(self) -> None:
        self.limit = None
        length = int(self.headers.get("Content-Length") or 0)
        parts = urllib.parse.urlsplit(self.path)
        request = Request(
            method=self.command,
            path=parts.path,
            query=dict(urllib.parse.parse_qsl(parts.query)),
            headers={name.lower(): value for name, value in self.headers.items()},
            body=self.rfile.read(length),
        )
        self.registry.requests.append(request)
        if self.command in {"POST", "PUT"} and parts.path.startswith("/v2/"):
            self._push(request)
        else:
            self.registry.plan(parts.path).answer(self)

    def do_CONNECT(self) -> None:
        """Be a proxy, and what is behind it."""
        headers = {name.lower(): value for name, value in self.headers.items()}
        asked = Request(method="CONNECT", path=self.path, query={}, headers=headers)
        self.registry.requests.append(asked)
        if self.registry.inside is None:
            return self.say(403, {"Content-Length": "0"}, b"")
        self.say(200, {}, b"")
        self.wfile.flush()
        self.registry.connections.discard(self.connection)
        self.request = self.registry.inside.wrap_socket(self.connection, server_side=True)
        self.setup()
        self.close_connection = False

    do_HEAD = do_POST = do_PUT = do_GET

    def serve(self, changes: Mapping[str, str | None], *, ranges: bool) -> None:
        """Answer as a registry does."""
        path = urllib.parse.urlsplit(self.path).path
        if path == "/v2/":
            return self.say(200, {"Content-Length": "2"}, b"{}")
        stored = self.registry.find(path)
        if stored is None:
            kind = "BLOB_UNKNOWN" if "/blobs/" in path else "MANIFEST_UNKNOWN"
            body = json.dumps({"errors": [{"code": kind, "message": "unknown"}]}).encode()
            return self.say(404, {"Content-Length": str(len(body))}, body)
        headers: dict[str, str | None] = {
            "Content-Type": stored.media_type,
            "Docker-Content-Digest": stored.digest,
        }
        body, status = stored.body, 200
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if asked and ranges and "/blobs/" in path:
            start, status = int(asked[1]), 206
            headers["Content-Range"] = f"bytes {start}-{stored.size - 1}/{stored.size}"
            body = body[start:]
        headers["Content-Length"] = str(len(body))
        kept = {name: value for name, value in (headers | dict(changes)).items() if value}
        self.say(status, kept, body)

    def say(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        """Write a response, as much of its body as `limit` allows."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        framed = {"Content-Length", "Transfer-Encoding"} & set(headers)
        if not framed and self.command != "CONNECT":
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command == "HEAD":
            return
        body = body if self.limit is None else body[: self.limit]
        for start in range(0, len(body), self.piece):
            if self.step:
                self.step.acquire(timeout=20)
            self.wfile.write(body[start : start + self.piece])

    def hang_up(self, *, reset: bool) -> None:
        """Close now; with `reset` the client's kernel is told that all is lost."""
        self.wfile.flush()
        if reset:
            now = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, now)
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing on stderr."""

    def _push(self, request: Request) -> None:
        manifest, upload = _PATH.fullmatch(request.path), _UPLOAD.fullmatch(request.path)
        if request.method == "POST" and upload:
            return self.say(
                202, {"Location": f"{request.path}one?state=1", "Content-Length": "0"}, b""
            )
        if upload and request.query.get("digest") == digest(request.body):
            self.registry.add_blob(upload["repo"], request.body)
        elif manifest and manifest["kind"] == "manifests":
            kind = request.headers.get("content-type", "")
            self.registry.add_manifest(manifest["repo"], manifest["name"], request.body, kind)
        else:
            return self.say(400, {"Content-Length": "0"}, b"")
        return self.say(201, {"Content-Length": "0"}, b"")


def _descriptor(stored: Stored, media_type: str) -> dict[str, object]:
    return {"mediaType": media_type, "digest": stored.digest, "size": stored.size}
