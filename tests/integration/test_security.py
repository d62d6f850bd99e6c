# SPDX-License-Identifier: Apache-2.0
"""The security context of containers, one rule a test, seen from inside by what the kernel says."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import grpc
import pytest

from cri_server import apparmor, origins, spec
from cri_server.pb import api_pb2 as api
from tests.fakes.kubelet import Kubelet, Pod, refusal
from tests.lab import server

pytestmark = [pytest.mark.needs("root", "busybox", "netns"), pytest.mark.ours]

Profile = api.SecurityProfile
DEFAULT = Profile(profile_type=Profile.RuntimeDefault)
NODE, POD, CONTAINER, TARGET = (
    api.NamespaceMode.NODE,
    api.NamespaceMode.POD,
    api.NamespaceMode.CONTAINER,
    api.NamespaceMode.TARGET,
)
SLEEP = ("sleep", "600")
INVALID = grpc.StatusCode.INVALID_ARGUMENT


def linux(**security: Any) -> api.LinuxContainerConfig:
    for name in ("run_as_user", "run_as_group"):
        if name in security:
            security[name] = api.Int64Value(value=security[name])
    return api.LinuxContainerConfig(security_context=api.LinuxContainerSecurityContext(**security))


def said(kubelet: Kubelet, pod: Pod, image: str, script: str, **security: Any) -> list[str]:
    """Run a script in a container of its own and return the lines of its standard output."""
    name = f"c{len(kubelet.containers(pod_sandbox_id=pod.id))}"
    container = kubelet.run(pod, image, ("sh", "-c", script), name=name, linux=linux(**security))
    kubelet.wait_exit(container)
    return [line.text for line in kubelet.log(container) if line.stream == "stdout"]


def refused(kubelet: Kubelet, pod: Pod, image: str, **security: Any) -> str:
    """Return the text of the error with which CreateContainer refuses a security context."""
    config = kubelet.container_config(image, SLEEP, linux=linux(**security))
    code, text = refusal(lambda: kubelet.create(pod, config))
    assert code is INVALID, text
    assert kubelet.containers(pod_sandbox_id=pod.id) == []
    return text


def pod_with(kubelet: Kubelet, **security: Any) -> Pod:
    config = kubelet.pod_config()
    config.linux.security_context.MergeFrom(api.LinuxSandboxSecurityContext(**security))
    return kubelet.run_pod(config)


# -- capabilities ----------------------------------------------------------------------------------

DEFAULTS = frozenset(spec.Defaults().capabilities)


def capability_sets(lines: list[str]) -> dict[str, frozenset[str]]:
    """Return the sets of /proc/self/status by name: CapInh, CapPrm, CapEff, CapBnd, CapAmb."""
    pairs = (line.split(":\t") for line in lines if line.startswith("Cap"))
    return {name: spec.capability_names(int(mask, 16)) for name, mask in pairs}


def own() -> frozenset[str]:
    """Return the capabilities that this machine lets us hand out."""
    return capability_sets(Path("/proc/self/status").read_text().splitlines())["CapBnd"]


@pytest.mark.parametrize(
    ("add", "drop", "expected"),
    [
        ([], [], DEFAULTS),
        (["net_admin"], ["CAP_CHOWN"], (DEFAULTS | {"CAP_NET_ADMIN"}) - {"CAP_CHOWN"}),
        (["NET_ADMIN"], ["ALL"], {"CAP_NET_ADMIN"}),
        (["ALL"], ["SYS_ADMIN"], own() - {"CAP_SYS_ADMIN"}),
        ([], ["ALL"], frozenset()),
    ],
)
def test_capabilities_are_those_asked_for_and_never_inheritable(
    kubelet: Kubelet, pod: Pod, pulled: str, add: list[str], drop: list[str], expected: set[str]
) -> None:
    asked = api.Capability(add_capabilities=add, drop_capabilities=drop)
    container = kubelet.run(pod, pulled, SLEEP, linux=linux(capabilities=asked))
    for process in ("1", "self"):  # the container's own, and an exec's
        status = kubelet.exec_sync(container, ("cat", f"/proc/{process}/status")).stdout.decode()
        assert capability_sets(status.splitlines()) == {
            "CapInh": frozenset(),
            "CapPrm": expected,
            "CapEff": expected,
            "CapBnd": expected,
            "CapAmb": frozenset(),
        }


def test_a_user_other_than_root_has_only_ambient_capabilities(
    kubelet: Kubelet, pod: Pod, pulled: str
) -> None:
    asked = api.Capability(
        add_capabilities=["NET_ADMIN"], add_ambient_capabilities=["NET_BIND_SERVICE"]
    )
    found = capability_sets(
        said(
            kubelet, pod, pulled, "grep Cap /proc/self/status", run_as_user=1000, capabilities=asked
        )
    )
    bound = frozenset({"CAP_NET_BIND_SERVICE"})
    assert found.pop("CapBnd") == DEFAULTS | {"CAP_NET_ADMIN"}
    assert found == dict.fromkeys(("CapInh", "CapPrm", "CapEff", "CapAmb"), bound)


def test_a_handler_has_its_own_default_capabilities(
    make_site: Callable[..., server.Site],
    client_of: Callable[[server.Site], Kubelet],
    reference: str,
) -> None:
    narrow = {"path": "runc", "default_capabilities": ["chown", "CAP_NET_BIND_SERVICE", "syslog"]}
    site = make_site(**{"runtimes.narrow": narrow})
    own_kubelet = client_of(site)
    own_kubelet.pull(reference)
    pod = own_kubelet.run_pod(handler="narrow")
    found = capability_sets(said(own_kubelet, pod, reference, "grep Cap /proc/self/status"))
    assert found["CapBnd"] == {"CAP_CHOWN", "CAP_NET_BIND_SERVICE", "CAP_SYSLOG"}
    [container] = own_kubelet.containers()
    rows = origins.explained(site.state / "containers" / container.id)
    last = {row.part: row.notes[-1] for row in rows if row.notes}
    key = "[runtimes.narrow] default_capabilities"
    for name in ("CHOWN", "SYSLOG", "KILL"):
        assert last[f"process.capabilities[CAP_{name}]"][:2] == ("handler", key)
    assert last["process.capabilities[CAP_KILL]"].because == "not in its list"


def test_a_capability_that_does_not_exist_is_refused(
    kubelet: Kubelet, pod: Pod, pulled: str
) -> None:
    for field in ("add_capabilities", "drop_capabilities", "add_ambient_capabilities"):
        asked = api.Capability(**{field: ["CAP_FLY"]})
        assert f"{field}: 'CAP_FLY'" in refused(kubelet, pod, pulled, capabilities=asked)


# -- identity --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("security", "expected"),
    [
        ({"run_as_user": 1000}, "1000:1000:1000 50000"),
        ({"run_as_user": 1000, "run_as_group": 7}, "1000:7:7 50000"),
        ({"run_as_user": 1000, "supplemental_groups": [8, 9]}, "1000:1000:1000 8 9 50000"),
        (
            {
                "run_as_user": 1000,
                "supplemental_groups": [8, 9],
                "supplemental_groups_policy": api.SupplementalGroupsPolicy.Strict,
            },
            "1000:1000:1000 8 9",
        ),
        (
            {
                "run_as_username": "tester",
                "run_as_group": 7,
                "supplemental_groups_policy": api.SupplementalGroupsPolicy.Strict,
            },
            "1000:7:7",
        ),
        ({"run_as_user": 4242}, "4242:0:0"),
        ({"run_as_username": "www-data", "supplemental_groups": [5]}, "33:33:33 5"),
    ],
)
def test_user_and_groups_are_as_asked_and_told_in_the_status(
    kubelet: Kubelet, pod: Pod, pulled: str, security: dict[str, Any], expected: str
) -> None:
    container = kubelet.run(pod, pulled, SLEEP, linux=linux(**security))
    script = ("sh", "-c", "echo $(id -u):$(id -g):$(grep Groups /proc/1/status | cut -f2)")
    uid, gid, groups = kubelet.exec_sync(container, script).stdout.decode().strip().split(":")
    assert (uid, gid, sorted(groups.split(), key=int)) == (
        *expected.split(":")[:2],
        sorted(expected.split(":")[2].split(), key=int),
    )
    user = kubelet.status(container).user.linux
    assert [str(user.uid), str(user.gid)] == [uid, gid]
    assert sorted(user.supplemental_groups) == sorted(map(int, groups.split()))


def test_a_group_without_a_user_and_an_unknown_policy_are_refused(
    kubelet: Kubelet, pod: Pod, pulled: str
) -> None:
    assert "run_as_group" in refused(kubelet, pod, pulled, run_as_group=5)
    text = refused(kubelet, pod, pulled, supplemental_groups_policy=9)
    assert "supplemental_groups_policy" in text


@pytest.mark.parametrize("wanted", [False, True])
def test_no_new_privs_is_as_asked(kubelet: Kubelet, pod: Pod, pulled: str, wanted: bool) -> None:
    found = said(kubelet, pod, pulled, "grep NoNewPrivs /proc/self/status", no_new_privs=wanted)
    assert found == [f"NoNewPrivs:\t{int(wanted)}"]


# -- /proc, /sys -----------------------------------------------------------------------------------

HIDDEN = """
test -s /proc/timer_list && echo timers shown
ls /sys/firmware | grep -q . && echo firmware shown
grep -q ' /proc/sys .*ro,' /proc/self/mountinfo && echo sysctls sealed
touch /proc/sys/kernel/ostype && echo reached
grep ' /sys ' /proc/self/mountinfo | cut -d' ' -f6
"""
PATHS = {"masked_paths": ["/proc/timer_list", "/sys/firmware"], "readonly_paths": ["/proc/sys"]}


def test_only_the_paths_that_are_listed_are_hidden_or_sealed(
    kubelet: Kubelet, pod: Pod, pulled: str
) -> None:
    hidden = said(kubelet, pod, pulled, HIDDEN, **PATHS)
    assert "sysctls sealed" in hidden
    assert not {"timers shown", "firmware shown"} & set(hidden)
    plain = said(kubelet, pod, pulled, HIDDEN)
    assert "sysctls sealed" not in plain
    if os.listdir("/sys/firmware"):
        assert "firmware shown" in plain
    assert hidden[-1].startswith("ro,")


def test_a_privileged_container_sees_and_may_write_it_all(kubelet: Kubelet, pulled: str) -> None:
    pod = pod_with(kubelet, privileged=True)
    script = f"{HIDDEN}\ngrep -E '^(Seccomp|NoNewPrivs)' /proc/self/status"
    found = said(kubelet, pod, pulled, script, privileged=True, seccomp=DEFAULT, **PATHS)
    assert "sysctls sealed" not in found
    assert "Seccomp:\t0" in found
    assert any(line.startswith("rw,") for line in found)


def test_a_privileged_container_needs_a_privileged_pod(
    kubelet: Kubelet, pod: Pod, pulled: str
) -> None:
    assert "privileged" in refused(kubelet, pod, pulled, privileged=True)


def test_a_volume_cannot_stand_in_for_proc(
    kubelet: Kubelet, pod: Pod, pulled: str, tmp_path: Path
) -> None:
    mounts = [api.Mount(container_path="/a/../proc", host_path=os.fspath(tmp_path))]
    config = kubelet.container_config(pulled, SLEEP, mounts=mounts)
    code, text = refusal(lambda: kubelet.create(pod, config))
    assert (code, "/proc" in text) == (INVALID, True)


# -- namespaces ------------------------------------------------------------------------------------

SPACES = ("pid", "ipc", "net", "uts", "mnt", "cgroup", "user")


def spaces(kubelet: Kubelet, container: str) -> Mapping[str, str]:
    """Return the namespaces of a container's init."""
    info = json.loads(kubelet.status_response(container, verbose=True).info["info"])
    return {kind: os.readlink(f"/proc/{info['pid']}/ns/{kind}") for kind in SPACES}


def run(kubelet: Kubelet, pod: Pod, image: str, name: str, **options: Any) -> str:
    asked = linux(namespace_options=api.NamespaceOption(**options))
    return kubelet.run(pod, image, SLEEP, name=name, linux=asked)


def test_container_mode_gives_each_its_own_pids_and_target_joins_them(
    kubelet: Kubelet, pod: Pod, pulled: str
) -> None:
    one, other = (run(kubelet, pod, pulled, name, pid=CONTAINER) for name in ("one", "other"))
    debug = run(kubelet, pod, pulled, "debug", pid=TARGET, target_id=one)
    a, b, c = (spaces(kubelet, container) for container in (one, other, debug))
    assert a["pid"] != b["pid"]
    assert a["pid"] == c["pid"]
    assert a["mnt"] != c["mnt"]
    for kind in ("ipc", "net", "uts"):
        assert a[kind] == b[kind] == c[kind] != os.readlink(f"/proc/self/ns/{kind}")


def test_a_target_must_run_in_the_same_pod(kubelet: Kubelet, pod: Pod, pulled: str) -> None:
    elsewhere = run(kubelet, kubelet.run_pod(), pulled, "elsewhere", pid=CONTAINER)
    here = run(kubelet, pod, pulled, "here", pid=CONTAINER)
    for target in (elsewhere, "f" * 64, here[:20]):
        options = api.NamespaceOption(pid=TARGET, target_id=target)
        config = kubelet.container_config(pulled, SLEEP, linux=linux(namespace_options=options))
        code, _ = refusal(lambda config=config: kubelet.create(pod, config))  # type: ignore[misc]
        assert code in (INVALID, grpc.StatusCode.NOT_FOUND)


@pytest.mark.needs("catatonit")
def test_pod_mode_shares_pids_among_the_containers(kubelet: Kubelet, pulled: str) -> None:
    config = kubelet.pod_config()
    config.linux.security_context.namespace_options.pid = POD
    pod = kubelet.run_pod(config)
    one, other = (run(kubelet, pod, pulled, name, pid=POD) for name in ("one", "other"))
    assert spaces(kubelet, one)["pid"] == spaces(kubelet, other)["pid"]
    assert spaces(kubelet, one)["pid"] != os.readlink("/proc/self/ns/pid")


@pytest.mark.parametrize("kind", ["pid", "ipc", "net"])
def test_node_mode_is_the_hosts_namespace_and_only_that(
    kubelet: Kubelet, pulled: str, kind: str
) -> None:
    field = "network" if kind == "net" else kind
    options = api.NamespaceOption(pid=CONTAINER)
    setattr(options, field, NODE)
    config = kubelet.pod_config(hostname="")
    config.linux.security_context.namespace_options.CopyFrom(options)
    pod = kubelet.run_pod(config)
    found = spaces(kubelet, kubelet.run(pod, pulled, SLEEP, linux=linux(namespace_options=options)))
    hosts = {k for k in ("pid", "ipc", "net") if found[k] == os.readlink(f"/proc/self/ns/{k}")}
    assert hosts == {kind}


def test_a_container_cannot_have_more_of_the_host_than_its_pod(
    kubelet: Kubelet, pod: Pod, pulled: str
) -> None:
    for field in ("pid", "ipc", "network"):
        options = api.NamespaceOption()
        setattr(options, field, NODE)
        assert field in refused(kubelet, pod, pulled, namespace_options=options)


def test_sys_shows_the_interfaces_of_the_containers_network(kubelet: Kubelet, pulled: str) -> None:
    options = api.NamespaceOption(pid=CONTAINER, network=NODE)
    config = kubelet.pod_config(hostname="")
    config.linux.security_context.namespace_options.CopyFrom(options)
    host_network = kubelet.run_pod(config)
    found = said(kubelet, host_network, pulled, "ls /sys/class/net", namespace_options=options)
    assert set(found) <= set(os.listdir("/sys/class/net"))
    assert set(said(kubelet, kubelet.run_pod(), pulled, "ls /sys/class/net")) == {"eth0", "lo"}


# -- seccomp ---------------------------------------------------------------------------------------

MODE = "grep Seccomp: /proc/self/status"


@pytest.mark.parametrize(
    ("security", "mode"),
    [
        ({}, "0"),
        ({"seccomp": DEFAULT}, "2"),
        ({"seccomp": Profile(profile_type=Profile.Unconfined)}, "0"),
        ({"seccomp_profile_path": "runtime/default"}, "2"),
        ({"seccomp": DEFAULT, "seccomp_profile_path": "unconfined"}, "2"),
    ],
)
def test_seccomp_is_as_asked_and_nothing_means_unconfined(
    kubelet: Kubelet, pod: Pod, pulled: str, security: dict[str, Any], mode: str
) -> None:
    assert said(kubelet, pod, pulled, MODE, **security) == [f"Seccomp:\t{mode}"]


def test_the_default_profile_lets_a_capability_do_what_it_is_for(
    kubelet: Kubelet, pod: Pod, pulled: str
) -> None:
    script = """
    mkdir -p /tmp/mnt
    mount -t tmpfs none /tmp/mnt 2>/dev/null && echo mounted
    unshare -m true 2>/dev/null && echo unshared
    unshare -U true 2>/dev/null && echo user namespace
    chroot / true && echo chrooted
    """
    assert said(kubelet, pod, pulled, script, seccomp=DEFAULT) == ["chrooted"]
    asked = {
        "capabilities": api.Capability(
            add_capabilities=["SYS_ADMIN"], drop_capabilities=["SYS_CHROOT"]
        ),
        "apparmor": Profile(profile_type=Profile.Unconfined),  # its default denies every mount
    }
    found = said(kubelet, pod, pulled, script, seccomp=DEFAULT, **asked)
    assert {"mounted", "unshared"} <= set(found)
    assert "chrooted" not in found


@pytest.mark.needs("catatonit")
@pytest.mark.parametrize(
    ("security", "mode"), [({"seccomp": DEFAULT}, "2"), ({}, "0"), ({"privileged": True}, "0")]
)
def test_the_pods_profile_is_for_its_init(
    kubelet: Kubelet, pulled: str, security: dict[str, Any], mode: str
) -> None:
    options = api.NamespaceOption(pid=POD)
    config = kubelet.pod_config()
    context = api.LinuxSandboxSecurityContext(namespace_options=options, **security)
    config.linux.security_context.CopyFrom(context)
    pod, script = kubelet.run_pod(config), "grep Seccomp: /proc/1/status"
    found = said(kubelet, pod, pulled, script, namespace_options=options)
    assert found == [f"Seccomp:\t{mode}"]


def localhost(path: object) -> api.SecurityProfile:
    return Profile(profile_type=Profile.Localhost, localhost_ref=str(path))


def test_a_localhost_profile_is_the_administrators(
    kubelet: Kubelet, pod: Pod, pulled: str, tmp_path: Path
) -> None:
    profile = tmp_path / "profile.json"
    rule = {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28}
    profile.write_text(json.dumps({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]}))
    found = said(kubelet, pod, pulled, "mkdir /tmp/x 2>&1", seccomp=localhost(profile))
    assert "No space left" in found[0]


@pytest.mark.ours  # containerd does not look at includes and excludes
def test_a_profile_of_dockers_follows_the_capabilities(
    kubelet: Kubelet, pod: Pod, pulled: str, tmp_path: Path
) -> None:
    profile = tmp_path / "profile.json"
    rule = {"name": "mkdir", "action": "SCMP_ACT_ERRNO", "errno": "ENOSPC"}
    rules = [{**rule, "excludes": {"caps": ["CAP_SYS_PTRACE"]}}]
    arches = [{"architecture": f"SCMP_ARCH_{name}"} for name in ("X86_64", "AARCH64")]
    document = {"defaultAction": "SCMP_ACT_ALLOW", "archMap": arches, "syscalls": rules}
    profile.write_text(json.dumps(document))
    more = api.Capability(add_capabilities=["SYS_PTRACE"])
    script = "mkdir /tmp/x 2>&1 && echo made"
    found = said(kubelet, pod, pulled, script, seccomp=localhost(profile))
    assert "No space left" in found[0]
    found = said(kubelet, pod, pulled, script, seccomp=localhost(profile), capabilities=more)
    assert found == ["made"]


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("", "is not JSON"),
        ("null", "does not hold a profile"),
        ("{}", "defaultAction: is missing"),
        ('{"defaultAction": "SCMP_ACT_ALLOW", "arches": []}', "'arches'"),
        (
            '{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["a"], "action": "NO"}]}',
            "syscalls[0]: action: 'NO'",
        ),
    ],
)
def test_a_malformed_profile_is_refused_with_file_and_place(
    kubelet: Kubelet, pod: Pod, pulled: str, tmp_path: Path, text: str, place: str
) -> None:
    profile = tmp_path / "profile.json"
    profile.write_text(text)
    found = refused(kubelet, pod, pulled, seccomp=localhost(profile))
    assert str(profile) in found
    assert place in found


@pytest.mark.parametrize("path", ["/no/such/profile.json", "relative.json", "", "/dev/zero", "/"])
def test_a_profile_that_is_no_file_is_refused(
    kubelet: Kubelet, pod: Pod, pulled: str, path: str
) -> None:
    assert "seccomp" in refused(kubelet, pod, pulled, seccomp=localhost(path))
    code, text = refusal(lambda: kubelet.run_pod(pod_asking(kubelet, seccomp=localhost(path))))
    assert (code, "seccomp" in text) == (INVALID, True)
    assert len(kubelet.pods()) == 1


def pod_asking(kubelet: Kubelet, **fields: Any) -> api.PodSandboxConfig:
    """Return a pod without a sandbox container, whose containers may ask for other profiles."""
    config = kubelet.pod_config()
    config.linux.security_context.MergeFrom(api.LinuxSandboxSecurityContext(**fields))
    return config


# -- AppArmor and SELinux where there is none ------------------------------------------------------


def test_without_apparmor_the_default_is_void_and_a_name_is_refused(
    kubelet: Kubelet, pod: Pod, pulled: str
) -> None:
    if apparmor.supported():
        pytest.skip("this host has AppArmor: test_apparmor.py")
    for field in ({"apparmor": localhost("mine")}, {"apparmor_profile": "localhost/mine"}):
        assert "apparmor: profile 'mine'" in refused(kubelet, pod, pulled, **field)
    code, text = refusal(lambda: kubelet.run_pod(pod_asking(kubelet, apparmor=localhost("mine"))))
    assert (code, "profile 'mine'" in text) == (INVALID, True)
    for field in ({"apparmor": DEFAULT}, {"apparmor_profile": "runtime/default"}):
        assert said(kubelet, pod, pulled, "echo runs", **field) == ["runs"]


def test_a_malformed_label_is_refused_with_and_without_selinux(
    kubelet: Kubelet, pod: Pod, pulled: str
) -> None:
    options = api.SELinuxOption(user="system_u", role="system_r", level="s0,c4,c5")
    assert "selinux_options.level" in refused(kubelet, pod, pulled, selinux_options=options)
