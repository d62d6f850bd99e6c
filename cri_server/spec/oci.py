# SPDX-License-Identifier: Apache-2.0
"""The parts of the OCI runtime spec 1.0.2 that we write: TypedDicts, because it is JSON.

Names are the spec's. Only what we produce is listed; `total=False` throughout, a key that is not
set is not written.
"""

from collections.abc import Mapping
from typing import TypedDict

LIMITS = ("cpu", "memory", "hugepageLimits", "unified")  # of Resources: what can be updated
VERSION = "1.0.2"  # crun 1.8 (Debian 12) refuses a newer one


class User(TypedDict, total=False):
    uid: int
    gid: int
    umask: int
    additionalGids: list[int]


class Capabilities(TypedDict):
    bounding: list[str]
    effective: list[str]
    permitted: list[str]
    inheritable: list[str]
    ambient: list[str]


class Rlimit(TypedDict):
    type: str
    soft: int
    hard: int


class Process(TypedDict, total=False):
    terminal: bool
    user: User
    args: list[str]
    env: list[str]
    cwd: str
    capabilities: Capabilities
    rlimits: list[Rlimit]
    noNewPrivileges: bool
    apparmorProfile: str
    selinuxLabel: str
    oomScoreAdj: int


class Root(TypedDict):
    path: str
    readonly: bool


class Mount(TypedDict):
    destination: str
    type: str
    source: str
    options: list[str]


class Namespace(TypedDict, total=False):
    type: str
    path: str


class IdMapping(TypedDict):
    containerID: int
    hostID: int
    size: int


class Device(TypedDict):
    path: str
    type: str
    major: int
    minor: int
    fileMode: int
    uid: int
    gid: int


class DeviceRule(TypedDict, total=False):
    allow: bool
    type: str
    major: int
    minor: int
    access: str


class Cpu(TypedDict, total=False):
    shares: int
    quota: int
    period: int
    cpus: str
    mems: str


class Memory(TypedDict, total=False):
    limit: int
    swap: int


class HugepageLimit(TypedDict):
    pageSize: str
    limit: int


class Pids(TypedDict):
    limit: int


class Resources(TypedDict, total=False):
    devices: list[DeviceRule]
    pids: Pids
    cpu: Cpu
    memory: Memory
    hugepageLimits: list[HugepageLimit]
    unified: dict[str, str]


class SyscallArg(TypedDict, total=False):
    index: int
    value: int
    valueTwo: int
    op: str


class SyscallRule(TypedDict, total=False):
    names: list[str]
    action: str
    errnoRet: int
    args: list[SyscallArg]


class Seccomp(TypedDict, total=False):
    defaultAction: str
    defaultErrnoRet: int
    architectures: list[str]
    syscalls: list[SyscallRule]


class Linux(TypedDict, total=False):
    namespaces: list[Namespace]
    uidMappings: list[IdMapping]
    gidMappings: list[IdMapping]
    devices: list[Device]
    sysctl: dict[str, str]
    cgroupsPath: str
    resources: Resources
    rootfsPropagation: str
    seccomp: Mapping[str, object] | Seccomp  # a Localhost profile is the administrator's own JSON
    maskedPaths: list[str]
    readonlyPaths: list[str]
    mountLabel: str


class Hook(TypedDict, total=False):
    path: str
    args: list[str]
    env: list[str]
    timeout: int


class Spec(TypedDict, total=False):
    ociVersion: str
    process: Process
    root: Root
    hostname: str
    mounts: list[Mount]
    annotations: dict[str, str]
    hooks: dict[str, list[Hook]]
    linux: Linux
