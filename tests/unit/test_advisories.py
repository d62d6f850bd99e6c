# SPDX-License-Identifier: Apache-2.0
"""Versions of OCI runtimes against the table of published vulnerabilities."""

import pytest

from cri_server import advisories


def ids(program: str, version: str) -> set[str]:
    return set(advisories.names(advisories.known(program, version)))


NOV_2025 = {"CVE-2025-31133", "CVE-2025-52565", "CVE-2025-52881"}
JUNE_2026 = {"CVE-2026-41579"}


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("1.1.5+ds1", {"CVE-2024-21626", "CVE-2024-45310"} | NOV_2025 | JUNE_2026),  # Debian 12
        ("1.1.12", {"CVE-2024-45310"} | NOV_2025 | JUNE_2026),
        ("1.1.14", NOV_2025 | JUNE_2026),
        ("1.2.0-rc.2", {"CVE-2024-45310"} | NOV_2025 | JUNE_2026),
        ("1.2.0-rc.3", NOV_2025 | JUNE_2026),
        ("1.2.8", JUNE_2026),
        ("1.3.2", NOV_2025 | JUNE_2026),
        ("1.3.3", JUNE_2026),
        ("1.3.6", set()),
        ("1.4.0-rc.3", JUNE_2026),
        ("1.4.2", JUNE_2026),
        ("v1.4.3", set()),
        ("1.5.0-rc.2", JUNE_2026),
        ("1.5.0-rc.3", set()),
        ("2.0.0", set()),
    ],
)
def test_each_branch_of_runc_has_its_own_fix(version: str, expected: set[str]) -> None:
    assert ids("runc", version) == expected


def test_release_candidates_come_before_the_release() -> None:
    assert "CVE-2019-5736" in ids("runc", "1.0.0-rc6")
    assert "CVE-2019-5736" not in ids("runc", "1.0.0-rc10")
    assert "CVE-2021-30465" in ids("runc", "1.0.0-rc94")
    assert "CVE-2021-30465" not in ids("runc", "1.0.0")


@pytest.mark.parametrize(("version", "has_it"), [("1.18", False), ("1.19", True), ("1.27", False)])
def test_a_vulnerability_may_begin_with_a_version(version: str, has_it: bool) -> None:
    assert ("CVE-2026-30892" in ids("crun", version)) is has_it


def test_what_no_release_has_fixed_concerns_every_version() -> None:
    assert "CVE-2026-88264" in ids("crun", "1.29.1")
    assert "no upstream release" in advisories.remedy(advisories.known("crun", "1.8.1"))


def test_releases_that_are_dates() -> None:
    assert ids("runsc", "release-20250106.0") == {"CVE-2025-2713"}
    assert ids("runsc", "release-20250407.0") == set()


def test_dates_are_read_behind_what_a_distribution_puts_before_them() -> None:
    assert ids("runsc", "0.0~20221219.0") == {"CVE-2025-2713"}  # Debian 12
    assert ids("runsc", "0.0~20250407.0") == set()


def test_youki() -> None:
    assert ids("youki", "0.5.4") == {"CVE-2025-54867", "CVE-2025-62161", "CVE-2025-62596"}
    assert ids("youki", "0.5.7") == set()


def test_kata() -> None:
    assert ids("kata", "3.29.0") == {"CVE-2026-44210", "CVE-2026-47243"}
    assert "CVE-2026-41326" not in ids("kata", "3.3.0")
    assert "CVE-2026-41326" in ids("kata", "3.28.0")
    assert ids("kata", "3.31.0") == set()
    assert "CVE-2020-2026" in ids("kata", "1.10.4")
    assert "CVE-2020-2026" not in ids("kata", "1.10.5")


@pytest.mark.parametrize(("program", "version"), [("other", "1.0"), ("runc", ""), ("runc", "HEAD")])
def test_what_nobody_knows_is_not_accused(program: str, version: str) -> None:
    assert advisories.known(program, version) == ()


def test_the_remedy_names_the_version_that_has_every_fix_and_the_caveat() -> None:
    said = advisories.remedy(advisories.known("runc", "1.1.5+ds1"))
    assert "upstream" in said
    assert "1.4.3" in said
    assert "distribution" in said
