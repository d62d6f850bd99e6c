# SPDX-License-Identifier: Apache-2.0
"""What the guest has to say: JUnit files and facts.json become lines, a page of docs/, and a
verdict.

A run without its JUnit file has not ended, and counts as failed.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

PAGE = """\
# The tests in a guest

Written by `make test-vm` ([testing.md](testing.md)); do not edit. A Debian guest boots under qemu
without KVM, systemd is its init. Our wheel is installed there with `deploy/`'s unit; then tests run
against that unit, and the integration tests with each cgroup driver on servers of their own.

"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One run of pytest: what became of its tests. `missing`: it never came to its end.

    `status` is that of pytest: 1 also when tests passed and left something behind.
    """

    name: str
    driver: str
    tests: str
    passed: int = 0
    failed: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()  # the reason of each
    seconds: float = 0.0
    missing: bool = False
    status: int = 1

    @property
    def good(self) -> bool:
        return self.passed > 0 and self.status == 0 and not self.failed and not self.missing


def runs(results: Path, plan: Sequence[Mapping[str, Any]]) -> list[Run]:
    """Read the results of a plan: name, cgroup driver and arguments (tests) of each run."""
    return [_run(results, each["name"], each["driver"], _short(each["tests"])) for each in plan]


def _run(results: Path, name: str, driver: str, tests: str) -> Run:
    file = results / f"{name}.xml"
    if not file.exists():
        return Run(name=name, driver=driver, tests=tests, missing=True)
    suite = next(ElementTree.parse(file).getroot().iter("testsuite"))
    failed, skipped = [], []
    for case in suite.iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(f"{case.get('classname')}::{case.get('name')}")
        skipped += [(skip.get("message") or "").strip() for skip in case.iter("skipped")]
    cases = len({(c.get("classname"), c.get("name")) for c in suite.iter("testcase")})
    return Run(
        name=name,
        driver=driver,
        tests=tests,
        passed=cases - len({*failed}) - len(skipped),
        failed=tuple(dict.fromkeys(failed)),
        skipped=tuple(skipped),
        seconds=float(suite.get("time") or 0),
        status=int((results / f"{name}.status").read_text()),
    )


def _short(arguments: Sequence[str]) -> str:
    """Return pytest's arguments as they are for people: file names, and one word for what is left
    out.
    """
    names = [word for word in arguments if not word.startswith("--ignore=")]
    rest = " (the others)" if len(names) < len(arguments) else ""
    folder = "tests/integration/test_"
    return ", ".join(n.removeprefix(folder).removesuffix(".py") for n in names) + rest


def page(results: Path, found: Sequence[Run]) -> str:
    """Return the text of docs/guest-run.md."""
    return PAGE + "\n".join([*_facts(results / "facts.json"), *_table(found), *_details(found)])


def _facts(file: Path) -> Iterator[str]:
    facts = json.loads(file.read_text()) if file.exists() else {}
    yield from ("| the guest | |", "|---|---|")
    yield from (f"| {name} | {value} |" for name, value in facts.items())
    yield ""


def _table(found: Sequence[Run]) -> Iterator[str]:
    yield "| run | cgroup driver | tests | passed | failed | skipped | minutes |"
    yield "|---|---|---|---|---|---|---|"
    for run in found:
        failed = "did not end" if run.missing else str(len(run.failed))
        numbers = f"{run.passed} | {failed} | {len(run.skipped)} | {run.seconds / 60:.0f}"
        yield f"| {run.name} | {run.driver} | {run.tests} | {numbers} |"
    yield ""


def _details(found: Sequence[Run]) -> Iterator[str]:
    for run in found:
        if run.status and not run.failed and not run.missing:
            yield from (f"{run.name}: pytest ended with {run.status}, see its log.", "")
        if run.failed:
            yield from (f"Failed in {run.name}:", "", *(f"- {name}" for name in run.failed), "")
    reasons = Counter(reason for run in found for reason in run.skipped)
    if reasons:
        yield from ("Skipped, in all runs together:", "")
        yield from (f"- {count} times: {reason}" for reason, count in reasons.most_common())
        yield ""
