# SPDX-License-Identifier: Apache-2.0
"""AppArmor profiles on a kernel that enforces them; elsewhere these are skipped."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from cri_server import apparmor
from cri_server.pb import api_pb2 as api
from tests.fakes.kubelet import Kubelet, Pod, refusal

pytestmark = [pytest.mark.needs("root", "busybox", "netns", "apparmor"), pytest.mark.ours]

Profile = api.SecurityProfile
DEFAULT = Profile(profile_type=Profile.RuntimeDefault)
OWN = "cri-server-test-no-writing"
NO_WRITING = f"profile {OWN} flags=(attach_disconnected) {{\n  file,\n  deny /tmp/** w,\n}}\n"
MISSING = "cri-server-test-not-loaded"
CURRENT = ("cat", "/proc/self/attr/current")


@pytest.fixture(scope="module")
def no_writing() -> Iterator[str]:
    """Return the name of a loaded profile that forbids writing to /tmp."""
    _parser("--replace", NO_WRITING)
    yield OWN
    _parser("--remove", NO_WRITING)


def _parser(action: str, text: str) -> None:
    argv = [apparmor.parser(), action, "--skip-cache"]
    subprocess.run(argv, input=text.encode(), check=True, capture_output=True)


def localhost(name: str) -> api.SecurityProfile:
    return Profile(profile_type=Profile.Localhost, localhost_ref=name)


def linux(**security: Any) -> api.LinuxContainerConfig:
    return api.LinuxContainerConfig(security_context=api.LinuxContainerSecurityContext(**security))


def said(kubelet: Kubelet, pod: Pod, image: str, script: str, **security: Any) -> list[str]:
    """Run a script in a container of its own and return the lines of its standard output."""
    name = f"c{len(kubelet.containers())}"
    container = kubelet.run(pod, image, ("sh", "-c", script), name=name, linux=linux(**security))
    kubelet.wait_exit(container)
    return [line.text for line in kubelet.log(container) if line.stream == "stdout"]


@pytest.mark.parametrize(
    ("security", "expected"),
    [
        ({"apparmor": DEFAULT}, f"{apparmor.NAME} (enforce)"),
        ({"apparmor_profile": "runtime/default"}, f"{apparmor.NAME} (enforce)"),
        ({"apparmor": DEFAULT, "apparmor_profile": "unconfined"}, f"{apparmor.NAME} (enforce)"),
        ({"apparmor": Profile(profile_type=Profile.Unconfined)}, "unconfined"),
        ({}, f"{apparmor.NAME} (enforce)"),  # as with the peers
    ],
)
def test_a_container_and_its_execs_run_under_the_profile_asked_for(
    kubelet: Kubelet, pod: Pod, pulled: str, security: dict[str, Any], expected: str
) -> None:
    container = kubelet.run(pod, pulled, ("sleep", "600"), linux=linux(**security))
    for who in ("self", "1"):
        found = kubelet.exec_sync(container, ("cat", f"/proc/{who}/attr/current")).stdout
        assert expected in found.decode()  # Ubuntu says "runc (unconfined)"


def test_a_privileged_container_is_unconfined(kubelet: Kubelet, pulled: str) -> None:
    config = kubelet.pod_config()
    config.linux.security_context.privileged = True
    pod = kubelet.run_pod(config)
    found = said(kubelet, pod, pulled, " ".join(CURRENT), apparmor=DEFAULT, privileged=True)
    assert "unconfined" in found[0]


def test_the_default_profile_keeps_root_from_the_kernels_files(
    kubelet: Kubelet, pod: Pod, pulled: str
) -> None:
    script = """
    echo x >/tmp/file && echo file written
    echo 0 >/proc/self/oom_score_adj; echo comm >/proc/self/comm && echo own process written
    cat /proc/1/environ >/dev/null && echo peer read
    (echo 3 >/proc/sys/vm/drop_caches) 2>/dev/null && echo caches dropped
    (echo h >/proc/sysrq-trigger) 2>/dev/null && echo sysrq triggered
    cat /proc/sys/kernel/ostype
    mkdir /tmp/mnt; mount -t tmpfs none /tmp/mnt 2>&1
    """
    found = said(
        kubelet,
        pod,
        pulled,
        script,
        apparmor=DEFAULT,
        capabilities=api.Capability(add_capabilities=["ALL"]),
    )
    assert found[:4] == ["file written", "own process written", "peer read", "Linux"]
    assert "denied" in found[4]


def test_the_default_profile_hides_the_firmware(kubelet: Kubelet, pod: Pod, pulled: str) -> None:
    entries = [p.name for p in Path("/sys/firmware").iterdir() if p.is_dir()]
    if not entries:
        pytest.skip("this machine shows no firmware")
    found = said(kubelet, pod, pulled, f"ls /sys/firmware/{entries[0]}/ 2>&1", apparmor=DEFAULT)
    assert "denied" in found[0]


def test_signals_from_the_host_and_from_neighbours_arrive(
    kubelet: Kubelet, pod: Pod, pulled: str
) -> None:
    script = (
        "sleep 600 & kill -9 $!; wait $!; echo $?; trap 'exit 7' TERM; while :; do sleep 0.1; done"
    )
    container = kubelet.run(pod, pulled, ("sh", "-c", script), linux=linux(apparmor=DEFAULT))
    kubelet.wait_log(container, "137")
    kubelet.stop(container, timeout=20)
    assert kubelet.status(container).exit_code == 7


def test_our_profile_comes_back_after_somebody_unloaded_it(
    kubelet: Kubelet, pod: Pod, pulled: str
) -> None:
    said(kubelet, pod, pulled, "true", apparmor=DEFAULT)
    _parser("--remove", apparmor.profile())
    assert apparmor.NAME not in apparmor.loaded()
    found = said(kubelet, pod, pulled, " ".join(CURRENT), apparmor=DEFAULT)
    assert found == [f"{apparmor.NAME} (enforce)"]


@pytest.mark.parametrize("prefix", ["", "localhost/"])
def test_a_profile_that_was_loaded_by_hand_is_enforced(
    kubelet: Kubelet, pod: Pod, pulled: str, no_writing: str, prefix: str
) -> None:
    script = "(echo x >/tmp/file) 2>/dev/null && echo written; " + " ".join(CURRENT)
    found = said(kubelet, pod, pulled, script, apparmor=localhost(prefix + no_writing))
    assert found == [f"{no_writing} (enforce)"]


def test_the_new_field_wins_over_the_old_one(
    kubelet: Kubelet, pod: Pod, pulled: str, no_writing: str
) -> None:
    old = f"localhost/{MISSING}"
    script = " ".join(CURRENT)
    found = said(kubelet, pod, pulled, script, apparmor=localhost(no_writing), apparmor_profile=old)
    assert found == [f"{no_writing} (enforce)"]


@pytest.mark.parametrize(
    "security", [{"apparmor": localhost(MISSING)}, {"apparmor_profile": f"localhost/{MISSING}"}]
)
def test_a_profile_that_is_not_loaded_is_refused(
    kubelet: Kubelet, pod: Pod, pulled: str, security: dict[str, Any]
) -> None:
    config = kubelet.container_config(pulled, ("true",), linux=linux(**security))
    code, text = refusal(lambda: kubelet.create(pod, config))
    assert (code, MISSING in text) == (grpc.StatusCode.INVALID_ARGUMENT, True)
    assert kubelet.containers(pod_sandbox_id=pod.id) == []
