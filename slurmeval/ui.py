"""How following looks: a live board on a terminal, plain lines everywhere else."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, TextIO

from slurmeval.follow import (
    Ended,
    Event,
    LogLine,
    Note,
    PhaseChange,
    StateChange,
    TaskChange,
    Ui,
)

if TYPE_CHECKING:
    from rich.table import Table


def make_ui(stream: TextIO | None = None) -> Ui:
    """Return the interface that fits the stream (standard output, where none is given)."""
    stream = stream or sys.stdout
    return Board(stream) if stream.isatty() else Lines(stream)


class Lines:
    """One line for each event."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def line(self, text: str) -> None:
        """Print a line."""
        print(text, file=self._stream, flush=True)

    def event(self, event: Event) -> None:
        """Print an event."""
        text = describe(event)
        if text:
            self.line(text)


def describe(event: Event) -> str:
    """Return an event in words."""
    match event:
        case StateChange(state, exit_code, source):
            code = f", exit code {exit_code}" if exit_code else ""
            return f"job      {state}{code} ({source})"
        case PhaseChange(phase, detail):
            return f"phase    {phase}  {detail}".rstrip()
        case TaskChange(task, state):
            return f"task     {task}: {state}"
        case LogLine(text):
            return f"   | {text}"
        case Note(text):
            return f"note     {text}"
        case Ended():
            return ""


class Board:
    """Phases with their seconds and benchmarks with their states, below the job's log."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.live import Live

        self._running = False
        self._state = ""
        self._phases: list[tuple[str, str, float]] = []
        self._tasks: dict[str, str] = {}
        self._console = Console(file=stream, highlight=False)
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
            case LogLine(text):
                self._console.print(text, markup=False, style="dim", soft_wrap=True)
            case Note():
                self.line(describe(event))

    def _phase(self, phase: str, detail: str) -> None:
        if self._phases and self._phases[-1][0] == phase:
            self._phases[-1] = (phase, detail, self._phases[-1][2])
        else:
            self._phases.append((phase, detail, time.monotonic()))

    def _stop(self) -> None:
        if self._running:
            self._live.stop()
            self._running = False
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
            board.add_row("", Text(f"  {task}"), Text(state))
        return board
