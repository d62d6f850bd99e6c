# SPDX-License-Identifier: Apache-2.0
"""Where images come from: a registry (`registry.Client`) or a file (`archive.Archive`).

`pull` sees only this. Nothing a source gives is trusted: documents are verified by it, blobs by
whoever writes them.
"""

from collections.abc import Callable
from typing import Protocol

from cri_server.images import documents, reference
from cri_server.pb import api_pb2 as api


class Source(Protocol):
    """What a pull asks for documents and blobs; `registry.Client` says what each raises."""

    async def resolve(
        self,
        ref: reference.Reference,
        auth: api.AuthConfig | None = None,
        *,
        known: Callable[[str], bytes | None] | None = None,
    ) -> documents.Resolved: ...

    async def manifest(
        self,
        ref: reference.Reference,
        descriptor: documents.Descriptor,
        auth: api.AuthConfig | None = None,
    ) -> documents.Resolved: ...

    async def blob(
        self,
        ref: reference.Reference,
        descriptor: documents.Descriptor,
        auth: api.AuthConfig | None = None,
        *,
        sink: Callable[[bytes], object],
    ) -> None: ...

    async def read_blob(
        self,
        ref: reference.Reference,
        descriptor: documents.Descriptor,
        auth: api.AuthConfig | None = None,
        *,
        limit: int = ...,
    ) -> bytes: ...
