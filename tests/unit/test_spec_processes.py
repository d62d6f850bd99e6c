# SPDX-License-Identifier: Apache-2.0
"""The process of a container and of an exec."""

import dataclasses

import pytest

from cri_server import errors, spec
from cri_server.pb import api_pb2 as api
from tests.lab import wishes

IMAGE = spec.ImageConfig(entrypoint=("/entry",), cmd=("image-arg",))
PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def process(config: api.ContainerConfig, **changes: object) -> spec.oci.Process:
    return spec.container(wishes.given(config, **changes))["process"]


@pytest.mark.parametrize(
    ("command", "args", "image", "expected"),
    [
        ([], [], IMAGE, ["/entry", "image-arg"]),
        ([], ["a", "b"], IMAGE, ["/entry", "a", "b"]),
        (["/bin/sh"], [], IMAGE, ["/bin/sh"]),
        (["/bin/sh", "-c"], ["true"], IMAGE, ["/bin/sh", "-c", "true"]),
        ([], ["/only", "args"], spec.ImageConfig(), ["/only", "args"]),
        ([], [], spec.ImageConfig(cmd=("/cmd", "")), ["/cmd", ""]),
        ([], [], spec.ImageConfig(entrypoint=("",), cmd=("/cmd",)), ["/cmd"]),
        ([], ["/asked"], spec.ImageConfig(entrypoint=("",), cmd=("/cmd",)), ["/asked"]),
    ],
)
def test_command_replaces_entrypoint_and_cmd_and_args_replaces_cmd(
    command: list[str], args: list[str], image: spec.ImageConfig, expected: list[str]
) -> None:
    wish = wishes.container(command=command, args=args)
    assert process(wish, image=image)["args"] == expected


@pytest.mark.parametrize(
    ("command", "image"),
    [
        ([], spec.ImageConfig()),
        ([""], IMAGE),
        (["/bin/a\0b"], IMAGE),
        ([], spec.ImageConfig(cmd=("",))),
    ],
)
def test_a_container_without_a_usable_command_is_refused(
    command: list[str], image: spec.ImageConfig
) -> None:
    with pytest.raises(errors.InvalidArgument, match="command"):
        wishes.validate(wishes.container(command=command), image=image)


def test_the_environment_is_merged_and_each_name_is_there_once() -> None:
    image = spec.ImageConfig(
        cmd=("/x",), env=("A=image", "B=image", "PATH=/bin", "HOSTNAME=image", "C=", "D=x=y")
    )
    wish = wishes.container(
        envs=[
            api.KeyValue(key="B", value=b"first"),
            api.KeyValue(key="B", value="zweite ü".encode()),
            api.KeyValue(key="HOSTNAME", value=b"asked"),
        ]
    )
    user = spec.User(home="/home/me")
    assert process(wish, image=image, user=user)["env"] == [
        "PATH=/bin",
        "A=image",
        "B=zweite ü",
        "HOSTNAME=asked",
        "C=",
        "D=x=y",
        "HOME=/home/me",
    ]


def test_the_images_host_name_is_left_to_it() -> None:
    image = dataclasses.replace(IMAGE, env=("HOSTNAME=0.0.0.0",))
    assert "HOSTNAME=0.0.0.0" in process(wishes.container(), image=image)["env"]


def test_a_terminal_gets_a_term_unless_somebody_set_it() -> None:
    assert "TERM=xterm" in process(wishes.container(tty=True))["env"]
    image = dataclasses.replace(IMAGE, env=("TERM=vt100",))
    assert "TERM=vt100" in process(wishes.container(tty=True), image=image)["env"]
    assert process(wishes.container())["env"] == [PATH, "HOSTNAME=pod", "HOME=/"]


def test_an_image_variable_without_a_value_does_not_pull_in_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SECRET", "canary")
    image = spec.ImageConfig(cmd=("/x",), env=("SECRET", "*", "", "=x", "SEC*"))
    assert process(wishes.container(), image=image)["env"] == [PATH, "HOSTNAME=pod", "HOME=/"]


@pytest.mark.parametrize(
    ("key", "value"),
    [("", b"x"), ("A=B", b"x"), ("BINARY", b"\xff\xfe"), ("NUL", b"a\0b"), ("N\0", b"a")],
)
def test_a_variable_that_cannot_be_passed_on_is_refused_by_name(key: str, value: bytes) -> None:
    wish = wishes.container(envs=[api.KeyValue(key=key, value=value)])
    with pytest.raises(errors.InvalidArgument, match="envs"):
        wishes.validate(wish)


@pytest.mark.parametrize(
    ("asked", "image", "expected"),
    [
        ("", "", "/"),
        ("", "/srv", "/srv"),
        ("/asked", "/srv", "/asked"),
        ("/a//b/../c/", "", "/a/c"),
        ("//a", "", "/a"),
        ("/proc", "", "/proc"),
        ("/procedure/self", "", "/procedure/self"),
    ],
)
def test_the_working_directory_is_the_requests_then_the_images(
    asked: str, image: str, expected: str
) -> None:
    config = spec.ImageConfig(cmd=("/x",), working_dir=image)
    assert process(wishes.container(working_dir=asked), image=config)["cwd"] == expected


@pytest.mark.parametrize(
    "path",
    [
        "relative",
        "/proc/self/fd/7",
        "/x/../proc/self/fd/8/",
        "/proc/1/cwd",
        "/proc/thread-self",
        "/a\0",
    ],
)
def test_a_working_directory_that_may_lead_to_the_host_is_refused(path: str) -> None:
    with pytest.raises(errors.InvalidArgument, match="working_dir"):
        wishes.validate(wishes.container(working_dir=path))
    image = spec.ImageConfig(cmd=("/x",), working_dir=path)
    with pytest.raises(errors.InvalidArgument, match=r"WORKDIR|working_dir"):
        wishes.validate(wishes.container(), image=image)


def test_limits_are_explicit_and_no_higher_than_the_host_lets_us_set() -> None:
    assert process(wishes.container())["rlimits"] == [
        {"type": "RLIMIT_NOFILE", "soft": 1024, "hard": 524288}
    ]
    low = dataclasses.replace(wishes.FACTS, rlimit_ceilings={"RLIMIT_NOFILE": 512})
    assert process(wishes.container(), host=low)["rlimits"] == [
        {"type": "RLIMIT_NOFILE", "soft": 512, "hard": 512}
    ]


def test_the_user_and_the_umask_are_numbers() -> None:
    user = spec.User(uid=1000, gid=2000, additional_gids=(2000, 3000))
    assert process(wishes.container(), user=user)["user"] == {
        "uid": 1000,
        "gid": 2000,
        "umask": 0o022,
        "additionalGids": [2000, 3000],
    }


def test_an_exec_is_the_containers_process_with_another_command() -> None:
    container = process(
        wishes.container(security=wishes.security(no_new_privs=True), working_dir="/srv")
    )
    before = dict(container)
    done = spec.process(spec.ExecInput(process=container, cmd=("id", "-u"), tty=True))
    assert done == before | {
        "args": ["id", "-u"],
        "terminal": True,
        "env": [*container["env"], "TERM=xterm"],
    }
    assert container == before
    again = spec.process(spec.ExecInput(process=done, cmd=("id",), tty=True))
    assert again["env"].count("TERM=xterm") == 1
    assert spec.process(spec.ExecInput(process=container, cmd=("id",)))["terminal"] is False


@pytest.mark.parametrize("cmd", [(), ("",), ("a\0",)])
def test_an_exec_without_a_usable_command_is_refused(cmd: tuple[str, ...]) -> None:
    with pytest.raises(errors.InvalidArgument, match="cmd"):
        spec.process(spec.ExecInput(process={}, cmd=cmd))
