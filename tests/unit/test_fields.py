# SPDX-License-Identifier: Apache-2.0
"""Every field of a pod's and a container's configuration is honoured or refused: docs/fields.md."""

from pathlib import Path

import pytest

from tests.lab import fields

PAGE = Path(__file__).resolve().parents[2] / "docs/fields.md"


def test_every_field_of_the_protocol_is_in_the_table_once() -> None:
    known, there = [*fields.honoured(), *fields.refused()], fields.of_protocol()
    assert sorted(known) == sorted(there), "add or drop a line in tests/lab/fields.txt or fields.py"


def test_a_field_that_the_protocol_gets_would_be_missed() -> None:
    assert "ContainerConfig.linux.resources.hugepage_limits.page_size" in fields.of_protocol()
    assert len(fields.of_protocol()) > 150


@pytest.mark.parametrize("test", sorted(set(fields.honoured().values())))
def test_what_shows_a_field_honoured_is_a_test(test: str) -> None:
    file, _, name = test.partition("::")
    assert name in fields.tests_of(file)


@pytest.mark.parametrize("field", sorted(fields.refused()))
def test_a_refused_field_is_named_by_the_error(field: str) -> None:
    error = fields.refusal(fields.refused()[field])
    assert error, "it is honoured now? Then name the test in tests/lab/fields.txt instead"
    assert any(part in error for part in field.split(".")[1:])


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == fields.table(), "run: python -m tests.lab.fields > docs/fields.md"
