# SPDX-License-Identifier: Apache-2.0
"""runtime.v1.ImageService: one delegating method per RPC, in the order of api.proto."""

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, TypeAlias

from cri_server import imagehost
from cri_server.pb import api_pb2 as api
from cri_server.pb import api_pb2_grpc
from cri_server.services import parts

if TYPE_CHECKING:
    from grpc.aio import ServicerContext

Context: TypeAlias = "ServicerContext[Any, Any]"


class ImageService(api_pb2_grpc.ImageServiceServicer):
    """Images."""

    def __init__(self, images: imagehost.ImageHost) -> None:
        self._images = images

    async def ListImages(
        self, request: api.ListImagesRequest, context: Context
    ) -> api.ListImagesResponse:
        return api.ListImagesResponse(images=self._images.list(request.filter))

    async def StreamImages(
        self, request: api.StreamImagesRequest, context: Context
    ) -> AsyncIterator[api.StreamImagesResponse]:
        for part in parts.cut(self._images.list(request.filter)):
            yield api.StreamImagesResponse(images=part)

    async def ImageStatus(
        self, request: api.ImageStatusRequest, context: Context
    ) -> api.ImageStatusResponse:
        image, info = await self._images.status(request.image.image, verbose=request.verbose)
        return api.ImageStatusResponse(image=image, info=info)

    async def PullImage(
        self, request: api.PullImageRequest, context: Context
    ) -> api.PullImageResponse:
        auth = request.auth if request.HasField("auth") else None
        return api.PullImageResponse(image_ref=await self._images.pull(request.image.image, auth))

    async def RemoveImage(
        self, request: api.RemoveImageRequest, context: Context
    ) -> api.RemoveImageResponse:
        await self._images.remove(request.image.image)
        return api.RemoveImageResponse()

    async def ImageFsInfo(
        self, request: api.ImageFsInfoRequest, context: Context
    ) -> api.ImageFsInfoResponse:
        return self._images.fs_info()
