# SPDX-License-Identifier: Apache-2.0
"""Memory that forks share well: functions work as before, and what is used lies together."""

import gc
from collections.abc import Callable
from types import CodeType, ModuleType

import pytest

from shim import compact

PAGE = 4096
SOURCE = "\n".join(
    f"def f{n}(x, y={n}):\n    return [x + y + {n} for _ in 'ab']" for n in range(400)
)


@pytest.fixture
def module() -> ModuleType:
    made = ModuleType("made")
    exec(compile(SOURCE, "made.py", "exec"), vars(made))
    return made


def pages(codes: list[CodeType]) -> int:
    return len({id(code) // PAGE for code in codes})


def functions(module: ModuleType, step: int) -> list[Callable[[int], list[int]]]:
    return [getattr(module, f"f{n}") for n in range(0, 400, step)]


def test_watching_sees_what_runs_and_nothing_else(module: ModuleType) -> None:
    with compact.watch() as used:
        module.f1(0)
    module.f2(0)
    assert module.f1.__code__ in used
    assert module.f2.__code__ not in used


def test_what_is_gathered_lies_together_and_works_as_before(module: ModuleType) -> None:
    some = functions(module, step=20)
    before = pages([f.__code__ for f in some])
    expected = [f(1) for f in some]
    compact.gather({f.__code__ for f in some})
    assert [f(1) for f in some] == expected
    assert pages([f.__code__ for f in some]) < before / 2


def test_after_filling_the_holes_new_objects_lie_in_a_row() -> None:
    scattered = [bytes(100) for _ in range(4000)][::9]  # a hole of eight blocks after each
    gc.collect()
    compact.fill_holes()
    new = [bytes(100) for _ in range(20)]
    assert pages_of(new) <= 2
    assert len(scattered) > 400


def pages_of(objects: list[bytes]) -> int:
    return len({id(one) // PAGE for one in objects})
