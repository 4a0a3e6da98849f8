"""Which registry knows an artifact: the one that is named, ``artifacts.yaml``, then W&B."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from slurmeval.config.profiles import candidates, expand_home, shorten
from slurmeval.errors import ConfigError
from slurmeval.registry.artifact import Artifact, NotInRegistry, Reference, Registry
from slurmeval.registry.files import FILE_NAME, FileRegistry
from slurmeval.registry.weights_and_biases import WandbRegistry

WANDB = "wandb"


@dataclass(frozen=True)
class Question:
    """What is looked up, and where.

    Attributes:
        model: ``run.model``.
        registry: ``run.registry``: ``wandb``, a file, or None for the first that has it.
        entity: ``run.wandb.entity``.
        project: ``run.wandb.project``.
        env_file: The ``env.toml`` that was named, if any; an ``artifacts.yaml`` may lie beside it.
    """

    model: str
    registry: str | None = None
    entity: str | None = None
    project: str | None = None
    env_file: Path | None = None


def find_artifact(question: Question, cwd: Path, environ: Mapping[str, str]) -> Artifact:
    """Return the artifact that ``run.model`` names.

    Raises:
        ConfigError: There is none, or no registry to ask.
        RegistryUnreachable: W&B did not answer.
    """
    reference = Reference.parse(question.model)
    looked: list[str] = []
    for registry in _registries(question, reference, cwd, environ):
        try:
            return registry.resolve(reference.name, reference.version)
        except NotInRegistry as error:
            looked.append(error.message)
            last = error
    if len(looked) == 1:
        raise last
    if looked:
        raise NotInRegistry("; ".join(looked))
    raise ConfigError(
        f"run.model is {question.model}, and there is no registry to ask",
        hint=f"set project and entity in [wandb] of env.toml, or write an {FILE_NAME} beside it;"
        " or give the path, run.model=/path",
    )


def _registries(
    question: Question, reference: Reference, cwd: Path, environ: Mapping[str, str]
) -> list[Registry]:
    named = question.registry
    if named and named != WANDB:
        return [FileRegistry(_named_file(named, cwd, environ), named)]
    registries: list[Registry] = []
    in_wandb = reference.project is not None
    if named is None and not in_wandb and (file := _found_file(question.env_file, cwd, environ)):
        registries.append(FileRegistry(file, shorten(file, cwd, environ)))
    project = reference.project or question.project or environ.get("WANDB_PROJECT")
    if project:
        entity = reference.entity or question.entity or environ.get("WANDB_ENTITY")
        registries.append(WandbRegistry(entity, project))
    elif named == WANDB:
        raise ConfigError(
            "run.registry is wandb, and run.wandb.project is not set",
            hint="set project and entity in [wandb] of env.toml",
        )
    return registries


def _named_file(name: str, cwd: Path, environ: Mapping[str, str]) -> Path:
    path = cwd / expand_home(name, environ)
    if not path.is_file():
        raise ConfigError(
            f"run.registry: there is no file {name}", hint="it is wandb, or an artifacts.yaml"
        )
    return path


def _found_file(env_file: Path | None, cwd: Path, environ: Mapping[str, str]) -> Path | None:
    """Return the file that counts: beside a named ``env.toml``, else where one is looked for."""
    named = env_file or environ.get("NEMOTRON_ENV_FILE")
    beside = [(cwd / expand_home(str(named), environ)).parent / FILE_NAME] if named else []
    places = [*beside, *candidates(FILE_NAME, cwd, environ)]
    return next((path for path in places if path.is_file()), None)
