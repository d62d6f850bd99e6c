# SPDX-License-Identifier: Apache-2.0
"""Who a container is and what it may do: user, capabilities, the choice of profiles.

Pure. Names of users are looked up elsewhere (`cri_server.rootfs`), profiles are read elsewhere;
here the request is checked and turned into numbers, sets and names.
"""

from collections.abc import Iterable, Mapping
from typing import Literal

from cri_server import capability, errors
from cri_server.pb import api_pb2 as api
from cri_server.spec import (
    checks,
    oci,
    seccomp,
    seccompaudit,
    seccompdocker,
    seccompfile,
    types,
    why,
)

_UNAVAILABLE = "not in our own bounding set, or unknown to the OCI runtime"
_ORDER = {name: number for number, name in enumerate(capability.ALL)}
_ADD, _DROP, _AMBIENT = (f"capabilities.{f}_capabilities" for f in ("add", "drop", "add_ambient"))

ProfileKind = Literal["none", "default", "localhost"]
_KIND_NAMES: Mapping[ProfileKind, str] = {
    "none": "Unconfined",
    "default": "RuntimeDefault",
    "localhost": "Localhost",
}
_Context = api.LinuxContainerSecurityContext
_Kind = api.SecurityProfile.ProfileType


# -- privileged ------------------------------------------------------------------------------------


def check_privileged(context: _Context, sandbox: api.PodSandboxConfig) -> None:
    """Refuse a privileged container in a pod that is not (critest)."""
    if context.privileged and not sandbox.linux.security_context.privileged:
        raise errors.InvalidArgument(
            "security_context.privileged: the pod sandbox is not privileged"
        )


# -- capabilities ----------------------------------------------------------------------------------


def capability_names(numbers: int) -> frozenset[str]:
    """Return the names of the bits in a mask such as CapBnd of /proc/self/status."""
    return frozenset(name for name, bit in _ORDER.items() if numbers >> bit & 1)


def capabilities(
    context: _Context, *, host: types.HostFacts, defaults: types.Defaults
) -> oci.Capabilities:
    """Return the five sets, applied as in containerd: default or ALL, drop ALL, add, drop.

    ALL and the defaults mean "as far as this host has them"; a capability that is asked for by name
    and that the host lacks is refused, because the OCI runtime would fail on it later and less
    clearly. Inheritable is empty (CVE-2022-29162) but for the ambient ones, which the kernel
    couples to it: they are exactly add_ambient_capabilities, and are added everywhere.
    """
    if context.privileged:
        return _sets(_all("privileged", host))
    asked = context.capabilities
    add = _named(asked.add_capabilities, "add_capabilities", host)
    drop = _named(asked.drop_capabilities, "drop_capabilities", host)
    ambient = _named(asked.add_ambient_capabilities, "add_ambient_capabilities", host)
    held = _all(_ADD, host) if "ALL" in add else _default(defaults, host)
    if "ALL" in drop:
        _note(held, _DROP, "ALL dropped")
        held = frozenset()
    ambient = _all(_AMBIENT, host) if "ALL" in ambient else ambient
    held = (held | (add - {"ALL"}) | ambient) - drop
    missing = (add | ambient) & held - host.capabilities
    if missing:
        raise errors.InvalidArgument(f"capability {min(missing)} is not available on this host")
    _note(add - {"ALL"}, _ADD, "added")
    _note(ambient, _AMBIENT, "added, ambient")
    _note(drop - {"ALL"}, _DROP, "dropped")
    return _sets(held, ambient & held)


def _all(field: str, host: types.HostFacts) -> frozenset[str]:
    """Return all capabilities that this host has to give, because of `field`."""
    _note(host.known_capabilities, field, "all")
    for name in host.known_capabilities - host.capabilities:
        why.host(f"process.capabilities[{name}]", _UNAVAILABLE, asked="all")
    return host.capabilities


def _default(given: types.Defaults, host: types.HostFacts) -> frozenset[str]:
    key, names = given.capabilities_key, given.capabilities
    for name in names if key else ():
        why.handler(f"process.capabilities[{name}]", key)
    for name in (n for n in capability.DEFAULT if n not in names):
        why.handler(f"process.capabilities[{name}]", key, "not in its list")
    for name in () if key else names:
        why.default(f"process.capabilities[{name}]", "one of containerd's default set")
    for name in (n for n in names if n not in host.capabilities):
        why.host(f"process.capabilities[{name}]", _UNAVAILABLE)
    return host.capabilities & frozenset(names)


def _note(names: Iterable[str], field: str, because: str) -> None:
    for name in names:
        why.cri(f"process.capabilities[{name}]", f"linux.security_context.{field}", because)


def _named(names: Iterable[str], field: str, host: types.HostFacts) -> frozenset[str]:
    return frozenset(_capability(name, f"capabilities.{field}", host) for name in names)


def _capability(name: str, field: str, host: types.HostFacts) -> str:
    if name.upper() == "ALL":
        return "ALL"
    full = capability.full(name)
    if full not in host.known_capabilities:
        raise errors.InvalidArgument(f"{field}: {name[:80]!r} is not a capability of this kernel")
    return full


def _sets(held: Iterable[str], ambient: Iterable[str] = ()) -> oci.Capabilities:
    ordered = sorted(held, key=_ORDER.__getitem__)
    raised = sorted(ambient, key=_ORDER.__getitem__)
    return oci.Capabilities(
        bounding=ordered, effective=ordered, permitted=ordered, inheritable=raised, ambient=raised
    )


# -- user ------------------------------------------------------------------------------------------


def user_request(config: api.ContainerConfig, image: types.ImageConfig) -> types.UserRequest:
    """Return who is to run: run_as_user, else run_as_username, else the image's USER, else root.

    Source: behaviour.md §1.6. Raises InvalidArgument for numbers out of range and for a group
    without a user.
    """
    context = config.linux.security_context
    named = context.HasField("run_as_user") or bool(context.run_as_username)
    if context.HasField("run_as_group") and not named:
        raise errors.InvalidArgument("run_as_group: needs run_as_user or run_as_username")
    uid, name, gid, group = _wanted(context) if named else _from_image(image.user)
    why.cri("process.user.additionalGids", "linux.security_context.supplemental_groups")
    if strict(context.supplemental_groups_policy):
        why.cri(
            "process.user.additionalGids",
            "linux.security_context.supplemental_groups_policy",
            "Strict: supplemental_groups alone, not the image's /etc/group",
        )
    return types.UserRequest(
        uid=uid,
        name=name,
        gid=gid,
        group=group,
        supplemental=tuple(
            checks.identity(g, "supplemental_groups") for g in context.supplemental_groups
        ),
        strict=strict(context.supplemental_groups_policy),
    )


def _wanted(context: _Context) -> tuple[int | None, str, int | None, str]:
    gid = None
    if context.HasField("run_as_group"):
        why.cri("process.user.gid", "linux.security_context.run_as_group")
        gid = checks.identity(context.run_as_group.value, "run_as_group")
    if context.HasField("run_as_user"):
        why.cri("process.user.uid", "linux.security_context.run_as_user")
        return checks.identity(context.run_as_user.value, "run_as_user"), "", gid, ""
    why.cri("process.user.uid", "linux.security_context.run_as_username")
    name = checks.line(context.run_as_username, "run_as_username")
    uid = checks.parse_identity(name, "run_as_username")
    return uid, "" if uid is not None else name, gid, ""


def _from_image(user: str) -> tuple[int | None, str, int | None, str]:
    name, _, group = checks.line(user, "image USER").partition(":")
    if name:
        why.image("process.user.uid", "config.User", name)
    else:
        why.default("process.user.uid", "root: neither the request nor the image names a user")
    if group:
        why.image("process.user.gid", "config.User", group)
    uid = checks.parse_identity(name, "image USER") if name else 0
    gid = checks.parse_identity(group, "image USER") if group else None
    return uid, "" if uid is not None else name, gid, "" if gid is not None else group


def strict(policy: api.SupplementalGroupsPolicy.ValueType) -> bool:
    """Return whether the image's /etc/group is left out. Raises InvalidArgument if unknown."""
    if policy not in (api.SupplementalGroupsPolicy.Merge, api.SupplementalGroupsPolicy.Strict):
        raise errors.InvalidArgument(f"supplemental_groups_policy: {int(policy)} is not known")
    return policy == api.SupplementalGroupsPolicy.Strict


# -- profiles --------------------------------------------------------------------------------------


def profile(
    present: bool, message: api.SecurityProfile, deprecated: str, field: str
) -> tuple[ProfileKind, str]:
    """Return which profile is asked for, and its localhost_ref.

    The SecurityProfile message wins over the old string. An absent one means "none" (critest). A
    Localhost profile without a reference is an error (CVE-2023-2431).
    """
    if present:
        kind, reference = _kind(message.profile_type, field), message.localhost_ref
        stray = bool(reference) and kind != "localhost"
        checks.unsupported(stray, f"{field}.localhost_ref", "only a Localhost profile has one")
    else:
        kind, reference = _deprecated(deprecated, field)
    if kind != "localhost":
        return kind, ""
    name = checks.line(reference.removeprefix("localhost/"), field)
    if not name:
        raise errors.InvalidArgument(f"{field}: Localhost needs localhost_ref")
    return kind, name


def _kind(kind: _Kind.ValueType, field: str) -> ProfileKind:
    if kind == _Kind.RuntimeDefault:
        return "default"
    if kind == _Kind.Unconfined:
        return "none"
    if kind == _Kind.Localhost:
        return "localhost"
    raise errors.InvalidArgument(f"{field}: profile type {int(kind)} is not known")


def _deprecated(value: str, field: str) -> tuple[ProfileKind, str]:
    if value in ("", "unconfined"):
        return "none", ""
    if value in ("runtime/default", "docker/default"):
        return "default", ""
    if value.startswith("localhost/"):
        return "localhost", value.removeprefix("localhost/")
    raise errors.InvalidArgument(f"{field}: {value[:200]!r} is not a profile")


def seccomp_request(
    context: _Context | api.LinuxSandboxSecurityContext,
) -> tuple[ProfileKind, str]:
    """Return the wanted seccomp profile and, for "localhost", the absolute path of its file.
    Privileged has none.
    """
    kind, path = profile(
        context.HasField("seccomp"), context.seccomp, context.seccomp_profile_path, "seccomp"
    )
    if kind == "localhost":
        path = checks.absolute(path, "seccomp.localhost_ref")
    _note_profile("linux.seccomp", context, "seccomp", kind)
    return ("none", "") if context.privileged else (kind, path)


def seccomp_path(context: _Context | api.LinuxSandboxSecurityContext) -> str:
    """Return the file to read for `seccomp_profile`, "" for none."""
    kind, path = seccomp_request(context)
    return path if kind == "localhost" else ""


def _note_profile(
    part: str,
    context: _Context | api.LinuxSandboxSecurityContext,
    field: str,
    kind: ProfileKind,
) -> None:
    source = why.cri if isinstance(context, _Context) else why.pod
    if kind == "none":
        why.default(part, "unconfined, as no profile is asked for")
    else:
        source(part, f"linux.security_context.{field}", _KIND_NAMES[kind])
    if context.privileged and kind != "none":
        because = "a privileged container is not confined"
        source(part, "linux.security_context.privileged", because, asked=_KIND_NAMES[kind])


def seccomp_profile(
    context: _Context | api.LinuxSandboxSecurityContext,
    *,
    held: Iterable[str],
    host: types.HostFacts,
    localhost: Mapping[str, object] | None,
    defaults: types.Defaults,
) -> Mapping[str, object] | oci.Seccomp | None:
    """Return the profile to write, None for unconfined. It is shared: do not change it.

    RuntimeDefault is the handler's own where it has one, and only logs where it says so.
    """
    kind, path = seccomp_request(context)
    if kind == "none":
        return None
    if not host.seccomp:
        raise errors.InvalidArgument("seccomp: this host's kernel has none")
    if kind == "default":
        return _runtime_default(frozenset(held), host, defaults)
    return seccompdocker.resolved(
        seccompfile.checked(localhost, path), held=frozenset(held), host=host
    )


def _runtime_default(
    held: frozenset[str], host: types.HostFacts, given: types.Defaults
) -> Mapping[str, object] | oci.Seccomp:
    profile: Mapping[str, object] | oci.Seccomp
    if given.seccomp is None:
        profile = seccomp.default(held, host.machine)
    else:
        why.handler("linux.seccomp", given.seccomp_key, "RuntimeDefault of this handler")
        profile = seccompdocker.resolved(given.seccomp, held=held, host=host)
    if given.seccomp_audit_key:
        why.handler("linux.seccomp", given.seccomp_audit_key, "what it denies is only logged")
        return seccompaudit.audited(profile)
    return profile


def apparmor(context: _Context | api.LinuxSandboxSecurityContext, host: types.HostFacts) -> str:
    """Return the AppArmor profile's name, "" for none; `apparmor` sees to it that it is loaded.

    A container that names none gets the default, as with the peers: the kubelet sends nothing for a
    pod that says nothing, and such a pod is not to be the less confined. Without AppArmor the
    default is void and a Localhost profile an error (behaviour.md §1.6). The default is void too
    where nothing can load it, as in containerd.
    """
    if _names_no_apparmor(context):
        return _apparmor_unasked(privileged=context.privileged, host=host)
    deprecated = context.apparmor_profile if isinstance(context, _Context) else ""
    kind, name = profile(context.HasField("apparmor"), context.apparmor, deprecated, "apparmor")
    _note_profile("process.apparmorProfile", context, "apparmor", kind)
    if kind == "none" or context.privileged:
        return ""
    if kind == "default":
        if not host.apparmor_default:
            lack = "apparmor_parser" if host.apparmor else "AppArmor"
            why.host("process.apparmorProfile", f"this host has no {lack}", asked="RuntimeDefault")
        return host.apparmor_default
    checks.unsupported(
        not host.apparmor, "apparmor", f"profile {name[:80]!r}: this host has no AppArmor"
    )
    return name


def _names_no_apparmor(context: _Context | api.LinuxSandboxSecurityContext) -> bool:
    """Say whether it is a container's and leaves the profile to us."""
    return (
        isinstance(context, _Context)
        and not context.HasField("apparmor")
        and not context.apparmor_profile
    )


def _apparmor_unasked(*, privileged: bool, host: types.HostFacts) -> str:
    name = "" if privileged else host.apparmor_default
    if privileged:
        because = "unconfined, as the container is privileged"
    elif name:
        because = "RuntimeDefault, as the container names no profile"
    else:
        because = "unconfined, as this host has no profile to load"
    why.default("process.apparmorProfile", because)
    return name
