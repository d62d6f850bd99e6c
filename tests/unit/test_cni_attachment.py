# SPDX-License-Identifier: Apache-2.0
"""What a pod tells the plugins."""

from typing import Any

import pytest

from cri_server import errors
from cri_server.network import attachment
from cri_server.pb import api_pb2 as api
from tests.fakes import cni as fakes


def capability(name: str, **values: Any) -> object:
    return fakes.attachment(**values).capabilities().get(name)


def test_cni_args_have_the_names_that_plugins_know_in_order() -> None:
    assert fakes.attachment("id1").args() == (
        ("IgnoreUnknown", "1"),
        ("K8S_POD_NAMESPACE", "shop"),
        ("K8S_POD_NAME", "web"),
        ("K8S_POD_INFRA_CONTAINER_ID", "id1"),
        ("K8S_POD_UID", "u-1"),
    )


@pytest.mark.parametrize("bad", ["a;K8S_POD_NAME=b", "a=b", "a\nb", "a\0b"])
@pytest.mark.parametrize("field", ["name", "namespace", "uid"])
def test_a_value_that_would_be_read_as_two_is_refused(field: str, bad: str) -> None:
    with pytest.raises(errors.InvalidArgument, match="cannot be passed"):
        fakes.attachment(**{field: bad}).args()


def test_port_mappings_are_those_with_a_host_port() -> None:
    mappings = [
        api.PortMapping(container_port=80, host_port=8080),
        api.PortMapping(container_port=81),
        api.PortMapping(
            protocol=api.Protocol.SCTP, container_port=53, host_port=5353, host_ip="::1"
        ),
    ]
    assert capability("portMappings", port_mappings=mappings) == [
        {"hostPort": 8080, "containerPort": 80, "protocol": "tcp", "hostIP": ""},
        {"hostPort": 5353, "containerPort": 53, "protocol": "sctp", "hostIP": "::1"},
    ]


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"container_port": 80, "host_port": 65536}, "host_port"),
        ({"container_port": 0, "host_port": 80}, "container_port"),
        ({"container_port": 80, "host_port": 80, "host_ip": "example.org"}, "host_ip"),
        ({"container_port": 80, "host_port": 80, "protocol": 9}, "protocol"),
    ],
)
def test_a_port_mapping_that_cannot_be_is_refused(values: dict[str, Any], field: str) -> None:
    with pytest.raises(errors.InvalidArgument, match=field):
        capability("portMappings", port_mappings=[api.PortMapping(**values)])


def test_bandwidth_comes_from_the_annotations() -> None:
    annotations = {attachment.INGRESS: "10M"}
    expected = {"ingressRate": 10_000_000, "ingressBurst": 2**32 - 1}
    assert capability("bandwidth", annotations=annotations) == expected
    both = capability("bandwidth", annotations={**annotations, attachment.EGRESS: "1Gi"})
    assert both == {**expected, "egressRate": 2**30, "egressBurst": 2**32 - 1}


@pytest.mark.parametrize("value", ["", "fast", "-1M", "999", "2P", "1 M", "1e99", "9" * 100])
def test_a_bandwidth_that_cannot_be_is_refused_by_name(value: str) -> None:
    with pytest.raises(errors.InvalidArgument, match=attachment.EGRESS):
        capability("bandwidth", annotations={attachment.EGRESS: value})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("1500", 1500),
        ("+7", 7),
        ("1k", 1000),
        ("1K", None),
        ("1Ki", 1024),
        ("1.5Mi", 1572864),
        (".5G", 500_000_000),
        ("1.", 1),
        ("1500m", 2),
        ("1n", 1),
        ("2e6", 2_000_000),
        ("2E6", 2_000_000),
        ("1E", 10**18),
        ("1Ei", 2**60),
        ("1_000", None),
        ("\u0663M", None),
        ("0x10", None),
        (".", None),
        ("1e", None),
        ("inf", None),
    ],
)
def test_quantities_are_read_as_kubernetes_reads_them(text: str, value: int | None) -> None:
    assert attachment.quantity(text) == value


def test_dns_cgroup_path_and_annotations_are_passed_where_there_are_any() -> None:
    dns = api.DNSConfig(servers=["10.0.0.10"], searches=["svc"])
    every = fakes.attachment(
        dns=dns, cgroup_parent="/kubepods/pod1", annotations={"a": "b"}
    ).capabilities()
    assert every == {
        "dns": {"servers": ["10.0.0.10"], "searches": ["svc"], "options": []},
        "cgroupPath": "/kubepods/pod1",
        "io.kubernetes.cri.pod-annotations": {"a": "b"},
    }
    assert fakes.attachment().capabilities() == {}
