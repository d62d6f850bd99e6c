# SPDX-License-Identifier: Apache-2.0
"""CDI files: which count, how they are read again, and how an error names what is wrong."""

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

import pytest
import yaml

from cri_server import cdi, errors
from tests.lab import driving

pytestmark = pytest.mark.needs("root")


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Return two folders of files; the second stands above the first."""
    made = tmp_path / "etc", tmp_path / "run"
    for folder in made:
        folder.mkdir()
    return made


@pytest.fixture
def registry(folders: tuple[Path, Path]) -> cdi.Registry:
    return cdi.Registry((*folders, folders[0] / "missing"))


def document(*names: str, kind: str = "v.com/gpu", **edits: Any) -> dict[str, Any]:
    """Return a file with these devices; each sets a variable of its name, `edits` are for all."""
    devices = [{"name": n, "containerEdits": {"env": [f"DEVICE_{n}=1"]}} for n in names or ("a",)]
    return {"cdiVersion": "1.1.0", "kind": kind, "devices": devices, "containerEdits": edits}


def write(path: Path, content: object) -> Path:
    text = json.dumps(content) if path.suffix == ".json" else yaml.safe_dump(content)
    path.write_text(text)
    return path


def test_json_and_yaml_are_read_and_a_files_own_edits_come_first_and_once(
    registry: cdi.Registry, folders: tuple[Path, Path]
) -> None:
    write(folders[0] / "a.yaml", document("a", "b", env=["ALL=1"]))
    write(folders[0] / "b.json", document("c", kind="w.org/net", env=["NET=1"]))
    found = registry.resolve(["v.com/gpu=b", "w.org/net=c", "v.com/gpu=a"])
    assert found.env == ("ALL=1", "DEVICE_b=1", "NET=1", "DEVICE_c=1", "DEVICE_a=1")
    assert found.devices == ("v.com/gpu=b", "w.org/net=c", "v.com/gpu=a")


def test_a_later_folder_stands_above_an_earlier_one(
    registry: cdi.Registry, folders: tuple[Path, Path]
) -> None:
    write(folders[0] / "x.yaml", document("a", "b", env=["OF=etc"]))
    write(folders[0] / "y.yaml", document("a", env=["OF=etc too"]))
    write(folders[1] / "z.yaml", document("a", env=["OF=run"]))
    assert registry.resolve(["v.com/gpu=a"]).env[0] == "OF=run"
    assert registry.resolve(["v.com/gpu=b"]).env[0] == "OF=etc"


def test_two_files_of_one_folder_with_one_device_are_both_named(
    registry: cdi.Registry, folders: tuple[Path, Path]
) -> None:
    one = write(folders[1] / "one.yaml", document("a", "b"))
    two = write(folders[1] / "two.yaml", document("a"))
    with pytest.raises(errors.FailedPrecondition, match=f"'v.com/gpu=a'.*{one}.*{two}"):
        registry.resolve(["v.com/gpu=a"])
    assert registry.resolve(["v.com/gpu=b"]).env == ("DEVICE_b=1",)


def test_an_unknown_device_is_named(registry: cdi.Registry) -> None:
    with pytest.raises(errors.FailedPrecondition, match=r"'v.com/gpu=a' is not known$"):
        registry.resolve(["v.com/gpu=a"])


def test_files_are_read_again_when_they_change_and_only_then(
    registry: cdi.Registry, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(folders[0] / "a.yaml", document("a"))
    assert registry.resolve(["v.com/gpu=a"]).env == ("DEVICE_a=1",)
    read = cdi._document
    monkeypatch.setattr(cdi, "_document", lambda _: pytest.fail("it has not changed"))
    assert registry.resolve(["v.com/gpu=a"]).env == ("DEVICE_a=1",)
    monkeypatch.setattr(cdi, "_document", read)
    write(path, document("a", env=["NEW=1"]))
    assert registry.resolve(["v.com/gpu=a"]).env == ("NEW=1", "DEVICE_a=1")
    write(folders[0] / "b.yaml", document("b"))
    assert registry.resolve(["v.com/gpu=b"]).env == ("DEVICE_b=1",)
    path.unlink()
    with pytest.raises(errors.FailedPrecondition, match="not known"):
        registry.resolve(["v.com/gpu=a"])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.chmod(0o646),
        lambda path: os.chown(path, 1000, 0),
        lambda path: path.chmod(0o664) or os.chown(path, 0, 1000),  # type: ignore[func-returns-value]
        lambda path: path.parent.chmod(0o777),
        lambda path: os.chown(path.parent, 1000, 0),
    ],
    ids=["world", "owner", "group", "folder", "folder's owner"],
)
def test_what_another_than_root_may_write_is_not_believed(
    registry: cdi.Registry, folders: tuple[Path, Path], spoil: Any
) -> None:
    path = write(folders[0] / "a.yaml", document("a"))
    before = path.stat(), folders[0].stat()
    spoil(path)
    with pytest.raises(errors.FailedPrecondition, match=rf"not known; {path}: .*root's"):
        registry.resolve(["v.com/gpu=a"])
    for place, st in zip((path, folders[0]), before, strict=True):
        os.chown(place, st.st_uid, st.st_gid)
        place.chmod(stat.S_IMODE(st.st_mode))
    assert registry.resolve(["v.com/gpu=a"]).devices == ("v.com/gpu=a",)


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
@pytest.mark.parametrize(
    "text",
    ["", "{", "[" * 100_000, "\0", "\xff\xfe", "a: &a [*a, *a]", "!!python/object:os.system {}"],
    ids=["empty", "open", "deep", "nul", "bytes", "itself", "object"],
)
def test_a_file_that_is_none_spoils_no_other(
    registry: cdi.Registry, folders: tuple[Path, Path], suffix: str, text: str
) -> None:
    bad = folders[0] / f"bad{suffix}"
    bad.write_text(text, encoding="latin-1")
    write(folders[0] / "good.yaml", document("a"))
    assert registry.resolve(["v.com/gpu=a"]).env == ("DEVICE_a=1",)
    with pytest.raises(errors.FailedPrecondition, match=re.escape(str(bad))) as failure:
        registry.resolve(["v.com/gpu=b"])
    assert "\n" not in failure.value.message
    assert len(failure.value.message) < 600


def test_what_is_no_regular_file_of_bounded_size_is_not_read(
    registry: cdi.Registry, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(folders[0] / "fifo.yaml")
    (folders[0] / "folder.json").mkdir()
    (folders[0] / "dangling.yaml").symlink_to("nowhere")
    write(folders[0] / "ignored.yml", document("a"))
    monkeypatch.setattr(cdi, "FILE_LIMIT", 10)
    write(folders[0] / "large.json", document("a"))
    monkeypatch.setattr(cdi, "NAMED_FILES", 9)
    with driving.keeping_descriptors(), pytest.raises(errors.FailedPrecondition) as failure:
        registry.resolve(["v.com/gpu=a"])
    for name in ("fifo.yaml", "folder.json", "dangling.yaml", "large.json"):
        assert name in failure.value.message
    assert "ignored" not in failure.value.message


# -- what the host has -----------------------------------------------------------------------------


def resolved(registry: cdi.Registry, folder: Path, **edits: Any) -> Any:
    write(folder / "device.yaml", document("a", **edits))
    return registry.resolve(["v.com/gpu=a"])


def test_a_device_node_is_looked_up_where_the_file_does_not_tell(
    registry: cdi.Registry, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    os.mknod(tmp_path / "disk", stat.S_IFBLK | 0o600, os.makedev(7, 3))
    nodes = [
        {"path": "/dev/null"},
        {"path": "/dev/x", "hostPath": str(tmp_path / "disk"), "permissions": "r", "gid": 6},
        {"path": "/dev/told", "type": "u", "major": 200, "minor": 1, "fileMode": 0o600},
        {"path": "/dev/pipe", "type": "p", "permissions": "none"},
    ]
    found = resolved(registry, folders[0], deviceNodes=nodes).nodes
    assert [(n.path, n.kind, n.major, n.minor, n.access) for n in found] == [
        ("/dev/null", "c", 1, 3, "rwm"),
        ("/dev/x", "b", 7, 3, "r"),
        ("/dev/told", "c", 200, 1, "rwm"),
        ("/dev/pipe", "p", 0, 0, ""),
    ]
    assert [(n.mode, n.gid) for n in found[1:3]] == [(None, 6), (0o600, None)]


@pytest.mark.parametrize(
    "node",
    [
        {"path": "/dev/missing-node"},
        {"path": "/dev/null", "type": "b"},
        {"path": "/etc/passwd"},
    ],
    ids=["missing", "other type", "a file"],
)
def test_a_device_node_that_is_not_there_is_named_with_its_device(
    registry: cdi.Registry, folders: tuple[Path, Path], node: dict[str, Any]
) -> None:
    with pytest.raises(errors.FailedPrecondition, match=f"v.com/gpu=a.*{node['path']}"):
        resolved(registry, folders[0], deviceNodes=[node])


def test_mounts_are_of_what_is_there(
    registry: cdi.Registry, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "lib.so.1").touch()
    (tmp_path / "lib.so").symlink_to("lib.so.1")
    mounts = [
        {"hostPath": str(tmp_path / "lib.so"), "containerPath": "/usr/lib/./lib.so"},
        {"hostPath": str(tmp_path), "containerPath": "/d", "options": ["ro", "bind"]},
        {"hostPath": "tmpfs", "containerPath": "/t", "type": "tmpfs", "options": ["size=1m"]},
    ]
    found = resolved(registry, folders[0], mounts=mounts)
    assert [(m["destination"], m["type"], m["source"], m["options"]) for m in found.mounts] == [
        ("/usr/lib/lib.so", "bind", str(tmp_path / "lib.so.1"), ["rbind"]),
        ("/d", "bind", str(tmp_path), ["ro", "bind"]),
        ("/t", "tmpfs", "tmpfs", ["size=1m"]),
    ]
    assert found.files == {str(tmp_path / "lib.so.1")}
    missing = [{"hostPath": "/never/there", "containerPath": "/x"}]
    with pytest.raises(errors.FailedPrecondition, match=r"v.com/gpu=a.*/never/there"):
        resolved(registry, folders[0], mounts=missing)
    assert not Path("/never").exists()


def test_a_hook_never_inherits_an_environment(
    registry: cdi.Registry, folders: tuple[Path, Path]
) -> None:
    hooks = [
        {"hookName": "createContainer", "path": "/h", "args": ["h", "x"], "timeout": 3},
        {"hookName": "poststop", "path": "/h", "env": ["A=1"]},
    ]
    assert resolved(registry, folders[0], hooks=hooks).hooks == (
        (
            "createContainer",
            {"path": "/h", "args": ["h", "x"], "env": [cdi.HOOK_ENV], "timeout": 3},
        ),
        ("poststop", {"path": "/h", "args": [], "env": ["A=1"]}),
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("intelRdt", {"closID": "x"}),
        ("netDevices", [{"hostInterfaceName": "eth9", "name": "x"}]),
    ],
)
def test_edits_that_are_not_supported_are_refused_by_name(
    registry: cdi.Registry, folders: tuple[Path, Path], field: str, value: object
) -> None:
    with pytest.raises(errors.InvalidArgument, match=f"v.com/gpu=a.*{field}"):
        resolved(registry, folders[0], **{field: value})


def test_group_zero_is_left_out(registry: cdi.Registry, folders: tuple[Path, Path]) -> None:
    assert resolved(registry, folders[0], additionalGids=[0, 44]).gids == (44,)


@pytest.mark.parametrize("option", ["idmap", "ridmap"])
def test_a_mapping_that_oci_runtimes_would_ignore_is_refused(
    registry: cdi.Registry, folders: tuple[Path, Path], tmp_path: Path, option: str
) -> None:
    mount = {"hostPath": str(tmp_path), "containerPath": "/x", "options": ["ro", option]}
    write(folders[0] / "x.yaml", document("a", mounts=[mount]))
    with pytest.raises(errors.InvalidArgument, match=f"'v.com/gpu=a': mount '/x': option {option}"):
        registry.resolve(["v.com/gpu=a"])


def test_a_node_that_will_be_bound_must_be_what_the_file_says(
    registry: cdi.Registry, folders: tuple[Path, Path]
) -> None:
    nodes = [{"path": "/dev/mine", "hostPath": "/dev/zero", "type": "c", "major": 1, "minor": 5}]
    write(folders[0] / "x.yaml", document("a", deviceNodes=nodes))
    [node] = registry.resolve(["v.com/gpu=a"], bound=True).nodes
    assert (node.path, node.host_path, node.major, node.minor) == ("/dev/mine", "/dev/zero", 1, 5)
    nodes[0]["minor"] = 7
    write(folders[0] / "x.yaml", document("a", deviceNodes=nodes))
    assert registry.resolve(["v.com/gpu=a"]).nodes[0].minor == 7
    with pytest.raises(errors.FailedPrecondition, match="'/dev/zero': is 1:5, not 1:7"):
        registry.resolve(["v.com/gpu=a"], bound=True)
