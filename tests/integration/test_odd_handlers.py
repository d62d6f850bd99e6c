# SPDX-License-Identifier: Apache-2.0
"""Handlers that cannot work: their pods are refused with handler, program and reason, nothing is
left of them, and the pods of other handlers do not notice.

Flags that a program does not know are in `test_handlers.py`; verbs that hang, fail or talk too much
in `test_faults.py` and `test_bad_input.py`.
"""

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from cri_server.pb import api_pb2 as api
from tests.conftest import Marks
from tests.fakes.kubelet import Kubelet, refusal
from tests.integration import conftest
from tests.integration.conftest import SLEEP
from tests.lab import faults, server, waiting

pytestmark = [
    pytest.mark.needs("root", "netns", "overlay", "cni", "runc", "docker-registry"),
    pytest.mark.ours,
    pytest.mark.usefixtures("traceless"),
]
FAILED_PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION

PROGRAMS = {
    "mute": "sleep 9871 & sleep 9871",
    "babble": "head -c 300 /dev/zero | tr '\\0' '\\377'; echo; exit 0",
    "silent": "exit 0",
    "shout": "head -c 9000000 /dev/zero | tr '\\0' x >&2; exit 1",
    "crash": "kill -SEGV $$",
}
REASONS = {
    "mute": "was killed after 5 s",
    "babble": "asked for its version it says",
    "silent": "asked for its version it says ''",
    "shout": "xxxx",
    "crash": "failed with -11",
    "gone": "not found",
    "folder": "not found",
}


def program(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return os.fspath(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="module")
def tables(folder: Path) -> dict[str, dict[str, str]]:
    """Return a section of the configuration for each of the odd handlers."""
    paths = {name: program(folder / name, script) for name, script in PROGRAMS.items()}
    paths.update(gone="/no/such/runtime", folder=os.fspath(folder))
    return {f"runtimes.{name}": {"path": path} for name, path in paths.items()}


@pytest.fixture(scope="module")
def strange(
    settings: dict[str, dict[str, str]], tables: dict[str, dict[str, str]], marks: Marks
) -> Iterator[server.Site]:
    """Return a server that has all of them, and runc."""
    with conftest.running_site({**settings, **tables}, marks) as site:
        yield site


@pytest.fixture
def client(strange: server.Site, cgroup_parent: str, reference: str) -> Iterator[Kubelet]:
    with Kubelet(strange.endpoint, cgroup_parent=cgroup_parent, prefix="odd") as made:
        made.pull(reference)
        yield made
        made.remove_own_pods()


@pytest.mark.parametrize("name", REASONS)
def test_its_pods_are_refused_by_handler_program_and_reason(
    client: Kubelet, reference: str, tables: dict[str, dict[str, str]], name: str
) -> None:
    other = client.run(client.run_pod(), reference, SLEEP)
    code, text = refusal(lambda: client.run_pod(handler=name))
    path = tables[f"runtimes.{name}"]["path"]
    assert code is FAILED_PRECONDITION
    assert text.startswith(f"handler {name}: {path}: ")
    assert REASONS[name] in text
    assert len(text) < 1000
    assert [p.id for p in client.pods() if p.runtime_handler == name] == []
    waiting.until(lambda: not faults.processes("sleep", "9871"), "what it started is dead")
    assert client.exec_sync(other, ["true"]).exit_code == 0


def test_a_program_that_never_answers_holds_up_nobody_else(client: Kubelet, reference: str) -> None:
    config = client.pod_config()
    request = api.RunPodSandboxRequest(config=config, runtime_handler="mute")
    waiting_for = client.runtime.RunPodSandbox.future(request)
    begin = time.monotonic()
    container = client.run(client.run_pod(), reference, SLEEP)
    assert client.exec_sync(container, ["true"]).exit_code == 0
    assert time.monotonic() - begin < waiting.patient(4)
    with pytest.raises(grpc.RpcError, match="handler mute"):
        waiting_for.result()


def test_one_that_works_again_is_used_again(client: Kubelet, reference: str, folder: Path) -> None:
    refusal(lambda: client.run_pod(handler="crash"))
    program(folder / "crash", 'exec runc "$@"')
    try:
        container = client.run(client.run_pod(handler="crash"), reference, SLEEP)
        assert client.exec_sync(container, ["true"]).exit_code == 0
        client.remove_own_pods()
    finally:
        program(folder / "crash", PROGRAMS["crash"])


def test_check_and_status_name_each(
    client: Kubelet, tables: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    config = tmp_path / "config.toml"
    config.write_text(server.toml(tables))
    done = subprocess.run(
        [server.command(), "check", "--json", "--config", config],
        capture_output=True,
        text=True,
        check=False,
    )
    found = {finding["name"]: finding for finding in json.loads(done.stdout)}
    verbose = client.runtime.Status(api.StatusRequest(verbose=True)).info["config"]
    for name, reason in REASONS.items():
        finding = found[f"runtime {name}"]
        assert reason in finding["detail"]
        assert finding["status"] == "limited"
        assert f"[runtimes.{name}]" in finding["remedy"]
        assert name in json.loads(verbose)["runtimes"]


@pytest.mark.parametrize("pid", ["1", "$PPID", "$(cat $here/victim)", "0", "-1", "99999999", "x"])
def test_a_program_that_lies_about_a_pid_harms_nobody(
    make_site: Callable[..., server.Site],
    client_of: Callable[[server.Site], Kubelet],
    reference: str,
    tmp_path: Path,
    pid: str,
) -> None:
    lie = f"""
        for word; do
            [ "$last" = --pid-file ] && file=$word
            last=$word
        done
        runc "$@" && echo "{pid}" > $file; exit
    """
    client = client_of(make_site(**faults.handler(tmp_path, run=lie)))
    client.pull(reference)
    victim = subprocess.Popen(["sleep", "9872"])
    (tmp_path / "victim").write_text(str(victim.pid))
    try:
        pod = client.run_pod(handler="odd")
        container = client.create(pod, client.container_config(reference, ["sleep", "9873"]))
        _, text = refusal(lambda: client.start(container))
        assert f"handler odd: {tmp_path}/odd-runc: " in text
        assert client.status(container).reason == "StartError"
        client.remove_pod(pod.id)
        assert victim.poll() is None
        waiting.until(lambda: not faults.processes("sleep", "9873"), "what it started is dead")
    finally:
        victim.kill()
        victim.wait()
