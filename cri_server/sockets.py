# SPDX-License-Identifier: Apache-2.0
"""Who is behind a unix socket: the process that listens, and those that are connected to it.

The kernel tells it: SO_PEERCRED (unix(7)) for the one, sock_diag(7) for the others. A listener that
hangs is found too, since nobody has to accept. Reads only.
"""

import contextlib
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

_SOCK_DIAG, _BY_FAMILY, _DONE, _ERROR = 4, 20, 3, 2  # linux/netlink.h, linux/sock_diag.h
_REQUEST_DUMP = 0x301
_SHOW = 1 | 4 | 8  # UDIAG_SHOW_NAME, _PEER, _ICONS: linux/unix_diag.h
_NAME, _PEER, _ICONS = 0, 2, 3  # the last are the peers of those that wait to be accepted
_HEADER, _MESSAGE, _ATTRIBUTE = struct.Struct("=IHHII"), struct.Struct("=BBBxI8x"), "=HH"


def listener(path: Path) -> int | None:
    """Return the pid of the process that listens at `path`, None without one. Raises OSError."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(os.fspath(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return None
        credentials = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    pid: int = struct.unpack("3i", credentials)[0]
    return pid


def clients(path: Path) -> dict[int, str]:
    """Return the pids and names (comm) of the processes that are connected to `path`.

    Raises OSError where the kernel does not tell.
    """
    wanted = {inode for name, peers in _sockets() if name == os.fsencode(path) for inode in peers}
    return dict(_owners(wanted)) if wanted else {}


def _sockets() -> Iterator[tuple[bytes, Sequence[int]]]:
    """Yield the name of every unix socket, and the inodes of its peers."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _SOCK_DIAG) as diag:
        request = struct.pack("=BBHIII8x", socket.AF_UNIX, 0, 0, 0xFFFFFFFF, 0, _SHOW)
        header = _HEADER.pack(_HEADER.size + len(request), _BY_FAMILY, _REQUEST_DUMP, 1, 0)
        diag.send(header + request)
        while True:
            for kind, body in _messages(diag.recv(1 << 16)):
                if kind == _DONE:
                    return
                if kind == _ERROR:
                    code = -struct.unpack_from("=i", body)[0]
                    raise OSError(code, os.strerror(code))
                said = dict(_attributes(body[_MESSAGE.size :]))
                peers = said.get(_PEER, b"") + said.get(_ICONS, b"")
                yield (
                    said.get(_NAME, b"").rstrip(b"\0"),
                    struct.unpack(f"={len(peers) // 4}I", peers),
                )


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    while data:
        length, kind, *_ = _HEADER.unpack_from(data)
        yield kind, data[_HEADER.size : length]
        data = data[(length + 3) & ~3 :]


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= 4:
        length, kind = struct.unpack_from(_ATTRIBUTE, data)
        yield kind, data[4:length]
        data = data[(length + 3) & ~3 :]


def _owners(inodes: set[int]) -> Iterator[tuple[int, str]]:
    wanted = {f"socket:[{inode}]" for inode in inodes}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            if any(os.readlink(fd) in wanted for fd in (folder / "fd").iterdir()):
                yield int(folder.name), (folder / "comm").read_text().strip()
