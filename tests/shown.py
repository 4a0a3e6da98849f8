"""What tests of submitting share: a Ui that keeps what it is told, and a good job's summary."""

from __future__ import annotations

from slurmeval.follow import Event

#: What a job whose only benchmark is good says at its end.
SUMMARY = {
    "schema_version": 1,
    "state": "ok",
    "tasks": [
        {
            "name": "arc",
            "state": "ok",
            "reason": "",
            "primary": "acc",
            "metrics": {"acc": {"value": 0.75, "stderr": 0.01}},
            "samples": 64,
            "seconds": 3,
        }
    ],
    "aggregate": {"value": 0.75, "definition": "mean"},
    "job": {},
}


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
