# SPDX-License-Identifier: Apache-2.0
"""Images whose configuration or files try to steer the server (hazards.md §2.1; users are in
`test_hostile_users.py`).

Every image comes out of a registry, and every attack would succeed against a runtime that does what
the first line of its test says. `attack` looks at the canary, at the server's patience and at what
stays behind, after each.
"""

import os
import shutil
from concurrent import futures
from pathlib import Path

import grpc
import pytest

from cri_server.pb import api_pb2 as api
from tests.integration.conftest import ClientOf, MakeSite
from tests.lab import faults, hostile, image, server, tars
from tests.lab.hostile import Attack

pytestmark = [
    pytest.mark.needs("root", "netns", "overlay", "cni", "runc", "docker-registry"),
    pytest.mark.ours,
]
INVALID = grpc.StatusCode.INVALID_ARGUMENT
CLIMB = "/.." * 20


# -- volumes and labels ----------------------------------------------------------------------------


def test_v01_a_volume_of_the_image_is_a_folder_of_its_own(attack: Attack) -> None:
    """Naive: the path is joined to the root, and what is there is copied into the volume."""
    for volume in (f"{CLIMB}{attack.canary.path}", "/way", "/way/folder"):
        reference = attack.make(tars.symlink("way", attack.canary.path), Volumes={volume: {}})
        outcome = attack.attempt(reference, f"cat {volume}/token; ls -a {volume}; echo end")
        assert outcome.lines[-1:] == ["end"]
        assert "token" not in [line.strip() for line in outcome.lines]


def test_v02_labels_of_the_image_are_no_orders(attack: Attack) -> None:
    """Naive: they become labels of the container, one of which names a program for its log."""
    program = f"binary://{attack.canary.bite}"
    names = ("containerd.io/restart.loguri", "io.containerd.log-uri", "io.kubernetes.cri.log-path")
    reference = attack.make(Labels=dict.fromkeys(names, program), Cmd=["sleep", "60"])
    container = attack.keep(reference)
    status = attack.kubelet.status(container)
    assert dict(status.labels) == {"io.kubernetes.container.name": status.metadata.name}
    assert str(attack.canary.bite) not in str(attack.spec(container))


# -- environment -----------------------------------------------------------------------------------


def test_v10_a_variable_without_a_value_is_not_the_servers(attack: Attack) -> None:
    """Naive: an entry without "=" is looked up in the server's environment; "*" takes it all."""
    bare = ["CRI_TESTS_SECRET", "*", "CRI_TESTS_*", "$CRI_TESTS_SECRET", ""]
    reference = attack.make(Env=[image.PATH, *bare])
    names = [line.partition("=")[0] for line in attack.attempt(reference, "env").lines]
    assert set(names) <= {"PATH", "HOME", "HOSTNAME", "PWD", "SHLVL"}
    assert "CRI_TESTS_SECRET" in Path(f"/proc/{attack.site.pid}/environ").read_text()


def test_v11_containers_that_start_together_have_their_own_environments(attack: Attack) -> None:
    """Naive: the image's variables are one list, and every container appends to it."""
    reference, _ = attack.make(Env=[image.PATH, "SHARED=yes"]), attack.pod

    def run(number: int) -> hostile.Outcome:
        envs = [api.KeyValue(key=f"OWN_{number}", value=b"1")]
        return attack.attempt(reference, "env", name=f"together-{number}", envs=envs)

    with futures.ThreadPoolExecutor(8) as pool:
        for number, outcome in enumerate(pool.map(run, range(8))):
            own = [line for line in outcome.lines if line.startswith("OWN_")]
            assert own == [f"OWN_{number}=1"]
            assert "SHARED=yes" in outcome.lines


# -- working folder --------------------------------------------------------------------------------

LINKS = ["/proc/self/fd/7", "/proc/self/fd/8/../../..", "//proc/./self/fd/9/", "/way", "/way/..",
         "/proc/thread-self/fd/7", "/proc/1/root", "/proc/self/cwd", "/proc/self/root"]  # fmt: skip


@pytest.mark.parametrize("by", ["image", "request"])
def test_v12_a_working_folder_is_no_link_of_a_process(attack: Attack, by: str) -> None:
    """Naive: runc enters a folder of the host by a descriptor that it has left open."""
    way = tars.symlink("way", "/proc/self/fd/7")
    script = f"cat ../../../../../../..{attack.canary.token} 2>&1; pwd"
    for path in LINKS:
        reference = attack.make(way, WorkingDir=path if by == "image" else "")
        outcome = attack.attempt(reference, script, working_dir=path if by == "request" else "")
        assert outcome.code is INVALID or outcome.lines[-1:] in (["/"], ["/proc"]), (path, outcome)


def test_v12_a_working_folder_that_becomes_a_link_does_not_lead_an_exec_out(
    attack: Attack,
) -> None:
    """Naive: the same for an exec, after the container has changed the folder."""
    container = attack.keep(attack.make(WorkingDir="/work"))
    for number in range(3, 12):
        attack.inside(container, f"cd /; rm -rf /work; ln -s /proc/self/fd/{number} /work")
        command = ["cat", f"../../../../../..{attack.canary.token}"]
        try:
            answer = attack.kubelet.exec_sync(container, command, timeout=10)
        except grpc.RpcError:
            attack.kubelet.remove(container)  # its own folder is gone for good: no more execs
            return
        assert attack.canary.word.encode() not in answer.stdout


def test_v12_no_descriptor_leads_out(attack: Attack) -> None:
    """Naive: what the server or the shim has open is inherited."""
    container = attack.keep(attack.make())
    script = "for f in /proc/self/fd/*; do readlink $f; done"
    for text in (attack.inside(container, script), "\n".join(attack.attempt(
        attack.make(), script).lines)):  # fmt: skip
        outside = [
            line for line in text.splitlines() if not line.startswith(("pipe:", "/dev/null"))
        ]
        assert all(line.startswith("/proc/") for line in outside), outside


def test_v13_a_working_folder_is_made_inside(attack: Attack) -> None:
    """Naive: the missing folder is made, and given to the user, behind the link."""
    links = [tars.symlink("way", attack.canary.path), tars.symlink("deep/way", "../way")]
    for path in ("/way/new", "/way", "/deep/way/new/er"):
        outcome = attack.attempt(attack.make(*links, WorkingDir=path, User="1000"), "pwd")
        inside = path.removeprefix("/deep").removeprefix("/way")
        assert outcome.lines == [attack.canary.path + inside]


# -- file systems of the kernel, and files of the pod ----------------------------------------------


@pytest.mark.parametrize("name", ["dev", "proc", "sys"])
def test_v14_a_kernel_folder_that_is_a_link(attack: Attack, name: str) -> None:
    """Naive: runc deletes `ptmx` and makes its links and devices in the folder of the host."""
    way = tars.symlink("way", attack.canary.path)
    for target in (attack.canary.path, f"..{CLIMB}{attack.canary.path}", "etc", "way"):
        link = tars.symlink(name, target)
        outcome = attack.attempt(attack.make(tars.whiteout(name), way, link), "true")
        assert outcome.code is INVALID, target
        assert f"/{name}" in outcome.message


@pytest.mark.parametrize("name", ["mtab", "hosts", "resolv.conf", "hostname"])
def test_v15_a_file_that_runtimes_make_is_a_link(attack: Attack, name: str) -> None:
    """Naive: the file is made where the link leads, on the host."""
    for target in (attack.canary.path, f"..{CLIMB}{attack.canary.path}"):
        link = tars.symlink(f"etc/{name}", f"{target}/new")
        outcome = attack.attempt(attack.make(link), f"cat /etc/{name} >/dev/null; echo ran")
        assert outcome.code is INVALID or outcome.lines[-1:] == ["ran"]


def test_v16_no_mount_of_a_path_that_the_image_chose(attack: Attack) -> None:
    """Naive: a helper mounts what the link points to, or onto it."""
    names = ("run/secrets", "etc/crypto-policies/back-ends", "etc/system-fips")
    links = [tars.symlink(name, attack.canary.path) for name in names]
    outcome = attack.attempt(attack.make(*links), "cat /proc/mounts")
    binds = [m["source"] for m in outcome.spec["mounts"] if m["type"] == "bind"]
    assert binds
    assert all(source.startswith(os.fspath(attack.site.state)) for source in binds)
    assert attack.canary.path not in outcome.text


def test_v17_nothing_of_the_image_runs_on_the_host(attack: Attack) -> None:
    """Naive: a helper is run with the image as its root or path, or loads a library from it."""
    bite = attack.canary.program
    programs = (
        "runc",
        "tar",
        "unpigz",
        "ldconfig",
        "newuidmap",
        "iptables",
        "catatonit",
        "nsenter",
    )
    evil = [tars.file(f"{d}/{p}", bite, mode=0o755) for d in ("sbin", "usr/bin") for p in programs]
    libraries = [tars.file(f"lib/x86_64-linux-gnu/{n}", bite, mode=0o755)
                 for n in ("libnss_files.so.2", "libc.so.6", "libseccomp.so.2")]  # fmt: skip
    preload = tars.file("etc/ld.so.preload", b"/lib/evil.so\n")
    container = attack.keep(attack.make(*evil, *libraries, preload, User="tester"))
    assert attack.inside(container, "id -un") == "tester\n"


def test_v18_the_environment_of_an_image_reaches_no_program_of_the_host(
    make_site: MakeSite, client_of: ClientOf, reference: str, tmp_path: Path,
    registry: object, attack: Attack,
) -> None:  # fmt: skip
    """Naive: a hook or the runtime inherits LD_PRELOAD or PATH of the image."""
    folder = attack.canary.path
    evil = [f"LD_PRELOAD={folder}/bite", f"PATH={folder}", f"BASH_ENV={folder}/bite",
            f"LD_LIBRARY_PATH={folder}", f"GCONV_PATH={folder}", f"ENV={folder}/bite"]  # fmt: skip
    image_name = attack.make(Env=evil)
    there = tmp_path / "odd"
    there.mkdir()
    recorded = there / "environment"
    settings = faults.handler(there, run=f"env > {recorded}", exec=f"env >> {recorded}")
    client = client_of(make_site(**settings))
    client.pull(image_name)
    pod = client.run_pod(handler=faults.ODD)
    container = client.run(pod, image_name, ["/bin/sleep", "60"])
    client.exec_sync(container, ["/bin/true"])
    said = recorded.read_text()
    assert said
    assert folder not in said
    assert server.SECRET not in said


# -- layers ----------------------------------------------------------------------------------------


def test_v19_an_image_without_layers_has_an_empty_root_of_its_own(
    attack: Attack, tmp_path: Path
) -> None:
    """Naive: there is no overlay, so the root is a plain folder that all such containers share."""
    reference = attack.pull(image.image([], {"Env": [image.PATH]}))
    box = tmp_path / "box"
    box.mkdir()
    shutil.copy2(image.busybox_path(), box / "sh")
    mounts = [api.Mount(host_path=os.fspath(box), container_path="/box", readonly=True)]
    command = ["/box/sh", "-c", ": > /mine; echo *"]
    for _ in range(2):
        outcome = attack.attempt(reference, command=command, mounts=mounts)
        assert outcome.lines == ["box dev etc mine proc sys"], outcome
    assert list((attack.site.root / "empty").iterdir()) == []
    nothing = attack.attempt(reference, command=["/bin/sh"])
    assert nothing.code is not None


@pytest.mark.parametrize("readonly", [False, True])
def test_v20_a_volume_that_exists_gets_nothing_from_the_image(
    attack: Attack, tmp_path: Path, readonly: bool
) -> None:
    """Naive: what the image has at the mount's target is copied into an empty volume."""
    volume = tmp_path / "volume"
    volume.mkdir()
    files = [tars.folder("data"), tars.file("data/evil", b"evil", mode=0o4755)]
    mount = api.Mount(host_path=os.fspath(volume), container_path="/data", readonly=readonly)
    outcome = attack.attempt(attack.make(*files, Volumes={"/data": {}}), "ls /data", mounts=[mount])
    assert outcome.lines == []
    assert list(volume.iterdir()) == []
