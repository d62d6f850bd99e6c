# SPDX-License-Identifier: Apache-2.0
"""Handlers from drop-ins: they come, change and go while the server runs; pods keep theirs.

The file has a server of its own, whose `conf.d` each test writes and finds empty. Nobody tells the
server: it is asked until it says the new state, within a deadline. What a test says that nothing
happens, it says after something else has happened that the server noticed later.
"""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from cri_server.pb import api_pb2 as api
from tests.conftest import Marks
from tests.fakes.kubelet import Kubelet, Pod, conditions, refusal
from tests.integration.conftest import SLEEP, running_site
from tests.lab import cgroups, faults, network, server, waiting

pytestmark = [
    pytest.mark.needs("root", "netns", "overlay", "cni", "runc", "docker-registry"),
    pytest.mark.ours,
    pytest.mark.slow,
]

INVALID = grpc.StatusCode.INVALID_ARGUMENT
RUNTIME_DEFAULT = api.SecurityProfile(profile_type=api.SecurityProfile.RuntimeDefault)


class Lab:
    """A server, its client and its drop-ins."""

    def __init__(self, site: server.Site, client: Kubelet, image: str) -> None:
        self.site, self.client, self.image = site, client, image
        self.folder = site.home / "conf.d"
        self.folder.mkdir(exist_ok=True)
        self._read = site.log.stat().st_size if site.log.exists() else 0

    def clear(self) -> None:
        """Remove pods and drop-ins, and wait until the server knows."""
        if self.site.process is None:
            self.site.start()
        self.client.remove_own_pods()
        for path in self.folder.iterdir():
            path.unlink()
        found = waiting.until(self.info, "the handlers")["current"]
        waiting.until(
            lambda: not self.problems() and not any(h["source"] for h in self.handlers()),
            f"none of {list(found)} is from a drop-in",
        )

    def drop(self, file: str, text: str) -> Path:
        """Put a drop-in there as an editor does: write elsewhere, then rename."""
        temporary = self.folder / f".{file}.swp"
        temporary.write_text(text)
        return temporary.rename(self.folder / file)

    def handler(self, name: str, *lines: str) -> None:
        """Have a handler, runc with these settings, and wait until the server has it so."""
        earlier = self.revision(name)
        self.drop(f"{name}.toml", "\n".join([f"[runtimes.{name}]", 'path = "runc"', *lines]))
        waiting.until(lambda: self.revision(name) not in ("", earlier), f"handler {name}")

    def status(self) -> api.StatusResponse:
        return self.client.runtime.Status(api.StatusRequest(verbose=True))

    def names(self) -> list[str]:
        return [handler.name for handler in self.status().runtime_handlers]

    def info(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.status().info["handlers"])
        return found

    def handlers(self) -> list[dict[str, Any]]:
        return list(self.info()["current"].values())

    def revision(self, name: str) -> str:
        return str(self.info()["current"].get(name, {}).get("revision", ""))

    def problems(self) -> list[str]:
        return [p["message"] for p in self.info()["problems"]]

    def wait_problem(self, pattern: str) -> str:
        """Return the first problem that matches."""
        return waiting.until(
            lambda: next((p for p in self.problems() if re.search(pattern, p)), ""),
            f"a problem like {pattern}",
        )

    def pod(self, handler: str, **fields: Any) -> Pod:
        return self.client.run_pod(self.client.pod_config(**fields), handler=handler)

    def said(self, pod: Pod, script: str, name: str = "main", **fields: Any) -> list[str]:
        """Run a script in a container and return the lines of its output."""
        container = self.client.run(pod, self.image, ("sh", "-c", script), name=name, **fields)
        self.client.wait_exit(container)
        return [line.text for line in self.client.log(container)]

    def said_by_server(self, event: str) -> list[dict[str, Any]]:
        """Return the lines of the server's log with an event, since this test began."""
        text = self.site.log.read_bytes()[self._read :].decode()
        lines = (json.loads(line) for line in text.splitlines())
        return [line for line in lines if line.get("event") == event]

    def check(self) -> list[dict[str, str]]:
        config = self.site.home / "config.toml"
        done = subprocess.run(
            [server.command(), "check", "--json", "--config", config],
            capture_output=True,
            text=True,
            check=False,
        )
        found: list[dict[str, str]] = json.loads(done.stdout)
        return found


@pytest.fixture(scope="module")
def own_site(settings: dict[str, Any], marks: Marks, reference: str) -> Iterator[server.Site]:
    """Return the server of this file, with the image."""
    with running_site(settings, marks) as running:
        with Kubelet(running.endpoint) as client:
            client.pull(reference)
        yield running


@pytest.fixture
def lab(
    own_site: server.Site, client_of: Callable[[server.Site], Kubelet], reference: str
) -> Iterator[Lab]:
    made = Lab(own_site, client_of(own_site), reference)
    yield made
    made.clear()


@pytest.fixture
def other_net() -> Iterator[network.Network]:
    """Return a second pod network."""
    made = network.Network(name=f"crio{os.getpid()}"[:15], subnet="10.88.0.0/16")
    yield made
    made.remove()


# -- they come, change and go ----------------------------------------------------------------------


def test_a_handler_comes_changes_and_goes_without_a_restart(lab: Lab) -> None:
    pid = lab.site.pid
    assert "fast" not in lab.names()

    lab.handler("fast", 'default_rlimits = "nofile=100:200"')
    assert "fast" in lab.names()
    assert lab.said(lab.pod("fast"), "ulimit -n") == ["100"]

    lab.handler("fast", 'default_rlimits = "nofile=300:400"')
    assert lab.said(lab.pod("fast"), "ulimit -n; ulimit -Hn") == ["300", "400"]

    (lab.folder / "fast.toml").unlink()
    waiting.until(lambda: "fast" not in lab.names(), "the handler is gone")
    code, text = refusal(lambda: lab.pod("fast"))
    assert (code, "runtime_handler 'fast' is not configured" in text) == (INVALID, True)
    events = ("handler added", "handler changed", "handler removed")
    assert [len(lab.said_by_server(event)) for event in events] == [1, 1, 1]
    assert lab.site.pid == pid


def test_the_node_is_ready_at_every_moment_of_a_change(lab: Lab) -> None:
    seen: list[Any] = []

    def has(name: str) -> bool:
        seen.append(conditions(lab.status()))
        return name in lab.names()

    for n in range(100, 105):
        lab.drop("fast.toml", f'[runtimes.fast]\npath = "runc"\ndefault_rlimits = "nofile={n}"')
        waiting.until(lambda: has("fast"), "the handler")
        lab.drop("fast.toml", "[runtimes.fast]\nbroken")
        lab.wait_problem(r"fast\.toml")
        seen.append(conditions(lab.status()))
    (lab.folder / "fast.toml").unlink()
    waiting.until(lambda: not has("fast"), "the handler is gone")

    assert {(c["RuntimeReady"], c["NetworkReady"]) for c in seen} == {(True, True)}


def test_a_drop_in_stands_in_for_the_handler_of_its_name_and_gives_it_back(lab: Lab) -> None:
    before = lab.revision("runc")

    lab.handler("runc", 'default_rlimits = "nofile=100"')
    assert lab.said(lab.pod(""), "ulimit -n") == ["100"]
    (lab.folder / "runc.toml").unlink()
    waiting.until(lambda: lab.revision("runc") == before, "the handler of the file is back")

    assert lab.said(lab.pod(""), "ulimit -n") == ["1024"]


def test_a_folder_that_comes_later_is_noticed(lab: Lab) -> None:
    lab.folder.rmdir()
    assert "fast" not in lab.names()
    lab.folder.mkdir()

    lab.handler("fast")
    assert "fast" in lab.names()
    shutil.rmtree(lab.folder)
    waiting.until(lambda: "fast" not in lab.names(), "the handler went with the folder")
    lab.folder.mkdir()


def test_the_default_handler_does_not_go_away(
    make_site: Callable[..., server.Site],
    client_of: Callable[[server.Site], Kubelet],
    reference: str,
) -> None:
    site = make_site()
    site.stop()
    lab = Lab(site, client_of(site), reference)
    lab.drop("house.toml", '[runtimes.house]\npath = "runc"\ndefault_rlimits = "nofile=100"')
    site.settings = {**site.settings, "runtime": {**site.settings["runtime"], "default": "house"}}
    site.start()
    lab.client.pull(reference)

    (lab.folder / "house.toml").unlink()
    lab.wait_problem(r"\[runtimes\.house\]: is gone, but it is the default")

    assert lab.said(lab.pod(""), "ulimit -n") == ["100"]
    assert conditions(lab.status())["RuntimeReady"]


# -- pods keep theirs ------------------------------------------------------------------------------


def other_runc(folder: Path) -> Path:
    """Make a runc of another name, that notes its verbs."""
    program = folder / "other-runc"
    program.write_text(f'#!/bin/sh\necho "$@" >> {folder}/calls\nexec runc "$@"\n')
    program.chmod(0o755)
    return program


@pytest.mark.parametrize("end", [None, server.Site.stop, server.Site.kill])
def test_a_pod_keeps_its_handler_when_the_drop_in_is_gone(
    lab: Lab, tmp_path: Path, end: Callable[[server.Site], object] | None
) -> None:
    program = other_runc(tmp_path)
    lab.drop("own.toml", f'[runtimes.own]\npath = "{program}"\ndefault_rlimits = "nofile=100"')
    waiting.until(lambda: "own" in lab.names(), "the handler")
    pod = lab.pod("own")
    container = lab.client.run(pod, lab.image, SLEEP, name="first")

    (lab.folder / "own.toml").unlink()
    waiting.until(lambda: "own" not in lab.names(), "the handler is gone")
    if end is not None:
        end(lab.site)
        lab.site.start()
    (tmp_path / "calls").unlink()

    assert "own" not in lab.names()
    assert lab.client.exec_sync(container, ["echo", "here"]).stdout == b"here\n"
    resources = api.LinuxContainerResources(memory_limit_in_bytes=64 << 20)
    lab.client.runtime.UpdateContainerResources(
        api.UpdateContainerResourcesRequest(container_id=container, linux=resources)
    )
    assert lab.said(pod, "ulimit -n", name="second") == ["100"]
    assert lab.client.pod_status(pod.id).status.runtime_handler == "own"
    lab.client.stop(container)
    lab.client.remove_pod(pod.id)
    calls = (tmp_path / "calls").read_text()
    assert all(f" {verb} " in calls for verb in ("exec", "update", "run", "delete")), calls
    assert not list(lab.site.state.glob(f"runtimes/*/{container}*"))


def test_a_pod_of_a_gone_handler_whose_shim_dies_meanwhile_is_removed(
    lab: Lab, tmp_path: Path
) -> None:
    program = other_runc(tmp_path)
    lab.drop("own.toml", f'[runtimes.own]\npath = "{program}"')
    waiting.until(lambda: "own" in lab.names(), "the handler")
    pod = lab.pod("own")
    container = lab.client.run(pod, lab.image, SLEEP)
    shim = faults.shim_of(lab.site, pod.id)
    (lab.folder / "own.toml").unlink()
    waiting.until(lambda: "own" not in lab.names(), "the handler is gone")
    lab.site.kill()
    os.kill(shim, 9)

    lab.site.start()

    assert lab.client.wait_exit(container).exit_code == 255
    lab.client.remove_pod(pod.id)
    assert not list(lab.site.state.glob(f"runtimes/own/{container}*"))


def test_a_pod_keeps_its_handler_when_the_drop_in_changes(lab: Lab) -> None:
    lab.handler("own", 'default_rlimits = "nofile=100"')
    old = lab.pod("own")
    lab.handler("own", 'default_rlimits = "nofile=200"')
    new = lab.pod("own")

    assert lab.said(old, "ulimit -n") == ["100"]
    assert lab.said(new, "ulimit -n") == ["200"]
    lab.site.kill()
    lab.site.start()
    assert lab.said(old, "ulimit -n", name="again") == ["100"]
    assert len(list((lab.site.root / "handlers").glob("own@*.json"))) >= 2


def test_a_handler_is_forgotten_with_its_last_pod_at_the_next_start(lab: Lab) -> None:
    lab.handler("own")
    pod = lab.pod("own")
    (lab.folder / "own.toml").unlink()
    waiting.until(lambda: "own" not in lab.names(), "the handler is gone")
    lab.site.stop()
    lab.site.start()
    assert list((lab.site.root / "handlers").glob("own@*"))
    lab.client.remove_pod(pod.id)
    lab.site.stop()
    lab.site.start()

    assert list((lab.site.root / "handlers").glob("own@*")) == []


# -- what is wrong ---------------------------------------------------------------------------------

BAD = {
    "TOML": ("[runtimes.own]\npath = ?\n", r"own\.toml: .*line 2"),
    "unknown key": (
        '[runtimes.own]\npth = "runc"',
        r"own\.toml: \[runtimes\.own\]: unknown key 'pth'; did you mean 'path'\?",
    ),
    "wrong value": (
        '[runtimes.own]\npath = "runc"\ndefault_rlimits = "nofil=1"',
        r"own\.toml: \[runtimes\.own\]: default_rlimits: 'nofil' is not a limit",
    ),
    "missing binary": (
        '[runtimes.own]\npath = "/no/such/runc"',
        r"own\.toml: \[runtimes\.own\]: path: /no/such/runc: not found",
    ),
    "a flag that the program does not know": (
        '[runtimes.own]\npath = "runc"\nargs = ["--nonsense"]',
        r"own\.toml: \[runtimes\.own\]: path: .*runc.*nonsense",
    ),
    "no profile": (
        '[runtimes.own]\npath = "runc"\nseccomp_profile = "/no/such.json"',
        r"own\.toml: \[runtimes\.own\]: seccomp_profile: .*No such file",
    ),
    "another section": (
        '[network]\nconf_dir = "/x"\n[runtimes.own]',
        r"own\.toml: 'network': only \[runtimes\.NAME\]",
    ),
}


@pytest.mark.parametrize("name", list(BAD))
def test_a_broken_drop_in_is_named_and_leaves_all_as_it_was(lab: Lab, name: str) -> None:
    text, pattern = BAD[name]
    lab.handler("own", 'default_rlimits = "nofile=100"')
    lab.handler("other", 'default_rlimits = "nofile=200"')

    lab.drop("own.toml", text)
    lab.wait_problem(pattern)

    assert lab.said(lab.pod("own"), "ulimit -n") == ["100"]
    assert lab.said(lab.pod("other"), "ulimit -n") == ["200"]
    assert lab.said(lab.pod("runc"), "ulimit -n") == ["1024"]
    (condition,) = [c for c in lab.status().status.conditions if c.type == "HandlersConfigured"]
    assert (condition.status, condition.reason) == (False, "DropInNotUsable")
    assert re.search(pattern, condition.message)
    (line,) = lab.said_by_server("drop-in cannot be used")
    assert re.search(pattern, line["error"])
    (finding,) = [f for f in lab.check() if f["name"] in ("handler own", "handler own.toml")]
    assert finding["status"] == "limited"
    assert re.search(pattern, finding["detail"])

    lab.handler("own", 'default_rlimits = "nofile=300"')
    assert lab.problems() == []
    assert conditions(lab.status())["HandlersConfigured"]
    assert lab.said(lab.pod("own"), "ulimit -n") == ["300"]


def test_a_drop_in_that_is_broken_at_start_refuses_its_handler_and_nothing_else(lab: Lab) -> None:
    lab.drop("crun.toml", "[runtimes.crun]\npath = ?\n")
    lab.drop("new.toml", '[runtimes.new]\npath = "runc"\n')
    lab.site.stop()
    lab.site.start()

    code, text = refusal(lambda: lab.pod("crun"))
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert re.search(r"runtime_handler 'crun': .*crun\.toml: .*line 2", text)
    assert "crun" not in lab.names()
    assert lab.said(lab.pod("new"), "echo works") == ["works"]


def test_a_program_that_is_installed_later_mends_the_handler(lab: Lab, tmp_path: Path) -> None:
    lab.drop("own.toml", f'[runtimes.own]\npath = "{tmp_path}/other-runc"')
    lab.wait_problem("not found")
    assert "own" not in lab.names()

    other_runc(tmp_path)

    waiting.until(lambda: "own" in lab.names(), "the handler")
    assert lab.problems() == []


def test_a_half_written_drop_in_does_not_count_until_its_writer_closes_it(lab: Lab) -> None:
    lab.handler("own", 'default_rlimits = "nofile=100"')
    with (lab.folder / "own.toml").open("w") as file:  # empty from here on
        file.write("[runtimes.own]\npath =")
        file.flush()
        lab.handler("second")  # the server has looked meanwhile
        assert lab.said(lab.pod("own"), "ulimit -n") == ["100"]
        file.write('"runc"\n')
        file.flush()
        lab.handler("third")
        assert lab.said(lab.pod("own"), "ulimit -n") == ["100"]
        file.write('default_rlimits = "nofile=200"\n')
    waiting.until(lambda: lab.said(lab.pod("own"), "ulimit -n") == ["200"], "the new limit")

    assert lab.said_by_server("drop-in cannot be used") == []
    assert len(lab.said_by_server("handler changed")) == 1
    assert lab.said_by_server("handler removed") == []


def test_what_editors_leave_is_no_drop_in(lab: Lab) -> None:
    for name in (".own.toml.swp", "own.toml~", "#own.toml#", ".hidden.toml", "own.toml.dpkg-new"):
        (lab.folder / name).write_text("[runtimes.bad]\nbroken")
    lab.handler("own")

    assert lab.problems() == []
    assert "bad" not in lab.names()


# -- each option acts ------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["conf_dir", "conf_file"])
def test_a_handler_has_a_network_of_its_own(
    lab: Lab, other_net: network.Network, tmp_path: Path, by: str
) -> None:
    folder = other_net.write(tmp_path / "net.d")
    options = [f'cni_conf_dir = "{folder}"']
    if by == "conf_file":
        shutil.copy(folder / "10-bridge.conflist", folder / "20-mine.conflist")
        (folder / "10-bridge.conflist").write_text("{}")
        options.append('cni_conf_file = "20-mine.conflist"')
    lab.handler("own", *options)

    pod = lab.pod("own")
    address = lab.client.pod_status(pod.id).status.network.ip
    assert address.startswith("10.88.")
    assert not lab.client.pod_status(lab.pod("").id).status.network.ip.startswith("10.88.")
    assert lab.status().info["lastCNILoadStatus.own"] == "OK"
    (lab.folder / "own.toml").unlink()
    waiting.until(lambda: "own" not in lab.names(), "the handler is gone")
    shutil.rmtree(folder)
    lab.client.remove_pod(pod.id)
    assert not (network.LEASES / other_net.name / address).exists()


def test_a_handlers_network_that_is_missing_is_its_own_matter(lab: Lab, tmp_path: Path) -> None:
    lab.handler("own", f'cni_conf_dir = "{tmp_path}/none"')

    code, text = refusal(lambda: lab.pod("own"))
    assert code is grpc.StatusCode.UNAVAILABLE
    assert f"no valid CNI configuration in {tmp_path}/none" in text
    assert "no valid CNI" in lab.status().info["lastCNILoadStatus.own"]
    assert conditions(lab.status())["NetworkReady"]
    (finding,) = [f for f in lab.check() if f["name"] == "CNI configuration of own"]
    assert finding["status"] == "limited"


def test_snapshot_options_are_those_of_the_root(lab: Lab) -> None:
    lab.handler("own", 'snapshot_options = ["nosuid", "nodev", "metacopy=on", "sync"]')
    script = "grep ' / ' /proc/mounts"

    (own,) = lab.said(lab.pod("own"), script)
    (plain,) = lab.said(lab.pod("runc"), script)

    options = own.split()[3].split(",")
    assert {"nosuid", "nodev", "metacopy=on"} <= set(options)
    assert "volatile" not in options
    assert "volatile" in plain
    assert "nosuid" not in plain


def test_options_that_the_kernel_refuses_fail_the_container_alone(lab: Lab) -> None:
    lab.handler("own", 'snapshot_options = ["nfs_export=on", "metacopy=on"]')
    pod = lab.pod("own")

    code, text = refusal(lambda: lab.client.run(pod, lab.image, SLEEP))
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert "[runtimes.own] snapshot_options (own.toml): nfs_export=on, metacopy=on: " in text
    assert lab.client.containers(pod_sandbox_id=pod.id) == []


def test_annotations_are_let_through_by_the_drop_in(lab: Lab) -> None:
    wanted = {"cri-server.io/rlimits": "nofile=77"}
    code, text = refusal(lambda: lab.pod("runc", annotations=wanted))
    assert (code, "cri-server.io/rlimits" in text) == (INVALID, True)

    lab.handler("own", 'pod_annotations = ["cri-server.io/rlimits"]')

    assert lab.said(lab.pod("own", annotations=wanted), "ulimit -n") == ["77"]


def test_a_limit_of_processes_holds_also_after_an_update(lab: Lab) -> None:
    lab.handler("own", "default_pids_limit = 20")
    pod = lab.pod("own")
    container = lab.client.run(pod, lab.image, SLEEP)
    script = "for i in $(seq 40); do sleep 60 & done"

    resources = api.LinuxContainerResources(memory_limit_in_bytes=64 << 20)
    lab.client.runtime.UpdateContainerResources(
        api.UpdateContainerResourcesRequest(container_id=container, linux=resources)
    )

    done = lab.client.exec_sync(container, ["sh", "-c", script])
    assert b"can't fork" in done.stderr


def test_what_a_handler_has_for_cgroup_v2_holds_or_is_refused(lab: Lab) -> None:
    unified = 'default_unified = { "memory.oom.group" = "1" }'
    lab.drop("own.toml", f'[runtimes.own]\npath = "runc"\ncgroup_writable = true\n{unified}')
    if not cgroups.is_v2():
        text = r"own\.toml: \[runtimes\.own\]: cgroup_writable: this host has no cgroup v2"
        assert lab.wait_problem(text)
        (finding,) = [f for f in lab.check() if f["name"] == "handler own"]
        assert re.search(text, finding["detail"])
        code, reason = refusal(lambda: lab.pod("own"))
        assert (code, bool(re.search(text, reason))) == (grpc.StatusCode.FAILED_PRECONDITION, True)
        return
    waiting.until(lambda: "own" in lab.names(), "the handler")
    container = lab.client.run(lab.pod("own"), lab.image, SLEEP)
    resources = api.LinuxContainerResources(memory_limit_in_bytes=64 << 20)
    lab.client.runtime.UpdateContainerResources(
        api.UpdateContainerResourcesRequest(container_id=container, linux=resources)
    )
    script = "cd /sys/fs/cgroup; mkdir below && rmdir below && cat memory.oom.group"
    assert lab.client.exec_sync(container, ["sh", "-c", script]).stdout == b"1\n"


def test_a_privileged_container_has_the_hosts_devices_unless_the_handler_keeps_them(
    lab: Lab,
) -> None:
    lab.handler("own", "privileged_without_host_devices = true")
    frame = api.LinuxSandboxSecurityContext(privileged=True)
    context = api.LinuxContainerSecurityContext(privileged=True)
    wanted = api.LinuxContainerConfig(security_context=context)
    script = "mknod /tmp/kmsg c 1 11; (: < /tmp/kmsg) 2>/dev/null; echo $?; ls -d /dev/kmsg"

    found = {}
    for name in ("runc", "own"):
        config = lab.client.pod_config()
        config.linux.security_context.MergeFrom(frame)
        pod = lab.client.run_pod(config, handler=name)
        found[name] = lab.said(pod, script, linux=wanted)

    assert found["runc"] == ["0", "/dev/kmsg"]
    assert found["own"][0] != "0"  # nor may it open a node that it makes itself
    assert "No such file" in found["own"][1]


def test_a_memory_limit_below_the_handlers_least_is_refused(lab: Lab) -> None:
    lab.handler("own", 'min_memory = "32Mi"')
    pod = lab.pod("own")
    little = api.LinuxContainerResources(memory_limit_in_bytes=8 << 20)
    linux = api.LinuxContainerConfig(resources=little)

    code, text = refusal(lambda: lab.client.run(pod, lab.image, SLEEP, linux=linux))
    assert (code, "[runtimes.own] min_memory" in text) == (INVALID, True)
    container = lab.client.run(pod, lab.image, SLEEP)
    request = api.UpdateContainerResourcesRequest(container_id=container, linux=little)
    code, text = refusal(lambda: lab.client.runtime.UpdateContainerResources(request))
    assert (code, "memory_limit_in_bytes" in text) == (INVALID, True)


# -- seccomp ---------------------------------------------------------------------------------------


def confined() -> api.LinuxContainerConfig:
    context = api.LinuxContainerSecurityContext(seccomp=RUNTIME_DEFAULT)
    return api.LinuxContainerConfig(security_context=context)


def profile(folder: Path, *denied: str) -> Path:
    """Write a profile that denies some calls."""
    rules = [{"names": list(denied), "action": "SCMP_ACT_ERRNO", "errnoRet": 38 + 57}]
    path = folder / "profile.json"
    path.write_text(json.dumps({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules}))
    return path


def test_runtime_default_is_the_handlers_profile(lab: Lab, tmp_path: Path) -> None:
    path = profile(tmp_path, "mkdir", "mkdirat")
    lab.handler("own", f'seccomp_profile = "{path}"')
    script = "mkdir /tmp/x 2>&1 || true; grep Seccomp: /proc/self/status"
    pod = lab.pod("own")

    denied, state = lab.said(pod, script, linux=confined())
    assert "Operation not supported" in denied
    assert state.split() == ["Seccomp:", "2"]
    assert lab.said(pod, script, name="unconfined")[-1].split() == ["Seccomp:", "0"]
    assert len(lab.said(lab.pod("runc"), script, linux=confined())) == 1

    profile(tmp_path, "rmdir")  # an edit counts for new pods, the old one keeps its own
    waiting.until(lambda: len(lab.said(lab.pod("own"), script, linux=confined())) == 1, "edit")
    assert "not supported" in lab.said(pod, script, name="later", linux=confined())[0]


@pytest.mark.parametrize("own", [True, False], ids=["file", "built in"])
@pytest.mark.parametrize("runtime", ["runc", pytest.param("crun", marks=pytest.mark.needs("crun"))])
def test_an_audit_denies_nothing_and_the_kernel_logs_what_it_would_have(
    lab: Lab, tmp_path: Path, *, own: bool, runtime: str
) -> None:
    program = shutil.which(runtime)
    options = [f'seccomp_profile = "{profile(tmp_path, "sethostname")}"'] if own else []
    text = [f'[runtimes.own]\npath = "{program}"', "seccomp_audit = true", *options]
    lab.drop("own.toml", "\n".join(text))
    waiting.until(lambda: "own" in lab.names(), "the handler")
    program_name = f"busybox{os.getpid()}"  # as the kernel's line calls it
    script = f"cp /bin/busybox /tmp/{program_name}; /tmp/{program_name} hostname x; echo $?"
    linux = confined()
    linux.security_context.capabilities.add_capabilities.append("NET_ADMIN")
    before = kernel_log(program_name)

    lines = lab.said(lab.pod("own"), script, linux=linux)
    refused = lab.said(lab.pod("runc"), script, linux=linux)

    assert "Operation not permitted" in lines[0]  # the kernel's own refusal: no CAP_SYS_ADMIN
    assert lines[-1] == refused[-1] == "1"
    found = waiting.until(lambda: kernel_log(program_name)[len(before) :], "a line of the kernel")
    assert "syscall=170 " in found[0]  # sethostname of x86_64
    assert len(found) == 1  # the pod of the plain handler was refused without one
    assert lab.problems() == []


def kernel_log(program: str) -> list[str]:
    """Return the kernel's seccomp lines of a program."""
    text = subprocess.run(["dmesg"], capture_output=True, text=True, check=True).stdout
    return [ln for ln in text.splitlines() if "type=1326" in ln and f'comm="{program}"' in ln]


@pytest.mark.needs("runsc")
def test_an_audit_that_the_runtime_does_not_know_is_told_and_enforced(lab: Lab) -> None:
    lab.drop("own.toml", '[runtimes.own]\npath = "runsc"\nseccomp_audit = true')
    waiting.until(lambda: "own" in lab.names(), "the handler")

    text = r"\[runtimes\.own\] seccomp_audit: .*runsc does not list SCMP_ACT_LOG.*enforced instead"
    assert lab.wait_problem(text)
    (finding,) = [f for f in lab.check() if f["name"] == "handler own"]
    assert re.search(text, finding["detail"])
