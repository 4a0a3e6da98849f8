"""Following: what changes becomes an event, once."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace

import pytest

from slurmeval.cluster.scheduler import LOG_CHUNK, JobState, Snapshot
from slurmeval.errors import AccessDenied, ClusterError, ConnectionFailed
from slurmeval.follow import (
    Ended,
    Event,
    LogLine,
    Note,
    Pace,
    PhaseChange,
    StateChange,
    TaskChange,
    TaskProgress,
    follow,
)
from slurmeval.ui import Board, Lines, make_ui

RUNNING, PENDING, DONE = JobState.RUNNING, JobState.PENDING, JobState.COMPLETED


def look(
    state: JobState, status: object = None, log: str = "", offset: int = 0, gone: bool = False
) -> Snapshot:
    return Snapshot(state, None, "squeue", status, log, offset, gone)  # type: ignore[arg-type]


class Scripted:
    """A scheduler whose looks are given, and a clock that sleeping moves."""

    def __init__(self, looks: Sequence[Snapshot | Exception]) -> None:
        self.looks, self.offsets, self.slept, self.now = list(looks), [], [], 0.0

    def submit(self, job_dir: str, **keys: object) -> str:
        raise NotImplementedError

    def cancel(self, job_id: str, job_dir: str) -> None:
        raise NotImplementedError

    def poll(self, job_id: str, job_dir: str, *, log_offset: int) -> Snapshot:
        self.offsets.append(log_offset)
        found = self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]
        if isinstance(found, Exception):
            raise found
        return found

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def follow(self, pace: Pace | None = None) -> tuple[list[Event], Snapshot]:
        events: list[Event] = []
        stream = follow(self, "7", "/d", pace=pace, sleep=self.sleep, clock=lambda: self.now)
        while True:
            try:
                events.append(next(stream))
            except StopIteration as end:
                return events, end.value


def test_each_change_is_told_once() -> None:
    first = {"phase": "serve", "detail": "loading", "tasks": {"a": "waiting"}}
    then = {"phase": "evaluate", "detail": "a", "tasks": {"a": "running", "b": "waiting"}}
    scripted = Scripted(
        [
            look(PENDING),
            look(PENDING),
            look(RUNNING, first, "one\ntwo\n", 8),
            look(RUNNING, first, "", 8),
            look(RUNNING, None, "", 8),
            look(RUNNING, first, "", 8),
            look(RUNNING, then, "\x1b[31mred\n", 17),
            look(DONE, then, "", 17),
        ]
    )
    events, last = scripted.follow()
    assert events == [
        StateChange(PENDING, None, "squeue"),
        StateChange(RUNNING, None, "squeue"),
        PhaseChange("serve", "loading"),
        TaskChange("a", "waiting"),
        LogLine("one"),
        LogLine("two"),
        PhaseChange("evaluate", "a"),
        TaskChange("a", "running"),
        TaskChange("b", "waiting"),
        LogLine("[31mred"),
        StateChange(DONE, None, "squeue"),
    ]
    assert last.state is DONE
    assert scripted.offsets == [0, 0, 0, 8, 8, 8, 8, 17]


def test_looks_grow_rarer_until_something_happens() -> None:
    scripted = Scripted([look(PENDING)] * 20 + [look(RUNNING), look(RUNNING), look(DONE)])
    scripted.follow(Pace(first=0.5, longest=5))
    waits = scripted.slept[:20]
    assert waits == sorted(waits)
    assert (waits[0], waits[-1]) == (0.5, 5)
    assert scripted.slept[20] == 0.5


def test_a_lost_connection_is_waited_for() -> None:
    scripted = Scripted([look(RUNNING), *[ConnectionFailed("gone")] * 7, look(RUNNING), look(DONE)])
    events, last = scripted.follow()
    assert Note("gone; trying again in 1 s") in events
    assert scripted.slept[1:8] == [1, 2, 4, 8, 16, 30, 30]
    assert last.state is DONE


def test_an_answer_that_cannot_be_read_is_asked_for_again() -> None:
    scripted = Scripted([look(RUNNING), ClusterError("cannot read 'Welcome'"), look(DONE)])
    events, last = scripted.follow()
    assert Note("no usable answer: cannot read 'Welcome'; trying again in 1 s") in events
    assert last.state is DONE


def test_a_login_that_is_refused_is_not_tried_again() -> None:
    scripted = Scripted([look(RUNNING), AccessDenied("permission denied"), look(DONE)])
    with pytest.raises(AccessDenied):
        scripted.follow()
    assert len(scripted.looks) == 1


def test_progress_and_reasons_are_told() -> None:
    def at(done: object, total: object = 64) -> Snapshot:
        return look(RUNNING, {"phase": "evaluate", "progress": {"arc": [done, total]}})

    scripted = Scripted(
        [
            replace(look(PENDING), reason="Priority"),
            replace(look(PENDING), reason="Resources"),
            at(3),
            at(3),
            at(7),
            at("x"),
            at(9, 0),
            at(-1),
            look(RUNNING, {"progress": [1]}),
            look(DONE),
        ]
    )
    events, _ = scripted.follow()
    assert [e.reason for e in events if isinstance(e, StateChange)][:2] == ["Priority", "Resources"]
    assert [e for e in events if isinstance(e, TaskProgress)] == [
        TaskProgress("arc", 3, 64),
        TaskProgress("arc", 7, 64),
    ]


def test_a_connection_that_stays_away_is_an_error_in_the_end() -> None:
    scripted = Scripted([look(RUNNING), ConnectionFailed("gone")])
    with pytest.raises(ConnectionFailed, match="gone"):
        scripted.follow(Pace(patience=60))
    assert 60 < scripted.now < 120


def test_no_answer_is_unknown_and_not_the_end() -> None:
    events, last = Scripted(
        [look(RUNNING), *[look(JobState.UNKNOWN)] * 10, look(RUNNING), look(DONE)]
    ).follow()
    states = [event.state for event in events if isinstance(event, StateChange)]
    assert states == [RUNNING, JobState.UNKNOWN, RUNNING, DONE]
    assert last.state is DONE


def test_no_answer_for_too_long_is_unknown_in_the_end() -> None:
    scripted = Scripted([look(RUNNING), look(JobState.UNKNOWN)])
    assert scripted.follow(Pace(patience=60))[1].state is JobState.UNKNOWN
    assert 60 < scripted.now < 120


def test_a_forgotten_job_ends_soon() -> None:
    scripted = Scripted([look(RUNNING), look(JobState.UNKNOWN, gone=True)])
    assert scripted.follow()[1].state is JobState.UNKNOWN
    assert len(scripted.offsets) == 4


def test_a_long_log_is_read_to_its_end() -> None:
    scripted = Scripted(
        [look(DONE, None, "a\n", LOG_CHUNK), look(DONE, None, "b\n", LOG_CHUNK + 2)]
    )
    events, _ = scripted.follow()
    assert events[1:] == [LogLine("a"), LogLine("b")]


@pytest.mark.parametrize(
    "status", [{"tasks": 3}, {"tasks": None}, {"phase": [1], "tasks": {"a": {}}}]
)
def test_a_strange_status_does_no_harm(status: object) -> None:
    assert Scripted([look(RUNNING, status), look(DONE, status)]).follow()[1].state is DONE


EVENTS = [
    StateChange(RUNNING, None, "squeue"),
    PhaseChange("serve", "loading [bold]x"),
    TaskChange("arc", "running"),
    TaskProgress("arc", 1, 64),
    TaskProgress("arc", 32, 64),
    TaskProgress("arc", 33, 64),
    LogLine("a line [red]"),
    PhaseChange("evaluate", ""),
    TaskChange("arc", "ok"),
    StateChange(JobState.FAILED, "1:0", "sacct"),
    Note("trying again"),
]


def test_lines_are_plain() -> None:
    stream = io.StringIO()
    ui = make_ui(stream)
    assert isinstance(ui, Lines)
    for event in EVENTS:
        ui.event(event)
    assert stream.getvalue().splitlines() == [
        "job      RUNNING (squeue)",
        "phase    serve  loading [bold]x",
        "task     arc: running",
        "task     arc: 32 of 64",
        "   | a line [red]",
        "phase    evaluate",
        "task     arc: ok",
        "job      FAILED, exit code 1:0 (sacct)",
        "note     trying again",
    ]


def test_a_terminal_gets_a_board() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    ui = make_ui(stream)
    assert isinstance(ui, Board)
    for event in [*EVENTS, Ended()]:
        ui.event(event)
    ui.line("results: here")
    last = stream.getvalue()[stream.getvalue().rindex("FAILED, exit code 1:0") :]
    assert "serve  loading [bold]x" in last
    assert "arc" in last
    assert last.endswith("results: here\n")


def test_a_running_benchmark_has_a_bar_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    ui = make_ui(stream)
    for event in [TaskChange("arc", "running"), TaskProgress("arc", 16, 64), Ended()]:
        ui.event(event)
    assert "━" in stream.getvalue()
    assert "16/64" in stream.getvalue()


def test_programs_get_json_lines() -> None:
    stream = io.StringIO()
    ui = make_ui(stream, as_json=True)
    for event in [*EVENTS, Ended()]:
        ui.event(event)
    ui.line("results: here")
    found = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [each["event"] for each in found] == [
        *("state", "phase", "task", "progress", "progress", "progress", "log", "phase", "task"),
        *("state", "note", "ended", "message"),
    ]
    assert (found[3]["task"], found[3]["done"], found[3]["total"]) == ("arc", 1, 64)
    assert (found[9]["state"], found[9]["exit_code"]) == ("FAILED", "1:0")


def test_nothing_in_a_line_on_a_terminal_is_taken_for_a_picture() -> None:
    stream = io.StringIO()
    Board(stream).line("root:x:0")
    assert stream.getvalue() == "root:x:0\n"
