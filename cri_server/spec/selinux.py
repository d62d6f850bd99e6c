# SPDX-License-Identifier: Apache-2.0
"""SELinux labels: the domain that a container runs in, and how its files are labelled.

    a label             user:role:type:level           system_u:system_r:container_t:s0:c12,c34
    of its processes    container_t; spc_t, which is not confined, when the container is privileged
                        or sees the host's processes or IPC
    of its files        object_r, container_file_t, with the same level

Every pod has a level of its own, a pair of categories, so that containers which all run in
container_t keep out of each other's files. What selinux_options name takes the place of a part: the
container's before the pod's. A privileged container is not confined whatever they say, as in
containerd. Without SELinux on the host nothing is labelled, and the options are only checked.

Pure. Which levels are taken, and what the host's policy calls its types, is known to
`cri_server.selinux_host`.
"""

import dataclasses
import re
import secrets
from collections.abc import Callable, Container
from dataclasses import dataclass

from cri_server import errors
from cri_server.pb import api_pb2 as api
from cri_server.spec import checks, oci, types, why

CATEGORIES = 1024
_PARTS = ("user", "role", "type", "level")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.]*")
_CATEGORY = r"c\d{1,4}(\.c\d{1,4})?"
_RANGE_END = rf"s\d{{1,2}}(:{_CATEGORY}(,{_CATEGORY})*)?"
_LEVEL = re.compile(f"{_RANGE_END}(-{_RANGE_END})?", re.ASCII)
_Mode = api.NamespaceMode


@dataclass(frozen=True, kw_only=True, slots=True)
class Label:
    """A security context by its parts."""

    user: str
    role: str
    type: str
    level: str

    def __str__(self) -> str:
        return f"{self.user}:{self.role}:{self.type}:{self.level}"


@dataclass(frozen=True, kw_only=True, slots=True)
class SelinuxLabels:
    """What a container's processes and its files are labelled; both "" without SELinux. `relabels`:
    volumes that ask for it take the label of its files.
    """

    process: str = ""
    mount: str = ""
    relabels: bool = True

    @property
    def mount_options(self) -> tuple[str, ...]:
        """Return the word that gives all files of a new mount the label."""
        return (f"context={self.mount}",) if self.mount else ()

    @property
    def shared(self) -> str:
        """Return the label of files for containers of several levels: one that all may see."""
        return str(dataclasses.replace(parse(self.mount), level="s0")) if self.mount else ""


def parse(text: str) -> Label:
    """Return the parts of "user:role:type:level"; the level may contain colons."""
    user, role, kind, level = text.split(":", 3)
    return Label(user=user, role=role, type=kind, level=level)


# -- levels ----------------------------------------------------------------------------------------


def new_level(taken: Container[str]) -> str:
    """Return a level that nobody has: one of half a million pairs of categories."""
    while True:
        one, other = sorted(secrets.randbelow(CATEGORIES) for _ in "12")
        level = f"s0:c{one},c{other}"
        if one != other and level not in taken:
            return level


def asked_level(config: api.PodSandboxConfig) -> str:
    """Return the level that the pod asks for, "" when it is to be given one."""
    return config.linux.security_context.selinux_options.level


# -- checks ----------------------------------------------------------------------------------------


def check(options: api.SELinuxOption) -> None:
    """Refuse parts that no label can have, SELinux or not (critest: "s0,c4,c5" is an error)."""
    for part in _PARTS[:3]:
        value = checks.line(getattr(options, part), f"selinux_options.{part}")
        if value and not _NAME.fullmatch(value):
            raise errors.InvalidArgument(
                f"selinux_options.{part}: {value[:80]!r} is not a {part} of a label"
            )
    level = checks.line(options.level, "selinux_options.level")
    if level and not (_LEVEL.fullmatch(level) and _categories_exist(level)):
        raise errors.InvalidArgument(f"selinux_options.level: {level[:80]!r} is not a level")


def _categories_exist(level: str) -> bool:
    return all(int(number) < CATEGORIES for number in re.findall(r"c(\d+)", level))


# -- labels ----------------------------------------------------------------------------------------


def of_sandbox(config: api.PodSandboxConfig, level: str, host: types.HostFacts) -> SelinuxLabels:
    """Return the labels that the pod's containers have in common; `mount` is for shared files."""
    context = config.linux.security_context
    if host.selinux is None:
        _note_void("sandbox.selinuxLabel", context.selinux_options)
        return SelinuxLabels()
    options, asked = context.namespace_options, _parts(context.selinux_options, level)
    process, mount = "sandbox.selinuxLabel", "sandbox.mountLabel"
    _note(asked, context, process=process, mount=mount, says=why.pod)
    return _labels(
        asked,
        host.selinux,
        privileged=context.privileged,
        unconfined=_Mode.NODE in (options.pid, options.ipc),
    )


def of_init(host: types.HostFacts) -> SelinuxLabels:
    """Return the labels of the sandbox container: not confined, as it is a program of the host's,
    which no policy lets a confined container begin with.
    """
    if host.selinux is None:
        return SelinuxLabels()
    process = dataclasses.replace(parse(host.selinux.process), type=host.selinux.unconfined)
    why.default("process.selinuxLabel", "it is a program of the host's")
    return SelinuxLabels(process=str(process))


def of_container(
    context: api.LinuxContainerSecurityContext,
    sandbox: api.PodSandboxConfig,
    level: str,
    host: types.HostFacts,
) -> SelinuxLabels:
    """Return the labels of a container in a pod with this level."""
    if host.selinux is None:
        for asking in (sandbox.linux.security_context, context):
            _note_void("process.selinuxLabel", asking.selinux_options)
        return SelinuxLabels()
    of_pod = sandbox.linux.security_context
    asked = _parts(of_pod.selinux_options, level) | _parts(context.selinux_options, "")
    options = of_pod.namespace_options
    process, mount = "process.selinuxLabel", "linux.mountLabel"
    _note(asked, context, process=process, mount=mount, says=why.cri)
    labels = _labels(
        asked,
        host.selinux,
        privileged=context.privileged,
        unconfined=_Mode.NODE in (options.pid, options.ipc),
    )
    if asked.get("type") != host.selinux.unconfined:
        return labels
    # It may use all files as they are, and would take those of others away from them.
    why.cri(mount, "linux.security_context.selinux_options.type", "no volume is relabelled for it")
    return dataclasses.replace(labels, relabels=False)


def label(document: oci.Spec, labels: SelinuxLabels) -> None:
    """Put the labels into a spec; none without SELinux."""
    if labels.process:
        document["process"]["selinuxLabel"] = labels.process
    if labels.mount:
        document["linux"]["mountLabel"] = labels.mount


def _parts(options: api.SELinuxOption, level: str) -> dict[str, str]:
    """Return the parts of a label that are decided."""
    named = {part: getattr(options, part) for part in _PARTS}
    named["level"] = named["level"] or level
    return {part: value for part, value in named.items() if value}


def _labels(
    asked: dict[str, str], policy: types.SelinuxPolicy, *, privileged: bool, unconfined: bool
) -> SelinuxLabels:
    process, file = parse(policy.process), parse(policy.file)
    same = {part: asked[part] for part in ("user", "level") if part in asked}
    file = dataclasses.replace(file, **same)
    if privileged:
        process = dataclasses.replace(process, type=policy.unconfined)
    elif unconfined and "type" not in asked:
        free = {part: value for part, value in asked.items() if part != "level"}
        process = dataclasses.replace(process, **{**free, "type": policy.unconfined})
    else:
        process = dataclasses.replace(process, **asked)
    return SelinuxLabels(process=str(process), mount=str(file))


def _note(
    asked: dict[str, str],
    context: api.LinuxContainerSecurityContext | api.LinuxSandboxSecurityContext,
    *,
    process: str,
    mount: str,
    says: Callable[[str, str, str], None],
) -> None:
    """Note why these two parts are as they are; `says` names the request that the context is of."""
    field = "linux.security_context"
    why.default(process, "of the host's policy, with a level of the pod's own")
    why.default(mount, "of the host's policy, with the level of its processes")
    for part in _PARTS:
        if getattr(context.selinux_options, part):
            says(process, f"{field}.selinux_options.{part}", asked[part])
    if context.privileged:
        says(process, f"{field}.privileged", "not confined")


def _note_void(part: str, options: api.SELinuxOption) -> None:
    named = ":".join(getattr(options, name) for name in _PARTS)
    if named.strip(":"):
        why.host(part, "this host has no SELinux policy for containers", asked=named)
