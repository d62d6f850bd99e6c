# SPDX-License-Identifier: Apache-2.0
"""What every shim is forked from: it has imported all that a shim needs and does nothing else.

    cri_server ── socketpair, one JSON message per fork ──► zygote ──fork──► shim, shim, shim

A fork takes about a millisecond, and a shim's own memory is only what it changes. The zygote ends when
the server does (its socket closes); shims are in sessions of their own and live on. When it dies
early nobody loses anything: `shim.client.Zygote` starts another. It holds no state but the socket.
"""

import contextlib
import gc
import json
import os
import signal
import socket
from typing import Any, NoReturn

from shim import bootstrap, diagnostics, linux, loop, server
from shim.ttrpc import address

MESSAGE_LIMIT = 256 << 10
READY = b"{}"

_OOM_SCORE_ADJ = b"-998"  # one more than the kubelet's own -999; a shim must outlive its containers
_BACKLOG = 64


def main(control_fd: int) -> None:
    """Serve fork requests on a SOCK_SEQPACKET descriptor until the other end is closed."""
    control = socket.socket(fileno=control_fd)
    linux.prctl_set_name("cri-zygote")
    _settle()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps dead shims for us
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited by shims
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    control.send(READY)
    while request := control.recv(MESSAGE_LIMIT):
        control.send(json.dumps(_answer(json.loads(request), control)).encode())


def _answer(request: dict[str, Any], control: socket.socket) -> dict[str, Any]:
    """Fork and say how that went; `socket` tells the server which request this answers."""
    reply = {"socket": request["socket"]}
    try:
        return {**reply, "pid": _fork(request, control)}
    except Exception as error:
        code = error.errno if isinstance(error, OSError) else 0
        return {**reply, "error": f"{type(error).__name__}: {error}", "errno": code}


def _settle() -> None:
    """Do once what would otherwise change memory in every shim, then freeze the heap."""
    loop.run(_warm_up())
    gc.collect()
    gc.freeze()
    gc.disable()


async def _warm_up() -> None:
    await loop.run_command(["true"], timeout=10)


def _fork(request: dict[str, Any], control: socket.socket) -> int:
    told = bootstrap.Bootstrap.from_json(json.dumps(request["bootstrap"]).encode())
    path = request["socket"]
    listener = _listen(path)
    pid = os.fork()
    if pid == 0:
        _become_shim(listener, told, control, path)
    listener.close()
    return pid


def _listen(path: str) -> socket.socket:
    """Return a listening socket that only root reaches. Raises FileExistsError: a shim serves there."""
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    try:
        with address.usable(path) as name:
            _remove_stale(name)
            before = os.umask(0o177)
            try:
                listener.bind(name)
            finally:
                os.umask(before)
        listener.listen(_BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def _remove_stale(name: str) -> None:
    with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(FileNotFoundError):
        try:
            probe.connect(name)
        except ConnectionRefusedError:
            os.unlink(name)
        else:
            raise FileExistsError(17, "a shim serves there already", name)


def _become_shim(
    listener: socket.socket, told: bootstrap.Bootstrap, control: socket.socket, path: str
) -> NoReturn:
    """Leave everything of the zygote's behind and serve; the process ends here, whatever happens."""
    code = 1
    try:
        control.detach()
        kept = _only_descriptor(listener)
        os.setsid()
        os.chdir("/")
        os.umask(0o022)
        _reset_process()
        gc.enable()
        server.serve(kept, told)
        os.unlink(path)
        code = 0
    except BaseException as error:
        diagnostics.report("shim failed", pod=told.pod_id, error=f"{type(error).__name__}: {error}")
    finally:
        os._exit(code)


def _only_descriptor(listener: socket.socket) -> socket.socket:
    """Close all but the standard streams and the listener, which becomes descriptor 3."""
    fd = listener.detach()
    if fd != 3:
        os.dup2(fd, 3, inheritable=False)
    linux.close_range(4)
    return socket.socket(fileno=3)


def _reset_process() -> None:
    """Take the identity of a shim. Only raw calls: `signal.signal` and `open` alone would copy 0.4 MB."""
    linux.signal_default(signal.SIGCHLD)
    linux.prctl_set_child_subreaper()
    _write_proc("/proc/self/comm", b"cri-shim")
    _write_proc("/proc/self/oom_score_adj", _OOM_SCORE_ADJ)


def _write_proc(path: str, value: bytes) -> None:
    """Write what is nice to have; lowering a score is refused without CAP_SYS_RESOURCE."""
    fd = os.open(path, os.O_WRONLY)
    try:
        os.write(fd, value)
    except OSError:
        pass
    finally:
        os.close(fd)
