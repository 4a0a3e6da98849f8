"""A Ui that keeps what it is told."""

from __future__ import annotations

from slurmeval.follow import Event


class Ui:
    """See `slurmeval.follow.Ui`."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.events: list[Event] = []

    def line(self, text: str) -> None:
        self.lines.append(text)

    def event(self, event: Event) -> None:
        self.events.append(event)

    @property
    def text(self) -> str:
        return "\n".join(self.lines)
