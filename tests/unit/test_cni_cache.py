# SPDX-License-Identifier: Apache-2.0
"""The result cache: libcni's place and format."""

import base64
import dataclasses
import json
from pathlib import Path

import pytest

from cri_server.network import cache

ENTRY = cache.Entry(
    network="net-a",
    container_id="c1",
    ifname="eth0",
    netns="/run/netns/c1",
    config=b'{"name": "net-a"}',
    args=(("IgnoreUnknown", "1"), ("K8S_POD_NAME", "web")),
    capabilities={"cgroupPath": "/x"},
    result={"cniVersion": "1.0.0", "ips": [{"address": "10.0.0.2/16"}]},
)


def test_the_file_is_libcnis(tmp_path: Path) -> None:
    cache.Cache(tmp_path).write(ENTRY)
    file = tmp_path / "results" / "net-a-c1-eth0"
    assert json.loads(file.read_text()) == {
        "kind": "cniCacheV1",
        "containerId": "c1",
        "config": base64.b64encode(ENTRY.config).decode(),
        "ifName": "eth0",
        "networkName": "net-a",
        "netns": "/run/netns/c1",
        "cniArgs": [["IgnoreUnknown", "1"], ["K8S_POD_NAME", "web"]],
        "capabilityArgs": {"cgroupPath": "/x"},
        "result": {"cniVersion": "1.0.0", "ips": [{"address": "10.0.0.2/16"}]},
    }
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700
    assert [p.name for p in tmp_path.iterdir()] == ["results"]


def test_what_was_written_is_found_until_it_is_removed(tmp_path: Path) -> None:
    entries = cache.Cache(tmp_path)
    assert entries.find("c1", "eth0") == []
    intent = dataclasses.replace(ENTRY, result=None, netns="", args=(), capabilities={})
    entries.write(intent)
    assert entries.find("c1", "eth0") == [intent]
    entries.write(ENTRY)
    entries.write(dataclasses.replace(ENTRY, container_id="c2"))
    assert entries.find("c1", "eth0") == [ENTRY]
    entries.remove(ENTRY)
    entries.remove(ENTRY)
    assert entries.find("c1", "eth0") == []
    assert [e.container_id for e in entries.of_network("net-a")] == ["c2"]


def test_the_name_of_a_network_may_begin_with_that_of_another(tmp_path: Path) -> None:
    entries = cache.Cache(tmp_path)
    entries.write(ENTRY)
    assert list(entries.of_network("net")) == []
    assert list(entries.of_network("net-a")) == [ENTRY]


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff", b'{"kind": "other"}', b'{"kind": 7}'])
def test_a_broken_file_is_an_entry_without_config(tmp_path: Path, data: bytes) -> None:
    entries = cache.Cache(tmp_path)
    entries.write(ENTRY)
    (tmp_path / "results" / "net-a-c1-eth0").write_bytes(data)
    (found,) = entries.find("c1", "eth0")
    assert found == cache.Entry(network="net-a", container_id="c1", ifname="eth0")
    entries.remove(found)
    assert entries.find("c1", "eth0") == []


def test_an_entry_that_says_to_be_another_is_broken(tmp_path: Path) -> None:
    entries = cache.Cache(tmp_path)
    entries.write(ENTRY)
    results = tmp_path / "results"
    (results / "net-a-c1-eth0").rename(results / "net-b-c1-eth0")
    (found,) = entries.find("c1", "eth0")
    assert (found.network, found.config) == ("net-b", b"")


@pytest.mark.parametrize("kind", ["folder", "broken"])
def test_what_cannot_be_read_keeps_its_addresses(tmp_path: Path, kind: str) -> None:
    """GC frees what is not named."""
    entries = cache.Cache(tmp_path)
    entries.write(ENTRY)
    path = tmp_path / "results" / "net-a-c1-eth0"
    if kind == "folder":
        path.unlink()
        (path / "in").mkdir(parents=True)
    else:
        path.write_bytes(b"{")
    (tmp_path / "results" / "net-a-x").mkdir()
    found = list(entries.of_network("net-a"))
    assert found == [cache.Entry(network="net-a", container_id="c1", ifname="eth0")]
    assert entries.find("c1", "eth0") == found
    entries.remove(found[0])
    assert entries.find("c1", "eth0") == []


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "results" / "net-a-c1-eth0").mkdir(parents=True)  # no place for a file
    with pytest.raises(IsADirectoryError):
        cache.Cache(tmp_path).write(ENTRY)
    assert [p.name for p in tmp_path.iterdir()] == ["results"]


def test_what_a_kill_amid_a_write_left_goes_with_its_pod(tmp_path: Path) -> None:
    own, other = tmp_path / ".net-a-c1-eth0.new", tmp_path / ".net-a-c2-eth0.new"
    for file in (own, other):
        file.write_bytes(b"{")
    entries = cache.Cache(tmp_path)
    entries.remove_unfinished("c1", "eth0")
    entries.remove_unfinished("c1", "eth0")
    assert [*tmp_path.iterdir()] == [other]
