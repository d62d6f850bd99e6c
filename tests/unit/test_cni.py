# SPDX-License-Identifier: Apache-2.0
"""Attach, detach and status with plugins that do as they are told (tests/fakes/cni)."""

import asyncio
import contextlib
import json
import os
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from cri_server import errors
from cri_server.network import cache, cni, leaks, poller
from cri_server.pb import api_pb2 as api
from tests.fakes import cni as fakes
from tests.fakes.cni import attachment, fail, once, result, say

VERSIONS = ["0.3.1", "0.4.0", "1.0.0", "1.1.0"]


@pytest.fixture
def host(tmp_path: Path) -> fakes.Fakes:
    """Return a host with one network: `main` gives an address, `extra` adds to it."""
    made = fakes.Fakes(tmp_path)
    made.install("main", ADD=result("10.0.0.2/24"))
    made.install("extra", ADD=result("10.0.0.2/24", extra=True))
    made.configure("main", "extra")
    return made


@pytest.fixture
async def network(host: fakes.Fakes) -> AsyncIterator[cni.Network]:
    made = cni.Network(host.settings())
    yield made
    await made.close()


def gone(*pids: int) -> bool:
    """Say whether none of these runs; the host's init may take its time to reap an orphan."""
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if ") Z " not in Path(f"/proc/{pid}/stat").read_text():
                return False
    return True


# -- ADD and DEL -----------------------------------------------------------------------------------


async def test_attach_runs_the_chain_in_order_and_detach_in_reverse(
    host: fakes.Fakes, network: cni.Network
) -> None:
    got = await network.attach(attachment())
    assert got.ips == ("10.0.0.2",)
    assert got.raw["extra"] is True
    assert host.cached() == ["fakenet-pod1-eth0"]
    await network.detach(attachment())
    assert host.verbs() == ["main ADD", "extra ADD", "extra DEL", "main DEL"]
    assert host.cached() == []


async def test_plugins_are_told_who_and_where(host: fakes.Fakes, network: cni.Network) -> None:
    await network.attach(attachment(netns="/run/netns/pod1"))
    env = host.calls()[0].env
    assert {k: v for k, v in env.items() if k.startswith("CNI_")} == {
        "CNI_COMMAND": "ADD",
        "CNI_CONTAINERID": "pod1",
        "CNI_NETNS": "/run/netns/pod1",
        "CNI_IFNAME": "eth0",
        "CNI_ARGS": "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web;"
        "K8S_POD_INFRA_CONTAINER_ID=pod1;K8S_POD_UID=u-1",
        "CNI_PATH": str(host.bin),
    }
    assert "/usr/sbin" in env["PATH"].split(":")


@pytest.mark.parametrize("version", VERSIONS)
async def test_each_version_gets_the_results_that_it_knows(
    host: fakes.Fakes, network: cni.Network, version: str
) -> None:
    host.install("main", ADD=result("10.0.0.2/24", version=version))
    host.configure("main", "extra", version=version)
    await network.attach(attachment())
    await network.detach(attachment())
    first, second, third, fourth = (call.stdin for call in host.calls())
    assert "prevResult" not in first
    assert second["prevResult"]["cniVersion"] == version
    assert ("version" in second["prevResult"]["ips"][0]) is (version < "1.0.0")
    for stdin in (third, fourth):  # a result on DEL came with 0.4.0
        assert ("prevResult" in stdin) is (version >= "0.4.0")
        assert (stdin["cniVersion"], stdin["name"]) == (version, "fakenet")
    if version >= "0.4.0":
        assert third["prevResult"]["extra"] is True
        assert third["prevResult"] == fourth["prevResult"]


async def test_each_plugin_gets_only_the_capabilities_that_it_declares(
    host: fakes.Fakes, network: cni.Network
) -> None:
    ports = {"type": "extra", "capabilities": {"portMappings": True, "dns": False, "mac": True}}
    host.configure("main", ports)
    mapping = api.PortMapping(container_port=80, host_port=8080)
    pod = attachment(port_mappings=[mapping], dns=api.DNSConfig(servers=["10.0.0.10"]))
    await network.attach(pod)
    await network.detach(attachment())  # what DEL gets is what ADD got
    main, extra, undone, _ = (call.stdin for call in host.calls())
    assert "runtimeConfig" not in main
    wanted = {"hostPort": 8080, "containerPort": 80, "protocol": "tcp", "hostIP": ""}
    assert extra["runtimeConfig"] == undone["runtimeConfig"] == {"portMappings": [wanted]}


HOST_PORT: dict[str, Any] = {"port_mappings": [api.PortMapping(container_port=80, host_port=8080)]}
EGRESS = {"annotations": {"kubernetes.io/egress-bandwidth": "10M"}}


@pytest.mark.parametrize(
    ("asked", "name"),
    [(HOST_PORT, "port_mappings: "), (EGRESS, "annotation kubernetes.io/")],
)
async def test_what_no_plugin_takes_is_refused_unless_an_agent_may_see_to_it(
    host: fakes.Fakes, network: cni.Network, asked: dict[str, Any], name: str
) -> None:
    host.install("bridge", ADD=result("10.0.0.2/24"))
    host.configure("bridge")
    with pytest.raises(errors.InvalidArgument) as caught:
        await network.attach(attachment(**asked))
    assert caught.value.message.startswith(name)
    assert "10-fake.conflist" in caught.value.message
    assert host.calls() == []
    assert host.cached() == []
    host.configure("bridge", "extra")  # which might be Cilium's
    await network.attach(attachment(**asked))


async def test_portmap_sees_to_host_ports_where_nobody_else_does(
    host: fakes.Fakes, network: cni.Network
) -> None:
    host.install("bridge", ADD=result("10.0.0.2/24"))
    host.install("portmap", ADD=result("10.0.0.2/24"))
    host.configure("bridge")
    await network.attach(attachment(**HOST_PORT))
    await network.detach(attachment())
    assert host.verbs() == ["bridge ADD", "portmap ADD", "portmap DEL", "bridge DEL"]
    [asked] = host.calls()[2].stdin["runtimeConfig"]["portMappings"]
    assert asked["hostPort"] == 8080
    await network.attach(attachment())
    assert host.verbs()[4:] == ["bridge ADD"]


async def test_a_port_without_a_host_port_asks_plugins_for_nothing(
    host: fakes.Fakes, network: cni.Network
) -> None:
    host.install("bridge", ADD=result("10.0.0.2/24"))
    host.configure("bridge")
    await network.attach(attachment(port_mappings=[api.PortMapping(container_port=80)]))


async def test_detach_uses_the_configuration_of_the_attach(
    host: fakes.Fakes, network: cni.Network
) -> None:
    await network.attach(attachment(netns="/run/netns/gone"))
    (host.net / "10-fake.conflist").unlink()
    await network.detach(attachment(netns="/run/netns/gone"))
    assert host.verbs()[2:] == ["extra DEL", "main DEL"]
    assert [call.env["CNI_NETNS"] for call in host.calls()[2:]] == ["", ""]
    assert host.cached() == []


async def test_detach_of_what_is_not_attached_runs_nothing(
    host: fakes.Fakes, network: cni.Network
) -> None:
    await network.detach(attachment())
    await network.attach(attachment())
    await network.detach(attachment())
    await network.detach(attachment())
    assert len(host.calls()) == 4


async def test_a_new_server_detaches_what_the_old_one_attached(
    host: fakes.Fakes, network: cni.Network
) -> None:
    await network.attach(attachment())
    later = cni.Network(host.settings())
    await later.detach(attachment())
    assert host.cached() == []
    assert host.verbs()[2:] == ["extra DEL", "main DEL"]


async def test_an_intent_without_a_result_is_detached(
    host: fakes.Fakes, network: cni.Network
) -> None:
    """The server was killed between the first plugin and the result."""
    network._begin(attachment(), None)
    assert host.cached() == ["fakenet-pod1-eth0"]
    await network.detach(attachment())
    assert host.verbs() == ["extra DEL", "main DEL"]
    assert "prevResult" not in host.calls()[0].stdin
    assert host.cached() == []


async def test_a_file_of_a_write_that_was_killed_goes_with_its_pod(
    host: fakes.Fakes, network: cni.Network
) -> None:
    unfinished = host.settings().cache_dir / ".fakenet-pod1-eth0.new"
    unfinished.parent.mkdir(exist_ok=True)
    unfinished.write_bytes(b"{")
    await network.detach(attachment())
    assert not unfinished.exists()
    assert host.verbs() == []


@pytest.mark.parametrize("lost", [True, False], ids=["lost", "broken"])
@pytest.mark.parametrize("name", ["fakenet", "other"])
async def test_a_cache_entry_that_is_gone_is_made_up_for_by_the_record(
    host: fakes.Fakes, network: cni.Network, *, lost: bool, name: str
) -> None:
    """Broken is what a power loss leaves, with the name of the network at least."""
    host.configure("main", {"type": "extra", "capabilities": {"portMappings": True}})
    added = (await network.attach(attachment(**HOST_PORT))).raw
    entry = host.cache / "results" / "fakenet-pod1-eth0"
    if lost:
        entry.unlink()
    else:
        entry.write_bytes(b"")
    host.configure("main", {"type": "extra", "capabilities": {"portMappings": True}}, name=name)
    await network.detach(attachment(result=added, **HOST_PORT))
    add, undone = host.calls()[1:3]
    assert host.verbs()[2:] == ["extra DEL", "main DEL"]
    assert undone.env["CNI_ARGS"] == add.env["CNI_ARGS"]
    assert undone.stdin["runtimeConfig"] == add.stdin["runtimeConfig"]
    assert undone.stdin["prevResult"] == added
    assert undone.stdin["name"] == (name if lost else "fakenet")
    assert host.cached() == []


async def test_what_the_cache_and_the_record_do_not_know_is_not_detached(
    host: fakes.Fakes, network: cni.Network
) -> None:
    await network.attach(attachment())
    (host.cache / "results" / "fakenet-pod1-eth0").unlink()
    await network.detach(attachment())
    assert host.verbs()[2:] == []


async def test_a_broken_entry_is_not_in_the_way_where_there_is_no_network_any_more(
    host: fakes.Fakes, network: cni.Network
) -> None:
    """Hazards R12: StopPodSandbox works without a configuration."""
    added = (await network.attach(attachment())).raw
    (host.cache / "results" / "fakenet-pod1-eth0").write_bytes(b"")
    (host.net / "10-fake.conflist").unlink()
    await network.detach(attachment(result=added))
    assert host.verbs()[2:] == []
    assert host.cached() == []


async def test_eight_pods_at_a_time(host: fakes.Fakes, network: cni.Network) -> None:
    pods = [attachment(f"pod{n}") for n in range(8)]
    results = await asyncio.gather(*(network.attach(pod) for pod in pods))
    assert [r.ips for r in results] == [("10.0.0.2",)] * 8
    assert len(host.cached()) == 8
    await asyncio.gather(*(network.detach(pod) for pod in pods))
    assert host.cached() == []
    for pod in pods:  # within a pod nothing overlaps
        own = [c for c in host.calls() if c.env["CNI_CONTAINERID"] == pod.pod_id]
        assert [c.verb for c in own] == ["ADD", "ADD", "DEL", "DEL"]


# -- failures --------------------------------------------------------------------------------------


async def test_a_failed_add_is_undone_and_says_who_failed(
    host: fakes.Fakes, network: cni.Network
) -> None:
    host.install("extra", ADD=fail("no more ports\nsecond line", 7, "port 80 is taken"))
    with pytest.raises(errors.Internal) as caught:
        await network.attach(attachment())
    assert caught.value.message == (
        "CNI network 'fakenet': plugin 'extra': ADD failed: no more ports: port 80 is taken"
    )
    assert host.verbs() == ["main ADD", "extra ADD", "extra DEL", "main DEL"]
    assert host.cached() == []


async def test_a_plugin_that_fails_once_fails_once(host: fakes.Fakes, network: cni.Network) -> None:
    host.install("extra", ADD="")
    (host.bin / "extra.d" / "ADD").write_text(
        f'mv "$0.d/next" "$action"\n{fail("try again", 11)}\n'
    )
    (host.bin / "extra.d" / "next").write_text(result("10.0.0.3/24"))
    with pytest.raises(errors.Unavailable, match="try again"):
        await network.attach(attachment())
    assert (await network.attach(attachment())).ips == ("10.0.0.3",)


async def test_when_the_undo_fails_too_the_error_says_so_and_detach_tries_again(
    host: fakes.Fakes, network: cni.Network
) -> None:
    host.install("extra", ADD=fail("no"), DEL=once(fail("stuck")))
    with pytest.raises(
        errors.Internal, match=r"ADD failed: no; undoing it failed too: .*DEL .*stuck"
    ):
        await network.attach(attachment())
    assert host.verbs()[2:] == ["extra DEL", "main DEL"]
    assert host.cached() == ["fakenet-pod1-eth0"]
    await network.detach(attachment())
    assert host.verbs()[4:] == ["extra DEL", "main DEL"]
    assert host.cached() == []


async def test_detach_goes_on_after_a_failure_and_reports_all(
    host: fakes.Fakes, network: cni.Network
) -> None:
    host.configure("main", "extra", "third")
    host.install("third", ADD=result("10.0.0.2/24"), DEL=fail("third stuck"))
    await network.attach(attachment())
    host.uninstall("extra")
    with pytest.raises(errors.Internal, match=r"third stuck; .*'extra': DEL failed: not found in"):
        await network.detach(attachment())
    assert host.verbs()[3:] == ["third DEL", "main DEL"]
    assert host.cached() == ["fakenet-pod1-eth0"]


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ("", "it printed no result"),
        ("echo '  '", "it printed no result"),
        ("echo garbage", "not JSON: .*garbage"),
        ("echo '[1]'", "not a JSON object"),
        ("head -c 3000000 /dev/zero", "more than 1048576 bytes"),
        (say({"ips": "none"}), "'ips' of the result is not a list"),
        (say({"cniVersion": "1.0.0"}), "no IP address on eth0"),
        (say({"ips": [{"address": "nowhere"}]}), "not an address"),
        (result(), "no IP address on eth0"),
        ("kill -9 $$", "signal 9"),
        ("exit 3", "exit 3"),
        ("echo 'cannot open' >&2; exit 1", "exit 1: cannot open"),
        ("echo not json; exit 1", "exit 1: not json"),
        ("head -c 3000000 /dev/zero; exit 1", "exit 1: "),
        (say({"code": "x", "msg": 7}) + "\nexit 1", "exit 1: "),
    ],
)
async def test_an_answer_that_is_no_result_is_an_error_of_one_line(
    host: fakes.Fakes, network: cni.Network, lines: str, why: str
) -> None:
    host.configure("main")
    host.install("main", ADD=lines)
    with pytest.raises(errors.Internal, match=why) as caught:
        await network.attach(attachment())
    assert "CNI network 'fakenet': plugin 'main': ADD failed: " in caught.value.message
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 500
    assert host.verbs() == ["main ADD", "main DEL"]
    assert host.cached() == []


async def test_a_program_that_is_none_is_an_error(host: fakes.Fakes, network: cni.Network) -> None:
    host.configure("main")
    (host.bin / "main").write_bytes(b"\x7fELF rubbish")
    with pytest.raises(errors.Internal, match=r"'main': ADD failed: .*Exec format error"):
        await network.attach(attachment())


async def test_bad_values_are_refused_before_anything_runs(
    host: fakes.Fakes, network: cni.Network
) -> None:
    with pytest.raises(errors.InvalidArgument):
        await network.attach(attachment(name="a;b"))
    assert host.calls() == []
    assert host.cached() == []


# -- time limits and cancellation ------------------------------------------------------------------


async def test_a_hanging_add_is_killed_with_its_children_and_undone(host: fakes.Fakes) -> None:
    host.install("extra", ADD=fakes.HANG)
    network = cni.Network(host.settings(add_timeout=0.5))
    with pytest.raises(
        errors.DeadlineExceeded, match=r"'extra': ADD failed: no answer in 0\.\d+ s"
    ):
        await network.attach(attachment())
    assert host.verbs() == ["main ADD", "extra ADD", "extra DEL", "main DEL"]
    assert host.cached() == []
    pid = int((host.bin / "calls" / "hanging").read_text())
    await fakes.until(lambda: gone(pid), "the plugin to be gone")


async def test_a_hanging_del_leaves_time_for_the_others(host: fakes.Fakes) -> None:
    network = cni.Network(host.settings(del_timeout=0.6))
    await network.attach(attachment())
    host.install("extra", DEL=fakes.HANG)
    with pytest.raises(errors.DeadlineExceeded, match=r"'extra': DEL failed: no answer"):
        await network.detach(attachment())
    assert host.verbs()[2:] == ["extra DEL", "main DEL"]
    assert host.cached() == ["fakenet-pod1-eth0"]
    host.install("extra", DEL="exit 0")
    await network.detach(attachment())
    assert host.cached() == []


async def test_a_cancelled_attach_ends_the_plugin_and_is_undone_without_the_caller(
    host: fakes.Fakes, network: cni.Network
) -> None:
    host.install("extra", ADD=fakes.HANG)
    caller = asyncio.create_task(network.attach(attachment()))
    await fakes.until(host.hanging, "the plugin to hang")
    pids = host.hanging()
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    await network.detach(attachment())  # waits for the undo, then has nothing to do
    assert host.verbs() == ["main ADD", "extra ADD", "extra DEL", "main DEL"]
    assert host.cached() == []
    await fakes.until(lambda: gone(*pids), "the plugin to be gone")


async def test_an_attach_that_is_cancelled_as_it_begins_leaves_no_entry(
    host: fakes.Fakes, network: cni.Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing, go_on, written = threading.Event(), threading.Event(), threading.Event()
    write = cache.Cache.write

    def held(self: cache.Cache, entry: cache.Entry) -> None:
        writing.set()
        assert go_on.wait(60)
        write(self, entry)
        written.set()

    monkeypatch.setattr(cache.Cache, "write", held)
    caller = asyncio.create_task(network.attach(attachment()))
    await fakes.until(writing.is_set, "the intent to be written")
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    undoing = asyncio.create_task(network.detach(attachment()))
    await asyncio.wait([undoing], timeout=0.2)  # it must not be done before what it undoes
    go_on.set()
    await fakes.until(written.is_set, "the intent to have been written")
    await undoing
    assert host.cached() == []


async def test_a_caller_at_its_deadline_does_not_wait_for_the_undo(host: fakes.Fakes) -> None:
    host.install("extra", ADD=fakes.HANG)
    host.install("main", ADD=result("10.0.0.2/24"), DEL=fakes.HANG)
    network = cni.Network(host.settings(del_timeout=1.0))
    loop = asyncio.get_running_loop()
    caller = asyncio.create_task(network.attach(attachment()))
    await fakes.until(host.hanging, "the plugin to hang")
    began = loop.time()
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert loop.time() - began < 0.3
    await network.close()  # waits for the undo
    assert host.verbs()[2:] == ["extra DEL", "main DEL"]
    assert host.cached() == ["fakenet-pod1-eth0"]


async def test_a_cancelled_detach_runs_to_its_end(host: fakes.Fakes, network: cni.Network) -> None:
    gate = host.bin / "gate"
    os.mkfifo(gate)
    await network.attach(attachment())
    host.install("extra", DEL=f"read line <{gate}")
    caller = asyncio.create_task(network.detach(attachment()))
    await fakes.until(lambda: "extra DEL" in host.verbs(), "the DEL to begin")
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    await asyncio.to_thread(gate.write_text, "go\n")
    await fakes.until(lambda: not host.cached(), "the DEL to end")
    assert host.verbs()[2:] == ["extra DEL", "main DEL"]


# -- status ----------------------------------------------------------------------------------------


async def test_without_a_configuration_the_network_is_not_ready_until_there_is_one(
    host: fakes.Fakes, network: cni.Network
) -> None:
    file = host.net / "10-fake.conflist"
    text = file.read_text()
    file.unlink()
    status = network.status()
    assert (status.ready, status.reason) == (False, "NetworkPluginNotReady")
    assert str(host.net) in status.message
    with pytest.raises(errors.Unavailable, match="no valid CNI configuration"):
        await network.attach(attachment())
    file.write_text(text)
    assert network.status() == cni.NetworkStatus(ready=True, reason="", message="")


async def test_a_missing_plugin_is_named_before_anything_runs(
    host: fakes.Fakes, network: cni.Network
) -> None:
    host.uninstall("extra")
    status = network.status()
    assert not status.ready
    assert status.message == f"CNI plugin 'extra' not found in {host.bin}"
    with pytest.raises(errors.Unavailable, match="'extra' not found"):
        await network.attach(attachment())
    assert host.calls() == []
    host.install("extra")
    assert network.status().ready


async def test_a_skipped_file_is_in_the_condition(host: fakes.Fakes, network: cni.Network) -> None:
    (host.net / "00-bad.conf").write_text(
        json.dumps({"type": "../sh", "name": "x", "cniVersion": "1.0.0"})
    )
    status = network.status()
    assert status.ready
    assert "00-bad.conf: plugin type '../sh' is not the name of a program" in status.message
    (host.net / "10-fake.conflist").unlink()
    status = network.status()
    assert not status.ready
    assert "00-bad.conf" in status.message


async def test_before_1_1_plugins_are_not_asked_for_status(
    host: fakes.Fakes, network: cni.Network
) -> None:
    assert network.status().ready
    await network.close()
    assert host.calls() == []


async def test_status_asks_in_the_background_and_follows_what_plugins_say(
    host: fakes.Fakes, network: cni.Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(poller, "WHEN_NOT", 0.01)
    monkeypatch.setattr(poller, "WHEN_READY", 0.01)
    host.install("main", STATUS=fail("no controller yet", 50))
    host.configure("main", "extra", version="1.1.0")
    first = network.status()
    assert not first.ready
    assert "not answered" in first.message
    await fakes.until(lambda: "no controller yet" in network.status().message, "the answer")
    host.install("main", STATUS="exit 0")
    await fakes.until(lambda: network.status().ready, "the network to be ready")
    assert {"main STATUS", "extra STATUS"} == set(host.verbs())
    stdin = host.calls()[0].stdin
    assert stdin == {"type": "main", "cniVersion": "1.1.0", "name": "fakenet"}


async def test_a_status_that_hangs_holds_up_nobody(host: fakes.Fakes) -> None:
    host.install("main", STATUS=fakes.HANG)
    host.configure("main", version="1.1.0")
    network = cni.Network(host.settings(status_timeout=0.3))
    assert not network.status().ready
    await fakes.until(host.hanging, "STATUS to hang")
    pids = host.hanging()
    loop = asyncio.get_running_loop()
    began = loop.time()
    assert not network.status().ready
    assert loop.time() - began < 0.05
    await fakes.until(lambda: "STATUS failed: no answer" in network.status().message, "the limit")
    await fakes.until(lambda: gone(*pids), "the plugin to be gone")
    await network.close()


async def test_close_ends_a_status_that_hangs(host: fakes.Fakes) -> None:
    host.install("main", STATUS=fakes.HANG)
    host.configure("main", version="1.1.0")
    network = cni.Network(host.settings())
    network.status()
    await fakes.until(host.hanging, "STATUS to hang")
    await network.close()
    await fakes.until(lambda: gone(*host.hanging()), "the plugin to be gone")


async def test_a_new_configuration_stands_on_the_old_verdict_until_it_is_asked(
    host: fakes.Fakes, network: cni.Network
) -> None:
    host.configure("main", version="1.1.0")
    await fakes.until(lambda: network.status().ready, "the network to be ready")
    host.install("extra", STATUS=fail("not mine", 51))
    host.configure("main", "extra", version="1.1.0", name="new")
    assert network.status().ready
    await fakes.until(lambda: "not mine" in network.status().message, "the new verdict")


# -- CHECK, GC, VERSION, info ----------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
async def test_check_asks_every_plugin_with_the_result(
    host: fakes.Fakes, network: cni.Network, version: str
) -> None:
    host.configure("main", "extra", version=version)
    with pytest.raises(errors.NotFound):
        await network.check(attachment())
    await network.attach(attachment())
    await network.check(attachment())
    asked = [call for call in host.calls() if call.verb == "CHECK"]
    assert [c.plugin for c in asked] == (["main", "extra"] if version >= "0.4.0" else [])
    assert all(call.stdin["prevResult"]["extra"] for call in asked)


async def test_check_says_what_a_plugin_objects_to(host: fakes.Fakes, network: cni.Network) -> None:
    host.install("main", ADD=result("10.0.0.2/24"), CHECK=fail("eth0 is gone"))
    await network.attach(attachment())
    with pytest.raises(errors.Internal, match="'main': CHECK failed: eth0 is gone"):
        await network.check(attachment())


@pytest.mark.parametrize("version", ["1.0.0", "1.1.0"])
async def test_gc_names_every_attachment_of_the_network(
    host: fakes.Fakes, network: cni.Network, version: str
) -> None:
    host.configure("main", "extra", version=version)
    await network.attach(attachment("pod1"))
    await network.attach(attachment("pod2"))
    host.install("main", GC=fail("no"))
    if version == "1.0.0":
        await network.collect()
        assert "GC" not in {call.verb for call in host.calls()}
        return
    with pytest.raises(errors.Internal, match="'main': GC failed: no"):
        await network.collect()
    asked = [call for call in host.calls() if call.verb == "GC"]
    assert [c.plugin for c in asked] == ["main", "extra"]
    assert asked[1].stdin["cni.dev/valid-attachments"] == [
        {"containerID": "pod1", "ifname": "eth0"},
        {"containerID": "pod2", "ifname": "eth0"},
    ]


async def test_gc_is_alone_and_holds_up_nobody_who_hangs(host: fakes.Fakes) -> None:
    network = cni.Network(host.settings(add_timeout=1.0))
    host.configure("main", version="1.1.0")
    host.install("main", ADD=fakes.HANG)
    hanging = asyncio.create_task(network.attach(attachment("pod1")))
    await fakes.until(host.hanging, "the plugin hangs")
    host.install("main", ADD=result("10.1.2.3/24"))
    collecting = asyncio.create_task(network.collect())
    await network.attach(attachment("pod2"))
    assert "main GC" not in host.verbs()
    with pytest.raises(errors.DeadlineExceeded):
        await hanging
    await collecting
    assert host.verbs()[-1] == "main GC"
    await network.close()


async def test_an_attach_waits_for_a_gc_that_hangs_and_no_longer(
    host: fakes.Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cni, "GC_TIMEOUT", 0.5)
    network = cni.Network(host.settings())
    host.configure("main", version="1.1.0")
    host.install("main", GC=fakes.HANG, ADD=result("10.1.2.3/24"))
    collecting = asyncio.create_task(network.collect())
    await fakes.until(host.hanging, "the plugin hangs")
    await network.attach(attachment("pod1"))
    assert collecting.done()
    with pytest.raises(errors.DeadlineExceeded):
        await collecting
    await network.close()


async def test_leaks_are_looked_for_once_there_is_a_network_and_daily(
    host: fakes.Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = cni.Network(host.settings())
    host.install("main", GC=fail("no"))
    (host.net / "10-fake.conflist").unlink()
    looking = leaks.Leaks(network, lambda: [None])
    await looking.look()
    assert host.verbs() == []
    host.configure("main", version="1.1.0")
    for _ in range(2):
        await looking.look()
    assert host.verbs() == ["main GC"]
    monkeypatch.setattr(leaks, "DAY", 0.0)
    for _ in range(2):
        looking._next.clear()
        await looking.look()
    assert host.verbs() == ["main GC"] * 3
    await network.close()


async def test_versions_are_what_the_plugins_say(host: fakes.Fakes, network: cni.Network) -> None:
    spoken = {"cniVersion": "1.0.0", "supportedVersions": ["0.4.0", "1.0.0"]}
    for name in ("main", "extra"):
        host.install(name, VERSION=say(spoken))
    versions = await network.versions()
    assert versions == {"main": ("0.4.0", "1.0.0"), "extra": ("0.4.0", "1.0.0")}
    host.install("main", VERSION="echo nonsense")
    with pytest.raises(errors.Internal, match="'main': VERSION failed: not JSON"):
        await network.versions()


async def test_info_is_json_with_or_without_a_network(
    host: fakes.Fakes, network: cni.Network
) -> None:
    info: dict[str, Any] = json.loads(json.dumps(network.info()))
    assert info["status"] == {"ready": True, "reason": "", "message": ""}
    assert info["network"]["name"] == "fakenet"
    assert info["network"]["plugins"][1] == {
        "path": str(host.bin / "extra"),
        "config": {"type": "extra"},
    }
    (host.net / "10-fake.conflist").unlink()
    assert json.loads(json.dumps(network.info()))["network"] is None
