"""Following a job: polls become events, and a connection that drops is taken up again."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Any, Protocol

from slurmeval.cluster.scheduler import LOG_CHUNK, JobState, Scheduler, Snapshot
from slurmeval.cluster.text import printable
from slurmeval.errors import AccessDenied, ClusterError, ConnectionFailed
from slurmeval.retry import delays

#: Looks in a row that must find nothing before a job counts as forgotten by the scheduler.
_GONE_LOOKS = 3


@dataclass(frozen=True)
class StateChange:
    """The scheduler says something new about the job."""

    state: JobState
    exit_code: str | None
    source: str
    reason: str = ""


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
class TaskProgress:
    """A benchmark has got further: requests answered, of how many."""

    task: str
    done: int
    total: int


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


Event = StateChange | PhaseChange | TaskChange | TaskProgress | LogLine | Note | Ended


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

    A connection that breaks is made again, with growing pauses. The last state is
    `JobState.UNKNOWN` when the scheduler has forgotten the job, or gave no answer for too long.

    Raises:
        AccessDenied: The login is refused now, or would need an answer that nobody gives.
        ClusterError: There was no connection, or no answer that can be read, for
            ``pace.patience`` seconds.
    """
    pace = pace or Pace()
    seen = Snapshot(JobState.UNKNOWN, None, "", None, "", 0)
    delay, gone, answered = pace.first, 0, clock()
    pauses = delays(longest=pace.longest * 6)
    while True:
        try:
            now = scheduler.poll(job_id, job_dir, log_offset=seen.log_offset)
        except AccessDenied:
            raise
        except ClusterError as error:
            if clock() - answered > pace.patience:
                raise
            pause = next(pauses)
            what = "" if isinstance(error, ConnectionFailed) else "no usable answer: "
            yield Note(f"{what}{error.message}; trying again in {pause:g} s")
            sleep(pause)
            continue
        pauses = delays(longest=pace.longest * 6)
        changes = _changes(seen, now)
        yield from changes
        yield from (LogLine(printable(line)) for line in now.log.splitlines())
        if now.state.ended:
            if now.log_offset - seen.log_offset <= LOG_CHUNK // 2:
                return now
            seen = now
            continue
        gone = gone + 1 if now.gone else 0
        if now.state is not JobState.UNKNOWN:
            answered = clock()
        elif gone >= _GONE_LOOKS or clock() - answered > pace.patience:
            return now
        delay = pace.first if changes else min(delay * 1.4, pace.longest)
        # A status file that cannot be read for a moment is no change.
        seen = replace(now, status=now.status or seen.status)
        sleep(delay)


def _changes(before: Snapshot, now: Snapshot) -> list[Event]:
    events: list[Event] = []
    if not before.source or (now.state, now.reason) != (before.state, before.reason):
        events.append(StateChange(now.state, now.exit_code, now.source, now.reason))
    if now.status is not None:
        old, new = before.status or {}, now.status
        if any(old.get(key) != new.get(key) for key in ("phase", "detail")):
            events.append(PhaseChange(*(_text(new.get(key)) for key in ("phase", "detail"))))
        known = tasks_of(old)
        for task, state in tasks_of(new).items():
            if known.get(task) != state:
                events.append(TaskChange(task, state))
        counted = progress_of(old)
        for task, (done, total) in progress_of(new).items():
            if counted.get(task) != (done, total):
                events.append(TaskProgress(task, done, total))
    return events


def progress_of(status: dict[str, Any] | None) -> dict[str, tuple[int, int]]:
    """Return how far each benchmark is, where ``status.json`` says so: (done, total)."""
    found = (status or {}).get("progress")
    if not isinstance(found, dict):
        return {}
    return {
        _text(task): (pair[0], pair[1])
        for task, pair in found.items()
        if isinstance(pair, list)
        and len(pair) == 2
        and all(type(number) is int for number in pair)
        and 0 <= pair[0] <= pair[1] > 0
    }


def tasks_of(status: dict[str, Any] | None) -> dict[str, str]:
    """Return the state of each benchmark, where ``status.json`` says so."""
    tasks = (status or {}).get("tasks")
    if not isinstance(tasks, dict):
        return {}
    return {_text(name): _text(state) for name, state in tasks.items()}


def _text(value: object) -> str:
    return "" if value is None else printable(str(value))
