# SPDX-License-Identifier: Apache-2.0
"""The generated specs are accepted by runc and by crun, and do inside what they say."""

import contextlib
import dataclasses
import errno
import json
import os
import platform
import shutil
import subprocess
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from cri_server import cgroups as host_cgroups
from cri_server import host, rootfs, sources, spec
from cri_server.pb import api_pb2 as api
from tests.lab import bundle, cgroups, syscalls, waiting

pytestmark = pytest.mark.needs("root", "busybox")

PARENT = f"/cri-spec-{os.getpid()}"
SHOW = """
id; pwd; echo "env $HOME $HOSTNAME $PATH $GREETING"; ulimit -Sn; umask
grep -E '^(Cap|NoNewPrivs|Seccomp:)' /proc/self/status
cat /proc/self/oom_score_adj /data/file
touch /data/new 2>/dev/null && echo data writable
touch /new 2>/dev/null && echo root writable
echo x > /proc/sys/kernel/hostname 2>/dev/null && echo proc writable
mkdir /sys/fs/cgroup/x /sys/fs/cgroup/memory/x 2>/dev/null && echo cgroup writable
test -s /proc/timer_list && echo unmasked
ls /dev
"""


@pytest.fixture(params=[pytest.param(n, marks=pytest.mark.needs(n)) for n in ("runc", "crun")])
def runtime(hugetlb: None, request: pytest.FixtureRequest) -> str:
    """Return each OCI runtime in turn."""
    return str(request.param)


@pytest.fixture(scope="module")
def facts() -> spec.HostFacts:
    probed = host.probe(host_cgroups.detect(), {})
    return dataclasses.replace(probed.facts("runc"), recursive_read_only=True)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return bundle.rootfs(tmp_path / "root")


@dataclasses.dataclass(frozen=True)
class Runner:
    """Runs bundles with one OCI runtime and its own state folder."""

    runtime: str
    where: Path

    def command(self, *arguments: str) -> list[str]:
        return [self.runtime, "--root", str(self.where / "state"), *arguments]

    def run(self, document: spec.oci.Spec, *options: str) -> subprocess.CompletedProcess[bytes]:
        name = f"spec-{uuid.uuid4().hex}"
        folder = self.where / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(document))
        return subprocess.run(
            self.command("run", "--bundle", str(folder), *options, name),
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=30,
            check=False,
        )

    @contextlib.contextmanager
    def detached(self, document: spec.oci.Spec) -> Iterator[tuple[int, str]]:
        """Run a container in the background; yields the pid of its init, and its name."""
        name = f"spec-{uuid.uuid4().hex}"
        folder = self.where / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(document))
        pid_file = folder / "pid"
        command = self.command(
            "run", "-d", "--bundle", str(folder), "--pid-file", str(pid_file), name
        )
        try:
            with open(folder / "log", "wb") as log:
                subprocess.run(
                    command, check=True, stdin=subprocess.DEVNULL, stdout=log, stderr=log
                )
            yield int(pid_file.read_text()), name
        finally:
            subprocess.run(self.command("delete", "--force", name), check=False)


@pytest.fixture
def runner(runtime: str, tmp_path: Path) -> Iterator[Runner]:
    yield Runner(runtime=runtime, where=tmp_path)
    cgroups.remove(PARENT)


def config(args: Sequence[str], **linux: Any) -> api.ContainerConfig:
    return api.ContainerConfig(
        metadata=api.ContainerMetadata(name="web"),
        image=api.ImageSpec(image="sha256:1", user_specified_image="busybox"),
        command=args,
        linux=api.LinuxContainerConfig(**linux),
    )


def sandbox(**security: Any) -> api.PodSandboxConfig:
    return api.PodSandboxConfig(
        metadata=api.PodSandboxMetadata(name="pod", uid="1", namespace="default"),
        linux=api.LinuxPodSandboxConfig(
            security_context=api.LinuxSandboxSecurityContext(**security)
        ),
    )


def wanted(
    wish: api.ContainerConfig, root: Path, facts: spec.HostFacts, **changes: Any
) -> spec.ContainerInput:
    image = spec.ImageConfig(env=("GREETING=hello", "PATH=/bin", "HOME"), working_dir="/srv/work")
    pod = changes.pop("sandbox", sandbox())
    spec.validate_container(wish, pod, facts, image=image)
    plain = spec.ContainerInput(
        id="c1",
        pod_id="p1",
        config=wish,
        sandbox=pod,
        image=image,
        user=rootfs.resolve_user(str(root), spec.user_request(wish, image)),
        namespaces={"pid": "", "ipc": "", "uts": "", "network": ""},
        cgroups_path=f"{PARENT}/{uuid.uuid4().hex}",
        rootfs=str(root),
        pod_files=spec.PodFiles(),
        hostname="pod",
        host=facts,
    )
    return dataclasses.replace(plain, **changes)


def prepared(given: spec.ContainerInput) -> spec.oci.Spec:
    """Do to the root what the server does before any runtime sees it, and return the spec."""
    document = spec.container(given)
    document["mounts"] = rootfs.make_mountpoints(given.rootfs, document["mounts"], files=set())
    covered = [m["destination"] for m in document["mounts"]]
    rootfs.make_workdir(given.rootfs, document["process"]["cwd"], covered=covered)
    return document


def kubelet_like(data: Path) -> api.ContainerConfig:
    """What a kubelet sends for an ordinary restricted container, and somewhat more."""
    wish = config(
        ["/bin/sh", "-c", SHOW],
        resources=api.LinuxContainerResources(
            cpu_period=100000,
            cpu_quota=50000,
            cpu_shares=102,
            memory_limit_in_bytes=64 << 20,
            oom_score_adj=985,
            hugepage_limits=[api.HugepageLimit(page_size="2MB", limit=0)],
        ),
        security_context=api.LinuxContainerSecurityContext(
            capabilities=api.Capability(add_capabilities=["NET_ADMIN"], drop_capabilities=["all"]),
            run_as_user=api.Int64Value(value=1000),
            run_as_group=api.Int64Value(value=2000),
            supplemental_groups=[3000],
            readonly_rootfs=True,
            no_new_privs=True,
            masked_paths=["/proc/timer_list", "/proc/kcore", "/sys/firmware"],
            readonly_paths=["/proc/sys", "/proc/sysrq-trigger"],
            seccomp=api.SecurityProfile(profile_type=api.SecurityProfile.RuntimeDefault),
        ),
    )
    wish.mounts.add(container_path="/data", host_path=str(data), readonly=True)
    return wish


@pytest.mark.needs("netns")
def test_an_ordinary_container_is_as_the_kubelet_asked(
    runner: Runner, root: Path, facts: spec.HostFacts, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.mkdir(mode=0o777)
    (data / "file").write_text("content\n")
    done = runner.run(prepared(wanted(kubelet_like(data), root, facts)))
    lines = done.stdout.decode().splitlines()
    assert (done.returncode, lines[:5]) == (
        0,
        [
            "uid=1000 gid=2000 groups=2000,3000",
            "/srv/work",
            "env / pod /bin hello",
            "1024",
            "0022",
        ],
    ), done.stderr
    status = dict(line.split(":\t") for line in lines if ":\t" in line)
    assert status == {
        "CapInh": "0000000000000000",
        "CapPrm": "0000000000000000",
        "CapEff": "0000000000000000",
        "CapBnd": "0000000000001000",
        "CapAmb": "0000000000000000",
        "NoNewPrivs": "1",
        "Seccomp": "2",
    }
    assert {"985", "content", "null", "zero", "urandom", "tty", "pts", "shm", "mqueue"} <= set(
        lines
    )
    assert not [line for line in lines if "writable" in line or line == "unmasked"]


def test_a_privileged_container_may_do_all_and_sees_the_hosts_devices(
    runner: Runner, root: Path, facts: spec.HostFacts, tmp_path: Path
) -> None:
    wish = kubelet_like(tmp_path)
    (tmp_path / "file").write_text("content\n")
    context = api.LinuxContainerSecurityContext(
        privileged=True,
        seccomp=api.SecurityProfile(profile_type=api.SecurityProfile.RuntimeDefault),
        masked_paths=["/proc/timer_list"],
    )
    wish.linux.security_context.CopyFrom(context)
    given = wanted(
        wish,
        root,
        facts,
        sandbox=sandbox(privileged=True),
        host_devices=sources.host_devices(),
    )
    done = runner.run(prepared(given))
    lines = done.stdout.decode().splitlines()
    assert done.returncode == 0, done.stderr
    status = dict(line.split(":\t") for line in lines if ":\t" in line)
    assert spec.capability_names(int(status["CapEff"], 16)) == facts.capabilities
    assert status["Seccomp"] == "0"
    assert {"root writable", "proc writable"} <= set(lines)
    assert {Path(node.path).parts[2] for node in given.host_devices} <= set(lines)


def test_ambient_capabilities_reach_a_user_without_privileges(
    runner: Runner, root: Path, facts: spec.HostFacts
) -> None:
    wish = config(
        ["/bin/sh", "-c", "grep Cap /proc/self/status"],
        security_context=api.LinuxContainerSecurityContext(
            run_as_user=api.Int64Value(value=1000),
            capabilities=api.Capability(
                drop_capabilities=["ALL"], add_ambient_capabilities=["NET_BIND_SERVICE"]
            ),
        ),
    )
    done = runner.run(prepared(wanted(wish, root, facts)))
    status = dict(line.split(":\t") for line in done.stdout.decode().splitlines())
    assert done.returncode == 0, done.stderr
    assert (status["CapEff"], status["CapAmb"]) == ("0000000000000400", "0000000000000400")


def test_only_the_listed_devices_can_be_opened(
    runner: Runner, root: Path, facts: spec.HostFacts
) -> None:
    wish = config(["/bin/sh", "-c", "mknod /n b 7 0; ls /dev/listed; head -c1 /dev/listed; cat /n"])
    wish.devices.add(host_path="/dev/zero", container_path="/dev/listed", permissions="r")
    nodes = sources.device_nodes(spec.device_requests(wish))
    done = runner.run(prepared(wanted(wish, root, facts, devices=nodes)))
    assert done.stdout == b"/dev/listed\n\0", done.stderr
    assert b"cat: can't open '/n': Operation not permitted" in done.stderr


def test_a_recursive_read_only_mount_covers_what_is_mounted_below(
    runner: Runner, root: Path, facts: spec.HostFacts
) -> None:
    wish = config(["/bin/sh", "-c", "touch /host/shm/canary-rro"])
    wish.mounts.add(
        container_path="/host", host_path="/dev", readonly=True, recursive_read_only=True
    )
    done = runner.run(prepared(wanted(wish, root, facts)))
    assert b"Read-only file system" in done.stderr


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the program is x86-64 code")
def test_the_default_seccomp_profile_denies_what_it_should_by_every_entry(
    runner: Runner, root: Path, facts: spec.HostFacts
) -> None:
    af_alg, af_vsock, af_unix, af_inet = 38, 40, 1, 2
    expected = {
        syscalls.Call(41, (af_unix, 1)): "ok",
        syscalls.Call(41, (af_inet, 1)): "ok",
        syscalls.Call(41, (af_alg, 5)): errno.EPERM,
        syscalls.Call(41, (af_vsock, 1)): errno.EPERM,
        syscalls.Call(41, (1 << 32 | af_alg, 5)): errno.EPERM,  # the kernel reads 32 bits
        syscalls.Call(359, (af_alg, 5), legacy=True): errno.EPERM,
        syscalls.Call(102, (1, 0x400000), legacy=True): errno.ENOSYS,  # socketcall(SOCKET)
        syscalls.Call(272, (0x10000000,)): errno.EPERM,  # unshare(CLONE_NEWUSER)
        syscalls.Call(310, (0x10000000,), legacy=True): errno.EPERM,
        syscalls.Call(56, (0x10000000 | 17,)): errno.EPERM,  # clone(CLONE_NEWUSER)
        syscalls.Call(435, (0, 0)): errno.ENOSYS,  # clone3
        syscalls.Call(250, (0, 0)): errno.EPERM,  # keyctl
        syscalls.Call(425, (1, 0)): errno.EPERM,  # io_uring_setup
        syscalls.Call(321, (0, 0)): errno.EPERM,  # bpf
        syscalls.Call(165, (0, 0)): errno.EPERM,  # mount
        syscalls.Call(135, (0x40000,)): errno.EPERM,  # personality(ADDR_NO_RANDOMIZE)
        syscalls.Call(135, (0xFFFFFFFF,)): "ok",
        syscalls.Call(318, (0, 0)): "ok",  # getrandom
        syscalls.Call(101, (16, 0)): errno.ESRCH,  # ptrace(ATTACH, 0): allowed, and nobody there
        syscalls.Call(439, (100, 0)): errno.EFAULT,  # faccessat2: let through, the path is none
        syscalls.Call(39): "ok",  # getpid
    }
    program = root / "bin/calls"
    program.write_bytes(syscalls.program(list(expected)))
    program.chmod(0o755)
    wish = config(
        ["/bin/calls"],
        security_context=api.LinuxContainerSecurityContext(
            seccomp=api.SecurityProfile(profile_type=api.SecurityProfile.RuntimeDefault)
        ),
    )
    done = runner.run(prepared(wanted(wish, root, facts)))
    found = ["ok" if a >= 0 else -a for a in syscalls.answers(done.stdout)]
    assert dict(zip(expected, found, strict=True)) == expected, done.stderr


def test_the_sandbox_container_holds_a_pid_namespace_and_reaps_for_it(
    runner: Runner, root: Path, facts: spec.HostFacts, tmp_path: Path
) -> None:
    if shutil.which("catatonit") is None:
        pytest.skip("catatonit is not installed")
    empty = tmp_path / "sandbox"
    for name in ("proc", "dev", "sys"):
        (empty / name).mkdir(parents=True)
    (empty / "catatonit").touch()
    document = spec.sandbox(
        spec.SandboxInput(
            id="p1",
            config=sandbox(),
            rootfs=str(empty),
            init=str(shutil.which("catatonit")),
            namespaces={"ipc": "", "uts": "", "network": ""},
            cgroups_path=f"{PARENT}/{uuid.uuid4().hex}",
            host=facts,
        )
    )
    orphan = "(sleep 0.01 & exec true); sleep 0.1; ps -o pid,comm,stat; echo self $$"
    with runner.detached(document) as (pid, _):
        wish = config(["/bin/sh", "-c", orphan])
        given = wanted(
            wish, root, facts, namespaces={"pid": f"/proc/{pid}/ns/pid", "ipc": "", "uts": ""}
        )
        done = runner.run(prepared(given))
        waiting.until(lambda: _children(pid) == [], "the orphans of the pod are reaped")
    lines = done.stdout.decode().splitlines()
    assert done.returncode == 0, done.stderr
    assert any(line.split()[:2] == ["1", "catatonit"] for line in lines), lines
    assert "self 1" not in lines


def _children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def test_an_exec_runs_as_the_container_does(
    runner: Runner, root: Path, facts: spec.HostFacts, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    wish = kubelet_like(tmp_path)
    wish.command[:] = ["/bin/sleep", "60"]
    document = prepared(wanted(wish, root, facts))
    process = spec.process(
        spec.ExecInput(
            process=document["process"],
            cmd=("/bin/sh", "-c", "id; pwd; grep CapBnd /proc/self/status; umask"),
        )
    )
    (tmp_path / "process.json").write_text(json.dumps(process))
    with runner.detached(document) as (_, name):
        done = subprocess.run(
            runner.command("exec", "--process", str(tmp_path / "process.json"), name),
            capture_output=True,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    assert done.stdout.decode().splitlines() == [
        "uid=1000 gid=2000 groups=2000,3000",
        "/srv/work",
        "CapBnd:\t0000000000001000",
        "0022",
    ], done.stderr
