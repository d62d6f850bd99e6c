# SPDX-License-Identifier: Apache-2.0
"""Starts and stops the server; its objects are made by `graph`.

The socket answers from the first moment, UNAVAILABLE until recovery is done. Stopping lets accepted
mutations finish for a while and leaves every pod running: its shim is its own process.
"""

import asyncio
import contextlib
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from concurrent import futures
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
    handler_set,
    handlers,
    host,
    localhttp,
    pods,
    reloading,
    revisions,
    signals,
    state,
)
from cri_server.network import leaks
from cri_server.pb import api_pb2_grpc
from cri_server.services import interceptors
from shim import client
from shim import errors as shim_errors

log = structlog.get_logger()
RECEIVE_LIMIT = 32 << 20  # peers accept 16 and 80 MiB
UNREQUESTED = 600  # seconds
SEND_LIMIT = 64 << 20  # an ExecSync with both streams full is over 32 MiB
NETWORK_CHECK = 2.0  # seconds between looks at the pinned network namespaces
SETTLE_FIRST, SETTLE_MOST = 2.0, 60.0  # seconds between attempts at CNI DELs that failed
STOP_GRACE = 10.0
STREAM_GRACE = 1.0
LEAVE = 15.0  # seconds from the signal to the end, whatever hangs; more than a drain takes
MEASURE_EVERY = 10.0
LEAKS = 10.0  # seconds between looks whether there is a network, or a day is over
WORKER = "work"  # how the names of worker threads begin
THREADS = 32  # for what blocks: with asyncio's own, 6 on two CPUs, a few slow disks stop everything


async def serve(settings: config.Config, reread: Callable[[], config.Config]) -> None:
    """Serve until SIGTERM or SIGINT; `reread` reads the settings anew (SIGHUP)."""
    stop = asyncio.Event()
    signals.handle(stop, settings, reread)
    async with running(settings):
        await stop.wait()
        log.info("stopping: pods keep running")
        _leave_in_time()


def _leave_in_time() -> None:
    """End the process after a while, though a thread of it never comes back from dead storage, for
    which the end of the loop and of the interpreter would wait.
    """

    def leave() -> None:
        stuck = [t.name for t in threading.enumerate() if t.name.startswith(WORKER)]
        log.warning("stopped without waiting any longer", threads=stuck)
        os._exit(0)

    timer = threading.Timer(LEAVE, leave)
    timer.daemon = True
    timer.start()


@contextlib.asynccontextmanager
async def running(settings: config.Config) -> AsyncIterator[None]:
    """Have a server running for the block."""
    workers = futures.ThreadPoolExecutor(THREADS, thread_name_prefix=WORKER)
    asyncio.get_running_loop().set_default_executor(workers)
    _make_directories(settings)
    groups = _cgroups(settings)
    now = await handler_set.load(settings)
    settings, reason = defaults.choose(
        settings, handler_set.named(now), groups.hierarchy, groups.driver
    )
    log.info("default handler", handler=settings.runtime.default, reason=reason)
    facts = host.probe(groups.hierarchy, {}, places=settings.server)
    store = revisions.Store(settings.server.root)
    live = handlers.Handlers(settings, facts=facts, now=now, store=store)
    await live.recall()
    _warn_of_old_runtimes(now)
    async with contextlib.AsyncExitStack() as stack:
        try:
            objects = graph.Graph(settings, groups, live, stack)
        except state.Newer as e:
            raise config.ConfigError(str(e)) from e
        edge = interceptors.Edge()
        server = _listen(settings.server.listen, edge, objects)
        await server.start()
        stack.push_async_callback(_end, server, edge)
        stack.callback(objects.events.close)
        log.info("listening", address=settings.server.listen, cgroup_driver=groups.driver)
        await _start_zygotes(objects.zygotes, {h.kind for h in settings.runtimes.values()})
        await objects.streaming.start()
        await objects.recovery.run()
        await _tried("handlers of earlier pods", live.sweep(objects.handlers_in_use()))
        await _tried("rubbish of images", objects.collector.start())
        edge.ready = True
        await _open_crio(settings, objects.crio)
        log.info("ready", network=objects.network.status().ready, handlers=list(live.names))
        looks = leaks.Leaks(objects.network, live.places)
        for name, work in (
            ("networks", _repeated("networks", objects.pods.check_networks, NETWORK_CHECK)),
            ("settle", _settle_networks(objects.pods)),
            ("sizes", _repeated("sizes", objects.layers.refresh, MEASURE_EVERY)),
            ("leaks", _repeated("leaks", looks.look, LEAKS)),
            ("reload", reloading.Reloader(settings, live).run()),
        ):
            stack.callback(asyncio.create_task(work, name=name).cancel)
        yield


def _warn_of_old_runtimes(now: handler_set.HandlerSet) -> None:
    """Name the published vulnerabilities of the upstream versions of what will run containers."""
    programs = [(n, p) for n, found in handler_set.named(now).items() for p in found.programs]
    for name, found in programs:
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

    The folders of pods and containers can be passed through, by users that are let into the one
    below.
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
        ("grpc.max_receive_message_length", RECEIVE_LIMIT),
        ("grpc.max_send_message_length", SEND_LIMIT),
        ("grpc.so_reuseport", 0),
        # A call that the loop has not come to after 30 s would be cancelled by gRPC itself. On a
        # node that is that busy it is better late: its own deadline says how late.
        ("grpc.server_max_unrequested_time_in_server", UNREQUESTED),
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


async def _start_zygotes(zygotes: client.Zygotes, kinds: Iterable[str]) -> None:
    """Have them ready before the first pod. One that is late, as on a node that boots with all its
    pods, keeps nobody from being served: who needs it waits for it, or starts it anew.
    """
    try:
        await zygotes.start(kinds)
    except shim_errors.Unavailable as e:
        log.warning("zygote not ready", error=e.message)


async def _tried(what: str, work: Awaitable[None]) -> None:
    """Do what tidies up; that it fails keeps nobody from being served."""
    try:
        await work
    except Exception as e:
        log.error("not tidied up", what=what, error=repr(e))


async def _settle_networks(pod_host: pods.Pods) -> None:
    """Repeat CNI DELs that failed, less and less often while they go on to."""
    pause = SETTLE_FIRST
    while True:
        await asyncio.sleep(pause)
        settled = await pod_host.settle_networks()
        pause = SETTLE_FIRST if settled else min(pause * 2, SETTLE_MOST)


async def _repeated(name: str, work: Callable[[], Awaitable[None]], pause: float) -> None:
    """Do it again and again. When it fails the next time may go well."""
    while True:
        try:
            await work()
        except Exception as e:
            log.warning("background work failed", what=name, error=repr(e))
        await asyncio.sleep(pause)
