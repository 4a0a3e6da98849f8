"""Where files of a pull lie until they are verified: ``.incoming`` in the target directory.

What a broken connection leaves of a large file stays there for the next pull.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from slurmeval import manifest
from slurmeval.errors import ResultsIncomplete
from slurmeval.manifest import Entry


class Incoming:
    """The directory for files under way.

    Args:
        target: The directory that a pull fills; it exists.
    """

    def __init__(self, target: Path) -> None:
        self._target, self._folder = target, target / manifest.INCOMING
        #: Where one small file after the other arrives.
        self.small = str(self._folder / "small")

    def part(self, entry: Entry) -> Path:
        """Return where a large file arrives."""
        name = entry.path.encode("utf-8", "surrogateescape")
        return self._folder / hashlib.sha256(name).hexdigest()[:32]

    def begin(self, entry: Entry, base: Path | None) -> int:
        """Return the offset from which a large file is still needed.

        Args:
            entry: The file.
            base: An earlier state of it. A file that only grew begins with that.
        """
        part = self.part(entry)
        if base is not None and not part.exists():
            shutil.copyfile(base, part)
        if not part.exists():
            return 0
        if part.stat().st_size > entry.size:
            part.unlink()
            return 0
        return part.stat().st_size

    def make_room(self, entries: Sequence[Entry], large: Sequence[Entry]) -> None:
        """Remove what earlier pulls began and this one does not need; see that the rest fits.

        Args:
            entries: All files to come.
            large: Those of them that are taken up where they were left.

        Raises:
            ResultsIncomplete: The disk is too full.
        """
        wanted, here = {self.part(entry) for entry in large}, 0
        for part in self._folder.iterdir():
            if part in wanted:
                here += part.stat().st_size
            else:
                part.unlink()
        needed = sum(entry.size for entry in entries) - here
        free = shutil.disk_usage(self._target).free
        if needed > free:
            raise ResultsIncomplete(
                f"{len(entries)} file(s) need {_megabytes(needed)}, and only {_megabytes(free)} "
                f"are free at {self._target}; nothing was brought",
                hint="Make room, or pull into another directory.",
            )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Have the directory, and have it alone.

        Raises:
            ResultsIncomplete: Another pull has it.
        """
        lock = self._lock()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                Path(self.small).unlink(missing_ok=True)
                self._folder.rmdir()
            os.close(lock)

    def _lock(self) -> int:
        while True:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            lock = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                os.close(lock)
                raise ResultsIncomplete(
                    f"another pull is bringing results into {self._target}",
                    hint="Run the command again when it has ended.",
                ) from error
            except OSError:
                return lock  # a file system without locks
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(self._folder.stat(), os.fstat(lock)):
                    return lock
            # The pull that had it has just removed it.
            os.close(lock)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
