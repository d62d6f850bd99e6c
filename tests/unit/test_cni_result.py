# SPDX-License-Identifier: Apache-2.0
"""Which addresses a result gives the pod."""

from typing import Any

import pytest

from cri_server.network import conf, result

HOST, INSIDE = {"name": "veth0"}, {"name": "eth0", "sandbox": "/run/netns/p"}


def answer(*ips: dict[str, Any], interfaces: Any = (HOST, INSIDE)) -> dict[str, Any]:
    return {"cniVersion": "1.0.0", "interfaces": list(interfaces), "ips": list(ips)}


def test_only_addresses_on_the_pods_interface_count() -> None:
    raw = answer(
        {"interface": 0, "address": "10.0.0.1/24"},
        {"interface": 1, "address": "10.0.0.2/24"},
        {"interface": 7, "address": "10.0.0.3/24"},
        {"interface": 1, "address": "fd00::2/64"},
        {"interface": 1, "address": "10.0.0.2/24"},
    )
    assert result.addresses(raw, "eth0") == ("10.0.0.2", "fd00::2")


def test_an_address_without_an_interface_is_the_pods() -> None:
    assert result.addresses({"ips": [{"address": "10.0.0.2/24"}]}, "eth0") == ("10.0.0.2",)


def test_the_hosts_eth0_is_not_the_pods() -> None:
    raw = answer(
        {"interface": 0, "address": "192.168.1.1/24"}, interfaces=[{"name": "eth0"}, INSIDE]
    )
    with pytest.raises(conf.Invalid, match="no IP address on eth0"):
        result.addresses(raw, "eth0")
    unsaid = answer({"interface": 0, "address": "10.0.0.2/24"}, interfaces=[{"name": "eth0"}])
    assert result.addresses(unsaid, "eth0") == ("10.0.0.2",)


@pytest.mark.parametrize(
    ("preference", "first"), [("cni", "fd00::2"), ("ipv4", "10.0.0.2"), ("ipv6", "fd00::2")]
)
def test_the_preferred_family_comes_first(preference: result.Preference, first: str) -> None:
    raw = answer(
        *({"interface": 1, "address": a} for a in ("fd00::2/64", "10.0.0.2/24", "fd00::3/64"))
    )
    found = result.addresses(raw, "eth0", preference)
    assert found[0] == first
    assert [a for a in found if ":" in a] == ["fd00::2", "fd00::3"]


@pytest.mark.parametrize(
    "raw",
    [
        {},
        {"ips": None},
        {"ips": []},
        {"ips": "10.0.0.1"},
        {"ips": ["10.0.0.1"]},
        {"ips": [{}]},
        {"ips": [{"address": "ten"}]},
        {"ips": [{"address": 7}]},
        answer({"interface": "1", "address": "10.0.0.2/24"}),
        answer({"interface": 1, "address": "10.0.0.2/24"}, interfaces="x"),
    ],
)
def test_a_result_without_addresses_or_with_garbage_is_refused(raw: dict[str, Any]) -> None:
    with pytest.raises(conf.Invalid):
        result.addresses(raw, "eth0")


def test_conversion_adds_and_drops_the_family() -> None:
    new = {
        "ips": [{"address": "10.0.0.2/24"}, {"address": "fd00::2/64", "gateway": "fd00::1"}],
        "x": 1,
    }
    old = result.convert(new, "0.3.1")
    assert old == {
        "cniVersion": "0.3.1",
        "ips": [
            {"version": "4", "address": "10.0.0.2/24"},
            {"version": "6", "address": "fd00::2/64", "gateway": "fd00::1"},
        ],
        "x": 1,
    }
    assert result.convert(old, "1.0.0") == {"cniVersion": "1.0.0", **new}
    assert result.convert({}, "1.0.0") == {"cniVersion": "1.0.0"}
