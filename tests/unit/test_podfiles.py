# SPDX-License-Identifier: Apache-2.0
"""The files of a pod: their texts, and a removal that can be repeated."""

import dataclasses
import os
import socket
from pathlib import Path

from cri_server import podfiles, spec, state
from cri_server.pb import api_pb2 as api

HOST = api.NamespaceMode.NODE


def pod(**config: object) -> state.Pod:
    message = api.PodSandboxConfig(metadata=api.PodSandboxMetadata(name="a"), **config)  # type: ignore[arg-type]
    return state.new_pod(message, runtime_handler="", handler="runc", now=1)


def on_host() -> state.Pod:
    options = api.NamespaceOption(network=HOST, ipc=HOST)
    security = api.LinuxSandboxSecurityContext(namespace_options=options)
    return pod(linux=api.LinuxPodSandboxConfig(security_context=security))


def test_resolv_conf_has_the_lines_in_order() -> None:
    dns = api.DNSConfig(servers=["1.1.1.1", "::1"], searches=["a", "b"], options=["ndots:5"])
    expected = "search a b\nnameserver 1.1.1.1\nnameserver ::1\noptions ndots:5\n"
    assert podfiles.resolv_conf(dns) == expected


def test_an_empty_dns_config_is_the_hosts() -> None:
    assert podfiles.resolv_conf(api.DNSConfig()) == Path("/etc/resolv.conf").read_text()


def test_hostname() -> None:
    assert podfiles.hostname(pod(hostname="h")) == "h"
    nameless = pod()
    assert podfiles.hostname(nameless) == nameless.id[:12]
    assert podfiles.hostname(on_host()) == socket.gethostname()


def test_namespaces_of_the_host_are_not_listed(tmp_path: Path) -> None:
    files = podfiles.PodFiles(tmp_path)
    assert set(files.namespaces(pod())) == {"network", "uts", "ipc"}
    assert files.namespaces(on_host()) == {}
    assert files.shm(on_host()) == "/dev/shm"
    with_init = dataclasses.replace(pod(), pid=7)
    assert files.namespaces(with_init)["pid"] == "/proc/7/ns/pid"


def test_create_and_remove_are_a_pair(tmp_path: Path) -> None:
    files, made = podfiles.PodFiles(tmp_path), pod()
    files.create(made, shm_size=1 << 20, labels=spec.SelinuxLabels())
    try:
        directory = files.directory(made.id)
        assert os.path.ismount(directory / "shm")
        assert os.statvfs(directory / "shm").f_blocks * 4096 == 1 << 20
        assert (directory / "hostname").read_text() == f"{made.id[:12]}\n"
    finally:
        files.remove(made.id)
    files.remove(made.id)
    assert list(tmp_path.glob("pods/*")) == []
