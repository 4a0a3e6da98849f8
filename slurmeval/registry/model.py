"""``${art:model,…}`` of a configuration, answered by the registry that knows ``run.model``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from slurmeval.config.keys import did_you_mean
from slurmeval.config.resolve import Model, Unresolved, UnresolvedModel
from slurmeval.errors import SlurmevalError
from slurmeval.registry.artifact import LATEST, Artifact
from slurmeval.registry.lookup import Question, find_artifact

#: Where stored artifacts are kept, below ``remote_job_dir``.
CACHE = "cache/models"
_LOCAL_BASE = "slurmeval-jobs"


class RegistryModel(Model):
    """Looks ``run.model`` up, once, when its first attribute is needed.

    Attributes:
        artifact: What was found.
        path: Where the checkpoint is, or will be, on the cluster.
        requested: What the user wrote.
        error: Why nothing was found.
    """

    def __init__(self, env_file: Path | None, cwd: Path, environ: Mapping[str, str]) -> None:
        self._env_file, self._cwd, self._environ = env_file, cwd, environ
        self.artifact: Artifact | None = None
        self.path = ""
        self.requested = ""
        self.error: SlurmevalError | None = None

    def of_registry(self, model: str, attribute: str, root: DictConfig) -> Any:
        """Return an attribute of the artifact, looked up the first time."""
        if self.artifact is None:
            self._look_up(model, root)
        assert self.artifact is not None
        known = {
            "path": self.path,
            "name": self.artifact.name,
            "version": self.artifact.version,
        }
        if attribute in known:
            return known[attribute]
        return _of_metadata(self.artifact, attribute.removeprefix("metadata."))

    def section(self) -> dict[str, Any]:
        """Return what was found as ``run.artifact`` holds it."""
        assert self.artifact is not None
        found = self.artifact
        values = {
            "name": found.name,
            "version": found.version,
            "requested": self.requested,
            "source": found.source,
            "path": self.path,
            "download": found.download,
            "base_url": found.base_url,
        }
        return {name: value for name, value in values.items() if value is not None}

    def note(self) -> str:
        """Say what was found."""
        assert self.artifact is not None
        stored = "stored there; the job downloads it once, to " if self.artifact.download else ""
        return (
            f"{self.requested} is {self.artifact.name}:{self.artifact.version} "
            f"({self.artifact.source}): {stored}{self.path}"
        )

    def pinned(self) -> str:
        """Return ``run.model`` with its concrete version."""
        assert self.artifact is not None
        return f"{self.requested.split(':')[0]}:{self.artifact.version}"

    def _look_up(self, model: str, root: DictConfig) -> None:
        if self.error:
            raise UnresolvedModel(self.error.message)
        question = Question(
            model,
            registry=_text(root, "run.registry"),
            entity=_text(root, "run.wandb.entity"),
            project=_text(root, "run.wandb.project"),
            env_file=self._env_file,
        )
        try:
            found = find_artifact(question, self._cwd, self._environ)
        except SlurmevalError as error:
            self.error = error
            raise UnresolvedModel(error.message) from error
        self.path = found.path or f"{self._cache(root)}/{cache_name(found)}"
        self.artifact, self.requested = found, model if ":" in model else f"{model}:{LATEST}"

    def _cache(self, root: DictConfig) -> str:
        """Return the directory of downloaded models, as the job sees it."""
        base = _text(root, "run.env.remote_job_dir")
        here = _text(root, "run.env.executor") == "local"
        if base is None and not here:
            raise Unresolved(
                "the artifact's files are stored in the registry, and the job keeps them below"
                " run.env.remote_job_dir, which is not set"
            )
        if here:
            return os.path.normpath(self._cwd / (base or _LOCAL_BASE) / CACHE)
        if not str(base).startswith("/"):
            raise Unresolved(
                f"the artifact's files are kept below run.env.remote_job_dir, which must be an"
                f' absolute path for that, not "{base}"'
            )
        return f"{str(base).rstrip('/')}/{CACHE}"


def cache_name(artifact: Artifact) -> str:
    """Return the name of a stored artifact's directory; other files have another name."""
    digest = "".join(c for c in artifact.digest or "" if c.isalnum())[:8]
    return "-".join(part for part in (artifact.name, artifact.version, digest) if part)


def _of_metadata(artifact: Artifact, dotted: str) -> Any:
    value: Any = artifact.metadata
    for key in dotted.split("."):
        if not isinstance(value, dict) or key not in value:
            known = value if isinstance(value, dict) else {}
            raise Unresolved(
                f"{artifact.name}:{artifact.version} has no metadata {dotted}"
                f"{did_you_mean(key, map(str, known))}"
                + (f"; it has {', '.join(map(str, known))}" if known else "")
            )
        value = value[key]
    return value


def _text(root: DictConfig, key: str) -> str | None:
    value = OmegaConf.select(root, key)
    return None if value is None else str(value)
