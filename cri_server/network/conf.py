# SPDX-License-Identifier: Apache-2.0
"""CNI configuration: which file of /etc/cni/net.d counts, and what it says.

    10-a.conflist, 20-b.conf ─► by name, the first that is valid ─► Chain(name, version, plugins)
    NAME/*.conf              ─► by name, behind the plugins of the .conflist whose network is NAME

A file that cannot be used is skipped and named, with the reason, in `Loaded.skipped`.
`Directory.load` looks at names, times and sizes on every call and reads only what changed, so an
edit counts at once and nothing has to be watched. Nothing is written here. A Chain carries its own
text, so that it can be stored and used when the file is gone.
"""

import contextlib
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast

import msgspec

VERSIONS = ("0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")  # oldest first
SUFFIXES = (".conf", ".conflist", ".json")
MAX_SIZE = 1 << 20
# Those of the CNI project, behind which stands no agent that does more than their configuration.
STANDARD = frozenset(
    {"bandwidth", "bridge", "dummy", "firewall", "host-device", "ipvlan", "loopback", "macvlan"}
    | {"portmap", "ptp", "sbr", "tuning", "vlan", "vrf"}
)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]*")
Document = Mapping[str, object]
Stamp = tuple[str, int, int, int]
Signature = tuple[Stamp, ...]


class Invalid(ValueError):
    """A configuration that cannot be used; the text says why, without the file's name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plugin:
    """One link of a chain: `type` is the name of its program, `document` its configuration."""

    type: str
    document: Document

    def accepts(self, capability: str) -> bool:
        """Say whether the configuration declares a capability, so that its argument is passed."""
        declared = self.document.get("capabilities")
        return isinstance(declared, dict) and declared.get(capability) is True


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Chain:
    """One network. `source` is the text of a conflist that `parse` turns into the same again."""

    name: str
    version: str
    plugins: tuple[Plugin, ...]
    source: bytes
    path: str = ""
    disable_check: bool = False
    disable_gc: bool = False

    def speaks(self, version: str) -> bool:
        """Say whether the plugins are spoken to in this version of CNI or a later one."""
        return VERSIONS.index(self.version) >= VERSIONS.index(version)

    def accepts(self, capability: str) -> bool:
        """Say whether a plugin declares a capability."""
        return any(p.accepts(capability) for p in self.plugins)

    def extended(self, plugin: Document) -> "Chain":
        """Return the same network with one more plugin at its end."""
        document = decode(self.source)
        plugins = [dict(p.document) for p in self.plugins]
        return parse(msgspec.json.encode({**document, "plugins": [*plugins, plugin]}), self.path)

    def renamed(self, name: str) -> "Chain":
        """Return the same plugins for a network of another name. Raises Invalid."""
        return parse(msgspec.json.encode({**decode(self.source), "name": name}), self.path)

    @property
    def standard(self) -> bool:
        """Whether there are only plugins that do what their configuration says and no more."""
        return all(p.type in STANDARD for p in self.plugins)


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """What a directory holds. `skipped` has one "file: reason" for each that cannot be used."""

    chain: Chain | None = None
    skipped: tuple[str, ...] = ()


class Place(NamedTuple):
    """Where a network is described: the first valid file of a directory, or `file` in it alone."""

    directory: Path
    file: str = ""

    def __str__(self) -> str:
        return os.fspath(self.directory / self.file if self.file else self.directory)


class Directory:
    """The configurations of one place, read again when they change."""

    def __init__(self, path: Path, file: str = "") -> None:
        self.place = Place(path, file)
        self._seen: tuple[Signature, Loaded] | None = None

    def load(self) -> Loaded:
        """Return what holds now. A few stat calls when nothing changed; any thread may call it."""
        signature = self._signature()
        if self._seen is None or self._seen[0] != signature:
            self._seen = (signature, self._read([name for name, *_ in signature]))
        return self._seen[1]

    def _signature(self) -> Signature:
        found: list[Stamp] = []
        try:
            with os.scandir(self.place.directory) as entries:
                for entry in entries:
                    if entry.name.endswith(SUFFIXES) and self.place.file in ("", entry.name):
                        found += _stamp(entry)
                    if _NAME.fullmatch(entry.name) and entry.is_dir():
                        found += _stamps_in(entry)
        except OSError:
            return ()
        return tuple(sorted(found))

    def _read(self, names: Sequence[str]) -> Loaded:
        skipped: list[str] = []
        for name in names:
            if "/" in name:
                continue
            try:
                chain = parse(self._whole(name, names), os.fspath(self.place.directory / name))
                return Loaded(chain=chain, skipped=tuple(skipped))
            except (Invalid, OSError) as e:
                reason = e.strerror if isinstance(e, OSError) else e
                skipped.append(f"{name}: {reason}")
        return Loaded(skipped=tuple(skipped))

    def _whole(self, name: str, names: Sequence[str]) -> bytes:
        """Return the text of a file, of a conflist with the plugins in its network's folder, as
        libcni 1.3 loads them. Raises Invalid, OSError.
        """
        data = _content(self.place.directory / name)
        document = decode(data) if name.endswith(".conflist") else {}
        plugins = document.get("plugins", [])
        more = [n for n in names if n.startswith(f"{document.get('name')}/")]
        if not more or not isinstance(plugins, list) or _flag(document, "loadOnlyInlinedPlugins"):
            return data
        return msgspec.json.encode({**document, "plugins": [*plugins, *map(self._plugin, more)]})

    def _plugin(self, name: str) -> Document:
        try:
            return decode(_content(self.place.directory / name))
        except Invalid as e:
            raise Invalid(f"{name}: {e}") from e


def _stamps_in(folder: os.DirEntry[str]) -> Iterator[Stamp]:
    """Describe the plugins in a folder of the directory; there are none where it cannot be read."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(".conf"):
                yield from _stamp(entry, f"{folder.name}/")


def _stamp(entry: os.DirEntry[str], folder: str = "") -> list[Stamp]:
    """Describe a regular file by what an edit changes; a fifo would block whoever opens it."""
    try:
        s = entry.stat()
    except FileNotFoundError:  # a dangling link, or gone since
        return []
    if not stat.S_ISREG(s.st_mode):
        return []
    return [(folder + entry.name, s.st_mtime_ns, s.st_size, s.st_ino)]


def _content(path: Path) -> bytes:
    with path.open("rb") as file:
        data = file.read(MAX_SIZE + 1)
    if len(data) > MAX_SIZE:
        raise Invalid(f"larger than {MAX_SIZE} bytes")
    return data


def parse(data: bytes, path: str = "") -> Chain:
    """Return the chain that a conflist, or a single plugin's configuration, describes.

    Raises Invalid. Rules: CNI specification §1; names are restricted because they become file
    names, types because they become paths of programs (CVE-2021-20206).
    """
    document = decode(data)
    if "plugins" not in document:
        return _single(document, path)
    plugins = document["plugins"]
    if not isinstance(plugins, list) or not plugins:
        raise Invalid("'plugins' is not a list of plugins")
    return Chain(
        name=_name(document.get("name")),
        version=_version(document),
        plugins=tuple(_plugin(p) for p in plugins),
        source=data,
        path=path,
        disable_check=_flag(document, "disableCheck"),
        disable_gc=_flag(document, "disableGC"),
    )


def decode(data: bytes) -> dict[str, object]:
    """Return a JSON object. Raises Invalid for anything else."""
    try:
        document = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        raise Invalid(f"not JSON: {e}") from e
    if not isinstance(document, dict):
        raise Invalid("not a JSON object")
    return cast("dict[str, object]", document)


def _single(document: Document, path: str) -> Chain:
    """Turn one plugin's configuration into a list of one."""
    if "type" not in document:
        raise Invalid("neither 'plugins' nor 'type'")
    outer = {k: document[k] for k in ("cniVersion", "name") if k in document}
    return parse(msgspec.json.encode({**outer, "plugins": [document]}), path)


def _name(name: object) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name) or len(name) > 128:
        raise Invalid(f"'name' {str(name)[:80]!r} is not a network name")
    return name


def _version(document: Document) -> str:
    """Return the highest version offered that we know."""
    offered = [document.get("cniVersion")]
    more = document.get("cniVersions")
    offered += more if isinstance(more, list) else []
    for version in reversed(VERSIONS):
        if version in offered:
            return version
    raise Invalid(f"'cniVersion' {str(offered[0])[:80]!r} is none of {', '.join(VERSIONS)}")


def _plugin(document: object) -> Plugin:
    if not isinstance(document, dict):
        raise Invalid("a plugin is not a JSON object")
    ipam = document.get("ipam")
    if isinstance(ipam, dict) and ipam.get("type"):
        _check_type(ipam["type"])
    return Plugin(type=_check_type(document.get("type")), document=document)


def _check_type(name: object) -> str:
    """Return a plugin's name if it can only mean a program in one of the plugin directories."""
    if not isinstance(name, str) or not name:
        raise Invalid("a plugin without 'type'")
    if name in (".", "..") or "/" in name or not name.isprintable() or len(name) > 255:
        raise Invalid(f"plugin type {name[:80]!r} is not the name of a program")
    return name


def _flag(document: Document, key: str) -> bool:
    value = document.get(key, False)
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, bool):
        raise Invalid(f"{key!r} is neither true nor false")
    return value
