# SPDX-License-Identifier: Apache-2.0
"""What is attached, on disk, so that DEL needs neither the namespace nor today's configuration.

    <cache_dir>/results/<network>-<container id>-<interface>     JSON, as libcni writes it

An entry is written before the first plugin of an ADD runs, without a result, and again with it. So
after a kill at any instruction whatever was allocated can be given back: an entry is there as long
as a DEL may be owed. Files change by rename, without fsync; one that a power loss broke is found as
an `Entry` without `config`, of which `cni` makes what it can. All functions block; callers run them
in a thread.
"""

import base64
import binascii
import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from cri_server import trees

KIND = "cniCacheV1"
UNFINISHED = ".new"  # what a file is called while it is written


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One attachment. `config` is the conflist's text, b"" when the file cannot be read."""

    network: str
    container_id: str
    ifname: str
    netns: str = ""
    config: bytes = b""
    args: tuple[tuple[str, str], ...] = ()
    capabilities: Mapping[str, object] = field(default_factory=dict)
    result: Mapping[str, object] | None = None

    @property
    def file_name(self) -> str:
        return f"{self.network}-{self.container_id}-{self.ifname}"


class Cache:
    """All entries below `<cache_dir>/results`, those of other runtimes on the host among them."""

    def __init__(self, cache_dir: Path) -> None:
        self._root = cache_dir
        self._results = cache_dir / "results"

    def write(self, entry: Entry) -> None:
        """Record the entry in place of the one with the same three names. Raises OSError."""
        temporary = self._root / f".{entry.file_name}{UNFINISHED}"
        self._results.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            _write(temporary, _encode(entry))
            temporary.rename(self._results / entry.file_name)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise

    def remove(self, entry: Entry) -> None:
        """Forget the entry; it need not be there, nor be a file. Raises OSError."""
        trees.remove(self._results / entry.file_name)

    def remove_unfinished(self, container_id: str, ifname: str) -> None:
        """Remove what a kill amid a `write` has left of one interface, if that can be."""
        ending = f"-{container_id}-{ifname}{UNFINISHED}"
        for name in _names(self._root):
            if name.startswith(".") and name.endswith(ending):
                with contextlib.suppress(OSError):
                    (self._root / name).unlink()

    def find(self, container_id: str, ifname: str) -> list[Entry]:
        """Return the entries of one interface: one, unless the network changed its name."""
        ending = f"-{container_id}-{ifname}"
        found: list[Entry] = []
        for name in _names(self._results):
            if name.endswith(ending):
                network = name.removesuffix(ending)
                lost = Entry(network=network, container_id=container_id, ifname=ifname)
                entry = self._read(name) or lost
                found.append(entry if entry.file_name == name else lost)
        return found

    def of_network(self, network: str) -> Iterator[Entry]:
        """Yield the entries of one network, whoever made them; of one that cannot be read its names
        alone, for what has an entry must keep its addresses.
        """
        for name in _names(self._results):
            if name.startswith(f"{network}-"):
                entry = self._read(name) or _named(name, network)
                if entry is not None and entry.network == network:
                    yield entry

    def _read(self, name: str) -> Entry | None:
        """Return the entry in a file; None when it is broken, no file, or gone since."""
        try:
            return _decode((self._results / name).read_bytes())
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError, binascii.Error):
            return None


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        return []


def _named(name: str, network: str) -> Entry | None:
    """Return what the name of a file tells; an id has no "-", the name of an interface may."""
    container_id, _, ifname = name.removeprefix(f"{network}-").partition("-")
    return Entry(network=network, container_id=container_id, ifname=ifname) if ifname else None


class _File(msgspec.Struct, rename="camel", omit_defaults=True):
    """The file's fields in libcni's order and by its names."""

    kind: str
    container_id: str
    config: str  # base64
    if_name: str
    network_name: str
    netns: str = ""
    cni_args: list[tuple[str, str]] | None = None
    capability_args: dict[str, object] | None = None
    result: dict[str, object] | None = None


def _encode(entry: Entry) -> bytes:
    return msgspec.json.encode(
        _File(
            kind=KIND,
            container_id=entry.container_id,
            config=base64.b64encode(entry.config).decode(),
            if_name=entry.ifname,
            network_name=entry.network,
            netns=entry.netns,
            cni_args=list(entry.args) or None,
            capability_args=dict(entry.capabilities) or None,
            result=dict(entry.result) if entry.result is not None else None,
        )
    )


def _decode(data: bytes) -> Entry | None:
    file = msgspec.json.decode(data, type=_File)
    if file.kind != KIND:
        return None
    return Entry(
        network=file.network_name,
        container_id=file.container_id,
        ifname=file.if_name,
        netns=file.netns,
        config=base64.b64decode(file.config),
        args=tuple(file.cni_args or ()),
        capabilities=file.capability_args or {},
        result=file.result,
    )


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb", opener=_private) as file:
        file.write(data)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
