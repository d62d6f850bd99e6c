# SPDX-License-Identifier: Apache-2.0
"""Exec and attach as a client sees them, over SPDY and over WebSocket (behaviour.md §3)."""

import json
import socket
from collections.abc import Callable
from typing import Any

import pytest

from cri_server.pb import api_pb2 as api
from tests.fakes import streams
from tests.fakes.kubelet import Kubelet, Pod
from tests.lab import waiting

pytestmark = pytest.mark.needs("root", "netns", "overlay", "cni", "runc", "docker-registry")
Open = Callable[..., Any]
BOTH = ("stdout", "stderr")


@pytest.fixture(params=[streams.Spdy, streams.WebSocket])
def connect(request: pytest.FixtureRequest) -> Open:
    """Return a way to connect to a URL: (url, streams) to a session."""
    kind: Open = request.param
    return kind


def exec_url(kubelet: Kubelet, container: str, *cmd: str, **fields: bool) -> str:
    wanted = {"stdout": True, "stderr": not fields.get("tty", False), **fields}
    request = api.ExecRequest(container_id=container, cmd=cmd, **wanted)
    return str(kubelet.runtime.Exec(request).url)


def attach_url(kubelet: Kubelet, container: str, **fields: bool) -> str:
    wanted = {"stdout": True, "stderr": not fields.get("tty", False), **fields}
    return str(kubelet.runtime.Attach(api.AttachRequest(container_id=container, **wanted)).url)


@pytest.mark.parametrize(
    ("kind", "method"),
    [(streams.Spdy, "GET"), (streams.Spdy, "POST"), (streams.WebSocket, "GET")],
)
def test_output_and_exit_code(kubelet: Kubelet, container: str, kind: Open, method: str) -> None:
    url = exec_url(kubelet, container, "sh", "-c", "echo out; echo err >&2; exit 3")
    with kind(url, (*BOTH, "error"), method=method) as session:
        status = streams.ending(session)
    assert session.received["stdout"] == b"out\n"
    assert session.received["stderr"] == b"err\n"
    assert streams.exit_code(status) == 3


def test_all_output_comes_before_the_status(
    kubelet: Kubelet, container: str, connect: Open
) -> None:
    url = exec_url(kubelet, container, "sh", "-c", "head -c 5000000 /dev/zero", stderr=False)
    with connect(url, ("stdout", "error")) as session:
        while not session.received["error"] and session.step():
            continue
        assert session.received["error"]
        assert len(session.received["stdout"]) == 5_000_000


@pytest.mark.parametrize(
    ("kind", "protocol"),
    [(streams.Spdy, streams.V4), (streams.WebSocket, "v5.channel.k8s.io")],
    ids=["spdy", "websocket"],
)
def test_the_end_of_stdin_ends_cat_and_not_its_output(
    kubelet: Kubelet, container: str, kind: Open, protocol: str
) -> None:
    url = exec_url(kubelet, container, "sh", "-c", "cat; echo end", stdin=True)
    with kind(url, ("stdin", *BOTH, "error"), protocol) as session:
        for _ in range(40):
            session.send("stdin", b"0123456789" * 1000)
        session.finish("stdin")
        assert streams.exit_code(streams.ending(session)) == 0
    assert session.received["stdout"] == b"0123456789" * 40_000 + b"end\n"


def test_a_terminal_and_its_size(kubelet: Kubelet, container: str, connect: Open) -> None:
    url = exec_url(kubelet, container, "sh", tty=True, stdin=True)
    with connect(url, ("stdin", "stdout", "error", "resize")) as session:
        for size, shown in (((120, 33), b"33 120"), ((80, 25), b"25 80")):
            session.send("resize", json.dumps({"Width": size[0], "Height": size[1]}).encode())
            session.send("stdin", b"while [ '%b' != \"$(stty size)\" ]; do :; done; echo a''b%d\n"
                         % (shown, size[0]))  # fmt: skip
            streams.until(session, "stdout", b"ab%d" % size[0])
        session.send("stdin", b"exit 7\n")
        assert streams.exit_code(streams.ending(session)) == 7


@pytest.mark.parametrize(
    "version", ["v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io", ""]
)
def test_older_spdy_clients_get_a_line_of_text_for_a_failure(
    kubelet: Kubelet, container: str, version: str
) -> None:
    url = exec_url(kubelet, container, "sh", "-c", "echo out; exit 4", stderr=False)
    with streams.Spdy(url, ("stdout", "error"), version) as session:
        while session.step():
            pass
    assert session.received["stdout"] == b"out\n"
    assert session.received["error"] == b"command terminated with non-zero exit code: 4"


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize(
    "protocol", ["", "channel.k8s.io", "base64.channel.k8s.io", "v4.base64.channel.k8s.io",
                 "v5.channel.k8s.io"],
)  # fmt: skip
def test_every_websocket_protocol_in_text_and_in_binary_messages(
    kubelet: Kubelet, container: str, protocol: str, as_text: bool
) -> None:
    """The peers do not look at it, and the Python client of Kubernetes sends every str as text."""
    url = exec_url(kubelet, container, "sh", "-c", "read x; echo got $x", stdin=True)
    with streams.WebSocket(url, ("stdin", *BOTH, "error"), protocol) as session:
        session.as_text = as_text
        session.send("stdin", "wörd\n".encode())
        while session.step():
            pass
    assert session.received["stdout"] == "got wörd\n".encode()


def test_no_common_protocol_is_forbidden_and_says_which_there_are(
    kubelet: Kubelet, container: str, connect: Open
) -> None:
    with pytest.raises(streams.Refused) as refused:
        connect(exec_url(kubelet, container, "true"), ("stdout", "error"), "v9.channel.k8s.io")
    assert refused.value.status == 403
    if connect is streams.Spdy:
        assert "X-Accepted-Stream-Protocol-Versions: v4.channel.k8s.io" in refused.value.head


def test_a_command_that_is_not_there(kubelet: Kubelet, container: str, connect: Open) -> None:
    with connect(exec_url(kubelet, container, "/nope"), (*BOTH, "error")) as session:
        status = streams.ending(session)
    assert (status["status"], status["reason"], status["code"]) == ("Failure", "InternalError", 500)
    assert "/nope" in status["message"]


def test_a_token_is_good_once_and_for_its_kind(
    kubelet: Kubelet, container: str, connect: Open
) -> None:
    url = exec_url(kubelet, container, "true")
    with connect(url, (*BOTH, "error")) as session:
        streams.ending(session)
    other = exec_url(kubelet, container, "true").replace("/exec/", "/attach/")
    for bad in (url, other, other.replace("/attach/", "/exec/"), f"{url}x"):
        with pytest.raises(streams.Refused) as refused:
            connect(bad, (*BOTH, "error"))
        assert refused.value.status == 404


@pytest.mark.parametrize("politely", [False, True])
def test_a_client_that_leaves_does_not_end_the_process(
    kubelet: Kubelet, container: str, connect: Open, politely: bool
) -> None:
    wait = "until [ -e /go ]; do sleep 0.05; done"
    script = f"echo here; {wait}; head -c 200000 /dev/zero; touch /done"
    with connect(exec_url(kubelet, container, "sh", "-c", script), (*BOTH, "error")) as session:
        streams.until(session, "stdout", b"here\n")  # who leaves before has started nothing
        if politely:
            session.say_goodbye()
    kubelet.exec_sync(container, ["touch", "/go"])
    waiting.until(
        lambda: kubelet.exec_sync(container, ["test", "-e", "/done"]).exit_code == 0,
        "the process came to its end",
    )


# -- attach ----------------------------------------------------------------------------------------


def test_attached_clients_see_output_and_the_end(
    kubelet: Kubelet, pod: Pod, pulled: str, connect: Open
) -> None:
    script = "while read x; do echo got $x; [ $x = end ] && exit 0; done"
    container = kubelet.run(pod, pulled, ("sh", "-c", script), stdin=True)
    url, other = attach_url(kubelet, container, stdin=True), attach_url(kubelet, container)
    with (
        connect(url, ("stdin", *BOTH, "error")) as session,
        connect(other, (*BOTH, "error")) as watcher,
    ):
        session.send("stdin", b"one\n")
        streams.until(session, "stdout", b"got one\n")
        session.send("stdin", b"end\n")
        for each in (session, watcher):
            assert streams.exit_code(streams.ending(each)) == 0
    assert watcher.received["stdout"].endswith(b"got end\n")
    assert [line.text for line in kubelet.log(container)] == ["got one", "got end"]


def test_detaching_does_no_harm(kubelet: Kubelet, pod: Pod, pulled: str, connect: Open) -> None:
    script = "while read x; do echo got $x; done; echo ended"
    container = kubelet.run(pod, pulled, ("sh", "-c", script), stdin=True)
    for word in (b"one", b"two"):
        url = attach_url(kubelet, container, stdin=True)
        with connect(url, ("stdin", *BOTH, "error")) as session:
            session.send("stdin", word + b"\n")
            streams.until(session, "stdout", b"got " + word)
    assert [line.text for line in kubelet.log(container)] == ["got one", "got two"]


def test_stdin_once_ends_with_the_first_client(
    kubelet: Kubelet, pod: Pod, pulled: str, connect: Open
) -> None:
    script = ("sh", "-c", "cat; echo ended")
    container = kubelet.run(pod, pulled, script, stdin=True, stdin_once=True)
    with connect(attach_url(kubelet, container, stdin=True), ("stdin", *BOTH, "error")) as session:
        session.send("stdin", b"word\n")
        streams.until(session, "stdout", b"word\n")
    kubelet.wait_exit(container)
    assert [line.text for line in kubelet.log(container)] == ["word", "ended"]


@pytest.mark.parametrize(
    ("kind", "protocol"), [(streams.Spdy, streams.V4), (streams.WebSocket, "v5.channel.k8s.io")]
)
def test_stdin_once_ends_with_the_clients_half(
    kubelet: Kubelet, pod: Pod, pulled: str, kind: Open, protocol: str
) -> None:
    script = ("sh", "-c", "cat; echo ended")
    container = kubelet.run(pod, pulled, script, stdin=True, stdin_once=True)
    url = attach_url(kubelet, container, stdin=True)
    with kind(url, ("stdin", *BOTH, "error"), protocol) as session:
        session.send("stdin", b"word\n")
        session.finish("stdin")
        assert streams.exit_code(streams.ending(session)) == 0
    assert session.received["stdout"] == b"word\nended\n"


@pytest.mark.parametrize("half", [False, True])
def test_all_that_a_client_sent_before_it_left_is_read(
    kubelet: Kubelet, pod: Pod, pulled: str, *, half: bool
) -> None:
    """More than pipe and sockets hold, and read only after the client's end."""
    script = ("sh", "-c", "sleep 1; head -c 200000 | wc -c")
    container = kubelet.run(pod, pulled, script, stdin=True)
    url = attach_url(kubelet, container, stdin=True)
    with streams.Spdy(url, ("stdin", *BOTH, "error")) as session:
        session.send("stdin", bytes(200_000))
        if half:
            session.finish("stdin")
            assert streams.exit_code(streams.ending(session)) == 0
        else:  # not by a reset, with which kernels drop what is on its way
            session.connection.shutdown(socket.SHUT_WR)
            streams.ending(session)
    kubelet.wait_exit(container)
    assert [line.text for line in kubelet.log(container)] == ["200000"]


def test_the_end_of_a_stdin_that_the_container_has_not_ends_nothing(
    kubelet: Kubelet, pod: Pod, pulled: str
) -> None:
    """crictl attach -i without a terminal: its stdin ends at once."""
    script = ("sh", "-c", "while :; do echo here; sleep 0.05; done")
    container = kubelet.run(pod, pulled, script)
    url = attach_url(kubelet, container, stdin=True)
    with streams.Spdy(url, ("stdin", *BOTH, "error")) as session:
        session.finish("stdin")
        streams.until(session, "stdout", 10 * b"here\n")


SIZES = "while :; do stty size; sleep 0.05; done"


def test_an_attached_terminal_has_a_size_without_stdin(
    kubelet: Kubelet, pod: Pod, pulled: str, connect: Open
) -> None:
    container = kubelet.run(pod, pulled, ("sh", "-c", SIZES), tty=True)
    with connect(
        attach_url(kubelet, container, tty=True), ("stdout", "error", "resize")
    ) as session:
        session.send("resize", b'{"Width":120,"Height":33}')
        streams.until(session, "stdout", b"33 120")


@pytest.mark.parametrize("once", [False, True])
def test_a_terminal_is_left_at_the_end_of_the_clients_stdin(
    kubelet: Kubelet, pod: Pod, pulled: str, once: bool
) -> None:
    """As with containerd, which crictl's ctrl-p ctrl-q counts on. The container goes on."""
    config = kubelet.container_config(pulled, ("sh",), tty=True, stdin=True, stdin_once=once)
    container = kubelet.create(pod, config)
    kubelet.start(container)
    url = attach_url(kubelet, container, tty=True, stdin=True)
    with streams.Spdy(url, ("stdin", "stdout", "error", "resize")) as session:
        session.send("stdin", b"echo $((40 + 2))\n")
        streams.until(session, "stdout", b"42\r\n")
        session.finish("stdin")
        assert streams.exit_code(streams.ending(session)) == 0
    assert kubelet.status(container).state == api.ContainerState.CONTAINER_RUNNING
