# SPDX-License-Identifier: Apache-2.0
"""What a sandbox is made of, and who decided that."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from cri_server import cgroups, inventory, origins, podfiles, spec, state
from cri_server.pb import api_pb2 as api
from cri_server.spec import why
from tests.lab import wishes

HOST = dataclasses.replace(wishes.FACTS, selinux=spec.SelinuxPolicy())


def rows(folder: Path, host: spec.HostFacts, **asked: str) -> dict[str, origins.Row]:
    """Return the rows of a pod that asks for these SELinux options."""
    context = api.LinuxSandboxSecurityContext(selinux_options=api.SELinuxOption(**asked))
    config = wishes.pod(security=context)
    pod = state.new_pod(config, runtime_handler="", handler="runc", now=1)
    groups = cgroups.Cgroups(cgroups.detect(), "cgroupfs")
    with why.recorded() as found:
        labels = spec.labels_of_pod(config, "s0:c1,c2", host)
        size = spec.shm_size({}, 1 << 26)
        given: dict[str, Any] = {"shm_size": size, "labels": labels, "init": False}
        document = inventory.of(pod, podfiles.PodFiles(folder), groups, **given)
    return {row.part: row for row in origins.rows(document, found)}


def test_the_labels_that_its_containers_have_in_common_are_told(tmp_path: Path) -> None:
    found = rows(tmp_path, HOST, type="own_t")
    process, mount = found["sandbox.selinuxLabel"], found["sandbox.mountLabel"]
    assert process.value == "system_u:system_r:own_t:s0:c1,c2"
    assert process.notes[-1][:2] == ("pod", "linux.security_context.selinux_options.type")
    assert mount.value == "system_u:object_r:container_file_t:s0:c1,c2"
    assert mount.notes[-1].source == "default"


def test_without_selinux_what_was_asked_for_is_unmet(tmp_path: Path) -> None:
    assert rows(tmp_path, wishes.FACTS, type="own_t")["sandbox.selinuxLabel"].unmet == "::own_t:"
    assert "sandbox.selinuxLabel" not in rows(tmp_path, wishes.FACTS)


@pytest.mark.parametrize("key", ["", "[runtimes.runc] default_shm_size"])
def test_the_size_of_shm_is_the_handlers_only_where_its_section_says_so(key: str) -> None:
    with why.recorded() as found:
        spec.shm_size({}, 1 << 26, key=key)
    [note] = found["sandbox.shm_size"]
    assert note[:2] == (("handler", key) if key else ("default", ""))


def test_limits_are_the_handlers_only_where_its_section_says_so() -> None:
    for key in ("", "[runtimes.runc] default_rlimits"):
        with why.recorded() as found:
            spec.container(wishes.given(defaults=spec.Defaults(rlimits_key=key)))
        [note] = found["process.rlimits[RLIMIT_NOFILE]"]
        assert note[:2] == (("handler", key) if key else ("default", ""))
