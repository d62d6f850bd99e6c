# SPDX-License-Identifier: Apache-2.0
"""Lists in the messages of a Stream* call."""

import pytest

from cri_server.pb import api_pb2 as api
from cri_server.services import parts

MIB = 1 << 20


def images(*sizes: int) -> list[api.Image]:
    return [api.Image(id=str(n), username="x" * size) for n, size in enumerate(sizes)]


@pytest.mark.parametrize(
    ("sizes", "counts"),
    [
        ([], [0]),
        ([10] * 1000, [1000]),
        ([10] * 1001, [1000, 1]),
        ([300_000] * 7, [3, 3, 1]),
        ([10, 3 * MIB, 10, 10], [1, 1, 2]),
    ],
)
def test_a_part_has_bounds_in_items_and_bytes(sizes: list[int], counts: list[int]) -> None:
    every = images(*sizes)
    cut = list(parts.cut(every))
    assert [len(part) for part in cut] == counts
    assert [image for part in cut for image in part] == every
