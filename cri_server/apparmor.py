# SPDX-License-Identifier: Apache-2.0
"""AppArmor profiles: ours, loaded when a container first needs it, and whether others are loaded.

The profile is the third wall around a container, behind capabilities and seccomp: it keeps root in
a container from the files of /proc and /sys through which the host is steered, from mounts, and
from processes outside. Its name is NAME; one of that name that is loaded already stays as it is, so
an administrator can bring their own. It lives in the kernel until the next boot, whatever becomes
of us; loading it twice does no harm.

That a pod asks for it is decided in `spec.security`; the OCI runtime applies it.
"""

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path

import structlog

from cri_server import commands, errors, spec
from cri_server.pb import api_pb2 as api

log = structlog.get_logger()
NAME = "cri-server-default"
ENABLED = Path("/sys/module/apparmor/parameters/enabled")
PROFILES = Path("/sys/kernel/security/apparmor/profiles")
ABI = Path("/etc/apparmor.d/abi/3.0")
PARSER_TIMEOUT = 30.0

_PROFILE = """\
{abi}
profile {name} flags=(attach_disconnected, mediate_deleted) {{
  # Other walls narrow these: capabilities, seccomp, the container's namespaces.
  capability,
  file,
  network,
  umount,

  # The kernel's crypto sockets have given root away (CVE-2026-31431), and seccomp cannot see them
  # in a 32-bit socketcall.
  deny network alg,

  # Whatever is mounted, the OCI runtime has mounted it before this profile holds.
  deny mount,
  deny pivot_root,

  # Signals come from the host and from each other, and go to each other only.
{signals}
  signal (send, receive) peer={name},
  ptrace (trace, tracedby, read, readby) peer={name},

  # The kernel's own files below /proc: nothing but the shared memory limits of the namespace.
{proc}
  deny /proc/kcore rwklx,
  deny /proc/sysrq-trigger rwklx,

  # /sys tells and is not told; the container's own control group is the exception.
{sys}
  deny /sys/firmware/** rwklx,
  deny /sys/kernel/security/** rwklx,
  # The energy that the processor takes betrays what it computes (CVE-2020-8694).
  deny /sys/devices/virtual/powercap/** rwklx,
}}
"""


def supported() -> bool:
    """Return whether the kernel enforces AppArmor and lets us see its profiles."""
    return _read(ENABLED) == "Y" and PROFILES.exists()


def parser() -> str:
    """Return the path of apparmor_parser, "" where it is not installed."""
    return shutil.which("apparmor_parser") or ""


def loaded(profiles: Path = PROFILES) -> frozenset[str]:
    """Return the names of all loaded profiles. Each line is "name (mode)"."""
    return frozenset(line.rpartition(" (")[0] for line in _read(profiles).splitlines())


class AppArmor:
    """The profiles of this host. One per server."""

    def __init__(self, profiles: Path = PROFILES) -> None:
        self._lock, self._profiles = asyncio.Lock(), profiles

    async def provide_for(
        self,
        context: api.LinuxContainerSecurityContext | api.LinuxSandboxSecurityContext,
        facts: spec.HostFacts,
    ) -> None:
        """See to the profile that a container or a pod asks for, if any. Raises as `provide`."""
        if name := spec.apparmor_profile(context, facts):
            await self.provide(name)

    async def provide(self, name: str) -> None:
        """See to it that the profile is loaded, which is our doing for NAME alone.

        Raises InvalidArgument for another that is not loaded, Internal with the parser's words when
        ours cannot be.
        """
        async with self._lock:
            if name in await asyncio.to_thread(loaded, self._profiles):
                return
            if name != NAME:
                raise errors.InvalidArgument(f"apparmor: profile {name[:80]!r} is not loaded")
            text = await asyncio.to_thread(_for_this_host)
            argv = [parser() or "apparmor_parser", "--replace", "--skip-cache"]
            await commands.run(argv, stdin=text.encode(), timeout=PARSER_TIMEOUT)
            log.info("AppArmor profile loaded", profile=name)


def profile(*, daemon: str = "unconfined", abi: bool = False) -> str:
    """Return the text of our profile (apparmor.d(5)).

    `daemon` is the profile of this process and so of its shims, which send the stop signals. `abi`
    pins the features that the rules are written for, where the host has that file.
    """
    senders = dict.fromkeys(("unconfined", "runc", "crun", daemon))
    return _PROFILE.format(
        abi="abi <abi/3.0>," if abi else "",
        name=NAME,
        signals="\n".join(f'  signal (receive) peer="{peer}",' for peer in senders),
        proc="\n".join(f"  deny {path} w," for path in _kernel_proc()),
        sys="\n".join(f"  deny {path} wklx," for path in _all_but("/sys/", "fs/cgroup")),
    )


def _kernel_proc() -> Iterator[str]:
    """Yield what is below /proc and is neither a process nor a limit on System V shared memory."""
    yield "/proc/[^0-9s]**"
    yield from _all_but("/proc/s", "ys/kernel/shm")


def _all_but(start: str, kept: str) -> Iterator[str]:
    """Yield globs for every path that begins with `start` but does not go on with `kept`.

    A rule that denies cannot be lifted again by one that allows, so the gap is cut out letter by
    letter.
    """
    for position, letter in enumerate(kept):
        yield f"{start}{kept[:position]}[^{letter}]**"


def _for_this_host() -> str:
    """Return our profile; what confines this process is "name (mode)" in the kernel's words."""
    own = _read(Path("/proc/self/attr/current")).strip("\0").partition(" (")[0]
    return profile(daemon=own or "unconfined", abi=ABI.exists())


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
