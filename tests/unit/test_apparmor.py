# SPDX-License-Identifier: Apache-2.0
"""The AppArmor profile as text; tests/integration/test_apparmor.py proves what it does."""

import asyncio
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from cri_server import apparmor, errors

LETTER = re.compile(r"\[\^(.+?)\]|\*\*|.")


def denied(path: str) -> bool:
    """Return whether a rule of the profile denies writing to `path`."""
    rules = re.findall(r"^  deny (/\S+) (\w+),$", apparmor.profile(), re.M)
    return any(_matches(glob, path) for glob, access in rules if "w" in access)


def _matches(glob: str, path: str) -> bool:
    parts = (
        m[0] if m[1] else ".*" if m[0] == "**" else re.escape(m[0]) for m in LETTER.finditer(glob)
    )
    return re.fullmatch("".join(parts), path) is not None


@pytest.mark.parametrize(
    "path",
    [
        "/proc/sysrq-trigger",
        "/proc/sys/kernel/core_pattern",
        "/proc/sys/kernel/shadow",
        "/proc/sys/vm/drop_caches",
        "/proc/sys/net/ipv4/ip_forward",
        "/proc/kcore",
        "/proc/slabinfo",
        "/proc/irq/0/smp_affinity",
        "/proc/acpi/x",
        "/sys/firmware/efi/vars",
        "/sys/kernel/uevent_helper",
        "/sys/kernel/security/apparmor/.load",
        "/sys/devices/virtual/powercap/intel-rapl/enabled",
        "/sys/fs/selinux/enforce",
        "/sys/module/x/parameters/y",
        "/sys/fs/ext4/sda/x",
    ],
)
def test_the_kernels_files_are_not_written(path: str) -> None:
    assert denied(path)


@pytest.mark.parametrize(
    "path",
    [
        "/proc/1/oom_score_adj",
        "/proc/42/attr/exec",
        "/proc/9999/task/9999/comm",
        "/proc/sys/kernel/shmmax",
        "/proc/sys/kernel/shm_rmid_forced",
        "/sys/fs/cgroup/memory.max",
        "/etc/passwd",
        "/process/x",
        "/system",
    ],
)
def test_a_containers_own_files_are_left_alone(path: str) -> None:
    assert not denied(path)


@pytest.mark.needs("apparmor_parser")
@pytest.mark.parametrize("abi", [False, True])
@pytest.mark.parametrize("daemon", ["unconfined", "/usr/bin/cri-server", "snap.k8s.daemon"])
def test_the_parser_compiles_the_profile(daemon: str, abi: bool) -> None:
    if abi and not apparmor.ABI.exists():
        pytest.skip("this host's parser knows no pinned features")
    done = subprocess.run(
        [apparmor.parser(), "--skip-kernel-load", "--skip-cache", "--stdout"],
        input=apparmor.profile(daemon=daemon, abi=abi).encode(),
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert apparmor.NAME.encode() in done.stdout
    assert not abi or b"abi" not in done.stderr


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a list of loaded profiles to which the apparmor_parser on PATH adds ours."""
    profiles = tmp_path / "profiles"
    profiles.write_text("docker-default (enforce)\nother profile (complain)\n")
    program = tmp_path / "apparmor_parser"
    program.write_text(
        f'#!/bin/sh\necho "$@" >>{tmp_path}/calls; cat >{tmp_path}/policy\n'
        f"echo 'cri-server-default (enforce)' >>{profiles}\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return profiles


def test_our_profile_is_loaded_once_and_again_when_it_was_unloaded(kernel: Path) -> None:
    async def provide() -> None:
        host = apparmor.AppArmor(kernel)
        await asyncio.gather(*(host.provide(apparmor.NAME) for _ in range(5)))
        await host.provide("other profile")
        os.truncate(kernel, 0)
        await host.provide(apparmor.NAME)

    asyncio.run(provide())
    calls = (kernel.parent / "calls").read_text().splitlines()
    assert calls == ["--replace --skip-cache"] * 2
    assert "profile cri-server-default" in (kernel.parent / "policy").read_text()


def test_a_profile_of_somebody_else_is_never_loaded(kernel: Path) -> None:
    with pytest.raises(errors.InvalidArgument, match="apparmor: profile 'docker' is not loaded"):
        asyncio.run(apparmor.AppArmor(kernel).provide("docker"))
    assert not (kernel.parent / "calls").exists()


def test_a_profile_that_cannot_be_loaded_fails_with_the_parsers_words(kernel: Path) -> None:
    (kernel.parent / "apparmor_parser").write_text("#!/bin/sh\necho no access >&2; exit 243\n")
    with pytest.raises(errors.Internal, match="apparmor_parser failed with 243: no access"):
        asyncio.run(apparmor.AppArmor(kernel).provide(apparmor.NAME))


def test_every_sender_of_signals_is_named_once() -> None:
    text = apparmor.profile(daemon="unconfined")
    assert text.count('signal (receive) peer="unconfined",') == 1
    assert 'signal (receive) peer="me",' in apparmor.profile(daemon="me")


def test_the_probe_says_what_the_kernel_says() -> None:
    mounted = apparmor.PROFILES.exists()
    assert apparmor.supported() in (mounted, False)
    assert bool(apparmor.parser()) == (shutil.which("apparmor_parser") is not None)
    assert mounted or apparmor.loaded() == frozenset()
