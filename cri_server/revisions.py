# SPDX-License-Identifier: Apache-2.0
"""A revision: one handler as it was at one time, for the pods that were made with it.

    <root>/handlers/<name>@<digest>.json      name, where it stood, settings, seccomp profile

Records of pods and containers say the key, "<name>@<digest>". The file is there, by rename, before
the first record that says it, so a pod finds its handler after a restart, whatever the
configuration is by then. `handlers` says when one is not needed any more; a crash leaves one too
many, never one too few. Records of earlier versions say a plain name, and mean the handler of now.
"""

import contextlib
import dataclasses
import hashlib
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import structlog

from cri_server import config

log = structlog.get_logger()
_DIGITS = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class Revision:
    """A handler with all that its containers take from files: `seccomp` is what `seccomp_profile`
    held. `source` is the drop-in that it stood in, "" for the configuration file or none.
    """

    key: str
    name: str
    handler: config.Handler
    source: str = ""
    seccomp: Mapping[str, Any] | None = None

    def label(self, option: str) -> str:
        """Return what people call an option of it, "" where it has its default."""
        if getattr(self.handler, option) == getattr(config.PLAIN, option):
            return ""
        return f"[runtimes.{self.name}] {option}" + (f" ({self.source})" if self.source else "")


def make(
    name: str,
    handler: config.Handler,
    *,
    source: str = "",
    seccomp: Mapping[str, Any] | None = None,
) -> Revision:
    """Return the revision; the same settings have the same key, wherever they stand."""
    text = msgspec.json.encode([handler, seccomp], order="sorted")
    key = f"{name}@{hashlib.sha256(text).hexdigest()[:_DIGITS]}"
    return Revision(key=key, name=name, handler=handler, source=source, seccomp=seccomp)


def name_of(key: str) -> str:
    """Return the handler's name, as requests say it."""
    return key.partition("@")[0]


class Store:
    """The revisions on disk. Its methods block for a moment; threads may share it."""

    def __init__(self, root: Path) -> None:
        self._folder = root / "handlers"
        self._writing = threading.Lock()  # the first pods of a handler come at once

    def write(self, revision: Revision) -> None:
        """Keep a revision; the same again changes nothing. Raises OSError."""
        path = self._path(revision.key)
        with self._writing:
            if not path.exists():
                self._write(path, revision)

    def _write(self, path: Path, revision: Revision) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        try:
            temporary.write_bytes(msgspec.json.encode(dataclasses.asdict(revision)))
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise

    def read(self) -> Iterator[Revision]:
        """Yield all that are kept; one that cannot be read is logged and left where it is. What a
        crash left half written is removed: nothing else runs yet.
        """
        for leftover in self._folder.glob("*.tmp"):
            with contextlib.suppress(OSError):
                leftover.unlink()
        for path in sorted(self._folder.glob("*.json")):
            try:
                yield msgspec.json.decode(path.read_bytes(), type=Revision)
            except (OSError, ValueError) as e:  # msgspec's errors and config's are ValueErrors
                log.error("handler of earlier pods not readable", path=str(path), error=str(e))

    def keys(self) -> set[str]:
        """Return the keys of all files, readable or not."""
        return {path.stem for path in self._folder.glob("*.json")}

    def forget(self, key: str) -> None:
        """Drop a revision; OK when it is not there."""
        self._path(key).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.json"
