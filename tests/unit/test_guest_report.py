# SPDX-License-Identifier: Apache-2.0
"""The page about guests, made of the results of several boots."""

import json
from pathlib import Path

from tests.vm import report

SUITE = '<r><testsuite time="60"><testcase classname="c" name="n"/></testsuite></r>'


def boot(results: Path, when: str, *names: str, ended: bool = True) -> None:
    folder = results / when
    folder.mkdir()
    plan = [{"name": name, "driver": "systemd", "tests": ["tests/unit"]} for name in names]
    (folder / report.PLAN).write_text(json.dumps(plan))
    (folder / "facts.json").write_text(json.dumps({"booted": when, "runc": "1.1.5"}))
    for name in names if ended else ():
        (folder / f"{name}.xml").write_text(SUITE)
        (folder / f"{name}.status").write_text("0")


def test_each_run_is_of_the_last_boot_that_it_was_in(tmp_path: Path) -> None:
    boot(tmp_path, "20260101-000000", "one", "other")
    boot(tmp_path, "20260102-000000", "third")
    boot(tmp_path, "20260103-000000", "other")
    found = report.latest(tmp_path, ("one", "other", "third"))
    shown = [(each.facts["booted"][:8], [run.name for run in each.runs]) for each in found]
    assert shown == [("20260101", ["one"]), ("20260102", ["third"]), ("20260103", ["other"])]


def test_the_page_tells_of_each_run_in_which_guest_it_was(tmp_path: Path) -> None:
    boot(tmp_path, "20260101-000000", "one")
    boot(tmp_path, "20260102-000000", "other", ended=False)
    lines = report.page(report.latest(tmp_path, ("one", "other"))).splitlines()
    assert "| booted | 20260101-000000 | 20260102-000000 |" in lines
    assert "| runc | 1.1.5 | the same |" in lines
    assert "| one | 1 | systemd | tests/unit | 1 | 0 | 0 | 1 |" in lines
    assert "| other | 2 | systemd | tests/unit | 0 | did not end | 0 | 0 |" in lines


def test_a_run_whose_file_was_lost_is_told_by_the_console(tmp_path: Path) -> None:
    folder = tmp_path / "1"
    folder.mkdir()
    plan = [{"name": name, "driver": "systemd", "tests": ["t.py"]} for name in ("one", "two")]
    (folder / report.PLAN).write_text(json.dumps(plan))
    (folder / "console.log").write_text(
        "== one: t.py\nFAILED t.py::test_a - AssertionError\n"
        "=== 1 failed, 187 passed, 3 skipped in 1983.44s (0:33:03) ===\n== two: t.py\nt.py ...\n"
    )
    one, two = report.boot(folder).runs
    assert (one.passed, one.failed, len(one.skipped)) == (187, ("t::test_a",), 3)
    assert (one.seconds, one.good, one.missing) == (1983.44, False, False)
    assert two.missing, "it has no closing line"
