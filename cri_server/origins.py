# SPDX-License-Identifier: Apache-2.0
"""Where each part of a config.json came from: the notes of `spec.why`, kept beside the bundle.

    containers/<id>/    config.json     origins.json
    pods/<id>/          sandbox.json    origins.json      what no config.json says of a sandbox
    pods/<id>/sandbox/  config.json     origins.json      the sandbox container, where there is one

    origins.json: {"process.cwd": [["image", "config.WorkingDir", "", ""]], …}

Written once the document stands, removed with its directory, read by `cri-server explain` alone:
losing it loses an explanation. `rows` lays document and notes side by side: one row for each part
that somebody would ask about.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from cri_server.spec import why

FILE, SANDBOX, CONFIG = "origins.json", "sandbox.json", "config.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One part of a config.json; `present` is False for a part that was left out.

    `notes` are the decisions that led to it, of which the last holds; () when nobody said anything.
    """

    part: str
    value: object
    present: bool
    notes: tuple[why.Note, ...]

    @property
    def unmet(self) -> str:
        """What was asked for and not given, "" when all was."""
        return self.notes[-1].asked if self.notes else ""

    @property
    def section(self) -> str:
        return self.part.partition(".")[0].partition("[")[0]

    @property
    def base(self) -> str:
        """The list that the part is an element of, else the part itself."""
        return self.part.partition("[")[0]


def write(
    directory: Path, found: why.Origins, *, document: Mapping[str, object] | None = None
) -> None:
    """Write the notes, and the document that they are about unless it is a config.json."""
    if document is not None:
        _replace(directory / SANDBOX, document)
    _replace(directory / FILE, found)


def _replace(path: Path, content: object) -> None:
    temporary = path.with_suffix(".tmp")  # somebody may be reading
    temporary.write_bytes(msgspec.json.encode(content))
    os.replace(temporary, path)


def read(directory: Path) -> why.Origins:
    """Return the notes of a document. Raises OSError, ValueError for a file that holds none."""
    return msgspec.json.decode((directory / FILE).read_bytes(), type=dict[str, list[why.Note]])


def amend(directory: Path, found: why.Origins, because: str) -> None:
    """Replace the notes of the parts in `found`, giving `because` as the reason of each.

    OK when there are none to amend: a bundle without notes is explained without them.
    """
    try:
        notes = read(directory)
    except (OSError, ValueError):
        return
    for part, said in found.items():
        notes[part] = [n._replace(because=n.because or because) for n in said]
    write(directory, notes)


def lowered(found: why.Origins) -> dict[str, str]:
    """Return the parts that are not as wanted because of the host, with what was wanted."""
    last = {part: notes[-1] for part, notes in found.items()}
    return {part: note.asked for part, note in last.items() if note.source == "host" and note.asked}


# -- rows ------------------------------------------------------------------------------------------


def explained(directory: Path) -> list[Row]:
    """Return the rows of the document in `directory`. Raises OSError, ValueError as `read`."""
    name = SANDBOX if (directory / SANDBOX).exists() else CONFIG
    document = msgspec.json.decode((directory / name).read_bytes(), type=dict[str, Any])
    return rows(document, read(directory))


def rows(document: Mapping[str, Any], found: why.Origins) -> list[Row]:
    """Return a row for each part of `document`, then one for each noted part that is not in it.

    Of a section that `document` does not have at all nothing is said.
    """
    parts = dict(parts_of(document))
    known = parts.keys() | {a for p in parts for a in _above(p)}
    present = [Row(part=p, value=v, present=True, notes=_said(p, found)) for p, v in parts.items()]
    absent = [
        Row(part=p, value=None, present=False, notes=tuple(said))
        for p, said in found.items()
        if p not in known
    ]
    return _ordered([*present, *(r for r in absent if r.section in known)])


def _ordered(rows: list[Row]) -> list[Row]:
    """Return the rows with what was left out beside its like."""
    sections = {section: n for n, section in enumerate(dict.fromkeys(r.section for r in rows))}
    bases = {base: n for n, base in enumerate(dict.fromkeys(r.base for r in rows))}
    return sorted(rows, key=lambda row: (sections[row.section], bases[row.base]))


def _said(part: str, found: why.Origins) -> tuple[why.Note, ...]:
    """Return what was noted of the part itself, else of the nearest one that contains it."""
    said = next((p for p in (part, *_above(part)) if p in found), None)
    return tuple(found[said]) if said is not None else ()


def _above(part: str) -> Iterator[str]:
    """Yield the parts that contain `part`: of "a.b[c.d]" first "a.b", then "a"."""
    while part:
        part = part.rpartition("[")[0] if part.endswith("]") else part.rpartition(".")[0]
        if part:
            yield part


def parts_of(document: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """Yield name and value of every part, as deep as somebody would ask."""
    for name, value in document.items():
        yield from _parts(name, value)


def _parts(part: str, value: object) -> Iterator[tuple[str, object]]:
    if part in _WHOLE or value in ({}, []):
        yield part, value
    elif part in _SETS:
        yield from _members(part, value)
    elif isinstance(value, list):
        key = _KEYS.get(part)
        for n, element in enumerate(value):
            yield f"{part}[{key(element) if key else n}]", element
    elif isinstance(value, dict):
        for name, child in value.items():
            yield from _parts(f"{part}[{name}]" if part in _MAPS else f"{part}.{name}", child)
    else:
        yield part, value


def _members(part: str, sets: Any) -> Iterator[tuple[str, object]]:
    """Yield each capability once, with the names of the sets that it is in."""
    members: dict[str, list[str]] = {}
    for name, held in sets.items():
        for capability in held:
            members.setdefault(capability, []).append(name)
    if not members:
        yield part, "none"
    for capability, of in members.items():
        yield f"{part}[{capability}]", " ".join(of)


def _rule(rule: Mapping[str, Any]) -> str:
    numbers = ":".join(str(rule.get(n, "*")) for n in ("major", "minor"))
    kind, verdict = rule.get("type", "a"), "" if rule["allow"] else "deny "
    return f"{verdict}{kind} {numbers} {rule.get('access', '')}"


# What tells the elements of a list apart; any other list is numbered.
_KEYS: Mapping[str, Callable[[Any], object]] = {
    "process.env": lambda entry: entry.partition("=")[0],
    "process.user.additionalGids": lambda gid: gid,
    "process.rlimits": lambda limit: limit["type"],
    "mounts": lambda mount: mount["destination"],
    "linux.namespaces": lambda namespace: namespace["type"],
    "linux.devices": lambda device: device["path"],
    "linux.maskedPaths": lambda path: path,
    "linux.readonlyPaths": lambda path: path,
    "linux.resources.devices": _rule,
    "linux.resources.hugepageLimits": lambda limit: limit["pageSize"],
}
_MAPS = frozenset(
    {
        "annotations",
        "linux.resources.unified",
        "linux.sysctl",
        "sandbox.namespaces",
        "sandbox.sysctls",
        "sandbox.files",
    }
)
_SETS = frozenset({"process.capabilities"})
_WHOLE = frozenset({"linux.seccomp"})
