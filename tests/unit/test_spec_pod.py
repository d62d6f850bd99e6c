# SPDX-License-Identifier: Apache-2.0
"""What a sandbox's config asks for: checks, sysctls, namespaces, its own container's spec."""

import dataclasses
import itertools
import types
from collections.abc import Mapping
from typing import Any

import pytest

from cri_server import errors, spec
from cri_server.pb import api_pb2 as api
from tests.lab import wishes

Mode = api.NamespaceMode
Context = api.LinuxSandboxSecurityContext
Profile = api.SecurityProfile
NO_FILES = spec.PodFiles()
OF_POD = spec.PodFiles(resolv_conf="/p/resolv.conf", hostname="/p/name", hosts="/p/h", shm="/p/shm")
NET_DEFAULTS = {
    "net.ipv4.ip_unprivileged_port_start": "0",
    "net.ipv4.ping_group_range": "0 2147483647",
}


def metadata(**fields: Any) -> api.PodSandboxMetadata:
    return api.PodSandboxMetadata(**({"name": "n", "uid": "u", "namespace": "s"} | fields))


def test_an_ordinary_sandbox_is_accepted() -> None:
    config = wishes.pod(
        hostname="pod-1_a.example",
        log_directory="/var/log/pods/x",
        dns_config=api.DNSConfig(servers=["10.0.0.10"], searches=["a.b"], options=["ndots:5"]),
        port_mappings=[api.PortMapping(container_port=80, host_port=8080, host_ip="::1")],
        cgroup_parent="/kubepods/burstable/pod1",
        sysctls={"net.core.somaxconn": "1024"},
        options={"userns_options": api.UserNamespace(mode=Mode.NODE)},
        security=Context(
            run_as_user=api.Int64Value(value=1000),
            run_as_group=api.Int64Value(value=1000),
            seccomp=Profile(profile_type=Profile.RuntimeDefault),
        ),
    )
    spec.validate_sandbox(config, wishes.FACTS)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (api.PodSandboxConfig(), "metadata"),
        (wishes.pod(metadata=metadata(name="")), r"metadata\.name"),
        (wishes.pod(metadata=metadata(name="a;K8S_POD_NAMESPACE=b")), r"metadata\.name"),
        (wishes.pod(metadata=metadata(namespace="../x")), r"metadata\.namespace"),
        (wishes.pod(metadata=metadata(uid="a\nb")), r"metadata\.uid"),
        (wishes.pod(windows=api.WindowsPodSandboxConfig()), "windows"),
        (wishes.pod(metadata=metadata(name="n" * 1025)), "metadata.name"),
        (wishes.pod(cgroup_parent="/a" * 2048), "cgroup_parent"),
        (wishes.pod(cgroup_parent="/" + "a" * 256), "cgroup_parent"),
        (wishes.pod(hostname="a\nb"), "hostname"),
        (wishes.pod(hostname="a b"), "hostname"),
        (wishes.pod(hostname="a" * 65), "hostname"),
        (wishes.pod(log_directory="relative"), "log_directory"),
        (wishes.pod(log_directory="/a\nb"), "log_directory"),
        (wishes.pod(dns_config=api.DNSConfig(servers=["1.1.1.1\nx"])), "dns_config"),
        (wishes.pod(dns_config=api.DNSConfig(options=["a\0"])), "dns_config"),
        (wishes.pod(port_mappings=[api.PortMapping(container_port=0)]), "port_mappings"),
        (wishes.pod(port_mappings=[api.PortMapping(container_port=65536)]), "port_mappings"),
        (
            wishes.pod(port_mappings=[api.PortMapping(container_port=1, host_port=65536)]),
            "port_mappings",
        ),
        (
            wishes.pod(port_mappings=[api.PortMapping(container_port=1, host_ip="x")]),
            "host_ip",
        ),
        (
            wishes.pod(port_mappings=[{"container_port": 1, "protocol": 9}]),
            "protocol",
        ),
        (wishes.pod(cgroup_parent="/a/../b"), "cgroup_parent"),
        (wishes.pod(cgroup_parent="/a\nb"), "cgroup_parent"),
        (wishes.pod(options={"network": Mode.CONTAINER}), "network"),
        (wishes.pod(options={"network": Mode.TARGET}), "network"),
        (wishes.pod(options={"ipc": Mode.CONTAINER}), "ipc"),
        (wishes.pod(options={"pid": Mode.TARGET}), "pid"),
        (wishes.pod(options={"target_id": "f" * 64}), "target_id"),
        (wishes.pod(options={"pid": 9}), "pid: 9"),
        (wishes.pod(security=Context(run_as_group=api.Int64Value(value=1))), "run_as_group"),
        (wishes.pod(security=Context(run_as_user=api.Int64Value(value=-1))), "run_as_user"),
        (wishes.pod(security=Context(supplemental_groups=[2**32])), "supplemental_groups"),
        (
            wishes.pod(security=Context(supplemental_groups_policy=9)),  # type: ignore[arg-type]
            "supplemental_groups_policy",
        ),
        (wishes.pod(security=Context(seccomp=Profile(profile_type=2))), "seccomp"),  # type: ignore[arg-type]
        (wishes.pod(security=Context(apparmor=Profile(profile_type=2))), "apparmor"),  # type: ignore[arg-type]
        (wishes.pod(security=Context(seccomp_profile_path="localhost/")), "seccomp"),
    ],
    ids=itertools.count(),
)
def test_a_sandbox_that_cannot_be_is_refused(config: api.PodSandboxConfig, message: str) -> None:
    with pytest.raises(errors.InvalidArgument, match=message):
        spec.validate_sandbox(config, wishes.FACTS)


@pytest.mark.parametrize(
    ("mode", "mapped"),
    [
        (Mode.NODE, True),
        (Mode.POD, True),
        (Mode.POD, False),
        (Mode.CONTAINER, True),
        (Mode.TARGET, False),
    ],
)
def test_user_namespaces_are_refused_by_name(mode: Mode.ValueType, mapped: bool) -> None:
    ids = [api.IDMapping(host_id=1000, length=65536)] if mapped else []
    options = {"userns_options": api.UserNamespace(mode=mode, uids=ids)}
    with pytest.raises(errors.InvalidArgument, match="userns_options"):
        spec.validate_sandbox(wishes.pod(options=options), wishes.FACTS)
    wish = wishes.container(
        security=wishes.security(namespace_options=api.NamespaceOption(**options))  # type: ignore[arg-type]
    )
    with pytest.raises(errors.InvalidArgument, match="userns_options"):
        wishes.validate(wish)


@pytest.mark.parametrize(
    ("sysctls", "expected"),
    [
        ({}, NET_DEFAULTS),
        ({"kernel.shm_rmid_forced": "1"}, NET_DEFAULTS | {"kernel.shm_rmid_forced": "1"}),
        ({"kernel.msgmax": "1"}, NET_DEFAULTS | {"kernel.msgmax": "1"}),
        ({"kernel.sem": "250\t32000 32 128"}, NET_DEFAULTS | {"kernel.sem": "250 32000 32 128"}),
        ({"fs.mqueue.msg_max": "100"}, NET_DEFAULTS | {"fs.mqueue.msg_max": "100"}),
        (
            {"net/ipv4/ip_unprivileged_port_start": "1024"},
            NET_DEFAULTS | {"net.ipv4.ip_unprivileged_port_start": "1024"},
        ),
        (
            {"net/ipv4/conf/eth0.100/rp_filter": "0"},
            NET_DEFAULTS | {"net.ipv4.conf.eth0/100.rp_filter": "0"},
        ),
        (
            {"net.ipv4.conf.eth0/100.rp_filter": "0"},
            NET_DEFAULTS | {"net.ipv4.conf.eth0/100.rp_filter": "0"},
        ),
    ],
)
def test_sysctls_are_those_of_the_pods_own_namespaces(
    sysctls: dict[str, str], expected: dict[str, str]
) -> None:
    assert spec.sysctls(wishes.pod(sysctls=sysctls)) == expected


@pytest.mark.parametrize(
    ("name", "value", "options"),
    [
        ("kernel.core_pattern", "|/x", {}),
        ("kernel/core_pattern", "|/x", {}),
        ("kernel.panic", "1", {}),
        ("vm.swappiness", "1", {}),
        ("fs.file-max", "1", {}),
        ("kernel.semaphore", "1", {}),
        ("kernel.shmmax/../core_pattern", "1", {}),
        ("net.ipv4.../kernel.x", "1", {}),
        ("net/../kernel/core_pattern", "1", {}),
        ("net..ipv4", "1", {}),
        ("net./ipv4", "1", {}),
        ("net", "1", {}),
        ("", "1", {}),
        ("net.core.somaxconn\n", "1", {}),
        ("net.core.somaxconn", "1\nx", {}),
        ("net.core.somaxconn", "1\0", {}),
        ("net.core.somaxconn", "1", {"network": Mode.NODE}),
        ("kernel.shmmax", "1", {"ipc": Mode.NODE}),
        ("fs.mqueue.msg_max", "1", {"ipc": Mode.NODE}),
    ],
)
def test_sysctls_that_reach_beyond_the_pod_are_refused(
    name: str, value: str, options: dict[str, object]
) -> None:
    config = wishes.pod(sysctls={name: value}, options=options)
    with pytest.raises(errors.InvalidArgument, match="sysctls"):
        spec.validate_sandbox(config, wishes.FACTS)


@pytest.mark.parametrize("name", ["net/core/somaxconn", "kernel.shm_rmid_forced"])
def test_a_sysctl_that_gvisors_kernel_would_not_hear_of_is_refused_by_name(name: str) -> None:
    with pytest.raises(errors.InvalidArgument, match=f"sysctls: '{name}': gVisor"):
        spec.check_sentry_sysctls(wishes.pod(sysctls={name: "1"}), host_stack=False)


def test_gvisor_on_the_hosts_network_stack_has_the_sysctls_of_the_network() -> None:
    spec.check_sentry_sysctls(wishes.pod(sysctls={"net/core/somaxconn": "1"}), host_stack=True)
    with pytest.raises(errors.InvalidArgument, match=r"kernel\.sem"):
        spec.check_sentry_sysctls(wishes.pod(sysctls={"kernel.sem": "1 1"}), host_stack=True)


def test_a_gvisor_pod_without_sysctls_of_its_own_is_not_refused_for_our_defaults() -> None:
    spec.check_sentry_sysctls(wishes.pod(), host_stack=False)


def test_a_pod_in_the_hosts_network_gets_no_network_sysctls() -> None:
    assert spec.sysctls(wishes.pod(options={"network": Mode.NODE})) == {}


@pytest.mark.parametrize(
    ("pod", "container", "expected"),
    [
        (Mode.POD, Mode.POD, "pod"),
        (Mode.POD, Mode.CONTAINER, "own"),
        (Mode.CONTAINER, Mode.CONTAINER, "own"),
        (Mode.CONTAINER, Mode.POD, "own"),
        (Mode.NODE, Mode.NODE, "host"),
        (Mode.NODE, Mode.POD, "host"),
        (Mode.NODE, Mode.CONTAINER, "own"),
        (Mode.POD, Mode.TARGET, "target"),
        (Mode.CONTAINER, Mode.TARGET, "target"),
    ],
)
def test_the_pid_namespace_follows_the_pod_unless_the_container_wants_its_own(
    pod: Mode.ValueType, container: Mode.ValueType, expected: str
) -> None:
    target = "c0" if container == Mode.TARGET else ""
    options = api.NamespaceOption(pid=container, target_id=target)
    wish = wishes.container(security=wishes.security(namespace_options=options))
    config = wishes.pod(options={"pid": pod})
    wishes.validate(wish, sandbox=config)
    assert spec.pid_mode(wish, config) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pid": Mode.NODE}, "pid"),
        ({"pid": Mode.TARGET}, "target_id"),
        ({"pid": Mode.POD, "target_id": "c0"}, "target_id"),
        ({"network": Mode.NODE}, "network"),
        ({"network": Mode.CONTAINER}, "network"),
        ({"ipc": Mode.NODE}, "ipc"),
        ({"ipc": Mode.TARGET}, "ipc"),
    ],
)
def test_namespaces_that_the_pod_does_not_give_are_refused(
    options: dict[str, Any], message: str
) -> None:
    context = wishes.security(namespace_options=api.NamespaceOption(**options))
    with pytest.raises(errors.InvalidArgument, match=message):
        wishes.validate(wishes.container(security=context))


def test_a_container_of_a_pod_on_the_host_may_say_so_or_say_nothing() -> None:
    config = wishes.pod(options={"network": Mode.NODE, "ipc": Mode.NODE, "pid": Mode.NODE})
    for mode in (Mode.NODE, Mode.POD):
        options = api.NamespaceOption(network=mode, ipc=mode, pid=mode)
        wish = wishes.container(security=wishes.security(namespace_options=options))
        wishes.validate(wish, sandbox=config)


def sandbox(
    config: api.PodSandboxConfig,
    *,
    seccomp_file: dict[str, object] | None = None,
    init: str = "/usr/bin/catatonit",
    annotations: Mapping[str, str] = types.MappingProxyType({}),
    limits_pod: bool = False,
    machine: bool = False,
    pod_files: spec.PodFiles = NO_FILES,
    **host: Any,
) -> spec.oci.Spec:
    return spec.sandbox(
        spec.SandboxInput(
            id="p1",
            config=config,
            rootfs="/root",
            init=init,
            annotations=annotations,
            limits_pod=limits_pod,
            machine=machine,
            pod_files=pod_files,
            namespaces={"network": "/netns", "pid": "/not-this-one"},
            cgroups_path="/kubepods/p1",
            host=dataclasses.replace(wishes.FACTS, **host),
            seccomp_profile=seccomp_file,
        )
    )


def test_the_pods_init_can_do_nothing_but_reap() -> None:
    document = sandbox(wishes.pod())
    process, linux = document["process"], document["linux"]
    assert process["args"] == ["/catatonit", "-P"]
    assert process["noNewPrivileges"] is True
    assert not any(process["capabilities"].values())
    assert (process["user"]["uid"], process["oomScoreAdj"]) == (65534, -998)
    assert document["root"]["readonly"] is True
    assert linux["namespaces"] == [
        {"type": "mount"},
        {"type": "pid"},
        {"type": "network", "path": "/netns"},
    ]
    assert linux["resources"]["devices"] == [{"allow": False, "access": "rwm"}]
    assert document["mounts"][-1]["source"] == "/usr/bin/catatonit"
    assert document["annotations"]["io.kubernetes.cri.container-type"] == "sandbox"


def test_the_pods_init_runs_as_the_sandbox_asks() -> None:
    context = Context(
        run_as_user=api.Int64Value(value=1000),
        run_as_group=api.Int64Value(value=2000),
        supplemental_groups=[3000],
    )
    process = sandbox(wishes.pod(security=context), oom_score_adj_floor=0)["process"]
    assert process["user"] == {"uid": 1000, "gid": 2000, "umask": 0o022, "additionalGids": [3000]}
    assert process["oomScoreAdj"] == 0


@pytest.mark.parametrize("policy", [api.Merge, api.Strict])
def test_the_pods_init_has_the_groups_of_the_request_under_both_policies(
    policy: api.SupplementalGroupsPolicy.ValueType,
) -> None:
    """Its root has no /etc/group that could add any."""
    context = Context(supplemental_groups=[3000], supplemental_groups_policy=policy)
    process = sandbox(wishes.pod(security=context))["process"]
    assert process["user"]["additionalGids"] == [3000]


@pytest.mark.parametrize(
    ("context", "expected"),
    [
        (Context(), None),
        (Context(seccomp=Profile(profile_type=Profile.Unconfined)), None),
        (Context(seccomp=Profile(profile_type=Profile.RuntimeDefault)), "SCMP_ACT_ERRNO"),
        (Context(seccomp_profile_path="runtime/default"), "SCMP_ACT_ERRNO"),
        (
            Context(seccomp=Profile(profile_type=Profile.Localhost, localhost_ref="/p.json")),
            "SCMP_ACT_LOG",
        ),
        (Context(seccomp_profile_path="localhost//p.json"), "SCMP_ACT_LOG"),
        (
            Context(seccomp=Profile(profile_type=Profile.RuntimeDefault), privileged=True),
            None,
        ),
    ],
    ids=itertools.count(),
)
def test_the_pods_init_has_the_seccomp_profile_of_the_sandbox(
    context: Context, expected: str | None
) -> None:
    file: dict[str, object] = {"defaultAction": "SCMP_ACT_LOG"}
    linux = sandbox(wishes.pod(security=context), seccomp_file=file)["linux"]
    assert linux.get("seccomp", {}).get("defaultAction") == expected


@pytest.mark.parametrize(
    ("profile", "expected"),
    [
        (None, None),
        (Profile(profile_type=Profile.Unconfined), None),
        (Profile(profile_type=Profile.RuntimeDefault), "ours"),
        (Profile(profile_type=Profile.Localhost, localhost_ref="localhost/theirs"), "theirs"),
    ],
    ids=itertools.count(),
)
def test_the_pods_init_has_the_apparmor_profile_of_the_sandbox(
    profile: api.SecurityProfile | None, expected: str | None
) -> None:
    document = sandbox(
        wishes.pod(security=Context(apparmor=profile)), apparmor=True, apparmor_default="ours"
    )
    assert document["process"].get("apparmorProfile") == expected


def test_the_annotations_of_the_pods_init_tell_what_to_size_a_machine_by() -> None:
    config = wishes.pod(log_directory="/var/log/pods/x")
    config.linux.resources.cpu_shares = 512
    config.linux.resources.memory_limit_in_bytes = 1 << 20
    prefix = "io.kubernetes.cri.sandbox-"
    found = sandbox(config)["annotations"]
    sizing = ("cpu-shares", "memory", "log-directory")
    assert [found[prefix + n] for n in sizing] == ["512", str(1 << 20), "/var/log/pods/x"]
    assert f"{prefix}cpu-quota" not in found


# What a VM is made from: kata reads the sandbox's config.json, and shares what is mounted.


def sized() -> api.PodSandboxConfig:
    """Return a pod with resources, and overhead beside them."""
    config = wishes.pod()
    config.linux.resources.CopyFrom(
        api.LinuxContainerResources(
            cpu_period=100_000, cpu_quota=200_000, cpu_shares=2048, memory_limit_in_bytes=1 << 30
        )
    )
    config.linux.overhead.CopyFrom(
        api.LinuxContainerResources(
            cpu_period=100_000, cpu_quota=25_000, memory_limit_in_bytes=160 << 20
        )
    )
    return config


def test_a_virtual_machine_is_told_its_size_once() -> None:
    """kata adds the limits of this container to those of the others."""
    document = sandbox(sized(), init="")
    prefix = "io.kubernetes.cri.sandbox-"
    sizing = ("cpu-period", "cpu-quota", "cpu-shares", "memory")
    told = [document["annotations"][prefix + name] for name in sizing]
    assert told == ["100000", "200000", "2048", str(1 << 30)]
    assert document["linux"]["resources"] == {
        "cpu": {"shares": 2},
        "devices": [{"allow": False, "access": "rwm"}],
    }


def test_a_kernel_whose_limits_are_the_pods_has_what_the_pod_needs_beside_them_too() -> None:
    limits = sandbox(sized(), limits_pod=True)["linux"]["resources"]
    assert limits["memory"]["limit"] == (1 << 30) + (160 << 20)
    assert limits["cpu"]["quota"] == 225_000


@pytest.mark.parametrize(
    ("resources", "overhead", "cpu", "memory"),
    [
        ({"cpu_quota": 50000}, {"cpu_quota": 10000}, (60000, 100000), None),
        ({"cpu_quota": 50000}, {"cpu_quota": 5000, "cpu_period": 50000}, (60000, 100000), None),
        ({"memory_limit_in_bytes": 2**63 - 1}, {"memory_limit_in_bytes": 9}, None, 2**63 - 1),
    ],
)
def test_limits_of_a_pod_and_its_overhead_add_up(
    resources: dict[str, Any], overhead: dict[str, Any], cpu: object, memory: int | None
) -> None:
    config = wishes.pod()
    config.linux.resources.CopyFrom(api.LinuxContainerResources(**resources))
    config.linux.overhead.CopyFrom(api.LinuxContainerResources(**overhead))
    limits = sandbox(config, limits_pod=True)["linux"]["resources"]
    found = limits.get("cpu")
    assert (found and (found["quota"], found["period"])) == cpu
    assert limits.get("memory", {}).get("limit") == memory


def test_no_path_of_the_host_is_in_the_guest_but_the_pods_own() -> None:
    mounts = sandbox(wishes.pod(), init="", machine=True, pod_files=OF_POD)["mounts"]
    bound = [one for one in mounts if one.get("source", "").startswith("/")]
    assert [(one["destination"], one["source"]) for one in bound] == [
        ("/dev/shm", "/p/shm"),
        ("/etc/resolv.conf", "/p/resolv.conf"),
    ]
    assert all({"ro", "nosuid", "nodev", "noexec"} < set(one["options"]) for one in bound)
    plain = sandbox(wishes.pod(), init="")["mounts"]
    assert not [one for one in plain if one.get("source", "").startswith("/")]


def test_a_virtual_machine_sets_the_pods_sysctls_itself() -> None:
    config = wishes.pod(sysctls={"net/core/somaxconn": "77", "kernel.shm_rmid_forced": "1"})
    assert sandbox(config, init="", machine=True)["linux"]["sysctl"] == NET_DEFAULTS | {
        "net.core.somaxconn": "77",
        "kernel.shm_rmid_forced": "1",
    }
    assert "sysctl" not in sandbox(config)["linux"]
    on_host = wishes.pod(options={"network": Mode.NODE})
    assert "sysctl" not in sandbox(on_host, init="", machine=True)["linux"]


def test_what_kata_is_told_by_the_pod_is_what_the_handler_lets_through() -> None:
    config = wishes.pod()
    config.annotations["io.katacontainers.config.hypervisor.path"] = "/evil"
    config.annotations["io.katacontainers.config.hypervisor.default_vcpus"] = "2"
    allowed = {"io.katacontainers.config.hypervisor.default_vcpus": "2"}
    found = sandbox(config, init="", annotations=allowed)["annotations"]
    assert {k: v for k, v in found.items() if "katacontainers" in k} == allowed


def test_what_containerd_tells_a_shim_of_a_sandbox_is_told_and_not_by_the_pod() -> None:
    lies = {"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "x"}
    found = sandbox(wishes.pod(), init="", annotations=lies)["annotations"]
    assert {k: v for k, v in found.items() if k.startswith("io.kubernetes.cri.")} == {
        "io.kubernetes.cri.container-type": "sandbox",
        "io.kubernetes.cri.sandbox-id": "p1",
        "io.kubernetes.cri.sandbox-name": "pod",
        "io.kubernetes.cri.sandbox-namespace": "default",
        "io.kubernetes.cri.sandbox-uid": "u-1",
    }
