"""What rendering produces: the files of a job directory, held in memory until they are written."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class JobFile:
    """One file of a job directory.

    Attributes:
        text: The content; UTF-8, ending in a newline.
        executable: Whether it carries the execute bit.
    """

    text: str
    executable: bool = False


#: Relative POSIX path -> file, in the order in which a person would read them.
JobFiles = dict[str, JobFile]
