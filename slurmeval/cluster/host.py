"""How slurmeval touches a machine: run a command, put a tree, get a tree."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

#: Asks the user for an answer: (question, whether the answer may be shown) -> answer.
Prompt = Callable[[str, bool], str]


@dataclass(frozen=True)
class Completed:
    """A command that has ended.

    Attributes:
        returncode: Its exit status; negative when a signal ended it.
        stdout: What it printed, as UTF-8; undecodable bytes as surrogates, so nothing is lost.
        stderr: Likewise.
    """

    returncode: int
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Transfer:
    """What ``get_tree`` did.

    Attributes:
        moved: Files that were transferred and verified, by their names below the directory.
        unchanged: Number of files that were here already.
        kept: Files that the user has changed; they were left as they are.
        skipped: Remote symlinks, which are not followed.
        partial: Files that had grown by the time they were here; what they held when they were
            listed was verified, and the next pull brings the rest.
    """

    moved: list[str] = field(default_factory=list)
    unchanged: int = 0
    kept: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    partial: list[str] = field(default_factory=list)


class Host(Protocol):
    """A machine on which commands run and files lie.

    Attributes:
        name: How messages call it.
    """

    name: str

    def run(self, command: str | Sequence[str], *, timeout: float, input: bytes = b"") -> Completed:
        """Run a command (a list of words, or a script for ``sh``) and wait for its end.

        Args:
            command: Words, or the text of a POSIX shell script.
            timeout: Seconds after which the command is given up.
            input: Its standard input.

        Raises:
            ConnectionFailed: There is no connection, it broke, or no answer came in time.
        """

    def put_tree(
        self,
        source: Path,
        target: str,
        *,
        extra: Mapping[str, bytes] | None = None,
        exclude: Sequence[str] = (),
    ) -> str:
        """Upload a directory; it appears under its name whole or not at all.

        Args:
            source: A local directory.
            target: The remote directory to create; a leading ``~/`` is the user's home.
            extra: Further files by relative name, held only in memory (secrets).
            exclude: Shell patterns of names directly below ``source`` that stay here.

        Returns:
            The absolute path of the new directory.

        Raises:
            ClusterError: The target exists or cannot be written; nothing is left behind.
        """

    def get_tree(self, source: str, target: Path, *, include: Sequence[str] = ("*",)) -> Transfer:
        """Bring files home, verified by their checksums; what was begun is taken up again.

        `slurmeval.manifest` has the rules. Nothing is deleted or changed on the other side.

        Args:
            source: A remote directory.
            target: The local directory; made where it is missing.
            include: Shell patterns of names directly below ``source``.

        Raises:
            ResultsIncomplete: Files are missing or do not match; names them. Verified ones stay.
            ClusterError: The directory does not exist, or the answer is not safe to follow.
        """

    def close(self) -> None:
        """End the connection; the host may be used again and then connects anew."""
