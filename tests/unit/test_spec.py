# SPDX-License-Identifier: Apache-2.0
"""The spec of a container as a whole."""

import itertools
import json
import time

import pytest

from cri_server import errors, spec
from cri_server.pb import api_pb2 as api
from tests.lab import wishes


def test_a_container_is_json_of_version_1_0_2() -> None:
    document = spec.container(wishes.given())
    assert json.loads(json.dumps(document))["ociVersion"] == "1.0.2"


def test_annotations_are_containerds_and_the_allowed_ones() -> None:
    given = wishes.given(
        annotations={"io.example/allowed": "1", "io.kubernetes.cri.sandbox-id": "x"}
    )
    assert spec.container(given)["annotations"] == {
        "io.example/allowed": "1",
        "io.kubernetes.cri.container-type": "container",
        "io.kubernetes.cri.sandbox-id": "p1",
        "io.kubernetes.cri.sandbox-name": "pod",
        "io.kubernetes.cri.sandbox-namespace": "default",
        "io.kubernetes.cri.sandbox-uid": "u-1",
        "io.kubernetes.cri.container-name": "web",
        "io.kubernetes.cri.image-name": "docker.io/library/busybox:1",
    }


def test_the_cgroup_of_a_container_of_crun_is_its_scope_itself() -> None:
    key = "run.oci.systemd.subgroup"
    given = wishes.given(cgroups_path="a.slice:cri-server:c1", annotations={key: "mine"})
    assert spec.container(given)["annotations"][key] == ""
    assert key not in spec.container(wishes.given())["annotations"]


def test_nothing_of_a_requests_annotations_gets_in_by_itself() -> None:
    hostile = {"run.oci.hooks": "x", "org.systemd.property.ExecStartPre": "x"}
    given = wishes.given(
        wishes.container(annotations=hostile), sandbox=wishes.pod(annotations=hostile)
    )
    assert not hostile.keys() & spec.container(given)["annotations"].keys()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (api.ContainerConfig(), r"metadata\.name"),
        (wishes.container(metadata=api.ContainerMetadata(name="a\nb")), r"metadata\.name"),
        (wishes.container(image=api.ImageSpec()), r"image\.image"),
        (wishes.container(windows=api.WindowsContainerConfig()), "windows"),
    ],
    ids=itertools.count(),
)
def test_a_container_that_cannot_be_is_refused(config: api.ContainerConfig, message: str) -> None:
    with pytest.raises(errors.InvalidArgument, match=message):
        wishes.validate(config)


def test_two_containers_of_one_image_share_nothing_that_can_change() -> None:
    """Environment, arguments and rules of one must not show up in the other (CVE-2021-21334)."""
    image = spec.ImageConfig(cmd=("/x",), env=("A=1",))
    first = spec.container(wishes.given(image=image))
    first["process"]["env"].append("LEAK=1")
    first["process"]["args"].append("leak")
    first["linux"]["resources"]["devices"].clear()
    second = spec.container(wishes.given(image=image))
    assert "LEAK=1" not in second["process"]["env"]
    assert second["process"]["args"] == ["/x"]
    assert second["linux"]["resources"]["devices"]


def test_a_spec_takes_less_than_a_millisecond() -> None:
    wish = wishes.container(
        envs=[api.KeyValue(key=f"SERVICE_{n}_HOST", value=b"10.0.0.1") for n in range(50)],
        mounts=[api.Mount(container_path=f"/v/{n}", host_path=f"/h/{n}") for n in range(10)],
        security=wishes.security(seccomp=api.SecurityProfile()),
    )
    given = wishes.given(wish)
    spec.container(given)  # the seccomp profile is made once
    times = []
    for _ in range(20):
        began = time.perf_counter()
        spec.container(given)
        times.append(time.perf_counter() - began)
    assert min(times) < 1e-3
