# SPDX-License-Identifier: Apache-2.0
"""Our RuntimeDefault seccomp profile: what is not listed fails with EPERM.

The tables say which system calls a container may make. Left out on purpose, whoever asks: io_uring
(a kernel interface of its own, out of seccomp's sight), the keyrings (not namespaced), userfaultfd,
kexec and swap, old calls that no libc uses. clone3 answers ENOSYS, because its flags lie in memory
where a filter can't see them, and C libraries then fall back to clone.

Arguments are compared as 64 bits while the kernel reads most of them as 32, so a rule of the form
"all but these" could be passed by setting a high bit. Hence every rule on an argument here allows a
closed set of values, or masks.

Pure. Profiles are cached by capability set; callers must not change them.
"""

import functools
from collections.abc import Iterable

from cri_server.spec import oci

ALLOW, ERRNO = "SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO"
EPERM, ENOSYS = 1, 38

# x32 is not listed: its calls end in SIGSYS, as on a kernel built without it.
_ARCHITECTURES = {
    "x86_64": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
    "aarch64": ["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"],
}

_FILES = """
access chdir chmod chown chown32 close close_range copy_file_range creat dup dup2 dup3 epoll_create
epoll_create1 epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait epoll_wait_old eventfd
eventfd2 faccessat faccessat2 fadvise64 fadvise64_64 fallocate fanotify_mark fchdir fchmod fchmodat
fchmodat2 fchown fchown32 fchownat fcntl fcntl64 fdatasync fgetxattr file_getattr file_setattr
flistxattr flock fremovexattr fsetxattr fstat fstat64 fstatat64 fstatfs fstatfs64 fsync ftruncate
ftruncate64 futimesat getcwd getdents getdents64 getxattr getxattrat inotify_add_watch inotify_init
inotify_init1 inotify_rm_watch ioctl lchown lchown32 lgetxattr link linkat listxattr listxattrat
listmount llistxattr _llseek lremovexattr lseek lsetxattr lstat lstat64 mkdir mkdirat mknod mknodat
name_to_handle_at newfstatat _newselect open openat openat2 pipe pipe2 poll ppoll ppoll_time64
pread64 preadv preadv2 pselect6 pselect6_time64 pwrite64 pwritev pwritev2 read readahead readlink
readlinkat readv removexattr removexattrat rename renameat renameat2 rmdir select sendfile
sendfile64 setxattr setxattrat splice stat stat64 statfs statfs64 statmount statx symlink symlinkat
sync sync_file_range sync_file_range2 syncfs tee truncate truncate64 umask unlink unlinkat utime
utimensat utimensat_time64 utimes vmsplice write writev cachestat io_cancel io_destroy io_getevents
io_pgetevents io_pgetevents_time64 io_setup io_submit
"""
_MEMORY = """
brk madvise map_shadow_stack membarrier memfd_create memfd_secret mincore mlock mlock2 mlockall mmap
mmap2 mprotect mremap mseal msync munlock munlockall munmap pkey_alloc pkey_free pkey_mprotect
process_mrelease remap_file_pages
"""
_PROCESSES = """
alarm capget capset execve execveat exit exit_group fork get_robust_list get_thread_area getcpu
getegid getegid32 geteuid geteuid32 getgid getgid32 getgroups getgroups32 getitimer getpgid getpgrp
getpid getppid getpriority getrandom getresgid getresgid32 getresuid getresuid32 getrlimit getrusage
getsid gettid getuid getuid32 ioprio_get ioprio_set kill landlock_add_rule landlock_create_ruleset
landlock_restrict_self lsm_get_self_attr lsm_list_modules lsm_set_self_attr nice pause pidfd_open
pidfd_send_signal prctl prlimit64 process_vm_readv process_vm_writev ptrace restart_syscall rseq
rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait
rt_sigtimedwait_time64 rt_tgsigqueueinfo sched_get_priority_max sched_get_priority_min
sched_getaffinity sched_getattr sched_getparam sched_getscheduler sched_rr_get_interval
sched_rr_get_interval_time64 sched_setaffinity sched_setattr sched_setparam sched_setscheduler
sched_yield seccomp set_robust_list set_thread_area set_tid_address setfsgid setfsgid32 setfsuid
setfsuid32 setgid setgid32 setgroups setgroups32 setitimer setpgid setpriority setregid setregid32
setresgid setresgid32 setresuid setresuid32 setreuid setreuid32 setrlimit setsid setuid setuid32
sigaction sigaltstack signal signalfd signalfd4 sigpending sigprocmask sigreturn sigsuspend sysinfo
tgkill times tkill ugetrlimit uname vfork wait4 waitid waitpid
"""
_TIME = """
adjtimex clock_adjtime clock_adjtime64 clock_getres clock_getres_time64 clock_gettime
clock_gettime64 clock_nanosleep clock_nanosleep_time64 gettimeofday nanosleep time timer_create
timer_delete timer_getoverrun timer_gettime timer_gettime64 timer_settime timer_settime64
timerfd_create timerfd_gettime timerfd_gettime64 timerfd_settime timerfd_settime64
"""
_IPC = """
futex futex_requeue futex_time64 futex_wait futex_waitv futex_wake ipc mq_getsetattr mq_notify
mq_open mq_timedreceive mq_timedreceive_time64 mq_timedsend mq_timedsend_time64 mq_unlink msgctl
msgget msgrcv msgsnd semctl semget semop semtimedop semtimedop_time64 shmat shmctl shmdt shmget
"""
_NETWORK = """
accept accept4 bind connect getpeername getsockname getsockopt listen recv recvfrom recvmmsg
recvmmsg_time64 recvmsg send sendmmsg sendmsg sendto setsockopt shutdown socketpair
"""
_BY_MACHINE = {
    "x86_64": "arch_prctl modify_ldt uretprobe",
    "aarch64": "arm_fadvise64_64 arm_sync_file_range breakpoint cacheflush set_tls",
    "riscv64": "riscv_flush_icache riscv_hwprobe",
}
_WITH_SYS_ADMIN = """
bpf clone clone3 fanotify_init fsconfig fsmount fsopen fspick lookup_dcookie mount mount_setattr
move_mount open_tree open_tree_attr perf_event_open quotactl quotactl_fd setdomainname sethostname
setns syslog umount umount2 unshare
"""
_BY_CAPABILITY = {
    "CAP_BPF": "bpf",
    "CAP_DAC_READ_SEARCH": "open_by_handle_at",
    "CAP_PERFMON": "perf_event_open",
    "CAP_SYS_ADMIN": _WITH_SYS_ADMIN,
    "CAP_SYS_BOOT": "reboot",
    "CAP_SYS_CHROOT": "chroot",
    "CAP_SYS_MODULE": "delete_module finit_module init_module",
    "CAP_SYS_NICE": "get_mempolicy mbind set_mempolicy set_mempolicy_home_node",
    "CAP_SYS_PACCT": "acct",
    "CAP_SYS_PTRACE": "kcmp pidfd_getfd process_madvise",
    "CAP_SYS_RAWIO": "ioperm iopl",
    "CAP_SYS_TIME": "clock_settime clock_settime64 settimeofday stime",
    "CAP_SYS_TTY_CONFIG": "vhangup",
    "CAP_SYSLOG": "syslog",
}

# personality(2): Linux, 32-bit Linux, the same with a 2.6 version number, and "only ask". Others
# switch off hardening.
_PERSONALITIES = (0x0, 0x8, 0x20000, 0x20008, 0xFFFFFFFF)
# CLONE_NEW{NS,CGROUP,UTS,IPC,USER,PID,NET}; CLONE_NEWTIME overlaps with the exit signal and clone
# ignores it.
_CLONE_NAMESPACES = 0x7E020000
# All socket families below AF_ALG (38: local root exploits, CVE-2026-31431), then SMC and XDP; not
# AF_VSOCK (40: the hypervisor).
_AF_ALG = 38
_LATER_FAMILIES = (43, 44)


def default(held: frozenset[str], machine: str) -> oci.Seccomp:
    """Return the profile for a container with these capabilities on this machine (`uname -m`)."""
    return _default(held.intersection(_BY_CAPABILITY), machine)


@functools.lru_cache(maxsize=64)
def _default(held: frozenset[str], machine: str) -> oci.Seccomp:
    profile = oci.Seccomp(
        defaultAction=ERRNO,
        defaultErrnoRet=EPERM,
        syscalls=[_plain(held, machine), *_sockets(), *_personalities(), *_clones(held, machine)],
    )
    if machine in _ARCHITECTURES:  # elsewhere the OCI runtime takes the native one
        profile["architectures"] = _ARCHITECTURES[machine]
    return profile


def _plain(held: frozenset[str], machine: str) -> oci.SyscallRule:
    text = " ".join(
        (_FILES, _MEMORY, _PROCESSES, _TIME, _IPC, _NETWORK, _BY_MACHINE.get(machine, ""))
    )
    names = set(text.split())
    for capability in held:
        names.update(_BY_CAPABILITY[capability].split())
    return oci.SyscallRule(names=sorted(names), action=ALLOW)


def _sockets() -> Iterable[oci.SyscallRule]:
    yield _when(["socket"], index=0, op="SCMP_CMP_LT", value=_AF_ALG)
    for family in _LATER_FAMILIES:
        yield _when(["socket"], index=0, op="SCMP_CMP_EQ", value=family)
    # The 32-bit way to all socket calls hides the family in memory, and libseccomp lets it through
    # with any rule on "socket", unless it is denied as a whole. musl then calls socket itself; a
    # 32-bit glibc built for kernels before 4.3 does not (docs/troubleshooting.md).
    yield oci.SyscallRule(names=["socketcall"], action=ERRNO, errnoRet=ENOSYS)


def _personalities() -> Iterable[oci.SyscallRule]:
    for value in _PERSONALITIES:
        yield _when(["personality"], index=0, op="SCMP_CMP_EQ", value=value)


def _clones(held: frozenset[str], machine: str) -> Iterable[oci.SyscallRule]:
    if "CAP_SYS_ADMIN" in held:
        return
    index = 1 if machine == "s390x" else 0
    rule = _when(["clone"], index=index, op="SCMP_CMP_MASKED_EQ", value=_CLONE_NAMESPACES)
    rule["args"][0]["valueTwo"] = 0
    yield rule
    yield oci.SyscallRule(names=["clone3"], action=ERRNO, errnoRet=ENOSYS)


def _when(names: list[str], *, index: int, op: str, value: int) -> oci.SyscallRule:
    return oci.SyscallRule(
        names=names, action=ALLOW, args=[oci.SyscallArg(index=index, value=value, op=op)]
    )
