# SPDX-License-Identifier: Apache-2.0
"""The refusals that every part of the spec shares: InvalidArgument that names the field."""

import posixpath

from cri_server import errors

# What Kubernetes allows; larger numbers have wrapped to 0 elsewhere (CVE-2024-40635).
MAX_ID = 2**31 - 1
_NAME, _PATH = 255, 4095  # bytes that a name and a path of Linux have at most


def text(value: str, field: str) -> str:
    """Return `value` if it holds no NUL, which no exec argument, path or variable can carry."""
    if "\0" in value:
        raise errors.InvalidArgument(f"{field}: contains a NUL byte")
    return value


def line(value: str, field: str) -> str:
    """Return `value` if it is one printable line: it will be written into a file or a list."""
    if any(ord(c) < 32 or ord(c) == 127 for c in value):
        raise errors.InvalidArgument(f"{field}: contains a control character")
    return value


def absolute(path: str, field: str) -> str:
    """Return the normalised form of an absolute path ("/a//b/../c" is "/a/c")."""
    text(path, field)
    if not path.startswith("/"):
        raise errors.InvalidArgument(f"{field}: {path[:200]!r} is not an absolute path")
    sized(path, field)
    return posixpath.normpath("/" + path.lstrip("/"))


def sized(path: str, field: str) -> str:
    """Return a path that is no longer than Linux takes it, nor any name in it."""
    if len(path.encode()) > _PATH or any(len(part.encode()) > _NAME for part in path.split("/")):
        raise errors.InvalidArgument(f"{field}: {path[:200]!r} is longer than paths can be")
    return path


def below(path: str, folder: str) -> bool:
    """Say whether a normalised path is a folder's own or below it."""
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def identity(number: int, field: str) -> int:
    """Return `number` if it can be a user or group id."""
    if not 0 <= number <= MAX_ID:
        raise errors.InvalidArgument(f"{field}: {number} is not between 0 and {MAX_ID}")
    return number


def parse_identity(value: str, field: str) -> int | None:
    """Return the number that `value` spells, None if it is a name.

    What begins like a number, be it after a space, must be one: falling back to a name let an
    image map it to root (CVE-2026-46680).
    """
    first = value.strip()[:1]
    if first and (first.isdigit() or first in "+-"):
        if not (value.isascii() and value.isdigit() and len(value) <= 10):
            raise errors.InvalidArgument(f"{field}: {value[:80]!r} is not a number")
        return identity(int(value), field)
    return None


def unsupported(present: bool, field: str, why: str) -> None:
    """Refuse what is set and not honoured: nothing is ignored in silence (design.md §4)."""
    if present:
        raise errors.InvalidArgument(f"{field}: {why}")
