# SPDX-License-Identifier: Apache-2.0
"""What every test run does: probes instead of assumptions, no silent skips, and nothing left
behind.

The snapshot of the host is taken before the first test and compared after the last one
(`residue.py`); anything left fails the run. CRI_TESTS_REQUIRE=all turns a skip into a failure
unless a probe of `probes.ALLOWED` caused it.
"""

import contextlib
import os
import re
from collections.abc import Generator, Iterator
from collections.abc import Set as AbstractSet
from pathlib import Path

import hypothesis
import pytest

from tests import probes, residue
from tests.lab import cgroups, waiting

REQUIRE_ALL = os.environ.get("CRI_TESTS_REQUIRE") == "all"
ID = re.compile(rb"\b[0-9a-f]{64}\b")
ALLOWED = pytest.StashKey[bool]()
BEFORE = pytest.StashKey[AbstractSet[str]]()

# Generated examples have no deadline of their own: on a busy machine any of them may take a while.
hypothesis.settings.register_profile("ours", deadline=None)
hypothesis.settings.load_profile("ours")


class Marks:
    """What the run calls its own: names that show up in whatever it might leave behind."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def add(self, *names: str) -> None:
        self.names.update(names)

    def add_ids(self, log: Path) -> None:
        """Add all pod and container ids of a server's log: half-made pods are in there too."""
        if log.exists():
            self.names.update(found.decode() for found in ID.findall(log.read_bytes()))


MARKS = Marks()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "needs(*names): what the machine must have (tests/probes.py)"
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the quick tests first, and the ones that stand on running servers last; give each the
    time that it needs here.
    """
    if waiting.PATIENCE != 1:
        for item in items:
            limit = _limit(item)
            item.add_marker(pytest.mark.timeout(waiting.patient(limit)), append=False)
    order = ("unit", "contract", "", "integration")

    def place(item: pytest.Item) -> int:
        folder = item.path.relative_to(config.rootpath / "tests").parts[0]
        return order.index(folder if folder in order else "")

    items.sort(key=place)


def _limit(item: pytest.Item) -> float:
    marker = item.get_closest_marker("timeout")
    return float(marker.args[0] if marker else item.config.getini("timeout"))


def pytest_sessionstart(session: pytest.Session) -> None:
    session.stash[BEFORE] = residue.take()


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("needs"):
        for name in mark.args:
            reason = probes.missing(name)
            if reason:
                item.stash[ALLOWED] = name in probes.ALLOWED
                pytest.skip(f"needs {name}: {reason}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    skipped = report.skipped and not hasattr(report, "wasxfail")
    if REQUIRE_ALL and skipped and not item.stash.get(ALLOWED, False):
        report.outcome = "failed"
        report.longrepr = f"skipped, but CRI_TESTS_REQUIRE=all: {report.longrepr}"
    return report


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    left = residue.left(session.stash[BEFORE], marks=MARKS.names, alone=REQUIRE_ALL)
    session.config.stash[LEFT] = left
    if left and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


LEFT = pytest.StashKey[list[str]]()


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    left = config.stash.get(LEFT, [])
    if left:
        terminalreporter.section("left behind", red=True)
        for line in left:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def marks() -> Marks:
    """Return the run's marks; a fixture that makes something adds its name."""
    return MARKS


@pytest.fixture(scope="session")
def hugetlb() -> Iterator[None]:
    """Mount the v1 hierarchy of hugepages for the run, where there is v1 and nobody has.

    On a hybrid host crun refuses to work while cgroup v2 holds a controller, and this is the one
    that nobody has mounted. What starts a server or a shim asks for it first: they, as everybody,
    look once which hierarchies there are, and would leave their cgroups in one that came later.
    """
    with contextlib.ExitStack() as stack:
        if not probes.missing("cgroup-v1"):
            stack.enter_context(cgroups.hugetlb())
        yield
