# SPDX-License-Identifier: Apache-2.0
"""Which CNI configuration counts, and what is refused."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from cri_server.network import conf


def text(name: str = "net", version: object = "1.0.0", **more: Any) -> bytes:
    document = {"cniVersion": version, "name": name, "plugins": [{"type": "bridge"}], **more}
    return json.dumps({k: v for k, v in document.items() if v is not None}).encode()


def chain_of(directory: conf.Directory) -> str:
    chain = directory.load().chain
    return chain.name if chain else ""


def test_the_first_valid_file_by_name_counts_and_the_broken_ones_are_named(tmp_path: Path) -> None:
    (tmp_path / "30-c.conflist").write_bytes(text("c"))
    (tmp_path / "20-b.conf").write_bytes(text("b"))
    (tmp_path / "10-a.json").write_bytes(b"{")
    (tmp_path / "05-no.txt").write_bytes(text("no"))
    loaded = conf.Directory(tmp_path).load()
    assert loaded.chain is not None
    assert loaded.chain.name == "b"
    assert loaded.chain.path == str(tmp_path / "20-b.conf")
    assert len(loaded.skipped) == 1
    assert loaded.skipped[0].startswith("10-a.json: not JSON")


def test_a_directory_that_is_missing_or_empty_has_no_network(tmp_path: Path) -> None:
    assert conf.Directory(tmp_path / "none").load() == conf.Loaded()
    assert conf.Directory(tmp_path).load() == conf.Loaded()


def test_changes_are_noticed_and_an_unchanged_directory_is_not_read_again(tmp_path: Path) -> None:
    directory = conf.Directory(tmp_path)
    assert chain_of(directory) == ""
    (tmp_path / "20-b.conflist").write_bytes(text("b"))
    assert chain_of(directory) == "b"
    assert directory.load() is directory.load()
    (tmp_path / "10-a.conflist").write_bytes(text("a"))
    assert chain_of(directory) == "a"
    (tmp_path / "new").write_bytes(text("A"))
    (tmp_path / "new").rename(tmp_path / "10-a.conflist")
    assert chain_of(directory) == "A"
    (tmp_path / "10-a.conflist").unlink()
    assert chain_of(directory) == "b"


def types_of(directory: conf.Directory) -> list[str]:
    chain = directory.load().chain
    return [plugin.type for plugin in chain.plugins] if chain else []


def test_the_plugins_in_the_folder_of_a_network_are_behind_its_own(tmp_path: Path) -> None:
    """As libcni 1.3.0 has it (NetworkConfFromFile), which both peers use."""
    folder = tmp_path / "net"
    folder.mkdir()
    (tmp_path / "10-a.conflist").write_bytes(text(plugins=None))
    directory = conf.Directory(tmp_path)
    assert directory.load().skipped == ("10-a.conflist: neither 'plugins' nor 'type'",)
    for name in ("20-b.conf", "10-a.conf", "30-no.json"):
        (folder / name).write_text(json.dumps({"type": name}))
    assert types_of(directory) == ["10-a.conf", "20-b.conf"]
    (tmp_path / "10-a.conflist").write_bytes(text())
    assert types_of(directory) == ["bridge", "10-a.conf", "20-b.conf"]
    chain = directory.load().chain
    assert chain is not None
    assert conf.parse(chain.source).plugins == chain.plugins
    (folder / "10-a.conf").write_text("{")
    assert directory.load().skipped[0].startswith("10-a.conflist: net/10-a.conf: not JSON")
    (folder / "10-a.conf").unlink()
    assert types_of(directory) == ["bridge", "20-b.conf"]
    (tmp_path / "10-a.conflist").write_bytes(text(loadOnlyInlinedPlugins="true"))
    assert types_of(directory) == ["bridge"]
    (tmp_path / "10-a.conflist").rename(tmp_path / "10-a.conf")  # libcni: of conflists alone
    (tmp_path / "10-a.conf").write_bytes(text())
    assert types_of(directory) == ["bridge"]


def test_a_link_is_followed_and_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    folder = tmp_path / "net.d"
    (folder / "05-directory.conf").mkdir(parents=True)
    os.mkfifo(folder / "06-fifo.conf")
    (folder / "07-dangling.conf").symlink_to("nowhere")
    (folder / "08-link.conf").symlink_to(tmp_path / "real")
    (tmp_path / "real").write_bytes(text("real"))
    loaded = conf.Directory(folder).load()
    assert loaded.chain is not None
    assert loaded.chain.name == "real"
    assert not loaded.skipped


def test_a_single_plugin_becomes_a_chain_of_one_that_parses_again() -> None:
    single = {"cniVersion": "0.4.0", "name": "one", "type": "ptp", "mtu": 1400}
    chain = conf.parse(json.dumps(single).encode())
    assert [p.type for p in chain.plugins] == ["ptp"]
    again = conf.parse(chain.source)
    assert (again.name, again.version, again.plugins) == ("one", "0.4.0", chain.plugins)


def test_the_highest_version_that_we_know_is_chosen() -> None:
    chain = conf.parse(text(version="0.3.1", cniVersions=["1.1.0", "0.4.0", "9.0.0", 7]))
    assert chain.version == "1.1.0"
    assert chain.speaks("1.1.0")
    older = conf.parse(text(version="0.3.1"))
    assert older.speaks("0.3.1")
    assert not older.speaks("0.4.0")


def test_flags_may_be_strings() -> None:
    assert conf.parse(text(disableCheck="True")).disable_check
    assert not conf.parse(text(disableGC="false")).disable_gc


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "not JSON"),
        (b"[]", "not a JSON object"),
        (b"\xff\xfe", "not JSON"),
        (b'{"a":' * 100_000, "not JSON"),
        (b"{}", "neither 'plugins' nor 'type'"),
        (text(plugins=[]), "'plugins'"),
        (text(plugins={}), "'plugins'"),
        (text(plugins=["bridge"]), "not a JSON object"),
        (text(plugins=[{}]), "without 'type'"),
        (text(plugins=[{"type": 7}]), "without 'type'"),
        (text(plugins=[{"type": "../../bin/sh"}]), "not the name of a program"),
        (text(plugins=[{"type": ".."}]), "not the name of a program"),
        (text(plugins=[{"type": "a\0b"}]), "not the name of a program"),
        (text(plugins=[{"type": "b", "ipam": {"type": "/bin/sh"}}]), "not the name of a program"),
        (text(name="../x"), "'name'"),
        (text(name=""), "'name'"),
        (text(name="a/b"), "'name'"),
        (text(name="n" * 200), "'name'"),
        (text(version="0.2.0"), "'cniVersion'"),
        (text(version=None), "'cniVersion'"),
        (text(version=["1.0.0"]), "'cniVersion'"),
        (text(disableCheck=3), "'disableCheck'"),
    ],
)
def test_what_cannot_be_used_is_refused_with_the_reason(data: bytes, why: str) -> None:
    with pytest.raises(conf.Invalid, match=why):
        conf.parse(data)


def test_a_huge_file_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "10.conf").write_bytes(b" " * (conf.MAX_SIZE + 1))
    (skipped,) = conf.Directory(tmp_path).load().skipped
    assert "larger than" in skipped


def test_only_capabilities_that_are_declared_true_are_accepted() -> None:
    declared = {"portMappings": True, "dns": False, "ips": "true"}
    plugin = conf.Plugin(type="p", document={"capabilities": declared})
    assert [c for c in declared if plugin.accepts(c)] == ["portMappings"]
    assert not conf.Plugin(type="p", document={"capabilities": ["dns"]}).accepts("dns")
