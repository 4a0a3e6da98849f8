"""Following a job: polls become events, and a connection that drops is taken up again."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Any, Protocol

from slurmeval.cluster.scheduler import LOG_CHUNK, JobState, Scheduler, Snapshot
from slurmeval.cluster.text import printable
from slurmeval.errors import ConnectionFailed

#: Looks in a row that must find nothing before a job counts as forgotten by the scheduler.
_GONE_LOOKS = 3


@dataclass(frozen=True)
class StateChange:
    """The scheduler says something new about the job."""

    state: JobState
    exit_code: str | None
    source: str


@dataclass(frozen=True)
class PhaseChange:
    """The job entered a phase, or says more about it."""

    phase: str
    detail: str


@dataclass(frozen=True)
class TaskChange:
    """A benchmark has a new state."""

    task: str
    state: str


@dataclass(frozen=True)
class LogLine:
    """A line of the job's log."""

    text: str


@dataclass(frozen=True)
class Note:
    """Something about the following itself, such as a lost connection."""

    text: str


@dataclass(frozen=True)
class Ended:
    """No more events come."""


Event = StateChange | PhaseChange | TaskChange | LogLine | Note | Ended


class Ui(Protocol):
    """What a person, a program or a test sees."""

    def line(self, text: str) -> None:
        """Show one line."""

    def event(self, event: Event) -> None:
        """Show what happened."""


@dataclass(frozen=True)
class Pace:
    """Seconds between two looks: ``first``, growing to ``longest`` while nothing happens.

    For ``patience`` seconds without any answer, following goes on.
    """

    first: float = 0.5
    longest: float = 5.0
    patience: float = 900.0


LOCAL = Pace(first=0.2, longest=1.0)


def follow(
    scheduler: Scheduler,
    job_id: str,
    job_dir: str,
    *,
    pace: Pace | None = None,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Generator[Event, None, Snapshot]:
    """Yield what happens to a job until its end, and return the last look at it.

    The last state is `JobState.UNKNOWN` when the scheduler has forgotten the job, or gave no answer
    for too long.

    Raises:
        ConnectionFailed: The connection stayed away for ``pace.patience`` seconds.
    """
    pace = pace or Pace()
    seen = Snapshot(JobState.UNKNOWN, None, "", None, "", 0)
    delay, gone, answered = pace.first, 0, clock()
    while True:
        try:
            now = scheduler.poll(job_id, job_dir, log_offset=seen.log_offset)
        except ConnectionFailed as error:
            if clock() - answered > pace.patience:
                raise
            yield Note(f"{error.message}; trying again in {pace.longest:g} s")
            sleep(pace.longest)
            continue
        changes = _changes(seen, now)
        yield from changes
        yield from (LogLine(printable(line)) for line in now.log.splitlines())
        if now.state.ended:
            if now.log_offset - seen.log_offset < LOG_CHUNK:
                return now
            seen = now
            continue
        gone = gone + 1 if now.gone else 0
        if now.state is not JobState.UNKNOWN:
            answered = clock()
        if gone >= _GONE_LOOKS or clock() - answered > pace.patience:
            return now
        delay = pace.first if changes else min(delay * 1.4, pace.longest)
        # A status file that cannot be read for a moment is no change.
        seen = replace(now, status=now.status or seen.status)
        sleep(delay)


def _changes(before: Snapshot, now: Snapshot) -> list[Event]:
    events: list[Event] = []
    if not before.source or now.state is not before.state:
        events.append(StateChange(now.state, now.exit_code, now.source))
    if now.status is not None:
        old, new = before.status or {}, now.status
        if any(old.get(key) != new.get(key) for key in ("phase", "detail")):
            events.append(PhaseChange(*(_text(new.get(key)) for key in ("phase", "detail"))))
        known = _tasks(old)
        for task, state in _tasks(new).items():
            if known.get(task) != state:
                events.append(TaskChange(task, state))
    return events


def _tasks(status: dict[str, Any]) -> dict[str, str]:
    tasks = status.get("tasks")
    if not isinstance(tasks, dict):
        return {}
    return {_text(name): _text(state) for name, state in tasks.items()}


def _text(value: object) -> str:
    return "" if value is None else printable(str(value))
