# SPDX-License-Identifier: Apache-2.0
"""The host's policy, and the levels of pods from first promise to last record."""

import dataclasses
from pathlib import Path

import pytest

from cri_server import errors, selinux_host, spec, state
from cri_server.pb import api_pb2 as api


def test_the_policys_own_labels_are_used_and_its_usual_ones_where_it_has_none(
    tmp_path: Path,
) -> None:
    assert selinux_host.policy(tmp_path) == spec.SelinuxPolicy()
    contexts = tmp_path / "mls/contexts"
    contexts.mkdir(parents=True)
    (tmp_path / "config").write_text("# a comment\nSELINUX=enforcing\nSELINUXTYPE=mls\n")
    (contexts / "lxc_contexts").write_text(
        'process = "a_u:a_r:a_t:s0-s1"\nfile="broken"\nro_file = "x:y:z:s0"\n'
    )
    found = spec.SelinuxPolicy(process="a_u:a_r:a_t:s0-s1", read_only="x:y:z:s0")
    assert selinux_host.policy(tmp_path) == found


def test_a_level_is_taken_while_it_is_promised_and_while_it_is_on_record() -> None:
    recorded: set[str] = set()
    levels = selinux_host.Levels(lambda: recorded)
    with levels.held("") as one, levels.held("") as other:
        assert one != other
        recorded.add(one)
    with levels.held("s0:c1,c2") as asked:
        assert asked == "s0:c1,c2"


async def test_levels_live_on_the_records_of_pods_and_containers(tmp_path: Path) -> None:
    store = state.Store(tmp_path)
    store.load()
    config = api.PodSandboxConfig(metadata=api.PodSandboxMetadata(name="p"))
    pod = state.new_pod(config, runtime_handler="", handler="runc", now=1)
    await store.put_pod(dataclasses.replace(pod, selinux_level="s0:c1,c2"))
    again = state.Store(tmp_path)
    again.load()
    assert "s0:c1,c2" in again.selinux_levels()
    await again.forget_pod(pod.id)
    assert "s0:c1,c2" not in again.selinux_levels()


@pytest.mark.needs("selinux")
def test_the_kernel_knows_its_labels() -> None:
    selinux_host.check("system_u:system_r:kernel_t:s0")
    with pytest.raises(errors.InvalidArgument, match="no label 'system_u:system_r:no_such_t:s0'"):
        selinux_host.check("system_u:system_r:no_such_t:s0")


@pytest.mark.needs("selinux")
def test_a_policy_without_a_label_for_containers_is_found_out() -> None:
    kernel = "system_u:system_r:kernel_t:s0"
    known = spec.SelinuxPolicy(process=kernel, file=kernel, read_only=kernel, unconfined="kernel_t")
    assert selinux_host.lacking(known) == ""
    for part in ("process", "file", "read_only"):
        wrong = "system_u:system_r:no_such_t:s0"
        assert selinux_host.lacking(dataclasses.replace(known, **{part: wrong})) == wrong
    no_type = dataclasses.replace(known, unconfined="no_such_t")
    assert selinux_host.lacking(no_type) == "system_u:system_r:no_such_t:s0"
