# SPDX-License-Identifier: Apache-2.0
"""Whether a host can have pods with user namespaces, and whose fault it is if not."""

import os
from pathlib import Path

import pytest

from cri_server import host, userns
from shim import process

pytestmark = pytest.mark.needs("root")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Return a folder that every user can reach."""
    for path in (tmp_path, *tmp_path.parents):
        if not path.stat().st_mode & 0o001:
            path.chmod(path.stat().st_mode | 0o011)
    return tmp_path


@pytest.mark.needs("userns")
def test_a_host_that_can_leaves_nothing_of_the_try(place: Path) -> None:
    before = set(process.descendants(os.getpid()))
    descriptors = os.listdir("/proc/self/fd")
    assert userns.why_not(place / "not/yet", place / "nor/this") == ""
    assert set(process.descendants(os.getpid())) == before
    assert os.fspath(place) not in Path("/proc/self/mountinfo").read_text()
    assert os.listdir("/proc/self/fd") == descriptors


def test_a_folder_that_lets_nobody_pass_is_named(place: Path) -> None:
    closed = place / "closed"
    (closed / "state").mkdir(parents=True)
    closed.chmod(0o710)
    assert f"chmod o+x {closed}" in userns.why_not(place, closed / "state")
    closed.chmod(0o711)
    (closed / "state").chmod(0o700)  # the server opens that one itself
    assert str(closed) not in userns.why_not(place, closed / "state")


@pytest.mark.needs("userns")
def test_a_file_system_that_cannot_is_named(place: Path) -> None:
    assert "file system of /proc/sys takes no id-mapped mounts" in userns.why_not(
        Path("/proc/sys/images"), place
    )


RUNC = {"linux": {"namespaces": ["mount", "user"]}}
NO_USER = {"linux": {"namespaces": ["mount"]}}


@pytest.mark.parametrize(
    ("path", "features", "expected"),
    [
        ("/usr/sbin/runc", RUNC, True),
        ("/usr/bin/crun", RUNC, True),
        ("/usr/sbin/runc", NO_USER, False),
        ("/usr/sbin/runc", {}, False),
        ("/usr/bin/crun", {}, True),
        ("/usr/bin/crun", NO_USER, False),
    ],
)
def test_what_a_runtime_says_decides(
    path: str, features: dict[str, object], expected: bool
) -> None:
    facts = host.RuntimeFacts(path=path, features=features)
    assert facts.user_namespaces == expected
    assert facts.old_crun == (path.endswith("crun") and not features)
