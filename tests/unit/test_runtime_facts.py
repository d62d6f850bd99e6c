# SPDX-License-Identifier: Apache-2.0
"""What follows from what an OCI runtime says of itself."""

from pathlib import Path
from typing import Any

import pytest

from cri_server import capability, host

LISTED = {"linux": {"capabilities": ["CAP_CHOWN", "CAP_BPF"]}}


@pytest.mark.parametrize(
    ("program", "features", "known"),
    [
        ("runc", LISTED, {"CAP_CHOWN", "CAP_BPF"}),
        ("runsc", LISTED, {"CAP_CHOWN", "CAP_BPF"}),
        ("runc", {}, set(capability.ALL)),
        ("runsc", {}, set(capability.ALL) - set(capability.ALL[38:])),
    ],
)
def test_its_capabilities(program: str, features: dict[str, Any], known: set[str]) -> None:
    facts = host.RuntimeFacts(path="/x", program=program, features=features)
    assert facts.capabilities == known


def test_the_last_of_linux_4() -> None:
    assert capability.ALL[37] == capability.LINUX_4[-1] == "CAP_AUDIT_READ"  # capabilities(7)


def test_huge_pages_are_called_as_in_cri_and_in_cgroups(tmp_path: Path) -> None:
    for kilobytes in (64, 2048, 32768, 1048576):
        (tmp_path / f"hugepages-{kilobytes}kB").mkdir()
    assert host.hugepage_sizes(tmp_path) == {"64KB", "2MB", "32MB", "1GB"}
