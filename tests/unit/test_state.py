# SPDX-License-Identifier: Apache-2.0
"""Records: what is written is what is read, and a broken file harms nobody."""

import dataclasses
import json
import shutil
import time
from pathlib import Path

import pytest
from google.protobuf import json_format

from cri_server import errors, state
from cri_server.pb import api_pb2 as api


def pod(name: str = "a", **more: object) -> state.Pod:
    metadata = api.PodSandboxMetadata(name=name, namespace="n", uid="u", attempt=1)
    config = api.PodSandboxConfig(metadata=metadata, labels={"x": "ü"}, annotations={"k": "v\n"})
    made = state.new_pod(config, runtime_handler="", handler="runc", now=7)
    return dataclasses.replace(made, **more)  # type: ignore[arg-type]


def container(of: state.Pod, number: int = 1) -> state.Container:
    config = api.ContainerConfig(
        metadata=api.ContainerMetadata(name=f"c{number}", attempt=2),
        envs=[api.KeyValue(key="BYTES", value=b"\xff\x00")],
    )
    return state.Container(
        id=f"{number:064x}",
        pod_id=of.id,
        handler="runc",
        config=config,
        raw=state.raw_config(config),
        created_at=number,
        boot_id="b",
        image_id="sha256:1",
        image_ref="r@sha256:2",
        image_name="r:1",
        layers=("l1", "l2"),
        log_path="/l/0.log",
        stop_signal=15,
        groups=(1, 2),
    )


@pytest.fixture
def store(tmp_path: Path) -> state.Store:
    made = state.Store(tmp_path)
    made.load()
    return made


async def test_records_survive_a_restart(store: state.Store, tmp_path: Path) -> None:
    ready = pod(state=state.PodState.READY, ips=("10.0.0.1", "fd00::1"), network={"ips": [{}]})
    await store.put_pod(ready)
    await store.put_container(container(ready))

    again = state.Store(tmp_path)
    again.load()

    assert again.pod(ready.id) == ready
    assert again.containers(ready.id) == [container(ready)]
    assert again.pod(ready.id).state is state.PodState.READY


async def test_environment_keeps_any_bytes(store: state.Store, tmp_path: Path) -> None:
    owner = await store.put_pod(pod())
    await store.put_container(container(owner))
    again = state.Store(tmp_path)
    again.load()
    assert again.containers()[0].config.envs[0].value == b"\xff\x00"


def test_enums_are_stored_as_numbers_and_read_as_either() -> None:
    config = api.ContainerConfig(stop_signal=api.Signal.SIGUSR1)
    stored = state.raw_config(config)
    assert json.loads(stored) == {"stop_signal": api.Signal.SIGUSR1}
    for text in (stored, b'{"stop_signal": "SIGUSR1"}'):  # as earlier versions wrote it
        assert json_format.Parse(text, api.ContainerConfig()) == config


async def test_a_broken_record_is_set_aside(store: state.Store, tmp_path: Path) -> None:
    good = await store.put_pod(pod())
    (tmp_path / "pods/bad.json").write_text('{"version": 1, "config"')
    (tmp_path / "pods/old.json").write_text('{"version": 0, "config": {}}')
    text = (tmp_path / f"pods/{good.id}.json").read_text()
    (tmp_path / "pods/copy.json").write_text(text)
    (tmp_path / "pods/types.json").write_text(
        text.replace(good.id, "types").replace('"created_at":', '"created_at":"x","was":')
    )
    spoilt = f'"created_at":{2**64 - 1},"was":'
    spoilt = text.replace(good.id, "digit").replace('"created_at":', spoilt)
    (tmp_path / "pods/digit.json").write_text(spoilt)
    (tmp_path / "pods/deep.json").write_text("[" * 100_000)
    (tmp_path / "pods/folder.json").mkdir()
    (tmp_path / "pods/half.tmp").write_text("{")

    again = state.Store(tmp_path)
    again.load()

    assert [p.id for p in again.pods()] == [good.id]
    left = sorted(p.name for p in (tmp_path / "pods").iterdir())
    broken = {"bad", "old", "copy", "types", "digit", "deep", "folder"}
    assert left == sorted([*(f"{name}.broken" for name in broken), f"{good.id}.json"])
    assert again.unreadable == broken


async def test_what_cannot_be_set_aside_keeps_nobody_from_starting(
    store: state.Store, tmp_path: Path
) -> None:
    good = await store.put_pod(pod())
    (tmp_path / "pods/bad.json").write_text("{")
    (tmp_path / "pods/bad.broken/in the way").mkdir(parents=True)
    (tmp_path / "pods/folder.tmp").mkdir()
    again = state.Store(tmp_path)
    again.load()
    assert [p.id for p in again.pods()] == [good.id]
    assert again.unreadable == {"bad"}


@pytest.mark.parametrize("folder", ["pods", "containers"])
async def test_a_record_of_a_later_version_stays_as_it_is(
    store: state.Store, tmp_path: Path, folder: str
) -> None:
    owner = await store.put_pod(pod())
    await store.put_container(container(owner))
    (file,) = (tmp_path / folder).iterdir()
    later = file.read_text().replace('"version":1', '"version":2')
    file.write_text(later)
    with pytest.raises(state.Newer, match=rf"{file} is a record of version 2, .* knows 1"):
        state.Store(tmp_path).load()
    assert file.read_text() == later


async def test_a_newer_attempt_is_younger_whatever_the_clock_says(store: state.Store) -> None:
    future = time.time_ns() + 3_600_000_000_000
    first = await store.put_pod(pod(created_at=future))
    await store.put_container(dataclasses.replace(container(first), created_at=future))
    assert store.pod_time(first.config.metadata) == future + 1
    assert store.container_time(first.id, "c1") == future + 1
    for other in (pod("b").config.metadata, api.PodSandboxMetadata()):
        assert store.pod_time(other) < future
    assert store.container_time(first.id, "other") < future


def test_no_container_ends_before_it_began() -> None:
    running = dataclasses.replace(container(pod()), started_at=50)
    assert state.end(running, 40) == 50
    assert state.end(running, 60) == 60
    assert time.time_ns() - state.end(running, 0) < 60_000_000_000


async def test_an_end_is_believed_without_a_disk(store: state.Store, tmp_path: Path) -> None:
    made = await store.put_pod(pod())
    inside = await store.put_container(container(made))
    for folder in ("pods", "containers"):
        shutil.rmtree(tmp_path / folder)
    with pytest.raises(OSError, match="No such file"):
        await store.put_pod(made)
    await store.note_pod(dataclasses.replace(made, stopped_at=5))
    await store.note_container(dataclasses.replace(inside, finished_at=6))
    assert store.pod(made.id).stopped_at == 5
    assert store.container(inside.id).finished_at == 6


async def test_unknown_fields_of_a_newer_server_are_ignored(
    store: state.Store, tmp_path: Path
) -> None:
    made = await store.put_pod(pod())
    path = tmp_path / f"pods/{made.id}.json"
    path.write_text(path.read_text()[:-1] + ', "invented": 1}')
    again = state.Store(tmp_path)
    again.load()
    assert again.pod(made.id) == made


async def test_ids_are_found_by_unique_prefix_only(store: state.Store) -> None:
    first = await store.put_pod(pod("a", id="ab" + "0" * 62))
    await store.put_pod(pod("b", id="ac" + "0" * 62))
    assert store.pod("ab") == first
    with pytest.raises(errors.InvalidArgument, match="ambiguous"):
        store.pod("a")
    for wanted in ("", "ad", "../etc", "a\0b", "x\ny"):
        with pytest.raises(errors.NotFound):
            store.pod(wanted)


async def test_forgetting_twice_is_fine(store: state.Store) -> None:
    made = await store.put_pod(pod())
    inside = await store.put_container(container(made))
    for _ in range(2):
        await store.forget_container(inside)
        await store.forget_pod(made.id)
    assert (store.pods(), store.containers()) == ([], [])


def test_state_follows_from_what_happened() -> None:
    created = container(pod())
    running = dataclasses.replace(created, started_at=1)
    exited = dataclasses.replace(running, finished_at=2)
    assert created.state == api.ContainerState.CONTAINER_CREATED
    assert running.state == api.ContainerState.CONTAINER_RUNNING
    assert exited.state == api.ContainerState.CONTAINER_EXITED
