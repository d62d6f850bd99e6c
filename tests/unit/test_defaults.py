# SPDX-License-Identifier: Apache-2.0
"""cri_server.defaults: which handler pods get that name none, and the reason that people read."""

import dataclasses
from pathlib import Path

import pytest

from cri_server import cgroups, config, defaults, host

V2 = cgroups.Hierarchy(mode="v2", v1={}, unified=Path("/nowhere"))


def settings(*names: str, default: str = "") -> config.Config:
    handlers = {name: config.Handler(path=f"/bin/{name}") for name in names}
    return config.Config(runtimes=handlers, runtime=config.Runtime(default=default))


def found(*names: str) -> dict[str, host.RuntimeFacts]:
    return {name: host.RuntimeFacts(path=f"/bin/{name}", program=name) for name in names}


@pytest.mark.parametrize(
    ("installed", "named", "chosen", "reason"),
    [
        (("crun", "runc"), "", "crun", "this host supports crun"),
        (("crun", "runc"), "runc", "runc", "the configuration names it"),
        (("runc",), "", "runc", "crun is not installed"),
        (("youki",), "", "youki", "crun is not installed, nor is runc installed"),
        ((), "", "runc", "crun is not installed"),
    ],
)
def test_the_default_handler(
    installed: tuple[str, ...], named: str, chosen: str, reason: str
) -> None:
    settled, why = defaults.choose(
        settings(*installed, default=named), found(*installed), V2, "cgroupfs"
    )

    assert (settled.runtime.default, why) == (chosen, reason)


def test_a_crun_that_does_not_work_is_not_chosen() -> None:
    facts = found("crun", "runc")
    facts["crun"] = dataclasses.replace(facts["crun"], error="no such library")

    settled, why = defaults.choose(settings("crun", "runc"), facts, V2, "cgroupfs")

    assert (settled.runtime.default, why) == ("runc", "crun: no such library")


@pytest.mark.parametrize(("held", "chosen"), [("hugetlb\n", "runc"), ("\n", "crun")])
def test_crun_is_not_chosen_where_a_hybrid_host_has_controllers_in_v2(
    tmp_path: Path, held: str, chosen: str
) -> None:
    (tmp_path / "cgroup.controllers").write_text(held)
    hybrid = cgroups.Hierarchy(mode="hybrid", v1={}, unified=tmp_path)

    settled, why = defaults.choose(
        settings("crun", "runc"), found("crun", "runc"), hybrid, "cgroupfs"
    )

    assert settled.runtime.default == chosen
    assert ("cgroup v2 holds hugetlb" in why) == (chosen == "runc")


@pytest.mark.parametrize(
    ("driver", "features", "chosen"),
    [("systemd", {}, "runc"), ("systemd", {"linux": {}}, "crun"), ("cgroupfs", {}, "crun")],
)
def test_an_old_crun_that_tells_systemd_of_no_memory_limit_is_not_chosen(
    driver: str, features: dict[str, object], chosen: str
) -> None:
    facts = found("crun", "runc")
    facts["crun"] = dataclasses.replace(facts["crun"], features=features)

    settled, why = defaults.choose(settings("crun", "runc"), facts, V2, driver)

    assert settled.runtime.default == chosen
    assert ("memory limits" in why) == (chosen == "runc")
