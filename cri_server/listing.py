# SPDX-License-Identifier: Apache-2.0
"""How rows of an explanation look on a terminal: aligned, shortened, in the order of the document.

    process
      env[LANG]    de    cri   envs[0] ← image config.Env[1]
      oomScoreAdj  -500  host  CAP_SYS_RESOURCE is missing to go lower; asked for: -999 ← cri …

One line for each part: name, value, who had the last word, where it stands there or why; after an
arrow what was decided before. Colours only on a terminal. Lists of plain names whose elements came
about in the same way take one line together, unless all lines are asked for (`whole`).
"""

import itertools
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import msgspec

from cri_server import origins
from cri_server.spec import why

VALUE = 40  # characters of a value; --json has all of it
_COLOURS = {"cri": "32", "pod": "32", "image": "34", "handler": "35", "default": "36", "host": "33"}
_ABSENT = "-"
_Line = tuple[str, str, str, str]


def show(
    title: str, documents: Mapping[str, Sequence[origins.Row]], *, diff: bool, whole: bool
) -> None:
    """Print the rows of each document under its heading, or what is unmet in them."""
    print(title)
    for heading, rows in documents.items():
        if heading and rows:
            print(f"\n{heading}")
        _show_diff(rows) if diff else _show(rows, whole=whole)
    if diff and not any(documents.values()):
        print("all that was asked for was given")


def _show(rows: Sequence[origins.Row], *, whole: bool) -> None:
    lines = [(row.section, _line(row)) for row in (rows if whole else _merged(rows))]
    widths = _widths(line for _, line in lines)
    for section, group in itertools.groupby(lines, key=lambda line: line[0]):
        members = [line for _, line in group]
        if members[0][0] != section:
            print(_bold(section))
        for line in members:
            _print_line(line, widths)


def _show_diff(rows: Sequence[origins.Row]) -> None:
    for row in rows:
        last = row.notes[-1]
        print(_bold(row.part))
        print(f"  asked for  {short(last.asked)}  ({_before(row.notes) or _said(last)})")
        print(f"  given      {_value(row)}")
        print(f"  because    {last.source}: {_said(last)}")


# -- lines -----------------------------------------------------------------------------------------


def _line(row: origins.Row) -> _Line:
    name = "  " + plain(row.part.removeprefix(row.section).removeprefix("."))
    if row.part == row.section:
        name = row.section
    if not row.notes:
        return name, _value(row), "?", "nobody says"
    last = row.notes[-1]
    asked = f"; asked for: {short(last.asked)}" if last.asked else ""
    before = _before(row.notes)
    return name, _value(row), last.source, _said(last) + asked + (f" ← {before}" if before else "")


def _said(note: why.Note) -> str:
    return plain(": ".join(s for s in (note.field, note.because) if s))


def _before(notes: Sequence[why.Note]) -> str:
    earlier = (plain(f"{n.source} {n.field}".strip()) for n in reversed(notes[:-1]))
    return " ← ".join(dict.fromkeys(earlier))


def _widths(lines: Iterable[_Line]) -> tuple[int, int]:
    every = list(lines)
    return max(len(n) for n, *_ in every), max(len(v) for _, v, *_ in every)


def _print_line(line: _Line, widths: tuple[int, int]) -> None:
    name, value, source, because = line
    who = _coloured(f"{source:<7}", _COLOURS.get(source, "31"))
    print(f"{name:<{widths[0]}}  {value:<{widths[1]}}  {who}  {because}")


def _bold(text: str) -> str:
    return _coloured(plain(text), "1")


def _coloured(text: str, colour: str) -> str:
    on = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    return f"\x1b[{colour}m{text}\x1b[0m" if on else text


# -- lists that take one line ----------------------------------------------------------------------


def _merged(rows: Sequence[origins.Row]) -> list[origins.Row]:
    """Return the rows, those of one list of names with the same notes as one."""
    alike: dict[object, list[origins.Row]] = {}
    for row in rows:
        key = (row.base, row.present, row.notes) if row.base in _NAMES else row.part
        alike.setdefault(key, []).append(row)
    return [group[0] if len(group) == 1 else _together(group) for group in alike.values()]


def _together(group: Sequence[origins.Row]) -> origins.Row:
    first = group[0]
    names = " ".join(_key(row) for row in group)
    value = names if first.present else f"not {names}"
    part = f"{first.base} ({len(group)})"
    return origins.Row(part=part, value=value, present=True, notes=first.notes)


def _key(row: origins.Row) -> str:
    return row.part.removeprefix(f"{row.base}[").removesuffix("]")


_NAMES = frozenset(
    {
        "process.capabilities",
        "process.user.additionalGids",
        "linux.maskedPaths",
        "linux.readonlyPaths",
        "linux.resources.devices",
    }
)


# -- values ----------------------------------------------------------------------------------------


def _value(row: origins.Row) -> str:
    """Return a part's value as one short line."""
    if not row.present:
        return _ABSENT
    written = _WRITTEN.get(row.base) or _text
    return short(written(row.value) if row.value not in ([], {}) else "none")


def short(text: str) -> str:
    """Return a text, printable, without its middle if it is long: a path's end tells the most."""
    text, half = plain(text), VALUE // 2
    return text if len(text) <= VALUE else f"{text[:half]}…{text[1 - half :]}"


def plain(text: str) -> str:
    """Return the text with control characters written out: it may be hostile."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


def _text(value: object) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _mount(mount: Any) -> str:
    what = mount["source"] if mount["type"] == "bind" else mount["type"]
    return f"{','.join(mount['options'])} {what}"


def _seccomp(profile: Any) -> str:
    rules = profile.get("syscalls") or ()
    calls = {name for rule in rules for name in rule.get("names", ())}
    return f"{profile.get('defaultAction', '')} but for {len(calls)} system calls"


_WRITTEN: Mapping[str, Callable[[Any], str]] = {
    "process.user.umask": lambda umask: f"{umask:04o}",
    "process.env": lambda entry: entry.partition("=")[2],
    "process.rlimits": lambda limit: f"soft {limit['soft']} hard {limit['hard']}",
    "mounts": _mount,
    "linux.namespaces": lambda namespace: namespace.get("path") or "new",
    "linux.devices": lambda d: f"{d['type']} {d['major']}:{d['minor']} mode {d['fileMode']:o}",
    "linux.resources.hugepageLimits": lambda limit: str(limit["limit"]),
    "linux.resources.devices": lambda rule: "allow" if rule["allow"] else "deny",
    "linux.seccomp": _seccomp,
}
