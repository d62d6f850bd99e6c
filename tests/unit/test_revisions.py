# SPDX-License-Identifier: Apache-2.0
"""cri_server.revisions and handlers: what pods hold on to, in memory and on disk."""

import concurrent.futures
import dataclasses
import threading
from pathlib import Path

import pytest

from cri_server import cgroups, config, errors, handler_set, handlers, host, revisions

PLAIN = config.Handler(path="/bin/true", dialect="runc")
OTHER = dataclasses.replace(PLAIN, default_rlimits="nofile=5", options={"timeout": 3.0})


def made(**found: config.Handler) -> handler_set.HandlerSet:
    """Return the set of these handlers."""
    current = {name: revisions.make(name, handler) for name, handler in found.items()}
    facts = {r.key: host.RuntimeFacts(path=r.handler.path) for r in current.values()}
    return handler_set.HandlerSet(current=current, facts=facts)


def live(root: Path, now: handler_set.HandlerSet) -> handlers.Handlers:
    settings = config.Config(runtime=config.Runtime(default="runc"))
    facts = host.probe(cgroups.detect(), {})
    return handlers.Handlers(settings, facts=facts, now=now, store=revisions.Store(root))


def test_a_revision_is_read_as_it_was_written(tmp_path: Path) -> None:
    store = revisions.Store(tmp_path)
    profile = {"defaultAction": "SCMP_ACT_ALLOW"}
    revision = revisions.make("a.b", OTHER, source="a.toml", seccomp=profile)

    store.write(revision)
    store.write(revision)

    assert list(store.read()) == [revision]
    assert revisions.name_of(revision.key) == "a.b"
    store.forget(revision.key)
    store.forget(revision.key)
    assert list(store.read()) == []


def test_the_first_pods_of_a_handler_may_come_at_once(tmp_path: Path) -> None:
    store, at_once = revisions.Store(tmp_path), threading.Barrier(8)

    def write(revision: revisions.Revision) -> None:
        at_once.wait(timeout=60)
        store.write(revision)

    fresh = [revisions.make(f"number-{n}", PLAIN) for n in range(50)]
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        for revision in fresh:
            for written in [threads.submit(write, revision) for _ in range(8)]:
                written.result()

    assert store.keys() == {revision.key for revision in fresh}


def test_a_file_that_cannot_be_read_hides_no_other(tmp_path: Path) -> None:
    store = revisions.Store(tmp_path)
    store.write(revisions.make("a", PLAIN))
    (tmp_path / "handlers" / "b@1.json").write_text("{")
    (tmp_path / "handlers" / "c@1.json").write_text(
        '{"key": "c@1", "name": "c", "handler": {"path": "relative/path"}}'
    )

    assert [r.name for r in store.read()] == ["a"]


def test_the_key_follows_settings_and_profile_alone() -> None:
    keys = [
        revisions.make("a", PLAIN).key,
        revisions.make("a", PLAIN, source="x.toml").key,
        revisions.make("a", OTHER).key,
        revisions.make("a", PLAIN, seccomp={"defaultAction": "SCMP_ACT_LOG"}).key,
        revisions.make("b", PLAIN).key,
    ]

    assert keys[0] == keys[1]
    assert len(set(keys)) == 4


async def test_a_pod_finds_its_handler_after_a_change_and_a_removal(tmp_path: Path) -> None:
    found = live(tmp_path, made(runc=PLAIN, own=PLAIN))
    first = found.key("own")
    found.apply(made(runc=PLAIN, own=OTHER))
    second = found.key("own")
    found.apply(made(runc=PLAIN))

    assert (found.of(first), found.of(second)) == (PLAIN, OTHER)
    assert found.names == ("runc",)
    assert first in found.host_facts.runtimes
    with pytest.raises(errors.InvalidArgument, match=r"'own' is not configured \(known: runc\)"):
        found.key("own")
    assert found.of("own") == OTHER  # what is left of a container without a record
    assert found.of("") == PLAIN


async def test_what_was_kept_is_found_by_the_next_server_until_nobody_needs_it(
    tmp_path: Path,
) -> None:
    first = live(tmp_path, made(runc=PLAIN, own=OTHER))
    key = first.key("own")
    await first.keep(key)
    await first.keep(key)

    second = live(tmp_path, made(runc=PLAIN))
    await second.recall()
    assert second.of(key) == OTHER
    assert second.facts(key).machine
    await second.sweep({key})
    assert second.of(key) == OTHER
    (tmp_path / "handlers" / "broken@1.json").write_text("{")
    await second.sweep({"own"})  # a plain name of an earlier version holds no revision
    assert list((tmp_path / "handlers").iterdir()) == []

    third = live(tmp_path, made(runc=PLAIN))
    await third.recall()
    with pytest.raises(errors.InvalidArgument):
        third.of(key)


def test_the_default_is_found_by_no_name(tmp_path: Path) -> None:
    found = live(tmp_path, made(crun=OTHER, runc=PLAIN))

    assert found.key("") == found.key("runc") != found.key("crun")


def test_an_option_is_called_by_its_place(tmp_path: Path) -> None:
    revision = revisions.make("own", OTHER, source="x.toml")

    assert revision.label("default_rlimits") == "[runtimes.own] default_rlimits (x.toml)"
    assert revision.label("default_shm_size") == ""
