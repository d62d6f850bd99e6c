# SPDX-License-Identifier: Apache-2.0
"""Bring together in memory what every shim is going to touch, before the zygote forks any.

A forked process pays for each page that it writes, and Python writes to whatever it uses: reference
counts, the caches inside code objects, free blocks of its allocator. Used and unused objects lie
mixed over the zygote's memory, so that a shim that runs 100 KiB of code would own 500 KiB of pages.

    gather       the code that ran while we watched is copied to one place, and the copy is used
    fill_holes   free blocks between old objects are taken, so that new objects lie side by side

Together 0.3 MB less for every shim with CPython 3.11. Nothing depends on it but memory: where the
allocator works otherwise, less is gained.
"""

import contextlib
import functools
import gc
import sys
from collections.abc import Callable, Iterator
from types import CodeType, FrameType, FunctionType

_STEP, _LARGEST = 16, 512  # bytes: the size classes of CPython's allocator, Objects/obmalloc.c
_BYTES_OVERHEAD = sys.getsizeof(b"")
_ENOUGH = 16  # blocks in a row, with nothing between them: they are no longer those of a hole
_SMALLEST = 2000  # objects of the two classes in which such a row cannot be seen

_kept: list[object] = []  # what fills the holes; for ever


@contextlib.contextmanager
def watch() -> Iterator[set[CodeType]]:
    """Yield a set that fills with the code that runs inside the block."""
    seen: set[CodeType] = set()

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            seen.add(frame.f_code)

    sys.setprofile(note)
    try:
        yield seen
    finally:
        sys.setprofile(None)


def gather(used: set[CodeType]) -> None:
    """Give the functions that have this code a copy of it, all copies in one place."""
    functions = [f for f in gc.get_objects() if type(f) is FunctionType and f.__code__ in used]
    fill_holes()  # where the copies would go otherwise
    _kept.append([f.__code__ for f in functions])  # freed now, its place would be the next copy's
    for function in functions:
        function.__code__ = _copy(function.__code__)


def _copy(code: CodeType) -> CodeType:
    constants = (_copy(c) if isinstance(c, CodeType) else c for c in code.co_consts)
    return code.replace(co_consts=tuple(constants))


def fill_holes() -> None:
    """Take the free blocks of every size class that lie between objects."""
    _kept.append([object() for _ in range(_SMALLEST)])
    _kept.append([float(number) for number in range(_SMALLEST)])
    sizes = range(3 * _STEP, _LARGEST + 1, _STEP)
    _kept.extend(_fill(functools.partial(bytes, n - _BYTES_OVERHEAD), n) for n in sizes)


def _fill(make: Callable[[], object], size: int) -> list[object]:
    """Return new objects of a size class, as many as it takes until they lie in a row."""
    made: list[object] = [make()]
    row = 0
    while row < _ENOUGH:
        made.append(make())
        row = row + 1 if id(made[-1]) - id(made[-2]) == size else 0
    return made
