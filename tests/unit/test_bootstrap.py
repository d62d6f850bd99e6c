# SPDX-License-Identifier: Apache-2.0
"""shim.runtimes.bootstrap, shimoptions and shim.binary: what is said to a shim, and what it says.

With real shims: tests/contract/test_shim.py, tests/integration/test_fake_shim.py.
"""

import json
import os
import tomllib
from pathlib import Path

import pytest
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError

from shim import binary, errors
from shim.pb.containerd import bootstrap_pb2, runc_options_pb2, runtime_options_pb2
from shim.runtimes import bootstrap, shimoptions

RESULT = bootstrap_pb2.BootstrapResult(version=3, address="unix:///run/x", protocol="ttrpc")


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        (b"unix:///run/containerd/s/1\n", (2, "unix:///run/containerd/s/1", "ttrpc")),
        (b"/containerd-shim/abc.sock", (2, "/containerd-shim/abc.sock", "ttrpc")),
        (
            b'{"version": 3, "address": "unix:///run/x", "protocol": "ttrpc"}',
            (3, "unix:///run/x", "ttrpc"),
        ),
        (b'{"version": 4, "address": "x", "protocol": "grpc"}', (4, "x", "grpc")),
        (RESULT.SerializeToString(), (3, "unix:///run/x", "ttrpc")),
    ],
)
def test_every_kind_of_answer_is_read(said: bytes, answer: tuple[int, str, str]) -> None:
    assert bootstrap.read_answer(said) == answer


@pytest.mark.parametrize(
    "said",
    [b"", b"\xff\xfe", b"{}", b"panic: no KVM", b'{"version": "x"}', b"[" * 9999, b"\x0a\xff"],
)
def test_garbage_has_no_address(said: bytes) -> None:
    _, address, _ = bootstrap.read_answer(said)
    assert not address.startswith(("/", "unix:"))


def test_what_the_sandbox_api_wants_is_in_config_json(tmp_path: Path) -> None:
    spec = {
        "annotations": {"a": "b"},
        "linux": {"namespaces": [{"type": "pid"}, {"type": "network", "path": "/run/netns/x"}]},
    }
    (tmp_path / "config.json").write_text(json.dumps(spec))
    told = bootstrap.of_sandbox(os.fspath(tmp_path))
    assert told == {"netns_path": "/run/netns/x", "annotations": {"a": "b"}}


def test_runcs_shim_gets_runcs_options() -> None:
    options = {
        "dialect": "runc", "cgroup_driver": "systemd", "timeout": "5",
        "shim.BinaryName": "crun", "shim.NoPivotRoot": "true", "shim.IoUid": "7",
    }  # fmt: skip
    packed = shimoptions.packed(options, state="/state", owner=(100, 200))
    assert packed is not None
    assert packed.type_url == "containerd.runc.v1.Options"
    assert runc_options_pb2.Options.FromString(packed.value) == runc_options_pb2.Options(
        root="/state",
        systemd_cgroup=True,
        binary_name="crun",
        no_pivot_root=True,
        io_uid=7,
        io_gid=200,
    )


def test_kata_gets_the_path_of_its_configuration() -> None:
    options = {"dialect": "kata", "shim.ConfigPath": "/etc/kata.toml", "shim.ConfigBody": "x"}
    packed = shimoptions.packed(options, state="/state")
    assert packed is not None
    assert packed.type_url == "runtimeoptions.v1.Options"
    assert runtime_options_pb2.Options.FromString(packed.value) == runtime_options_pb2.Options(
        config_path="/etc/kata.toml", config_body=b"x"
    )


@pytest.mark.parametrize(
    ("dialect", "driver"), [("kata", "systemd"), ("runsc", "systemd"), ("shim", "cgroupfs")]
)
def test_without_options_a_shim_gets_none(dialect: str, driver: str) -> None:
    options = {"dialect": dialect, "cgroup_driver": driver, "timeout": "5"}
    assert shimoptions.packed(options, state="/state") is None


def generic(**options: str) -> runtime_options_pb2.Options:
    """Return what a shim that is not runc's gets."""
    packed = shimoptions.packed(options, state="/state")
    assert packed is not None
    return runtime_options_pb2.Options.FromString(packed.value)


def test_a_shim_of_runwasi_is_told_that_cgroups_are_systemds() -> None:
    told = generic(dialect="shim", cgroup_driver="systemd")
    assert tomllib.loads(told.config_body.decode()) == {"SystemdCgroup": True}


@pytest.mark.parametrize("key", ["ConfigPath", "ConfigBody"])
def test_who_configures_a_shim_says_all_of_it(key: str) -> None:
    told = generic(dialect="shim", cgroup_driver="systemd", **{f"shim.{key}": "/own"})
    assert told in (
        runtime_options_pb2.Options(config_path="/own"),
        runtime_options_pb2.Options(config_body=b"/own"),
    )


@pytest.mark.parametrize(
    ("more", "type_url"),
    [({}, "io.containerd.runsc.v1.options"), ({"shim.TypeUrl": "own"}, "own")],
)
def test_the_file_of_runscs_shim_has_a_format(more: dict[str, str], type_url: str) -> None:
    told = generic(dialect="runsc", **{"shim.ConfigPath": "/etc/runsc.toml"}, **more)
    assert told == runtime_options_pb2.Options(type_url=type_url, config_path="/etc/runsc.toml")


def test_a_cgroup_of_the_shim_is_told_at_start() -> None:
    options = {"dialect": "runc", "shim.BinaryName": "crun"}
    assert not shimoptions.at_start(options)
    assert shimoptions.at_start({**options, "shim.ShimCgroup": "/shims"})


def test_options_at_start_are_no_bootstrap_params() -> None:
    packed = shimoptions.packed({"dialect": "runc", "shim.ShimCgroup": "/shims"}, state="/state")
    assert packed is not None
    bootstrap_pb2.BootstrapParams.FromString(packed.SerializeToString())  # of itself they could be
    said = bootstrap.old_stdin(packed)
    with pytest.raises(DecodeError):
        bootstrap_pb2.BootstrapParams.FromString(said)
    options = runc_options_pb2.Options.FromString(any_pb2.Any.FromString(said).value)
    assert options.shim_cgroup == "/shims"
    assert bootstrap.old_stdin(None) == b""


def test_a_shim_is_told_one_socket_for_containerd() -> None:
    told = binary.argv("/bin/shim", "/home", "start", wanted="id", directory="/bundle")
    assert told[told.index("-address") + 1] == "/home/grpc"
    assert binary.environment("/home")["GRPC_ADDRESS"] == "/home/grpc"


@pytest.mark.parametrize("option", ["shim.Rot", "shim.IoUid"])
def test_an_option_that_does_not_fit_is_named(option: str) -> None:
    with pytest.raises(errors.InvalidArgument, match=option.removeprefix("shim.")):
        shimoptions.packed({"dialect": "runc", option: "x"}, state="/state")


def test_a_home_is_held_as_long_as_its_owner_lives(tmp_path: Path) -> None:
    home = os.fspath(tmp_path / "pod")
    assert not binary.is_held(home)
    fd = binary.make(home)
    assert binary.is_held(home)
    os.close(fd)
    assert not binary.is_held(home)


def test_a_container_is_noted_until_it_is_forgotten(tmp_path: Path) -> None:
    home, bundle = os.fspath(tmp_path / "pod"), tmp_path / "bundles" / "sandbox"
    bundle.mkdir(parents=True)
    os.close(binary.make(home))
    binary.note(home, "c1", os.fspath(bundle))
    assert binary.noted(home) == {"c1": os.fspath(bundle)}
    assert (bundle.parent / "c1").resolve() == bundle  # where runc's `delete` looks
    binary.forget(home, "c1")
    binary.forget(home, "c1")
    assert binary.noted(home) == {}
