# SPDX-License-Identifier: Apache-2.0
"""runtime.v1.RuntimeService: one delegating method per RPC, in the order of api.proto."""

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, TypeAlias

from cri_server import containers, errors, events, exec, info, metrics, pods, stats
from cri_server.pb import api_pb2 as api
from cri_server.pb import api_pb2_grpc
from cri_server.services import parts
from cri_server.streaming import requests

if TYPE_CHECKING:
    from grpc.aio import ServicerContext

Context: TypeAlias = "ServicerContext[Any, Any]"


class RuntimeService(api_pb2_grpc.RuntimeServiceServicer):
    """Pods and containers."""

    def __init__(
        self,
        *,
        pod_host: pods.Pods,
        container_host: containers.Containers,
        exec_host: exec.Exec,
        stats_host: stats.Stats,
        metrics_host: metrics.Metrics,
        info_host: info.Info,
        event_host: events.Events,
        stream_requests: requests.Requests,
    ) -> None:
        self._requests = stream_requests
        self._events = event_host
        self._pods, self._containers, self._exec = pod_host, container_host, exec_host
        self._stats, self._metrics, self._info = stats_host, metrics_host, info_host

    async def Version(self, request: api.VersionRequest, context: Context) -> api.VersionResponse:
        return self._info.version()

    # -- pods -------------------------------------------------------------------------------------

    async def RunPodSandbox(
        self, request: api.RunPodSandboxRequest, context: Context
    ) -> api.RunPodSandboxResponse:
        pod_id = await self._pods.run(request.config, request.runtime_handler)
        return api.RunPodSandboxResponse(pod_sandbox_id=pod_id)

    async def StopPodSandbox(
        self, request: api.StopPodSandboxRequest, context: Context
    ) -> api.StopPodSandboxResponse:
        await self._pods.stop(request.pod_sandbox_id)
        return api.StopPodSandboxResponse()

    async def RemovePodSandbox(
        self, request: api.RemovePodSandboxRequest, context: Context
    ) -> api.RemovePodSandboxResponse:
        await self._pods.remove(request.pod_sandbox_id)
        return api.RemovePodSandboxResponse()

    async def PodSandboxStatus(
        self, request: api.PodSandboxStatusRequest, context: Context
    ) -> api.PodSandboxStatusResponse:
        return self._info.pod_status(request.pod_sandbox_id, verbose=request.verbose)

    async def ListPodSandbox(
        self, request: api.ListPodSandboxRequest, context: Context
    ) -> api.ListPodSandboxResponse:
        return api.ListPodSandboxResponse(items=self._pods.list(request.filter))

    async def StreamPodSandboxes(
        self, request: api.StreamPodSandboxesRequest, context: Context
    ) -> AsyncIterator[api.StreamPodSandboxesResponse]:
        for part in parts.cut(self._pods.list(request.filter)):
            yield api.StreamPodSandboxesResponse(pod_sandboxes=part)

    # -- containers -------------------------------------------------------------------------------

    async def CreateContainer(
        self, request: api.CreateContainerRequest, context: Context
    ) -> api.CreateContainerResponse:
        container_id = await self._containers.create(request.pod_sandbox_id, request.config)
        return api.CreateContainerResponse(container_id=container_id)

    async def StartContainer(
        self, request: api.StartContainerRequest, context: Context
    ) -> api.StartContainerResponse:
        await self._containers.start(request.container_id)
        return api.StartContainerResponse()

    async def StopContainer(
        self, request: api.StopContainerRequest, context: Context
    ) -> api.StopContainerResponse:
        await self._containers.stop(request.container_id, request.timeout)
        return api.StopContainerResponse()

    async def RemoveContainer(
        self, request: api.RemoveContainerRequest, context: Context
    ) -> api.RemoveContainerResponse:
        await self._containers.remove(request.container_id)
        return api.RemoveContainerResponse()

    async def ListContainers(
        self, request: api.ListContainersRequest, context: Context
    ) -> api.ListContainersResponse:
        return api.ListContainersResponse(containers=self._containers.list(request.filter))

    async def StreamContainers(
        self, request: api.StreamContainersRequest, context: Context
    ) -> AsyncIterator[api.StreamContainersResponse]:
        for part in parts.cut(self._containers.list(request.filter)):
            yield api.StreamContainersResponse(containers=part)

    async def ContainerStatus(
        self, request: api.ContainerStatusRequest, context: Context
    ) -> api.ContainerStatusResponse:
        return self._info.container_status(request.container_id, verbose=request.verbose)

    async def UpdateContainerResources(
        self, request: api.UpdateContainerResourcesRequest, context: Context
    ) -> api.UpdateContainerResourcesResponse:
        await self._containers.update(request)
        return api.UpdateContainerResourcesResponse()

    async def ReopenContainerLog(
        self, request: api.ReopenContainerLogRequest, context: Context
    ) -> api.ReopenContainerLogResponse:
        await self._containers.reopen_log(request.container_id)
        return api.ReopenContainerLogResponse()

    # -- exec, attach, port-forward ---------------------------------------------------------------

    async def ExecSync(
        self, request: api.ExecSyncRequest, context: Context
    ) -> api.ExecSyncResponse:
        done = await self._exec.sync(request.container_id, request.cmd, timeout=request.timeout)
        return api.ExecSyncResponse(
            stdout=done.stdout, stderr=done.stderr, exit_code=done.exit_code
        )

    async def Exec(self, request: api.ExecRequest, context: Context) -> api.ExecResponse:
        return api.ExecResponse(url=self._requests.exec(request))

    async def Attach(self, request: api.AttachRequest, context: Context) -> api.AttachResponse:
        return api.AttachResponse(url=self._requests.attach(request))

    async def PortForward(
        self, request: api.PortForwardRequest, context: Context
    ) -> api.PortForwardResponse:
        return api.PortForwardResponse(url=self._requests.port_forward(request))

    # -- stats and metrics ------------------------------------------------------------------------

    async def ContainerStats(
        self, request: api.ContainerStatsRequest, context: Context
    ) -> api.ContainerStatsResponse:
        return api.ContainerStatsResponse(stats=await self._stats.container(request.container_id))

    async def ListContainerStats(
        self, request: api.ListContainerStatsRequest, context: Context
    ) -> api.ListContainerStatsResponse:
        return api.ListContainerStatsResponse(stats=await self._stats.containers(request.filter))

    async def StreamContainerStats(
        self, request: api.StreamContainerStatsRequest, context: Context
    ) -> AsyncIterator[api.StreamContainerStatsResponse]:
        for part in parts.cut(await self._stats.containers(request.filter)):
            yield api.StreamContainerStatsResponse(container_stats=part)

    async def PodSandboxStats(
        self, request: api.PodSandboxStatsRequest, context: Context
    ) -> api.PodSandboxStatsResponse:
        return api.PodSandboxStatsResponse(stats=await self._stats.pod(request.pod_sandbox_id))

    async def ListPodSandboxStats(
        self, request: api.ListPodSandboxStatsRequest, context: Context
    ) -> api.ListPodSandboxStatsResponse:
        return api.ListPodSandboxStatsResponse(stats=await self._stats.pods(request.filter))

    async def StreamPodSandboxStats(
        self, request: api.StreamPodSandboxStatsRequest, context: Context
    ) -> AsyncIterator[api.StreamPodSandboxStatsResponse]:
        for part in parts.cut(await self._stats.pods(request.filter)):
            yield api.StreamPodSandboxStatsResponse(pod_sandbox_stats=part)

    # -- the runtime itself -----------------------------------------------------------------------

    async def UpdateRuntimeConfig(
        self, request: api.UpdateRuntimeConfigRequest, context: Context
    ) -> api.UpdateRuntimeConfigResponse:
        self._info.update(request.runtime_config)
        return api.UpdateRuntimeConfigResponse()

    async def Status(self, request: api.StatusRequest, context: Context) -> api.StatusResponse:
        return self._info.status(verbose=request.verbose)

    async def CheckpointContainer(
        self, request: api.CheckpointContainerRequest, context: Context
    ) -> api.CheckpointContainerResponse:
        raise _not_yet("CheckpointContainer")

    async def GetContainerEvents(
        self, request: api.GetEventsRequest, context: Context
    ) -> AsyncIterator[api.ContainerEventResponse]:
        with self._events.reader() as reader:
            await context.send_initial_metadata(())  # to a caller that waits to miss nothing
            async for event in reader:
                yield event

    async def ListMetricDescriptors(
        self, request: api.ListMetricDescriptorsRequest, context: Context
    ) -> api.ListMetricDescriptorsResponse:
        return api.ListMetricDescriptorsResponse(descriptors=self._metrics.descriptors())

    async def ListPodSandboxMetrics(
        self, request: api.ListPodSandboxMetricsRequest, context: Context
    ) -> api.ListPodSandboxMetricsResponse:
        return api.ListPodSandboxMetricsResponse(pod_metrics=await self._metrics.pods())

    async def StreamPodSandboxMetrics(
        self, request: api.StreamPodSandboxMetricsRequest, context: Context
    ) -> AsyncIterator[api.StreamPodSandboxMetricsResponse]:
        for part in parts.cut(await self._metrics.pods()):
            yield api.StreamPodSandboxMetricsResponse(pod_sandbox_metrics=part)

    async def RuntimeConfig(
        self, request: api.RuntimeConfigRequest, context: Context
    ) -> api.RuntimeConfigResponse:
        return self._info.runtime_config()

    async def UpdatePodSandboxResources(
        self, request: api.UpdatePodSandboxResourcesRequest, context: Context
    ) -> api.UpdatePodSandboxResourcesResponse:
        await self._pods.update(request)
        return api.UpdatePodSandboxResourcesResponse()


def _not_yet(rpc: str) -> errors.Unimplemented:
    return errors.Unimplemented(f"{rpc} is not served by this version of cri-server")
