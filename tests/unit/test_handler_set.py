# SPDX-License-Identifier: Apache-2.0
"""The next set of handlers, from files, programs and the set before."""

import dataclasses
from pathlib import Path

import pytest

from cri_server import cgroups, config, errors, handler_set


@pytest.fixture
def settings(tmp_path: Path) -> config.Config:
    """Return settings with one handler, `base`, and an empty conf.d."""
    (tmp_path / "conf.d").mkdir()
    program(tmp_path / "program")
    text = f'[runtimes.base]\npath = "{tmp_path}/program"'
    (tmp_path / "config.toml").write_text(text)
    loaded = config.load(tmp_path / "config.toml")
    return dataclasses.replace(loaded, runtimes={"base": loaded.runtimes["base"]})


def program(path: Path, code: int = 0) -> Path:
    path.write_text(f"#!/bin/sh\necho runc version 1.2.3\nexit {code}\n")
    path.chmod(0o755)
    return path


def drop(settings: config.Config, name: str, *lines: str, file: str = "") -> Path:
    assert settings.drop_ins is not None
    path = settings.drop_ins / (file or f"{name}.toml")
    given = settings.drop_ins.parent / "program"
    path.write_text("\n".join([f"[runtimes.{name}]", f'path = "{given}"', *lines]))
    return path


def limits(found: handler_set.HandlerSet) -> dict[str, str]:
    return {name: r.handler.default_rlimits for name, r in found.current.items()}


async def test_a_drop_in_adds_a_handler_and_takes_the_place_of_one(
    settings: config.Config,
) -> None:
    drop(settings, "own", 'default_rlimits = "nofile=1"')
    drop(settings, "base", 'default_rlimits = "nofile=2"')

    found = await handler_set.load(settings)

    assert limits(found) == {"base": "nofile=2", "own": "nofile=1"}
    assert {n: r.source for n, r in found.current.items()} == {
        "base": "base.toml",
        "own": "own.toml",
    }
    assert {f.version for f in handler_set.named(found).values()} == {"1.2.3"}


async def test_the_same_settings_have_the_same_key(settings: config.Config) -> None:
    first = await handler_set.load(settings)
    path = drop(settings, "base")
    second = await handler_set.load(settings, first)
    path.unlink()
    drop(settings, "base", 'default_rlimits = "nofile=2"')
    third = await handler_set.load(settings, second)

    keys = [found.current["base"].key for found in (first, second, third)]
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.parametrize(
    "lines",
    [
        ["nonsense"],
        ["unknown = 1"],
        ['seccomp_profile = "/no/such"'],
        ['default_rlimits = "x"'],
        ['cni_conf_file = "../x.conf"'],
        ['snapshot_options = ["lowerdir=/etc"]'],
        ['snapshot_options = ["index=on", "index=off"]'],
        ['min_memory = "much"'],
        ["default_pids_limit = -1"],
        ['seccomp_audit = "yes"'],
        ['default_unified = { "memory.max" = "1" }'],
        ['default_unified = { "../memory.high" = "1" }'],
        ['default_unified = { "memory.high" = 1 }'],
    ],
)
async def test_what_is_wrong_holds_the_earlier_state(
    settings: config.Config, lines: list[str]
) -> None:
    drop(settings, "own", 'default_rlimits = "nofile=1"')
    before = await handler_set.load(settings)
    drop(settings, "own", *lines)

    after = await handler_set.load(settings, before)

    assert after.current == before.current
    assert len(after.problems) == 1
    assert "own.toml" in after.problems[0].message
    assert await handler_set.load(settings, after) == after


@pytest.mark.parametrize("mode", ["v1", "hybrid", "v2"])
@pytest.mark.parametrize(
    "line", ["cgroup_writable = true", 'default_unified = { "memory.high" = "1" }']
)
async def test_an_option_for_cgroup_v2_is_refused_without_it(
    settings: config.Config, monkeypatch: pytest.MonkeyPatch, mode: cgroups.Mode, line: str
) -> None:
    there = cgroups.Hierarchy(mode=mode, v1={}, unified=None)
    monkeypatch.setattr(cgroups, "detect", lambda: there)
    drop(settings, "own", line)

    found = await handler_set.load(settings)

    assert ("own" in found.current) == (mode == "v2")
    option = line.split()[0]
    told = [f"own.toml: [runtimes.own]: {option}: this host has no cgroup v2"]
    assert [p.message[-len(told[0]) :] for p in found.problems] == (told if mode != "v2" else [])


async def test_a_program_that_fails_holds_the_earlier_state(settings: config.Config) -> None:
    drop(settings, "own")
    before = await handler_set.load(settings)
    assert settings.drop_ins is not None
    program(settings.drop_ins.parent / "program", code=1)

    after = await handler_set.load(settings, before)

    assert after.current == before.current
    assert after.facts == before.facts
    assert [p.handler for p in after.problems] == ["own"]


@pytest.mark.parametrize("text", ["[runtimes.base]\nbroken", "[runtimes.base]\nunknown = 1"])
async def test_without_an_earlier_state_the_handler_is_refused(
    settings: config.Config, text: str
) -> None:
    drop(settings, "base").write_text(text)

    found = await handler_set.load(settings)

    assert found.current == {}
    with pytest.raises(errors.FailedPrecondition, match=r"base\.toml"):
        found.revision("base")
    with pytest.raises(errors.InvalidArgument, match="'other' is not configured"):
        found.revision("other")


async def test_a_file_that_is_being_written_counts_as_it_was(settings: config.Config) -> None:
    path = drop(settings, "own", 'default_rlimits = "nofile=1"')
    before = await handler_set.load(settings)
    path.write_text("")

    busy = await handler_set.load(settings, before, busy={"own.toml"})
    after = await handler_set.load(settings, before)

    assert busy.current == before.current
    assert busy.problems == ()
    assert list(after.current) == ["base"]


async def test_a_new_file_that_is_being_written_is_not_there(settings: config.Config) -> None:
    before = await handler_set.load(settings)
    drop(settings, "own", "half")

    found = await handler_set.load(settings, before, busy={"own.toml"})

    assert list(found.current) == ["base"]
    assert found.problems == ()


async def test_the_default_handler_stays(settings: config.Config) -> None:
    path = drop(settings, "own")
    settings = dataclasses.replace(settings, runtime=config.Runtime(default="own"))
    before = await handler_set.load(settings)
    path.unlink()

    after = await handler_set.load(settings, before)

    assert after.current == before.current
    assert "it is the default" in after.problems[0].message


async def test_there_is_no_start_without_the_default(settings: config.Config) -> None:
    settings = dataclasses.replace(settings, runtime=config.Runtime(default="runsc"))

    with pytest.raises(
        config.ConfigError, match=r"runtime\.default: no handler 'runsc' \(known: base\)"
    ):
        await handler_set.load(settings)


async def test_a_profile_of_the_configuration_file_must_be_there(settings: config.Config) -> None:
    handler = dataclasses.replace(settings.runtimes["base"], seccomp_profile="/no/such")
    settings = dataclasses.replace(settings, runtimes={"base": handler})

    with pytest.raises(config.ConfigError, match=r"\[runtimes\.base\]: seccomp_profile: .*No such"):
        await handler_set.load(settings)


async def test_differences_are_told(settings: config.Config) -> None:
    gone = drop(settings, "gone")
    drop(settings, "same")
    drop(settings, "other", 'default_rlimits = "nofile=1"')
    before = await handler_set.load(settings)
    gone.unlink()
    drop(settings, "other", 'default_rlimits = "nofile=2"')
    drop(settings, "new")

    after = await handler_set.load(settings, before)

    found = {name: what for what, name in handler_set.differences(before, after)}

    assert found == {
        "gone": "handler removed",
        "other": "handler changed",
        "new": "handler added",
    }
