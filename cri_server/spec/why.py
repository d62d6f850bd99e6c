# SPDX-License-Identifier: Apache-2.0
"""Why each part of a config.json is as it is: noted where it is decided, kept by whoever records.

    with why.recorded() as origins:                     a caller that wants to know
        document = spec.container(wanted)

    why.image("process.cwd", "config.WorkingDir")       at the line that decides
    why.host("process.oomScoreAdj", "CAP_SYS_RESOURCE is missing", asked=-999)

A part is named by its path in config.json; an element of a list by what tells it from the others,
in brackets: `process.env[PATH]`, `mounts[/proc]`, `linux.namespaces[pid]` (`cri_server.origins` has
the list). A note on a part is a note on all below it. A part may be decided more than once: the
notes form a chain in which the last one holds. A note with `asked` says that somebody wanted
another value and did not get it; a note on a part that is not in the config.json, why it is not.

Notes go to the recording of the running context, like a log; without one they are dropped, so that
a validation costs nothing for it. A recording is a plain value: nothing here outlives the block.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Literal, NamedTuple

Source = Literal["cri", "pod", "image", "handler", "default", "host"]


class Note(NamedTuple):
    """One decision. `field` is where the value stands in its source, "" for default and host."""

    source: Source
    field: str
    because: str
    asked: str  # what was wanted instead; "" when it is as wanted


Origins = dict[str, list[Note]]
Verb = Callable[[str, str], None]  # cri, pod, image or handler: for one to hand on
_recording: ContextVar[Origins | None] = ContextVar("recording", default=None)


@contextlib.contextmanager
def recorded() -> Iterator[Origins]:
    """Collect the notes made in this block, in this context."""
    origins: Origins = {}
    token = _recording.set(origins)
    try:
        yield origins
    finally:
        _recording.reset(token)


def cri(part: str, field: str, because: str = "", *, asked: object = "") -> None:
    """The request says so: `field` of ContainerConfig, "linux.security_context.run_as_user"."""
    _note(part, "cri", field, because, asked)


def pod(part: str, field: str, because: str = "", *, asked: object = "") -> None:
    """The pod's request says so: `field` of PodSandboxConfig, "linux.sysctls"."""
    _note(part, "pod", field, because, asked)


def image(part: str, field: str, because: str = "", *, asked: object = "") -> None:
    """The image says so: `field` of its config, "config.Env[2]", or a file in it."""
    _note(part, "image", field, because, asked)


def handler(part: str, key: str, because: str = "", *, asked: object = "") -> None:
    """Our configuration says so: `key` of [runtimes.NAME]."""
    _note(part, "handler", key, because, asked)


def default(part: str, because: str, *, asked: object = "") -> None:
    """Nobody says; it is our choice, for this reason."""
    _note(part, "default", "", because, asked)


def host(part: str, because: str, *, asked: object = "") -> None:
    """This host can do no more, or has it so."""
    _note(part, "host", "", because, asked)


def moved(part: str, to: str, because: str) -> None:
    """The image's links lead `part` elsewhere: what was noted of it holds there."""
    origins = _recording.get()
    if origins is not None and part != to:
        origins[to] = [*origins.pop(part, ()), Note("image", "", because, "")]


def _note(part: str, source: Source, field: str, because: str, asked: object) -> None:
    origins = _recording.get()
    if origins is None:
        return
    note, chain = Note(source, field, because, str(asked)), origins.setdefault(part, [])
    if not chain or chain[-1] != note:  # asking twice is not deciding twice
        chain.append(note)
