"""What this machine remembers of a job, so that it can be found again: one small file each.

Records live in ``${XDG_STATE_HOME:-~/.local/state}/slurmeval/jobs``. They hold no secret, appear
whole or not at all, and are changed under a lock, so that two processes lose nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from slurmeval.cluster.access import Access
from slurmeval.cluster.scheduler import JobState, Snapshot
from slurmeval.cluster.text import printable
from slurmeval.errors import ConfigError
from slurmeval.manifest import write_atomic

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """One submission.

    Attributes:
        name: The record's name, which is also the job's name and its directory's name.
        profile: The profile it was submitted with.
        env: The part of ``run.env`` that reaches the cluster.
        remote_dir: The job directory, an absolute path on the cluster once its files are there.
        job_id: The scheduler's id; None until the scheduler has answered.
        created: UTC time, ISO 8601.
        results: The local directory of its results, absolute.
        config_hash: SHA-256 of ``config.yaml`` (of ``job.sbatch`` where there is none), 16 digits.
        state: The state that was seen last; empty before the first look.
        phase: The phase that was seen last.
        exit_code: As the scheduler wrote it.
        checked: UTC time of the last look that found a state.
        synced: UTC time at which results came home last.
        requeues: How often the job was started again under its id.
        log: The absolute path of the job's log on the cluster, where the scheduler named one.
        sent: Whether its files reached the cluster.
        resubmit_of: The record that this one repeats.
        export: ``eval.export`` of the job's configuration: where results go once they are at home.
        model: The ``checkpoint`` that it serves; of an artifact also ``name``, ``version`` (a
            concrete one), ``requested`` (what the user wrote) and ``source`` (the registry).
    """

    name: str
    profile: str | None
    env: dict[str, Any]
    remote_dir: str
    job_id: str | None
    created: str
    results: str
    config_hash: str | None = None
    state: str = ""
    phase: str = ""
    exit_code: str | None = None
    checked: str | None = None
    synced: str | None = None
    requeues: int = 0
    log: str | None = None
    sent: bool = True
    resubmit_of: str | None = None
    export: dict[str, Any] | None = None
    model: dict[str, Any] | None = None

    @property
    def access(self) -> Access:
        """How to get at its cluster."""
        return Access.recorded(self.env)


_FIELDS = {field.name for field in dataclasses.fields(Record)}


def directory() -> Path:
    """Return where records lie."""
    base = os.environ.get("XDG_STATE_HOME")
    root = Path(base) if base else Path.home() / ".local" / "state"
    return root / "slurmeval" / "jobs"


def now() -> str:
    """Return the time as records write it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@contextlib.contextmanager
def _locked() -> Iterator[Path]:
    folder = directory()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            # Without the lock where the file system has none.
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield folder
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ConfigError(
            f"cannot keep the records of jobs in {folder}: {error.strerror or error}",
            hint="Make room there, or set XDG_STATE_HOME to a directory that you can write.",
        ) from error


def save(record: Record) -> Path:
    """Write a record; only its owner can read it."""
    with _locked() as folder:
        return _write(folder, record)


def _write(folder: Path, record: Record) -> Path:
    path = folder / f"{record.name}.json"
    write_atomic(path, json.dumps(dataclasses.asdict(record), indent=2) + "\n")
    return path


def update(record: Record, **changes: Any) -> Record:
    """Change fields of a record on disk, and return it as it is then.

    What another process changed meanwhile stays; a record that was removed is not brought back.
    """
    with _locked() as folder:
        current = _read(folder / f"{record.name}.json")
        if current is None:
            return dataclasses.replace(record, **changes)
        changed = dataclasses.replace(current, **changes)
        if changed != current:
            _write(folder, changed)
        return changed


def seen(record: Record, snapshot: Snapshot) -> Record:
    """Remember what a look at the job found; an unanswered question changes nothing."""
    if snapshot.state is JobState.UNKNOWN:
        return record
    phase = printable(str((snapshot.status or {}).get("phase") or ""))
    return update(
        record,
        state=str(snapshot.state),
        exit_code=snapshot.exit_code,
        phase=phase or record.phase,
        requeues=max(record.requeues, snapshot.requeues),
        checked=now(),
    )


def remove(name: str) -> None:
    """Forget a submission."""
    with _locked() as folder:
        (folder / f"{name}.json").unlink(missing_ok=True)


def _read(path: Path) -> Record | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        # A newer version may have written more than this one knows.
        return Record(**{key: value for key, value in data.items() if key in _FIELDS})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        _log.warning("the record %s cannot be read: %s", path, error)
        return None


def records() -> list[Record]:
    """Return all records, the newest first; one that cannot be read is named and left out."""
    found = filter(None, map(_read, directory().glob("[!.]*.json")))
    return sorted(found, key=lambda record: (record.created, record.name), reverse=True)


def find(job: str) -> Record:
    """Return the record that a person means.

    Args:
        job: A record's name, a unique beginning of one, a job id, or ``last``.

    Raises:
        ConfigError: There is none, or more than one.
    """
    known = records()
    if job == "last" and known:
        return known[0]
    exact = [record for record in known if record.name == job]
    by_id = [record for record in known if record.job_id == job]
    matches = exact or by_id or [record for record in known if job and record.name.startswith(job)]
    if len(matches) == 1:
        return matches[0]
    names = ", ".join(record.name for record in (matches or known)[:5])
    if matches:
        raise ConfigError(f"{job!r} is not unique: {names}", hint="Give more of its name.")
    raise ConfigError(
        f"no job {job!r} is known in {directory()}",
        hint=f"The latest ones: {names}" if names else "Nothing was submitted from here yet.",
    )
