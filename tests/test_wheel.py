# SPDX-License-Identifier: Apache-2.0
"""What we ship: a wheel that holds the two packages and nothing else, and works where it lands.

The wheel is built from a copy of the tree, because setuptools writes beside its sources, and put
into an environment of its own. The dependencies there are those of the environment that runs the
tests (a path, no download); our own code can come from nowhere but the wheel.
"""

import ast
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from collections.abc import Iterator, Set
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("cri_server", "shim")
SOURCES = (*PACKAGES, "pyproject.toml", "README.md", "LICENSE")

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]


def run(*command: str | Path, cwd: Path) -> str:
    """Run to the end and return both outputs; a failure shows them."""
    done = subprocess.run(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}"
    return done.stdout


def copy_sources(target: Path) -> None:
    for name in SOURCES:
        source = REPOSITORY / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, target / name, ignore=ignored)
        else:
            shutil.copy(source, target / name)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    copy_sources(tree)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps")
    run(*pip, "--no-build-isolation", "--no-index", "--wheel-dir", out, tree, cwd=tree)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel installed in it."""
    root = tmp_path_factory.mktemp("environment")
    venv.create(root, with_pip=True)
    pip = (root / "bin/python", "-m", "pip", "--disable-pip-version-check", "install")
    run(*pip, "--no-index", "--no-deps", wheel, cwd=root)
    site = next((root / "lib").glob("python3.*/site-packages"))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return root


def test_the_wheel_holds_the_two_packages_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)
    expected = {
        str(path.relative_to(REPOSITORY))
        for package in PACKAGES
        for path in (REPOSITORY / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in names if ".dist-info/" not in name} >= expected
    assert not [name for name in names if "test" in name or "__pycache__" in name]


def test_the_installed_command_tells_its_version(environment: Path) -> None:
    said = run(environment / "bin/cri-server", "--version", cwd=environment)
    assert said.split() == ["cri-server", project()["version"]]


def test_the_installed_server_can_be_imported_whole(environment: Path) -> None:
    script = "import cri_server.server as s; print(s.__file__)"
    said = run(environment / "bin/python", "-I", "-c", script, cwd=environment)
    assert Path(said.strip()).is_relative_to(environment)
    run(environment / "bin/cri-server", "serve", "--help", cwd=environment)


def test_the_declared_dependencies_are_those_that_are_imported() -> None:
    known = metadata.packages_distributions()
    declared = {re.split(r"[^\w-]", each)[0] for each in project()["dependencies"]}
    imported = third_party(set(sys.stdlib_module_names) | set(PACKAGES))
    providers = {name: {d.lower() for d in known.get(name, ())} for name in imported}
    assert [name for name, found in providers.items() if not found & declared] == []
    assert sorted(declared - set().union(*providers.values())) == []


def test_each_dependency_has_its_line_in_the_docs() -> None:
    text = (REPOSITORY / "docs/dependencies.md").read_text()
    wanted = [*project()["dependencies"], *project()["optional-dependencies"]["dev"]]
    names = [re.split(r"[^\w-]", each)[0] for each in wanted]
    assert [name for name in names if f"| {name} |" not in text] == []


def project() -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    return table


def third_party(ours: Set[str]) -> set[str]:
    files = (path for package in PACKAGES for path in (REPOSITORY / package).rglob("*.py"))
    return {name for path in files for name in top_level_imports(path)} - ours


def top_level_imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]
