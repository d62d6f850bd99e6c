# SPDX-License-Identifier: Apache-2.0
"""cri_server.watch: changes of a folder are told when they are whole."""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cri_server import watch

LONG, SHORT = 10.0, 0.3


@pytest.fixture
async def watched(tmp_path: Path) -> AsyncIterator[watch.Watch]:
    made = watch.Watch(tmp_path, lambda name: name.endswith(".toml"))
    made.open()
    yield made
    made.close()


async def told(watched: watch.Watch, *, within: float) -> bool:
    """Say whether a change is told in time."""
    began = asyncio.get_running_loop().time()
    await watched.wait(within)
    return asyncio.get_running_loop().time() - began < within


async def test_a_file_is_busy_until_its_writer_closes_it(
    watched: watch.Watch, tmp_path: Path
) -> None:
    file = (tmp_path / "a.toml").open("w")
    assert await told(watched, within=LONG)  # it is there, and empty
    file.write("half")
    file.flush()
    assert not await told(watched, within=SHORT)
    assert (watched.busy, watched.writes) == ({"a.toml"}, 1)
    file.close()

    assert await told(watched, within=LONG)
    assert watched.busy == set()


@pytest.mark.parametrize("how", ["rename", "remove", "link", "rename away"])
async def test_what_happens_at_once_is_told_at_once(
    watched: watch.Watch, tmp_path: Path, how: str
) -> None:
    (tmp_path / "a.toml").write_text("1")
    (tmp_path / "other").write_text("2")
    assert await told(watched, within=LONG)
    match how:
        case "rename":
            (tmp_path / "other").rename(tmp_path / "a.toml")
        case "remove":
            (tmp_path / "a.toml").unlink()
        case "link":
            (tmp_path / "b.toml").symlink_to("other")
        case "rename away":
            (tmp_path / "a.toml").rename(tmp_path / "away")

    assert await told(watched, within=LONG)
    assert watched.busy == set()


async def test_files_that_do_not_count_are_not_told(watched: watch.Watch, tmp_path: Path) -> None:
    (tmp_path / "a.toml.swp").write_text("1")
    (tmp_path / "a.toml.swp").unlink()

    assert not await told(watched, within=SHORT)
    assert watched.busy == set()


async def test_a_folder_may_come_and_go(tmp_path: Path) -> None:
    folder = tmp_path / "conf.d"
    watched = watch.Watch(folder, lambda _name: True)
    watched.open()
    assert not watched.works
    folder.mkdir()
    assert not await told(watched, within=SHORT)
    assert watched.works
    (folder / "a").write_text("1")
    assert await told(watched, within=LONG)
    (folder / "a").unlink()
    folder.rmdir()
    assert await told(watched, within=LONG)
    watched.drain()
    assert not watched.works
    watched.close()


async def test_nothing_is_open_after_the_end(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    made = watch.Watch(tmp_path, lambda _name: True)
    made.open()
    made.close()
    made.close()

    assert os.listdir("/proc/self/fd") == before
