# SPDX-License-Identifier: Apache-2.0
"""What guests have to say: JUnit files and facts.json become lines, a page of docs/, and a verdict.

A folder of results is of one boot, with the runs in its plan.json; a name of a folder tells when it
was made. The page shows each run as it went last, and of which boot that was. Where the JUnit file
was lost with the guest, the console has pytest's closing lines. A run without either has not ended,
and counts as failed. A boot of `AGAIN` ran what had failed before, each test under its run's name.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from xml.etree import ElementTree

PLAN = "plan.json"
AGAIN = "again"  # how the folder of such a boot ends
ENDED = PASSED, FAILED = "passed", "failed"
LOST = "of the console, which has no reasons"  # for skips
_CLOSING = re.compile(
    r"=+ (?:(?P<failed>\d+) failed, )?(?P<passed>\d+) passed(?:, (?P<skipped>\d+) skipped)?"
    r"(?:, .*)? in (?P<seconds>[\d.]+)s"
)
_LEFT = re.compile(r"^=+ left behind =+$", re.MULTILINE)  # tests/conftest.py
PAGE = """\
# The tests in a guest

Written by `make test-vm` ([testing.md](testing.md)); do not edit. A Debian guest boots under qemu
without KVM, systemd is its init. Our wheel is installed there with `deploy/`'s unit; then tests run
against that unit, and the integration tests with each cgroup driver on servers of their own. What
has to do with SELinux runs in a guest that enforces it.

"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One run of pytest: what became of its tests. `missing`: it never came to its end.

    `status` is that of pytest: 1 also when tests passed and left something behind, that is when it
    is not `clean`. `mended`: which of `failed` passed in a later guest, and when that one booted.
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
    clean: bool = True
    mended: Mapping[str, str] = field(default_factory=dict)

    @property
    def left(self) -> tuple[str, ...]:
        """Return what failed and has not passed since."""
        return tuple(name for name in self.failed if name not in self.mended)

    @property
    def good(self) -> bool:
        ended_well = self.clean and self.status == int(bool(self.failed))
        return self.passed > 0 and ended_well and not self.left and not self.missing


@dataclass(frozen=True, kw_only=True, slots=True)
class Boot:
    """What a guest said of itself, and its runs in order."""

    facts: Mapping[str, str]
    runs: tuple[Run, ...]


def boot(folder: Path) -> Boot:
    """Read a boot's results."""
    plan, facts = json.loads((folder / PLAN).read_text()), folder / "facts.json"
    return Boot(
        facts=json.loads(facts.read_text()) if facts.exists() else {},
        runs=tuple(_run(folder, r["name"], r["driver"], _short(r["tests"])) for r in plan),
    )


def latest(results: Path, names: Sequence[str]) -> list[Boot]:
    """Read all boots in a folder; each run is in the last of those that it was in, if in any."""
    left, found, since = {*names}, list[Boot](), dict[tuple[str, str], str]()
    for folder in sorted(results.iterdir(), reverse=True):
        if not (folder / PLAN).exists():
            continue
        read = boot(folder)
        if folder.name.endswith(AGAIN):
            since = {**_once_more(folder, read), **since}
            continue
        last = tuple(_with_mended(run, since) for run in read.runs if run.name in left)
        left -= {run.name for run in last}
        found += [replace(read, runs=last)] if last else []
    return found[::-1]


def _once_more(folder: Path, read: Boot) -> dict[tuple[str, str], str]:
    """Return for each run and function of a boot of `AGAIN` when that booted, "" unless its tests
    passed.
    """
    found: dict[tuple[str, str], str] = {}
    for run in read.runs:
        verdicts = _verdicts(_suite(folder, run.name))
        failed = {_function(test) for test, verdict in verdicts.items() if verdict == FAILED}
        for function in {_function(test) for test, verdict in verdicts.items() if verdict in ENDED}:
            found[run.name, function] = "" if function in failed else read.facts["booted"]
    return found


def _with_mended(run: Run, since: Mapping[tuple[str, str], str]) -> Run:
    """Return the run; its functions decide, for the parameters of a test change their names."""
    passed = {name: since.get((run.name, _function(name)), "") for name in run.failed}
    return replace(run, mended={name: when for name, when in passed.items() if when})


def _function(test: str) -> str:
    return test.partition("[")[0]


def node_id(name: str) -> str:
    """Return by what pytest finds a test with all its parameters, from JUnit's class::name."""
    module, _, test = _function(name).partition("::")
    return f"{module.replace('.', '/')}.py::{test}"


def _run(results: Path, name: str, driver: str, tests: str) -> Run:
    suite = _suite(results, name)
    if suite is None:
        return _from_console(results / "console.log", Run(name=name, driver=driver, tests=tests))
    verdicts = _verdicts(suite)
    log = results / f"{name}.log"
    return Run(
        name=name,
        driver=driver,
        tests=tests,
        passed=sum(verdict == PASSED for verdict in verdicts.values()),
        failed=tuple(test for test, verdict in verdicts.items() if verdict == FAILED),
        skipped=tuple(verdict for verdict in verdicts.values() if verdict not in ENDED),
        seconds=float(suite.get("time") or 0),
        status=int((results / f"{name}.status").read_text()),
        clean=not (log.exists() and _LEFT.search(log.read_text(errors="replace"))),
    )


def _suite(results: Path, run: str) -> ElementTree.Element | None:
    file = results / f"{run}.xml"
    return next(ElementTree.parse(file).getroot().iter("testsuite")) if file.exists() else None


def _verdicts(suite: ElementTree.Element | None) -> dict[str, str]:
    """Return each test's name with PASSED, FAILED, or why it was skipped."""
    found: dict[str, str] = {}
    for case in suite.iter("testcase") if suite is not None else ():
        name, skip = f"{case.get('classname')}::{case.get('name')}", case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            found[name] = FAILED  # also where another entry, of the test without its end, passed
        else:
            found.setdefault(name, PASSED if skip is None else (skip.get("message") or "").strip())
    return found


def _from_console(console: Path, run: Run) -> Run:
    """Return a run as pytest's own lines tell of it: what failed, and the closing one."""
    text = console.read_text(errors="replace") if console.exists() else ""
    said = text.partition(f"== {run.name}: ")[2].partition("\n== ")[0]
    closing = _CLOSING.search(said)
    if closing is None:
        return replace(run, missing=True)
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", said, re.MULTILINE)
    return replace(
        run,
        passed=int(closing["passed"]),
        failed=tuple(name.removesuffix(".py").replace(".py::", "::") for name in failed),
        skipped=(LOST,) * int(closing["skipped"] or 0),
        seconds=float(closing["seconds"]),
        status=1 if failed else 0,
    )


def _short(arguments: Sequence[str]) -> str:
    """Return pytest's arguments as they are for people: file names, and what is left out."""
    folder = "tests/integration/test_"
    names = [word for word in arguments if not word.startswith("-")]
    left_out = [word.partition("::")[2] for word in arguments if word.startswith("--deselect=")]
    said = ", ".join(n.removeprefix(folder).removesuffix(".py") for n in names)
    said += " (the others)" if any(word.startswith("--ignore=") for word in arguments) else ""
    return said + (f"; not {', '.join(left_out)}" if left_out else "")


def page(boots: Sequence[Boot]) -> str:
    """Return the text of docs/guest-run.md."""
    every = [run for each in boots for run in each.runs]
    return PAGE + "\n".join([*_facts(boots), *_table(boots), *_details(every)])


def _facts(boots: Sequence[Boot]) -> Iterator[str]:
    """Yield a table with a column for each boot; what all have in common is told once."""
    yield _row("guest", *(str(n + 1) for n in range(len(boots))))
    yield _row(*["---"] * (len(boots) + 1))
    for name in dict.fromkeys(name for each in boots for name in each.facts):
        values = [each.facts.get(name, "") for each in boots]
        same = len({*values}) == 1
        yield _row(name, *(["the same" if same and n else v for n, v in enumerate(values)]))
    yield ""


def _table(boots: Sequence[Boot]) -> Iterator[str]:
    yield "| run | guest | cgroup driver | tests | passed | failed | skipped | minutes |"
    yield "|---|---|---|---|---|---|---|---|"
    for n, run in ((n, run) for n, each in enumerate(boots, 1) for run in each.runs):
        failed = "did not end" if run.missing else str(len(run.failed))
        failed += " at first" if run.failed and not run.left else ""
        numbers = (run.passed, failed, len(run.skipped), f"{run.seconds / 60:.0f}")
        yield _row(run.name, n, run.driver, run.tests, *numbers)
    yield ""


def _row(*cells: object) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def _details(found: Sequence[Run]) -> Iterator[str]:
    for run in found:
        if not run.clean or (run.status and not run.failed and not run.missing):
            yield from (f"{run.name}: pytest ended with {run.status}, see its log.", "")
        if run.failed:
            yield from (f"Failed in {run.name}:", "", *_failures(run), "")
    reasons = Counter(reason for run in found for reason in run.skipped)
    if reasons:
        yield from ("Skipped, in all runs together:", "")
        yield from (f"- {count} times: {reason}" for reason, count in reasons.most_common())
        yield ""


def _failures(run: Run) -> Iterator[str]:
    """Yield a line for each function, with how many of its tests failed and what became of them."""
    found = Counter((_function(name), run.mended.get(name, "")) for name in run.failed)
    for (function, when), count in found.items():
        times = f", {count} times" if count > 1 else ""
        mended = f"; mended, passed in a guest booted {when}" if when else ""
        yield f"- {function}{times}{mended}"
