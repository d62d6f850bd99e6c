# SPDX-License-Identifier: Apache-2.0
"""`cri-server image import` and `tag`: the running server does it, this asks.

A file that is no compressed one is read by the server where it is. What comes from stdin or has to
be inflated is put below <root>/tmp first and removed at the end; after a crash the server's next
start removes it.
"""

import asyncio
import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from cri_server import config
from cri_server.images import stream, tar
from cri_server.services import client

STDIN = "-"
PATIENCE = 30.0  # seconds for a server that starts
_COMPRESSED = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ\0", b"BZh")


def load(settings: config.Config, source: str, name: str) -> int:
    """Import an archive (a path, or "-"), print each name and id; return the exit status."""
    try:
        with _plain(source, settings.server.root / "tmp") as path:
            asyncio.run(_load(settings.server.listen, path, name))
    except (client.Refused, tar.Malformed, OSError) as e:
        print(f"cri-server: {source}: {e}", file=sys.stderr)
        return 1
    return 0


def tag(settings: config.Config, image: str, name: str) -> int:
    """Give an image a further name; return the exit status."""
    try:
        asyncio.run(_tag(settings.server.listen, image, name))
    except client.Refused as e:
        print(f"cri-server: {e}", file=sys.stderr)
        return 1
    return 0


async def _load(address: str, path: Path, name: str) -> None:
    async with client.connect(address, patience=PATIENCE) as server:
        for made in await client.said(lambda: server.archives.load(os.fspath(path), name)):
            print(f"imported {made.name} {made.id}")


async def _tag(address: str, image: str, name: str) -> None:
    async with client.connect(address, patience=PATIENCE) as server:
        await client.said(lambda: server.archives.tag(image, name))


@contextlib.contextmanager
def _plain(source: str, folder: Path) -> Iterator[Path]:
    """Give the path of an archive that is not compressed. Raises OSError, tar.Malformed."""
    with contextlib.ExitStack() as stack:
        if source == STDIN:
            path = stack.enter_context(_temporary(folder))
            with path.open("wb") as copy:
                shutil.copyfileobj(sys.stdin.buffer, copy, stream.CHUNK)
        else:
            path = Path(source).absolute()
        with path.open("rb") as file:
            compressed = file.read(8).startswith(_COMPRESSED)
            if compressed:
                path = stack.enter_context(_temporary(folder))
                _inflate(file, path)
        yield path


@contextlib.contextmanager
def _temporary(folder: Path) -> Iterator[Path]:
    fd, name = tempfile.mkstemp(prefix="import-", dir=folder)
    os.close(fd)
    try:
        yield Path(name)
    finally:
        os.unlink(name)


def _inflate(file: BinaryIO, path: Path) -> None:
    file.seek(0)
    with path.open("wb") as plain:
        for chunk in stream.inflate(file):
            plain.write(chunk)
