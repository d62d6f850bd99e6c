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
"""

from collections.abc import Iterable

from cri_server import errors
from cri_server.pb import api_pb2 as api
from cri_server.spec import cdifile, mounts, oci, types, why

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
    """Apply the edits to a spec that is the caller's own."""
    origin = ", ".join(given.devices)
    _inject_process(document["process"], given, origin)
    _inject_nodes(document, given.nodes, origin, privileged=wanted.security.privileged)
    targets = {m["destination"] for m in given.mounts}
    kept = [m for m in document["mounts"] if m["destination"] not in targets]
    document["mounts"] = mounts.in_order([*kept, *given.mounts])
    for target in targets:
        why.cri(f"mounts[{target}]", "CDI_devices", origin)
    for name, hook in given.hooks:
        document.setdefault("hooks", {}).setdefault(name, []).append(hook)
        why.cri(f"hooks.{name}", "CDI_devices", origin)


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
    document: oci.Spec, nodes: Iterable[types.Node], origin: str, *, privileged: bool
) -> None:
    user = document["process"]["user"]
    listed = {d["path"]: d for d in document["linux"]["devices"]}
    rules = document["linux"]["resources"]["devices"]
    for node in nodes:
        listed[node.path] = oci.Device(
            path=node.path,
            type=node.kind,
            major=node.major,
            minor=node.minor,
            fileMode=MODE if node.mode is None else node.mode,
            uid=user["uid"] if node.uid is None else node.uid,
            gid=user["gid"] if node.gid is None else node.gid,
        )
        why.cri(f"linux.devices[{node.path}]", "CDI_devices", origin)
        if node.access and not privileged:
            rules.append(_rule(node, origin))
    document["linux"]["devices"] = list(listed.values())


def _rule(node: types.Node, origin: str) -> oci.DeviceRule:
    part = f"linux.resources.devices[{node.kind} {node.major}:{node.minor} {node.access}]"
    why.cri(part, "CDI_devices", origin)
    return oci.DeviceRule(
        allow=True, type=node.kind, major=node.major, minor=node.minor, access=node.access
    )
