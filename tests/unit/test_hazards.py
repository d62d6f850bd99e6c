# SPDX-License-Identifier: Apache-2.0
"""docs/hazards.md names a test for every hazard, and every test that it names is there."""

import ast
import functools
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
PAGE = TESTS.parent / "docs/hazards.md"
ROWS = [f"V{n:02}" for n in (*range(1, 50), *range(60, 80))] + [f"V79{c}" for c in "bcdef"]
ROWS += [f"V{n}" for n in (*range(80, 87), 90, 91)]
RULES = 11  # of the last table
FILES = ("test_hostile_images", "test_hostile_requests", "test_hostile_users", "test_isolation",
         "test_runtime_hazards")  # fmt: skip


def rows() -> dict[str, str]:
    """Return the page's rows: the first cell to the last one."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {
        row[0].strip("| "): row[-1] for row in cells if row[0].strip("| ") not in ("row", "rule")
    }


def named(cell: str) -> list[str]:
    return re.findall(r"`([\w/]+\.py::\w+)`", cell)


@functools.cache
def functions(path: Path) -> frozenset[str]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    tree = ast.parse(path.read_text())
    return frozenset(node.name for node in tree.body if isinstance(node, kinds))


def test_every_hazard_has_its_row() -> None:
    found = rows()
    assert [row for row in found if re.match(r"V\d", row)] == ROWS
    assert len(found) == len(ROWS) + RULES


@pytest.mark.parametrize("row", rows())
def test_a_row_names_tests_that_are_there(row: str) -> None:
    wanted = named(rows()[row])
    assert wanted
    for each in wanted:
        file, name = each.split("::")
        assert name.startswith("test_")
        assert name in functions(TESTS / file), each


@pytest.mark.parametrize("file", FILES)
def test_a_test_of_a_hazard_is_in_the_row_that_it_names(file: str) -> None:
    for name in functions(TESTS / "integration" / f"{file}.py"):
        for number in re.findall(r"(?<=_)v(\d\d[a-f]?)(?=_)", name):
            assert f"::{name}`" in rows()[f"V{number}"], name
