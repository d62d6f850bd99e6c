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


def failing(results: Path, when: str, run: str, *tests: str, failed: str) -> None:
    boot(results, when, run)
    cases = [
        f'<testcase classname="tests.unit.test_a" name="{test}">'
        f"{'<failure/>' if test in failed else ''}</testcase>"
        for test in tests
    ]
    suite = f'<r><testsuite time="60">{"".join(cases)}</testsuite></r>'
    (results / when / f"{run}.xml").write_text(suite)
    (results / when / f"{run}.status").write_text(str(int(bool(failed))))


def test_what_failed_may_pass_in_a_later_guest(tmp_path: Path) -> None:
    failing(tmp_path, "20260101-000000", "one", "ab", "cd", "ef", failed="abcd")
    failing(tmp_path, "20260102-000000-one-again", "one", "ab", "cd", failed="cd")
    ((run,),) = (each.runs for each in report.latest(tmp_path, ("one", "other")))
    assert (run.passed, run.good) == (1, False)
    assert [report.node_id(name) for name in run.left] == ["tests/unit/test_a.py::cd"]
    failing(tmp_path, "20260103-000000-one-again", "one", "cd", failed="")
    log = tmp_path / "20260101-000000" / "one.log"
    log.write_text("=== left behind ===\nmount /tmp/x\n=== 2 failed, 1 passed ===\n")
    assert not report.latest(tmp_path, ("one", "other"))[0].runs[0].good
    log.write_text("=== 2 failed, 1 passed ===\n")
    found = report.latest(tmp_path, ("one", "other"))
    assert found[0].runs[0].good
    lines = report.page(found).splitlines()
    assert "| one | 1 | systemd | tests/unit | 1 | 2 at first | 0 | 1 |" in lines
    mended = "mended, passed in a guest booted 20260103-000000-one-again"
    assert f"- tests.unit.test_a::cd; {mended}" in lines


def test_what_passed_before_a_run_does_not_count_for_it(tmp_path: Path) -> None:
    failing(tmp_path, "20260101-000000-one-again", "one", "ab", failed="")
    failing(tmp_path, "20260102-000000", "one", "ab", failed="ab")
    assert not report.latest(tmp_path, ("one",))[0].runs[0].good


def test_of_a_test_that_failed_again_since_the_last_word_counts(tmp_path: Path) -> None:
    failing(tmp_path, "20260101-000000", "one", "ab", failed="ab")
    failing(tmp_path, "20260102-000000-again", "one", "ab", failed="")
    failing(tmp_path, "20260103-000000-again", "one", "ab", failed="ab")
    assert not report.latest(tmp_path, ("one",))[0].runs[0].good


def test_a_test_with_parameters_passes_with_all_of_them(tmp_path: Path) -> None:
    failing(tmp_path, "20260101-000000", "one", "ab[4]", "cd[4]", failed="ab[4] cd[4]")
    failing(tmp_path, "20260102-000000-again", "one", "ab[5]", "cd[4]", "cd[6]", failed="cd[6]")
    (run,) = report.latest(tmp_path, ("one",))[0].runs
    assert [report.node_id(name) for name in run.left] == ["tests/unit/test_a.py::cd"]
