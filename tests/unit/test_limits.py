# SPDX-License-Identifier: Apache-2.0
"""Limits as people write them."""

import pytest

from cri_server import limits


def limit(name: str, soft: int, hard: int) -> limits.Rlimit:
    return limits.Rlimit(type=f"RLIMIT_{name}", soft=soft, hard=hard)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ()),
        ("nofile=1024:4096", (limit("NOFILE", 1024, 4096),)),
        ("core=0, nofile=5", (limit("CORE", 0, 0), limit("NOFILE", 5, 5))),
        ("memlock=1:unlimited", (limit("MEMLOCK", 1, 2**64 - 1),)),
        ("stack=unlimited", (limit("STACK", 2**64 - 1, 2**64 - 1),)),
    ],
)
def test_rlimits(text: str, expected: tuple[limits.Rlimit, ...]) -> None:
    assert limits.rlimits(text) == expected


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("nofile", "NAME=SOFT:HARD"),
        ("nofile=1,", "NAME=SOFT:HARD"),
        ("nofiles=1", "is not a limit"),
        ("NOFILE=1", "is not a limit"),
        ("nofile=", "neither a number"),
        ("nofile=-1", "neither a number"),
        ("nofile=1:2:3", "neither a number"),
        ("nofile=٣", "neither a number"),
        ("nofile=5:4", "above the hard one"),
        ("nofile=unlimited:4", "above the hard one"),
        ("nofile=1,nofile=2", "twice"),
    ],
)
def test_what_is_no_limit_is_refused(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        limits.rlimits(text)


@pytest.mark.parametrize(
    ("text", "expected"), [("64Mi", 64 << 20), ("4096", 4096), ("1G", 10**9), ("2Gi", 2 << 30)]
)
def test_sizes(text: str, expected: int) -> None:
    assert limits.size(text) == expected


@pytest.mark.parametrize("text", ["", "Mi", "64 Mi", "64MB", "-1", "1.5Gi", "9" * 19, "٦Mi"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a size"):
        limits.size(text)
