# SPDX-License-Identifier: Apache-2.0
"""Tokens of the streaming server: once, for a minute, and not too many."""

import pytest

from cri_server import errors
from cri_server.streaming import tokens


class Clock:
    """Seconds that pass when told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_token_is_good_once() -> None:
    issued: tokens.Tokens[str] = tokens.Tokens()
    token = issued.issue("request")
    assert issued.redeem(token) == "request"
    assert issued.redeem(token) is None


def test_tokens_are_long_different_and_need_no_quoting() -> None:
    issued: tokens.Tokens[int] = tokens.Tokens()
    made = {issued.issue(n) for n in range(100)}
    assert len(made) == 100
    assert all(len(t) * 6 >= 256 and t.replace("-", "").replace("_", "").isalnum() for t in made)


@pytest.mark.parametrize("guess", ["", "x", "é\udcff", "a" * 100_000])
def test_a_guess_gets_nothing(guess: str) -> None:
    issued: tokens.Tokens[str] = tokens.Tokens()
    issued.issue("request")
    assert issued.redeem(guess) is None


def test_after_a_minute_it_is_too_late() -> None:
    clock = Clock()
    issued: tokens.Tokens[str] = tokens.Tokens(clock)
    early, late = issued.issue("early"), issued.issue("late")
    clock.now += tokens.LIFETIME - 0.1
    assert issued.redeem(early) == "early"
    clock.now += 0.2
    assert issued.redeem(late) is None


def test_a_flood_is_refused_until_clients_come_or_a_minute_is_over() -> None:
    clock = Clock()
    issued: tokens.Tokens[int] = tokens.Tokens(clock)
    made = [issued.issue(n) for n in range(tokens.LIMIT)]
    with pytest.raises(errors.ResourceExhausted):
        issued.issue(-1)
    assert issued.redeem(made[5]) == 5
    issued.issue(-2)
    with pytest.raises(errors.ResourceExhausted):
        issued.issue(-3)
    clock.now += tokens.LIFETIME
    issued.issue(-4)
