"""How to get at a cluster: the part of ``run.env`` that outlives a submission, in its record.

It needs no schema library, so that a look at a job starts at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slurmeval.config.schema import Env


@dataclass(frozen=True)
class Access:
    """The keys of ``run.env`` of the same names, with its defaults; of secrets only the names."""

    executor: str = "slurm"
    tunnel: str = "local"
    host: str | None = None
    port: int = 22
    user: str | None = None
    identity: str | None = None
    ssh: str = "paramiko"
    control_path: str | None = None
    host_key_policy: str = "strict"
    remote_job_dir: str | None = None
    clusters: str | None = None
    secrets: list[str] = field(default_factory=lambda: ["WANDB_API_KEY", "HF_TOKEN"])

    @classmethod
    def of(cls, env: Env) -> Access:
        """Return what a validated ``run.env`` says."""
        return cls(**env.model_dump(include=_NAMES))

    @classmethod
    def recorded(cls, values: Mapping[str, Any]) -> Access:
        """Return what a record says; a newer version may have written more."""
        return cls(**{name: values[name] for name in _NAMES & values.keys()})


_NAMES = {each.name for each in dataclasses.fields(Access)}
