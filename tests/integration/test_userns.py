# SPDX-License-Identifier: Apache-2.0
"""Pods with user namespaces of their own (CRI userns_options, KEP-127), on real OCI runtimes."""

import contextlib
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest

from cri_server.pb import api_pb2 as api
from shim import linux
from tests import probes
from tests.fakes.kubelet import Kubelet, Pod, refusal
from tests.integration.conftest import DRIVER, SLEEP
from tests.lab import cgroups, faults, image, network, registry, server, waiting
from tests.lab.mapped import (
    COUNT,
    FIRST,
    MAPPING,
    config_of,
    container_config,
    ids_of,
    logged,
    mount,
    mounted,
    run,
    said,
    userns,
)

pytestmark = [
    pytest.mark.needs("root", "netns", "overlay", "cni", "runc", "docker-registry", "userns"),
    pytest.mark.usefixtures("traceless"),
]
INVALID, FAILED = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION
MakePod = Callable[..., Pod]


@pytest.fixture(params=["", "crun"], ids=["default", "crun"])
def handler(request: pytest.FixtureRequest) -> str:
    """Return the handler of the run, then crun."""
    return str(request.param)


@pytest.fixture
def make_pod(kubelet: Kubelet, pulled: str, handler: str) -> MakePod:
    """Return a function that runs a pod with a user namespace; arguments are namespace options."""

    def make(change: Callable[[Any], None] = lambda _: None, **options: Any) -> Pod:
        config = config_of(kubelet, wanted=userns(), **options)
        change(config)
        return kubelet.run_pod(config, handler=handler)

    return make


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    """Return a volume with a file of the host's root."""
    folder = tmp_path / "volume"
    folder.mkdir(mode=0o755)
    (folder / "old").write_text("content\n")
    return folder


# -- ids -------------------------------------------------------------------------------------------


def test_root_inside_is_nobody_outside(kubelet: Kubelet, make_pod: MakePod, pulled: str) -> None:
    container = run(kubelet, make_pod(), pulled)
    assert said(kubelet, container, "cat /proc/self/uid_map /proc/self/gid_map; id -u; id -g") == [
        f"         0     {FIRST}      {COUNT}",
        f"         0     {FIRST}      {COUNT}",
        "0",
        "0",
    ]
    pid = faults.pid_of(kubelet, container)
    status = Path(f"/proc/{pid}/status").read_text()
    assert f"Uid:\t{FIRST}\t{FIRST}\t{FIRST}\t{FIRST}" in status
    assert f"Gid:\t{FIRST}\t{FIRST}\t{FIRST}\t{FIRST}" in status


def test_the_images_files_are_roots_and_stay_as_they_are(
    kubelet: Kubelet, make_pod: MakePod, pulled: str
) -> None:
    container = run(kubelet, make_pod(), pulled)
    script = "stat -c %u:%g:%a / /bin/busybox /etc/passwd /tmp;"
    script += "chown 33 /etc/group; echo x >> /bin/busybox"
    assert said(kubelet, container, script)[:4] == ["0:0:755", "0:0:755", "0:0:644", "0:0:1777"]
    other = kubelet.run(kubelet.run_pod(), pulled, SLEEP)
    script = "stat -c %u:%g /etc/group /bin/busybox; tail -c2 /bin/busybox"
    assert said(kubelet, other, script)[:2] == ["0:0", "0:0"]
    assert said(kubelet, other, "tail -c2 /bin/busybox") != ["x"]


@pytest.mark.ours
def test_what_a_container_writes_belongs_to_its_ids_and_is_counted(
    kubelet: Kubelet, make_pod: MakePod, pulled: str, site: server.Site
) -> None:
    container = run(kubelet, make_pod(), pulled, working_dir="/made/for/it")
    script = "head -c 3000000 /dev/urandom > /big; touch /of-user; chown 7:8 /of-user;"
    script += "stat -c %u /made/for/it"
    assert said(kubelet, container, script) == ["0"]
    upper = site.root / "writable" / container / "fs"
    assert ids_of(upper / "big") == ids_of(upper) == ids_of(upper / "made/for") == (FIRST, FIRST)
    assert ids_of(upper / "of-user") == (FIRST + 7, FIRST + 8)
    waiting.until(lambda: _written(kubelet, container) > 3000000, "it is counted", seconds=25)
    kubelet.stop(container)
    kubelet.remove(container)
    assert not upper.exists()


def _written(kubelet: Kubelet, container: str) -> int:
    request = api.ContainerStatsRequest(container_id=container)
    return kubelet.runtime.ContainerStats(request).stats.writable_layer.used_bytes.value


def test_a_user_of_the_image_is_one_of_the_pods_ids(
    kubelet: Kubelet, make_pod: MakePod, pulled: str
) -> None:
    security = api.LinuxContainerSecurityContext(
        run_as_user=api.Int64Value(value=1000), supplemental_groups=[4000]
    )
    container = run(kubelet, make_pod(), pulled, security=security)
    assert said(kubelet, container, "id -u; id -G")[0] == "1000"
    status = Path(f"/proc/{faults.pid_of(kubelet, container)}/status").read_text()
    assert f"Uid:\t{FIRST + 1000}\t" in status
    assert f"{FIRST + 4000}" in status


# -- what the pod gives ----------------------------------------------------------------------------


def test_the_pods_namespaces_belong_to_its_root(
    kubelet: Kubelet, make_pod: MakePod, pulled: str
) -> None:
    def change(config: Any) -> None:
        config.linux.sysctls["net.ipv4.ip_default_ttl"] = "77"
        config.linux.sysctls["net.ipv4.conf.eth0.tag"] = "7"  # of the interface, so after CNI's ADD
        config.linux.sysctls["kernel.shm_rmid_forced"] = "1"

    capabilities = api.Capability(add_capabilities=["NET_ADMIN", "SYS_ADMIN"])
    security = api.LinuxContainerSecurityContext(capabilities=capabilities)
    pod = make_pod(change)
    container = run(kubelet, pod, pulled, security=security)
    script = (
        "cat /proc/sys/net/ipv4/ip_default_ttl /proc/sys/kernel/shm_rmid_forced;"
        "cat /proc/sys/net/ipv4/ping_group_range /proc/sys/net/ipv4/conf/eth0/tag; hostname;"
        "ip link add dev br7 type bridge && ip link show br7 | grep -c br7"
    )
    name = pod.config.hostname
    assert said(kubelet, container, script) == ["77", "1", f"0\t{COUNT - 1}", "7", name, "1"]


def test_the_shared_files_can_be_used_by_root(
    kubelet: Kubelet, make_pod: MakePod, pulled: str
) -> None:
    container = run(kubelet, make_pod(), pulled)
    script = (
        "stat -c %u:%g:%a /dev/shm /etc/hosts /etc/hostname /etc/resolv.conf;"
        "echo 1.2.3.4 x >> /etc/hosts && echo y > /dev/shm/f && mkdir /dev/shm/d;"
        "stat -c %u /dev/shm/f; ls -d /dev/mqueue /sys/class/net/lo;"
        "touch /dev/mqueue/q && ls /dev/mqueue"
    )
    assert said(kubelet, container, script) == [
        "0:0:1777",
        "0:0:644",
        "0:0:644",
        "0:0:644",
        "0",
        "/dev/mqueue",
        "/sys/class/net/lo",
        "q",
    ]
    second = run(kubelet, kubelet_pod(kubelet, container), pulled, name="second")
    assert said(kubelet, second, "cat /dev/shm/f; tail -n1 /etc/hosts") == ["y", "1.2.3.4 x"]


def kubelet_pod(kubelet: Kubelet, container: str) -> Pod:
    """Return the pod of a container, with what its configuration must have."""
    [item] = kubelet.containers(id=container)
    status = kubelet.pod_status(item.pod_sandbox_id).status
    config = kubelet.pod_config(status.metadata.name)
    options = config.linux.security_context.namespace_options
    options.CopyFrom(status.linux.namespaces.options)
    return Pod(id=status.id, config=config)


@pytest.mark.parametrize("user", [0, 1000])
def test_streams_can_be_opened_by_name(
    kubelet: Kubelet, make_pod: MakePod, pulled: str, user: int
) -> None:
    """As nginx does: its logs are links to /dev/stdout and /dev/stderr."""
    pod, script = make_pod(), "echo out > /dev/stdout; echo err > /dev/stderr"
    security = api.LinuxContainerSecurityContext(run_as_user=api.Int64Value(value=user))
    container = run(kubelet, pod, pulled, ["sh", "-c", f"{script}; sleep 1000"], security=security)
    kubelet.wait_log(container, "err")
    assert {(line.stream, line.text) for line in kubelet.log(container)} == {
        ("stdout", "out"),
        ("stderr", "err"),
    }
    answer = kubelet.exec_sync(container, ["sh", "-c", script])
    assert (answer.stdout, answer.stderr) == (b"out\n", b"err\n")


def test_a_terminal_is_the_containers(kubelet: Kubelet, make_pod: MakePod, pulled: str) -> None:
    container = run(kubelet, make_pod(), pulled, ["sh", "-c", "tty; stat -c %u $(tty)"], tty=True)
    assert [line.strip() for line in logged(kubelet, container)] == ["/dev/pts/0", "0"]


@pytest.mark.parametrize("user", [None, 1000])
def test_the_containers_of_a_pod_can_share_a_pid_namespace(
    kubelet: Kubelet, make_pod: MakePod, pulled: str, user: int | None
) -> None:
    def change(config: Any) -> None:
        if user is not None:
            config.linux.security_context.run_as_user.value = user

    pod = make_pod(change, pid=api.POD)
    first = run(kubelet, pod, pulled)
    second = run(kubelet, pod, pulled, name="second")
    assert "sleep 86400" in "\n".join(said(kubelet, second, "ps -o pid,user,args"))
    assert said(kubelet, first, "cat /proc/1/comm; stat -c %u /proc/1")[0] == "catatonit"
    kubelet.stop(first)
    assert kubelet.status(second).state == api.CONTAINER_RUNNING


def test_a_pod_on_the_hosts_network_has_only_its_users_of_its_own(
    kubelet: Kubelet, make_pod: MakePod, pulled: str
) -> None:
    def change(config: Any) -> None:
        config.hostname = ""

    pod = make_pod(change, network=api.NODE)
    capabilities = api.Capability(add_capabilities=["NET_ADMIN"])
    security = api.LinuxContainerSecurityContext(capabilities=capabilities)
    container = run(kubelet, pod, pulled, security=security)
    host_links = {p.name for p in Path("/sys/class/net").iterdir()}
    found = set(said(kubelet, container, "ls /sys/class/net"))
    assert "lo" in found & host_links
    assert said(kubelet, container, "readlink /proc/self/ns/net; cat /proc/self/uid_map") == [
        os.readlink("/proc/self/ns/net"),
        f"         0     {FIRST}      {COUNT}",
    ]
    denied = said(kubelet, container, "ip link add dev br7 type bridge; ls /sys/kernel/debug")
    assert denied == ["ip: RTNETLINK answers: Operation not permitted"]
    assert "Read-only" in said(kubelet, container, "echo 1 > /sys/kernel/mm/ksm/run")[0]


def test_it_is_below_the_pods_cgroup(
    kubelet: Kubelet, make_pod: MakePod, pulled: str, net: network.Network
) -> None:
    pod = make_pod(pid=api.POD)
    container = run(kubelet, pod, pulled)
    parent = pod.config.linux.cgroup_parent
    name = f"cri-server-{container}.scope" if DRIVER == "systemd" else container
    assert parent.startswith(f"/{net.name}")
    lines = Path(f"/proc/{faults.pid_of(kubelet, container)}/cgroup").read_text().splitlines()
    v2 = not probes.missing("cgroup-v2")  # whose one line in the file has no name
    mounted = {""} if v2 else {n for m in cgroups.hierarchies() for n in m.name.split(",")}
    paths = {
        line.split(":", 2)[2]
        for line in lines
        if set(line.split(":")[1].removeprefix("name=").split(",")) & mounted
    }
    assert paths == {f"{parent}/{name}"}


# -- volumes ---------------------------------------------------------------------------------------


def test_a_volumes_files_keep_their_owners(
    kubelet: Kubelet, make_pod: MakePod, pulled: str, volume: Path
) -> None:
    os.chown(volume / "old", 5, 6)
    container = run(kubelet, make_pod(), pulled, mounts=[mount(volume)])
    script = (
        "stat -c %u:%g /data /data/old; touch /data/new; touch /data/of-7; chown 7:8 /data/of-7"
    )
    assert said(kubelet, container, script) == ["0:0", "5:6"]
    assert ids_of(volume / "new") == (0, 0)
    assert ids_of(volume / "of-7") == (7, 8)
    assert [m.host_path for m in kubelet.status(container).mounts] == [str(volume)]


def test_a_volume_without_mappings_is_somebody_elses(
    kubelet: Kubelet, make_pod: MakePod, pulled: str, volume: Path
) -> None:
    pod = make_pod()
    wish = container_config(kubelet, pod, pulled, SLEEP, mounts=[mount(volume)])
    del wish.mounts[0].uidMappings[:]
    del wish.mounts[0].gidMappings[:]
    container = kubelet.create(pod, wish)
    kubelet.start(container)
    found = said(kubelet, container, "stat -c %u /data/old; touch /data/new")
    assert found == ["65534", "touch: /data/new: Permission denied"]


def test_a_file_can_be_a_volume(
    kubelet: Kubelet, make_pod: MakePod, pulled: str, volume: Path
) -> None:
    file = mount(volume / "old", "/run/secrets/token", readonly=True)
    container = run(kubelet, make_pod(), pulled, mounts=[file])
    script = "stat -c %u /run/secrets/token; cat /run/secrets/token; echo > /run/secrets/token"
    found = said(kubelet, container, script)
    assert found[:2] == ["0", "content"]
    assert "Read-only file system" in found[2]


@pytest.mark.needs("id-mapped-tmpfs")
def test_a_read_only_volume_keeps_the_flags_of_its_file_system(
    kubelet: Kubelet, make_pod: MakePod, pulled: str, tmp_path: Path
) -> None:
    with mounted(tmp_path / "memory") as memory:
        (memory / "secret").write_text("s\n")
        both = [mount(memory, readonly=True), mount(memory, "/rw")]
        container = run(kubelet, make_pod(), pulled, mounts=both)
        script = (
            "cat /data/secret; touch /rw/x && touch /data/x; grep -E ' /(data|rw) ' /proc/mounts"
        )
        found = said(kubelet, container, script)
        kubelet.stop(container)
        kubelet.remove(container)
        assert (memory / "secret").read_text() == "s\n"
    assert found[0] == "s"
    assert "Read-only file system" in found[1]
    assert ["nosuid" in line and "nodev" in line for line in found[2:]] == [True, True]


@pytest.mark.needs("id-mapped-tmpfs")
def test_what_is_mounted_in_a_volume_is_mapped_too(
    kubelet: Kubelet, make_pod: MakePod, pulled: str, volume: Path, handler: str
) -> None:
    with mounted(volume / "below") as below:
        (below / "file").touch()
        pod, mounts = make_pod(), [mount(volume)]
        if handler:
            leaves_it_out(kubelet, pod, pulled, mounts)
            return
        mounts.append(mount(volume, "/rro", readonly=True, recursive_read_only=True))
        container = run(kubelet, pod, pulled, mounts=mounts)
        found = said(kubelet, container, "stat -c %u /data/below/file; touch /data/below/new")
        assert found == ["0"]
        assert ids_of(below / "new") == (0, 0)
        [denied] = said(kubelet, container, "touch /rro/below/x")
        assert "Read-only file system" in denied
        kubelet.stop(container)
        kubelet.remove(container)
        assert (below / "file").exists()


def test_what_cannot_be_mapped_below_a_volume_is_there_as_it_is(
    kubelet: Kubelet, make_pod: MakePod, pulled: str, handler: str
) -> None:
    """hostPath "/", as node-exporter has it: /proc and /sys are below."""
    root, pod = mount(Path("/"), "/host", readonly=True), make_pod()
    if handler:
        leaves_it_out(kubelet, pod, pulled, [root])
        return
    container = run(kubelet, pod, pulled, mounts=[root])
    script = "stat -c %u /host/etc/passwd /host/proc /host/sys; ls /host/proc/self/ns/uts"
    assert said(kubelet, container, script) == ["0", "65534", "65534", "/host/proc/self/ns/uts"]


def leaves_it_out(kubelet: Kubelet, pod: Pod, reference: str, mounts: Sequence[api.Mount]) -> None:
    """crun 1.8 of Debian 12 binds nothing but the top of a tree in a user namespace."""
    wish = container_config(kubelet, pod, reference, SLEEP, mounts=mounts)
    code, message = refusal(lambda: kubelet.create(pod, wish))
    assert (code, "is mounted in it" in message) == (FAILED, True), message


@pytest.mark.needs("id-mapped-tmpfs")
def test_later_mounts_of_the_host_reach_a_slave_volume_and_are_left_alone(
    kubelet: Kubelet, make_pod: MakePod, pulled: str, tmp_path: Path, handler: str
) -> None:
    with mounted(tmp_path / "shared") as shared:
        linux.mount(None, os.fspath(shared), flags=linux.MS_SHARED)
        with mounted(_folder(shared / "early")) as early:
            (early / "file").touch()
            slave = mount(shared, propagation=api.PROPAGATION_HOST_TO_CONTAINER)
            pod = make_pod()
            if handler:
                leaves_it_out(kubelet, pod, pulled, [slave])
                return
            container = run(kubelet, pod, pulled, mounts=[slave])
            with mounted(_folder(shared / "late")) as late:
                (late / "file").touch()
                found = said(kubelet, container, "ls /data/early /data/late")
                kubelet.stop(container)
                kubelet.remove(container)
                assert (early / "file").exists()
                assert (late / "file").exists()
    assert found.count("file") == 2


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


@pytest.mark.ours
@pytest.mark.needs("id-mapped-tmpfs")
def test_a_volume_is_not_kept_busy(
    kubelet: Kubelet, make_pod: MakePod, pulled: str, tmp_path: Path, site: server.Site
) -> None:
    """The kubelet unmounts volumes when containers have ended, before it removes them."""
    with mounted(tmp_path / "memory") as memory:
        pod = make_pod()
        wish = container_config(kubelet, pod, pulled, SLEEP, mounts=[mount(memory)])
        container = kubelet.create(pod, wish)
        folder = site.state / "containers" / container / "mounts"
        assert copies(folder) == [f"{folder}/0"]
        kubelet.start(container)
        assert copies(folder) == []
        fields = {"mounts": [mount(memory)], "name": "failing"}
        failing = container_config(kubelet, pod, pulled, ["/no/such/program"], **fields)
        broken = kubelet.create(pod, failing)
        refusal(lambda: kubelet.start(broken))
        assert copies(site.state / "containers" / broken / "mounts") == []
        never = kubelet.create(
            pod,
            container_config(kubelet, pod, pulled, SLEEP, mounts=[mount(memory)], name="never"),
        )
        kubelet.stop_pod(pod.id)
        assert copies(site.state / "containers" / never / "mounts") == []


def copies(folder: Path) -> list[str]:
    targets = (line.split(" ")[4] for line in Path("/proc/self/mountinfo").read_text().splitlines())
    return [target for target in targets if target.startswith(f"{folder}/")]


def test_a_volume_that_cannot_be_mapped_is_named(
    kubelet: Kubelet, make_pod: MakePod, pulled: str
) -> None:
    pod = make_pod()
    wish = container_config(
        kubelet, pod, pulled, SLEEP, mounts=[mount(Path("/sys/kernel"), "/volume")]
    )
    code, message = refusal(lambda: kubelet.create(pod, wish))
    assert code == FAILED
    assert "/sys/kernel" in message
    if "is mounted in it" not in message:  # what an old crun would leave out comes first
        assert "'/volume'" in message
        assert "sysfs" in message
    assert not kubelet.containers()


def test_an_image_volume_belongs_to_root(kubelet: Kubelet, make_pod: MakePod, pulled: str) -> None:
    volume = api.Mount(container_path="/img", readonly=True, image=api.ImageSpec(image=pulled))
    container = run(kubelet, make_pod(), pulled, mounts=[volume])
    assert said(kubelet, container, "stat -c %u:%g /img/etc/passwd /img") == ["0:0", "0:0"]


def test_a_declared_volume_belongs_to_root(
    kubelet: Kubelet, make_pod: MakePod, registry: registry.Registry
) -> None:
    built = image.busybox(Volumes={"/home": {}, "/made": {}})
    reference = registry.push(built, "test/userns-volumes")
    kubelet.pull(reference)
    container = run(kubelet, make_pod(), reference)
    script = "stat -c %u:%g /home /home/tester /made; touch /home/x /made/x && stat -c %u /made/x"
    assert said(kubelet, container, script) == ["0:0", "0:0", "0:0", "0"]
    kubelet.remove_pod(kubelet_pod(kubelet, container).id)
    kubelet.remove_image(reference)


def test_a_privileged_container_is_so_in_its_pod_alone(
    kubelet: Kubelet, make_pod: MakePod, pulled: str
) -> None:
    def change(config: Any) -> None:
        config.linux.security_context.privileged = True

    security = api.LinuxContainerSecurityContext(privileged=True)
    container = run(kubelet, make_pod(change), pulled, security=security)
    script = "mkdir /m && mount -t tmpfs x /m && echo mounted; echo 1 > /sys/kernel/mm/ksm/run"
    mounted_, denied = said(kubelet, container, f"{script}; mknod /n b 7 0")[:2]
    assert (mounted_, "denied" in denied or "Read-only" in denied) == ("mounted", True), denied


def test_a_device_may_have_another_path(kubelet: Kubelet, make_pod: MakePod, pulled: str) -> None:
    devices = [
        api.Device(host_path="/dev/zero", container_path="/dev/random2", permissions="rw"),
        api.Device(host_path="/dev/full", container_path="/dev/full", permissions="rw"),
    ]
    container = run(kubelet, make_pod(), pulled, devices=devices)
    script = "head -c2 /dev/random2 | od -An -tx1; echo > /dev/full; head -c1 /dev/null | wc -c"
    found = said(kubelet, container, script)
    assert found[0].split() == ["00", "00"]
    assert "No space left" in found[1]
    assert found[2] == "0"


# -- refusals --------------------------------------------------------------------------------------


TWICE = [MAPPING, api.IDMapping(host_id=400000, length=COUNT)]
WRONG: dict[str, api.UserNamespace] = {
    "two mappings": userns(uids=TWICE, gids=TWICE),
    "no gids": userns(gids=[]),
    "no mappings": userns(uids=[], gids=[]),
    "container id 0": userns(uids=[api.IDMapping(container_id=1, host_id=1000, length=1000)]),
    "empty": userns(uids=[api.IDMapping(host_id=1000, length=0)]),
    "root of the host": userns(gids=[api.IDMapping(host_id=0, length=COUNT)]),
    "too far": userns(uids=[api.IDMapping(host_id=4294967290, length=6)]),
    "NODE with mappings": userns(mode=api.NODE),
    "CONTAINER": userns(mode=api.CONTAINER),
    "TARGET": api.UserNamespace(mode=api.TARGET),
    "unknown": userns(mode=9),
}


@pytest.mark.parametrize("wanted", WRONG.values(), ids=WRONG)
@pytest.mark.ours
def test_a_user_namespace_that_cannot_be_is_refused(
    kubelet: Kubelet, pulled: str, wanted: api.UserNamespace
) -> None:
    config = config_of(kubelet, wanted=wanted)
    code, message = refusal(lambda: kubelet.run_pod(config))
    assert (code, "userns_options" in message) == (INVALID, True), message
    assert not kubelet.pods()


@pytest.mark.parametrize("field", ["pid", "ipc"])
@pytest.mark.ours
def test_the_hosts_pid_and_ipc_namespaces_exclude_it(
    kubelet: Kubelet, pulled: str, field: str
) -> None:
    config = config_of(kubelet, wanted=userns(), **{field: api.NODE})
    code, message = refusal(lambda: kubelet.run_pod(config))
    assert (code, f"namespace_options.{field}" in message) == (INVALID, True), message


def test_mode_node_is_the_hosts(kubelet: Kubelet, pulled: str) -> None:
    pod = kubelet.run_pod(config_of(kubelet, wanted=api.UserNamespace(mode=api.NODE)))
    container = run(kubelet, pod, pulled)
    expected = Path("/proc/self/uid_map").read_text().split()
    assert said(kubelet, container, "cat /proc/self/uid_map")[0].split() == expected


@pytest.mark.ours
def test_a_container_must_be_in_its_pods_namespace(
    kubelet: Kubelet, pulled: str, volume: Path
) -> None:
    pod = kubelet.run_pod(config_of(kubelet, wanted=userns()))
    other = [api.IDMapping(host_id=300000, length=COUNT)]
    for wanted in (userns(uids=other), api.UserNamespace(mode=api.NODE)):
        wish = container_config(kubelet, pod, pulled, SLEEP)
        wish.linux.security_context.namespace_options.userns_options.CopyFrom(wanted)
        refused(kubelet, pod, wish, "userns_options")
    for wrong in (mount(volume, uidMappings=other, gidMappings=other), mount(volume)):
        wish = container_config(kubelet, pod, pulled, SLEEP)
        wrong.uidMappings.append(MAPPING)
        wish.mounts.append(wrong)
        refused(kubelet, pod, wish, "'/data'")
    wish = container_config(kubelet, pod, pulled, SLEEP)
    wish.linux.security_context.run_as_user.value = COUNT
    refused(kubelet, pod, wish, "run_as_user")
    both_ways = mount(volume, propagation=api.PROPAGATION_BIDIRECTIONAL)
    wish = container_config(kubelet, pod, pulled, SLEEP, mounts=[both_ways])
    refused(kubelet, pod, wish, "BIDIRECTIONAL")


def refused(kubelet: Kubelet, pod: Pod, wish: api.ContainerConfig, word: str) -> None:
    code, message = refusal(lambda: kubelet.create(pod, wish))
    assert (code, word in message) == (INVALID, True), message


def test_mappings_need_a_user_namespace(
    kubelet: Kubelet, pod: Pod, pulled: str, volume: Path
) -> None:
    mapped = mount(volume, uidMappings=[MAPPING], gidMappings=[MAPPING])
    refused(kubelet, pod, kubelet.container_config(pulled, SLEEP, mounts=[mapped]), "'/data'")


# -- the server ------------------------------------------------------------------------------------


@pytest.mark.ours
def test_status_tells_what_handlers_can(kubelet: Kubelet) -> None:
    answer = kubelet.runtime.Status(api.StatusRequest())
    features = {h.name: h.features for h in answer.runtime_handlers}
    assert features[""].user_namespaces
    assert features["runc"].user_namespaces
    assert features["runc"].recursive_read_only_mounts
    assert features["crun"].user_namespaces
    assert answer.features.user_namespaces_host_network


@pytest.mark.ours
def test_pods_survive_the_server(
    make_site: Callable[..., server.Site],
    client_of: Callable[[server.Site], Kubelet],
    reference: str,
    volume: Path,
) -> None:
    site = make_site()
    client = client_of(site)
    client.pull(reference)
    pod = client.run_pod(config_of(client, wanted=userns(), pid=api.POD))
    running = run(client, pod, reference, mounts=[mount(volume)])
    wish = container_config(client, pod, reference, SLEEP, mounts=[mount(volume)], name="later")
    created = client.create(pod, wish)
    site.kill()
    site.start()
    client = client_of(site)
    assert said(client, running, "stat -c %u /data/old; touch /data/new; id -u") == ["0", "0"]
    client.start(created)
    assert said(client, created, "ls /data; cat /proc/1/comm") == ["new", "old", "catatonit"]
    third = run(client, pod, reference, name="third", mounts=[mount(volume)])
    assert said(client, third, "stat -c %u /data/new") == ["0"]
    client.remove_pod(pod.id)
    assert sorted(p.name for p in volume.iterdir()) == ["new", "old"]


@pytest.mark.ours
def test_a_kill_while_copies_are_mounted_costs_no_file(
    make_site: Callable[..., server.Site],
    client_of: Callable[[server.Site], Kubelet],
    reference: str,
    volume: Path,
) -> None:
    site = make_site()
    client = client_of(site)
    client.pull(reference)
    pod = client.run_pod(config_of(client, wanted=userns()))
    wish = container_config(client, pod, reference, SLEEP, mounts=[mount(volume)])
    container = client.create(pod, wish)
    site.kill()
    (site.root / "containers" / f"{container}.json").unlink()  # so that recovery sweeps it
    site.start()
    assert not (site.state / "containers" / container).exists()
    assert [p.name for p in volume.iterdir()] == ["old"]
    client_of(site).remove_pod(pod.id)


@pytest.mark.ours
@pytest.mark.timeout(240)
def test_no_kill_costs_a_file_of_a_volume(
    make_site: Callable[..., server.Site],
    client_of: Callable[[server.Site], Kubelet],
    reference: str,
    volume: Path,
) -> None:
    """The server dies before each thing that it does to make and start a container."""
    site = make_site()
    client_of(site).pull(reference)
    trigger = site.home / "die-at"
    site.kill()
    site.program = (sys.executable, "-m", "tests.lab.crashing", os.fspath(trigger))
    site.start()
    steps = itertools.count(1)
    while killed_at(next(steps), site, client_of(site), reference, volume, trigger):
        assert [p.name for p in volume.iterdir()] == ["old"]
        assert os.fspath(site.state / "containers") not in Path("/proc/self/mountinfo").read_text()
    assert next(steps) > 8


def killed_at(
    step: int, site: server.Site, client: Kubelet, reference: str, volume: Path, trigger: Path
) -> bool:
    """Have the server die at this step, and see that the pod goes; False when there are fewer."""
    pod = client.run_pod(config_of(client, wanted=userns()))
    wish = container_config(client, pod, reference, SLEEP, mounts=[mount(volume)])
    trigger.write_text(str(step))
    with contextlib.suppress(grpc.RpcError):
        client.start(client.create(pod, wish))
        trigger.unlink()
        client.remove_pod(pod.id)
        return False
    site.wait_death()
    trigger.unlink()
    site.start()
    client.remove_pod(pod.id)
    return True


@pytest.mark.ours
def test_a_state_folder_that_others_cannot_reach_is_refused(
    make_site: Callable[..., server.Site], client_of: Callable[[server.Site], Kubelet]
) -> None:
    site = make_site()
    site.stop()
    site.home.chmod(0o700)
    site.start()
    client = client_of(site)
    handlers = client.runtime.Status(api.StatusRequest()).runtime_handlers
    assert not any(h.features.user_namespaces for h in handlers)
    code, message = refusal(lambda: client.run_pod(config_of(client, wanted=userns())))
    assert (code, f"chmod o+x {site.home}" in message) == (FAILED, True), message
    site.home.chmod(0o711)


@pytest.mark.ours
def test_more_layers_than_one_are_mapped(
    kubelet: Kubelet, make_pod: MakePod, registry: registry.Registry
) -> None:
    layers = ([image.Entry(name=f"layer{n}", data=b"x")] for n in range(3))
    reference = registry.push(image.busybox(*layers), "test/userns-layers")
    kubelet.pull(reference)
    container = run(kubelet, make_pod(), reference)
    assert said(kubelet, container, "stat -c %u /layer0 /layer1 /layer2 /bin/sh") == ["0"] * 4
    kubelet.remove_pod(kubelet_pod(kubelet, container).id)
    kubelet.remove_image(reference)
