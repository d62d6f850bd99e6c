# SPDX-License-Identifier: Apache-2.0
"""Published vulnerabilities of OCI runtimes and of kata's shim, and which versions have them.

Pure data and arithmetic: a version string in, advisories out. It warns and never refuses: what a
runtime calls itself is its upstream version, and a distribution may have put the fix into an older
one (Debian's 1.1.5+ds1-1+deb12u1 is 1.1.5 with CVE-2024-21626 fixed). Nothing is asked on the
network, so the table is as old as the release of this program.

An advisory names the first fixed version of every branch that got the fix; none at all means that
no release was known to have it when the table was written. Source: the projects' own advisories.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

_VERSION = re.compile(r"(\d+)(?:\.(\d+))?(?:\.(\d+))?(?:-?rc\.?(\d+))?")
_PREFIX = re.compile(r"^(release-|v|0\.0~)")  # gVisor's own, youki's, Debian's for gVisor
_RELEASED = 1 << 30  # sorts behind every release candidate

Version = tuple[int, int, int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Advisory:
    """Vulnerabilities that one release fixed: `fixed` by branch, `since` the first to have them."""

    program: str
    ids: tuple[str, ...]
    fixed: tuple[str, ...]
    since: str = ""

    def affects(self, version: Version) -> bool:
        """Say whether a version lies between `since` and the fix of its branch."""
        if self.since and version < _parsed(self.since):
            return False
        fixes = [_parsed(f) for f in self.fixed]
        beyond = bool(fixes) and version >= max(fixes)
        return not (beyond or any(version[:2] == f[:2] and version >= f for f in fixes))


def _of(program: str, ids: str, *fixed: str, since: str = "") -> Advisory:
    return Advisory(program=program, ids=tuple(ids.split()), fixed=fixed, since=since)


TABLE = (
    _of("runc", "CVE-2019-5736", "1.0.0-rc7"),
    _of("runc", "CVE-2019-16884", "1.0.0-rc9"),
    _of("runc", "CVE-2019-19921", "1.0.0-rc10"),
    _of("runc", "GHSA-g54h-m393-cpwq", "1.0.0-rc91"),
    _of("runc", "CVE-2021-30465", "1.0.0-rc95"),
    _of("runc", "CVE-2021-43784", "1.0.3"),
    _of("runc", "CVE-2022-29162", "1.1.2"),
    _of("runc", "CVE-2023-25809 CVE-2023-27561 CVE-2023-28642", "1.1.5"),
    _of("runc", "CVE-2024-21626", "1.1.12"),
    _of("runc", "CVE-2024-45310", "1.1.14", "1.2.0-rc3"),
    _of("runc", "CVE-2025-31133 CVE-2025-52565 CVE-2025-52881", "1.2.8", "1.3.3", "1.4.0-rc3"),
    _of("runc", "CVE-2026-41579", "1.3.6", "1.4.3", "1.5.0-rc3"),
    _of("crun", "CVE-2019-18837", "0.10.5"),
    _of("crun", "CVE-2022-27650", "1.4.4"),
    _of("crun", "CVE-2025-24965", "1.20"),
    _of("crun", "CVE-2026-30892", "1.27", since="1.19"),
    _of("crun", "CVE-2026-47766", "1.28"),
    _of("crun", "CVE-2026-88264 CVE-2026-88265"),
    _of("youki", "CVE-2025-27612", "0.5.3"),
    _of("youki", "CVE-2025-54867", "0.5.5"),
    _of("youki", "CVE-2025-62161 CVE-2025-62596", "0.5.7"),
    _of("runsc", "CVE-2025-2713", "20250328.0"),  # releases are dates: the advisory's own
    _of("kata", "CVE-2020-2024 CVE-2020-2025", "1.11.0"),
    _of("kata", "CVE-2020-2023 CVE-2020-2026", "1.10.5", "1.11.1"),
    _of("kata", "CVE-2020-27151", "1.11.4", "1.12.0", "2.0.0"),
    _of("kata", "CVE-2020-28914", "1.11.5", "1.12.0"),
    _of("kata", "CVE-2026-24054", "3.26.0"),
    _of("kata", "CVE-2026-24834", "3.27.0"),
    _of("kata", "CVE-2026-41326", "3.29.0", since="3.4.0"),
    _of("kata", "CVE-2026-44210 CVE-2026-47243", "3.31.0"),
)


def known(program: str, version: str) -> tuple[Advisory, ...]:
    """Return what is known of a version of "runc", "crun", "runsc", "youki" or "kata".

    Nothing for another program, and for a version that does not begin with a number.
    """
    parsed = _VERSION.match(_PREFIX.sub("", version))
    if parsed is None:
        return ()
    return tuple(a for a in TABLE if a.program == program and a.affects(_numbers(parsed)))


def names(found: Iterable[Advisory]) -> list[str]:
    """Return the ids of advisories, oldest first."""
    return [name for advisory in found for name in advisory.ids]


def remedy(found: Iterable[Advisory]) -> str:
    """Return what to do, in a sentence: the version that has every fix, or to look for one."""
    fixes = [a.fixed for a in found]
    caveat = "a distribution's build may have the fixes already: see its package's changelog"
    if not all(fixes):
        return f"no upstream release known to have all fixes; {caveat}"
    newest = max((max(_releases(f), key=_parsed) for f in fixes), key=_parsed)
    return f"upstream has fixed all of them in {newest}; {caveat}"


def _releases(fixed: tuple[str, ...]) -> list[str]:
    return [f for f in fixed if "rc" not in f] or list(fixed)


def _parsed(text: str) -> Version:
    found = _VERSION.match(text)
    assert found is not None  # noqa: S101  the table's own words
    return _numbers(found)


def _numbers(found: "re.Match[str]") -> Version:
    major, minor, patch = (int(found[n] or 0) for n in (1, 2, 3))
    return major, minor, patch, int(found[4]) if found[4] else _RELEASED
