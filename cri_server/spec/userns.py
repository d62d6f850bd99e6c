# SPDX-License-Identifier: Apache-2.0
"""User namespaces: which ids of the host a pod gets, and what such a pod cannot have.

Pure. A pod has a user namespace of its own when its userns_options say POD; unset and NODE are the
host's. The kubelet gives every pod ids that no other has; that they are not shared is its to see
to. Sources of the rules: behaviour.md §1.6 (userns_options), critest, KEP-127.
"""

from collections.abc import Iterable, Sequence

from cri_server import errors
from cri_server.pb import api_pb2 as api
from cri_server.spec import checks, imagevolumes, oci, types, why

_FIELD = "userns_options"
_Mode = api.NamespaceMode
_Propagation = api.MountPropagation
_LAST_ID = 2**32 - 2  # (uid_t) -1 is none, user_namespaces(7)


def ids(config: api.PodSandboxConfig) -> types.IdMap | None:
    """Return the ids of a validated pod's own user namespace, None for the host's."""
    wanted = config.linux.security_context.namespace_options
    if not _own(wanted):
        return None
    uids, gids = wanted.userns_options.uids[0], wanted.userns_options.gids[0]
    return types.IdMap(uid=uids.host_id, uids=uids.length, gid=gids.host_id, gids=gids.length)


def _own(options: api.NamespaceOption) -> bool:
    return options.HasField("userns_options") and options.userns_options.mode == _Mode.POD


# -- of a pod --------------------------------------------------------------------------------------


def validate(options: api.NamespaceOption, host: types.HostFacts) -> None:
    """Refuse what no pod can have. Raises InvalidArgument, and FailedPrecondition for what only
    this host, or the handler's OCI runtime, cannot give; the message names the field.
    """
    _check_mode(options)
    if not _own(options):
        return
    wanted = options.userns_options
    for field, found in (("uids", wanted.uids), ("gids", wanted.gids)):
        _check_range(found, f"{_FIELD}.{field}")
    for field, mode in (("pid", options.pid), ("ipc", options.ipc)):
        # The kernel lets nobody mount proc or mqueue of a namespace that another owns.
        checks.unsupported(
            mode == _Mode.NODE, f"namespace_options.{field}", f"NODE excludes {_FIELD} POD"
        )
    if host.no_user_namespaces:
        raise errors.FailedPrecondition(
            f"{_FIELD}: mode POD is not possible here: {host.no_user_namespaces}"
        )


def _check_mode(options: api.NamespaceOption) -> None:
    if not options.HasField("userns_options"):
        return
    wanted = options.userns_options
    if wanted.mode not in (_Mode.POD, _Mode.NODE):
        known = wanted.mode in _Mode.values()
        name = _Mode.Name(wanted.mode) if known else str(int(wanted.mode))
        raise errors.InvalidArgument(f"namespace_options.{_FIELD}: {name} is not possible here")
    mapped = bool(wanted.uids or wanted.gids)
    checks.unsupported(wanted.mode == _Mode.NODE and mapped, _FIELD, "mode NODE has no mappings")


def _check_range(found: Sequence[api.IDMapping], field: str) -> None:
    """Refuse all but one range that begins with the container's 0 and not with the host's."""
    checks.unsupported(len(found) != 1, field, f"one mapping is needed, {len(found)} are given")
    one = found[0]
    checks.unsupported(one.container_id != 0, field, "must map container_id 0")
    checks.unsupported(one.length == 0, field, "length is 0")
    checks.unsupported(one.host_id == 0, field, "host_id 0 would be root on the host")
    last = one.host_id + one.length - 1
    checks.unsupported(last > _LAST_ID, field, f"{last} is not an id")


# -- of a container --------------------------------------------------------------------------------


def check_container(config: api.ContainerConfig, sandbox: api.PodSandboxConfig) -> None:
    """Refuse another user namespace than the pod's, also for mounts. Unset is the pod's.

    Raises InvalidArgument.
    """
    options = config.linux.security_context.namespace_options
    _check_mode(options)
    of_pod = sandbox.linux.security_context.namespace_options
    if options.HasField("userns_options") and not _same(options, of_pod):
        raise errors.InvalidArgument(f"{_FIELD}: differs from the pod sandbox's")
    for mount in config.mounts:
        with imagevolumes.explained_where_image(mount):
            _check_mount(mount, of_pod)


def _same(one: api.NamespaceOption, other: api.NamespaceOption) -> bool:
    return _own(one) == _own(other) and _ranges(one) == _ranges(other)


def _ranges(options: api.NamespaceOption) -> tuple[list[tuple[int, ...]], ...]:
    """Return uid and gid mappings as plain values; none for the host's namespace."""
    if not _own(options):
        return [], []
    return _values(options.userns_options.uids), _values(options.userns_options.gids)


def _values(mappings: Iterable[api.IDMapping]) -> list[tuple[int, ...]]:
    return [(m.container_id, m.host_id, m.length) for m in mappings]


def _check_mount(mount: api.Mount, of_pod: api.NamespaceOption) -> None:
    where = f"mount {mount.container_path[:200]!r}"
    if mapped(mount) and (_values(mount.uidMappings), _values(mount.gidMappings)) != _ranges(
        of_pod
    ):
        raise errors.InvalidArgument(
            f"{where}: uidMappings and gidMappings are not those of the pod's {_FIELD}"
        )
    both_ways = mount.propagation == _Propagation.PROPAGATION_BIDIRECTIONAL
    # mount_namespaces(7): all mounts of a namespace with another owner are slaves.
    checks.unsupported(
        both_ways and _own(of_pod),
        where,
        f"propagation BIDIRECTIONAL: no mount leaves a pod with {_FIELD} POD",
    )


def mapped(mount: api.Mount) -> bool:
    """Say whether the mount is to show its files as owned by the pod's ids."""
    return bool(mount.uidMappings or mount.gidMappings)


def check_user(user: types.User, mapping: types.IdMap | None, field: str) -> None:
    """Refuse a user whom the pod's user namespace does not have: InvalidArgument."""
    if mapping is None:
        return
    checks.unsupported(user.uid >= mapping.uids, field, f"user {user.uid} is not in {_FIELD}.uids")
    for gid in (user.gid, *user.additional_gids):
        checks.unsupported(gid >= mapping.gids, field, f"group {gid} is not in {_FIELD}.gids")


# -- of the spec -----------------------------------------------------------------------------------


def fill(part: oci.Linux, mapping: types.IdMap | None) -> None:
    """Put the mappings beside the namespace's path: runc wants both, others compare them."""
    if mapping is not None:
        field = f"linux.security_context.namespace_options.{_FIELD}"
        why.pod("linux.uidMappings", f"{field}.uids")
        why.pod("linux.gidMappings", f"{field}.gids")
        part["uidMappings"] = [oci.IdMapping(containerID=0, hostID=mapping.uid, size=mapping.uids)]
        part["gidMappings"] = [oci.IdMapping(containerID=0, hostID=mapping.gid, size=mapping.gids)]
