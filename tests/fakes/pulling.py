# SPDX-License-Identifier: Apache-2.0
"""What the tests of pulling share: names, an image's bytes, responses as raw bytes."""

import base64
import hashlib
from collections.abc import Iterator
from pathlib import Path

from cri_server.images import reference, registry, session
from cri_server.pb import api_pb2 as api
from tests.fakes import registry as fake

REPO = "team/app"
BLOBS = f"/v2/{REPO}/blobs/"
MANIFESTS = f"/v2/{REPO}/manifests/"
LAYER = hashlib.shake_128(b"layer").digest(600_000)
SECRET = "hunter2"
USER = api.AuthConfig(username="me", password=SECRET)
BASIC = "Basic " + base64.b64encode(f"me:{SECRET}".encode()).decode()
QUICK = session.Limits(progress_timeout=0.4, head_timeout=0.4, pause=0.01, longest_pause=0.05)


def write_hosts(root: Path, host: str, text: str) -> None:
    (root / host).mkdir()
    (root / host / "hosts.toml").write_text(text)


def name(there: fake.Registry, tail: str = ":v1") -> reference.Reference:
    return reference.parse(f"{there.address}/{REPO}{tail}")


async def fetch(
    client: registry.Client,
    ref: reference.Reference,
    blob: fake.Stored,
    auth: api.AuthConfig | None = None,
    *,
    offset: int = 0,
) -> bytes:
    got = bytearray()
    await client.blob(ref, blob, auth, sink=got.extend, offset=offset)
    return bytes(got)


def framed(body: bytes, framing: str) -> bytes:
    head = b"HTTP/1.1 200 OK\r\n"
    if framing == "length":
        return head + b"Content-Length: %d\r\n\r\n" % len(body) + body
    if framing == "chunked":
        pieces = [body[i : i + 50_000] for i in range(0, len(body), 50_000)]
        chunks = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
        return head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"
    return head + b"\r\n" + body


def causes(error: BaseException) -> Iterator[BaseException]:
    yield error
    for each in (error.__cause__, error.__context__):
        if each is not None:
            yield from causes(each)
