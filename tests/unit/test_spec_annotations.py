# SPDX-License-Identifier: Apache-2.0
"""Our own annotations: who may use them, and what they do."""

import dataclasses
from typing import Any

import pytest

from cri_server import errors, limits, spec
from tests.lab import wishes

RLIMITS, SHM = "cri-server.io/rlimits", "cri-server.io/shm-size"
HOST = dataclasses.replace(wishes.FACTS, rlimit_ceilings={"RLIMIT_NOFILE": 4096}, memory=1 << 30)
ALL = frozenset({RLIMITS, f"{RLIMITS}.web", SHM})


def rlimits(**given: Any) -> dict[str, tuple[int, int]]:
    found = spec.container(wishes.given(**given))["process"]["rlimits"]
    return {one["type"]: (one["soft"], one["hard"]) for one in found}


def test_the_limit_nearest_to_the_container_wins() -> None:
    defaults = spec.Defaults(rlimits=limits.rlimits("nofile=1:2,core=0,nproc=9"))
    annotations = {RLIMITS: "nofile=3:4,core=1", f"{RLIMITS}.web": "core=2:5", "other": "x"}
    assert rlimits(defaults=defaults, annotations=annotations) == {
        "RLIMIT_NOFILE": (3, 4),
        "RLIMIT_CORE": (2, 5),
        "RLIMIT_NPROC": (9, 9),
    }
    assert rlimits(annotations={f"{RLIMITS}.db": "core=1"}) == {"RLIMIT_NOFILE": (1024, 524288)}


def test_a_default_is_lowered_to_what_the_host_allows() -> None:
    assert rlimits(host=HOST) == {"RLIMIT_NOFILE": (1024, 4096)}


@pytest.mark.parametrize(
    ("annotations", "allowed", "why"),
    [
        ({RLIMITS: "core=0"}, frozenset(), "pod_annotations does not let it through"),
        ({SHM: "1Mi"}, {RLIMITS}, "pod_annotations does not let it through"),
        ({"cri-server.io/rlimit": "core=0"}, {"cri-server.io/rlimit"}, "no such annotation"),
        ({RLIMITS: "core"}, ALL, "NAME=SOFT:HARD"),
        ({RLIMITS: "nofile=4097"}, ALL, "RLIMIT_NOFILE cannot be above 4096"),
        ({f"{RLIMITS}.web": "nofile=1:unlimited"}, ALL, "RLIMIT_NOFILE cannot be above 4096"),
        ({SHM: "1"}, ALL, "less than a page"),
        ({SHM: "2Gi"}, ALL, "more than the host's memory"),
        ({SHM: "lots"}, ALL, "not a size"),
    ],
)
def test_a_pods_annotation_that_cannot_count_is_refused_by_name(
    annotations: dict[str, str], allowed: frozenset[str], why: str
) -> None:
    with pytest.raises(errors.InvalidArgument, match=why) as refused:
        spec.check_pod_annotations(wishes.pod(annotations=annotations), allowed, HOST)
    assert refused.value.message.startswith(f"annotations[{next(iter(annotations))}]: ")


def test_what_is_let_through_and_what_is_not_ours_passes() -> None:
    annotations = {RLIMITS: "nofile=4096", SHM: "1Gi", "example.com/cri-server.io/x": "y"}
    spec.check_pod_annotations(wishes.pod(annotations=annotations), ALL, HOST)
    spec.check_container_annotations(wishes.container(annotations={RLIMITS: "core=0"}), ALL, HOST)


@pytest.mark.parametrize(
    "key",
    [
        "blockio.resources.beta.kubernetes.io/pod",
        "rdt.resources.beta.kubernetes.io/container.web",
        "io.kubernetes.cri.rdt-class",
    ],
)
def test_classes_that_nobody_keeps_are_refused_by_name(key: str) -> None:
    pod = wishes.pod(annotations={key: "gold"})
    container = wishes.container(annotations={key: "gold"})
    with pytest.raises(errors.InvalidArgument) as refused:
        spec.check_pod_annotations(pod, (), HOST)
    assert refused.value.message.startswith(f"annotations[{key}]: ")
    with pytest.raises(errors.InvalidArgument):
        spec.check_container_annotations(container, (), HOST)
    spec.check_pod_annotations(pod, {key}, HOST)  # the handler's runtime may know them


def test_a_container_has_no_shm_of_its_own() -> None:
    config = wishes.container(annotations={SHM: "1Mi"})
    with pytest.raises(errors.InvalidArgument, match=r"shm-size.*no such annotation"):
        spec.check_container_annotations(config, ALL, HOST)
    with pytest.raises(errors.InvalidArgument, match="container_annotations does not let"):
        spec.check_container_annotations(config, (), HOST)


def test_the_hosts_shm_cannot_be_sized() -> None:
    config = wishes.pod(annotations={SHM: "1Mi"}, options={"ipc": 2})
    with pytest.raises(errors.InvalidArgument, match="host's IPC namespace"):
        spec.check_pod_annotations(config, ALL, HOST)


def test_the_size_of_shm_is_the_pods_or_the_default() -> None:
    assert spec.shm_size({}, 7) == 7
    assert spec.shm_size({SHM: "8Mi"}, 7) == 8 << 20
