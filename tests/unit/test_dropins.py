# SPDX-License-Identifier: Apache-2.0
"""cri_server.dropins: what files of conf.d say, each for itself, and what broken ones hold."""

import os
from pathlib import Path

import pytest

from cri_server import dropins
from tests.lab import driving


def read(folder: Path, **files: str) -> dropins.DropIns:
    """Write `files`, whose names lack the suffix, and read the folder."""
    for name, text in files.items():
        (folder / f"{name}.toml").write_text(text)
    return dropins.read(folder)


def test_a_folder_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert dropins.read(tmp_path / "none") == dropins.DropIns()


def test_a_file_may_have_several_handlers(tmp_path: Path) -> None:
    found = read(tmp_path, a='[runtimes.x]\npath = "/bin/x"\n[runtimes.y]\npath = "/bin/crun"')

    assert {n: (e.file, e.handler.path) for n, e in found.handlers.items()} == {
        "x": ("a.toml", "/bin/x"),
        "y": ("a.toml", "/bin/crun"),
    }
    assert found.handlers["y"].handler.dialect == "crun"
    assert found.problems == ()


def test_a_wrong_table_leaves_the_others_of_its_file(tmp_path: Path) -> None:
    found = read(tmp_path, a='[runtimes.x]\npth = "/bin/x"\n[runtimes.y]\npath = "/bin/y"')

    (problem,) = found.problems
    assert (problem.file, problem.handler) == ("a.toml", "x")
    assert problem.message == (
        f"{tmp_path}/a.toml: [runtimes.x]: unknown key 'pth'; did you mean 'path'?"
    )
    assert list(found.handlers) == ["y"]
    assert found.held == {"x": problem.message}
    assert found.broken == frozenset()


def test_a_file_that_is_no_toml_holds_the_handlers_that_it_names(tmp_path: Path) -> None:
    text = '[runtimes.x]\na = ?\n[ runtimes . "y.z" ]\n[runtimes.w.options]\n#[runtimes.no]\n'
    found = read(tmp_path, a=text, b="[runtimes.v]")

    (problem,) = found.problems
    assert "line 2" in problem.message
    assert set(found.held) == {"x", "y.z", "w"}
    assert found.broken == {"a.toml"}
    assert list(found.handlers) == ["v"]


def test_the_first_file_by_name_has_a_handler(tmp_path: Path) -> None:
    found = read(tmp_path, b='[runtimes.x]\npath = "/bin/b"', a='[runtimes.x]\npath = "/bin/a"')

    assert found.handlers["x"].handler.path == "/bin/a"
    (problem,) = found.problems
    assert (
        problem.message == f"{tmp_path}/b.toml: [runtimes.x]: an earlier file has this handler too"
    )
    assert found.held == {}


def test_a_broken_first_file_does_not_let_a_second_one_take_its_handler(tmp_path: Path) -> None:
    found = read(tmp_path, a="[runtimes.x]\nbroken", b="[runtimes.x]")

    assert "x" in found.held
    assert found.handlers == {}


@pytest.mark.parametrize("text", ["[server]", "[runtimes.x]\n[network]", "runtimes = 3", "x = 1"])
def test_there_is_nothing_but_handlers_in_a_drop_in(tmp_path: Path, text: str) -> None:
    found = read(tmp_path, a=text)

    assert found.broken == {"a.toml"}
    assert found.handlers == {}


def test_a_fifo_a_folder_and_a_large_file_are_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.toml")
    (tmp_path / "folder.toml").mkdir()
    (tmp_path / "large.toml").write_text("#" * (dropins.MAX_SIZE + 1))
    (tmp_path / "latin.toml").write_bytes(b"# \xe9")
    (tmp_path / "gone.toml").symlink_to("nowhere")

    with driving.keeping_descriptors():
        found = dropins.read(tmp_path)

    assert {p.file for p in found.problems} == {
        "fifo.toml",
        "folder.toml",
        "large.toml",
        "latin.toml",
    }


@pytest.mark.parametrize("name", [".a.toml", "a.toml~", "a.toml.swp", "#a.toml#", "a.conf", "toml"])
def test_files_of_other_names_do_not_count(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("broken [")

    assert dropins.read(tmp_path) == dropins.DropIns()


def test_an_edit_changes_the_stamps(tmp_path: Path) -> None:
    other = tmp_path / "profile"
    seen = [dropins.stamps(tmp_path, [os.fspath(other), "sh", "no-such-program"])]

    def now() -> bool:
        """Say whether it is as nobody has seen it."""
        stamps = dropins.stamps(tmp_path, [os.fspath(other), "sh", "no-such-program"])
        seen.append(stamps)
        return stamps not in seen[:-1]

    assert not now()
    (tmp_path / "a.toml").write_text("1")
    assert now()
    other.write_text("2")
    assert now()
    (tmp_path / "new").write_text("1")
    (tmp_path / "new").rename(tmp_path / "a.toml")
    assert now()
    (tmp_path / "a.toml").unlink()
    assert now()
