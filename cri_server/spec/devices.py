# SPDX-License-Identifier: Apache-2.0
"""Devices: which nodes a container gets, and what its device cgroup lets through.

Pure. `requests` says what is asked for; `cri_server.sources` looks at the nodes and hands them back
as DeviceNode. CDI devices are `cdi`'s.
"""

from dataclasses import dataclass

from cri_server import errors
from cri_server.pb import api_pb2 as api
from cri_server.spec import checks, oci, types, why

# The nodes themselves are made by the OCI runtime (config-linux.md, "Default Devices"). Making any
# node is allowed as it gives nothing: opening it is what the other rules are about.
_ALWAYS: tuple[oci.DeviceRule, ...] = (
    {"allow": False, "access": "rwm"},
    {"allow": True, "type": "c", "access": "m"},
    {"allow": True, "type": "b", "access": "m"},
    {"allow": True, "type": "c", "major": 1, "minor": 3, "access": "rwm"},  # null
    {"allow": True, "type": "c", "major": 1, "minor": 5, "access": "rwm"},  # zero
    {"allow": True, "type": "c", "major": 1, "minor": 7, "access": "rwm"},  # full
    {"allow": True, "type": "c", "major": 1, "minor": 8, "access": "rwm"},  # random
    {"allow": True, "type": "c", "major": 1, "minor": 9, "access": "rwm"},  # urandom
    {"allow": True, "type": "c", "major": 5, "minor": 0, "access": "rwm"},  # tty
    {"allow": True, "type": "c", "major": 5, "minor": 1, "access": "rwm"},  # console
    {"allow": True, "type": "c", "major": 5, "minor": 2, "access": "rwm"},  # ptmx
    {"allow": True, "type": "c", "major": 136, "access": "rwm"},  # pts/*
)
_ALL: tuple[oci.DeviceRule, ...] = ({"allow": True, "access": "rwm"},)


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One entry of config.devices; a folder stands for every device below it."""

    host_path: str
    container_path: str
    access: str


def requests(config: api.ContainerConfig) -> tuple[Request, ...]:
    """Return the devices asked for, checked. Raises InvalidArgument naming the field."""
    return tuple(_request(d) for d in config.devices)


def _request(device: api.Device) -> Request:
    host_path = checks.absolute(device.host_path, "devices.host_path")
    access = device.permissions
    if not access or not set(access) <= set("rwm") or len(set(access)) != len(access):
        raise errors.InvalidArgument(
            f"device {host_path!r}: permissions {access[:20]!r} are not among r, w, m"
        )
    path = checks.absolute(device.container_path or device.host_path, "devices.container_path")
    return Request(host_path=host_path, container_path=path, access=access)


def nodes(wanted: types.ContainerInput) -> list[oci.Device]:
    """Return the nodes to make beyond the default ones; at one path the request beats the host."""
    why.cri("linux.devices", "devices")
    host = wanted.host_devices if has_all(wanted) else ()
    if wanted.security.privileged and not has_all(wanted):
        because = "privileged, but without the host's"
        why.handler("linux.devices", wanted.defaults.no_host_devices_key, because)
    for node in host:
        why.cri(f"linux.devices[{node.path}]", "linux.security_context.privileged", "the host's")
    for node in wanted.devices:
        why.cri(f"linux.devices[{node.path}]", "devices")
    by_path = {node.path: node for node in (*host, *wanted.devices)}
    return [_node(node) for node in by_path.values() if not bound(node, wanted)]


def has_all(wanted: types.ContainerInput) -> bool:
    """Say whether the container has, and may open, every device of the host."""
    return wanted.security.privileged and not wanted.defaults.no_host_devices_key


def binds(wanted: types.ContainerInput) -> list[oci.Mount]:
    """Return the nodes that are bind mounts: nobody makes nodes in a user namespace, and the OCI
    runtimes bind the host's node of the *same path* there, which may be another device.
    """
    return [bind(node) for node in wanted.devices if bound(node, wanted)]


def bind(node: types.DeviceNode | types.Node) -> oci.Mount:
    """Return the bind mount of the host's own node."""
    options = ["bind", "rprivate", "nosuid", "noexec"]
    return oci.Mount(destination=node.path, type="bind", source=node.host_path, options=options)


def bound(node: types.DeviceNode | types.Node, wanted: types.ContainerInput) -> bool:
    """Say whether the node has to be a bind mount of ours."""
    return wanted.ids is not None and node.host_path not in ("", node.path)


def _node(node: types.DeviceNode) -> oci.Device:
    return oci.Device(
        path=node.path,
        type=node.kind,
        major=node.major,
        minor=node.minor,
        fileMode=node.mode,
        uid=node.uid,
        gid=node.gid,
    )


def rules(wanted: types.ContainerInput) -> list[oci.DeviceRule]:
    """Return the device cgroup's rules: deny all, the defaults, what is listed; or allow all."""
    if has_all(wanted):
        why.cri("linux.resources.devices", "linux.security_context.privileged", "all are allowed")
        return [*_ALL]
    why.default("linux.resources.devices", "nothing but what every container has in /dev")
    return [*_ALWAYS, *(_rule(node) for node in wanted.devices)]


def _rule(node: types.DeviceNode) -> oci.DeviceRule:
    part = f"linux.resources.devices[{node.kind} {node.major}:{node.minor} {node.access}]"
    why.cri(part, "devices", node.path)
    return oci.DeviceRule(
        allow=True, type=node.kind, major=node.major, minor=node.minor, access=node.access
    )
