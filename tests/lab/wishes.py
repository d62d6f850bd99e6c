# SPDX-License-Identifier: Apache-2.0
"""CRI requests and the inputs of the spec functions, complete but for what a test is about."""

import dataclasses
from typing import Any

from cri_server import spec
from cri_server.pb import api_pb2 as api

IMAGE = spec.ImageConfig(cmd=("/bin/true",))
FACTS = spec.HostFacts(
    capabilities=frozenset(spec.CAPABILITIES),
    known_capabilities=frozenset(spec.CAPABILITIES),
    cgroup_v2=True,
    swap_accounting=True,
    hugepage_sizes=frozenset({"2MB"}),
    recursive_read_only=True,
)


def facts(**changes: Any) -> spec.HostFacts:
    """Return the facts of a host that can all, but for `changes`."""
    return dataclasses.replace(FACTS, **changes)


def container(**fields: Any) -> api.ContainerConfig:
    """Return a container's config; `security` and `resources` are the two parts of its `linux`."""
    linux = api.LinuxContainerConfig(
        security_context=fields.pop("security", None), resources=fields.pop("resources", None)
    )
    named = {
        "metadata": api.ContainerMetadata(name="web"),
        "image": api.ImageSpec(
            image="sha256:1", user_specified_image="docker.io/library/busybox:1"
        ),
        "linux": linux,
    }
    return api.ContainerConfig(**(named | fields))


def security(**fields: Any) -> api.LinuxContainerSecurityContext:
    """Return a container's security context; numbers become Int64Value."""
    for name in ("run_as_user", "run_as_group"):
        if name in fields:
            fields[name] = api.Int64Value(value=fields[name])
    return api.LinuxContainerSecurityContext(**fields)


def pod(**fields: Any) -> api.PodSandboxConfig:
    """Return a sandbox's config; `options` are namespace options, `security` their frame."""
    context = fields.pop("security", api.LinuxSandboxSecurityContext())
    if "options" in fields:
        context.namespace_options.CopyFrom(api.NamespaceOption(**fields.pop("options")))
    linux = api.LinuxPodSandboxConfig(
        security_context=context,
        sysctls=fields.pop("sysctls", None),
        cgroup_parent=fields.pop("cgroup_parent", ""),
    )
    metadata = api.PodSandboxMetadata(name="pod", uid="u-1", namespace="default")
    return api.PodSandboxConfig(**({"metadata": metadata, "linux": linux} | fields))


def given(config: api.ContainerConfig | None = None, **changes: Any) -> spec.ContainerInput:
    """Return the input of `spec.container`."""
    plain = spec.ContainerInput(
        id="c1",
        pod_id="p1",
        config=config or container(),
        sandbox=pod(),
        image=IMAGE,
        user=spec.User(),
        namespaces={"network": "/run/netns/p1", "ipc": "/ns/ipc", "uts": "/ns/uts", "pid": ""},
        cgroups_path="/kubepods/c1",
        rootfs="/rootfs",
        pod_files=spec.PodFiles(),
        hostname="pod",
        host=FACTS,
    )
    return dataclasses.replace(plain, **changes)


def validate(config: api.ContainerConfig, **changes: Any) -> None:
    """Run `spec.validate_container` with `sandbox`, `host` and `image` as they usually are."""
    usual: dict[str, Any] = {"sandbox": pod(), "host": FACTS, "image": IMAGE} | changes
    spec.validate_container(config, usual["sandbox"], usual["host"], image=usual["image"])
