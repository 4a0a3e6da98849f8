"""What the checks of the doctor share: what they work on, and what they find."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from slurmeval.cluster.host import Host
from slurmeval.cluster.scheduler import Section
from slurmeval.cluster.text import one_line, printable
from slurmeval.config.schema import Config

State = Literal["ok", "failed", "unknown", "skipped"]


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Attributes:
        check: Its name.
        state: Whether all is well; "unknown" where that could not be found out.
        words: What was found.
        remedy: What to do about a failure.
    """

    check: str
    state: State
    words: str
    remedy: str = ""


@dataclass
class Examination:
    """What the checks work on."""

    config: Config
    host: Host
    environ: Mapping[str, str]
    answers: dict[str, Section]

    def text(self, name: str) -> str | None:
        """Return the answer to a question, or None where it was not answered."""
        section = self.answers.get(name)
        return printable(section.text) if section and section.returncode == 0 else None

    def words(self, name: str) -> str:
        """Return the answer to a question on one line, or that there is none."""
        section = self.answers.get(name)
        return one_line(section.text) if section else "it was not asked"


Check = Callable[[Examination], Iterable[Finding]]
