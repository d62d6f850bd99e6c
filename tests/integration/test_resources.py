# SPDX-License-Identifier: Apache-2.0
"""Limits of containers: as created, and as UpdateContainerResources changes them (CRI)."""

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import grpc
import pytest

from cri_server.pb import api_pb2 as api
from tests import probes
from tests.fakes.kubelet import Kubelet, Pod, refusal
from tests.integration.conftest import DRIVER, SLEEP
from tests.lab import cgroups, faults, server, waiting

pytestmark = pytest.mark.needs("root", "netns", "overlay", "cni", "runc", "docker-registry")
MIB = 1 << 20
# A file on a tmpfs is memory that cannot be reclaimed without swap.
HOLD = "head -c {size} /dev/zero > /dev/shm/hold; echo held; sleep 86400"

Clients = Callable[[server.Site], Kubelet]
Sites = Callable[..., server.Site]


def update(kubelet: Kubelet, container: str, **fields: Any) -> None:
    request = api.UpdateContainerResourcesRequest(
        container_id=container, linux=api.LinuxContainerResources(**fields)
    )
    kubelet.runtime.UpdateContainerResources(request)


def limited(**fields: Any) -> api.LinuxContainerConfig:
    return api.LinuxContainerConfig(resources=api.LinuxContainerResources(**fields))


def resources(kubelet: Kubelet, container: str) -> api.LinuxContainerResources:
    return kubelet.status(container).resources.linux


def spec_limits(kubelet: Kubelet, container: str) -> dict[str, Any]:
    """Return the limits in config.json, as the verbose status shows them."""
    info = json.loads(kubelet.status_response(container, verbose=True).info["info"])
    found: dict[str, Any] = info["runtimeSpec"]["linux"]["resources"]
    return {name: value for name, value in found.items() if name != "devices"}


def assert_limits(pod: Pod, container: str, expected: Mapping[str, str]) -> None:
    """Compare with what the kernel has; the names are those of v1, in every mode."""
    assert cgroups.limits(pod.config.linux.cgroup_parent, container, expected) == expected


@pytest.fixture(params=["runc", "crun"])
def handled(request: pytest.FixtureRequest, kubelet: Kubelet, pulled: str) -> Pod:
    """Return a pod of each OCI runtime in turn."""
    return kubelet.run_pod(handler=request.param)


# -- a running container ---------------------------------------------------------------------------

OTHER = str(max(os.sched_getaffinity(0)))  # the only one, on a small machine
CPUS = f"0-{OTHER}" if OTHER != "0" else "0"

# (what is asked for, the files that show it)
CHANGES: list[tuple[dict[str, Any], dict[str, str]]] = [
    ({"cpu_shares": 700}, {"cpu.shares": "700"}),
    (
        {"cpu_quota": 30000, "cpu_period": 50000},
        {"cpu.cfs_quota_us": "30000", "cpu.cfs_period_us": "50000"},
    ),
    ({"cpu_quota": 20000}, {"cpu.cfs_quota_us": "20000", "cpu.cfs_period_us": "100000"}),
    ({"cpu_quota": -1}, {"cpu.cfs_quota_us": "-1"}),
    ({"cpuset_cpus": "0", "cpuset_mems": "0"}, {"cpuset.cpus": "0", "cpuset.mems": "0"}),
    ({"memory_limit_in_bytes": 96 * MIB}, {"memory.limit_in_bytes": str(96 * MIB)}),
    ({"memory_limit_in_bytes": 32 * MIB}, {"memory.limit_in_bytes": str(32 * MIB)}),
    ({"memory_limit_in_bytes": -1}, {"memory.limit_in_bytes": str(2**63 - 4096)}),
]
STARTED = {
    "cpu_shares": 512,
    "cpu_quota": 40000,
    "cpu_period": 100000,
    "cpuset_cpus": CPUS,
    "memory_limit_in_bytes": 64 * MIB,
}
SHOWN = {
    "cpu.shares": "512",
    "cpu.cfs_quota_us": "40000",
    "cpu.cfs_period_us": "100000",
    "cpuset.cpus": CPUS,
    "memory.limit_in_bytes": str(64 * MIB),
}


@pytest.mark.parametrize(("asked", "shown"), CHANGES)
def test_an_update_changes_what_it_names_and_nothing_else(
    kubelet: Kubelet, handled: Pod, pulled: str, asked: dict[str, Any], shown: dict[str, str]
) -> None:
    container = kubelet.run(handled, pulled, SLEEP, linux=limited(**STARTED))
    update(kubelet, container, **asked)
    expected = {**SHOWN, **shown}
    assert_limits(handled, container, expected)
    assert resources(kubelet, container) == api.LinuxContainerResources(**{**STARTED, **asked})


def test_a_quota_of_minus_one_is_none_at_the_start_and_lifts_one_later(
    kubelet: Kubelet, handled: Pod, pulled: str
) -> None:
    unlimited = {"cpu.cfs_quota_us": "-1"}
    container = kubelet.run(handled, pulled, SLEEP, linux=limited(cpu_quota=-1))
    assert_limits(handled, container, unlimited)
    config = kubelet.container_config(pulled, SLEEP, name="updated", linux=limited(cpu_quota=20000))
    made = kubelet.create(handled, config)
    update(kubelet, made, cpu_quota=-1)
    kubelet.start(made)
    assert_limits(handled, made, unlimited)
    update(kubelet, made, cpu_quota=20000)
    update(kubelet, made, cpu_quota=-1)
    assert_limits(handled, made, unlimited)


def test_updates_of_one_field_each_add_up(kubelet: Kubelet, handled: Pod, pulled: str) -> None:
    container = kubelet.run(handled, pulled, SLEEP)
    for fields in (
        {"cpu_shares": 300},
        {"memory_limit_in_bytes": 64 * MIB},
        {"cpuset_cpus": OTHER},
    ):
        update(kubelet, container, **fields)
    shown = {"cpu.shares": "300", "cpuset.cpus": OTHER, "memory.limit_in_bytes": str(64 * MIB)}
    assert_limits(handled, container, shown)
    limits = spec_limits(kubelet, container)
    assert (limits["cpu"], limits["memory"]["limit"]) == ({"shares": 300, "cpus": OTHER}, 64 * MIB)


def test_the_swap_limit_follows_the_memory_limit(
    kubelet: Kubelet, handled: Pod, pulled: str
) -> None:
    container = kubelet.run(handled, pulled, SLEEP, linux=limited(memory_limit_in_bytes=32 * MIB))
    memsw = "memory.memsw.limit_in_bytes"
    assert_limits(handled, container, {memsw: str(32 * MIB)})
    for asked, memory, swap in (
        ({"memory_limit_in_bytes": 64 * MIB}, 64, 64),
        ({"memory_swap_limit_in_bytes": 80 * MIB}, 64, 80),
        ({"memory_limit_in_bytes": 48 * MIB}, 48, 80),
        ({"memory_limit_in_bytes": 96 * MIB}, 96, 96),
        ({"memory_limit_in_bytes": 48 * MIB}, 48, 48),
    ):
        update(kubelet, container, **asked)
        assert_limits(handled, container, {"memory.limit_in_bytes": str(memory * MIB)})
        assert_limits(handled, container, {memsw: str(swap * MIB)})


@pytest.mark.parametrize("handler", ["runc", "crun"])
def test_hugepage_limits_are_set_and_changed(
    make_site: Sites, client_of: Clients, reference: str, handler: str
) -> None:
    kubelet = client_of(make_site())
    kubelet.pull(reference)
    pod = kubelet.run_pod(handler=handler)
    pages = [api.HugepageLimit(page_size=s, limit=n) for s, n in (("2MB", 4 * MIB), ("1GB", 0))]
    container = kubelet.run(pod, reference, SLEEP, linux=limited(hugepage_limits=pages))
    file = "hugetlb.2MB.limit_in_bytes"
    assert_limits(pod, container, {file: str(4 * MIB)})
    assert_limits(pod, container, {"hugetlb.1GB.limit_in_bytes": "0"})
    pages[0].limit = 6 * MIB
    update(kubelet, container, hugepage_limits=pages[:1])
    assert_limits(pod, container, {file: str(6 * MIB)})
    update(kubelet, container, cpu_shares=300)
    assert_limits(pod, container, {file: str(6 * MIB)})
    found = {p.page_size: p.limit for p in resources(kubelet, container).hugepage_limits}
    assert found == {"2MB": 6 * MIB, "1GB": 0}


@pytest.mark.needs("cgroup-v1")
def test_unified_is_refused_where_there_is_no_cgroup_v2(
    kubelet: Kubelet, pod: Pod, container: str, pulled: str
) -> None:
    unified = {"memory.high": "1000000"}
    config = kubelet.container_config(pulled, SLEEP, name="two", linux=limited(unified=unified))
    for call in (
        lambda: update(kubelet, container, unified=unified),
        lambda: kubelet.create(pod, config),
    ):
        code, message = refusal(call)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert message == "unified: this host has no cgroup v2"


def test_the_oom_score_is_set_in_what_runs_but_not_where_it_has_set_its_own(
    kubelet: Kubelet, pod: Pod, pulled: str
) -> None:
    own = "sleep 86400 & echo 700 >/proc/$!/oom_score_adj; sleep 86400 & echo ready; wait"
    linux = limited(oom_score_adj=100)
    container = kubelet.run(pod, pulled, ["sh", "-c", own], linux=linux)
    kubelet.wait_log(container, "ready")
    update(kubelet, container, oom_score_adj=200)
    assert resources(kubelet, container).oom_score_adj == 200
    init = faults.pid_of(kubelet, container)
    pids = [init, *faults.children(init)]
    found = [Path(f"/proc/{pid}/oom_score_adj").read_text().strip() for pid in pids]
    assert sorted(found) == ["200", "200", "700"]


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"cpu_shares": -1},
        {"cpu_quota": 999},
        {"cpu_period": 1000001},
        {"cpuset_cpus": "x"},
        {"memory_limit_in_bytes": -2},
        {"memory_swap_limit_in_bytes": 4096},
        {"oom_score_adj": 1001},
    ],
)
def test_what_cannot_be_set_is_refused_by_name_and_changes_nothing(
    kubelet: Kubelet, container: str, fields: dict[str, Any]
) -> None:
    before = resources(kubelet, container)
    code, message = refusal(lambda: update(kubelet, container, **fields))
    assert (code, message.partition(":")[0]) == (grpc.StatusCode.INVALID_ARGUMENT, *fields)
    assert resources(kubelet, container) == before


def test_a_memory_limit_below_what_is_in_use_is_refused(
    kubelet: Kubelet, handled: Pod, pulled: str
) -> None:
    script = HOLD.format(size=24 * MIB)
    linux = limited(memory_limit_in_bytes=64 * MIB)
    container = kubelet.run(handled, pulled, ["sh", "-c", script], linux=linux)
    kubelet.wait_log(container, "held")
    code, message = refusal(lambda: update(kubelet, container, memory_limit_in_bytes=16 * MIB))
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert message.startswith("memory_limit_in_bytes: 16777216 is less than the ")
    assert resources(kubelet, container).memory_limit_in_bytes == 64 * MIB
    assert kubelet.status(container).state == api.CONTAINER_RUNNING
    update(kubelet, container, memory_limit_in_bytes=48 * MIB)


def test_what_the_kernel_refuses_leaves_the_old_limits(
    kubelet: Kubelet, handled: Pod, pulled: str
) -> None:
    container = kubelet.run(handled, pulled, SLEEP, linux=limited(cpu_shares=512))
    code, message = refusal(
        lambda: update(
            kubelet, container, cpuset_cpus="4000", cpu_shares=300, memory_limit_in_bytes=64 * MIB
        )
    )
    assert (code, "cpuset.cpus" in message) == (grpc.StatusCode.UNKNOWN, True), message
    assert_limits(handled, container, {"cpu.shares": "512"})
    assert_limits(handled, container, {"memory.limit_in_bytes": str(2**63 - 4096)})
    assert resources(kubelet, container) == api.LinuxContainerResources(cpu_shares=512)


def test_an_update_of_what_is_not_there(kubelet: Kubelet) -> None:
    code, _ = refusal(lambda: update(kubelet, "f" * 64, cpu_shares=100))
    assert code is grpc.StatusCode.NOT_FOUND


def test_an_update_of_what_has_ended(kubelet: Kubelet, pod: Pod, pulled: str) -> None:
    container = kubelet.run(pod, pulled, ["true"])
    kubelet.wait_exit(container)
    code, _ = refusal(lambda: update(kubelet, container, cpu_shares=100))
    assert code is grpc.StatusCode.FAILED_PRECONDITION


# -- before the start, and across a restart --------------------------------------------------------


def test_an_update_before_the_start_holds_from_the_start(
    kubelet: Kubelet, handled: Pod, pulled: str
) -> None:
    linux = limited(cpu_shares=512, oom_score_adj=50)
    container = kubelet.create(handled, kubelet.container_config(pulled, SLEEP, linux=linux))
    update(kubelet, container, memory_limit_in_bytes=64 * MIB, oom_score_adj=70)
    kubelet.start(container)
    assert_limits(handled, container, {"cpu.shares": "512"})
    assert_limits(handled, container, {"memory.limit_in_bytes": str(64 * MIB)})
    assert kubelet.exec_sync(container, ["cat", "/proc/1/oom_score_adj"]).stdout == b"70\n"
    assert resources(kubelet, container).memory_limit_in_bytes == 64 * MIB


def test_a_restart_of_the_server_forgets_no_update(
    make_site: Sites, client_of: Clients, reference: str
) -> None:
    site = make_site()
    kubelet = client_of(site)
    kubelet.pull(reference)
    pod = kubelet.run_pod()
    container = kubelet.run(pod, reference, SLEEP, linux=limited(cpu_shares=512))
    update(kubelet, container, cpu_quota=20000, cpu_period=100000)
    overhead = api.LinuxContainerResources(memory_limit_in_bytes=5 * MIB)
    kubelet.runtime.UpdatePodSandboxResources(
        api.UpdatePodSandboxResourcesRequest(pod_sandbox_id=pod.id, overhead=overhead)
    )
    site.kill()
    site.start()
    kubelet = client_of(site)
    expected = api.LinuxContainerResources(cpu_shares=512, cpu_quota=20000, cpu_period=100000)
    assert resources(kubelet, container) == expected
    info = json.loads(kubelet.pod_status(pod.id, verbose=True).info["info"])
    assert info["overhead"] == {"memory_limit_in_bytes": str(5 * MIB)}
    update(kubelet, container, cpuset_cpus="0")
    cpu = {"shares": 512, "quota": 20000, "period": 100000, "cpus": "0"}
    assert spec_limits(kubelet, container) == {"cpu": cpu}


def test_a_crash_after_the_kernel_and_before_the_record_is_made_good_by_the_repeat(
    make_site: Sites, client_of: Clients, reference: str, tmp_path: Path
) -> None:
    victim, script = tmp_path / "pid", tmp_path / "runc"
    script.write_text(
        '#!/bin/sh\nrunc "$@" || exit\n'
        f'case "$*" in *" update "*) if test -e {victim}; then kill -9 $(cat {victim}); fi;; esac\n'
    )
    script.chmod(0o755)
    site = make_site(**{"runtimes.runc": {"path": os.fspath(script)}})
    kubelet = client_of(site)
    kubelet.pull(reference)
    pod = kubelet.run_pod()
    container = kubelet.run(pod, reference, SLEEP, linux=limited(cpu_shares=512))
    victim.write_text(str(site.pid))
    with pytest.raises(grpc.RpcError):
        update(kubelet, container, cpu_shares=300)
    site.wait_death()
    victim.unlink()
    site.start()
    kubelet = client_of(site)
    assert_limits(pod, container, {"cpu.shares": "300"})
    assert resources(kubelet, container).cpu_shares == 512
    update(kubelet, container, cpu_shares=300)
    assert resources(kubelet, container).cpu_shares == 300
    assert spec_limits(kubelet, container) == {"cpu": {"shares": 300}}


# -- what it costs, and races ----------------------------------------------------------------------


@pytest.fixture
def counted(
    make_site: Sites, client_of: Clients, reference: str, tmp_path: Path
) -> tuple[Kubelet, Callable[[], list[str]]]:
    """Return a client of a server whose OCI runtime writes down how it is called, and a reader of
    that.
    """
    calls = tmp_path / "calls"
    script = tmp_path / "runc"
    script.write_text(f'#!/bin/sh\necho "$*" >> {calls}\nexec runc "$@"\n')
    script.chmod(0o755)
    site = make_site(**{"runtimes.runc": {"path": os.fspath(script)}})
    kubelet = client_of(site)
    kubelet.pull(reference)
    return kubelet, lambda: calls.read_text().splitlines()


def test_an_update_that_changes_nothing_runs_nothing(
    counted: tuple[Kubelet, Callable[[], list[str]]], reference: str
) -> None:
    kubelet, calls = counted
    linux = limited(cpu_shares=512, cpuset_cpus=CPUS, memory_limit_in_bytes=64 * MIB)
    container = kubelet.run(kubelet.run_pod(), reference, SLEEP, linux=linux)
    before = len(calls())
    for fields in ({}, {"cpu_shares": 512}, {"cpuset_cpus": CPUS}, {"oom_score_adj": 9}):
        update(kubelet, container, **fields)
    assert calls()[before:] == []
    update(kubelet, container, cpu_shares=600)
    assert ["update" in call.split() for call in calls()[before:]] == [True]


def test_updates_and_a_stop_at_the_same_time_end_well(
    kubelet: Kubelet, pod: Pod, pulled: str
) -> None:
    container = kubelet.run(pod, pulled, SLEEP)
    requests = [
        api.UpdateContainerResourcesRequest(
            container_id=container, linux=api.LinuxContainerResources(cpu_shares=100 + n)
        )
        for n in range(8)
    ]
    pending = [kubelet.runtime.UpdateContainerResources.future(r) for r in requests]
    kubelet.stop(container)
    for call in pending:
        with contextlib.suppress(grpc.RpcError):
            call.result(timeout=waiting.patient(30))
    allowed = {grpc.StatusCode.OK, grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.UNKNOWN}
    assert {call.code() for call in pending} <= allowed
    status = kubelet.status(container)
    assert (status.state, status.exit_code) == (api.CONTAINER_EXITED, 137)
    assert status.finished_at > 0


# -- pods ------------------------------------------------------------------------------------------


def pod_info(kubelet: Kubelet, pod: Pod) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(kubelet.pod_status(pod.id, verbose=True).info["info"])
    return found


def test_the_pods_overhead_and_resources_are_remembered(kubelet: Kubelet, pulled: str) -> None:
    config = kubelet.pod_config()
    config.linux.overhead.memory_limit_in_bytes = 4 * MIB
    config.linux.resources.cpu_shares = 100
    pod = kubelet.run_pod(config)
    info = pod_info(kubelet, pod)
    assert info["overhead"] == {"memory_limit_in_bytes": str(4 * MIB)}
    assert info["resources"] == {"cpu_shares": "100"}
    request = api.UpdatePodSandboxResourcesRequest(
        pod_sandbox_id=pod.id, resources=api.LinuxContainerResources(cpu_shares=200)
    )
    kubelet.runtime.UpdatePodSandboxResources(request)
    info = pod_info(kubelet, pod)
    assert info["overhead"] == {"memory_limit_in_bytes": str(4 * MIB)}
    assert info["resources"] == {"cpu_shares": "200"}
    kubelet.stop_pod(pod.id)
    request.resources.cpu_shares = 300
    kubelet.runtime.UpdatePodSandboxResources(request)  # the record is all that it changes
    assert pod_info(kubelet, pod)["resources"] == {"cpu_shares": "300"}


def test_an_update_of_a_pod_is_checked(kubelet: Kubelet, pod: Pod) -> None:
    request = api.UpdatePodSandboxResourcesRequest(pod_sandbox_id="e" * 64)
    code, _ = refusal(lambda: kubelet.runtime.UpdatePodSandboxResources(request))
    assert code is grpc.StatusCode.NOT_FOUND
    request = api.UpdatePodSandboxResourcesRequest(
        pod_sandbox_id=pod.id, overhead=api.LinuxContainerResources(cpu_quota=5)
    )
    code, message = refusal(lambda: kubelet.runtime.UpdatePodSandboxResources(request))
    assert (code, message) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "overhead.cpu_quota: 5 is less than 1000",
    )


# -- processes and shm -----------------------------------------------------------------------------

ULIMITS = ["sh", "-c", "ulimit -Sn; ulimit -Hn; ulimit -c; df -k /dev/shm | tail -1; sleep 86400"]


@pytest.fixture(scope="module")
def generous() -> dict[str, dict[str, Any]]:
    """Return a configuration whose handlers let our annotations through."""
    options = {
        "default_rlimits": "nofile=100:200,core=0",
        "default_shm_size": "8Mi",
        "pod_annotations": ["cri-server.io/*"],
    }
    return {
        "runtimes.runc": {"path": "runc", **options},
        "runtimes.crun": {"path": "crun", **options},
    }


@pytest.mark.parametrize("handler", ["runc", "crun"])
def test_limits_of_processes_and_the_size_of_shm(
    make_site: Sites,
    client_of: Clients,
    reference: str,
    generous: dict[str, dict[str, Any]],
    handler: str,
) -> None:
    kubelet = client_of(make_site(**generous))
    kubelet.pull(reference)
    annotations = {
        "cri-server.io/rlimits": "nofile=64:128",
        "cri-server.io/rlimits.second": "core=unlimited",
        "cri-server.io/shm-size": "16Mi",
    }
    pods = [kubelet.pod_config(), kubelet.pod_config(annotations=annotations)]
    plain, asking = (kubelet.run_pod(config, handler=handler) for config in pods)
    found = []
    for pod, name in ((plain, "main"), (asking, "main"), (asking, "second")):
        container = kubelet.run(pod, reference, ULIMITS, name=name)
        lines = [line.text for line in kubelet.wait_log(container, "/dev/shm")]
        found.append((*lines[:3], lines[3].split()[1]))
    assert found == [
        ("100", "200", "0", "8192"),
        ("64", "128", "0", "16384"),
        ("64", "128", "unlimited", "16384"),
    ]


def test_an_annotation_of_ours_that_is_not_let_through_is_refused(kubelet: Kubelet) -> None:
    config = kubelet.pod_config(annotations={"cri-server.io/shm-size": "1Gi"})
    code, message = refusal(lambda: kubelet.run_pod(config))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert message.startswith("annotations[cri-server.io/shm-size]: the handler's pod_annotations")


@pytest.mark.ours
def test_an_oom_score_that_the_host_does_not_allow_is_raised_and_told(
    make_site: Sites, client_of: Clients, reference: str
) -> None:
    allowed = not probes.missing("sys_resource")
    site = make_site(server={"log_level": "debug"})
    kubelet = client_of(site)
    kubelet.pull(reference)
    container = kubelet.run(kubelet.run_pod(), reference, SLEEP, linux=limited(oom_score_adj=-998))
    found = int(kubelet.exec_sync(container, ["cat", "/proc/1/oom_score_adj"]).stdout)
    assert found == (-998 if allowed else int(Path("/proc/self/oom_score_adj").read_text()))
    told = [line for line in site.log.read_text().splitlines() if "the host allows less" in line]
    mine = [line for line in told if container in line and "-998" in line]
    assert len(mine) == (0 if allowed else 1)
    assert resources(kubelet, container).oom_score_adj == -998


# -- parents ---------------------------------------------------------------------------------------


def test_parents_that_are_missing_are_made_and_go_with_the_pod(
    kubelet: Kubelet, cgroup_parent: str, pulled: str
) -> None:
    keeper = kubelet.run(kubelet.run_pod(), pulled, SLEEP)  # keeps the run's own parent
    made = [f"{cgroup_parent}/deep", f"{cgroup_parent}/deep/deeper"]
    if DRIVER == "systemd":  # a slice's name holds those of all above
        unit = cgroup_parent.strip("/").removesuffix(".slice")
        made = [f"{cgroup_parent}/{unit}-deep.slice"]
        made += [f"{made[0]}/{unit}-deep-deeper.slice"]
    config = kubelet.pod_config()
    config.linux.cgroup_parent = made[1]
    pod = kubelet.run_pod(config)
    container = kubelet.run(pod, pulled, SLEEP)
    assert cgroups.place(made[1], container, "memory").is_dir()
    kubelet.remove_pod(pod.id)
    left = [h for h in cgroups.hierarchies() for p in made if (h / p.strip("/")).exists()]
    assert left == []
    assert kubelet.status(keeper).state == api.CONTAINER_RUNNING


def test_a_container_whose_bundle_is_damaged_keeps_its_limits(
    make_site: Sites, client_of: Clients, reference: str
) -> None:
    site = make_site()
    kubelet = client_of(site)
    kubelet.pull(reference)
    pod = kubelet.run_pod()
    container = kubelet.run(pod, reference, SLEEP, linux=limited(cpu_shares=512))
    document = site.state / "containers" / container / "config.json"
    document.write_text("{")
    assert '"pid"' in kubelet.status_response(container, verbose=True).info["info"]
    code, message = refusal(lambda: update(kubelet, container, cpu_shares=300))
    assert (code, "damaged" in message) == (grpc.StatusCode.FAILED_PRECONDITION, True)
    assert_limits(pod, container, {"cpu.shares": "512"})


@pytest.mark.needs("cgroup-v2")
def test_a_privileged_container_leaves_the_options_of_the_hosts_cgroups_alone(
    kubelet: Kubelet, pulled: str
) -> None:
    def options() -> str:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        return next(line for line in lines if " /sys/fs/cgroup " in line).split(" - ")[1]

    before = options()
    config = kubelet.pod_config()
    config.linux.security_context.privileged = True
    for handler in ("runc", "crun"):
        pod = kubelet.run_pod(config, handler=handler)
        linux = api.LinuxContainerConfig()
        linux.security_context.privileged = True
        container = kubelet.run(pod, pulled, SLEEP, linux=linux)
        done = kubelet.exec_sync(container, ["cat", "/sys/fs/cgroup/cgroup.controllers"])
        assert b"memory" in done.stdout
        assert options() == before
        kubelet.remove_pod(pod.id)
