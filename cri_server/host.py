# SPDX-License-Identifier: Apache-2.0
"""What this host and its OCI runtimes can do: probed once at start, never assumed.

`probe` looks at the kernel (files of /proc and /sys, and one mount call that is refused or not),
`runtimes` asks each OCI runtime for its version and `features`. Status, the spec and `cri-server
check` all read the same facts.
"""

import asyncio
import contextlib
import os
import platform
import re
import resource
import shutil
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

from cri_server import (
    apparmor,
    capability,
    cgroups,
    commands,
    config,
    errors,
    limits,
    selinux_host,
    spec,
    userns,
)
from shim import linux

_COMPLAINT = 200  # characters
_PATIENCE = 5.0  # seconds for an answer: all handlers wait at start for one that gives none
_THIS_KERNEL = ("runc", "crun", "youki")  # programs whose containers share the host's kernel
_HUGEPAGES = Path("/sys/kernel/mm/hugepages")
_SIZES = {"KB": 1 << 10, "MB": 1 << 20, "GB": 1 << 30}


@dataclass(frozen=True, kw_only=True, slots=True)
class RuntimeFacts:
    """One OCI runtime: `error` says why it cannot be used; `features` is its own JSON, {} when it
    has none. `program` is what it calls itself, whatever its file is called. Of a containerd shim,
    `below` is the OCI runtime that it runs, where that is known.
    """

    path: str
    program: str = ""
    version: str = ""
    features: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""
    below: "RuntimeFacts | None" = None

    @property
    def programs(self) -> tuple["RuntimeFacts", ...]:
        """This program and those that it runs."""
        return (self, *(self.below.programs if self.below else ()))

    @property
    def recursive_read_only(self) -> bool:
        return "rro" in self.features.get("mountOptions", ())

    @property
    def user_namespaces(self) -> bool:
        """Whether it joins a user namespace."""
        if self.old_crun:
            return True
        return "user" in self.features.get("linux", {}).get("namespaces", ())

    @property
    def logs_system_calls(self) -> bool:
        """Whether it knows the seccomp action SCMP_ACT_LOG; crun does since 0.13 (libseccomp)."""
        actions = self.features.get("linux", {}).get("seccomp", {}).get("actions", ())
        return "SCMP_ACT_LOG" in actions or self.old_crun

    @property
    def capabilities(self) -> frozenset[str]:
        """What it can give to a process; it fails on others. A runsc without `features` (2022:
        unknown capability "CAP_PERFMON") knows those of Linux 4.
        """
        if listed := self.features.get("linux", {}).get("capabilities"):
            return frozenset(listed)
        return frozenset(capability.LINUX_4 if self.program == "runsc" else capability.ALL)

    @property
    def old_crun(self) -> bool:
        """crun without `features`, as Debian 12 has it: it joins user namespaces, but in one its
        bind mounts are never recursive.
        """
        return not self.features and os.path.basename(self.path) == "crun"


@dataclass(frozen=True, kw_only=True)
class Host:
    """The facts of the kernel and of our own rights. `no_user_namespaces`: see `userns.why_not`;
    `no_seccomp_log`: why the kernel logs no system calls, "" if it does. `runtimes` has the facts
    of handlers, by name and by the key of their revision. `selinux` is None without SELinux, and
    where its policy has no label for containers; `selinux_lacks` is that label.
    """

    kernel: str
    hierarchy: cgroups.Hierarchy
    controllers: tuple[str, ...]
    seccomp: bool
    apparmor: bool
    apparmor_parser: str
    selinux: spec.SelinuxPolicy | None
    selinux_lacks: str
    effective: frozenset[str]
    bounding: frozenset[str]
    known: frozenset[str]
    oom_score_adj: int
    swap_accounting: bool
    hugepage_sizes: frozenset[str]
    runtimes: Mapping[str, RuntimeFacts] = field(default_factory=dict)
    no_user_namespaces: str = ""
    no_seccomp_log: str = ""

    @property
    def kernel_version(self) -> tuple[int, int]:
        found = re.match(r"(\d+)\.(\d+)", self.kernel)
        return (int(found[1]), int(found[2])) if found else (0, 0)

    @property
    def raises_limits(self) -> bool:
        """CAP_SYS_RESOURCE: may lower oom_score_adj and raise hard limits."""
        return "CAP_SYS_RESOURCE" in self.effective

    def recursive_read_only(self, handler: str) -> bool:
        """Recursive read-only mounts need mount_setattr (Linux 5.12) and a runtime that knows
        "rro".
        """
        facts = self.runtimes.get(handler)
        return facts is not None and facts.recursive_read_only and self.kernel_version >= (5, 12)

    def why_no_user_namespaces(self, handler: str) -> str:
        """Return why pods of a handler cannot have user namespaces of their own, "" if they can.

        Volumes with mappings are ours to make (`idmap`); the runtime need not know them.
        """
        if self.kernel_version < userns.LAYERS:
            needed = ".".join(map(str, userns.LAYERS))
            return f"overlayfs takes no id-mapped layers before Linux {needed}"
        runtime = self.runtimes.get(handler)
        if not self.no_user_namespaces and runtime and not runtime.user_namespaces:
            return f"{runtime.path} does not list user namespaces among its features"
        return self.no_user_namespaces

    def why_no_seccomp_audit(self, handler: str) -> str:
        """Return why what seccomp would deny cannot be logged instead, "" if it can."""
        runtime = self.runtimes.get(handler)
        if not self.no_seccomp_log and runtime and not runtime.logs_system_calls:
            return f"{runtime.path} does not list SCMP_ACT_LOG among its features"
        return self.no_seccomp_log

    def _cgroup_mount(self, runtime: RuntimeFacts | None) -> str:
        """Return the one mount of cgroup v2, if it can be bound into containers of this runtime: a
        kernel of their own would take it for its own.
        """
        here = runtime is not None and any(p.program in _THIS_KERNEL for p in runtime.programs)
        return str(self.hierarchy.mounts.get("", "")) if here else ""

    @cached_property
    def _facts(self) -> dict[str, spec.HostFacts]:
        return {}

    def facts(self, handler: str) -> spec.HostFacts:
        """Return what the spec functions need to know, for containers of one handler."""
        if handler not in self._facts:
            self._facts[handler] = self._spec_facts(handler)
        return self._facts[handler]

    def _spec_facts(self, handler: str) -> spec.HostFacts:
        runtime = self.runtimes.get(handler)
        return spec.HostFacts(
            machine=platform.machine(),
            kernel=self.kernel_version,
            capabilities=self.bounding & runtime.capabilities if runtime else self.bounding,
            known_capabilities=self.known,
            cgroup_v2=self.hierarchy.mode == "v2",
            cgroup_mount=self._cgroup_mount(runtime),
            oom_score_adj_floor=-1000 if self.raises_limits else self.oom_score_adj,
            seccomp=self.seccomp,
            apparmor=self.apparmor,
            apparmor_default=apparmor.NAME if self.apparmor and self.apparmor_parser else "",
            selinux=self.selinux,
            swap_accounting=self.swap_accounting,
            hugepage_sizes=self.hugepage_sizes,
            recursive_read_only=self.recursive_read_only(handler),
            no_user_namespaces=self.why_no_user_namespaces(handler),
            shallow_binds=runtime is not None and runtime.old_crun,
            rlimit_ceilings=_rlimit_ceilings(raised=self.raises_limits),
            memory=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        )


def probe(
    hierarchy: cgroups.Hierarchy,
    found: Mapping[str, RuntimeFacts],
    *,
    places: config.Server | None = None,
) -> Host:
    """Look at the kernel and at this process; with `places` also at what can be mounted there.

    Blocks for some milliseconds, leaves nothing.
    """
    controllers = hierarchy.controllers()
    known = _known_capabilities()
    selinux = selinux_host.policy() if selinux_host.enabled() else None
    lacks = selinux_host.lacking(selinux) if selinux else ""
    return Host(
        kernel=os.uname().release,
        hierarchy=hierarchy,
        controllers=controllers,
        seccomp="Seccomp:" in Path("/proc/self/status").read_text(),
        apparmor=apparmor.supported(),
        apparmor_parser=apparmor.parser(),
        selinux=None if lacks else selinux,
        selinux_lacks=lacks,
        effective=_names(linux.effective_capabilities(), known),
        bounding=_names(linux.bounding_capabilities(), known),
        known=frozenset(known),
        oom_score_adj=int(_first_line("/proc/self/oom_score_adj") or 0),
        swap_accounting=_swap_accounting(hierarchy),
        hugepage_sizes=hugepage_sizes(_HUGEPAGES) if "hugetlb" in controllers else frozenset(),
        runtimes=found,
        no_user_namespaces=userns.why_not(places.root, places.state) if places else "",
        no_seccomp_log=_why_no_seccomp_log(),
    )


async def runtimes(handlers: Mapping[str, config.Handler]) -> dict[str, RuntimeFacts]:
    """Ask the OCI runtime of every handler for its version and features; all at once."""
    found = await asyncio.gather(*(_runtime(h) for h in handlers.values()))
    return dict(zip(handlers, found, strict=True))


async def _runtime(handler: config.Handler) -> RuntimeFacts:
    """Ask a runtime with the handler's own flags, so that one that it does not know is noticed."""
    binary = shutil.which(handler.path)
    if binary is None:
        return RuntimeFacts(path=handler.path, error="not found: install it or set its path")
    if handler.kind == "shim":
        return await _shim(binary, handler)
    return await _command_line(binary, *handler.args)


async def _command_line(binary: str, *args: str) -> RuntimeFacts:
    """Ask a program with runc's command line."""
    try:
        version = await commands.run([binary, *args, "--version"], timeout=_PATIENCE)
        features = await commands.run([binary, "features"], timeout=_PATIENCE, check=False)
    except commands.Failed as e:
        return RuntimeFacts(path=binary, error=_complaint(e))
    except (commands.TimedOut, OSError) as e:
        return RuntimeFacts(path=binary, error=str(e))
    said = version.stdout.decode(errors="replace")
    if not re.search(r"\d", said.partition("\n")[0]):
        return RuntimeFacts(path=binary, error=f"asked for its version it says {said[:60]!r}")
    return RuntimeFacts(
        path=binary,
        program=said.partition(" ")[0],
        version=_version(said),
        features=_features(features.stdout) if features.returncode == 0 else {},
    )


async def _shim(binary: str, handler: config.Handler) -> RuntimeFacts:
    """Ask a containerd shim for its version, and the runtime below it for all that it says; that
    one says nothing is no reason not to use it.
    """
    name = await asyncio.to_thread(_below, handler)
    runtime = shutil.which(name) if name else None
    if name and runtime is None:
        return RuntimeFacts(path=binary, error=f"its runtime {name} is not found")
    version, below = await asyncio.gather(_shim_version(binary), _asked(runtime))
    return RuntimeFacts(
        path=binary,
        program="kata" if handler.dialect == "kata" else os.path.basename(binary),
        version=version,
        features=below.features if below and handler.dialect == "runc" else {},
        below=below,
    )


def _below(handler: config.Handler) -> str:
    """Return the OCI runtime that a containerd shim runs, "" for one that runs none, or that says
    it nowhere. runsc's has the name in its file (gVisor pkg/shim/v1/runsc/options.go).
    """
    if handler.dialect == "runc":
        return handler.shim_options.get("BinaryName", "") or "runc"
    if handler.dialect != "runsc":
        return ""
    told: Mapping[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        told = tomllib.loads(Path(handler.shim_options.get("ConfigPath", "")).read_text())
    return str(told.get("binary_name", "")) or "runsc"


async def _asked(runtime: str | None) -> RuntimeFacts | None:
    return await _command_line(runtime) if runtime else None


async def _shim_version(binary: str) -> str:
    try:
        said = (await commands.run([binary, "-v"], timeout=_PATIENCE)).stdout
    except (commands.Failed, commands.TimedOut, OSError):
        return ""
    return _version(said.decode(errors="replace"))


async def check_runtime(name: str, handler: config.Handler, known: RuntimeFacts | None) -> None:
    """Raise FailedPrecondition, with handler, program and reason, for a runtime that could not be
    used when the server started and still cannot.
    """
    if known is not None and known.error and (error := (await _runtime(handler)).error):
        raise errors.FailedPrecondition(f"handler {name}: {handler.path}: {error}")


def _complaint(failed: commands.Failed) -> str:
    """Return the first line that a program said, for after it comes how it is used."""
    said = failed.finished.stderr.decode(errors="replace").strip()
    return said.partition("\n")[0][:_COMPLAINT] or failed.message


def _version(text: str) -> str:
    found = re.search(r"[Vv]ersion[ :]+v?(\S+)", text)
    return found[1] if found else text.partition("\n")[0].strip()


def _features(text: bytes) -> dict[str, Any]:
    try:
        found = msgspec.json.decode(text)
    except msgspec.DecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def _why_no_seccomp_log() -> str:
    """Look at /proc/sys/kernel/seccomp: what is not among the actions logged leaves no line."""
    for name in ("actions_avail", "actions_logged"):
        path = f"/proc/sys/kernel/seccomp/{name}"
        if "log" not in _first_line(path).split():
            return f"{path} does not list log"
    return ""


def _known_capabilities() -> tuple[str, ...]:
    last = int(_first_line("/proc/sys/kernel/cap_last_cap") or len(spec.CAPABILITIES) - 1)
    return spec.CAPABILITIES[: last + 1]


def _names(bits: int, known: tuple[str, ...]) -> frozenset[str]:
    return frozenset(name for n, name in enumerate(known) if bits >> n & 1)


def _swap_accounting(hierarchy: cgroups.Hierarchy) -> bool:
    if hierarchy.mode == "v2":
        return Path("/proc/swaps").exists()
    memory = hierarchy.v1.get("memory")
    return memory is not None and (memory / "memory.memsw.limit_in_bytes").exists()


def hugepage_sizes(folder: Path) -> frozenset[str]:
    """Return the sizes that the kernel lists, as CRI and the files of cgroups name them."""
    sizes = (int(p.name.split("-")[1][:-2]) for p in folder.glob("hugepages-*kB"))
    return frozenset(_size_name(kilobytes << 10) for kilobytes in sizes)


def _size_name(size: int) -> str:
    unit = next(u for u in ("GB", "MB", "KB") if size >= _SIZES[u])
    return f"{size // _SIZES[unit]}{unit}"


def _rlimit_ceilings(*, raised: bool) -> dict[str, int]:
    """Return what no hard limit can be above; fs.nr_open holds for CAP_SYS_RESOURCE too."""
    open_files = int(_first_line("/proc/sys/fs/nr_open") or limits.UNLIMITED)
    if raised:
        return {"RLIMIT_NOFILE": open_files}
    names = [n for n in dir(resource) if n.startswith("RLIMIT_") and n != "RLIMIT_OFILE"]
    hard = {n: resource.getrlimit(getattr(resource, n))[1] for n in names}
    finite = {n: limit for n, limit in hard.items() if limit != resource.RLIM_INFINITY}
    return finite | {"RLIMIT_NOFILE": min(open_files, finite.get("RLIMIT_NOFILE", open_files))}


def _first_line(path: str) -> str:
    try:
        return Path(path).read_text().strip().partition("\n")[0]
    except OSError:
        return ""
