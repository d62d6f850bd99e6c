# SPDX-License-Identifier: Apache-2.0
"""SELinux labels on a kernel that has a policy loaded; elsewhere these are skipped."""

import os
import re
from pathlib import Path
from typing import Any

import grpc
import pytest

from cri_server import relabel
from cri_server.pb import api_pb2 as api
from tests.fakes.kubelet import Kubelet, Pod, refusal

pytestmark = [pytest.mark.needs("root", "busybox", "netns", "selinux"), pytest.mark.ours]

SLEEP = ("sleep", "600")


def linux(options: dict[str, str] | None = None, **fields: Any) -> api.LinuxContainerConfig:
    context = api.LinuxContainerSecurityContext(**fields)
    if options is not None:
        context.selinux_options.CopyFrom(api.SELinuxOption(**options))
    return api.LinuxContainerConfig(security_context=context)


def label(kubelet: Kubelet, container: str) -> str:
    found = kubelet.exec_sync(container, ("cat", "/proc/self/attr/current"))
    return found.stdout.decode().strip("\0\n")


def test_containers_of_a_pod_share_a_level_that_no_other_pod_has(
    kubelet: Kubelet, pulled: str
) -> None:
    pods = [kubelet.run_pod() for _ in "12"]
    found = [
        label(kubelet, kubelet.run(pod, pulled, SLEEP, name=name)) for pod in pods for name in "ab"
    ]
    assert all(re.search(r":container_t:s0:c\d+,c\d+$", line) for line in found)
    assert found[0] == found[1] != found[2] == found[3]


def test_a_containers_files_carry_its_level(kubelet: Kubelet, pod: Pod, container: str) -> None:
    level = label(kubelet, container).split(":", 3)[3]
    mounts = kubelet.exec_sync(container, ("cat", "/proc/self/mountinfo")).stdout.decode()
    root = next(line for line in mounts.splitlines() if line.split()[4] == "/")
    assert f":container_file_t:{level}" in root
    wrote = kubelet.exec_sync(container, ("sh", "-c", "echo x >/file && echo x >/dev/shm/file"))
    assert wrote.exit_code == 0, wrote.stderr


def test_a_privileged_container_is_not_confined(kubelet: Kubelet, pulled: str) -> None:
    config = kubelet.pod_config()
    config.linux.security_context.privileged = True
    container = kubelet.run(
        kubelet.run_pod(config), pulled, SLEEP, linux=linux({"level": "s0:c4,c5"}, privileged=True)
    )
    assert label(kubelet, container).endswith(":system_r:spc_t:s0")


def test_a_type_that_the_policy_does_not_have_is_refused(
    kubelet: Kubelet, pod: Pod, pulled: str
) -> None:
    config = kubelet.container_config(pulled, SLEEP, linux=linux({"type": "no_such_type_t"}))
    code, text = refusal(lambda: kubelet.create(pod, config))
    assert (code, "no_such_type_t" in text) == (grpc.StatusCode.INVALID_ARGUMENT, True)


def test_a_volume_is_relabelled_only_when_it_asks(
    kubelet: Kubelet, pod: Pod, pulled: str, tmp_path: Path
) -> None:
    asking, silent = tmp_path / "asking", tmp_path / "silent"
    for folder in (asking, silent):
        folder.mkdir()
        (folder / "file").write_text("content\n")
    before = os.getxattr(silent / "file", relabel.ATTRIBUTE)
    mounts = [
        api.Mount(container_path="/a", host_path=str(asking), selinux_relabel=True),
        api.Mount(container_path="/b", host_path=str(silent)),
    ]
    container = kubelet.run(pod, pulled, SLEEP, mounts=mounts)
    assert kubelet.exec_sync(container, ("cat", "/a/file")).stdout == b"content\n"
    level = label(kubelet, container).split(":", 3)[3]
    found = os.getxattr(asking / "file", relabel.ATTRIBUTE).decode().rstrip("\0")
    assert found.endswith(f":container_file_t:{level}")
    assert os.getxattr(silent / "file", relabel.ATTRIBUTE) == before
