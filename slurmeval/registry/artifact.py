"""The small interface between ``run.model`` and a registry."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Protocol

from slurmeval.errors import ClusterError, ConfigError

LATEST = "latest"
_REFERENCE = re.compile(
    r"^(?:(?:(?P<entity>[\w.-]+)/)?(?P<project>[\w.-]+)/)?(?P<name>[\w.-]+)(?::(?P<version>[\w.-]+))?$"
)


class RegistryUnreachable(ClusterError):
    """A registry did not answer, or not in a way that can be understood."""


class NotInRegistry(ConfigError):
    """A registry answered, and has no such artifact or version."""


@dataclass(frozen=True)
class Reference:
    """What a user wrote: ``NAME``, ``NAME:VERSION`` or ``ENTITY/PROJECT/NAME:VERSION``.

    Attributes:
        name: The artifact's name.
        version: A version (``v5``) or an alias (``latest``).
        entity: The W&B entity, where it is written.
        project: The W&B project, where it is written.
    """

    name: str
    version: str = LATEST
    entity: str | None = None
    project: str | None = None

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Read a reference; a version that is a number is ``v`` and that number.

        Raises:
            ConfigError: The text is none.
        """
        match = _REFERENCE.match(text)
        if match is None:
            raise ConfigError(
                f'run.model is "{text}", neither a path nor an artifact',
                hint="an artifact is NAME:VERSION, such as ModelArtifact-sft:v5",
            )
        version = match["version"] or LATEST
        version = f"v{version}" if version.isdigit() else version
        return cls(match["name"], version, match["entity"], match["project"])

    def __str__(self) -> str:
        """Return it as it is written, with its version."""
        prefix = "".join(f"{part}/" for part in (self.entity, self.project) if part)
        return f"{prefix}{self.name}:{self.version}"


@dataclass(frozen=True)
class Artifact:
    """An artifact of one concrete version.

    Attributes:
        name: Its name.
        version: Its version, never an alias.
        source: The registry, for people: ``W&B team/project``, ``artifacts.yaml:12``.
        path: Where it lies on the cluster; None where its files are stored in the registry.
        metadata: What the registry knows about it.
        download: For stored files, the reference by which the job fetches them.
        base_url: For stored files, the server.
        digest: For stored files, a digest of all of them.
        size: Bytes, where the registry knows.
    """

    name: str
    version: str
    source: str
    path: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    download: str | None = None
    base_url: str | None = None
    digest: str | None = None
    size: int | None = None


class Registry(Protocol):
    """Knows artifacts by name and version."""

    def resolve(self, name: str, version: str) -> Artifact:
        """Return an artifact.

        Args:
            name: The artifact's name.
            version: A version, or an alias such as ``latest``.

        Raises:
            NotInRegistry: There is none.
            RegistryUnreachable: Nobody knows: the registry did not answer.
            ConfigError: The registry cannot be used as it is configured.
        """
