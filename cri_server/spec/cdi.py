# SPDX-License-Identifier: Apache-2.0
"""CDI devices: which are asked for, and what the edits behind them do to an OCI spec.

Pure. `cri_server.cdi` reads the specification files, looks at the host and hands back an Injection,
which `inject` puts into a container's spec as its last part: a CDI file is the administrator's
word, and stands above image and request (behaviour.md §7: env after CRI's).

    env             in the container's environment, over a variable of the same name
    deviceNodes     made over one at the same path, and let through by the device cgroup
    mounts          over one at the same target
    hooks           run by the OCI runtime, those of the runtime namespace as root on the host
    additionalGids  further groups of the process

In a pod with a user namespace of its own nodes are the host's own, bound, with their owner and
mode; bind mounts are plain: what belongs to the host's root shows as nobody's, and is readable as
far as others may read it. Groups are the pod's, which give nothing on the host.
"""

from collections.abc import Iterable

from cri_server import errors
from cri_server.pb import api_pb2 as api
from cri_server.spec import cdifile, devices, mounts, oci, types, why

PREFIX = "cdi.k8s.io/"
LIMIT = 1024  # devices of one container
MODE = 0o666  # of a node for which the file says none: what OCI runtimes take then


def requests(config: api.ContainerConfig) -> tuple[str, ...]:
    """Return the names of the devices asked for, the field's before the annotations', each once.

    Raises InvalidArgument naming the field for what is not vendor/class=device.
    """
    found = [_checked(d.name, "CDI_devices") for d in config.CDI_devices]
    for key, value in sorted(config.annotations.items()):
        if key.startswith(PREFIX):
            found += [_checked(n, f"annotation {key[:100]!r}") for n in value.split(",")]
    if len(found) > LIMIT:
        raise errors.InvalidArgument(f"CDI_devices: more than {LIMIT}")
    return tuple(dict.fromkeys(found))


def _checked(name: str, field: str) -> str:
    if not cdifile.is_name(name):
        raise errors.InvalidArgument(f"{field}: {name[:200]!r} is not VENDOR/CLASS=DEVICE")
    return name


def inject(document: oci.Spec, given: types.Injection, wanted: types.ContainerInput) -> None:
    """Apply the edits to a spec that is the caller's own.

    Raises FailedPrecondition for a group that the pod's user namespace does not have.
    """
    origin = ", ".join(given.devices)
    _check_groups(given, wanted.ids)
    _inject_process(document["process"], given, origin)
    _inject_mounts(document, given, origin, wanted)
    _inject_nodes(document, given.nodes, origin, wanted)
    for name, hook in given.hooks:
        document.setdefault("hooks", {}).setdefault(name, []).append(hook)
        why.cri(f"hooks.{name}", "CDI_devices", origin)


def _check_groups(given: types.Injection, ids: types.IdMap | None) -> None:
    for gid in given.gids if ids is not None else ():
        if ids is not None and gid >= ids.gids:
            raise errors.FailedPrecondition(
                f"CDI device {given.devices[0]!r}: additionalGids: group {gid} is not in"
                " userns_options.gids"
            )


def _inject_mounts(
    document: oci.Spec, given: types.Injection, origin: str, wanted: types.ContainerInput
) -> None:
    """Put the mounts in, with those nodes that are mounts."""
    bound = [devices.bind(node) for node in given.nodes if devices.bound(node, wanted)]
    added = {m["destination"]: mounts.kept(m, wanted.locked) for m in (*bound, *given.mounts)}
    others = [m for m in document["mounts"] if m["destination"] not in added]
    document["mounts"] = mounts.in_order([*others, *added.values()])
    for target in added:
        why.cri(f"mounts[{target}]", "CDI_devices", origin)


def _inject_process(process: oci.Process, given: types.Injection, origin: str) -> None:
    variables = _by_name(process["env"]) | _by_name(given.env)
    process["env"] = list(variables.values())
    for name in _by_name(given.env):
        why.cri(f"process.env[{name}]", "CDI_devices", origin)
    if given.gids:
        groups = [*process["user"].get("additionalGids", ()), *given.gids]
        process["user"]["additionalGids"] = list(dict.fromkeys(groups))
    for gid in given.gids:
        why.cri(f"process.user.additionalGids[{gid}]", "CDI_devices", origin)


def _by_name(variables: Iterable[str]) -> dict[str, str]:
    return {variable.partition("=")[0]: variable for variable in variables}


def _inject_nodes(
    document: oci.Spec, nodes: Iterable[types.Node], origin: str, wanted: types.ContainerInput
) -> None:
    listed = {d["path"]: d for d in document["linux"]["devices"]}
    rules = document["linux"]["resources"]["devices"]
    for node in nodes:
        listed.pop(node.path, None)
        if not devices.bound(node, wanted):
            listed[node.path] = _device(node, document["process"]["user"])
            why.cri(f"linux.devices[{node.path}]", "CDI_devices", origin)
        if node.access and not devices.has_all(wanted):
            rules.append(_rule(node, origin))
        if wanted.ids is not None:
            _note_own(node, wanted)
    document["linux"]["devices"] = list(listed.values())


def _device(node: types.Node, user: oci.User) -> oci.Device:
    return oci.Device(
        path=node.path,
        type=node.kind,
        major=node.major,
        minor=node.minor,
        fileMode=MODE if node.mode is None else node.mode,
        uid=user["uid"] if node.uid is None else node.uid,
        gid=user["gid"] if node.gid is None else node.gid,
    )


def _note_own(node: types.Node, wanted: types.ContainerInput) -> None:
    """Note what the file asks for of a node that stays as the host has it."""
    mode = "" if node.mode is None else f"mode {node.mode:o}"
    owners = [f"{name} {n}" for name, n in (("uid", node.uid), ("gid", node.gid)) if n is not None]
    if asked := " ".join([mode, *owners]).strip():
        bound = devices.bound(node, wanted)
        part = f"mounts[{node.path}]" if bound else f"linux.devices[{node.path}]"
        because = "the host's own node: nobody makes one in a user namespace"
        why.host(part, because, asked=asked)


def _rule(node: types.Node, origin: str) -> oci.DeviceRule:
    part = f"linux.resources.devices[{node.kind} {node.major}:{node.minor} {node.access}]"
    why.cri(part, "CDI_devices", origin)
    return oci.DeviceRule(
        allow=True, type=node.kind, major=node.major, minor=node.minor, access=node.access
    )
