# SPDX-License-Identifier: Apache-2.0
"""`cri-server check`: what this host can and cannot do, and what to do about it.

    status    meaning                                              exit status
    ok        works
    limited   pods run, but not every field can be honoured        0
    missing   pods cannot run until the remedy is applied          1

Every finding comes from trying the thing or from the same facts that the server itself uses;
nothing is left behind.
"""

import asyncio
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import msgspec

from cri_server import (
    advisories,
    apparmor,
    cgroups,
    config,
    defaults,
    handler_set,
    handlers,
    host,
)
from cri_server.network import conf
from shim import linux, mounts

NEEDED_CONTROLLERS = ("cpu", "memory", "pids")
USEFUL_CONTROLLERS = ("cpuset", "hugetlb")
NEEDED_CAPABILITIES = ("CAP_SYS_ADMIN", "CAP_NET_ADMIN", "CAP_CHOWN", "CAP_MKNOD", "CAP_SYS_CHROOT")
TOOLS = {
    "catatonit": "pods that share one PID namespace need it: install catatonit",
    "iptables": "the portmap plugin needs it for host ports: install iptables",
}


NO_USERNS = "pods with hostUsers: false are refused"


class Status(StrEnum):
    OK = "ok"
    LIMITED = "limited"
    MISSING = "missing"


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One line of the report; `remedy` is empty when all is well."""

    name: str
    status: Status
    detail: str
    remedy: str = ""


async def run(settings: config.Config, *, as_json: bool) -> int:
    """Print the report and return the exit status."""
    findings = await look(settings)
    _print_json(findings) if as_json else _print(findings)
    return 1 if any(f.status is Status.MISSING for f in findings) else 0


async def look(settings: config.Config) -> list[Finding]:
    """Return a finding for everything that is looked at, in the order of the report."""
    hierarchy = cgroups.detect()
    now = await handler_set.load(settings)
    driver = cgroups.driver(settings.runtime.cgroup_driver)
    settings, reason = defaults.choose(settings, handler_set.named(now), hierarchy, driver)
    facts = host.probe(hierarchy, handler_set.named(now), places=settings.server)
    return [
        _kernel(facts),
        *_cgroups(facts, driver),
        *await asyncio.to_thread(_file_systems, settings.server.root),
        _user_namespaces(facts.no_user_namespaces),
        *_security(facts),
        *_runtimes(settings, facts, driver),
        *_drop_ins(settings, handler_set.with_shortfalls(now, facts)),
        _ok("default runtime", f"{settings.runtime.default}: {reason}"),
        *await asyncio.to_thread(lambda: list(_network(settings.network))),
        *await asyncio.to_thread(lambda: list(_networks(settings.network, now))),
        *_tools(),
    ]


def _kernel(facts: host.Host) -> Finding:
    if facts.kernel_version >= (5, 6):
        return _ok("kernel", facts.kernel)
    return _missing("kernel", f"{facts.kernel} has no openat2", "run Linux 5.6 or newer")


# -- cgroups -------------------------------------------------------------------------------------


def _cgroups(facts: host.Host, driver: str) -> Iterator[Finding]:
    yield _ok("cgroup mode", f"{facts.hierarchy.mode}, driver {driver}")
    found = " ".join(facts.controllers)
    lost = [c for c in NEEDED_CONTROLLERS if c not in facts.controllers]
    if lost:
        yield _missing(
            "cgroup controllers", found, f"enable {', '.join(lost)} (kernel command line)"
        )
    else:
        weak = [c for c in USEFUL_CONTROLLERS if c not in facts.controllers]
        remedy = f"limits of {', '.join(weak)} cannot be set: enable the controller" if weak else ""
        yield _limited_if("cgroup controllers", found, remedy)
    if not facts.swap_accounting:
        yield _limited("swap accounting", "off", "boot with swapaccount=1, or use cgroup v2")


# -- file systems --------------------------------------------------------------------------------


def _file_systems(root: Path) -> list[Finding]:
    """Try overlayfs where the images will be."""
    place = _nearest(root)
    with tempfile.TemporaryDirectory(prefix="cri-server-check-", dir=place) as name:
        return [_overlay(Path(name)), _mount_api()]


def _nearest(path: Path) -> Path:
    return next(p for p in (path, *path.parents) if p.is_dir())


def _overlay(directory: Path) -> Finding:
    lower, upper, work, merged = (directory / n for n in ("lower", "upper", "work", "merged"))
    for made in (lower, upper, work, merged):
        made.mkdir()
    try:
        mounts.overlay([str(lower)], str(upper), str(work), str(merged))
    except OSError as e:
        return _missing(
            "overlayfs", f"{directory.parent}: {e.strerror}", "put root on ext4 or xfs (ftype=1)"
        )
    try:
        os.setxattr(upper, "trusted.overlay.opaque", b"y")
    except OSError as e:
        return _missing(
            "overlayfs", f"trusted xattrs: {e.strerror}", "put root on a file system with xattrs"
        )
    finally:
        mounts.unmount(str(merged))
    return _ok("overlayfs", f"works on {directory.parent}")


def _mount_api() -> Finding:
    try:
        os.close(linux.fsopen("overlay"))
    except OSError as e:
        return _limited(
            "mount API", f"fsopen: {e.strerror}", "images of very many layers need Linux 5.2"
        )
    return _ok("mount API", "fsopen works")


def _user_namespaces(why_not: str) -> Finding:
    if why_not:
        return _limited("user namespaces", why_not, f"{NO_USERNS}, unless that is mended")
    return _ok("user namespaces", "pods can have their own; layers and volumes can be id-mapped")


# -- security ------------------------------------------------------------------------------------


def _security(facts: host.Host) -> Iterator[Finding]:
    lost = [c for c in NEEDED_CAPABILITIES if c not in facts.effective]
    if lost:
        yield _missing(
            "capabilities", f"without {', '.join(lost)}", "run as root with all capabilities"
        )
    else:
        yield _ok("capabilities", f"{len(facts.effective)} of {len(facts.known)}")
    if not facts.raises_limits:
        yield _limited(
            "CAP_SYS_RESOURCE",
            f"missing: no oom_score_adj below {facts.oom_score_adj}, no raised limits",
            "give the server CAP_SYS_RESOURCE",
        )
    yield _limited_if(
        "seccomp",
        "works" if facts.seccomp else "no",
        "" if facts.seccomp else "enable CONFIG_SECCOMP",
    )
    yield _apparmor(facts)
    yield _selinux(facts)


def _apparmor(facts: host.Host) -> Finding:
    if not facts.apparmor:
        remedy = "the default profile has no effect, other profiles are refused"
        return _limited("AppArmor", "not on this host", remedy)
    if not facts.apparmor_parser:
        detail = "enabled, but apparmor_parser is not installed"
        remedy = "pods that ask for the default profile run without one: install apparmor"
        return _limited("AppArmor", detail, remedy)
    return _ok("AppArmor", f"enabled, default profile {apparmor.NAME}")


def _selinux(facts: host.Host) -> Finding:
    if facts.selinux:
        return _ok("SELinux", "enabled, pods are labelled")
    if facts.selinux_lacks:
        detail = f"enabled, but its policy has no label {facts.selinux_lacks}"
        remedy = "no pod is labelled: install a policy for containers, see deploy/README.md"
        return _limited("SELinux", detail, remedy)
    return _limited("SELinux", "not on this host", "labels that pods ask for have no effect")


# -- runtimes, network, tools --------------------------------------------------------------------


def _runtimes(settings: config.Config, facts: host.Host, driver: str) -> Iterator[Finding]:
    if not facts.runtimes:
        yield _missing("OCI runtime", "none is installed", "install runc or crun")
    for name, found in facts.runtimes.items():
        default = " (default)" if name == settings.runtime.default else ""
        if found.error:
            status = Status.MISSING if default else Status.LIMITED
            yield Finding(
                name=f"runtime {name}{default}",
                status=status,
                detail=found.error,
                remedy=f"install {found.path} or correct [runtimes.{name}], its path and args",
            )
            continue
        features = "reports features" if found.features else "reports no features"
        yield _ok(f"runtime {name}{default}", f"{found.path} {found.version}, {features}")
        yield from vulnerabilities(name, found)
        yield from _quirks(name, facts, driver)


def _drop_ins(settings: config.Config, now: handler_set.HandlerSet) -> Iterator[Finding]:
    """What is wrong with files of conf.d, and with what the others ask for."""
    for problem in now.problems:
        lost = settings.runtime.default in now.refused and problem.handler in now.refused
        yield Finding(
            name=f"handler {problem.handler or problem.file}",
            status=Status.MISSING if lost else Status.LIMITED,
            detail=problem.message,
            remedy="correct or remove the drop-in" if problem.holds else "take the key away",
        )


def vulnerabilities(name: str, found: host.RuntimeFacts) -> Iterator[Finding]:
    """A warning, never an error: distributions fix what keeps its old version (advisories.py)."""
    for program in found.programs:
        if known := advisories.known(program.program, program.version):
            what = ", ".join(advisories.names(known))
            whose = f" of {program.path}" if program is not found else ""
            yield _limited(
                f"security of {name}",
                f"upstream version {program.version}{whose} has {what}",
                advisories.remedy(known),
            )


def _quirks(name: str, facts: host.Host, driver: str) -> Iterator[Finding]:
    """What a runtime is known to refuse on hosts like this one."""
    why_not = facts.why_no_user_namespaces(name)
    if why_not and why_not != facts.no_user_namespaces:
        yield _limited(f"{name}: user namespaces", why_not, NO_USERNS)
    forgotten = defaults.forgotten_limits(facts.runtimes[name], driver)
    if forgotten:
        yield _limited(f"{name} with systemd", forgotten, "install crun 1.8.6 or newer")
    refused = defaults.refused_hierarchy(facts.hierarchy)
    if facts.runtimes[name].program == "crun" and refused:
        yield _limited(
            f"{name} on hybrid cgroups",
            refused,
            "mount the v1 hierarchies: mount -t cgroup -o hugetlb cgroup /sys/fs/cgroup/hugetlb",
        )


def _network(settings: config.Network) -> Iterator[Finding]:
    directory = conf.Directory(settings.conf_dir)
    loaded = directory.load()
    for problem in loaded.skipped:
        yield _limited("CNI configuration", problem, "correct or remove the file")
    if loaded.chain is None:
        yield _missing(
            "CNI configuration",
            f"none in {settings.conf_dir}: only host-network pods run",
            f"install a network, or copy deploy/10-bridge.conflist to {settings.conf_dir}",
        )
        return
    yield _ok("CNI configuration", f"{loaded.chain.name} ({loaded.chain.path})")
    for plugin in loaded.chain.plugins:
        yield _plugin(plugin.type, settings.bin_dirs)


def _networks(settings: config.Network, now: handler_set.HandlerSet) -> Iterator[Finding]:
    """The networks of handlers that have their own."""
    for name, revision in now.current.items():
        place = handlers.place(revision.handler, settings)
        if place is not None:
            loaded = conf.Directory(*place).load()
            if loaded.chain is None:
                problem = "; ".join([f"none in {place}", *loaded.skipped])
                remedy = f"pods of {name} get no network: add a file, or correct runtimes.{name}"
                yield _limited(f"CNI configuration of {name}", problem, remedy)
            else:
                yield _ok(f"CNI configuration of {name}", f"{loaded.chain.name} ({place})")


def _plugin(name: str, bin_dirs: Iterable[Path]) -> Finding:
    found = shutil.which(name, path=os.pathsep.join(map(str, bin_dirs)))
    if found is None:
        where = ", ".join(map(str, bin_dirs))
        return _missing(
            f"CNI plugin {name}", f"not in {where}", "install containernetworking-plugins"
        )
    return _ok(f"CNI plugin {name}", found)


def _tools() -> Iterator[Finding]:
    for name, remedy in TOOLS.items():
        found = shutil.which(name)
        yield _limited_if(name, found or "not found", "" if found else remedy)


# -- the report ----------------------------------------------------------------------------------


def _ok(name: str, detail: str) -> Finding:
    return Finding(name=name, status=Status.OK, detail=detail)


def _limited(name: str, detail: str, remedy: str) -> Finding:
    return Finding(name=name, status=Status.LIMITED, detail=detail, remedy=remedy)


def _limited_if(name: str, detail: str, remedy: str) -> Finding:
    return _limited(name, detail, remedy) if remedy else _ok(name, detail)


def _missing(name: str, detail: str, remedy: str) -> Finding:
    return Finding(name=name, status=Status.MISSING, detail=detail, remedy=remedy)


def _print(findings: Iterable[Finding]) -> None:
    colour = {Status.OK: "32", Status.LIMITED: "33", Status.MISSING: "31"}
    for f in findings:
        mark = f"{f.status:<8}"
        mark = f"\x1b[{colour[f.status]}m{mark}\x1b[0m" if sys.stdout.isatty() else mark
        print(f"{mark} {f.name:<28} {f.detail}")
        if f.remedy:
            print(f"{'':<8} {'':<28} → {f.remedy}")


def _print_json(findings: list[Finding]) -> None:
    sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(findings), indent=2) + b"\n")
