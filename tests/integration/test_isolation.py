# SPDX-License-Identifier: Apache-2.0
"""What keeps containers apart from the host and from each other by default (hazards.md §2.2).

Groups are in `test_hostile_users.py`, sysctls and annotations in `test_hostile_requests.py`. Each
test says what a naive runtime does.
"""

import contextlib
import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from cri_server.pb import api_pb2 as api
from tests.fakes import registry
from tests.lab import faults, syscalls, tars
from tests.lab.hostile import Attack

pytestmark = [
    pytest.mark.needs("root", "netns", "overlay", "cni", "runc", "docker-registry"),
    pytest.mark.ours,
]
INVALID = grpc.StatusCode.INVALID_ARGUMENT
EPERM = -1
KUBELETS_MASKS = [
    *(
        f"/proc/{n}"
        for n in ("asound", "acpi", "kcore", "keys", "timer_list", "sched_debug", "scsi")
    ),
    *("/proc/interrupts", "/sys/firmware", "/sys/devices/virtual/powercap", "/sys/fs"),
]


def security(**context: object) -> api.LinuxContainerConfig:
    fields: dict[str, object] = {"security_context": context}
    return api.LinuxContainerConfig(**fields)  # type: ignore[arg-type]


# -- rights ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["default", "all", "added", "privileged"])
def test_v28_no_capability_is_inheritable(attack: Attack, kind: str) -> None:
    """Naive: the inheritable set is like the others, and any file with capabilities gives them."""
    attack.pod_config.linux.security_context.privileged = kind == "privileged"
    adds = {"all": ["ALL"], "added": ["NET_ADMIN", "SYS_PTRACE"]}.get(kind, [])
    capabilities = {"add_capabilities": adds, "drop_capabilities": []}
    linux = security(capabilities=capabilities, privileged=kind == "privileged")
    container = attack.keep(attack.make(), linux=linux)
    none = "CapInh:\t0000000000000000\n"
    init = Path(f"/proc/{faults.pid_of(attack.kubelet, container)}/status").read_text()
    assert none in init
    assert attack.inside(container, "grep CapInh /proc/self/status") == none
    assert attack.inside(container, "grep CapAmb /proc/self/status") == none.replace("Inh", "Amb")


def test_v29_a_file_over_hosts_is_not_relabelled(attack: Attack) -> None:
    """Naive: whatever is mounted on the runtime's own files gets the container's SELinux label,
    asked or, as here, not. Where that is enforced, the container then cannot see the file.
    """
    mounts = [
        api.Mount(
            host_path=os.fspath(attack.canary.folder / "ptmx"),
            container_path=f"/etc/{name}",
            readonly=True,
        )
        for name in ("hosts", "resolv.conf", "hostname")
    ]
    outcome = attack.attempt(attack.make(), "stat -c %s /etc/hosts", mounts=mounts)
    seen = outcome.lines == [str(len(attack.canary.word))]
    assert outcome.code is INVALID or seen or "Permission denied" in outcome.text


@pytest.mark.parametrize("entry", ["syscall", "socketcall"])
def test_v32_the_default_profile_denies_dangerous_sockets(attack: Attack, entry: str) -> None:
    """Naive: AF_ALG and AF_VSOCK are sockets like others, or are denied in one of two doors."""
    families = (38, 40)  # AF_ALG, AF_VSOCK
    if entry == "syscall":
        calls = [syscalls.Call(41, (family, 5, 0)) for family in families]
    else:
        calls = [syscalls.Call(102, (1, 0x400000), legacy=True)]  # SYS_SOCKET, any arguments
    probe = tars.file("probe", syscalls.program(calls), mode=0o755)
    profile = {"profile_type": api.SecurityProfile.RuntimeDefault}
    outcome = attack.attempt(
        attack.make(probe), "/probe | od -An -v -td4 -w48", linux=security(seccomp=profile)
    )
    answers = [int(line.split()[0]) for line in outcome.lines]
    assert len(answers) == len(calls)
    assert set(answers) <= {EPERM, -38}, answers


@pytest.mark.parametrize("text", ["", "null", "{}", "[]", '{"defaultAction": ""}', "0", None])
def test_v33_a_profile_that_is_none_is_not_unconfined(
    attack: Attack, tmp_path: Path, text: str | None
) -> None:
    """Naive: an empty name, a missing or an empty file means that there is nothing to apply."""
    path = tmp_path / "profile.json"
    if text is not None:
        path.write_text(text)
    reference = attack.make()
    local = api.SecurityProfile.Localhost
    for wanted in (
        {"seccomp": {"profile_type": local, "localhost_ref": os.fspath(path)}},
        {"seccomp_profile_path": f"localhost/{path}"},
        {"seccomp": {"profile_type": local, "localhost_ref": ""}},
        {"seccomp_profile_path": "localhost/"},
        {"apparmor": {"profile_type": local, "localhost_ref": ""}},
        {"apparmor": {"profile_type": local, "localhost_ref": "localhost/"}},
    ):
        outcome = attack.attempt(reference, "true", linux=security(**wanted))
        assert outcome.code is INVALID, wanted


@pytest.mark.parametrize("target", ["/proc", "/proc/self/attr", "/proc/sys", "/way", "/way/self"])
def test_v34_no_volume_stands_in_for_proc(attack: Attack, target: str) -> None:
    """Naive: the label goes into a plain file of a volume, and the container has none."""
    mount = api.Mount(host_path=attack.canary.path, container_path=target, readonly=True)
    reference = attack.make(tars.symlink("way", "/proc"))
    outcome = attack.attempt(reference, "true", mounts=[mount])
    assert outcome.code is not None, outcome


# -- place -----------------------------------------------------------------------------------------


@pytest.mark.needs("catatonit")
def test_v30_v38_a_pod_is_in_its_cgroup_and_its_monitor_is_not(attack: Attack) -> None:
    """Naive: some process of the pod escapes its limits, or the monitor dies by them."""
    options = attack.pod_config.linux.security_context.namespace_options
    options.pid = api.POD
    linux = security(namespace_options={"pid": api.POD})
    container = attack.keep(attack.make(), linux=linux)
    attack.inside(container, "sleep 4711 >/dev/null 2>&1 &")
    parent = attack.pod_config.linux.cgroup_parent
    pids = [faults.pid_of(attack.kubelet, container), *faults.processes("sleep", "4711")]
    init = Path(f"/proc/{pids[0]}/ns/pid").readlink()
    shim = faults.shim_of(attack.site, attack.pod.id)
    pids += [p for p in faults.children(shim) if Path(f"/proc/{p}/ns/pid").readlink() == init]
    assert len(set(pids)) >= 3  # the container, the exec, the pod's init
    for pid in set(pids):
        assert _cgroups(pid) >= {"memory", "pids", "cpu"}
        assert all(path.startswith(parent + "/") for path in _paths(pid)), _paths(pid)
    assert not [path for path in _paths(shim) if path.startswith(parent)]


def _cgroups(pid: int) -> set[str]:
    lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    held = {name for line in lines for name in line.split(":")[1].split(",")}
    return held if held > {""} else {"memory", "pids", "cpu"}  # v2 names none


def _paths(pid: int) -> list[str]:
    """Return the cgroups of a process, but those of hierarchies that no runtime uses."""
    lines = [line.split(":", 2) for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines()]
    only = len(lines) == 1
    return [path for _, names, path in lines if only or (names and not names.startswith("name="))]


def test_v31_what_the_kubelet_masks_tells_nothing(attack: Attack) -> None:
    """Naive: the energy counters of the processor (powercap) can be read, and what it computes."""
    linux = security(masked_paths=KUBELETS_MASKS, readonly_paths=["/proc/sys"])
    script = (
        "cat /proc/timer_list /proc/interrupts; find /sys/devices/virtual/powercap /sys/fs -type f"
    )
    outcome = attack.attempt(attack.make(), script, linux=linux)
    said = [line for line in outcome.lines if "No such file" not in line]
    assert said == []
    assert Path("/proc/interrupts").read_bytes()


@pytest.mark.parametrize("host", [False, True], ids=["pod", "host network"])
def test_v35_a_shims_socket_is_out_of_reach(attack: Attack, host: bool) -> None:
    """Naive: the socket is abstract, and whoever shares the host's network can give orders."""
    if host:
        attack.pod_config.linux.security_context.namespace_options.network = api.NODE
        attack.pod_config.hostname = ""
    container = attack.keep(attack.make())
    ours = [attack.site.pid, *faults.children(attack.site.pid)]
    ours += [faults.shim_of(attack.site, attack.pod.id)]
    held = {name for pid in ours for name in faults.descriptors(pid) if name.startswith("socket:")}
    lines = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    bound = {line[7]: line[6] for line in lines if f"socket:[{line[6]}]" in held and line[7:]}
    assert os.fspath(attack.site.state / "pods" / attack.pod.id / "shim.sock") in bound
    assert [name for name in bound if name.startswith("@")] == []
    for name in bound:
        assert "No such file" in attack.inside(container, f"ls -d {name} {attack.site.home}")
        assert stat.S_IMODE(os.stat(name).st_mode) & 0o077 == 0


def test_v36_nobody_else_enters_our_folders(attack: Attack) -> None:
    """Naive: any user of the host runs a setuid program out of an image, and is root."""
    reference = attack.make(tars.file("bin/evil", b"#!/bin/sh\n", mode=0o4755))
    attack.keep(reference)
    site = attack.site
    mode = stat.S_IMODE(site.home.stat().st_mode)
    site.home.chmod(0o755)  # as /var/lib and /run are
    try:
        assert stat.S_IMODE(site.root.stat().st_mode) == 0o700
        closed = [p for name in ("pods", "containers") for p in (site.state / name).iterdir()]
        assert len(closed) == 2
        assert [p for p in closed if p.stat().st_mode & 0o007] == []
        for folder in (site.root, site.state, *closed):
            tried = subprocess.run(
                ["find", folder, "-name", "evil"], capture_output=True, user=65534, check=False
            )
            assert tried.returncode != 0
            assert b"evil" not in tried.stdout
    finally:
        site.home.chmod(mode)
    assert b"evil" in subprocess.run(["find", site.root, "-name", "evil"], capture_output=True,
                                     check=True).stdout  # fmt: skip


# -- secrets ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [403, 307])
def test_v37_credentials_and_signatures_are_in_no_error_and_no_log(
    attack: Attack, evil_registry: registry.Registry, status: int
) -> None:
    """Naive: the URL of a redirect, with its signature, is in the message; or the password is."""
    secrets = ["pass-5c1f7", "signature-88a1", "dG9rZW4tc2VjcmV0", "session-4b2"]
    where = (
        f"http://{evil_registry.address}/elsewhere?X-Amz-Signature={secrets[1]}&sig={secrets[2]}"
    )
    away = registry.Say(307, {"Location": where, "Set-Cookie": f"id={secrets[3]}"})
    evil_registry.add_image("app", "v1", b"layer")
    evil_registry.on("/v2/app/blobs/", away)
    evil_registry.on("/elsewhere", registry.Say(status, {"Location": where}, b"denied"))
    auth = api.AuthConfig(username="mallory", password=secrets[0])
    before = attack.site.log.stat().st_size
    with pytest.raises(grpc.RpcError) as refused:
        attack.kubelet.pull("evil.test/app:v1", auth=auth)
    with attack.site.log.open("rb") as log:
        log.seek(before)
        written = log.read().decode()
    assert "/elsewhere" in "".join(evil_registry.paths())
    said = (refused.value.details() or "") + written
    assert [s for s in secrets if s in said] == []


# -- what ends with the pod ------------------------------------------------------------------------


def test_v38_ipc_objects_end_with_the_pod(attack: Attack) -> None:
    """Naive: shared memory outlives the pod, and the next one reads it."""
    make = tars.file("ipc", syscalls.program([syscalls.Call(29, (0, 4096, 0o1666))]), mode=0o755)
    reference = attack.make(make)
    container = attack.keep(reference)
    attack.inside(container, f"/ipc >/dev/null; echo {attack.pod.id} > /dev/shm/{attack.pod.id}")
    assert attack.inside(container, "ls /dev/shm; tail -n +2 /proc/sysvipc/shm").count("\n") == 2
    namespace = os.readlink(f"/proc/{faults.pid_of(attack.kubelet, container)}/ns/ipc")
    attack.kubelet.remove_pod(attack.pod.id)
    assert attack.pod.id not in Path("/proc/self/mountinfo").read_text()
    assert namespace not in set(_namespaces())
    again = attack.kubelet.run_pod()
    script = "ls /dev/shm; tail -n +2 /proc/sysvipc/shm"
    assert attack.attempt(reference, script, pod=again).lines == []
    assert attack.pod.id not in os.listdir("/dev/shm")


def _namespaces() -> Iterator[str]:
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it has ended
            yield os.readlink(f"/proc/{pid}/ns/ipc")


def test_v39_v78_a_link_in_a_volume_moves_no_mount(attack: Attack, tmp_path: Path) -> None:
    """Naive: the target of the second mount is followed out of the first, to the host."""
    volume = tmp_path / "volume"
    volume.mkdir()
    (volume / "link").symlink_to(attack.canary.path)
    (volume / "climb").symlink_to("../" * 20 + attack.canary.path)
    source = tmp_path / "source"
    source.mkdir()
    (source / "mine").touch()
    outer = api.Mount(host_path=os.fspath(volume), container_path="/vol")
    for target in ("/vol/link", "/vol/link/new", "/vol/climb/folder", "/vol/link/token"):
        inner = api.Mount(host_path=os.fspath(source), container_path=target)
        outcome = attack.attempt(attack.make(), f"ls {target}", mounts=[outer, inner])
        assert outcome.code is not None or outcome.lines == ["mine"], (target, outcome)
    assert sorted(p.name for p in volume.iterdir()) == ["climb", "link"]
