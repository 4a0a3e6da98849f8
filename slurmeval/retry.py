"""Trying again: for what may be done twice, after a connection that was there has broken."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

from slurmeval.errors import AccessDenied, ConnectionFailed, Unreachable

T = TypeVar("T")
#: Seconds between tries; after the last one the error counts.
PAUSES = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)


def delays(first: float = 1.0, longest: float = 30.0) -> Iterator[float]:
    """Yield growing pauses, in seconds, for ever."""
    while True:
        yield min(first, longest)
        first = min(first * 2, longest)


def persistently(
    action: Callable[[int], T],
    *,
    tell: Callable[[str], None],
    sleep: Callable[[float], None],
    reached: bool = True,
) -> T:
    """Do something until it gets through.

    Args:
        action: What to do; gets the number of failed tries. It must be safe to do twice.
        tell: Says to the user that it is tried again.
        sleep: Waits for some seconds.
        reached: Whether there was a connection before. Without one, a host that cannot be reached
            at all is an error at once: its name is probably wrong.

    Raises:
        ConnectionFailed: It did not get through, or trying again does not help.
    """
    for failures, pause in enumerate(PAUSES):
        try:
            return action(failures)
        except AccessDenied:
            raise
        except ConnectionFailed as error:
            if isinstance(error, Unreachable) and not reached and not failures:
                raise
            tell(f"{error.message}; trying again in {pause:g} s")
            sleep(pause)
    return action(len(PAUSES))


def until_it_answers(
    action: Callable[[], T], *, tell: Callable[[str], None], sleep: Callable[[float], None]
) -> T:
    """Do something, again and again with growing pauses, until there is a connection.

    Raises:
        AccessDenied: Trying again does not help.
    """
    for pause in delays():
        try:
            return action()
        except AccessDenied:
            raise
        except ConnectionFailed as error:
            tell(f"{error.message}; trying again in {pause:g} s")
            sleep(pause)
    raise AssertionError("unreachable")
