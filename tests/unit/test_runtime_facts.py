# SPDX-License-Identifier: Apache-2.0
"""What an OCI runtime says of itself, and what follows from it."""

from pathlib import Path
from typing import Any

import pytest

from cri_server import capability, check, config, host

LISTED = {"linux": {"capabilities": ["CAP_CHOWN", "CAP_BPF"]}}


@pytest.mark.parametrize(
    ("program", "features", "known"),
    [
        ("runc", LISTED, {"CAP_CHOWN", "CAP_BPF"}),
        ("runsc", LISTED, {"CAP_CHOWN", "CAP_BPF"}),
        ("runc", {}, set(capability.ALL)),
        ("runsc", {}, set(capability.ALL) - set(capability.ALL[38:])),
    ],
)
def test_its_capabilities(program: str, features: dict[str, Any], known: set[str]) -> None:
    facts = host.RuntimeFacts(path="/x", program=program, features=features)
    assert facts.capabilities == known


def test_the_last_of_linux_4() -> None:
    assert capability.ALL[37] == capability.LINUX_4[-1] == "CAP_AUDIT_READ"  # capabilities(7)


def test_huge_pages_are_called_as_in_cri_and_in_cgroups(tmp_path: Path) -> None:
    for kilobytes in (64, 2048, 32768, 1048576):
        (tmp_path / f"hugepages-{kilobytes}kB").mkdir()
    assert host.hugepage_sizes(tmp_path) == {"64KB", "2MB", "32MB", "1GB"}


# -- behind a shim ---------------------------------------------------------------------------------


def program(path: Path, **answers: str) -> str:
    """Write a program that answers its verbs."""
    cases = "".join(f"{verb}) echo '{said}';;\n" for verb, said in answers.items())
    path.write_text(f'#!/bin/sh\ncase "${{1#--}}" in\n{cases}*) exit 1;;\nesac\n')
    path.chmod(0o755)
    return str(path)


async def facts_of(folder: Path, dialect: str, **options: str) -> host.RuntimeFacts:
    path = program(folder / "containerd-shim-x-v2", **{"-v": "containerd-shim-x:\n Version: 1.6"})
    handler = config.Handler(kind="shim", path=path, dialect=dialect, options=options)  # type: ignore[arg-type]
    return (await host.runtimes({"x": handler}))["x"]


async def test_a_shim_has_the_version_and_the_features_of_what_it_runs(tmp_path: Path) -> None:
    runc = program(tmp_path / "my-runc", version="runc version 1.1.5", features='{"a": 1}')
    found = await facts_of(tmp_path, "runc", BinaryName=runc)
    assert (found.version, found.features) == ("1.6", {"a": 1})
    assert [(p.program, p.version) for p in found.programs[1:]] == [("runc", "1.1.5")]


async def test_runscs_name_is_in_the_file_of_its_shim(tmp_path: Path) -> None:
    runsc = program(tmp_path / "my-runsc", version="runsc version release-20250106.0")
    file = tmp_path / "runsc.toml"
    file.write_text(f'binary_name = "{runsc}"')
    found = await facts_of(tmp_path, "runsc", ConfigPath=str(file))
    assert [p.path for p in found.programs[1:]] == [runsc]
    [finding] = check.vulnerabilities("x", found)
    assert f"upstream version release-20250106.0 of {runsc} has CVE-2025-2713" in finding.detail


async def test_a_runtime_that_says_nothing_is_still_used(tmp_path: Path) -> None:
    found = await facts_of(tmp_path, "runc", BinaryName=program(tmp_path / "mute"))
    assert not found.error
    assert not list(check.vulnerabilities("x", found))


@pytest.mark.parametrize("dialect", ["runc", "runsc"])
async def test_a_runtime_that_is_not_there_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dialect: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert (await facts_of(tmp_path, dialect)).error == f"its runtime {dialect} is not found"


@pytest.mark.parametrize("dialect", ["kata", "shim"])
async def test_nothing_is_below_other_shims(tmp_path: Path, dialect: str) -> None:
    assert len((await facts_of(tmp_path, dialect)).programs) == 1
