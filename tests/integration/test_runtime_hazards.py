# SPDX-License-Identifier: Apache-2.0
"""What OCI runtimes have got wrong, tried through ours with what we generate (hazards.md §2.5).

The version that is installed may have these holes; what we hand to it must not open them. Versions
are named by `cri-server check` and at start (`cri_server/advisories.py`).

    V79d   CVE-2021-43784 needs mappings of user namespaces in the request: the kubelet's numbers
           are bounded (`test_hostile_users.py`); CVE-2025-24965 is krun's, which is not served
    V79e   V79f kata: issue 5; annotations: `test_hostile_requests.py`
"""

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import grpc
import pytest

from cri_server import advisories
from cri_server.pb import api_pb2 as api
from tests.lab import server, tars
from tests.lab.hostile import Attack

pytestmark = [
    pytest.mark.needs("root", "netns", "overlay", "cni", "runc", "docker-registry"),
    pytest.mark.ours,
]


def security(**context: object) -> api.LinuxContainerConfig:
    fields: dict[str, object] = {"security_context": context}
    return api.LinuxContainerConfig(**fields)  # type: ignore[arg-type]


def test_the_start_and_check_name_what_is_known_of_the_installed_version(
    site: server.Site,
) -> None:
    """A warning with the CVE and what to do, and never more than a warning."""
    said = subprocess.run(["runc", "--version"], capture_output=True, text=True, check=True).stdout
    known = advisories.names(advisories.known("runc", said.split()[2]))
    lines = [json.loads(line) for line in site.log.read_text().splitlines()]
    warned = {e["runtime"]: e for e in lines if "known vulnerabilities" in e["event"]}
    done = subprocess.run(
        [server.command(), "check", "--json", "--config", site.home / "config.toml"],
        capture_output=True,
        text=True,
        check=False,
    )
    found = {f["name"]: f for f in json.loads(done.stdout)}
    assert (warned["runc"]["vulnerabilities"] if known else []) == known
    assert ("runc" in warned, "security of runc" in found) == (bool(known), bool(known))
    for name, entry in warned.items():
        assert entry["level"] == "warning"
        assert "distribution" in entry["remedy"]
        assert found[f"security of {name}"]["status"] == "limited"
        assert all(
            cve in found[f"security of {name}"]["detail"] for cve in entry["vulnerabilities"]
        )


@pytest.mark.needs("catatonit")
@pytest.mark.parametrize("handler", ["runc", pytest.param("crun", marks=pytest.mark.needs("crun"))])
def test_v77_the_runtimes_program_is_not_overwritten(attack: Attack, handler: str) -> None:
    """Naive: the program of an exec is the runtime itself, which a container can open to write; of
    crun it is the copy from which the shims run it for all.
    """
    attack.handler = handler
    program = Path(shutil.which(handler) or handler).resolve()
    before = hashlib.sha256(program.read_bytes()).digest(), program.stat().st_ino
    attack.pod_config.linux.security_context.namespace_options.pid = api.POD
    script = (
        "while :; do for p in /proc/[0-9]*/exe; do (echo evil > $p) 2>/dev/null; done;"
        " for f in /proc/[0-9]*/fd/*; do [ -f $f ] && (echo evil > $f); done 2>/dev/null; done"
    )
    shebang = tars.file("evil", b"#!/proc/self/exe\n", mode=0o755)
    reference = attack.make(shebang)
    linux = security(namespace_options={"pid": api.POD})
    container = attack.keep(reference, "/bin/sh", "-c", script, linux=linux)
    for command in (["/proc/self/exe", "--version"], ["/evil"], ["true"], ["/proc/self/exe"]):
        try:
            attack.kubelet.exec_sync(container, command, timeout=10)
        except grpc.RpcError:
            continue
    attack.attempt(reference, command=["/proc/self/exe", "init"])
    attack.attempt(reference, command=["/evil"])
    assert attack.inside(container, "echo fine").strip() == "fine"
    assert (hashlib.sha256(program.read_bytes()).digest(), program.stat().st_ino) == before


def test_v78_a_sibling_that_swaps_a_mounts_target(attack: Attack, tmp_path: Path) -> None:
    """Naive: between the look and the mount the target becomes a link to the root of the host."""
    volume, source = tmp_path / "volume", tmp_path / "source"
    (volume / "t" / "sub").mkdir(parents=True)
    source.mkdir()
    shared = api.Mount(host_path=os.fspath(volume), container_path="/vol")
    path = attack.canary.path
    swap = (
        "cd /vol; while :; do rm -rf t; mkdir -p t/sub 2>/dev/null; rm -rf t/sub;"
        f" ln -s {path} t/sub; rm -rf t; ln -s {path} t; done"
    )
    reference = attack.make()
    attack.keep(reference, "/bin/sh", "-c", swap, mounts=[shared])
    inner = api.Mount(host_path=os.fspath(source), container_path="/vol/t/sub/new")
    for _ in range(12):
        attack.attempt(reference, "true", mounts=[shared, inner])
    assert list(source.iterdir()) == []
    if "CVE-2024-45310" in attack.site.log.read_text():  # of the runtime, and the server says so
        attack.canary.forgive_empty_folders()


@pytest.mark.parametrize("tty", [False, True])
def test_v79_links_where_devices_belong(attack: Attack, tty: bool) -> None:
    """Naive: what masks a path is the image's own link to a file of the host; the console too."""
    core_pattern = Path("/proc/sys/kernel/core_pattern")
    before = core_pattern.read_text()
    names = ("null", "console", "tty", "ptmx", "pts/0", "stdin", "fd", "shm", "mqueue", "core")
    targets = (os.fspath(attack.canary.token), os.fspath(core_pattern), "/proc/self/attr/exec")
    for target in targets:
        links = [tars.symlink(f"dev/{name}", target) for name in names]
        linux = security(masked_paths=["/proc/kcore", "/proc/timer_list", "/sys/firmware"])
        script = "cat /proc/timer_list; ls /sys/firmware; [ -c /dev/null ] && echo device"
        outcome = attack.attempt(attack.make(*links), script, tty=tty, linux=linux)
        assert [line.strip() for line in outcome.lines] == ["device"], outcome
    assert core_pattern.read_text() == before


@pytest.mark.parametrize("tty", [False, True])
def test_v79b_a_volume_over_dev(attack: Attack, tmp_path: Path, tty: bool) -> None:
    """Naive: without a fresh /dev console and standard streams follow the volume's links."""
    volume = tmp_path / "dev"
    volume.mkdir()
    for name in ("console", "null", "ptmx", "tty", "zero", "full", "random", "urandom", "fd"):
        (volume / name).symlink_to(attack.canary.token)
    mount = api.Mount(host_path=os.fspath(volume), container_path="/dev")
    outcome = attack.attempt(attack.make(User="1000"), "id -u", tty=tty, mounts=[mount])
    assert outcome.code is not None or outcome.lines[0].strip() == "1000"


def test_v79c_an_exec_is_of_the_containers_user(attack: Attack) -> None:
    """Naive: a number in the exec's command line is read as root."""
    container = attack.keep(attack.make(User="1:1"))
    script = "id -u; id -g; grep -E 'Cap(Eff|Prm)' /proc/self/status"
    none = "0000000000000000"
    said = attack.inside(container, script)
    assert said.split() == ["1", "1", "CapPrm:", none, "CapEff:", none]


def test_v79d_cgroups_and_devices_are_not_the_containers(attack: Attack) -> None:
    """Naive: cgroups can be written, and a device that is made can be opened."""
    numbers = os.stat("/dev/vda").st_rdev if os.path.exists("/dev/vda") else os.makedev(8, 0)
    disk = f"b {os.major(numbers)} {os.minor(numbers)}"
    script = f"""
exec 2>/dev/null
for f in $(find /sys/fs/cgroup -maxdepth 2 -name cgroup.procs); do
    d=${{f%/*}}
    mkdir $d/evil && echo made $d
    for f in cgroup.procs tasks release_agent notify_on_release; do
        (echo 1 > $d/$f) && echo wrote $d/$f
    done
done
mknod /disk {disk}; mknod /mem c 1 1; mknod /kmsg c 1 11; mknod /loop c 10 237
for f in /disk /mem /kmsg /loop; do
    (: < $f) && echo read $f
    (: >> $f) && echo wrote $f
done
mount -t tmpfs none /tmp && echo mounted
ls /disk /mem; echo end
"""
    linux = security(capabilities={"add_capabilities": ["MKNOD"]})
    outcome = attack.attempt(attack.make(), script, linux=linux)
    assert outcome.lines == ["/disk", "/mem", "end"]
