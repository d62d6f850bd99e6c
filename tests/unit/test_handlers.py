# SPDX-License-Identifier: Apache-2.0
"""What a handler gives to containers that do not ask."""

from pathlib import Path
from typing import Any, Literal

import pytest

from cri_server import cgroups, config, handler_set, handlers, host, revisions, spec

SET = "[runtimes.x] privileged_without_host_devices"
DIALECT = "[runtimes.x] dialect"


def defaults(folder: Path, **settings: Any) -> spec.Defaults:
    """Return the defaults of a handler with these settings."""
    revision = revisions.make("x", config.Handler(path="/bin/true", **settings))
    facts = {revision.key: host.RuntimeFacts(path="/bin/true")}
    live = handlers.Handlers(
        config.Config(),
        facts=host.probe(cgroups.detect(), {}),
        now=handler_set.HandlerSet(current={"x": revision}, facts=facts),
        store=revisions.Store(folder),
    )
    return live.defaults(revision.key)


def test_what_a_handler_says_of_cgroups_is_given_with_its_key(tmp_path: Path) -> None:
    unified = {"memory.oom.group": "1"}
    found = defaults(tmp_path, cgroup_writable=True, default_unified=unified)
    assert (found.unified, found.unified_key) == (unified, "[runtimes.x] default_unified")
    assert found.cgroup_writable_key == "[runtimes.x] cgroup_writable"
    plain = defaults(tmp_path)
    assert (plain.unified, plain.unified_key, plain.cgroup_writable_key) == ({}, "", "")


@pytest.mark.parametrize(
    ("kind", "dialect", "asked", "key"),
    [
        ("oci", "runc", "", ""),
        ("oci", "runc", True, SET),
        ("oci", "runsc", "", DIALECT),
        ("shim", "kata", "", DIALECT),
        ("shim", "kata", True, SET),
        ("shim", "kata", False, ""),
        ("shim", "shim", "", ""),
    ],
)
def test_a_kernel_of_the_pods_own_gets_no_devices_of_the_host_unless_asked(
    tmp_path: Path, kind: str, dialect: str, asked: bool | Literal[""], key: str
) -> None:
    found = defaults(tmp_path, kind=kind, dialect=dialect, privileged_without_host_devices=asked)
    assert found.no_host_devices_key == key
