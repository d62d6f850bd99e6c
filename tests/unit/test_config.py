# SPDX-License-Identifier: Apache-2.0
"""cri_server.config: what is refused and how it says so, and what is filled in."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from cri_server import config

Install = Callable[..., Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Make PATH a folder with these programs, and nothing else."""

    def install(*names: str) -> Path:
        folder = tmp_path / "bin"
        folder.mkdir()
        for name in names:
            (folder / name).write_text("#!/bin/sh\n")
            (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(folder))
        return folder

    return install


@pytest.fixture
def read(tmp_path: Path) -> Callable[[str], config.Config]:
    """Load a file with this text."""

    def read(text: str) -> config.Config:
        path = tmp_path / "config.toml"
        path.write_text(text)
        return config.load(path)

    return read


Read = Callable[[str], config.Config]


# -- what is filled in -----------------------------------------------------------------------------


def test_no_file_gives_the_defaults(tmp_path: Path, install: Install) -> None:
    folder = install("runc")

    for settings in (config.load(None), config.load(tmp_path / "missing.toml")):
        assert settings.server == config.Server()
        assert settings.network == config.Network()
        assert settings.images == config.Images()
        assert settings.runtime == config.Runtime()
        assert settings.runtimes == {
            "runc": config.Handler(path=str(folder / "runc"), dialect="runc")
        }


def test_an_empty_file_is_the_same_as_none(read: Read, install: Install) -> None:
    install("runc")

    assert dataclasses.replace(read(""), drop_ins=None) == config.load(None)


def test_values_of_a_file_take_the_place_of_defaults(read: Read, install: Install) -> None:
    install()

    settings = read(
        """
        [server]
        root = "/srv/images"
        log_format = "json"
        [network]
        bin_dirs = ["/a", "/b"]
        add_timeout = 5
        [images]
        pinned = ["registry.example/pause*"]
        """
    )

    assert settings.server == config.Server(root=Path("/srv/images"), log_format="json")
    assert settings.network.bin_dirs == (Path("/a"), Path("/b"))
    assert settings.network.add_timeout == 5.0
    assert settings.images.pinned == ("registry.example/pause*",)


def test_installed_runtimes_are_offered_beside_the_configured(read: Read, install: Install) -> None:
    folder = install("runc", "crun", "youki")

    settings = read('[runtimes.youki]\n[runtimes.old-runc]\npath = "/opt/runc-1.1/runc"')

    assert {n: h.path for n, h in settings.runtimes.items()} == {
        "crun": str(folder / "crun"),
        "runc": str(folder / "runc"),
        "youki": str(folder / "youki"),
        "old-runc": "/opt/runc-1.1/runc",
    }


def test_a_configured_handler_replaces_the_installed_one(read: Read, install: Install) -> None:
    folder = install("runc")
    (folder / "runc-debug").symlink_to("runc")

    settings = read('[runtimes.runc]\npath = "runc-debug"\nsandbox = "container"')

    assert settings.runtimes["runc"] == config.Handler(
        path=str(folder / "runc-debug"), dialect="runc", sandbox="container"
    )


def test_a_binary_that_is_not_there_keeps_its_name(read: Read, install: Install) -> None:
    install()

    assert read("[runtimes.runsc]").runtimes["runsc"].path == "runsc"


@pytest.mark.parametrize(
    ("section", "dialect"),
    [
        ("[runtimes.runsc]", "runsc"),
        ('[runtimes.gvisor]\npath = "/opt/gvisor/runsc"', "runsc"),
        ('[runtimes.gvisor]\npath = "/opt/gvisor"\ndialect = "runsc"', "runsc"),
        ('[runtimes.crun]\npath = "/opt/crun-1.28"', "crun"),
        ('[runtimes.other]\npath = "/opt/other"', "runc"),
    ],
)
def test_the_dialect_is_told_by_key_program_or_name(
    read: Read, install: Install, section: str, dialect: str
) -> None:
    install()

    (handler,) = read(section).runtimes.values()

    assert handler.dialect == dialect
    assert handler.has_guest_kernel == handler.has_sandbox == (dialect == "runsc")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ('args = ["ptrace"]', r"args: 'ptrace' is not --NAME or --NAME=VALUE"),
        ('args = ["--platform ptrace", "x"]', "is not --NAME"),
        ('args = ["--strace=a\\nb"]', "is not --NAME"),
        ('args = ["--root=/tmp"]', "the server gives --root itself"),
        ('args = ["-log=/tmp"]', "the server gives --log itself"),
        ('sandbox = "namespaces"', "runsc needs a sandbox container"),
        ('dialect = "kata"', "dialect"),
        ('default_unified = { "memory.high" = "1" }', "runsc cannot limit one container"),
    ],
)
def test_what_a_runtime_cannot_be_given_is_refused(
    read: Read, install: Install, keys: str, message: str
) -> None:
    install()

    with pytest.raises(config.ConfigError, match=rf"\[runtimes\.runsc\]: .*{message}"):
        read(f"[runtimes.runsc]\n{keys}")


@pytest.mark.parametrize(
    ("args", "host"),
    [
        ([], False),
        (["--network=host"], True),
        (["-network=host"], True),
        (["--network=sandbox"], False),
        (["--network=host", "--network=none"], False),
    ],
)
def test_the_network_stack_of_a_guest_kernel_is_the_hosts_where_runsc_is_told_so(
    read: Read, install: Install, args: list[str], *, host: bool
) -> None:
    install()
    found = read(f"[runtimes.runsc]\nargs = {args}\n[runtimes.runc]\nargs = {args}").runtimes
    assert (found["runsc"].uses_host_stack, found["runc"].uses_host_stack) == (host, True)


def test_annotations_are_let_through_by_glob_only() -> None:
    given = {"io.katacontainers.config.x": "1", "io.katacontainers": "2", "other/io.kata": "3"}

    assert config.Handler.allowed((), given) == {}
    assert config.Handler.allowed(("io.katacontainers.*",), given) == {
        "io.katacontainers.config.x": "1"
    }


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[sever]", "unknown key 'sever'; did you mean 'server'?"),
        ("lisen = 1", "unknown key 'lisen' (known: server, network, images, runtime, "),
        ("[server]\nrot = '/x'", "[server]: unknown key 'rot'; did you mean 'root'?"),
        ("[images]\nzzz = 1", "[images]: unknown key 'zzz' (known: registry_config_dirs, pinned,"),
        ("[runtimes.a]\npth = ''", "[runtimes.a]: unknown key 'pth'; did you mean 'path'?"),
        (
            "[runtimes.a]\noptions = { timout = 1 }",
            "[runtimes.a]: options: unknown key 'timout'; did you mean 'timeout'?",
        ),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(read: Read, text: str, words: str) -> None:
    with pytest.raises(config.ConfigError) as refused:
        read(text)

    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("server = 3", "[server]: expected a table"),
        ("[[network]]", "[network]: expected a table"),
        ("runtimes = []", "[runtimes]: expected a table"),
        ("[runtimes]\na = 'runc'", "[runtimes.a]: expected a table"),
        ("[server]\nroot = 3", "[server]: root: Expected a path, got 3"),
        (
            "[server]\nlog_level = 'loud'",
            "log_level: Invalid enum value 'loud' (known: debug, info",
        ),
        ("[network]\nadd_timeout = '5s'", "[network]: add_timeout: Expected `float`, got `str`"),
        ("[network]\nbin_dirs = '/a'", "[network]: bin_dirs: Expected `array`, got `str`"),
        ("[images]\npinned = ['a', 1]", "[images]: pinned[1]: Expected `str`, got `int`"),
        ("[images]\nmax_parallel_downloads = true", "Expected `int`, got `bool`"),
        (
            "[runtimes.a]\nkind = 'vm'",
            "[runtimes.a]: kind: Invalid enum value 'vm' (known: oci, shim",
        ),
        ("[runtimes.a.options]\ntimeout = 'x'", "[runtimes.a]: options: timeout: 'x' is not seco"),
    ],
)
def test_a_wrong_type_is_refused_with_its_place(read: Read, text: str, words: str) -> None:
    with pytest.raises(config.ConfigError) as refused:
        read(text)

    assert words in str(refused.value)


@pytest.mark.parametrize(
    "text",
    [
        "[server]\nlisten = 'tcp://127.0.0.1:1'",
        "[server]\nlisten = 'unix://cri.sock'",
        "[server]\nstate = 'run'",
        "[network]\nconf_dir = '~/net.d'",
        "[network]\nbin_dirs = ['/a', 'b']",
        "[network]\ndel_timeout = 0",
        "[network]\ndel_timeout = nan",
        "[runtime]\nruntime_timeout = inf",
        "[images]\nmax_parallel_downloads = 0",
        "[runtimes.a]\npath = 'bin/runc'",
        "[runtimes.a]\ndefault_capabilities = ['FLY']",
        "[runtimes.a]\ndefault_capabilities = 'CHOWN'",
        "[runtimes.a]\ndefault_rlimits = 'nofile=2:1'",
        "[runtimes.a]\ndefault_rlimits = ['nofile=2']",
        "[runtimes.a]\ndefault_shm_size = '64MB'",
        "[runtimes.'../a']",
        "[runtimes.'']",
    ],
)
def test_a_value_that_cannot_work_is_refused(read: Read, text: str) -> None:
    with pytest.raises(config.ConfigError):
        read(text)


def test_the_message_begins_with_the_file(read: Read, tmp_path: Path) -> None:
    for text in ("[server", "[server]\nrot = 1", "[server]\nroot = 1", "x = '\\uZZZZ'"):
        with pytest.raises(config.ConfigError) as refused:
            read(text)
        assert str(refused.value).startswith(f"{tmp_path}/config.toml: ")


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "latin1.toml").write_bytes(b"# caf\xe9\n")

    for path in (tmp_path, tmp_path / "latin1.toml"):
        with pytest.raises(config.ConfigError) as refused:
            config.load(path)
        assert str(path) in str(refused.value)
