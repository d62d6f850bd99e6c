# SPDX-License-Identifier: Apache-2.0
"""CDI devices in real containers: files that appear while the server runs do what they say."""

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml

from cri_server.pb import api_pb2 as api
from tests.fakes.kubelet import Kubelet, Pod, refusal
from tests.lab import server, waiting

pytestmark = [
    pytest.mark.needs("root", "netns", "overlay", "runc", "docker-registry", "busybox"),
    pytest.mark.ours,
]
SLEEP = ("sleep", "86400")


class Lab:
    """A server with folders of its own for CDI files, and a pod in it."""

    def __init__(self, folders: tuple[Path, Path], client: Kubelet, image: str) -> None:
        self.etc, self.run = folders
        self.client, self.image = client, image
        self.pod: Pod = client.run_pod()
        self._number = 0

    def write(self, folder: Path, name: str, *devices: str, **edits: Any) -> Path:
        """Write a file whose devices set a variable each; `edits` are for all of them."""
        document = {
            "cdiVersion": "0.7.0",
            "kind": "lab.test/thing",
            "devices": [
                {"name": d, "containerEdits": {"env": [f"THING_{d}=yes"]}} for d in devices
            ],
            "containerEdits": edits,
        }
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(yaml.safe_dump(document))
        return folder / name

    def config(self, *devices: str, **fields: Any) -> api.ContainerConfig:
        self._number += 1
        named = [api.CDIDevice(name=f"lab.test/thing={d}") for d in devices]
        return self.client.container_config(
            self.image, SLEEP, name=f"c{self._number}", CDI_devices=named, **fields
        )

    def start(self, *devices: str, **fields: Any) -> str:
        container = self.client.create(self.pod, self.config(*devices, **fields))
        self.client.start(container)
        return container

    def sh(self, container: str, script: str) -> str:
        done = self.client.exec_sync(container, ["sh", "-c", f"exec 2>&1; {script}"])
        return done.stdout.decode()


@pytest.fixture
def lab(
    make_site: Callable[..., server.Site],
    client_of: Callable[[server.Site], Kubelet],
    reference: str,
    tmp_path: Path,
) -> Iterator[Lab]:
    folders = tmp_path / "etc-cdi", tmp_path / "run-cdi"
    site = make_site(runtime={"cdi_spec_dirs": [os.fspath(f) for f in folders]})
    client = client_of(site)
    client.pull(reference)
    made = Lab(folders, client, reference)
    yield made
    client.remove_pod(made.pod.id)


def hook(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return os.fspath(path)


def test_a_device_brings_all_that_its_file_says(lab: Lab, tmp_path: Path) -> None:
    os.mknod(tmp_path / "zero", stat.S_IFCHR | 0o600, os.makedev(1, 5))
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/driver.so").write_text("driver\n")
    seen = tmp_path / "seen"
    hooks = [
        {
            "hookName": "createRuntime",
            "path": hook(
                tmp_path / "hook", f'echo "$@" >{seen}; env | sort >>{seen}; id -u >>{seen}'
            ),
            "args": ["hook", "one", "two"],
        },
        {"hookName": "poststop", "path": hook(tmp_path / "end", f"echo gone >>{seen}")},
    ]
    lab.write(
        lab.etc,
        "thing.yaml",
        "a",
        "b",
        env=["LAB=cdi"],
        deviceNodes=[{"path": "/dev/thing0", "hostPath": str(tmp_path / "zero")}],
        mounts=[
            {
                "hostPath": str(tmp_path / "lib/driver.so"),
                "containerPath": "/usr/lib/driver.so",
                "options": ["ro", "nosuid", "bind"],
            }
        ],
        hooks=hooks,
        additionalGids=[4242],
    )
    context = api.LinuxContainerSecurityContext(
        run_as_user=api.Int64Value(value=1000), run_as_group=api.Int64Value(value=1000)
    )
    context.namespace_options.pid = api.CONTAINER
    container = lab.start(
        "b",
        linux=api.LinuxContainerConfig(security_context=context),
        envs=[api.KeyValue(key="LAB", value=b"request"), api.KeyValue(key="OWN", value=b"1")],
    )
    script = "echo $LAB $OWN $THING_a $THING_b; cat /usr/lib/driver.so; id -G"
    assert lab.sh(container, script) == "cdi 1 yes\ndriver\n1000 4242 50000\n"
    assert lab.sh(container, "head -c 3 /dev/thing0 | wc -c; echo x >/dev/thing0; echo $?") == (
        "3\n0\n"
    )
    assert lab.sh(container, "stat -c '%a %u %g %t %T' /dev/thing0") == "666 1000 1000 1 5\n"
    assert "Read-only" in lab.sh(container, "echo x >/usr/lib/driver.so")
    assert 4242 in lab.client.status(container).user.linux.supplemental_groups
    words = seen.read_text().splitlines()
    assert words[0] == "one two"
    assert [w for w in words if w.startswith("PATH=")] == [
        "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    ]
    assert not [w for w in words if w.startswith(("LAB=", "OWN=", "LD_"))]
    assert words[-1] == "0"
    lab.client.remove(container)
    waiting.until(lambda: "gone" in seen.read_text(), "the last hook has run")


def test_a_device_that_was_not_asked_for_is_not_there(lab: Lab) -> None:
    node = {"path": "/dev/thing", "type": "c", "major": 10, "minor": 229}
    lab.write(lab.etc, "thing.yaml", "a", deviceNodes=[node])
    plain, given = lab.start(), lab.start("a")
    assert lab.sh(plain, "ls /dev/thing 2>/dev/null; mknod /dev/thing c 10 229") == ""
    assert "not permitted" in lab.sh(plain, "(exec 3</dev/thing)")
    assert "not permitted" not in lab.sh(given, "(exec 3<>/dev/thing)")


def test_annotations_ask_too_and_labels_of_nobody_do(lab: Lab) -> None:
    lab.write(lab.etc, "thing.yaml", "a", "b")
    annotations = {"cdi.k8s.io/plugin_x": "lab.test/thing=a,lab.test/thing=b"}
    container = lab.start("b", annotations=annotations)
    assert lab.sh(container, "echo $THING_a $THING_b") == "yes yes\n"
    assert lab.client.status(container).annotations == annotations
    labelled = lab.start(labels={"cdi.k8s.io/plugin_x": "lab.test/thing=a"})
    assert lab.sh(labelled, "echo $THING_a") == "\n"


def test_files_are_seen_as_they_come_change_and_go(lab: Lab) -> None:
    code, text = refusal(lambda: lab.start("a"))
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert "'lab.test/thing=a' is not known" in text
    lab.write(lab.etc, "thing.yaml", "a", env=["OF=etc"])
    assert lab.sh(lab.start("a"), "echo $OF") == "etc\n"
    upper = lab.write(lab.run, "thing.yaml", "a", env=["OF=run"])
    assert lab.sh(lab.start("a"), "echo $OF") == "run\n"
    other = lab.write(lab.run, "other.yaml", "a")
    _, text = refusal(lambda: lab.start("a"))
    assert str(other) in text
    assert str(upper) in text
    other.unlink()
    upper.unlink()
    assert lab.sh(lab.start("a"), "echo $OF") == "etc\n"


def test_a_refusal_names_the_device_and_leaves_nothing(lab: Lab, tmp_path: Path) -> None:
    path = lab.write(lab.etc, "thing.yaml", "a", mounts=[])
    path.chmod(0o666)
    _, text = refusal(lambda: lab.start("a"))
    assert text.startswith("CDI device 'lab.test/thing=a' is not known; ")
    assert str(path) in text
    path.chmod(0o644)
    missing = {"hostPath": "/never/there", "containerPath": "/x"}
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"mounts": [missing]}, "/never/there"),
        ({"deviceNodes": [{"path": "/dev/never-there"}]}, "/dev/never-there"),
        ({"intelRdt": {"closID": "x"}}, "intelRdt"),
    ]
    for edits, word in wrong:
        lab.write(lab.etc, "thing.yaml", "a", **edits)
        _, text = refusal(lambda: lab.start("a"))
        assert "lab.test/thing=a" in text
        assert word in text
    code, text = refusal(lambda: lab.client.create(lab.pod, lab.config("a b")))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "CDI_devices" in text
    assert not lab.client.containers(pod_sandbox_id=lab.pod.id)


def test_a_hook_that_fails_fails_the_start(lab: Lab, tmp_path: Path) -> None:
    script = hook(tmp_path / "hook", "echo no such board >&2; exit 3")
    lab.write(lab.etc, "thing.yaml", "a", hooks=[{"hookName": "createRuntime", "path": script}])
    container = lab.client.create(lab.pod, lab.config("a"))
    _, text = refusal(lambda: lab.client.start(container))
    assert "no such board" in text
    assert lab.client.status(container).reason == "StartError"
