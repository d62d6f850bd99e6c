# SPDX-License-Identifier: Apache-2.0
"""Fields that no other test shows honoured; docs/fields.md has them all."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cri_server.pb import api_pb2 as api
from tests.fakes.kubelet import Kubelet, Pod
from tests.integration.conftest import SLEEP

pytestmark = pytest.mark.needs("root", "netns", "overlay", "cni", "runc", "docker-registry")
_PRIVATE, _TO_CONTAINER, _BIDIRECTIONAL = (
    api.PROPAGATION_PRIVATE,
    api.PROPAGATION_HOST_TO_CONTAINER,
    api.PROPAGATION_BIDIRECTIONAL,
)


def test_the_image_of_a_status_is_as_it_was_asked_for(
    kubelet: Kubelet, pod: Pod, pulled: str
) -> None:
    config = kubelet.container_config(pulled, SLEEP)
    asked = api.ImageSpec(
        image=pulled,
        annotations={"a": "1"},
        user_specified_image="what/was:written",
        runtime_handler="runc",
        image_ref="sha256:resolved",
    )
    config.image.CopyFrom(asked)
    told = kubelet.status(kubelet.create(pod, config)).image
    told.image = asked.image
    assert told == asked


def test_the_image_of_a_volume_is_told_as_it_was_asked_for(
    kubelet: Kubelet, pod: Pod, pulled: str
) -> None:
    config = kubelet.container_config(pulled, SLEEP)
    asked = api.ImageSpec(image=pulled, annotations={"a": "1"}, runtime_handler="runc")
    config.mounts.add(container_path="/data", readonly=True, image=asked)
    (told,) = kubelet.status(kubelet.create(pod, config)).mounts
    assert dict(told.image.annotations) == {"a": "1"}
    assert told.image.runtime_handler == "runc"


def test_a_container_sees_the_processes_of_its_target(
    kubelet: Kubelet, pod: Pod, pulled: str
) -> None:
    target = kubelet.run(pod, pulled, ["sleep", "77777"], name="target")
    config = kubelet.container_config(pulled, ["sh", "-c", "ps; echo $$ is mine"], name="debug")
    options = config.linux.security_context.namespace_options
    options.pid, options.target_id = api.TARGET, target
    container = kubelet.create(pod, config)
    kubelet.start(container)
    kubelet.wait_exit(container)
    lines = [line.text for line in kubelet.log(container)]
    assert any(line.split()[0] == "1" and line.endswith("sleep 77777") for line in lines), lines
    assert "1 is mine" not in lines


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Path]:
    """Return a folder that passes mounts on."""
    subprocess.run(["mount", "--bind", tmp_path, tmp_path], check=True)
    subprocess.run(["mount", "--make-rshared", tmp_path], check=True)
    yield tmp_path
    subprocess.run(["umount", "--recursive", "--lazy", tmp_path], check=True)


@pytest.mark.parametrize(
    ("propagation", "inwards", "outwards"),
    [
        (_PRIVATE, False, False),
        (_TO_CONTAINER, True, False),
        (_BIDIRECTIONAL, True, True),
    ],
    ids=["private", "host to container", "bidirectional"],
)
def test_a_mount_made_later_is_seen_as_its_propagation_says(
    kubelet: Kubelet,
    pulled: str,
    shared: Path,
    propagation: api.MountPropagation.ValueType,
    inwards: bool,
    outwards: bool,
) -> None:
    for name in ("of-host", "of-container"):
        (shared / name).mkdir()
    pod_config = kubelet.pod_config()
    pod_config.linux.security_context.privileged = True
    pod = kubelet.run_pod(pod_config)
    config = kubelet.container_config(pulled, SLEEP)
    config.mounts.add(container_path="/m", host_path=os.fspath(shared), propagation=propagation)
    config.linux.security_context.privileged = True
    container = kubelet.create(pod, config)
    kubelet.start(container)
    subprocess.run(["mount", "-t", "tmpfs", "mine", shared / "of-host"], check=True)
    (shared / "of-host/canary").touch()
    seen = kubelet.exec_sync(container, ["test", "-e", "/m/of-host/canary"])
    kubelet.exec_sync(container, ["mount", "-t", "tmpfs", "theirs", "/m/of-container"])
    kubelet.exec_sync(container, ["touch", "/m/of-container/canary"])
    assert (seen.exit_code == 0) == inwards
    assert os.path.ismount(shared / "of-container") == outwards
