# SPDX-License-Identifier: Apache-2.0
"""cri_server.v1.Archives: what CRI has no call for, on the same socket, for our own command line.

    Import  {"path", "name"}   ─► {"images": [{"name", "id"}, ...]}
    Tag     {"image", "name"}  ─► {}

JSON in gRPC frames: two calls between two parts of one program need no protocol of their own. Both
ends are here. The socket is root's alone, so a path may be any file of this machine; nothing that a
pod's author can write gets here, as annotations of a PullImage would.
"""

from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import grpc
import msgspec

from cri_server.images import load

if TYPE_CHECKING:
    from collections.abc import Sequence

    from grpc.aio import Channel, Server, ServicerContext

Context: TypeAlias = "ServicerContext[Any, Any]"
T = TypeVar("T")
SERVICE = "cri_server.v1.Archives"


class ImportRequest(msgspec.Struct, frozen=True, kw_only=True):
    path: str
    name: str = ""


class Imported(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    id: str


class ImportResponse(msgspec.Struct, frozen=True, kw_only=True):
    images: tuple[Imported, ...]


class TagRequest(msgspec.Struct, frozen=True, kw_only=True):
    image: str
    name: str


class TagResponse(msgspec.Struct, frozen=True, kw_only=True):
    pass


class ArchiveService:
    """The server's end."""

    def __init__(self, loader: load.Loader) -> None:
        self._loader = loader

    def add_to(self, server: "Server") -> None:
        """Serve both calls."""
        handlers = {
            "Import": _handler(self.Import, ImportRequest),
            "Tag": _handler(self.Tag, TagRequest),
        }
        generic = grpc.method_handlers_generic_handler(SERVICE, handlers)
        server.add_generic_rpc_handlers((generic,))

    async def Import(self, request: ImportRequest, context: Context) -> ImportResponse:
        made = await self._loader.load(request.path, request.name)
        return ImportResponse(images=tuple(Imported(name=n, id=i) for n, i in made))

    async def Tag(self, request: TagRequest, context: Context) -> TagResponse:
        await self._loader.tag(request.image, request.name)
        return TagResponse()


class Client:
    """The command line's end. Calls raise grpc.aio.AioRpcError."""

    def __init__(self, channel: "Channel") -> None:
        self._channel = channel

    async def load(self, path: str, name: str = "") -> "Sequence[Imported]":
        """Have the server import an archive."""
        request = ImportRequest(path=path, name=name)
        return (await self._call("Import", request, ImportResponse)).images

    async def tag(self, image: str, name: str) -> None:
        """Give an image a further name."""
        await self._call("Tag", TagRequest(image=image, name=name), TagResponse)

    async def _call(self, method: str, request: msgspec.Struct, kind: type[T]) -> T:
        call = self._channel.unary_unary(
            f"/{SERVICE}/{method}",
            request_serializer=msgspec.json.encode,
            response_deserializer=msgspec.json.Decoder(kind).decode,
        )
        answer: T = await call(request)
        return answer


def _handler(method: Any, kind: type[msgspec.Struct]) -> Any:
    return grpc.unary_unary_rpc_method_handler(
        method,
        request_deserializer=msgspec.json.Decoder(kind).decode,
        response_serializer=msgspec.json.encode,
    )
