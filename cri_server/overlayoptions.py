# SPDX-License-Identifier: Apache-2.0
"""The words with which a handler has its containers' roots mounted: overlayfs's own, and flags.

Pure. Only words that change how the root behaves are known, none that says what is in it (layers),
and none with which no container runs. Source: the kernel's overlayfs.rst, mount(8).
"""

from collections.abc import Iterable

SYNC = "sync"  # ours: without "volatile", so that an fsync in the container reaches the disk
_WORDS = frozenset({SYNC, "nodev", "nosuid", "noatime", "nodiratime", "nosymfollow"})
_VALUES = {
    "index": ("on", "off"),
    "metacopy": ("on", "off"),
    "nfs_export": ("on", "off"),
    "redirect_dir": ("on", "off", "follow", "nofollow"),
    "uuid": ("on", "off", "null", "auto"),
    "xino": ("on", "off", "auto"),
}


def chosen(words: Iterable[str]) -> tuple[str, ...]:
    """Return the words as they are. Raises ValueError for one that is not known, or is there twice
    with two meanings.
    """
    found = tuple(words)
    keys = [_key(word) for word in found]
    if len(set(keys)) < len(keys):
        raise ValueError(f"{', '.join(found)[:100]!r} names an option twice")
    return found


def _key(word: str) -> str:
    key, _, value = word.partition("=")
    if word not in _WORDS and value not in _VALUES.get(key, ()):
        known = ", ".join([*sorted(_WORDS), *(f"{k}={'|'.join(v)}" for k, v in _VALUES.items())])
        raise ValueError(f"{word[:80]!r} is not an option (known: {known})")
    return key


def of_mount(words: Iterable[str]) -> tuple[str, ...]:
    """Return the words for the mount: all but ours."""
    return tuple(word for word in words if word != SYNC)
