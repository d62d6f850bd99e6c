# SPDX-License-Identifier: Apache-2.0
"""`cri-server explain`: where each part of a container or a pod came from.

Reads the state directory only, so it works while the server is down; what it prints was recorded
when the config.json was made (`origins`). Values are an image's and a request's own words: they
are shown without control characters, so that none of them can steer a terminal.

    exit status   0 explained      1 not found, ambiguous, or nothing recorded
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from cri_server import config, errors, listing, origins


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """What is explained: a title, and the rows of its documents by heading."""

    title: str
    documents: dict[str, list[origins.Row]]


def run(
    settings: config.Config, wanted: str, *, prefix: str = "", diff: bool, as_json: bool
) -> int:
    """Print the explanation and return the exit status."""
    try:
        subject = _subject(find(settings.server.state, wanted))
    except (errors.CriError, OSError, ValueError) as e:
        print(f"cri-server explain: {listing.plain(str(e))}", file=sys.stderr)
        return 1
    documents = {
        of: [r for r in rows if r.part.startswith(prefix)] for of, rows in subject.documents.items()
    }
    if not any(documents.values()):
        print(f"cri-server explain: no part begins with {prefix!r}", file=sys.stderr)
        return 1
    if diff:
        documents = {of: [r for r in rows if r.unmet] for of, rows in documents.items()}
    if as_json:
        _print_json(documents)
    else:
        listing.show(subject.title, documents, diff=diff, whole=bool(prefix))
    return 0


# -- which one -------------------------------------------------------------------------------------


def find(state: Path, wanted: str) -> Path:
    """Return the directory of a container or a pod.

    `wanted` is the beginning of an id, or NAMESPACE/POD or NAMESPACE/POD/CONTAINER, of which
    leading parts may be left out. Raises NotFound, InvalidArgument when it fits several.
    """
    known = {p.name: p for kind in ("containers", "pods") for p in (state / kind).glob("*")}
    if not known:
        raise errors.NotFound(f"no container and no pod in {state}")
    matching = [i for i in known if wanted and i.startswith(wanted)]
    if not matching:
        matching = [i for i, path in known.items() if _named(path, wanted)]
    if not matching:
        raise errors.NotFound(
            f"{wanted[:80]!r}: no container or pod in {state} has this id or name"
        )
    if len(matching) > 1:
        several = ", ".join(i[:13] for i in matching[:8])
        raise errors.InvalidArgument(f"{wanted[:80]!r} fits {len(matching)}: {several}")
    return known[matching[0]]


def _named(path: Path, wanted: str) -> bool:
    try:
        full = _full_name(path)
    except (OSError, ValueError, KeyError):  # half made, or removed while we look
        return False
    return full == wanted or full.endswith(f"/{wanted}")


def _full_name(path: Path) -> str:
    if path.parent.name == "pods":
        sandbox: dict[str, Any] = _document(path / origins.SANDBOX)["sandbox"]
        return str(sandbox["name"])
    said = _document(path / origins.CONFIG)["annotations"]
    names_of = ("sandbox-namespace", "sandbox-name", "container-name")
    return "/".join(said[f"io.kubernetes.cri.{n}"] for n in names_of)


def _document(path: Path) -> dict[str, Any]:
    return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])


def _subject(path: Path) -> Subject:
    if not (path / origins.FILE).exists():
        raise errors.NotFound(f"{path.name[:13]}: nothing is recorded in {path / origins.FILE}")
    kind = path.parent.name.removesuffix("s")
    documents = {"": origins.explained(path)}
    if (path / "sandbox" / origins.FILE).exists():
        documents["the pod's init"] = origins.explained(path / "sandbox")
    title = f"{kind} {listing.plain(_full_name(path))}  {path.name}"
    return Subject(title=title, documents=documents)


def _print_json(documents: Mapping[str, list[origins.Row]]) -> None:
    text = msgspec.json.encode([_object(of, r) for of, rows in documents.items() for r in rows])
    sys.stdout.buffer.write(msgspec.json.format(text, indent=2) + b"\n")


def _object(of: str, row: origins.Row) -> dict[str, object]:
    notes = [note._asdict() for note in row.notes]
    return {"document": of, "part": row.part, "value": row.value, "present": row.present} | {
        "decisions": notes
    }
