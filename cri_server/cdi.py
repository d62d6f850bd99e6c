# SPDX-License-Identifier: Apache-2.0
"""CDI specification files: read when they change, resolved to what they do to a container.

    [runtime] cdi_spec_dirs      later folders stand above earlier ones
        vendor.yaml  .json       one kind of devices each (`spec.cdifile`)

Nothing is read before somebody asks for a device; then every folder is listed and what has changed
is read. A file that cannot be used takes nothing with it but its own devices, and is named when
one of those is asked for. Its hooks run as root, so it must be root's alone. Functions block, and
for ever when a device node lies on dead storage: callers use `own_thread`. Nothing is kept on disk.
"""

import errno
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import structlog

from cri_server import errors, openers, spec
from cri_server.spec import cdifile, oci

log = structlog.get_logger()
FILE_LIMIT = 4 << 20  # bytes; a node with 16 GPUs in parts has about 0.3 MB
DEPTH = 32  # of the format itself: 6
NAMED_FILES = 3  # unusable files that an error names
_SUFFIXES = (".yaml", ".json")
_KINDS = {stat.S_IFCHR: "c", stat.S_IFBLK: "b", stat.S_IFIFO: "p"}
_MAPPED = {"idmap", "ridmap"}  # mount options that OCI runtimes of today ignore in silence
# A hook without an environment would get that of whoever runs it (CVE-2025-23266: the image's).
HOOK_ENV = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_Stamp = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Read:
    """A file as it was read: its content, or why it has none."""

    stamp: _Stamp
    content: cdifile.File | None = None
    failure: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Found:
    """A device and the file that has it."""

    path: Path
    file: cdifile.File
    device: cdifile.Device


class Registry:
    """The files of some folders. Threads may share it: what is known is replaced as a whole."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = tuple(folders)
        self._known: Mapping[Path, _Read] = {}

    def resolve(self, names: Sequence[str], *, bound: bool = False) -> spec.Injection:
        """Return what these devices (`spec.cdi_requests`) do to a container. `bound`: its nodes
        will be the host's own, for nobody makes nodes in a user namespace; so they must be there.

        Raises FailedPrecondition naming the device: nobody has it, two files of one folder have it,
        or what it needs of the host is not there; InvalidArgument for edits that are not supported.
        """
        self._known = self._refreshed()
        found = {name: self._find(name) for name in names}
        edits: list[tuple[str, cdifile.Edits]] = []
        seen: set[Path] = set()
        for name, one in found.items():
            if one.path not in seen:
                edits.append((name, one.file.container_edits))
                seen.add(one.path)
            edits.append((name, one.device.container_edits))
        return _injection(tuple(names), edits, bound=bound)

    def _find(self, name: str) -> _Found:
        for folder in reversed(self._folders):
            found = list(self._in_folder(folder, name))
            if len(found) > 1:
                paths = " and ".join(str(f.path) for f in found[:2])
                raise errors.FailedPrecondition(f"CDI device {name!r} is in both {paths}")
            if found:
                return found[0]
        unusable = [f"{path}: {read.failure}" for path, read in self._known.items() if read.failure]
        also = "; ".join(["", *unusable[:NAMED_FILES]])
        raise errors.FailedPrecondition(f"CDI device {name!r} is not known{also}")

    def _in_folder(self, folder: Path, name: str) -> Iterator[_Found]:
        kind, _, wanted = name.partition("=")
        for path, read in self._known.items():
            if path.parent == folder and read.content is not None and read.content.kind == kind:
                for device in read.content.devices:
                    if device.name == wanted:
                        yield _Found(path=path, file=read.content, device=device)

    # -- reading ----------------------------------------------------------------------------------

    def _refreshed(self) -> dict[Path, _Read]:
        return {path: self._read(path) for folder in self._folders for path in _files(folder)}

    def _read(self, path: Path) -> _Read:
        known = self._known.get(path)
        try:
            stamp = _stamp(path)
            if known is not None and known.stamp == stamp:
                return known
            read = _Read(stamp=stamp, content=cdifile.parse(_document(path)))
        except OSError as e:
            read = _Read(stamp=(), failure=e.strerror or str(e))
        except (ValueError, RecursionError) as e:
            read = _Read(stamp=stamp, failure=" ".join(str(e).split())[:300])
        if read.failure:
            log.warning("CDI file not used", path=str(path), reason=read.failure)
        return read


def _files(folder: Path) -> list[Path]:
    """Return the specification files of a folder; folders in it are not looked into."""
    try:
        return sorted(p for p in folder.iterdir() if p.suffix in _SUFFIXES)
    except FileNotFoundError:
        return []
    except OSError as e:
        raise errors.FailedPrecondition(f"CDI folder {folder}: {e.strerror}") from e


def _stamp(path: Path) -> _Stamp:
    """Return what changes when a file, or who owns its folder, does."""
    st, folder = os.stat(path), os.stat(path.parent)
    of_folder = folder.st_uid, folder.st_gid, folder.st_mode
    return st.st_dev, st.st_ino, st.st_size, st.st_mtime_ns, st.st_ctime_ns, *of_folder


def _document(path: Path) -> object:
    """Return what JSON or YAML makes of a file. Raises OSError, ValueError."""
    _check_owner(os.stat(path.parent))
    with open(path, "rb", opener=openers.at_once) as file:
        st = os.fstat(file.fileno())
        if not stat.S_ISREG(st.st_mode):
            raise cdifile.Invalid("it is not a regular file")
        _check_owner(st)
        text = file.read(FILE_LIMIT + 1)
    if len(text) > FILE_LIMIT:
        raise cdifile.Invalid(f"it is larger than {FILE_LIMIT} bytes")
    return msgspec.json.decode(text) if path.suffix == ".json" else _yaml(text)


def _check_owner(st: os.stat_result) -> None:
    """Refuse what another than root may change: hooks are run as root."""
    others = stat.S_IWOTH | (stat.S_IWGRP if st.st_gid else 0)
    if st.st_uid or st.st_mode & others:
        what = "folder" if stat.S_ISDIR(st.st_mode) else "file"
        raise cdifile.Invalid(f"the {what} is not root's, or others may write to it")


def _yaml(text: bytes) -> object:
    import yaml  # 2 MB that most hosts have no use for

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    depth = 0
    try:
        for event in yaml.parse(text, loader):  # first, as the fast loader dies of deep nesting
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > DEPTH:
                raise cdifile.Invalid("it is nested too deep")
            if isinstance(event, yaml.AliasEvent):  # a few of them can stand for any amount
                raise cdifile.Invalid("it has YAML aliases: write out what they stand for")
        return yaml.load(text, loader)  # noqa: S506  (a safe one)
    except yaml.YAMLError as e:
        raise cdifile.Invalid(f"it is not YAML: {e}") from e


# -- what the edits do -----------------------------------------------------------------------------


def _injection(
    names: tuple[str, ...], edits: Sequence[tuple[str, cdifile.Edits]], *, bound: bool
) -> spec.Injection:
    for name, edit in edits:
        refused = {"intelRdt": edit.intel_rdt is not None, "netDevices": bool(edit.net_devices)}
        for field, present in refused.items():
            if present:
                raise errors.InvalidArgument(f"CDI device {name!r}: {field} is not supported")
    mounts = [_mount(name, m) for name, edit in edits for m in edit.mounts]
    return spec.Injection(
        devices=names,
        env=tuple(v for _, edit in edits for v in edit.env),
        nodes=tuple(_node(name, n, bound) for name, edit in edits for n in edit.device_nodes),
        mounts=tuple({m["destination"]: m for m, _ in mounts}.values()),
        hooks=tuple((h.hook_name, _hook(h)) for _, edit in edits for h in edit.hooks),
        gids=tuple(gid for _, edit in edits for gid in edit.additional_gids if gid),
        files=frozenset(m["source"] for m, plain in mounts if plain),
    )


def _node(name: str, node: cdifile.DeviceNode, bound: bool) -> spec.Node:
    """Look up what the file does not tell; type and major together need no look unless `bound`."""
    kind = {"u": "c"}.get(node.type, node.type)
    major, minor = node.major, node.minor
    host_path = node.host_path or node.path
    if bound or (kind != "p" and not (kind and major)):
        found, found_major, found_minor = _looked_up(name, host_path)
        if kind not in ("", found):
            raise _missing(name, node.path, f"is of type {found}, not {node.type}")
        kind, major, minor = found, major or found_major, minor or found_minor
        if bound and (major, minor) != (found_major, found_minor):
            raise _missing(name, host_path, f"is {found_major}:{found_minor}, not {major}:{minor}")
    permissions = {"": "rwm", "none": ""}.get(node.permissions, node.permissions)
    return spec.Node(
        path=os.path.normpath(node.path),
        host_path=host_path,
        kind=kind,
        major=major,
        minor=minor,
        mode=node.file_mode if node.file_mode is None else stat.S_IMODE(node.file_mode),
        uid=node.uid,
        gid=node.gid,
        access="" if kind == "p" else "".join(dict.fromkeys(permissions)),
    )


def _looked_up(name: str, path: str) -> tuple[str, int, int]:
    try:
        st = os.stat(path)
    except OSError as e:
        raise _missing(name, path, e.strerror or "") from e
    kind = _KINDS.get(stat.S_IFMT(st.st_mode))
    if kind is None:
        raise _missing(name, path, "is not a device")
    return kind, os.major(st.st_rdev), os.minor(st.st_rdev)


def _mount(name: str, mount: cdifile.Mount) -> tuple[oci.Mount, bool]:
    """Return the mount, and whether its source is no folder."""
    target, options = os.path.normpath(mount.container_path), list(mount.options)
    if refused := _MAPPED & set(options):
        raise errors.InvalidArgument(
            f"CDI device {name!r}: mount {target[:200]!r}: option {min(refused)} is not supported"
        )
    bind = bool({"bind", "rbind"} & set(options))
    if not bind and mount.type not in ("", "none", "bind"):
        made = oci.Mount(
            destination=target, type=mount.type, source=mount.host_path, options=options
        )
        return made, False
    try:
        source = os.path.realpath(mount.host_path, strict=True)
        plain = not stat.S_ISDIR(os.stat(source).st_mode)
    except OSError as e:
        raise _missing(name, mount.host_path, e.strerror or os.strerror(errno.ENOENT)) from e
    options = options if bind else ["rbind", *options]
    return oci.Mount(destination=target, type="bind", source=source, options=options), plain


def _hook(hook: cdifile.Hook) -> oci.Hook:
    made = oci.Hook(path=hook.path, args=list(hook.args), env=list(hook.env) or [HOOK_ENV])
    if hook.timeout is not None:
        made["timeout"] = hook.timeout
    return made


def _missing(name: str, path: str, why: str) -> errors.FailedPrecondition:
    return errors.FailedPrecondition(f"CDI device {name!r}: {path[:200]!r}: {why}")
