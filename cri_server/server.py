# SPDX-License-Identifier: Apache-2.0
"""Starts and stops the server; its objects are made by `graph`.

The socket answers from the first moment, UNAVAILABLE until recovery is done. Stopping lets accepted
mutations finish for a while and leaves every pod running: its shim is its own process.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import structlog

from cri_server import (
    advisories,
    cgroups,
    config,
    defaults,
    errors,
    graph,
    handlers,
    host,
    localhttp,
    pods,
    reloading,
    revisions,
    roster,
    signals,
    snapshots,
)
from cri_server.network import cni, conf
from cri_server.pb import api_pb2_grpc
from cri_server.services import interceptors

log = structlog.get_logger()
MESSAGE_LIMIT = 32 << 20  # peers accept 16 and 80 MiB; a kubelet receives 16
NETWORK_CHECK = 2.0  # seconds between looks at the pinned network namespaces
SETTLE_FIRST, SETTLE_MOST = 2.0, 60.0  # seconds between attempts at CNI DELs that failed
STOP_GRACE = 10.0
STREAM_GRACE = 1.0
MEASURE_EVERY = 10.0


async def serve(settings: config.Config, reread: Callable[[], config.Config]) -> None:
    """Serve until SIGTERM or SIGINT; `reread` reads the settings anew (SIGHUP)."""
    stop = asyncio.Event()
    signals.handle(stop, settings, reread)
    async with running(settings):
        await stop.wait()
        log.info("stopping: pods keep running")


@contextlib.asynccontextmanager
async def running(settings: config.Config) -> AsyncIterator[None]:
    """Have a server running for the block."""
    _make_directories(settings)
    groups = _cgroups(settings)
    now = await roster.look(settings)
    settings, reason = defaults.choose(settings, roster.named(now), groups.hierarchy, groups.driver)
    log.info("default handler", handler=settings.runtime.default, reason=reason)
    facts = host.probe(groups.hierarchy, {}, places=settings.server)
    store = revisions.Store(settings.server.root)
    live = handlers.Handlers(settings, facts=facts, now=now, store=store)
    await live.recall()
    _warn_of_old_runtimes(now)
    async with contextlib.AsyncExitStack() as stack:
        objects = graph.Graph(settings, groups, live, stack)
        edge = interceptors.Edge()
        server = _listen(settings.server.listen, edge, objects)
        await server.start()
        stack.push_async_callback(_end, server, edge)
        stack.callback(objects.events.close)
        log.info("listening", address=settings.server.listen, cgroup_driver=groups.driver)
        await objects.zygote.start()
        await objects.streaming.start()
        await objects.recovery.run()
        await live.sweep(objects.handlers_in_use())
        await objects.collector.start()
        for place in live.places():
            await _collect_addresses(objects.network, place)
        edge.ready = True
        await _open_crio(settings, objects.crio)
        log.info("ready", network=objects.network.status().ready, handlers=list(live.names))
        reloader = reloading.Reloader(settings, live)
        for name, work in (
            ("check networks", _check_networks(objects.pods)),
            ("settle networks", _settle_networks(objects.pods)),
            ("measure", _measure(objects.layers)),
            ("reload", reloader.run()),
        ):
            stack.callback(asyncio.create_task(work, name=name).cancel)
        yield


def _warn_of_old_runtimes(now: roster.Roster) -> None:
    """Name the published vulnerabilities of the upstream versions of what will run containers."""
    for name, found in roster.named(now).items():
        if known := advisories.known(found.program, found.version):
            log.warning(
                "upstream version of the runtime has known vulnerabilities",
                runtime=name,
                program=found.path,
                version=found.version,
                vulnerabilities=advisories.names(known),
                remedy=advisories.remedy(known),
            )


async def _open_crio(settings: config.Config, server: localhttp.Server) -> None:
    if settings.server.crio_socket:
        try:
            await server.start()
        except (errors.CriError, OSError) as e:
            raise config.ConfigError(f"server.crio_socket: {e}") from e


def _cgroups(settings: config.Config) -> cgroups.Cgroups:
    driver = cgroups.driver(settings.runtime.cgroup_driver)
    prefix = settings.runtime.cgroup_prefix or ("crio" if settings.server.crio_socket else "")
    return cgroups.Cgroups(cgroups.detect(), driver, prefix=prefix)


def _make_directories(settings: config.Config) -> None:
    """Make root and state, closed to other users: images hold setuid files (CVE-2021-41103).

    The folders of pods and containers can be passed through, by who is let into the one below.
    """
    for directory in (settings.server.root, settings.server.state):
        directory.mkdir(parents=True, exist_ok=True)
        directory.chmod(0o700)
    settings.server.state.chmod(0o711)
    for name, mode in {"pods": 0o711, "containers": 0o711, "runtimes": 0o700}.items():
        (settings.server.state / name).mkdir(mode=0o700, exist_ok=True)
        (settings.server.state / name).chmod(mode)
    Path("/run/netns").mkdir(mode=0o755, exist_ok=True)


def _listen(address: str, edge: interceptors.Edge, objects: graph.Graph) -> grpc.aio.Server:
    """Make the gRPC server on a unix socket that only root can open."""
    path = Path(address.removeprefix("unix://"))
    path.parent.mkdir(parents=True, exist_ok=True)
    options = [
        ("grpc.max_receive_message_length", MESSAGE_LIMIT),
        ("grpc.max_send_message_length", MESSAGE_LIMIT),
        ("grpc.so_reuseport", 0),
    ]
    server = grpc.aio.server(interceptors=[edge], options=options)
    api_pb2_grpc.add_RuntimeServiceServicer_to_server(objects.runtime, server)
    api_pb2_grpc.add_ImageServiceServicer_to_server(objects.image, server)
    objects.archives.add_to(server)
    umask = os.umask(0o177)
    try:
        server.add_insecure_port(f"unix:{path}")
    finally:
        os.umask(umask)
    return server


async def _end(server: grpc.aio.Server, edge: interceptors.Edge) -> None:
    """Take no more calls and give those in progress some time; recovery ends what is cut off.

    A stream whose reader does not read cannot be ended, only cut: it holds nothing up for long.
    """
    stopping = asyncio.create_task(server.stop(STOP_GRACE))
    await edge.drain()
    await asyncio.wait([stopping], timeout=STREAM_GRACE)
    await server.stop(None)
    await stopping


async def _collect_addresses(network: cni.Network, place: conf.Place | None) -> None:
    """Have the plugins free what a crash leaked (CNI GC), where there is a network that can."""
    try:
        await network.collect(place)
    except errors.CriError as e:
        log.info("no CNI garbage collection", reason=e.message)


async def _check_networks(pod_host: pods.Pods) -> None:
    while True:
        await asyncio.sleep(NETWORK_CHECK)
        await pod_host.check_networks()


async def _settle_networks(pod_host: pods.Pods) -> None:
    """Repeat CNI DELs that failed, less and less often while they go on to."""
    pause = SETTLE_FIRST
    while True:
        await asyncio.sleep(pause)
        settled = await pod_host.settle_networks()
        pause = SETTLE_FIRST if settled else min(pause * 2, SETTLE_MOST)


async def _measure(layers: snapshots.Snapshots) -> None:
    """Keep the sizes of writable layers fresh, so that no request has to look."""
    while True:
        try:
            await layers.refresh()
        except OSError as e:  # the next look may go well; the old sizes stand until then
            log.warning("sizes of writable layers not measured", error=str(e))
        await asyncio.sleep(MEASURE_EVERY)
