# SPDX-License-Identifier: Apache-2.0
"""What a server learns of the mounts of an earlier one."""

from pathlib import Path

import pytest

from cri_server import imagevolumes, snapshots

KEYS = ("1" * 64, "2" * 64)


@pytest.fixture
def layers(tmp_path: Path) -> snapshots.Snapshots:
    host = snapshots.Snapshots(tmp_path / "root")
    for key in KEYS:
        folder = host.staging_path()
        host.stage(folder)
        host.commit(folder, key, snapshots.Layer(diff_id="x", bytes=1, inodes=1))
    return host


def note(state: Path, text: bytes) -> None:
    folder = state / "pods" / "pod" / "images" / "image"
    folder.mkdir(parents=True)
    (folder / "layers.json").write_bytes(text)


def test_a_mount_keeps_its_layers(tmp_path: Path, layers: snapshots.Snapshots) -> None:
    note(tmp_path, b'["%s"]' % KEYS[0].encode())
    assert list(imagevolumes.ImageVolumes(tmp_path, layers).in_use()) == [KEYS[0]]


@pytest.mark.parametrize("text", [b"", b"[", b'["\xff"]', b"[" * 100_000, b'{"a":1}'], ids=range(5))
def test_a_mount_whose_note_is_spoilt_keeps_every_layer(
    tmp_path: Path, layers: snapshots.Snapshots, text: bytes
) -> None:
    note(tmp_path, text)
    assert set(imagevolumes.ImageVolumes(tmp_path, layers).in_use()) == set(KEYS)
