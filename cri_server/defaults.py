# SPDX-License-Identifier: Apache-2.0
"""Which handler serves the pods that name none.

What the configuration names is taken, whatever it is. Else it is crun where this host supports it,
for it starts a container in less time and memory; else runc; else the first handler that there is.
Nothing is remembered: a start decides anew, and pods keep the handler that they were made with.
"""

import dataclasses
from collections.abc import Mapping

from cri_server import cgroups, config, host

CRUN, RUNC = config.INSTALLED


def choose(
    settings: config.Config,
    found: Mapping[str, host.RuntimeFacts],
    hierarchy: cgroups.Hierarchy,
    driver: str,
) -> tuple[config.Config, str]:
    """Return the settings with a default handler, and the reason for it, for people. `driver` is
    that of cgroups.
    """
    named = settings.runtime.default
    if named:
        return settings, "the configuration names it"
    chosen, reason = _chosen(found, why_not_crun(found, hierarchy, driver))
    runtime = dataclasses.replace(settings.runtime, default=chosen)
    return dataclasses.replace(settings, runtime=runtime), reason


def _chosen(found: Mapping[str, host.RuntimeFacts], no_crun: str) -> tuple[str, str]:
    if not no_crun:
        return CRUN, "this host supports crun"
    if RUNC in found or not found:
        return RUNC, no_crun
    return next(iter(found)), f"{no_crun}, nor is runc installed"


def why_not_crun(
    found: Mapping[str, host.RuntimeFacts], hierarchy: cgroups.Hierarchy, driver: str
) -> str:
    """Return why crun cannot run pods on this host, or not well, "" if it can."""
    if CRUN not in found:
        return "crun is not installed"
    if found[CRUN].error:
        return f"crun: {found[CRUN].error}"
    return refused_hierarchy(hierarchy) or forgotten_limits(found[CRUN], driver)


def forgotten_limits(runtime: host.RuntimeFacts, driver: str) -> str:
    """Return why containers would lose their limits, "" if they keep them.

    crun before 1.8.5 tells systemd of no memory limit, so that the next `daemon-reload` takes the
    container's away (containers/crun#1217; 1.8.6 is the first with `features`).
    """
    old = driver == "systemd" and runtime.old_crun
    return "systemd takes the memory limits of an old crun's containers away" if old else ""


def refused_hierarchy(hierarchy: cgroups.Hierarchy) -> str:
    """Return why crun refuses these cgroups, "" if it does not.

    In hybrid mode it gives up when cgroup v2 holds a controller ("cgroups in hybrid mode not
    supported, drop all controllers from cgroupv2": crun 1.8.1).
    """
    if hierarchy.mode != "hybrid" or hierarchy.unified is None:
        return ""
    held = (hierarchy.unified / "cgroup.controllers").read_text().split()
    return f"crun refuses a hybrid host whose cgroup v2 holds {', '.join(held)}" if held else ""
