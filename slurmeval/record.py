"""What this machine remembers of a job, so that it can be found again: one small file each.

Records live in ``${XDG_STATE_HOME:-~/.local/state}/slurmeval/jobs``. They hold no secret.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slurmeval.config.schema import Env
from slurmeval.errors import ConfigError
from slurmeval.manifest import write_atomic

#: What it takes to reach the job again; nothing that could hold a secret.
_ENV_KEYS = {"executor", "tunnel", "host", "port", "user", "identity", "remote_job_dir"}


@dataclass(frozen=True)
class Record:
    """One submission.

    Attributes:
        name: The record's name, which is also the job's name and its directory's name.
        profile: The profile it was submitted with.
        env: The part of ``run.env`` that reaches the cluster.
        remote_dir: The job directory, an absolute path on the cluster.
        job_id: The scheduler's id; None until the scheduler has answered.
        created: UTC time, ISO 8601.
        results: The local directory of its results, absolute.
    """

    name: str
    profile: str | None
    env: dict[str, Any]
    remote_dir: str
    job_id: str | None
    created: str
    results: str

    @property
    def environment(self) -> Env:
        """The ``run.env`` that reaches the cluster."""
        return Env.model_validate(self.env)

    def with_job(self, job_id: str) -> Record:
        """Return the record with the scheduler's answer."""
        return dataclasses.replace(self, job_id=job_id)


def connection_of(env: Env) -> dict[str, Any]:
    """Return the part of ``run.env`` that a record keeps."""
    return env.model_dump(include=_ENV_KEYS)


def directory() -> Path:
    """Return where records lie."""
    base = os.environ.get("XDG_STATE_HOME")
    root = Path(base) if base else Path.home() / ".local" / "state"
    return root / "slurmeval" / "jobs"


def save(record: Record) -> Path:
    """Write a record; it appears whole or not at all, and only its owner can read it."""
    folder = directory()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / f"{record.name}.json"
    write_atomic(path, json.dumps(dataclasses.asdict(record), indent=2) + "\n")
    return path


def remove(name: str) -> None:
    """Forget a submission that never became a job."""
    (directory() / f"{name}.json").unlink(missing_ok=True)


def records() -> list[Record]:
    """Return all records, the newest first; files that cannot be read are left out."""
    found = []
    for path in directory().glob("*.json"):
        try:
            found.append(Record(**json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError, TypeError):
            continue
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
    matches = exact or by_id or [record for record in known if record.name.startswith(job)]
    if len(matches) == 1:
        return matches[0]
    names = ", ".join(record.name for record in (matches or known)[:5])
    if matches:
        raise ConfigError(f"{job!r} is not unique: {names}")
    raise ConfigError(
        f"no job {job!r} is known in {directory()}",
        hint=f"The latest ones: {names}" if names else "Nothing was submitted from here yet.",
    )
