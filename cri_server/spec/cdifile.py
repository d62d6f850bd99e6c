# SPDX-License-Identifier: Apache-2.0
"""The format of CDI specification files (cncf-tags/container-device-interface, SPEC.md 1.1.0).

Pure: `parse` takes what JSON or YAML gave. As the specification wants it, an unknown field, an
unknown version, and a field newer than the version that the file names make the file invalid.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

# The known versions, oldest first; below 0.3.0 nothing was said of versions.
VERSIONS = (
    *("0.1.0", "0.2.0", "0.3.0", "0.4.0", "0.5.0"),
    *("0.6.0", "0.7.0", "0.8.0", "1.0.0", "1.1.0"),
)
_KIND = r"[A-Za-z]([A-Za-z0-9_.-]*[A-Za-z0-9])?"
_VENDOR, _CLASS = re.compile(_KIND), re.compile(_KIND)
_DEVICE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.:-]*[A-Za-z0-9])?")
HOOKS = (
    *("prestart", "createRuntime", "createContainer"),
    *("startContainer", "poststart", "poststop"),
)


class Invalid(ValueError):
    """It is no CDI specification; the text says why."""


class _Part(msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """A part of the file. Fields have the specification's names."""


class DeviceNode(_Part, frozen=True, kw_only=True):
    path: str
    host_path: str = ""
    type: str = ""
    major: int = 0
    minor: int = 0
    file_mode: int | None = None
    permissions: str = ""
    uid: int | None = None
    gid: int | None = None


class Mount(_Part, frozen=True, kw_only=True):
    host_path: str
    container_path: str
    options: tuple[str, ...] = ()
    type: str = ""


class Hook(_Part, frozen=True, kw_only=True):
    hook_name: str
    path: str
    args: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    timeout: int | None = None


class Edits(_Part, frozen=True, kw_only=True):
    """What is to be done to a container. `intel_rdt` and `net_devices` are here to be refused."""

    env: tuple[str, ...] = ()
    device_nodes: tuple[DeviceNode, ...] = ()
    net_devices: tuple[dict[str, Any], ...] = ()
    hooks: tuple[Hook, ...] = ()
    mounts: tuple[Mount, ...] = ()
    intel_rdt: dict[str, Any] | None = None
    additional_gids: tuple[int, ...] = ()


class Device(_Part, frozen=True, kw_only=True):
    name: str
    annotations: dict[str, str] = {}
    container_edits: Edits


class File(_Part, frozen=True, kw_only=True):
    """A file: `kind` is "vendor/class", the edits are for all of its devices."""

    cdi_version: str
    kind: str
    annotations: dict[str, str] = {}
    devices: tuple[Device, ...]
    container_edits: Edits = Edits()


def parse(document: object) -> File:
    """Return the file's content, checked. Raises Invalid."""
    try:
        found = msgspec.convert(_without_nulls(document), File)
    except msgspec.ValidationError as e:
        raise Invalid(str(e)) from e
    _check_version(found)
    vendor, _, kind = found.kind.partition("/")
    if not (_VENDOR.fullmatch(vendor) and _CLASS.fullmatch(kind)):
        raise Invalid(f"kind {found.kind[:100]!r} is not VENDOR/CLASS")
    names = [d.name for d in found.devices]
    if not names or len(set(names)) != len(names):
        raise Invalid("devices: none, or two of one name")
    for device in found.devices:
        if not _DEVICE.fullmatch(device.name):
            raise Invalid(f"devices: {device.name[:100]!r} is not a device's name")
    for edits in _all_edits(found):
        _check_edits(edits)
    return found


def is_name(text: str) -> bool:
    """Say whether this is a qualified device name, vendor/class=device."""
    vendor, slash, rest = text.partition("/")
    kind, equals, device = rest.partition("=")
    parts = _VENDOR.fullmatch(vendor) and _CLASS.fullmatch(kind) and _DEVICE.fullmatch(device)
    return bool(slash and equals and parts)


def _all_edits(found: File) -> Iterator[Edits]:
    yield found.container_edits
    for device in found.devices:
        yield device.container_edits


def _without_nulls(value: object) -> object:
    """Drop keys without a value: in Go, where the format comes from, they mean the default."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_nulls(v) for v in value]
    return value


# -- versions --------------------------------------------------------------------------------------


def _check_version(found: File) -> None:
    version = found.cdi_version.removeprefix("v")
    if version not in VERSIONS:
        raise Invalid(f"cdiVersion {found.cdi_version[:40]!r} is not known")
    needed = max(_needed(found), key=VERSIONS.index)
    if VERSIONS.index(version) < VERSIONS.index(needed):
        raise Invalid(f"cdiVersion {version} is older than what it uses, which is of {needed}")


def _needed(found: File) -> Iterator[str]:
    """Yield the versions in which what the file uses came in."""
    yield VERSIONS[0]
    if found.annotations or "." in found.kind.partition("/")[2]:
        yield "0.6.0"
    for device in found.devices:
        if device.annotations:
            yield "0.6.0"
        if device.name[:1].isdigit():
            yield "0.5.0"
    for edits in _all_edits(found):
        if edits.net_devices:
            yield "1.1.0"
        if edits.intel_rdt is not None or edits.additional_gids:
            yield "0.7.0"
        if any(node.host_path for node in edits.device_nodes):
            yield "0.5.0"
        if any(mount.type for mount in edits.mounts):
            yield "0.4.0"


# -- edits -----------------------------------------------------------------------------------------


def _check_edits(edits: Edits) -> None:
    _check_env(edits.env)
    for node in edits.device_nodes:
        _check_absolute("deviceNodes", node.path, node.host_path or node.path)
        _check_node(node)
    for mount in edits.mounts:
        _check_absolute("mounts", mount.container_path)
        if not mount.host_path:
            raise Invalid(f"mounts: {mount.container_path[:200]!r} has no hostPath")
    for hook in edits.hooks:
        _check_absolute("hooks", hook.path)
        _check_env(hook.env)
        if hook.hook_name not in HOOKS or (hook.timeout is not None and hook.timeout <= 0):
            raise Invalid(f"hooks: {hook.hook_name[:40]!r} is not a hook, or has no time")
    if not all(0 <= gid < 1 << 31 for gid in edits.additional_gids):
        raise Invalid("additionalGids: not a group")


def _check_env(variables: Iterable[str]) -> None:
    for variable in variables:
        if variable.find("=") <= 0 or "\0" in variable:
            raise Invalid(f"env: {variable[:80]!r} is not NAME=VALUE")


def _check_absolute(field: str, *paths: str) -> None:
    for path in paths:
        if not path.startswith("/") or "\0" in path:
            raise Invalid(f"{field}: {path[:200]!r} is not an absolute path")


def _check_node(node: DeviceNode) -> None:
    where = f"deviceNodes: {node.path[:200]!r}"
    if node.type not in ("", "b", "c", "u", "p"):
        raise Invalid(f"{where}: type {node.type[:20]!r} is not b, c, u or p")
    if node.permissions != "none" and not set(node.permissions) <= set("rwm"):
        raise Invalid(f"{where}: permissions {node.permissions[:20]!r} are not among r, w, m")
    ids = (node.uid or 0, node.gid or 0, node.major, node.minor)
    if not all(0 <= number < 1 << 31 for number in ids):
        raise Invalid(f"{where}: a number out of range")
