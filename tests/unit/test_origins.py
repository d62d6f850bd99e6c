# SPDX-License-Identifier: Apache-2.0
"""Each part of a config.json has an origin, and it is the right one."""

import contextlib
import dataclasses
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from cri_server import errors, origins, rootfs, spec
from cri_server.pb import api_pb2 as api
from cri_server.spec import why
from tests.lab import wishes

_Mode, _Profile = api.NamespaceMode, api.SecurityProfile
IMAGE = spec.ImageConfig(
    user="app:staff",
    env=("PATH=/bin", "LANG=C", "BROKEN"),
    entrypoint=("/entry",),
    cmd=("a", "b"),
    working_dir="/srv",
)
POOR = wishes.facts(
    capabilities=frozenset({"CAP_CHOWN", "CAP_KILL"}),
    cgroup_v2=False,
    oom_score_adj_floor=-500,
    swap_accounting=False,
    hugepage_sizes=frozenset(),
    rlimit_ceilings={"RLIMIT_NOFILE": 4096},
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the root of an image with a few users."""
    top = tmp_path_factory.mktemp("root")
    (top / "etc").mkdir()
    (top / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\napp:x:7:8::/srv:/bin/sh\n")
    (top / "etc/group").write_text("root:x:0:\nstaff:x:50:app\nother:x:51:app\n")
    return str(top)


def explained(given: spec.ContainerInput, root: str) -> dict[str, origins.Row]:
    """Return the rows of what the server would make of `given`."""
    with why.recorded() as found:
        user = rootfs.resolve_user(root, spec.user_request(given.config, given.image))
        spec.pid_mode(given.config, given.sandbox)
        document = spec.container(dataclasses.replace(given, user=user))
    return {row.part: row for row in origins.rows(document, found)}


def last(rows: Mapping[str, origins.Row], part: str) -> tuple[str, str]:
    """Return source and field of the decision that holds."""
    return rows[part].notes[-1][:2]


# -- completeness ----------------------------------------------------------------------------------

_some = st.lists
_context = st.fixed_dictionaries(
    {},
    optional={
        "privileged": st.booleans(),
        "run_as_user": st.integers(0, 2000),
        "run_as_username": st.sampled_from(["", "app", "7"]),
        "supplemental_groups": _some(st.integers(0, 99), max_size=3),
        "readonly_rootfs": st.booleans(),
        "no_new_privs": st.booleans(),
        "masked_paths": _some(st.sampled_from(["/proc/kcore", "/proc/keys"])),
        "readonly_paths": _some(st.sampled_from(["/proc/sys", "/proc/bus"])),
        "seccomp": st.sampled_from([_Profile(), _Profile(profile_type=_Profile.Unconfined)]),
        "apparmor": st.sampled_from([_Profile(), _Profile(profile_type=_Profile.Unconfined)]),
        "capabilities": st.builds(
            api.Capability,
            add_capabilities=_some(st.sampled_from(["ALL", "CHOWN", "CAP_KILL"])),
            drop_capabilities=_some(st.sampled_from(["ALL", "SYS_TIME", "CAP_CHOWN"])),
            add_ambient_capabilities=_some(st.sampled_from(["KILL"])),
        ),
        "namespace_options": st.builds(
            api.NamespaceOption, pid=st.sampled_from([_Mode.POD, _Mode.CONTAINER])
        ),
    },
)
_resources = st.builds(
    api.LinuxContainerResources,
    cpu_shares=st.sampled_from([0, 2, 1024]),
    cpu_quota=st.sampled_from([0, -1, 5000]),
    cpu_period=st.sampled_from([0, 100000]),
    memory_limit_in_bytes=st.sampled_from([0, -1, 1 << 20]),
    memory_swap_limit_in_bytes=st.sampled_from([0, 1 << 20, 1 << 21]),
    oom_score_adj=st.integers(-1000, 1000),
    cpuset_cpus=st.sampled_from(["", "0-1"]),
    cpuset_mems=st.sampled_from(["", "0"]),
    hugepage_limits=_some(st.builds(api.HugepageLimit, page_size=st.sampled_from(["2MB", "1GB"]))),
    unified=st.sampled_from([{}, {"memory.high": "max"}]),
)
_mounts = st.builds(
    api.Mount,
    container_path=st.sampled_from(["/data", "/dev", "/dev/shm", "/etc/hosts", "/sys"]),
    host_path=st.sampled_from(["/srv/a", "/srv/b"]),
    propagation=st.sampled_from(list(api.MountPropagation.values())),
    readonly=st.booleans(),
)
_envs = st.builds(api.KeyValue, key=st.sampled_from(["PATH", "HOME", "X"]), value=st.just(b"1"))
_images = st.builds(
    spec.ImageConfig,
    user=st.sampled_from(["", "app", "1:2", "app:staff"]),
    env=st.sampled_from([(), ("PATH=/bin", "NOTHING", "=x"), ("TERM=vt100", "HOME=/h")]),
    entrypoint=st.sampled_from([(), ("/entry",)]),
    cmd=st.just(("/cmd", "x")),
    working_dir=st.sampled_from(["", "/srv"]),
)
_DEVICE = spec.DeviceNode(path="/dev/x", kind="c", major=1, minor=3)


@st.composite
def inputs(draw: st.DrawFn) -> spec.ContainerInput:
    """Make any container that a kubelet could ask for."""
    config = wishes.container(
        security=wishes.security(**draw(_context)),
        resources=draw(_resources),
        mounts=draw(_some(_mounts, max_size=4)),
        envs=draw(_some(_envs, max_size=3)),
        command=draw(st.sampled_from([[], ["/run", "it"]])),
        args=draw(st.sampled_from([[], ["--now"]])),
        tty=draw(st.booleans()),
        working_dir=draw(st.sampled_from(["", "/w"])),
    )
    frame = api.LinuxSandboxSecurityContext(privileged=True)
    pid = draw(st.sampled_from([_Mode.POD, _Mode.CONTAINER, _Mode.NODE]))
    parent = draw(st.sampled_from(["", "/kubepods/p1"]))
    return wishes.given(
        config,
        sandbox=wishes.pod(security=frame, options={"pid": pid}, cgroup_parent=parent),
        image=draw(_images),
        host=draw(st.sampled_from([wishes.FACTS, POOR])),
        namespaces=draw(st.sampled_from([{}, {"pid": "", "network": "/n", "user": "/u"}])),
        devices=draw(st.sampled_from([(), (_DEVICE,)])),
        host_devices=(_DEVICE,),
        pod_files=spec.PodFiles(resolv_conf="/r", hostname="/n", hosts="/h", shm="/s"),
        hostname=draw(st.sampled_from(["", "pod"])),
    )


@hypothesis.settings(max_examples=150, deadline=None, derandomize=True)
@hypothesis.given(inputs())
def test_no_part_of_a_config_json_is_without_an_origin(
    root: str, given: spec.ContainerInput
) -> None:
    with contextlib.suppress(errors.InvalidArgument):  # what is refused has no config.json
        assert [row.part for row in explained(given, root).values() if not row.notes] == []


def test_no_part_of_an_inits_config_json_is_without_an_origin() -> None:
    wanted = spec.SandboxInput(
        id="p1",
        config=wishes.pod(),
        rootfs="/r",
        init="/usr/bin/catatonit",
        namespaces={"network": "/n", "ipc": "/i", "uts": "/u"},
        cgroups_path="/c",
        host=POOR,
    )
    assert unexplained(wanted) == []
    config = wishes.pod(sysctls={"net/core/somaxconn": "1"})
    files = spec.PodFiles(resolv_conf="/r", shm="/s")
    machine = dataclasses.replace(wanted, config=config, init="", machine=True, pod_files=files)
    assert unexplained(machine) == []


def unexplained(wanted: spec.SandboxInput) -> list[str]:
    """Return the parts of the config.json that have no origin."""
    with why.recorded() as found:
        document = spec.sandbox(wanted)
    return [r.part for r in origins.rows(document, found) if not r.notes]


def test_a_part_that_nobody_explains_is_seen() -> None:
    with why.recorded() as found:
        document = spec.container(wishes.given())
    strange: dict[str, Any] = {**document, "hooks": {"prestart": [{"path": "/x"}]}}
    unsaid = [r.part for r in origins.rows(strange, found) if not r.notes]
    assert "hooks.prestart[0]" in unsaid


# -- the right ones --------------------------------------------------------------------------------


def test_the_origin_is_who_had_the_last_word(root: str) -> None:
    wish = wishes.container(
        args=["serve"],
        envs=[api.KeyValue(key="LANG", value=b"de")],
        security=wishes.security(
            run_as_user=5,
            capabilities=api.Capability(add_capabilities=["SYS_TIME"], drop_capabilities=["KILL"]),
        ),
        mounts=[api.Mount(container_path="/dev/shm", host_path="/srv")],
    )
    rows = explained(wishes.given(wish, image=IMAGE), root)
    assert {part: last(rows, part) for part in (
        "process.args[0]", "process.args[1]", "process.cwd", "process.env[PATH]",
        "process.env[LANG]", "process.user.uid", "process.capabilities[CAP_SYS_TIME]",
        "process.capabilities[CAP_CHOWN]", "mounts[/dev/shm]", "mounts[/proc]",
        "linux.seccomp", "annotations[io.kubernetes.cri.sandbox-id]",
    )} == {
        "process.args[0]": ("image", "config.Entrypoint[0]"),
        "process.args[1]": ("cri", "args[0]"),
        "process.cwd": ("image", "config.WorkingDir"),
        "process.env[PATH]": ("image", "config.Env[0]"),
        "process.env[LANG]": ("cri", "envs[0]"),
        "process.user.uid": ("cri", "linux.security_context.run_as_user"),
        "process.capabilities[CAP_SYS_TIME]": (
            "cri", "linux.security_context.capabilities.add_capabilities"),
        "process.capabilities[CAP_CHOWN]": ("default", ""),
        "mounts[/dev/shm]": ("cri", "mounts[0]"),
        "mounts[/proc]": ("default", ""),
        "linux.seccomp": ("default", ""),
        "annotations[io.kubernetes.cri.sandbox-id]": ("default", ""),
    }  # fmt: skip
    assert [n.source for n in rows["process.env[LANG]"].notes] == ["image", "cri"]


def test_what_was_left_out_says_why(root: str) -> None:
    wish = wishes.container(
        security=wishes.security(capabilities=api.Capability(drop_capabilities=["KILL"])),
        mounts=[api.Mount(container_path="/dev", host_path="/dev")],
    )
    rows = explained(wishes.given(wish, image=IMAGE), root)
    absent = {
        "process.capabilities[CAP_KILL]": "dropped",
        "mounts[/dev/pts]": "left out: /dev is mounted over",
        "process.env[BROKEN]": "dropped: it is not NAME=VALUE",
        "linux.seccomp": "unconfined, as no profile is asked for",
    }
    assert {p: (rows[p].present, rows[p].notes[-1].because) for p in absent} == {
        p: (False, because) for p, because in absent.items()
    }


def test_what_was_asked_for_and_not_given_is_kept(root: str) -> None:
    wish = wishes.container(
        resources=api.LinuxContainerResources(
            oom_score_adj=-999,
            memory_limit_in_bytes=1 << 20,
            memory_swap_limit_in_bytes=1 << 21,
            hugepage_limits=[api.HugepageLimit(page_size="2MB", limit=0)],
        ),
        security=wishes.security(
            privileged=True, masked_paths=["/proc/keys"], seccomp=_Profile(), apparmor=_Profile()
        ),
    )
    pod = wishes.pod(security=api.LinuxSandboxSecurityContext(privileged=True))
    rows = explained(wishes.given(wish, sandbox=pod, image=IMAGE, host=POOR), root)
    asked = {p: r.notes[-1].asked for p, r in rows.items() if r.notes[-1].asked}
    refused = {p: asked.pop(p) for p in list(asked) if p.startswith("process.capabilities[")}
    assert asked == {
        "process.oomScoreAdj": "-999",
        "linux.resources.memory.swap": "2097152",
        "linux.resources.hugepageLimits[2MB]": "0",
        "linux.maskedPaths": "/proc/keys",
        "linux.seccomp": "RuntimeDefault",
        "process.apparmorProfile": "RuntimeDefault",
        "process.rlimits[RLIMIT_NOFILE]": "524288",
        "process.env[BROKEN]": "BROKEN",
    }
    assert len(refused) == len(spec.CAPABILITIES) - len(POOR.capabilities)


# -- the recording ---------------------------------------------------------------------------------


def test_notes_go_to_the_recording_of_the_running_context_alone() -> None:
    why.default("ociVersion", "to nobody")
    with why.recorded() as outer:
        with why.recorded() as inner:
            why.default("process.cwd", "inner")
        thread = threading.Thread(target=why.default, args=("process.args", "of a stranger"))
        thread.start()
        thread.join()
        why.default("process.env", "outer")
    assert (list(outer), list(inner)) == (["process.env"], ["process.cwd"])


def test_a_file_of_notes_is_read_as_it_was_written(tmp_path: Path) -> None:
    with why.recorded() as found:
        spec.container(wishes.given(image=IMAGE))
    origins.write(tmp_path, found)
    assert origins.read(tmp_path) == found
    assert [p.name for p in tmp_path.iterdir()] == [origins.FILE]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1}', '{"a": [["martian", "", "", ""]]}'])
def test_a_file_that_holds_no_notes_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / origins.FILE).write_text(text)
    with pytest.raises(ValueError, match=r"."):
        origins.read(tmp_path)


def test_notes_of_updated_parts_replace_the_earlier_ones(tmp_path: Path) -> None:
    early = {"a": [why.Note("cri", "x", "", "")], "b": [why.Note("default", "", "ours", "")]}
    origins.amend(tmp_path, early, "as updated")  # nothing to amend
    assert not (tmp_path / origins.FILE).exists()
    origins.write(tmp_path, early)
    origins.amend(tmp_path, {"a": [why.Note("host", "", "", "9")]}, "as updated")
    assert origins.read(tmp_path) == early | {"a": [why.Note("host", "", "as updated", "9")]}


def test_what_the_host_lowered_is_told_with_what_was_asked(root: str) -> None:
    wish = wishes.container(resources=api.LinuxContainerResources(oom_score_adj=-900))
    with why.recorded() as found:
        spec.container(wishes.given(wish, host=POOR))
    lowered = origins.lowered(found)
    assert lowered["process.oomScoreAdj"] == "-900"
    assert lowered["process.rlimits[RLIMIT_NOFILE]"] == "524288"
    assert "process.cwd" not in lowered
