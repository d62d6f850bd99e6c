# SPDX-License-Identifier: Apache-2.0
"""What else a container can be given, in a pod with a user namespace of its own: CDI devices,
images and VOLUMEs, devices, another container's processes; all of it on real OCI runtimes.
"""

import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml

from cri_server.pb import api_pb2 as api
from shim import linux
from tests.fakes.kubelet import Kubelet, Pod, refusal
from tests.lab import image, mapped, server
from tests.lab.registry import Registry

pytestmark = [
    pytest.mark.needs("root", "netns", "overlay", "cni", "runc", "docker-registry", "userns"),
    pytest.mark.usefixtures("traceless"),
    pytest.mark.ours,
]
FAILED = grpc.StatusCode.FAILED_PRECONDITION
ALL = [api.CDIDevice(name="lab.test/thing=a")]


class Lab:
    """A server with CDI files of its own, and a pod in it."""

    def __init__(self, site: server.Site, folder: Path, client: Kubelet, handler: str) -> None:
        self.site, self.client, self.handler, self._folder = site, client, handler, folder
        config = mapped.config_of(client, wanted=mapped.userns())
        self.pod: Pod = client.run_pod(config, handler=handler)

    def write(self, **edits: Any) -> None:
        """Have the device do this to containers."""
        devices = [{"name": "a", "containerEdits": {"env": ["THING=a"]}}]
        document = {"cdiVersion": "0.7.0", "kind": "lab.test/thing", "devices": devices}
        text = yaml.safe_dump(document | {"containerEdits": edits})
        (self._folder / "thing.yaml").write_text(text)

    def config(self, reference: str, **fields: Any) -> api.ContainerConfig:
        return mapped.container_config(self.client, self.pod, reference, mapped.SLEEP, **fields)

    def explain(self, container: str, *arguments: str) -> str:
        command = [server.command(), "explain", container, *arguments]
        done = subprocess.run(
            [*command, "--state", self.site.state], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(params=["", "crun"], ids=["default", "crun"])
def lab(
    request: pytest.FixtureRequest,
    make_site: Callable[..., server.Site],
    client_of: Callable[[server.Site], Kubelet],
    reference: str,
    tmp_path: Path,
) -> Iterator[Lab]:
    folder = tmp_path / "cdi"
    folder.mkdir()
    site = make_site(runtime={"cdi_spec_dirs": [os.fspath(folder)]})
    client = client_of(site)
    client.pull(reference)
    made = Lab(site, folder, client, request.param)
    yield made
    client.remove_pod(made.pod.id)


def zero(path: Path, mode: int = 0o666) -> str:
    """Make a /dev/zero elsewhere."""
    os.mknod(path, stat.S_IFCHR | mode, os.makedev(1, 5))
    path.chmod(mode)
    return os.fspath(path)


def test_a_container_has_all_of_it_at_once(
    lab: Lab, reference: str, registry: Registry, tmp_path: Path
) -> None:
    node = zero(tmp_path / "zero")
    volume = tmp_path / "volume"
    volume.mkdir()
    with mapped.mounted(tmp_path / "driver") as driver:
        (driver / "lib.so").write_text("driver\n")
        lib = {"hostPath": str(driver / "lib.so"), "containerPath": "/usr/lib/lib.so"}
        lab.write(
            env=["LAB=cdi"],
            deviceNodes=[{"path": "/dev/thing0", "hostPath": node}, {"path": "/dev/full"}],
            mounts=[lib | {"options": ["ro", "bind"]}],
            additionalGids=[4242],
        )
        made = image.busybox(Volumes={"/home": {}}, Env=["PATH=/bin"])
        image_id = lab.client.pull(registry.push(made, "test/userns-parts"))
        data = api.Mount(container_path="/img", readonly=True, image=api.ImageSpec(image=reference))
        wish = lab.config(
            image_id,
            mounts=[data, mapped.mount(volume)],
            CDI_devices=ALL,
            devices=[api.Device(host_path=node, container_path="/dev/second", permissions="rw")],
        )
        wish.mounts[0].ClearField("uidMappings")
        wish.mounts[0].ClearField("gidMappings")
        container = lab.client.create(lab.pod, wish)
        lab.client.start(container)
        script = "echo $LAB $THING; id -G; cat /usr/lib/lib.so; stat -c %u /usr/lib/lib.so"
        cdi = ["cdi a", "0 4242 50000", "driver", "65534"]
        found = mapped.said(lab.client, container, script)
        assert [found[0], "4242" in found[1].split(), *found[2:]] == [cdi[0], True, *cdi[2:]]
        [denied] = mapped.said(lab.client, container, "echo x > /usr/lib/lib.so")
        assert "Read-only" in denied
        script = "for d in thing0 second; do head -c2 /dev/$d | od -An -tx1; done; echo > /dev/full"
        assert [line.split() for line in mapped.said(lab.client, container, script)[:2]] == [
            ["00", "00"]
        ] * 2
        assert "No space left" in mapped.said(lab.client, container, script)[2]
        script = "stat -c %u:%g /img/etc/passwd /img /home /home/tester; cat /img/etc/hostname;"
        script += "touch /home/new /data/new && stat -c %u /home/new /data/new"
        found = mapped.said(lab.client, container, script)
        assert [line for line in found if line[0].isdigit()] == ["0:0"] * 4 + ["0"] * 2
        assert mapped.ids_of(volume / "new") == (0, 0)
        lab.client.stop(container)
        lab.client.remove(container)
        assert (driver / "lib.so").read_text() == "driver\n"
    lab.client.remove_image(image_id)


def test_a_cdi_node_stays_as_the_host_has_it_and_explain_says_so(
    lab: Lab, reference: str, tmp_path: Path
) -> None:
    node = zero(tmp_path / "closed", 0o600)
    lab.write(deviceNodes=[{"path": "/dev/thing0", "hostPath": node, "fileMode": 0o666, "uid": 7}])
    container = mapped.run(lab.client, lab.pod, reference, CDI_devices=ALL)
    found = mapped.said(lab.client, container, "stat -c %a:%u:%t:%T /dev/thing0; cat /dev/thing0")
    assert found[0] == "600:65534:1:5"
    assert "Permission denied" in found[1]
    told = lab.explain(container, "--diff")
    assert "mounts[/dev/thing0]\n  asked for  mode 666 uid 7" in told


def test_a_cdi_mount_is_plain_so_that_nothing_on_the_host_can_be_changed(
    lab: Lab, reference: str, tmp_path: Path
) -> None:
    folder = tmp_path / "driver"
    folder.mkdir()
    (folder / "open").write_text("content\n")
    (folder / "closed").touch(mode=0o600)
    lab.write(mounts=[{"hostPath": str(folder), "containerPath": "/opt/driver"}])
    container = mapped.run(lab.client, lab.pod, reference, CDI_devices=ALL)
    script = "stat -c %u:%g /opt/driver/open; cat /opt/driver/open; cd /opt/driver; cat closed"
    found = mapped.said(lab.client, container, f"{script}; echo x > open; rm open; touch new")
    assert found[:2] == ["65534:65534", "content"]
    assert [line.rpartition(": ")[2] for line in found[2:]] == ["Permission denied"] * 4
    assert sorted(os.listdir(folder)) == ["closed", "open"]


@pytest.mark.parametrize(
    ("edits", "word"),
    [
        ({"deviceNodes": [{"path": "/dev/zero", "type": "c", "major": 1, "minor": 3}]}, "1:5"),
        ({"deviceNodes": [{"path": "/dev/none", "type": "c", "major": 1, "minor": 3}]}, "none"),
        ({"additionalGids": [mapped.COUNT]}, "additionalGids"),
    ],
    ids=["another device", "no such device", "a group of nobody's"],
)
def test_what_a_user_namespace_cannot_give_is_refused_by_name(
    lab: Lab, reference: str, edits: dict[str, Any], word: str
) -> None:
    lab.write(**edits)
    wish = lab.config(reference, CDI_devices=ALL)
    code, message = refusal(lambda: lab.client.create(lab.pod, wish))
    assert code is FAILED
    assert "CDI device 'lab.test/thing=a'" in message
    assert word in message
    assert not lab.client.containers()


def test_a_container_can_look_at_another_one(lab: Lab, reference: str) -> None:
    """As `kubectl debug --target` has it: the PID namespace of the target."""
    target = mapped.run(lab.client, lab.pod, reference, ["sleep", "4321"])
    wish = lab.config(reference, name="debugger")
    options = wish.linux.security_context.namespace_options
    options.pid, options.target_id = api.TARGET, target
    debugger = lab.client.create(lab.pod, wish)
    lab.client.start(debugger)
    seen = mapped.said(lab.client, debugger, "ps -o pid,args; cat /proc/1/root/etc/passwd | wc -l")
    assert any(line.split() == ["1", "sleep", "4321"] for line in seen)
    assert mapped.said(lab.client, debugger, "kill -0 1 && stat -c %u /proc/1") == ["0"]
    lab.client.stop(debugger)
    assert lab.client.status(target).state == api.CONTAINER_RUNNING


def test_what_a_volume_lacks_is_explained(lab: Lab, reference: str, tmp_path: Path) -> None:
    """As of hostPath "/": what cannot be mapped is there as it is, what nobody may reach is not."""
    volume, closed = tmp_path / "volume", tmp_path / "volume/closed"
    (volume / "proc").mkdir(parents=True)
    closed.mkdir(mode=0o700)
    os.chown(closed, 70000, 70000)
    linux.mount("proc", os.fspath(volume / "proc"), "proc")
    try:
        with mapped.mounted(closed / "below"):
            wish = lab.config(reference, mounts=[mapped.mount(volume, readonly=True)])
            if lab.handler == "crun":
                code, message = refusal(lambda: lab.client.create(lab.pod, wish))
                assert (code, "is mounted in it" in message) == (FAILED, True), message
                return
            container = lab.client.create(lab.pod, wish)
            told = lab.explain(container, "--diff")
            lab.client.remove(container)
    finally:
        linux.umount2(os.fspath(volume / "proc"))
    assert "mounts[/data]\n  asked for  id-mapped with all below" in told
    assert "not id-mapped: proc (proc (proc) cannot be)" in told
    assert "mounts[/data/closed/below]\n  asked for  as it is on the host" in told
    assert "not mounted: Permission denied" in told
