# SPDX-License-Identifier: Apache-2.0
"""The default seccomp profile, as data; tests/integration/test_spec_runs.py proves what it does."""

from collections.abc import Iterable

import pytest

from cri_server import spec
from cri_server.spec import oci, seccomp

ADMIN = frozenset({"CAP_SYS_ADMIN"})


def rules(profile: oci.Seccomp, name: str) -> list[oci.SyscallRule]:
    return [rule for rule in profile["syscalls"] if name in rule["names"]]


def allowed(profile: oci.Seccomp) -> set[str]:
    plain = (r for r in profile["syscalls"] if r["action"] == seccomp.ALLOW and "args" not in r)
    return {name for rule in plain for name in rule["names"]}


DENIED = """
io_uring_setup io_uring_enter io_uring_register keyctl add_key request_key kexec_load mount umount2
unshare setns bpf perf_event_open init_module clone3 socketcall socket personality pivot_root
nfsservctl open_by_handle_at userfaultfd reboot syslog chroot fsopen move_mount settimeofday acct
iopl mbind move_pages pidfd_getfd kcmp process_madvise swapon kexec_file_load vhangup
"""
NEEDED = """
getrandom cachestat map_shadow_stack fchmodat2 mseal futex_wait futex_wake futex_requeue futex_waitv
setxattrat getxattrat statmount listmount lsm_get_self_attr lsm_list_modules file_getattr rseq
epoll_pwait2 ptrace process_vm_readv landlock_restrict_self seccomp memfd_create close_range
"""
NEVER = """
io_uring_setup io_uring_enter io_uring_register keyctl add_key request_key kexec_load pivot_root
kexec_file_load swapon swapoff userfaultfd socketcall move_pages nfsservctl create_module sysfs
uselib ustat vm86 get_kernel_syms query_module
"""


def test_without_capabilities_these_are_not_simply_allowed() -> None:
    assert allowed(seccomp.default(frozenset(), "x86_64")) & set(DENIED.split()) == set()


@pytest.mark.parametrize("machine", ["x86_64", "aarch64", "riscv64"])
def test_what_libraries_and_languages_live_on_is_allowed(machine: str) -> None:
    assert set(NEEDED.split()) <= allowed(seccomp.default(frozenset(), machine))


def test_no_capability_brings_these() -> None:
    everything = seccomp.default(frozenset(spec.CAPABILITIES), "x86_64")
    assert allowed(everything) & set(NEVER.split()) == set()


@pytest.mark.parametrize(
    ("capability", "names"),
    [
        ("CAP_SYS_ADMIN", ["mount", "unshare", "setns", "clone", "clone3", "bpf", "fsopen"]),
        ("CAP_SYS_CHROOT", ["chroot"]),
        ("CAP_SYS_MODULE", ["init_module"]),
        ("CAP_SYS_TIME", ["settimeofday", "clock_settime"]),
        ("CAP_DAC_READ_SEARCH", ["open_by_handle_at"]),
        ("CAP_SYS_NICE", ["mbind", "set_mempolicy_home_node"]),
        ("CAP_SYS_PTRACE", ["kcmp", "pidfd_getfd", "process_madvise"]),
        ("CAP_BPF", ["bpf"]),
        ("CAP_PERFMON", ["perf_event_open"]),
        ("CAP_SYSLOG", ["syslog"]),
        ("CAP_SYS_BOOT", ["reboot"]),
    ],
)
def test_calls_come_with_their_capability(capability: str, names: Iterable[str]) -> None:
    assert set(names) <= allowed(seccomp.default(frozenset({capability}), "x86_64"))


def test_without_sys_admin_clone_is_masked_and_clone3_looks_missing() -> None:
    profile = seccomp.default(frozenset(), "x86_64")
    (clone,) = rules(profile, "clone")
    assert clone["args"][0]["op"] == "SCMP_CMP_MASKED_EQ"
    (clone3,) = rules(profile, "clone3")
    assert (clone3["action"], clone3["errnoRet"]) == (seccomp.ERRNO, seccomp.ENOSYS)
    (s390x,) = rules(seccomp.default(frozenset(), "s390x"), "clone")
    assert s390x["args"][0]["index"] == 1


def test_arguments_are_never_compared_in_a_way_that_a_high_bit_passes() -> None:
    """The kernel reads 32 bits where a filter compares 64: "greater than" could be fooled."""
    operators = {
        arg["op"]
        for held in (frozenset[str](), ADMIN)
        for rule in seccomp.default(held, "x86_64")["syscalls"]
        for arg in rule.get("args", ())
    }
    assert operators <= {"SCMP_CMP_EQ", "SCMP_CMP_LT", "SCMP_CMP_MASKED_EQ"}


def test_the_32_bit_way_to_sockets_is_denied_as_a_whole() -> None:
    for held in (frozenset[str](), ADMIN):
        (rule,) = rules(seccomp.default(held, "x86_64"), "socketcall")
        assert rule == {
            "names": ["socketcall"],
            "action": seccomp.ERRNO,
            "errnoRet": seccomp.ENOSYS,
        }


def test_the_architectures_are_the_machines_with_its_32_bit_sister() -> None:
    assert seccomp.default(ADMIN, "x86_64")["architectures"] == [
        "SCMP_ARCH_X86_64",
        "SCMP_ARCH_X86",
    ]
    assert seccomp.default(ADMIN, "aarch64")["architectures"] == [
        "SCMP_ARCH_AARCH64",
        "SCMP_ARCH_ARM",
    ]
    assert "architectures" not in seccomp.default(ADMIN, "riscv64")


def test_profiles_are_made_once_per_relevant_capability_set() -> None:
    one = seccomp.default(frozenset({"CAP_CHOWN"}), "x86_64")
    assert one is seccomp.default(frozenset({"CAP_KILL", "CAP_CHOWN"}), "x86_64")
    assert one is not seccomp.default(ADMIN, "x86_64")
