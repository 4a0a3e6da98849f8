"""How following looks: a live board on a terminal, plain lines elsewhere, JSON for programs."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from typing import TYPE_CHECKING, Any, TextIO

from slurmeval.follow import (
    Ended,
    Event,
    LogLine,
    Note,
    PhaseChange,
    StateChange,
    TaskChange,
    TaskProgress,
    Ui,
)

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

#: Plain lines tell a benchmark's progress in steps of this share.
_STEP = 0.1
_NAMES: dict[type, str] = {
    StateChange: "state",
    PhaseChange: "phase",
    TaskChange: "task",
    TaskProgress: "progress",
    LogLine: "log",
    Note: "note",
    Ended: "ended",
}


def make_ui(stream: TextIO | None = None, *, as_json: bool = False) -> Ui:
    """Return the interface that fits the stream (standard output, where none is given)."""
    stream = stream or sys.stdout
    if as_json:
        return JsonLines(stream)
    return Board(stream) if stream.isatty() else Lines(stream)


class JsonLines:
    """One JSON object a line: ``{"event": KIND, …}``."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def line(self, text: str) -> None:
        """Print what a person would read."""
        if text:
            self.put("message", {"text": text})

    def event(self, event: Event) -> None:
        """Print an event."""
        self.put(_NAMES[type(event)], dataclasses.asdict(event))

    def put(self, kind: str, facts: dict[str, Any]) -> None:
        """Print facts of a kind."""
        text = json.dumps({"event": kind, "time": round(time.time(), 3), **facts}, default=str)
        print(text, file=self._stream, flush=True)


class Lines:
    """One line for each event."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._told: dict[str, int] = {}

    def line(self, text: str) -> None:
        """Print a line."""
        print(text, file=self._stream, flush=True)

    def event(self, event: Event) -> None:
        """Print an event; of a benchmark's progress, each tenth."""
        if isinstance(event, TaskProgress):
            step = int(event.done / event.total / _STEP)
            if step <= self._told.get(event.task, 0):
                return
            self._told[event.task] = step
        text = describe(event)
        if text:
            self.line(text)


def describe(event: Event) -> str:
    """Return an event in words."""
    match event:
        case StateChange(state, exit_code, source, reason):
            code = f", exit code {exit_code}" if exit_code else ""
            why = f": {reason}" if reason else ""
            return f"job      {state}{code}{why} ({source})"
        case PhaseChange(phase, detail):
            return f"phase    {phase}  {detail}".rstrip()
        case TaskChange(task, state):
            return f"task     {task}: {state}"
        case TaskProgress(task, done, total):
            return f"task     {task}: {done} of {total}"
        case LogLine(text):
            return f"   | {text}"
        case Note(text):
            return f"note     {text}"
        case Ended():
            return ""


class Board:
    """Phases with their seconds and benchmarks with bars, below the job's log."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.live import Live

        self._running = False
        self._state = ""
        self._phases: list[tuple[str, str, float]] = []
        self._tasks: dict[str, str] = {}
        self._progress: dict[str, tuple[int, int]] = {}
        self._console = Console(file=stream, highlight=False, emoji=False)
        self._live = Live(
            console=self._console, get_renderable=self._render, refresh_per_second=4, transient=True
        )

    def line(self, text: str) -> None:
        """Print a line above the board."""
        self._console.print(text, markup=False, soft_wrap=True)

    def event(self, event: Event) -> None:
        """Show an event."""
        if isinstance(event, Ended):
            self._stop()
            return
        if isinstance(event, Note):
            # A login may have to ask something now: the terminal belongs to it.
            self._pause()
            self.line(describe(event))
            return
        if not self._running:
            self._live.start()
            self._running = True
        match event:
            case StateChange():
                self._state = describe(event)
            case PhaseChange(phase, detail):
                self._phase(phase, detail)
            case TaskChange(task, state):
                self._tasks[task] = state
            case TaskProgress(task, done, total):
                self._progress[task] = (done, total)
            case LogLine(text):
                self._console.print(text, markup=False, style="dim", soft_wrap=True)

    def _phase(self, phase: str, detail: str) -> None:
        if self._phases and self._phases[-1][0] == phase:
            self._phases[-1] = (phase, detail, self._phases[-1][2])
        else:
            self._phases.append((phase, detail, time.monotonic()))

    def _pause(self) -> None:
        if self._running:
            self._live.stop()
            self._running = False

    def _stop(self) -> None:
        if self._running:
            self._pause()
            self._console.print(self._render())

    def _render(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        # Text, so that nothing the job wrote is taken for rich's markup.
        board = Table.grid(padding=(0, 2))
        board.add_row("", Text(self._state), "")
        ends = [start for _, _, start in self._phases[1:]] + [time.monotonic()]
        for (phase, detail, start), end in zip(self._phases, ends, strict=False):
            last = end == ends[-1] and self._running
            board.add_row("▶" if last else "✓", Text(f"{phase}  {detail}"), f"{end - start:.0f} s")
        for task, state in self._tasks.items():
            board.add_row("", Text(f"  {task}"), self._standing(task, state))
        return board

    def _standing(self, task: str, state: str) -> Text | Table:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        if state != "running" or task not in self._progress:
            return Text(state)
        done, total = self._progress[task]
        bar = ProgressBar(total=total, completed=done, width=24)
        row = Table.grid(padding=(0, 1))
        row.add_row(bar, Text(f"{done}/{total}"))
        return row
