# SPDX-License-Identifier: Apache-2.0
"""Drop-ins: files of `conf.d` beside the configuration, with more `[runtimes.NAME]` in them.

    10-kata.toml, fast.toml ─► read ─► DropIns(handlers, problems, held)

Each file is read for itself: one that is broken takes nothing away from another. What it could have
said about is `held`: a caller that knows an earlier state of those handlers goes on with it, and
one that does not must not take a handler of the same name from elsewhere, for that might isolate
less. Hidden files and those of another suffix, as editors leave them, are none of ours. Blocks;
nothing is remembered.
"""

import os
import re
import shutil
import stat
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cri_server import config, openers

SUFFIX = ".toml"
MAX_SIZE = 1 << 20
_HEADER = re.compile(
    r"""^\s*\[\s*runtimes\s*\.\s*(?:"([^"\n]+)"|'([^'\n]+)'|([A-Za-z0-9_-]+))""", re.MULTILINE
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """Something that is wrong with a drop-in: `message` names file, handler and line or key.

    `handler` is "" where the whole file is meant. With `holds` False the handler works, only not
    in all that it asks for.
    """

    file: str
    handler: str
    message: str
    holds: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One handler as a file has it."""

    file: str
    handler: config.Handler


@dataclass(frozen=True, kw_only=True, slots=True)
class DropIns:
    """What the folder holds. `held` are the handlers that problems leave as they were, with the
    reason; `broken` the files of which that is true as a whole.
    """

    handlers: Mapping[str, Entry] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    held: Mapping[str, str] = field(default_factory=dict)
    broken: frozenset[str] = frozenset()


class _Reading:
    """The folder, file by file."""

    def __init__(self) -> None:
        self.handlers: dict[str, Entry] = {}
        self.problems: list[Problem] = []
        self.held: dict[str, str] = {}
        self.broken: set[str] = set()

    def file(self, path: Path) -> None:
        text = ""
        try:
            text = _text(path)
            for name, table in _tables(text).items():
                self._handler(path, name, table)
        except FileNotFoundError:  # gone since
            return
        except (OSError, ValueError) as e:  # TOML's and config's errors are ValueErrors
            message = f"{path}: {e.strerror if isinstance(e, OSError) else e}"
            self.problems.append(Problem(file=path.name, handler="", message=message))
            self.broken.add(path.name)
            self.held |= {next(filter(None, names)): message for names in _HEADER.findall(text)}

    def _handler(self, path: Path, name: str, table: Any) -> None:
        where = f"{path}: [runtimes.{name}]"
        try:
            found = config.completed(name, config.handler_of(name, table, where), where)
            if name in self.handlers or name in self.held:
                raise config.ConfigError(f"{where}: an earlier file has this handler too")
        except config.ConfigError as e:
            self.problems.append(Problem(file=path.name, handler=name, message=str(e)))
            if name not in self.handlers:  # the earlier file's holds
                self.held[name] = str(e)
        else:
            self.handlers[name] = Entry(file=path.name, handler=found)


def read(folder: Path) -> DropIns:
    """Return what the files say, in the order of their names; a folder that is not there is empty.

    Nothing is raised: what is wrong is in the result.
    """
    reading = _Reading()
    for path in files(folder):
        reading.file(path)
    return DropIns(
        handlers={n: e for n, e in reading.handlers.items() if n not in reading.held},
        problems=tuple(reading.problems),
        held=reading.held,
        broken=frozenset(reading.broken),
    )


def files(folder: Path) -> list[Path]:
    """Return the drop-ins of a folder by name."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return []
    return [folder / name for name in names if is_one(name)]


def is_one(name: str) -> bool:
    """Say whether a file of this name counts."""
    return name.endswith(SUFFIX) and not name.startswith(".")


def _text(path: Path) -> str:
    with open(path, "rb", opener=openers.at_once) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise config.ConfigError("not a regular file")
        data = file.read(MAX_SIZE + 1)
    if len(data) > MAX_SIZE:
        raise config.ConfigError(f"larger than {MAX_SIZE} bytes")
    return data.decode()


def _tables(text: str) -> Mapping[str, Any]:
    document = tomllib.loads(text)
    if other := [key for key in document if key != "runtimes"]:
        raise config.ConfigError(f"{other[0]!r}: only [runtimes.NAME] can be in a drop-in")
    tables = document.get("runtimes", {})
    if not isinstance(tables, dict):
        raise config.ConfigError("[runtimes]: expected a table")
    return tables


def stamps(folder: Path, others: Iterable[str]) -> tuple[object, ...]:
    """Return what an edit changes of the drop-ins, or of other files, or of programs in PATH."""
    return tuple(_stamp(path) for path in (*map(os.fspath, files(folder)), *others))


def _stamp(path: str) -> tuple[object, ...]:
    try:
        s = os.stat(path if "/" in path else shutil.which(path) or path)
    except OSError:
        return (path,)
    return (path, s.st_mtime_ns, s.st_size, s.st_ino)
