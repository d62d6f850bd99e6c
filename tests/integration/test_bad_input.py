# SPDX-License-Identifier: Apache-2.0
"""Requests that cannot work and helpers that fail: a clear
error with the right code, and nothing left behind."""

import concurrent.futures
import json
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from cri_server.pb import api_pb2 as api
from tests.fakes.kubelet import Kubelet, Pod, conditions, refusal
from tests.integration.conftest import SLEEP, ClientOf, MakeSite
from tests.lab import holding, server, waiting

pytestmark = [
    pytest.mark.needs("root", "netns", "overlay", "cni", "runc", "docker-registry"),
    pytest.mark.ours,
]
INVALID, MISSING = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND
BAD_IDS = [
    "",
    ".",
    "..",
    "../../etc",
    "a/b",
    "line\nbreak",
    "nul\0",
    "ÿ",
    "f" * 65,
    "F" * 64,
    "*",
    " ",
]
Call = Callable[[], object]


def executable(path: Path, script: str) -> Path:
    """Write a shell script that can be run."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def running(words: str) -> bool:
    """Tell whether any process has `words` in its command line."""
    wanted = words.replace(" ", "\0").encode()
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            if wanted in Path("/proc", name, "cmdline").read_bytes():
                return True
        except OSError:  # it has ended
            continue
    return False


# -- requests --------------------------------------------------------------------------------------


def test_a_pod_needs_config_and_metadata(kubelet: Kubelet) -> None:
    run = kubelet.runtime.RunPodSandbox
    assert refusal(lambda: run(api.RunPodSandboxRequest()))[0] is INVALID
    config = kubelet.pod_config()
    nameless = kubelet.pod_config()
    nameless.metadata.ClearField("name")
    code, text = refusal(lambda: run(api.RunPodSandboxRequest(config=nameless)))
    assert code is INVALID
    assert "name" in text
    config.ClearField("metadata")
    assert refusal(lambda: run(api.RunPodSandboxRequest(config=config)))[0] is INVALID


@pytest.mark.parametrize("part", ["config", "config.metadata", "config.image"])
def test_a_container_needs_all_its_parts(
    kubelet: Kubelet, pod: Pod, pulled: str, part: str
) -> None:
    request = api.CreateContainerRequest(
        pod_sandbox_id=pod.id,
        config=kubelet.container_config(pulled, SLEEP),
        sandbox_config=pod.config,
    )
    *outer, last = part.split(".")
    owner: Any = getattr(request, outer[0]) if outer else request
    owner.ClearField(last)
    assert refusal(lambda: kubelet.runtime.CreateContainer(request))[0] is INVALID
    assert not kubelet.containers(pod_sandbox_id=pod.id)


def test_a_container_of_nothing(kubelet: Kubelet, pod: Pod, pulled: str) -> None:
    config = kubelet.container_config(pulled, SLEEP)
    nobody = Pod(id="f" * 64, config=pod.config)
    assert refusal(lambda: kubelet.create(nobody, config))[0] is MISSING
    config.image.image = "registry.test/never/pulled:v1"
    code, text = refusal(lambda: kubelet.create(pod, config))
    assert code is MISSING
    assert "never/pulled" in text


def test_a_container_of_a_stopped_pod(kubelet: Kubelet, pod: Pod, pulled: str) -> None:
    kubelet.stop_pod(pod.id)
    config = kubelet.container_config(pulled, SLEEP)
    code, _ = refusal(lambda: kubelet.create(pod, config))
    assert code is grpc.StatusCode.FAILED_PRECONDITION


@pytest.mark.parametrize("bad", BAD_IDS)
def test_a_malformed_id_is_nobodys(kubelet: Kubelet, pod: Pod, container: str, bad: str) -> None:
    runtime = kubelet.runtime
    reading: list[Call] = [
        lambda: runtime.PodSandboxStatus(api.PodSandboxStatusRequest(pod_sandbox_id=bad)),
        lambda: runtime.ContainerStatus(api.ContainerStatusRequest(container_id=bad)),
        lambda: runtime.ContainerStats(api.ContainerStatsRequest(container_id=bad)),
        lambda: runtime.StartContainer(api.StartContainerRequest(container_id=bad)),
        lambda: runtime.ExecSync(api.ExecSyncRequest(container_id=bad, cmd=["true"])),
        lambda: runtime.ReopenContainerLog(api.ReopenContainerLogRequest(container_id=bad)),
    ]
    assert {refusal(call)[0] for call in reading} <= {INVALID, MISSING}
    removing: list[Call] = [
        lambda: runtime.StopContainer(api.StopContainerRequest(container_id=bad)),
        lambda: runtime.RemoveContainer(api.RemoveContainerRequest(container_id=bad)),
        lambda: runtime.StopPodSandbox(api.StopPodSandboxRequest(pod_sandbox_id=bad)),
        lambda: runtime.RemovePodSandbox(api.RemovePodSandboxRequest(pod_sandbox_id=bad)),
    ]
    for call in removing:
        try:
            call()
        except grpc.RpcError as e:
            assert e.code() in (INVALID, MISSING)  # noqa: PT017
    assert kubelet.pod_status(pod.id).status.state == api.SANDBOX_READY
    assert kubelet.status(container).state == api.CONTAINER_RUNNING


@pytest.mark.parametrize(
    "fields",
    [
        {"hostname": "a\nb"},
        {"hostname": "nul\0"},
        {"dns_config": {"servers": ["192.0.2.1\noptions evil"]}},
        {"dns_config": {"searches": ["a\rb"]}},
        {"dns_config": {"options": ["a\0b"]}},
        {"linux": {"sysctls": {"kernel.panic": "1"}}},
        {"linux": {"sysctls": {"vm.swappiness": "1"}}},
        {"linux": {"sysctls": {"net/../kernel/panic": "1"}}},
    ],
)
def test_a_pod_with_unsafe_values_is_refused(kubelet: Kubelet, fields: dict[str, Any]) -> None:
    config = kubelet.pod_config(**fields)
    assert refusal(lambda: kubelet.run_pod(config))[0] is INVALID
    assert not [p for p in kubelet.pods() if p.metadata.name == config.metadata.name]


def test_network_sysctls_are_not_the_hosts(kubelet: Kubelet) -> None:
    config = kubelet.pod_config(hostname="")
    config.linux.security_context.namespace_options.network = api.NODE
    config.linux.sysctls["net.ipv4.ip_forward"] = "0"
    assert refusal(lambda: kubelet.run_pod(config))[0] is INVALID


# -- helpers that fail -----------------------------------------------------------------------------


def conf_dir(folder: Path, plugin: Path) -> dict[str, Any]:
    """Write a network of one plugin; returns the `[network]` settings that use it."""
    (folder / "net.d").mkdir()
    document = {"cniVersion": "1.0.0", "name": "bad", "plugins": [{"type": plugin.name}]}
    (folder / "net.d" / "10-bad.conflist").write_text(json.dumps(document))
    dirs = [os.fspath(plugin.parent), "/opt/cni/bin", "/usr/lib/cni"]
    return {
        "conf_dir": os.fspath(folder / "net.d"),
        "bin_dirs": dirs,
        "cache_dir": os.fspath(folder / "cache"),
    }


def test_without_a_network_only_host_network_pods_run(
    make_site: MakeSite, client_of: ClientOf, tmp_path: Path
) -> None:
    client = client_of(make_site(network={"conf_dir": os.fspath(tmp_path)}))
    status = client.runtime.Status(api.StatusRequest())
    assert conditions(status)["RuntimeReady"]
    assert not conditions(status)["NetworkReady"]
    code, _ = refusal(
        lambda: client.runtime.RunPodSandbox(
            api.RunPodSandboxRequest(config=client.pod_config()), timeout=20
        )
    )
    assert code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
    config = client.pod_config(hostname="")
    config.linux.security_context.namespace_options.network = api.NODE
    client.remove_pod(client.run_pod(config).id)
    assert not client.pods()


def test_a_pod_whose_network_fails_at_once_is_undone_after_its_files_are_made(
    make_site: MakeSite, client_of: ClientOf, tmp_path: Path
) -> None:
    site = make_site(network={"conf_dir": os.fspath(tmp_path)})
    gate = holding.gated(site, site.state / "pods")
    client = client_of(site)
    gate.shut()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        refused = pool.submit(refusal, client.run_pod)
        gate.wait()  # a file is about to be there
        done, _ = concurrent.futures.wait([refused], timeout=0.5)
        gate.open()
        assert not done, "it would have undone what was still being made"
        assert refused.result()[0] is grpc.StatusCode.UNAVAILABLE
    assert not client.pods()
    assert not list((site.state / "pods").iterdir())


def test_a_plugin_that_fails(make_site: MakeSite, client_of: ClientOf, tmp_path: Path) -> None:
    error = '{"cniVersion": "1.0.0", "code": 7, "msg": "no addresses left"}'
    script = f"[ $CNI_COMMAND = ADD ] || exit 0\necho '{error}'; exit 1"
    plugin = executable(tmp_path / "failing", script)
    site = make_site(network=conf_dir(tmp_path, plugin))
    client = client_of(site)
    _, text = refusal(client.run_pod)
    assert "no addresses left" in text
    assert not client.pods()
    assert not list((site.state / "pods").iterdir())


def test_a_plugin_that_hangs(make_site: MakeSite, client_of: ClientOf, tmp_path: Path) -> None:
    script = "[ $CNI_COMMAND = ADD ] || exit 0\nsleep 98761 & sleep 98761"
    plugin = executable(tmp_path / "hanging", script)
    client = client_of(make_site(network={**conf_dir(tmp_path, plugin), "add_timeout": 1.0}))
    begin = time.monotonic()
    refusal(client.run_pod)
    assert time.monotonic() - begin < waiting.patient(10)
    waiting.until(lambda: not running("sleep 98761"), "the plugin and its child are gone")
    assert not client.pods()


def runtime(path: Path, script: str) -> dict[str, dict[str, Any]]:
    """Return settings with a handler `bad` that does `script` where others start a container."""
    wrapped = f'for word; do case $word in run|create) {script};; esac; done\nexec runc "$@"'
    bad = executable(path, wrapped)
    return {"runtimes.bad": {"path": os.fspath(bad)}, "runtimes.runc": {"path": "runc"}}


@pytest.fixture
def broken(
    request: pytest.FixtureRequest,
    make_site: MakeSite,
    client_of: ClientOf,
    tmp_path: Path,
    reference: str,
) -> tuple[Kubelet, Pod, str]:
    """Return a client, a pod whose runtime does the test's script, and the image."""
    tables = runtime(tmp_path / "bad-runc", request.param)
    client = client_of(make_site(runtime={"runtime_timeout": waiting.patient(2)}, **tables))
    client.pull(reference)
    return client, client.run_pod(handler="bad"), reference


@pytest.mark.parametrize("broken", ["echo 'the disk is on fire' >&2; exit 1"], indirect=True)
def test_a_runtime_that_fails(broken: tuple[Kubelet, Pod, str]) -> None:
    client, pod, reference = broken
    container = client.create(pod, client.container_config(reference, SLEEP))
    _, text = refusal(lambda: client.start(container))
    assert "the disk is on fire" in text
    status = client.status(container)
    assert (status.state, status.exit_code) == (api.CONTAINER_EXITED, 128)
    assert status.reason == "StartError"
    client.remove_pod(pod.id)
    assert not client.containers()


@pytest.mark.parametrize("broken", ["sleep 98762 & sleep 98762"], indirect=True)
def test_a_runtime_that_hangs(broken: tuple[Kubelet, Pod, str]) -> None:
    client, pod, reference = broken
    container = client.create(pod, client.container_config(reference, SLEEP))
    begin = time.monotonic()
    refusal(lambda: client.start(container))
    assert time.monotonic() - begin < waiting.patient(15)
    waiting.until(lambda: not running("sleep 98762"), "the runtime and its child are gone")
    assert client.status(container).state == api.CONTAINER_EXITED
    client.remove_pod(pod.id)


@pytest.mark.parametrize("broken", ["head -c 3000000 /dev/zero >&2; exit 1"], indirect=True)
def test_a_runtime_that_talks_too_much(broken: tuple[Kubelet, Pod, str]) -> None:
    client, pod, reference = broken
    container = client.create(pod, client.container_config(reference, SLEEP))
    _, text = refusal(lambda: client.start(container))
    assert len(text) < 20_000
    assert len(client.status(container).message) < 20_000


# -- odd values ------------------------------------------------------------------------------------

REFUSED = {INVALID, MISSING, grpc.StatusCode.FAILED_PRECONDITION}


@pytest.mark.parametrize(
    "rpc",
    [
        method.name
        for method in api.DESCRIPTOR.services_by_name["RuntimeService"].methods
        if not method.server_streaming
    ],
)
def test_an_empty_request_is_no_surprise(kubelet: Kubelet, pod: Pod, rpc: str) -> None:
    """Empty, of an unknown field, and of the wrong wire type: an answer or a clear refusal."""
    method = api.DESCRIPTOR.services_by_name["RuntimeService"].methods_by_name[rpc]
    request = getattr(api, method.input_type.name)()
    try:
        getattr(kubelet.runtime, rpc)(request)
    except grpc.RpcError as e:
        assert e.code() in REFUSED | {grpc.StatusCode.UNIMPLEMENTED}, e  # noqa: PT017
    assert kubelet.pod_status(pod.id).status.state == api.SANDBOX_READY


def test_prefixes_of_ids(kubelet: Kubelet, pulled: str) -> None:
    pods = [kubelet.run_pod() for _ in range(3)]
    container = kubelet.run(pods[0], pulled, SLEEP)
    assert kubelet.pod_status(pods[0].id[:20]).status.id == pods[0].id
    assert kubelet.status(container[:20]).id == container
    for wrong in (
        pods[0].id + "0",
        pods[0].id[:20] + "-",
        container,
        "f" * 4096,
        pods[0].id.upper(),
    ):
        code, text = refusal(lambda: kubelet.pod_status(wrong))  # noqa: B023
        assert code is MISSING
        assert len(text) < 300
    short = [p.id[0] for p in kubelet.pods()]
    twice = next((c for c in short if short.count(c) > 1), None)
    if twice:
        assert refusal(lambda: kubelet.stop_pod(twice))[0] is INVALID
        assert {p.id for p in kubelet.pods(id=twice)} >= {i.id for i in pods if i.id[0] == twice}


BAD_PODS: dict[str, dict[str, Any]] = {
    "long host name": {"hostname": "h" * 300},
    "host name with a slash": {"hostname": "a/b"},
    "search with a line break": {"dns_config": {"searches": ["a\nnameserver 192.0.2.1"]}},
    "port": {"port_mappings": [{"container_port": 80, "host_port": 70000}]},
    "negative port": {"port_mappings": [{"container_port": -1, "host_port": 80}]},
    "host address": {
        "port_mappings": [{"container_port": 80, "host_port": 80, "host_ip": "; reboot"}]
    },
    "protocol": {"port_mappings": [{"protocol": 9, "container_port": 80, "host_port": 80}]},
    "cgroup parent": {"linux": {"cgroup_parent": "/a/../../b"}},
    "cgroup parent with a line break": {"linux": {"cgroup_parent": "/a\nb"}},
    "cgroup parent with a NUL": {"linux": {"cgroup_parent": "/a\0b"}},
    "namespace mode": {"linux": {"security_context": {"namespace_options": {"pid": 77}}}},
    "target in a pod": {"linux": {"security_context": {"namespace_options": {"network": 3}}}},
    "log folder": {"log_directory": "../../etc"},
    "log folder with a NUL": {"log_directory": "/tmp/a\0b"},
    "sysctl value": {"linux": {"sysctls": {"net.ipv4.ip_forward": "1\0"}}},
    "no such sysctl": {"linux": {"sysctls": {"net.ipv4.no_such_thing": "1"}}},
}


@pytest.mark.parametrize("name", BAD_PODS)
def test_an_odd_pod_is_refused(kubelet: Kubelet, name: str) -> None:
    config = kubelet.pod_config()
    wanted = api.PodSandboxConfig(**BAD_PODS[name])
    for field, _ in wanted.ListFields():
        if field.name in ("metadata", "log_directory"):
            config.ClearField(field.name)  # type: ignore[arg-type]
    config.MergeFrom(wanted)
    request = api.RunPodSandboxRequest(config=config)
    code, text = refusal(lambda: kubelet.runtime.RunPodSandbox(request))
    assert code is INVALID, text
    assert "\n" not in text
    assert not [p for p in kubelet.pods() if p.metadata == config.metadata]


def test_an_unknown_handler(kubelet: Kubelet) -> None:
    for handler in ("nobody", "../runc", "runc\n", "RUNC"):
        config = kubelet.pod_config()
        code, text = refusal(lambda: kubelet.run_pod(config, handler=handler))  # noqa: B023
        assert code in REFUSED
        assert "\n" not in text


BAD_CONTAINERS: dict[str, dict[str, Any]] = {
    "log path that escapes": {"log_path": "../../../../etc/cron.d/x"},
    "log path that escapes and returns": {"log_path": "a/../../x/../../y"},
    "log path that is the folder": {"log_path": "."},
    "log path with a line break": {"log_path": "a\nb"},
    "log path with a NUL": {"log_path": "a\0b"},
    "command with a NUL": {"command": ["a\0b"]},
    "environment with a NUL": {"envs": [{"key": "A", "value": b"a\0b"}]},
    "environment without a name": {"envs": [{"key": "", "value": b"a"}]},
    "environment with an odd name": {"envs": [{"key": "A=B", "value": b"a"}]},
    "working folder": {"working_dir": "relative"},
    "working folder with a NUL": {"working_dir": "/a\0b"},
    "mount nowhere": {"mounts": [{"host_path": "/tmp", "container_path": ""}]},
    "mount on the root": {"mounts": [{"host_path": "/tmp", "container_path": "/"}]},
    "mount that climbs": {"mounts": [{"host_path": "/tmp", "container_path": "/../../x\0"}]},
    "mount of nothing": {"mounts": [{"host_path": "", "container_path": "/x"}]},
    "mount of a relative path": {"mounts": [{"host_path": "tmp", "container_path": "/x"}]},
    "mount with odd propagation": {
        "mounts": [{"host_path": "/tmp", "container_path": "/x", "propagation": 9}]
    },
    "no such device": {"devices": [{"host_path": "/dev/nothing", "container_path": "/dev/x"}]},
    "device that is a file": {"devices": [{"host_path": "/etc/passwd", "container_path": "/x"}]},
    "odd device permissions": {
        "devices": [{"host_path": "/dev/null", "container_path": "/x", "permissions": "rwz"}]
    },
    "stop signal": {"stop_signal": 9999},
    "user": {"linux": {"security_context": {"run_as_user": {"value": -1}}}},
    "wide user": {"linux": {"security_context": {"run_as_user": {"value": 1 << 40}}}},
    "unknown user": {"linux": {"security_context": {"run_as_username": "nobody-here"}}},
    "odd user": {"linux": {"security_context": {"run_as_username": "a:b:c\n"}}},
    "group alone": {"linux": {"security_context": {"run_as_group": {"value": 1}}}},
    "group": {"linux": {"security_context": {"supplemental_groups": [-5]}}},
    "capability": {"linux": {"security_context": {"capabilities": {"add_capabilities": ["FLY"]}}}},
    "seccomp": {
        "linux": {"security_context": {"seccomp": {"profile_type": 2, "localhost_ref": "x"}}}
    },
    "negative memory": {"linux": {"resources": {"memory_limit_in_bytes": -7}}},
    "odd processors": {"linux": {"resources": {"cpuset_cpus": "a\nb"}}},
    "huge pages": {
        "linux": {"resources": {"hugepage_limits": [{"page_size": "../x", "limit": 1}]}}
    },
    "score": {"linux": {"resources": {"oom_score_adj": 5000}}},
    "unified": {"linux": {"resources": {"unified": {"../x": "1"}}}},
    "target": {
        "linux": {"security_context": {"namespace_options": {"pid": 3, "target_id": "f" * 64}}}
    },
}


@pytest.mark.parametrize("name", BAD_CONTAINERS)
def test_an_odd_container_is_refused(
    kubelet: Kubelet, pod: Pod, pulled: str, site: server.Site, name: str, tmp_path: Path
) -> None:
    missing = tmp_path / "missing/source"
    config = kubelet.container_config(pulled, SLEEP)
    if "user" not in name:  # names are looked up in the root, once it is mounted
        config.mounts.add(host_path=str(missing), container_path="/missing")
    wanted = api.ContainerConfig(**BAD_CONTAINERS[name])
    for field, _ in wanted.ListFields():
        if field.name in ("command", "log_path"):
            config.ClearField(field.name)  # type: ignore[arg-type]
    config.MergeFrom(wanted)
    request = api.CreateContainerRequest(
        pod_sandbox_id=pod.id, config=config, sandbox_config=pod.config
    )
    code, text = refusal(lambda: kubelet.runtime.CreateContainer(request))
    assert code in REFUSED, text
    assert "\n" not in text
    assert not kubelet.containers(pod_sandbox_id=pod.id)
    assert not list((site.state / "containers").iterdir())
    assert not missing.parent.exists()


@pytest.mark.parametrize(
    "resources",
    [{"memory_limit_in_bytes": 1}, {"cpuset_cpus": "0-9999"}],
    ids=str,
)
def test_what_the_kernel_refuses_fails_the_start(
    kubelet: Kubelet, pod: Pod, pulled: str, resources: dict[str, Any]
) -> None:
    linux = api.LinuxContainerConfig(resources=api.LinuxContainerResources(**resources))
    container = kubelet.create(pod, kubelet.container_config(pulled, SLEEP, linux=linux))
    _, text = refusal(lambda: kubelet.start(container))
    assert text
    assert "\n" not in text
    status = kubelet.status(container)
    assert (status.state, status.exit_code) == (api.CONTAINER_EXITED, 128)
    assert (status.reason, status.message) == ("StartError", text)


def test_bytes_that_are_no_message_are_refused_as_such(kubelet: Kubelet, site: server.Site) -> None:
    garbage = b"\x0a\x02\xff\xfe"  # a string that is no UTF-8
    with grpc.insecure_channel(site.endpoint) as channel:
        unary: Any = channel.unary_unary("/runtime.v1.RuntimeService/PodSandboxStatus")
        stream: Any = channel.unary_stream("/runtime.v1.RuntimeService/StreamContainers")
        for call in (lambda: unary(garbage), lambda: list(stream(garbage))):
            code, text = refusal(call)
            assert (code, "cannot be read" in text) == (INVALID, True), text
    assert "Traceback" not in site.log.read_text()
    assert kubelet.runtime.Version(api.VersionRequest()).version


def test_a_long_text_in_an_error_stays_below_what_clients_take(kubelet: Kubelet) -> None:
    config = kubelet.pod_config()
    config.linux.sysctls["net.ipv4.ip_forward"] = "é" * 5000
    code, text = refusal(lambda: kubelet.run_pod(config))
    assert (code, text.count("é") > 100) == (INVALID, True), text
