# SPDX-License-Identifier: Apache-2.0
"""A pod's network namespace: made, pinned and furnished in one go, or not at all."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cri_server import errors
from cri_server.network import inside, netns

pytestmark = pytest.mark.needs("root", "netns")


@pytest.fixture
def path() -> Iterator[str]:
    """Where a namespace of this test's own may be pinned."""
    Path("/run/netns").mkdir(exist_ok=True)
    place = f"/run/netns/cri-test-{os.getpid()}"
    yield place
    netns.remove(place)
    assert not os.path.exists(place)


def within(path: str, *command: str) -> str:
    done = subprocess.run(
        ["nsenter", f"--net={path}", *command], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def test_it_is_pinned_its_loopback_up_its_sysctls_set(path: str) -> None:
    before = os.readlink("/proc/thread-self/ns/net")
    netns.create(path, {"net.ipv4.ip_default_ttl": "33", "net.ipv4.conf.lo.rp_filter": "2"})
    assert netns.exists(path)
    flags = within(path, "ip", "-o", "link", "show", "lo").split("<")[1].split(">")[0]
    assert "UP" in flags.split(",")
    assert within(path, "sysctl", "-n", "net.ipv4.ip_default_ttl") == "33"
    assert within(path, "cat", "/proc/sys/net/ipv4/conf/lo/rp_filter") == "2"
    assert os.readlink("/proc/thread-self/ns/net") == before
    assert Path("/proc/sys/net/ipv4/ip_default_ttl").read_text() != "33\n"


def test_a_slash_in_a_sysctl_stands_for_a_dot(path: str) -> None:
    with pytest.raises(errors.InvalidArgument, match=r"sysctl net\.ipv4\.conf\.eth0/7\.forwarding"):
        netns.create(path, {"net.ipv4.conf.eth0/7.forwarding": "1"})  # no such interface
    assert not netns.exists(path)


@pytest.mark.parametrize(
    ("name", "late"),
    [
        ("net.ipv4.conf.eth0.rp_filter", True),
        ("net.ipv6.conf.eth0/7.accept_ra", True),
        ("net.ipv4.neigh.eth0.base_reachable_time_ms", True),
        ("net.ipv4.conf.lo.rp_filter", False),
        ("net.ipv6.conf.all.forwarding", False),
        ("net.ipv4.neigh.default.gc_thresh1", False),
        ("net.core.somaxconn", False),
        ("kernel.shmmni", False),
    ],
)
def test_which_sysctls_wait_for_the_interface(name: str, *, late: bool) -> None:
    assert netns.is_of_device(name) is late


def test_sysctls_of_an_interface_are_written_when_it_is_there(path: str) -> None:
    netns.create(path, {})
    sysctls = {"net.ipv4.conf.veth7.rp_filter": "2"}
    with pytest.raises(errors.InvalidArgument, match=r"net\.ipv4\.conf\.veth7\.rp_filter='2': No"):
        netns.write(path, sysctls)
    within(path, "ip", "link", "add", "veth7", "type", "veth")
    netns.write(path, sysctls)
    assert within(path, "cat", "/proc/sys/net/ipv4/conf/veth7/rp_filter") == "2"
    netns.remove(path)
    with pytest.raises(errors.Internal):
        netns.write(path, sysctls)


@pytest.mark.parametrize("value", ["", "word", "999999999999"])
def test_a_value_that_the_kernel_refuses_leaves_nothing(path: str, value: str) -> None:
    with pytest.raises(errors.InvalidArgument, match=r"net\.ipv4\.ip_unprivileged_port_start"):
        netns.create(path, {"net.ipv4.ip_unprivileged_port_start": value})
    assert not os.path.exists(path)


def test_a_place_that_is_a_symlink_is_not_followed(path: str, tmp_path: Path) -> None:
    Path(path).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(errors.Internal):
        netns.create(path, {})
    assert list(tmp_path.iterdir()) == []


def test_work_inside_and_what_it_raises(path: str) -> None:
    netns.create(path, {})
    here = os.readlink("/proc/thread-self/ns/net")
    assert inside.run(path, lambda: os.readlink("/proc/thread-self/ns/net")) != here
    with pytest.raises(ZeroDivisionError):
        inside.run(path, lambda: 1 // 0)
    with pytest.raises(OSError, match="No such file"):
        inside.run(path + "-none", lambda: 0)
