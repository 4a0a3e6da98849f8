"""Weights & Biases as a registry, through its own client.

An artifact either holds files, or refers to a place on the cluster's file system. Training jobs of
Megatron-Bridge and NVIDIA Nemotron log such references; Nemotron adds ``absolute_path``, the
directory above all iterations, and ``iteration``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from slurmeval.errors import ConfigError
from slurmeval.registry.artifact import Artifact, NotInRegistry, RegistryUnreachable

TIMEOUT = 30
_ITERATION = re.compile(r"iter_\d+")


class Entry(Protocol):
    """A file of an artifact's manifest."""

    path: str
    ref: str | None
    digest: str


class WandbRegistry:
    """The artifacts of one W&B project.

    The server and the key are those of the W&B client: ``WANDB_BASE_URL``, ``WANDB_API_KEY``, or
    what ``wandb login`` has stored.

    Args:
        entity: The user or team; None for the key's own.
        project: The project.
    """

    def __init__(self, entity: str | None, project: str) -> None:
        self._entity, self._project = entity, project

    def resolve(self, name: str, version: str) -> Artifact:
        """Return an artifact; see `Registry.resolve`."""
        api = self._connect()
        where = "/".join(part for part in (self._entity, self._project) if part)
        found = self._ask(lambda: api.artifact(f"{where}/{name}:{version}"), f"{name}:{version}")
        metadata = dict(found.metadata or {})
        entries: list[Entry] = []
        if not isinstance(metadata.get("absolute_path"), str) or "iteration" not in metadata:
            entries = self._ask(lambda: list(found.manifest.entries.values()), f"{name}:{version}")
        path = referenced_path(metadata, entries)
        short = found.name.rsplit("/", 1)[-1].split(":")[0]
        full = f"{found.entity}/{found.project}/{short}:{found.version}"
        return Artifact(
            short,
            found.version,
            source=f"W&B {found.entity}/{found.project}",
            path=path,
            metadata=metadata,
            download=None if path else full,
            base_url=None if path else str(api.settings["base_url"]),
            digest=None if path else found.digest,
            size=None if path else found.size,
        )

    def _connect(self) -> Any:
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        try:
            import wandb
        except ImportError:
            raise ConfigError(
                "run.model names an artifact of W&B, and its client is not installed",
                hint="pip install 'slurmeval[wandb]'; or give the path, run.model=/path",
            ) from None
        return self._ask(lambda: wandb.Api(timeout=TIMEOUT), None)

    def _ask(self, question: Any, artifact: str | None) -> Any:
        """Ask W&B, and say in one message what came of it."""
        try:
            return question()
        except Exception as error:  # the client raises classes of its own and of its libraries
            raise self._explained(error, artifact) from error

    def _explained(self, error: Exception, artifact: str | None) -> ConfigError | Exception:
        where = f"W&B {self._entity or 'your entity'}/{self._project}"
        text = _first_line(error)
        if "not found" in text.lower() or "404" in text:
            return NotInRegistry(
                f"{where} has no artifact {artifact}: {text}",
                hint="run.wandb.entity and run.wandb.project say where it is looked for",
            )
        if _refused(type(error).__name__, text):
            return ConfigError(
                f"W&B accepts no key of yours: {text}",
                hint="set WANDB_API_KEY, or run: wandb login",
            )
        return RegistryUnreachable(
            f"W&B gave no answer about {artifact or where}: {text}",
            hint="its server is WANDB_BASE_URL; or give the path, run.model=/path",
        )


def referenced_path(metadata: Mapping[str, Any], entries: Iterable[Entry]) -> str | None:
    """Return where a reference artifact lies, or None for one that holds its files.

    Args:
        metadata: The artifact's; an ``absolute_path`` in it counts most, since references may be
            written as the training container saw them.
        entries: Its files.
    """
    root = _reference_root(entries)
    base = metadata.get("absolute_path")
    if not isinstance(base, str) or not base.startswith("/"):
        return root
    base = base.rstrip("/") or "/"
    if _ITERATION.fullmatch(base.rsplit("/", 1)[-1]):
        return base
    iteration = re.fullmatch(r"(\d+)(?:\.0)?", str(metadata.get("iteration")))
    if iteration:
        return f"{base}/iter_{int(iteration[1]):07d}"
    last = root.rsplit("/", 1)[-1] if root else ""
    return f"{base}/{last}" if _ITERATION.fullmatch(last) else base


def _reference_root(entries: Iterable[Entry]) -> str | None:
    """Return the directory that holds all files that an artifact refers to."""
    folders = []
    for entry in entries:
        parts = urlsplit(entry.ref or "")
        if parts.scheme != "file":
            continue
        path = unquote(parts.path)
        # Older clients log a directory as one entry, whose digest is its address.
        folders.append(path if entry.digest == entry.ref else str(PurePosixPath(path).parent))
    return os.path.commonpath(folders) if folders else None


def _refused(kind: str, text: str) -> bool:
    status = re.search(
        r"\b(401|403)\b|[Uu]nauthori[sz]ed|not logged in|[Pp]ermission|relogin|[Ii]nvalid.*key",
        text,
    )
    return bool(status) or (kind == "UsageError" and "login" in text)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
