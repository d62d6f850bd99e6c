# SPDX-License-Identifier: Apache-2.0
"""The table of what each handler can do, made from a run of tests/integration/test_handlers.py.

A row is a test's name as a sentence, a column a handler (property "handler"). A cell says "yes",
the note that the test left (property "cell") or "FAILED"; it is empty for a test that was skipped.
The table stands between two marks of a page and replaces what was there.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

BEGIN, END = "<!-- begin: made by test_handlers.py -->", "<!-- end -->"
MODULE = "test_handlers.py"
_TEST = re.compile(r"::test_(\w+)\[")


class Matrix:
    """Cells by test and handler; fed with reports, in the order of the run."""

    def __init__(self) -> None:
        self.cells: dict[str, dict[str, str]] = {}

    def add(self, report: pytest.TestReport) -> None:
        """Take a report in; the ones of other modules, and of set-up that went well, are not it."""
        found = _TEST.search(report.nodeid) if MODULE in report.nodeid else None
        told = dict(report.user_properties)
        if found is None or "handler" not in told or (report.when != "call" and report.passed):
            return
        row = self.cells.setdefault(found[1].replace("_", " "), {})
        handler = str(told["handler"])
        if row.get(handler) != "FAILED":  # of several cases the worst counts
            row[handler] = "FAILED" if report.failed else str(told.get("cell", "yes"))

    def text(self) -> str:
        """Return the table in Markdown."""
        handlers = list(dict.fromkeys(h for row in self.cells.values() for h in row))
        lines = [("", *handlers), ("---",) * (len(handlers) + 1)]
        lines += [(test, *_row(row, handlers)) for test, row in self.cells.items()]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)

    def write(self, page: Path) -> None:
        """Put the table between the marks of a page."""
        text = page.read_text()
        before, rest = text.split(BEGIN)
        _, after = rest.split(END)
        page.write_text(f"{before}{BEGIN}\n\n{self.text()}\n{END}{after}")


def _row(row: Mapping[str, str], handlers: Iterable[str]) -> list[str]:
    return [row.get(handler, "") for handler in handlers]
