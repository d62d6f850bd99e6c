# SPDX-License-Identifier: Apache-2.0
"""cri_server.programs: one copy for all, as long as the file is the same."""

import dataclasses
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from cri_server import config, programs
from shim import sealed


@pytest.fixture
def handler(tmp_path: Path) -> config.Handler:
    path = tmp_path / "crun"
    shutil.copy(shutil.which("true") or "/bin/true", path)
    return config.Handler(path=os.fspath(path), dialect="crun")


@pytest.fixture
def lender() -> Iterator[programs.Programs]:
    """Return one that has let go of all descriptors in the end."""
    before = sorted(os.listdir("/proc/self/fd"))
    made = programs.Programs()
    yield made
    made.close()
    assert sorted(os.listdir("/proc/self/fd")) == before


async def inode(lender: programs.Programs, handler: config.Handler) -> int:
    async with lender.lent(handler) as copy:
        assert copy.identity == sealed.identity(handler.path)
        return os.fstat(copy.fd).st_ino


async def test_all_get_the_same(lender: programs.Programs, handler: config.Handler) -> None:
    assert await inode(lender, handler) == await inode(lender, handler)


async def test_a_file_that_was_replaced_is_copied_again(
    lender: programs.Programs, handler: config.Handler
) -> None:
    async with lender.lent(handler) as old:
        first = os.fstat(old.fd).st_ino
        shutil.copy(shutil.which("false") or "/bin/false", handler.path)
        assert await inode(lender, handler) != first
        assert os.fstat(old.fd).st_ino == first  # who still has it keeps it


async def test_a_script_is_run_from_its_file(
    lender: programs.Programs, handler: config.Handler
) -> None:
    handler = dataclasses.replace(handler, path=__file__)
    async with lender.lent(handler) as copy:
        assert copy.fd == -1


async def test_runc_is_left_alone(lender: programs.Programs) -> None:
    async with lender.lent(config.Handler(path="/bin/true", dialect="runc")) as copy:
        assert copy == (-1, "")
