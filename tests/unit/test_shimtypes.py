# SPDX-License-Identifier: Apache-2.0
"""cri_server.shimtypes, through the configuration that it reads."""

from collections.abc import Callable
from pathlib import Path

import pytest

from cri_server import config, shimtypes

Read = Callable[[str], config.Config]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    def make(text: str) -> config.Config:
        path = tmp_path / "config.toml"
        path.write_text(text)
        return config.load(path)

    return make


@pytest.mark.parametrize(
    ("wanted", "binary", "program"),
    [
        ("io.containerd.runc.v2", "containerd-shim-runc-v2", "runc"),
        ("io.containerd.runsc.v1", "containerd-shim-runsc-v1", "runsc"),
        ("io.containerd.kata-qemu.v2", "containerd-shim-kata-qemu-v2", "kata"),
        ("kata", "containerd-shim-kata-v2", "kata"),
        ("containerd-shim-spin-v2", "containerd-shim-spin-v2", "spin"),
        ("/opt/kata/bin/containerd-shim-kata-v2", "/opt/kata/bin/containerd-shim-kata-v2", "kata"),
    ],
)
def test_a_runtime_type_a_name_or_a_path_is_a_binary(
    wanted: str, binary: str, program: str
) -> None:
    assert shimtypes.binaries(wanted)[0] == binary
    assert shimtypes.program(binary) == program


@pytest.mark.parametrize(
    ("installed", "found"),
    [
        (["v1"], "v1"),
        (["v2"], "v2"),
        (["v1", "v2"], "v2"),
        ([], "v2"),
    ],
)
def test_a_bare_name_is_the_version_that_is_installed(
    read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: list[str], found: str
) -> None:
    for version in installed:
        (tmp_path / f"containerd-shim-runsc-{version}").touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    handler = read('[runtimes.runsc]\nkind = "shim"').runtimes["runsc"]
    assert Path(handler.path).name == f"containerd-shim-runsc-{found}"
    assert handler.dialect == "runsc"


def test_a_runtime_type_is_exact(
    read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "containerd-shim-runsc-v1").touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    text = '[runtimes.x]\nkind = "shim"\npath = "io.containerd.runsc.v2"'
    assert read(text).runtimes["x"].path == "containerd-shim-runsc-v2"


@pytest.mark.parametrize(
    ("path", "dialect", "has_sandbox"),
    [
        ("io.containerd.runc.v2", "runc", False),
        ("io.containerd.kata.v2", "kata", True),
        ("io.containerd.runsc.v1", "runsc", True),
        ("io.containerd.wasmtime.v1", "shim", False),
    ],
)
def test_a_shim_is_known_by_its_name(
    read: Read, path: str, dialect: str, has_sandbox: bool
) -> None:
    handler = read(f'[runtimes.x]\nkind = "shim"\npath = "{path}"').runtimes["x"]
    assert handler.dialect == dialect
    assert handler.has_sandbox == handler.has_guest_kernel == has_sandbox


def test_options_become_text_and_the_timeout_is_ours(read: Read) -> None:
    options = 'BinaryName = "crun", NoPivotRoot = true, IoUid = 5, timeout = 7'
    path = "io.containerd.runc.v2"
    text = f'[runtimes.x]\nkind = "shim"\npath = "{path}"\noptions = {{ {options} }}'
    handler = read(text).runtimes["x"]
    assert handler.shim_options == {"BinaryName": "crun", "NoPivotRoot": "true", "IoUid": "5"}
    assert handler.timeout(120) == 7


@pytest.mark.parametrize(
    ("path", "more", "words"),
    [
        (
            "kata",
            'options = { ConfigPath = "kata.toml" }',
            "ConfigPath: 'kata.toml' is not an absol",
        ),
        (
            "kata",
            'options = { BinaryName = "x" }',
            "unknown key 'BinaryName' (known: timeout, Config",
        ),
        ("kata", 'options = { ConfigPth = "/x" }', "did you mean 'ConfigPath'"),
        ("io.containerd.runc.v2", "options = { NoPivotRoot = 1 }", "NoPivotRoot: 1 is not true or"),
        ("io.containerd.runc.v2", "options = { IoUid = -1 }", "IoUid: -1 is not a whole number"),
        ("io.containerd.runc.v2", "options = { SystemdCgroup = true }", "unknown key 'SystemdCgro"),
        ("kata", 'args = ["--debug"]', "args: a containerd shim takes none, but options"),
        ("kata", 'dialect = "youki"', "dialect: 'youki' is none of kind shim"),
        ("kata", 'sandbox = "namespaces"', "sandbox: kata needs a sandbox container"),
        ("kata", "options = { timeout = 0 }", "timeout: 0 is not seconds"),
    ],
)
def test_what_a_shim_cannot_have_is_refused(read: Read, path: str, more: str, words: str) -> None:
    with pytest.raises(config.ConfigError) as refused:
        read(f'[runtimes.x]\nkind = "shim"\npath = "{path}"\n{more}')
    assert words in str(refused.value)
    assert "[runtimes.x]" in str(refused.value)


def test_a_command_line_has_no_shims_options(read: Read) -> None:
    with pytest.raises(config.ConfigError, match="unknown key 'ConfigPath'"):
        read('[runtimes.x]\noptions = { ConfigPath = "/x" }')
    with pytest.raises(config.ConfigError, match="'kata' is none of kind oci"):
        read('[runtimes.x]\ndialect = "kata"')
