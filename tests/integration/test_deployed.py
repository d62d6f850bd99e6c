# SPDX-License-Identifier: Apache-2.0
"""The unit of deploy/ under systemd: CRI_ENDPOINT names its socket, CRI_CERTS_DIR its registries.

Run in the guest of `make test-vm`; elsewhere there is no unit to restart, and these are skipped.
"""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from cri_server.pb import api_pb2 as api
from tests.fakes import kubelet as kubelets
from tests.fakes.kubelet import Kubelet, Pod
from tests.integration.conftest import SLEEP
from tests.lab import faults, waiting

pytestmark = pytest.mark.needs("root", "deployed")
COUNT = "i=0; while :; do echo $i; i=$((i+1)); sleep 0.2; done"
MIB = 1 << 20
HOLD = "head -c 8388608 /dev/zero > /dev/shm/hold; echo held; sleep 86400"
UNIT = "cri-server.service"


def systemctl(*arguments: str) -> str:
    done = subprocess.run(["systemctl", *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def shown(unit: str, name: str) -> str:
    """Return a property of a unit."""
    return systemctl("show", "--value", f"--property={name}", unit)


def scope(container: str) -> str:
    return f"cri-server-{container}.scope"


def cgroup_of(pid: int) -> str:
    """Return the path of a process below the one hierarchy."""
    return Path(f"/proc/{pid}/cgroup").read_text().strip().removeprefix("0::")


def crash() -> None:
    systemctl("kill", "--kill-whom=main", "--signal=KILL", UNIT)


def end_and_start() -> None:
    systemctl("stop", UNIT)
    systemctl("start", UNIT)


def test_the_unit_is_up_and_serves(kubelet: Kubelet) -> None:
    assert systemctl("is-active", UNIT) == "active"
    assert systemctl("is-enabled", UNIT) == "enabled"
    assert kubelets.is_ready(kubelet.endpoint)


def test_the_driver_is_that_of_the_init(kubelet: Kubelet) -> None:
    answer = kubelet.runtime.RuntimeConfig(api.RuntimeConfigRequest())
    assert answer.linux.cgroup_driver == api.SYSTEMD


@pytest.mark.parametrize(
    "end",
    [lambda: systemctl("restart", UNIT), crash, end_and_start],
    ids=["restart", "kill", "stop"],
)
def test_pods_outlive_the_unit(
    kubelet: Kubelet, pod: Pod, pulled: str, end: Callable[[], None]
) -> None:
    container = kubelet.run(pod, pulled, ["sh", "-c", COUNT])
    before = kubelet.status(container)
    old = int(shown(UNIT, "MainPID"))
    init = faults.pid_of(kubelet, container)
    end()
    waiting.until(lambda: int(shown(UNIT, "MainPID")) not in (0, old), "a new server", seconds=30)
    waiting.until(lambda: kubelets.is_ready(kubelet.endpoint), "it serves", seconds=30)
    with Kubelet(kubelet.endpoint) as again:
        assert again.status(container) == before
        assert faults.pid_of(again, container) == init
        assert again.exec_sync(container, ["echo", "still"]).stdout == b"still\n"
        again.stop(container)
        texts = [line.text for line in again.log(container)]
    assert texts == [str(n) for n in range(len(texts))]


def test_a_reload_of_systemd_changes_nothing_for_a_container(kubelet: Kubelet, pod: Pod) -> None:
    config = kubelet.container_config("registry.test/test/busybox:latest", SLEEP)
    config.linux.resources.memory_limit_in_bytes = 64 * MIB
    container = kubelet.create(pod, config)
    kubelet.start(container)
    systemctl("daemon-reload")
    told = "echo > /dev/null && head -c1 /dev/zero | wc -c; cat /sys/fs/cgroup/memory.max"
    done = kubelet.exec_sync(container, ["sh", "-c", told])
    assert done.stdout.split() == [b"1", str(64 * MIB).encode()]


# -- what systemd knows of pods --------------------------------------------------------------------


def test_a_container_is_a_scope_in_the_slice_of_its_pod(
    kubelet: Kubelet, pod: Pod, container: str
) -> None:
    slice_ = Path(pod.config.linux.cgroup_parent).name
    assert shown(scope(container), "Slice") == slice_
    assert shown(scope(container), "ActiveState") == "active"
    inside = cgroup_of(faults.pid_of(kubelet, container))
    assert inside.startswith(f"{shown(slice_, 'ControlGroup')}/{scope(container)}")


def test_a_pod_without_a_parent_is_in_the_slice_of_the_system(
    kubelet: Kubelet, pulled: str
) -> None:
    config = kubelet.pod_config()
    config.linux.cgroup_parent = ""
    container = kubelet.run(kubelet.run_pod(config), pulled, SLEEP)
    assert shown(scope(container), "Slice") == "system.slice"


def test_shims_are_in_the_cgroup_of_the_unit_and_containers_are_not(
    kubelet: Kubelet, container: str
) -> None:
    of_unit = shown(UNIT, "ControlGroup")
    procs = Path(f"/sys/fs/cgroup{of_unit}/cgroup.procs").read_text().split()
    names = {faults.name_of(int(pid)) for pid in procs}
    assert any(re.match("cri-shim", name) for name in names), names
    assert not cgroup_of(faults.pid_of(kubelet, container)).startswith(of_unit)


def test_limits_are_those_of_the_scope_and_follow_an_update(
    kubelet: Kubelet, pod: Pod, pulled: str
) -> None:
    wanted = api.LinuxContainerResources(
        memory_limit_in_bytes=64 * MIB, cpu_quota=20000, cpu_period=100000
    )
    container = kubelet.run(pod, pulled, SLEEP, linux=api.LinuxContainerConfig(resources=wanted))
    unit = scope(container)
    assert shown(unit, "MemoryMax") == str(64 * MIB)
    assert shown(unit, "CPUQuotaPerSecUSec") == "200ms"
    change = api.LinuxContainerResources(memory_limit_in_bytes=96 * MIB)
    request = api.UpdateContainerResourcesRequest(container_id=container, linux=change)
    kubelet.runtime.UpdateContainerResources(request)
    systemctl("daemon-reload")
    directory = Path(f"/sys/fs/cgroup{shown(unit, 'ControlGroup')}")
    assert (directory / "memory.max").read_text().strip() == str(96 * MIB)
    assert (directory / "cpu.max").read_text().strip() == "20000 100000"


def test_scopes_and_slices_go_with_the_pod(kubelet: Kubelet, pulled: str) -> None:
    pod = kubelet.run_pod()
    container = kubelet.run(pod, pulled, SLEEP)
    slice_ = Path(pod.config.linux.cgroup_parent).name
    directory = Path(f"/sys/fs/cgroup{shown(slice_, 'ControlGroup')}")
    assert directory.is_dir()
    kubelet.remove_pod(pod.id)
    assert shown(scope(container), "ActiveState") == "inactive"
    assert shown(slice_, "ActiveState") == "inactive"
    assert not directory.exists()


def test_a_slice_of_the_kubelet_stays(kubelet: Kubelet, pulled: str) -> None:
    config = kubelet.pod_config()
    slice_ = Path(config.linux.cgroup_parent).name
    systemctl("start", slice_)
    pod = kubelet.run_pod(config)
    kubelet.run(pod, pulled, SLEEP)
    kubelet.remove_pod(pod.id)
    assert shown(slice_, "ActiveState") == "active"
    systemctl("stop", slice_)


# -- what the unit's files say ---------------------------------------------------------------------


def test_the_usage_of_a_container_is_read(kubelet: Kubelet, pod: Pod, pulled: str) -> None:
    container = kubelet.run(pod, pulled, ["sh", "-c", HOLD])
    kubelet.wait_log(container, "held")
    request = api.ContainerStatsRequest(container_id=container)
    stats = kubelet.runtime.ContainerStats(request).stats
    assert stats.cpu.usage_core_nano_seconds.value > 0
    assert stats.memory.working_set_bytes.value > 7 * MIB


def test_the_oom_score_can_be_lowered(kubelet: Kubelet, pod: Pod, pulled: str) -> None:
    resources = api.LinuxContainerResources(oom_score_adj=-997)
    linux = api.LinuxContainerConfig(resources=resources)
    container = kubelet.run(pod, pulled, SLEEP, linux=linux)
    pid = faults.pid_of(kubelet, container)
    assert Path(f"/proc/{pid}/oom_score_adj").read_text().strip() == "-997"


def test_the_server_may_have_as_many_files_as_the_unit_says() -> None:
    lines = Path(f"/proc/{shown(UNIT, 'MainPID')}/limits").read_text().splitlines()
    soft, hard = next(line.split()[3:5] for line in lines if line.startswith("Max open files"))
    assert soft == hard == shown(UNIT, "LimitNOFILE")


def test_the_status_tells_what_this_host_is(kubelet: Kubelet) -> None:
    answer = kubelet.runtime.Status(api.StatusRequest(verbose=True))
    assert "v2" in json.dumps(dict(answer.info))
