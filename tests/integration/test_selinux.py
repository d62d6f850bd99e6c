# SPDX-License-Identifier: Apache-2.0
"""SELinux labels on a kernel that has a policy loaded; elsewhere these are skipped.

What a policy then forbids is seen where it is enforced, as in the guest of `python -m tests.vm
--runs selinux`.
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from cri_server import selinux_relabel
from cri_server.pb import api_pb2 as api
from tests.fakes.kubelet import Kubelet, Pod, refusal
from tests.lab import faults, image, server
from tests.lab.registry import Registry

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


def said(kubelet: Kubelet, container: str, script: str) -> str:
    """Return what a script says, errors too."""
    found = kubelet.exec_sync(container, ("sh", "-c", f"exec 2>&1; {script}"))
    return found.stdout.decode()


def volume(tmp_path: Path, *, asks: bool, name: str = "volume") -> api.Mount:
    """Return a volume on /v with a file in it."""
    folder = tmp_path / name
    folder.mkdir(exist_ok=True)
    (folder / "file").write_text("content\n")
    return api.Mount(container_path="/v", host_path=str(folder), selinux_relabel=asks)


def of_file(path: Path) -> str:
    return os.getxattr(path, selinux_relabel.ATTRIBUTE).decode().rstrip("\0")


# -- labels ----------------------------------------------------------------------------------------


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


def test_a_container_that_sees_the_hosts_processes_is_not_confined(
    kubelet: Kubelet, pulled: str
) -> None:
    config = kubelet.pod_config()
    config.linux.security_context.namespace_options.pid = api.NODE
    context = linux()
    context.security_context.namespace_options.pid = api.NODE
    container = kubelet.run(kubelet.run_pod(config), pulled, SLEEP, linux=context)
    assert label(kubelet, container).endswith(":system_r:spc_t:s0")


def test_the_first_process_and_a_later_one_have_the_containers_label(
    kubelet: Kubelet, container: str
) -> None:
    pid = faults.pid_of(kubelet, container)
    first = Path(f"/proc/{pid}/attr/current").read_text().strip("\0\n")
    told = json.loads(kubelet.status_response(container, verbose=True).info["info"])
    assert first == label(kubelet, container) == told["runtimeSpec"]["process"]["selinuxLabel"]


def test_a_label_is_as_pod_and_container_ask(kubelet: Kubelet, pulled: str) -> None:
    config = kubelet.pod_config()
    config.linux.security_context.selinux_options.level = "s0:c7,c9"
    pod = kubelet.run_pod(config)
    own = kubelet.run(pod, pulled, SLEEP, name="own", linux=linux({"level": "s0:c1,c2"}))
    of_pod = kubelet.run(pod, pulled, SLEEP, name="pods")
    assert label(kubelet, of_pod).endswith(":container_t:s0:c7,c9")
    assert label(kubelet, own).endswith(":container_t:s0:c1,c2")
    assert said(kubelet, own, "cat /etc/hostname") == config.hostname + "\n"


def test_a_level_stays_with_its_pod_when_the_server_is_killed(
    make_site: Callable[[], server.Site],
    client_of: Callable[[server.Site], Kubelet],
    reference: str,
) -> None:
    site = make_site()
    client = client_of(site)
    pod, pulled = client.run_pod(), client.pull(reference)
    before = label(client, client.run(pod, pulled, SLEEP, name="before"))
    site.kill()
    site.start()
    assert label(client, client.run(pod, pulled, SLEEP, name="after")) == before


def test_volumes_that_come_with_images_carry_the_level(
    kubelet: Kubelet, pod: Pod, pulled: str, registry: Registry
) -> None:
    built = image.busybox(Volumes={"/home": {}})
    declares = kubelet.pull(registry.push(built, "test/selinux-volumes"))
    mounted = api.Mount(container_path="/img", readonly=True, image=api.ImageSpec(image=pulled))
    container = kubelet.run(pod, declares, SLEEP, mounts=[mounted])
    assert said(kubelet, container, "echo y > /home/x; cat /home/x") == "y\n"
    assert said(kubelet, container, "test -s /img/etc/passwd && echo y") == "y\n"
    kubelet.remove_pod(pod.id)
    kubelet.remove_image(declares)


def test_what_a_confined_container_says_is_in_its_log(
    kubelet: Kubelet, pod: Pod, pulled: str
) -> None:
    container = kubelet.run(pod, pulled, ("sh", "-c", "echo said; exec sleep 600"))
    assert kubelet.wait_log(container, "said")


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
    before = of_file(silent / "file")
    mounts = [
        api.Mount(container_path="/a", host_path=str(asking), selinux_relabel=True),
        api.Mount(container_path="/b", host_path=str(silent)),
    ]
    container = kubelet.run(pod, pulled, SLEEP, mounts=mounts)
    assert kubelet.exec_sync(container, ("cat", "/a/file")).stdout == b"content\n"
    level = label(kubelet, container).split(":", 3)[3]
    assert of_file(asking / "file").endswith(f":container_file_t:{level}")
    assert of_file(silent / "file") == before


def test_no_volume_is_relabelled_for_a_container_that_asks_to_be_unconfined(
    kubelet: Kubelet, pod: Pod, pulled: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("of another\n")
    before = of_file(tmp_path / "file")
    mounts = [api.Mount(container_path="/v", host_path=str(tmp_path), selinux_relabel=True)]
    linux = api.LinuxContainerConfig()
    linux.security_context.selinux_options.type = "spc_t"
    container = kubelet.run(pod, pulled, SLEEP, mounts=mounts, linux=linux)
    assert kubelet.exec_sync(container, ("cat", "/v/file")).stdout == b"of another\n"
    assert of_file(tmp_path / "file") == before


# -- what an enforced policy forbids ---------------------------------------------------------------


@pytest.mark.needs("selinux-enforced")
def test_a_volume_that_was_not_relabelled_is_not_to_be_had(
    kubelet: Kubelet, pod: Pod, pulled: str, tmp_path: Path
) -> None:
    mount = volume(tmp_path, asks=False)
    container = kubelet.run(pod, pulled, SLEEP, mounts=[mount])
    assert "Permission denied" in said(kubelet, container, "cat /v/file")
    assert "Permission denied" in said(kubelet, container, "echo x > /v/new")
    assert os.listdir(mount.host_path) == ["file"]


@pytest.mark.needs("selinux-enforced")
def test_one_pods_volume_is_not_anothers(kubelet: Kubelet, pulled: str, tmp_path: Path) -> None:
    owner, other = kubelet.run_pod(), kubelet.run_pod()
    asks, shares = volume(tmp_path, asks=True), volume(tmp_path, asks=False)
    first, second = (
        kubelet.run(owner, pulled, SLEEP, name=name, mounts=[mount])
        for name, mount in (("first", asks), ("second", shares))
    )
    thief = kubelet.run(other, pulled, SLEEP, mounts=[shares])
    assert said(kubelet, first, "cat /v/file") == "content\n"
    assert said(kubelet, second, "cat /v/file") == "content\n"
    assert "Permission denied" in said(kubelet, thief, "cat /v/file")


@pytest.mark.needs("selinux-enforced")
def test_a_privileged_container_may_what_others_may_not(
    kubelet: Kubelet, pulled: str, tmp_path: Path
) -> None:
    config = kubelet.pod_config()
    config.linux.security_context.privileged = True
    container = kubelet.run(
        kubelet.run_pod(config),
        pulled,
        SLEEP,
        linux=linux(privileged=True),
        mounts=[volume(tmp_path, asks=False)],
    )
    assert said(kubelet, container, "cat /v/file") == "content\n"


@pytest.mark.needs("selinux-enforced")
def test_a_container_with_all_capabilities_is_still_confined(
    kubelet: Kubelet, pod: Pod, pulled: str, tmp_path: Path
) -> None:
    capabilities = api.Capability(add_capabilities=["ALL"])
    container = kubelet.run(
        pod,
        pulled,
        SLEEP,
        linux=linux(capabilities=capabilities),
        mounts=[volume(tmp_path, asks=False)],
    )
    assert "Permission denied" in said(kubelet, container, "cat /v/file")
    assert "denied" in said(kubelet, container, "mount -t tmpfs none /mnt || echo denied")
