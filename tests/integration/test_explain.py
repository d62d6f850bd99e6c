# SPDX-License-Identifier: Apache-2.0
"""`cri-server explain`, as a user runs it, on real pods and containers."""

import contextlib
import json
import os
import pty
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cri_server import origins
from cri_server.pb import api_pb2 as api
from tests.fakes.kubelet import Kubelet, Pod
from tests.integration.conftest import SLEEP
from tests.lab import image, server
from tests.lab import registry as registries

pytestmark = [
    pytest.mark.needs("root", "netns", "overlay", "cni", "runc", "docker-registry"),
    pytest.mark.ours,
]
_Mode, _Profile = api.NamespaceMode, api.SecurityProfile


LINK = image.Entry(name="var/run", kind="symlink", to="../run")
CONTEXT, LIMITS = "linux.security_context", "linux.resources"
EXPECTED = {
    "process.args[0]": ("image", "config.Entrypoint[0]"),
    "process.args[1]": ("cri", "args[0]"),
    "process.cwd": ("cri", "working_dir"),
    "process.env[PATH]": ("image", "config.Env[0]"),
    "process.env[LANG]": ("cri", "envs[0]"),
    "process.env[HOSTNAME]": ("default", ""),
    "process.user.uid": ("image", "/etc/passwd"),
    "process.user.gid": ("image", "/etc/passwd"),
    "process.user.additionalGids[77]": ("cri", f"{CONTEXT}.supplemental_groups"),
    "process.noNewPrivileges": ("cri", f"{CONTEXT}.no_new_privs"),
    "process.capabilities[CAP_SYS_TIME]": ("cri", f"{CONTEXT}.capabilities.add_capabilities"),
    "process.capabilities[CAP_KILL]": ("cri", f"{CONTEXT}.capabilities.drop_capabilities"),
    "process.capabilities[CAP_CHOWN]": ("default", ""),
    "mounts[/run/data]": ("image", ""),
    "mounts[/dev/shm]": ("cri", "mounts[1]"),
    "mounts[/etc/hosts]": ("default", ""),
    "mounts[/proc]": ("default", ""),
    "linux.namespaces[ipc]": ("pod", f"{CONTEXT}.namespace_options.ipc"),
    "linux.namespaces[pid]": ("pod", f"{CONTEXT}.namespace_options.pid"),
    "linux.devices[/dev/nil]": ("cri", "devices"),
    "linux.maskedPaths[/proc/keys]": ("cri", f"{CONTEXT}.masked_paths"),
    "linux.seccomp": ("cri", f"{CONTEXT}.seccomp"),
    "linux.resources.cpu.shares": ("cri", f"{LIMITS}.cpu_shares"),
    "linux.resources.memory.limit": ("cri", f"{LIMITS}.memory_limit_in_bytes"),
    "linux.resources.hugepageLimits[3MB]": ("host", ""),
    "linux.cgroupsPath": ("pod", "linux.cgroup_parent"),
    "annotations[io.kubernetes.cri.container-name]": ("default", ""),
}
POD = {
    "sandbox.name": ("pod", "metadata"),
    "sandbox.handler": ("handler", "[runtime] default"),
    "sandbox.hostname": ("pod", "hostname"),
    "sandbox.namespaces[network]": ("pod", f"{CONTEXT}.namespace_options.network"),
    "sandbox.namespaces[ipc]": ("pod", f"{CONTEXT}.namespace_options.ipc"),
    "sandbox.sysctls[net.core.somaxconn]": ("pod", "linux.sysctls[net.core.somaxconn]"),
    "sandbox.sysctls[net.ipv4.ping_group_range]": ("default", ""),
    "sandbox.files[/etc/resolv.conf]": ("pod", "dns_config"),
    "sandbox.files[/etc/hosts]": ("host", ""),
    "sandbox.shm_size": ("pod", f"{CONTEXT}.namespace_options.ipc"),
    "sandbox.shm": ("pod", f"{CONTEXT}.namespace_options.ipc"),
    "sandbox.cgroup_parent": ("pod", "linux.cgroup_parent"),
    "sandbox.ports[0]": ("pod", "port_mappings"),
    "sandbox.init": ("pod", f"{CONTEXT}.namespace_options.pid"),
}


def explain(site: server.Site, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run the command with nothing but the state directory to go by."""
    command = [server.command(), "explain", *arguments, "--state", os.fspath(site.state)]
    empty = site.home / "nothing.toml"
    empty.touch()
    return subprocess.run(
        [*command, "--config", empty], capture_output=True, text=True, timeout=30, check=False
    )


def parts(site: server.Site, *arguments: str) -> dict[str, Any]:
    """Return what --json says, by part."""
    done = explain(site, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return {row["part"]: row for row in json.loads(done.stdout)}


def unusual_pod(kubelet: Kubelet) -> Pod:
    """Run a pod that asks for more than most."""
    config = kubelet.pod_config(
        hostname="strange",
        dns_config=api.DNSConfig(servers=["192.0.2.53"], options=["ndots:5"]),
        port_mappings=[api.PortMapping(container_port=80, protocol=api.UDP)],
    )
    config.linux.sysctls["net.core.somaxconn"] = "77"
    config.linux.security_context.namespace_options.ipc = _Mode.NODE
    config.linux.security_context.namespace_options.pid = _Mode.POD
    return kubelet.run_pod(config)


def unusual_container(kubelet: Kubelet, pod: Pod, reference: str, volume: Path) -> str:
    config = kubelet.container_config(reference, (), args=["86400"], working_dir="/tmp")
    config.envs.add(key="LANG", value=b"de_DE\x1b[31m")
    config.mounts.add(container_path="/var/run/data", host_path=os.fspath(volume), readonly=True)
    config.mounts.add(container_path="/dev/shm", host_path=os.fspath(volume))
    config.devices.add(host_path="/dev/zero", container_path="/dev/nil", permissions="r")
    resources, context = config.linux.resources, config.linux.security_context
    resources.MergeFrom(api.LinuxContainerResources(cpu_shares=77, memory_limit_in_bytes=64 << 20))
    resources.oom_score_adj = -1000
    resources.hugepage_limits.add(page_size="3MB", limit=0)
    context.MergeFrom(
        api.LinuxContainerSecurityContext(
            capabilities=api.Capability(drop_capabilities=["KILL"], add_capabilities=["SYS_TIME"]),
            supplemental_groups=[77],
            no_new_privs=True,
            masked_paths=["/proc/kcore", "/proc/keys"],
            seccomp=_Profile(profile_type=_Profile.RuntimeDefault),
        )
    )
    context.namespace_options.pid = _Mode.POD
    return kubelet.create(pod, config)


@pytest.fixture(scope="module")
def strange(endpoint: str, registry: registries.Registry) -> str:
    """Return an image whose config has something to say, too; pulled."""
    config = {
        "Entrypoint": ["sleep"],
        "Cmd": ["1"],
        "User": "tester",
        "WorkingDir": "/srv",
        "Env": ["PATH=/bin", "LANG=C", "BROKEN"],
    }
    reference = registry.push(image.busybox([LINK], **config), "test/strange")
    with Kubelet(endpoint) as client:
        client.pull(reference)
    return reference


def last(row: Any) -> tuple[str, str]:
    """Return source and field of the decision that holds."""
    decision = row["decisions"][-1]
    return decision["source"], decision["field"]


@pytest.fixture
def pod(kubelet: Kubelet, pulled: str) -> Pod:
    return unusual_pod(kubelet)


@pytest.fixture
def container(kubelet: Kubelet, pod: Pod, strange: str, tmp_path: Path) -> str:
    return unusual_container(kubelet, pod, strange, tmp_path)


def test_no_part_of_a_real_container_is_without_an_origin(
    site: server.Site, container: str, pod: Pod
) -> None:
    places = [("containers", container), ("pods", pod.id), ("pods", f"{pod.id}/sandbox")]
    for place in places:
        rows = origins.explained(site.state.joinpath(*place))
        assert [row.part for row in rows if not row.notes] == []


def test_each_source_of_a_containers_parts(site: server.Site, container: str) -> None:
    found = parts(site, container)
    assert {part: last(found[part]) for part in EXPECTED} == EXPECTED
    assert found["process.env[LANG]"]["value"] == "LANG=de_DE\x1b[31m"
    assert not found["process.capabilities[CAP_KILL]"]["present"]


def test_a_pods_parts(site: server.Site, pod: Pod) -> None:
    found = parts(site, pod.id[:20])
    assert {part: last(found[part]) for part in POD} == POD
    assert found["sandbox.hostname"]["value"] == "strange"
    assert found["sandbox.sysctls[net.core.somaxconn]"]["value"] == "77"
    assert "nameserver 192.0.2.53" in found["sandbox.files[/etc/resolv.conf]"]["value"]
    assert last(found["process.args[0]"]) == ("default", "")  # the init's config.json


def test_the_difference_between_asked_and_given(site: server.Site, container: str) -> None:
    text = explain(site, container, "--diff").stdout
    assert "process.env[BROKEN]" in text
    assert "linux.resources.hugepageLimits[3MB]" in text
    assert "mounts" not in text
    found = parts(site, container, "--diff")
    assert found["process.env[BROKEN]"]["decisions"][-1]["asked"] == "BROKEN"


def test_an_update_is_explained(site: server.Site, kubelet: Kubelet, container: str) -> None:
    limits = api.LinuxContainerResources(cpu_shares=99)
    request = api.UpdateContainerResourcesRequest(container_id=container, linux=limits)
    kubelet.runtime.UpdateContainerResources(request)
    row = parts(site, container, "linux.resources.cpu.shares")["linux.resources.cpu.shares"]
    assert row["value"] == 99
    assert row["decisions"][-1]["because"] == "as updated"


def test_a_listing_is_text_without_colours_or_control_characters(
    site: server.Site, container: str
) -> None:
    done = explain(site, container)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert "de_DE\\x1b[31m" in done.stdout
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["cwd", "/tmp", "cri", "working_dir"] in lines


def test_a_terminal_gets_colours_unless_it_wants_none(site: server.Site, container: str) -> None:
    assert "\x1b[32mcri    \x1b[0m" in on_a_terminal(site, container)
    assert "\x1b" not in on_a_terminal(site, container, NO_COLOR="1")


def on_a_terminal(site: server.Site, wanted: str, **environment: str) -> str:
    command = [server.command(), "explain", wanted, "process", "--state", os.fspath(site.state)]
    master, slave = pty.openpty()
    plain = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    with open(master, "rb", buffering=0) as screen:
        process = subprocess.Popen(command, stdout=slave, env=plain | environment)
        os.close(slave)
        text = b""
        with contextlib.suppress(OSError):  # EIO: nobody has the other end any more
            while chunk := screen.read(4096):
                text += chunk
        assert process.wait(30) == 0
    return text.decode()


def test_a_part_of_a_listing(site: server.Site, container: str) -> None:
    done = explain(site, container, "linux.maskedPaths")
    assert [line.split()[0] for line in done.stdout.splitlines()] == [
        "container",
        "linux",
        "maskedPaths[/proc/kcore]",
        "maskedPaths[/proc/keys]",
    ]


def test_a_name_will_do(site: server.Site, pod: Pod, container: str) -> None:
    name = pod.config.metadata.name
    for wanted, found in ((name, pod.id), (f"test/{name}", pod.id), (f"{name}/main", container)):
        assert explain(site, wanted).stdout.splitlines()[0].endswith(found)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["nobody"], "no container or pod in"),
        ([""], "no container or pod in"),
        (["main", "process.nothing"], "no part begins with 'process.nothing'"),
    ],
)
def test_what_cannot_be_explained_is_an_error(
    site: server.Site, container: str, arguments: list[str], error: str
) -> None:
    done = explain(site, *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert error in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_ambiguous_name_is_an_error(
    site: server.Site, kubelet: Kubelet, pod: Pod, container: str, pulled: str
) -> None:
    other = kubelet.create(pod, kubelet.container_config(pulled, SLEEP, name="x/main"))
    done = explain(site, "main")
    assert done.returncode == 1
    assert "fits 2: " in done.stderr
    assert other[:13] in done.stderr


def test_it_works_while_the_server_is_down_and_until_the_container_is_removed(
    make_site: Callable[..., server.Site],
    client_of: Callable[[server.Site], Kubelet],
    reference: str,
) -> None:
    site = make_site()
    client = client_of(site)
    client.pull(reference)
    pod = client.run_pod()
    container = client.run(pod, reference, SLEEP)
    site.kill()
    assert explain(site, container[:12]).returncode == 0
    site.start()
    client = client_of(site)
    client.remove_pod(pod.id)
    assert explain(site, container[:12]).returncode == 1
