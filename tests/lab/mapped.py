# SPDX-License-Identifier: Apache-2.0
"""Pods with user namespaces of their own, and what a test asks of a container in one."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cri_server.pb import api_pb2 as api
from shim import linux
from tests.fakes.kubelet import Kubelet, Pod

FIRST, COUNT = 200000, 65536
MAPPING = api.IDMapping(host_id=FIRST, container_id=0, length=COUNT)
SLEEP = ("sleep", "86400")


def userns(**changes: Any) -> api.UserNamespace:
    """Return what the kubelet asks for, but for `changes`."""
    usual: dict[str, Any] = {"mode": api.POD, "uids": [MAPPING], "gids": [MAPPING]}
    return api.UserNamespace(**usual | changes)


def config_of(kubelet: Kubelet, *, wanted: api.UserNamespace, **options: Any) -> Any:
    """Return a pod's config; `options` are namespace options."""
    config = kubelet.pod_config()
    namespaces: dict[str, Any] = {"pid": api.CONTAINER, "userns_options": wanted} | options
    config.linux.security_context.namespace_options.CopyFrom(api.NamespaceOption(**namespaces))
    return config


def container_config(
    kubelet: Kubelet, pod: Pod, reference: str, command: Sequence[str], **fields: Any
) -> api.ContainerConfig:
    """Return what the kubelet sends: the pod's namespace options, its mappings on every mount."""
    context = fields.pop("security", api.LinuxContainerSecurityContext())
    options = pod.config.linux.security_context.namespace_options
    context.namespace_options.CopyFrom(options)
    linux_part = api.LinuxContainerConfig(security_context=context)
    wish = kubelet.container_config(reference, command, linux=linux_part, **fields)
    for mount in wish.mounts:
        mount.uidMappings.extend(options.userns_options.uids)
        mount.gidMappings.extend(options.userns_options.gids)
    return wish


def run(
    kubelet: Kubelet, pod: Pod, reference: str, command: Sequence[str] = SLEEP, **fields: Any
) -> str:
    container = kubelet.create(pod, container_config(kubelet, pod, reference, command, **fields))
    kubelet.start(container)
    return container


def said(kubelet: Kubelet, container: str, script: str) -> list[str]:
    """Return the lines that a script says in a container, stderr too."""
    answer = kubelet.exec_sync(container, ["sh", "-c", f"exec 2>&1; {script}"])
    return bytes(answer.stdout).decode().splitlines()


def logged(kubelet: Kubelet, container: str) -> list[str]:
    """Return the lines of a container that has ended well."""
    status = kubelet.wait_exit(container)
    lines = [line.text for line in kubelet.log(container)]
    assert status.exit_code == 0, lines
    return lines


def ids_of(path: Path) -> tuple[int, int]:
    found = path.lstat()
    return found.st_uid, found.st_gid


def mount(path: Path, target: str = "/data", **fields: Any) -> api.Mount:
    return api.Mount(host_path=os.fspath(path), container_path=target, **fields)


@contextlib.contextmanager
def mounted(target: Path, flags: int = linux.MS_NOSUID | linux.MS_NODEV) -> Iterator[Path]:
    """Give a tmpfs with flags that a user namespace cannot take off."""
    target.mkdir(exist_ok=True)
    linux.mount("tmpfs", os.fspath(target), "tmpfs", flags, "mode=755")
    try:
        yield target
    finally:
        linux.umount2(os.fspath(target), linux.MNT_DETACH)
