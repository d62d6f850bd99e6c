# SPDX-License-Identifier: Apache-2.0
"""What annotations may ask for where CRI has no field: limits of processes, the size of /dev/shm.

    cri-server.io/rlimits           "nofile=1024:65536,core=0"      every container of a pod
    cri-server.io/rlimits.<name>    the same                        the pod's container of that name
    cri-server.io/shm-size          "256Mi"                         a pod

Whoever writes a pod writes these, so they count only where the handler's `pod_annotations` or
`container_annotations` lets them through (hazards V24). With our own prefix nothing is skipped in
silence: what is not let through, or not known, is refused. So are classes of block I/O and of
caches (RDT), which other runtimes have in files of their own and we have not.
"""

from collections.abc import Container, Iterator, Mapping

from cri_server import errors, limits
from cri_server.pb import api_pb2 as api
from cri_server.spec import types, why

PREFIX = "cri-server.io/"
RLIMITS = f"{PREFIX}rlimits"
SHM_SIZE = f"{PREFIX}shm-size"
_PAGE = 4096
_CLASSES = (  # goresctrl's keys: of a pod, and of a container
    "blockio.resources.beta.kubernetes.io/",
    "io.kubernetes.cri.blockio-class",
    "rdt.resources.beta.kubernetes.io/",
    "io.kubernetes.cri.rdt-class",
)


def check_pod(config: api.PodSandboxConfig, allowed: Container[str], host: types.HostFacts) -> None:
    """Refuse what cannot be honoured: InvalidArgument that names the annotation.

    `allowed` are the keys that the handler lets through.
    """
    _check_classes(config.annotations, allowed)
    for key, value in _ours(config.annotations, allowed, "pod_annotations"):
        if key == SHM_SIZE:
            _check_size(value, host)
            if config.linux.security_context.namespace_options.ipc == api.NamespaceMode.NODE:
                raise _refused(key, "a pod in the host's IPC namespace has the host's /dev/shm")
        else:
            _check_rlimits(key, value, host)


def check_container(
    config: api.ContainerConfig, allowed: Container[str], host: types.HostFacts
) -> None:
    """Do as `check_pod` for a container's own annotations."""
    _check_classes(config.annotations, allowed)
    for key, value in _ours(config.annotations, allowed, "container_annotations"):
        _check_rlimits(key, value, host)


def _check_classes(annotations: Mapping[str, str], allowed: Container[str]) -> None:
    """Refuse classes, unless the handler lets them through to an OCI runtime that knows them."""
    for key in annotations:
        if key.startswith(_CLASSES) and key not in allowed:
            raise _refused(key, "there are no classes of block I/O or RDT in this runtime")


def _ours(
    annotations: Mapping[str, str], allowed: Container[str], option: str
) -> Iterator[tuple[str, str]]:
    for key, value in annotations.items():
        if key.startswith(PREFIX):
            if key not in allowed:
                raise _refused(key, f"the handler's {option} does not let it through")
            yield key, value


def _check_rlimits(key: str, value: str, host: types.HostFacts) -> None:
    if key != RLIMITS and not key.startswith(f"{RLIMITS}."):
        raise _refused(key, "there is no such annotation")
    for limit in _rlimits(key, value):
        ceiling = host.rlimit_ceilings.get(limit.type, limit.hard)
        if limit.hard > ceiling:
            raise _refused(key, f"{limit.type} cannot be above {ceiling} on this host")


def _check_size(value: str, host: types.HostFacts) -> None:
    size = _size(value)
    if not _PAGE <= size <= host.memory:
        raise _refused(SHM_SIZE, f"{value} is less than a page or more than the host's memory")


def rlimits(wanted: types.ContainerInput) -> Iterator[tuple[str, limits.Rlimit]]:
    """Yield the container's limits, each with the annotation that asks for it, "" for a default.

    What is nearer to the container wins: the handler's default, the pod, the container by name.
    """
    found = {limit.type: ("", limit) for limit in wanted.defaults.rlimits}
    for key in (RLIMITS, f"{RLIMITS}.{wanted.config.metadata.name}"):
        for limit in _rlimits(key, wanted.annotations.get(key, "")):
            found[limit.type] = (key, limit)
    yield from found.values()


def shm_size(allowed: Mapping[str, str], default: int, *, key: str = "") -> int:
    """Return the size of the pod's /dev/shm in bytes; `key` is where the default is set, "" for
    ours.
    """
    if key:
        why.handler("sandbox.shm_size", key)
    else:
        why.default("sandbox.shm_size", "as with containerd and CRI-O")
    if SHM_SIZE not in allowed:
        return default
    why.pod("sandbox.shm_size", f"annotations[{SHM_SIZE}]", "let through by pod_annotations")
    return _size(allowed[SHM_SIZE])


def _rlimits(key: str, value: str) -> tuple[limits.Rlimit, ...]:
    try:
        return limits.rlimits(value)
    except ValueError as e:
        raise _refused(key, str(e)) from e


def _size(value: str) -> int:
    try:
        return limits.size(value)
    except ValueError as e:
        raise _refused(SHM_SIZE, str(e)) from e


def _refused(key: str, reason: str) -> errors.InvalidArgument:
    return errors.InvalidArgument(f"annotations[{key[:100]}]: {reason}")
