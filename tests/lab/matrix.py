# SPDX-License-Identifier: Apache-2.0
"""The table of what each handler can do, made from a run of tests/integration/test_handlers.py.

A row is a test's name as a sentence, a column a handler. A cell says "yes", the note that the test
left (property "cell"), "FAILED", or "not here" for a skipped test. It stands between two marks of
a page and replaces what was there.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

BEGIN, END = "<!-- begin: made by test_handlers.py -->", "<!-- end -->"
MODULE = "test_handlers.py"
_TEST = re.compile(r"::test_(\w+)\[([\w-]+)\]")


class Matrix:
    """Cells by test and handler; fed with reports, in the order of the run."""

    def __init__(self) -> None:
        self.cells: dict[str, dict[str, str]] = {}

    def add(self, report: pytest.TestReport) -> None:
        """Take a report in; the ones of other modules, and of set-up that went well, are not it."""
        found = _TEST.search(report.nodeid) if MODULE in report.nodeid else None
        if found is None or (report.when != "call" and report.passed):
            return
        handler = found[2].split("-")[-1] if "-" in found[2] else found[2]
        row = self.cells.setdefault(found[1].replace("_", " "), {})
        if row.get(handler) != "FAILED":  # of several cases the worst counts
            row[handler] = _cell(report)

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


def _cell(report: pytest.TestReport) -> str:
    if report.skipped:
        return "not here"
    notes = [str(value) for name, value in report.user_properties if name == "cell"]
    return ("FAILED" if report.failed else "") or (notes[-1] if notes else "yes")
