"""Trying again: when, how often, and when not."""

from __future__ import annotations

import itertools

import pytest

from slurmeval.errors import AccessDenied, CommandFailed, ConnectionFailed, Unreachable
from slurmeval.retry import PAUSES, delays, persistently


class Action:
    def __init__(self, *errors: Exception) -> None:
        self.errors, self.failures, self.told, self.slept = list(errors), [], [], []

    def __call__(self, failures: int) -> str:
        self.failures.append(failures)
        if self.errors:
            raise self.errors.pop(0)
        return "done"

    def run(self, reached: bool = True) -> str:
        return persistently(self, tell=self.told.append, sleep=self.slept.append, reached=reached)


def test_a_broken_connection_is_made_again() -> None:
    action = Action(ConnectionFailed("lost"), Unreachable("no network"))
    assert action.run(reached=False) == "done"
    assert action.failures == [0, 1, 2]
    assert action.told == ["lost; trying again in 1 s", "no network; trying again in 2 s"]
    assert action.slept == [1, 2]


def test_in_the_end_the_error_counts() -> None:
    action = Action(*[ConnectionFailed("lost")] * 99)
    with pytest.raises(ConnectionFailed, match="lost"):
        action.run()
    assert action.slept == list(PAUSES)


@pytest.mark.parametrize(
    ("error", "reached"),
    [
        (AccessDenied("no"), True),
        (CommandFailed("bad"), True),
        (Unreachable("no such host"), False),
    ],
)
def test_what_would_fail_again_is_an_error_at_once(error: Exception, reached: bool) -> None:
    action = Action(error)
    with pytest.raises(type(error)):
        action.run(reached)
    assert action.slept == []


def test_pauses_grow_to_a_limit() -> None:
    assert list(itertools.islice(delays(longest=5), 5)) == [1, 2, 4, 5, 5]
    assert list(itertools.islice(delays(longest=0.5), 2)) == [0.5, 0.5]
