# SPDX-License-Identifier: Apache-2.0
"""What is common to all runtimes: what they may tell."""

import pytest

from shim import errors, runtimes


@pytest.mark.parametrize("told", [0, 137, 255])
def test_an_exit_status_is_taken_as_it_is(told: int) -> None:
    assert runtimes.exit_status(told) == told


@pytest.mark.parametrize("told", [-1, 256, 4294967295, 99999999999, 1.5, "0", None])
def test_an_exit_status_that_cannot_be_is_an_error(told: object) -> None:
    with pytest.raises(errors.Internal, match="ended with"):
        runtimes.exit_status(told)
