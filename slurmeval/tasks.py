"""The task catalogue: what nemo-evaluator-launcher knows of each benchmark, offline and fast.

``tasks.json`` is a snapshot made by ``scripts/refresh-tasks``; the launcher itself is not needed.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from importlib.resources import files
from typing import Any

from slurmeval.errors import ConfigError


@dataclass(frozen=True)
class TaskInfo:
    """What is known of one benchmark.

    Attributes:
        name: Its name within its harness, such as ``adlr_winogrande_5_shot``.
        harness: The harness that holds it, such as ``lm-evaluation-harness``.
        container: The harness's evaluation image.
        digest: The image's digest, ``sha256:…``.
        arch: What the image runs on: ``multiarch``, or ``amd`` for x86-64 alone.
        endpoint_types: ``completions``, ``chat``, ``vlm`` or ``embedding``.
        capabilities: What the endpoint must give besides text, such as ``logprobs``.
        parameters: The parameters its command uses (``temperature``, ``extra.num_fewshot``); the
            evaluator swallows all others.
        defaults: The values its parameters have when nobody sets them.
    """

    name: str
    harness: str
    container: str
    digest: str
    arch: str
    endpoint_types: tuple[str, ...]
    capabilities: tuple[str, ...]
    parameters: frozenset[str]
    defaults: Mapping[str, Any]

    @property
    def type(self) -> str:
        """The evaluator's ``config.type``, which no other harness in the same image can claim."""
        return f"{self.harness}.{self.name}"


@cache
def _snapshot() -> dict[str, Any]:
    snapshot: dict[str, Any] = json.loads(files("slurmeval").joinpath("tasks.json").read_bytes())
    return snapshot


@cache
def catalogue() -> dict[str, TaskInfo]:
    """Return all tasks by type, ``harness.name``."""
    tasks = {}
    for harness, entry in _snapshot()["harnesses"].items():
        for name, own in entry["tasks"].items():
            facts = _merged(entry["shared"], own)
            task = TaskInfo(
                name=name,
                harness=harness,
                container=entry["container"],
                digest=entry["digest"],
                arch=entry["arch"],
                endpoint_types=tuple(facts["endpoints"]),
                capabilities=tuple(facts["capabilities"]),
                parameters=frozenset(facts["parameters"]),
                defaults=facts["defaults"],
            )
            tasks[task.type] = task
    return tasks


def launcher_version() -> str:
    """Return the version of nemo-evaluator-launcher that the catalogue was taken from."""
    return str(_snapshot()["launcher"])


def harness_container(harness: str) -> str | None:
    """Return the evaluation image of a harness, or None for one that the catalogue lacks."""
    entry = _snapshot()["harnesses"].get(harness)
    return str(entry["container"]) if entry else None


def get(kind: str) -> TaskInfo | None:
    """Return the task of a type, ``harness.name``, or None for one that the catalogue lacks."""
    return catalogue().get(kind)


def parameters(kind: str) -> frozenset[str] | None:
    """Return the parameters that a task takes: ``limit_samples``, ``extra.num_fewshot``, ….

    A task that the catalogue lacks has those of all tasks of its harness.

    Args:
        kind: The evaluator's type, ``harness.name``.

    Returns:
        None where the catalogue does not know the harness.
    """
    if task := get(kind):
        return task.parameters
    harness = kind.partition(".")[0]
    found = [task.parameters for task in catalogue().values() if task.harness == harness]
    return frozenset().union(*found) if found else None


def needs(task: TaskInfo) -> list[str]:
    """Return what a task needs besides an endpoint that answers, a line each."""
    extra = task.defaults.get("extra", {})
    lines = []
    if "logprobs" in task.capabilities:
        lines.append("logprobs of the prompt's tokens from the endpoint (echo)")
    if "extra.tokenizer" in task.parameters:
        lines.append("a tokenizer: model.tokenizer, else the one in the checkpoint")
    for role in ("judge", "user"):
        other = extra.get(role) or {}
        if other.get("url"):
            lines.append(f"a {role} model: {other.get('model_id')} at {other['url']}")
    lines += [f"the environment variable {name}: name it in run.env.secrets" for name in keys(task)]
    lines.append("its data set: access to a hub, or run.env.hf_home with the data in it")
    return lines


def keys(task: TaskInfo) -> list[str]:
    """Return the environment variables that hold a task's API keys, by default."""

    def walk(value: Any) -> list[str]:
        if not isinstance(value, Mapping):
            return []
        here = [v for k, v in value.items() if k.endswith("api_key") and isinstance(v, str)]
        return here + [name for item in value.values() for name in walk(item)]

    return list(dict.fromkeys(walk(task.defaults.get("extra", {}))))


def find(name: str) -> TaskInfo:
    """Return the task called ``name`` or ``harness.name``.

    Raises:
        ConfigError: No task has this name, or several harnesses have one.
    """
    tasks = catalogue()
    if task := tasks.get(name):
        return task
    named = [task for task in tasks.values() if task.name == name]
    if len(named) == 1:
        return named[0]
    if named:
        raise ConfigError(
            f"several harnesses have a task {name!r}",
            hint="name one: " + ", ".join(task.type for task in named),
        )
    raise ConfigError(f"unknown task {name!r}", hint=_suggestion(name))


def search(pattern: str) -> list[TaskInfo]:
    """Return the tasks whose type holds ``pattern``, or matches it where it has ``*`` or ``?``.

    Upper and lower case are the same; the order is by type.
    """
    wanted = pattern.lower()
    if not any(sign in wanted for sign in "*?["):
        wanted = f"*{wanted}*"
    return [
        task
        for kind, task in sorted(catalogue().items())
        if fnmatchcase(kind.lower(), wanted) or fnmatchcase(task.name.lower(), wanted)
    ]


def _suggestion(name: str) -> str:
    tasks = catalogue()
    known = [*tasks, *(task.name for task in tasks.values())]
    close = list(dict.fromkeys(difflib.get_close_matches(name, known, n=3, cutoff=0.6)))
    custom = "for a task of your own give its type, as in: type: lm-evaluation-harness.my_task"
    return f"did you mean {' or '.join(close)}? Or, {custom}" if close else custom


def _merged(shared: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``shared`` with ``own`` laid over it, mappings key by key."""
    merged = dict(shared)
    for key, value in own.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = _merged(merged[key], value)
        else:
            merged[key] = value
    return merged
