# SPDX-License-Identifier: Apache-2.0
"""What every shim is forked from: a whole shim, made and warmed up, but without a pod.

    cri_server ── socketpair: a ForkRequest and a listening socket ──► zygote ──fork──► shim
         ▲                                                                              │
         └─────────────────────────────────── ForkReply ◄───────────────────────────────┘

A fork takes about a millisecond, and a shim's own memory is only what it changes. Therefore all
that can be made before a pod is known is made here once, and between two forks the zygote does
nothing: a page that it wrote would be the last shim's to keep. The child reads the request and
answers it.

The zygote ends when the server does (its socket closes); shims are in sessions of their own and
live on. When it dies early nobody loses anything: `shim.client.Zygote` starts another.
"""

import contextlib
import gc
import os
import signal
import socket
from collections.abc import Callable

from shim import compact, diagnostics, linux, loop, server
from shim.pb import shim_pb2 as pb

MESSAGE_LIMIT = 256 << 10
READY = b"ready"

_OOM_SCORE_ADJ = b"-998"  # one more than the kubelet's own -999; a shim must outlive its containers


def main(control_fd: int, kind: str) -> None:
    """Serve fork requests on a SOCK_SEQPACKET descriptor until the other end is closed.

    `kind` is that of the handlers: what their shims need is imported here, once for all of them.
    """
    linux.prctl_set_name("cri-zygote")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited by shims
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    server.preload(kind)
    loop.run(_serve(socket.socket(fileno=control_fd)))


async def _serve(control: socket.socket) -> None:
    """Be the zygote and, in every child, a shim."""
    shim = server.Shim()
    await _settle(shim)
    signal.signal(signal.SIGCHLD, _bury(os.getpid()))
    control.send(READY)
    while True:
        request, descriptors, _, _ = socket.recv_fds(control, MESSAGE_LIMIT, 2)
        if not request:
            return
        if linux.fork() == 0:
            await _be_shim(shim, request, descriptors, control)
        for descriptor in descriptors:
            os.close(descriptor)


async def _settle(shim: server.Shim) -> None:
    """Have Python do once what it does once, and leave its memory as forks can best share it."""
    with compact.watch() as used:
        await shim.rehearse()
    compact.gather(used)
    await shim.rehearse()
    gc.collect()
    gc.freeze()
    gc.disable()
    compact.fill_holes()


def _bury(zygote: int) -> Callable[[int, object], None]:
    """Return the handler that reaps dead shims; a shim inherits it, and has a reaper of its own."""

    def bury(_: int, __: object) -> None:
        with contextlib.suppress(ChildProcessError):
            while os.getpid() == zygote and os.waitpid(-1, os.WNOHANG)[0]:
                continue

    return bury


async def _be_shim(
    shim: server.Shim, request: bytes, descriptors: list[int], control: socket.socket
) -> None:
    """Leave all of the zygote's behind and serve; the process ends here, whatever happens.

    `descriptors`: the listening socket and, it may be, a copy of the runtime's program.
    """
    code = 1
    try:
        loop.after_fork()
        told = pb.ForkRequest.FromString(request)
        _reset_process()
        _answer(control, told)
        gc.enable()
        for descriptor in descriptors:
            os.set_inheritable(descriptor, False)  # received ones are: runtimes would get it
        listener = socket.socket(fileno=descriptors[0])
        await shim.serve(listener, told, program=descriptors[1] if len(descriptors) > 1 else -1)
        os.unlink(os.path.join(told.pod_dir, os.path.basename(listener.getsockname())))
        code = 0
    except BaseException as error:
        diagnostics.report("shim failed", error=f"{type(error).__name__}: {error}")
    finally:
        os._exit(code)


def _answer(control: socket.socket, told: pb.ForkRequest) -> None:
    """Tell the server who serves the pod, and let go of its socket."""
    with control, contextlib.suppress(OSError):  # the server is gone: the shim serves the next one
        control.send(pb.ForkReply(pod_id=told.pod_id, pid=os.getpid()).SerializeToString())


def _reset_process() -> None:
    """Take the identity of a shim; becoming a subreaper is the reaper's."""
    os.setsid()
    os.chdir("/")
    _write_proc("/proc/self/comm", b"cri-shim")
    _write_proc("/proc/self/oom_score_adj", _OOM_SCORE_ADJ)


def _write_proc(path: str, value: bytes) -> None:
    """Write what is nice to have; lowering a score is refused without CAP_SYS_RESOURCE."""
    fd = os.open(path, os.O_WRONLY)
    with contextlib.suppress(OSError):
        os.write(fd, value)
    os.close(fd)
