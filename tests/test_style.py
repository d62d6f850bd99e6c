# SPDX-License-Identifier: Apache-2.0
"""The repository keeps its own rules: format, lint, types, import directions, generated code.

Each tool is a test that fails with the tool's own report and no traceback. The rules themselves
are in pyproject.toml; the tools' versions are pinned there, so everyone sees the same report.
"""

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPTS = Path(sys.executable).parent
GENERATED = ("cri_server/pb", "shim/pb")
OURS = ("cri_server", "shim", "proto", "tests", "bench")
LICENSE_LINE = "# SPDX-License-Identifier: Apache-2.0"

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]


def check(*command: str | Path) -> None:
    """Run a tool at the repository's root; show what it says if it is not content."""
    done = subprocess.run(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode != 0:
        pytest.fail(f"{' '.join(map(str, command))}\n{done.stdout}", pytrace=False)


def generated(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for folder in GENERATED
        for path in (root / folder).rglob("*.py*")
        if path.suffix in {".py", ".pyi"}
    }


def test_the_format_is_that_of_ruff() -> None:
    check(sys.executable, "-m", "ruff", "format", "--check", ".")


def test_ruff_finds_nothing() -> None:
    check(sys.executable, "-m", "ruff", "check", "--output-format=concise", ".")


def test_types_are_strict() -> None:
    check(sys.executable, "-m", "mypy")


def test_imports_point_down() -> None:
    check(SCRIPTS / "lint-imports", "--no-cache")


def test_generated_code_is_current(tmp_path: Path) -> None:
    check(sys.executable, "proto/generate.py", tmp_path)
    committed, fresh = generated(REPOSITORY), generated(tmp_path)
    stale = sorted(name for name in committed | fresh if committed.get(name) != fresh.get(name))
    if stale:
        pytest.fail(f"run proto/generate.py; not current: {', '.join(stale)}", pytrace=False)


def test_every_file_names_its_license() -> None:
    files = [path for folder in OURS for path in (REPOSITORY / folder).rglob("*.py")]
    silent = [
        str(path.relative_to(REPOSITORY))
        for path in files
        if "pb" not in path.parts and not path.read_text().startswith(LICENSE_LINE)
    ]
    if silent:
        pytest.fail(f"no {LICENSE_LINE!r} on line 1: {', '.join(silent)}", pytrace=False)
