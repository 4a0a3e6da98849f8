"""A job directory on disk: written whole or not at all, and never over a person's edits."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path

from slurmeval.errors import ConfigError
from slurmeval.jobfiles import JobFiles

MANIFEST = "manifest.json"


def write(files: JobFiles, target: Path) -> None:
    """Write a job directory under another name and rename it.

    A directory that an earlier call wrote, and nobody has touched since, is replaced.

    Raises:
        ConfigError: The directory holds something else, or files that were edited.
    """
    if target.exists():
        check_replaceable(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as name:
        fresh = Path(name) / "new"
        for path, file in files.items():
            place = fresh / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(file.text)
            place.chmod(0o755 if file.executable else 0o644)
        if target.exists():
            target.rename(Path(name) / "old")
        fresh.rename(target)


def check_replaceable(target: Path) -> None:
    """Check that a directory holds only what an earlier call wrote.

    Raises:
        ConfigError: With the files that a person would lose.
    """
    if not target.is_dir():
        raise ConfigError(f"{target} is a file; a job directory is to be made there")
    if not any(target.iterdir()):
        return
    if not (target / MANIFEST).is_file():
        raise ConfigError(f"{target} exists and is no job directory", hint="choose another with -o")
    changed = edited(target)
    if changed:
        raise ConfigError(
            f"{target} has files that were edited or added: {', '.join(changed)}",
            hint="choose another directory with -o, or move these away",
        )


def edited(target: Path) -> list[str]:
    """Return the files of a job directory that differ from what was rendered, or were added.

    Raises:
        ConfigError: The directory has no readable manifest.
    """
    try:
        known: dict[str, str] = json.loads((target / MANIFEST).read_text())["files"]
    except (OSError, ValueError, LookupError) as error:
        raise ConfigError(f"{target / MANIFEST} cannot be read: {error}") from error
    there = {
        str(path.relative_to(target)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(target.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    return [name for name, digest in there.items() if known.get(name) != digest]
