"""A registry in one file, ``artifacts.yaml``: names, versions and paths, without any service.

::

    ModelArtifact-sft:
      v1: /checkpoints/sft/iter_0001000
      v2:
        path: /checkpoints/sft/iter_0002000
        metadata: {iteration: 2000}
      best: v1                  # an alias; without a "latest", the highest version is it
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slurmeval.config.keys import did_you_mean
from slurmeval.config.yamltext import YamlProblem, parse_yaml
from slurmeval.errors import ConfigError
from slurmeval.registry.artifact import LATEST, Artifact, NotInRegistry

FILE_NAME = "artifacts.yaml"
_VERSION = re.compile(r"v(\d+)")


class FileRegistry:
    """The artifacts of one file.

    Args:
        path: The file.
        shown: Its name in messages.

    Raises:
        ConfigError: The file is not what it should be.
    """

    def __init__(self, path: Path, shown: str | None = None) -> None:
        self.shown = shown or str(path)
        try:
            parsed = parse_yaml(path.read_text(encoding="utf-8-sig"))
        except OSError as error:
            raise ConfigError(f"{self.shown} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"{self.shown} is not UTF-8 text (byte {error.start})") from None
        except YamlProblem as problem:
            raise ConfigError(f"{self.shown}:{problem.line or 1}: {problem.what}") from None
        self._lines = parsed.lines
        self._artifacts: dict[str, Any] = {} if parsed.value is None else parsed.value
        if not isinstance(self._artifacts, dict):
            raise ConfigError(f"{self.shown}: a mapping is expected, of names of artifacts")

    def names(self) -> list[str]:
        """Return the names of all artifacts."""
        return list(self._artifacts)

    def resolve(self, name: str, version: str) -> Artifact:
        """Return an artifact; see `Registry.resolve`."""
        if name not in self._artifacts:
            raise NotInRegistry(
                f"{self.shown} has no artifact {name}{did_you_mean(name, self._artifacts)}"
            )
        versions = self._versions(name)
        concrete = self._concrete(name, versions, version)
        entry = versions[concrete]
        if isinstance(entry, str):
            entry = {"path": entry}
        where = self._at(name, concrete)
        return Artifact(
            name,
            concrete,
            source=where,
            path=_path(entry, where),
            metadata=_metadata(entry, where),
        )

    def _versions(self, name: str) -> dict[str, Any]:
        versions = self._artifacts[name]
        if not isinstance(versions, dict) or not versions:
            raise ConfigError(f"{self._at(name)}: {name} is a mapping of versions (v1: /path)")
        return versions

    def _concrete(self, name: str, versions: Mapping[str, Any], version: str) -> str:
        """Follow aliases to the version that holds a path."""
        seen: list[str] = []
        while True:
            if version in seen:
                raise ConfigError(f"{self._at(name, version)}: {' -> '.join([*seen, version])}")
            seen.append(version)
            if version == LATEST and version not in versions:
                version = _highest(versions) or version
            if version not in versions:
                known = ", ".join(versions)
                raise NotInRegistry(
                    f"{self._at(name)}: {name} has no version {version}; it has {known}"
                )
            target = versions[version]
            if not isinstance(target, str) or target.startswith(("/", "~")):
                return version
            version = target

    def _at(self, *path: str) -> str:
        line = self._lines.get(path)
        return f"{self.shown}:{line}" if line else self.shown


def _highest(versions: Mapping[str, Any]) -> str | None:
    numbered = [(int(match[1]), name) for name in versions if (match := _VERSION.fullmatch(name))]
    return max(numbered)[1] if numbered else None


def _path(entry: Any, where: str) -> str:
    path = entry.get("path") if isinstance(entry, dict) else None
    if not isinstance(path, str) or not path.startswith(("/", "~/")):
        raise ConfigError(f"{where}: a version is an absolute path, or has one as its path")
    unknown = set(entry) - {"path", "metadata"}
    if unknown:
        raise ConfigError(
            f"{where}: a version has a path and metadata, and no {', '.join(sorted(unknown))}",
            hint="facts about the artifact stand in its metadata",
        )
    return path


def _metadata(entry: dict[str, Any], where: str) -> dict[str, Any]:
    metadata = entry.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise ConfigError(f"{where}: metadata is a mapping")
    return metadata
