# SPDX-License-Identifier: Apache-2.0
"""The names of the kernel's capabilities (capabilities(7)), and who has which without asking."""

from collections.abc import Iterable

# In the kernel's order: the position is the number (capabilities(7)).
ALL = tuple(
    f"CAP_{name}"
    for name in [
        "CHOWN",
        "DAC_OVERRIDE",
        "DAC_READ_SEARCH",
        "FOWNER",
        "FSETID",
        "KILL",
        "SETGID",
        "SETUID",
        "SETPCAP",
        "LINUX_IMMUTABLE",
        "NET_BIND_SERVICE",
        "NET_BROADCAST",
        "NET_ADMIN",
        "NET_RAW",
        "IPC_LOCK",
        "IPC_OWNER",
        "SYS_MODULE",
        "SYS_RAWIO",
        "SYS_CHROOT",
        "SYS_PTRACE",
        "SYS_PACCT",
        "SYS_ADMIN",
        "SYS_BOOT",
        "SYS_NICE",
        "SYS_RESOURCE",
        "SYS_TIME",
        "SYS_TTY_CONFIG",
        "MKNOD",
        "LEASE",
        "AUDIT_WRITE",
        "AUDIT_CONTROL",
        "SETFCAP",
        "MAC_OVERRIDE",
        "MAC_ADMIN",
        "SYSLOG",
        "WAKE_ALARM",
        "BLOCK_SUSPEND",
        "AUDIT_READ",
        "PERFMON",
        "BPF",
        "CHECKPOINT_RESTORE",
    ]
)

LINUX_4 = ALL[: ALL.index("CAP_AUDIT_READ") + 1]  # the last three came with 5.8 and 5.9

# containerd's, so that what ran there runs here.
DEFAULT = (
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SYS_CHROOT",
    "CAP_MKNOD",
    "CAP_AUDIT_WRITE",
    "CAP_SETFCAP",
)


def full(name: str) -> str:
    """Return "CAP_NET_ADMIN" for "net_admin" and the like; it need not be one."""
    upper = name.upper()
    return upper if upper.startswith("CAP_") else f"CAP_{upper}"


def chosen(names: Iterable[str]) -> tuple[str, ...]:
    """Return full names for the list of a configuration. Raises ValueError for an unknown one."""
    found = tuple(dict.fromkeys(map(full, names)))
    for name in found:
        if name not in ALL:
            raise ValueError(f"{name[:80]!r} is not a capability")
    return found
