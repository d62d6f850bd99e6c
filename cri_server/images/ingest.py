# SPDX-License-Identifier: Apache-2.0
"""A blob on its way from a registry to a file below tmp/, counted and hashed by the one who writes
it.

Until `writing` ends well there is no blob, whatever the registry promised; what is half there is
removed, and after a crash by `gc`. Hashing and writing happen in a thread, a megabyte at a time.
"""

import contextlib
import errno
import hashlib
import os
import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Protocol

from cri_server import errors
from cri_server.images import flights

FLUSH = 1 << 20


class Descriptor(Protocol):
    """What the blob must be."""

    @property
    def digest(self) -> str: ...
    @property
    def size(self) -> int: ...


class Ingest:
    """One blob. `path` is complete and right when the block of `writing` has ended."""

    def __init__(self, folder: Path, descriptor: Descriptor) -> None:
        self.path = folder / f"blob-{secrets.token_hex(8)}"
        self._wanted = descriptor
        self._hash = hashlib.new(descriptor.digest.partition(":")[0])
        self._buffer = bytearray()
        self._written = 0
        self._fd = -1

    @contextlib.asynccontextmanager
    async def writing(self) -> AsyncIterator[None]:
        """Have the file open for the block. Raises ResourceExhausted for a full disk, Unknown for
        wrong content."""
        try:
            await flights.in_thread(self._open)
            try:
                yield
                await flights.in_thread(self._flush)
            finally:
                if self._fd >= 0:
                    os.close(self._fd)
            self._verify()
        except BaseException as e:
            with contextlib.suppress(FileNotFoundError):
                await flights.in_thread(os.unlink, self.path)
            if isinstance(e, OSError):
                raise host_failure(e, f"blob {self._wanted.digest} not written") from e
            raise

    async def write(self, data: bytes) -> None:
        """Take the next bytes; the sink of `registry.Client.blob`."""
        self._buffer += data
        if len(self._buffer) >= FLUSH:
            await flights.in_thread(self._flush)

    def _open(self) -> None:
        self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    def _flush(self) -> None:
        self._hash.update(self._buffer)
        view = memoryview(self._buffer)
        while view:
            done = os.write(self._fd, view)
            self._written += done
            view = view[done:]
        self._buffer = bytearray()

    def _verify(self) -> None:
        actual = f"{self._hash.name}:{self._hash.hexdigest()}"
        if (actual, self._written) != (self._wanted.digest, self._wanted.size):
            raise errors.Unknown(
                f"wrong content of blob {self._wanted.digest}: {self._written} bytes, {actual}"
            )


def matches(body: bytes, digest: str) -> bool:
    """Say whether a document has this digest."""
    algorithm, _, value = digest.partition(":")
    return hashlib.new(algorithm, body).hexdigest() == value


def host_failure(error: OSError, what: str) -> errors.CriError:
    """Turn what the host's file system said into the error that a caller can act on."""
    code = error.errno or 0
    text = f"{what}: {error.strerror or error} ({errno.errorcode.get(code, code)})"
    if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM):
        return errors.ResourceExhausted(text)
    return errors.Internal(text)
