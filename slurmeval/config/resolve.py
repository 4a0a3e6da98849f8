"""Interpolation: ``${run.env.host}``, ``${oc.env:NAME,default}``, ``${art:…}``, ``${demo:…}``."""

from __future__ import annotations

import inspect
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import (
    GrammarParseError,
    InterpolationKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    UnsupportedInterpolationType,
)
from omegaconf.resolvers import oc

from slurmeval.config.keys import all_keys, did_you_mean
from slurmeval.config.layers import KeyPath, dotted

#: A key of the seed's view of ``run.env`` is null where ``run.env`` has nothing for it.
NULL_WHERE_UNSET: KeyPath = ("eval", "execution")

_REFERENCE = re.compile(r"(?<!\\)\$\{(\.*[A-Za-z_][\w.\[\]]*)\}")
_LITERAL = re.compile(r"(\\*)\$\{")
_LOCK = threading.Lock()
# OmegaConf 2.4 renamed its function to a name that meant an older one before.
_register: Callable[..., None] = (
    OmegaConf.register_resolver
    if "replace" in inspect.signature(OmegaConf.register_resolver).parameters
    else OmegaConf.register_new_resolver
)


class Unresolved(Exception):
    """A resolver has no value; its message is for people."""


class UnresolvedModel(Unresolved):
    """``${art:…}`` has no value: ``run.model`` is missing, or its registry is not asked."""


class Model:
    """Answers ``${art:model,…}`` from ``run.model`` alone; asks no registry."""

    def answer(self, artifact: str, attribute: str = "path", *, _root_: DictConfig) -> Any:
        """Return an attribute of the model: ``path``, ``name``, ``version``, ``metadata.X``."""
        if artifact != "model":
            raise Unresolved(f'${{art:{artifact},…}} is not known; the only artifact is "model"')
        model = OmegaConf.select(_root_, "run.model")
        if not model:
            raise UnresolvedModel(
                "no model is given: run.model=/path/of/the/checkpoint, run.model=NAME:VERSION"
                " or model.checkpoint_path=/path/of/the/checkpoint"
            )
        if not is_path(str(model)):
            return self.of_registry(str(model), attribute, _root_)
        if attribute != "path":
            raise Unresolved(
                f"run.model is a path: ${{art:model,{attribute}}} is known only of an artifact"
            )
        return str(model)

    def of_registry(self, model: str, attribute: str, root: DictConfig) -> Any:
        """Return an attribute of an artifact.

        Raises:
            UnresolvedModel: The artifact is not looked up.
        """
        raise UnresolvedModel(
            f'run.model is "{model}", an artifact, which is looked up when the job is made'
        )


@dataclass
class Resolution:
    """What became of the interpolations.

    Attributes:
        values: The data; a key whose interpolation failed keeps its text.
        problems: For each failed key, why.
        unresolved_model: Of these, the ones that wait for ``run.model``.
    """

    values: dict[str, Any] = field(default_factory=dict)
    problems: dict[KeyPath, str] = field(default_factory=dict)
    unresolved_model: set[KeyPath] = field(default_factory=set)


def resolve(
    values: dict[str, Any], environ: Mapping[str, str], model: Model | None = None
) -> Resolution:
    """Resolve every interpolation of the merged data.

    Args:
        values: Plain data; left as it is.
        environ: The environment that ``${oc.env:…}`` and ``${demo:…}`` read.
        model: Answers ``${art:model,…}``; by default one that asks no registry.
    """
    resolution = Resolution()
    parsable = _without_malformed(values, (), resolution.problems)
    with _resolvers(environ, model or Model()):
        root = OmegaConf.create(parsable)
        walk = _Walk(root, resolution)
        resolution.values = walk.mapping(values, root, ())
    _drop_consequences(values, resolution.problems)
    return resolution


def resolve_own(profile: dict[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
    """Resolve what a profile's values refer to within the profile; the rest keeps its text.

    The whole configuration is resolved after it: dollar braces that are text by now are escaped.
    """
    own: dict[str, Any] = _escaped(resolve(profile, environ).values, profile)
    return own


def _escaped(found: Any, given: Any) -> Any:
    if isinstance(found, dict):
        below = given if isinstance(given, dict) else {}
        return {key: _escaped(item, below.get(key)) for key, item in found.items()}
    if isinstance(found, list):
        beside = given if isinstance(given, list) else [None] * len(found)
        return [_escaped(*pair) for pair in zip(found, beside, strict=True)]
    if isinstance(found, str) and found != given:
        return _LITERAL.sub(r"\1\1\\${", found)
    return found


@contextmanager
def _resolvers(environ: Mapping[str, str], model: Model) -> Iterator[None]:
    """Register the resolvers for the time of one resolution; OmegaConf keeps them globally."""

    def env(name: str, default: Any = ...) -> str | None:
        if name in environ:
            return environ[name]
        if default is ...:
            raise Unresolved(
                f"the environment variable {name} is not set"
                f" (a default is written ${{oc.env:{name},DEFAULT}})"
            )
        return None if default is None else str(default)

    def demo(name: str) -> str:
        return str(demo_dir(environ) / name)

    resolvers: dict[str, Callable[..., Any]] = {"oc.env": env, "art": model.answer, "demo": demo}
    with _LOCK:
        for name, function in resolvers.items():
            _register(name, function, replace=True)
        try:
            yield
        finally:
            OmegaConf.clear_resolver("art")
            OmegaConf.clear_resolver("demo")
            _register("oc.env", oc.env, replace=True)


def demo_dir(environ: Mapping[str, str]) -> Path:
    """Return where the demo's model and tasks are: ``SLURMEVAL_DEMO``, else the user's cache."""
    if environ.get("SLURMEVAL_DEMO"):
        return Path(environ["SLURMEVAL_DEMO"])
    cache = environ.get("XDG_CACHE_HOME", "")
    base = Path(cache) if cache.startswith("/") else home(environ) / ".cache"
    return base / "slurmeval" / "demo"


def home(environ: Mapping[str, str]) -> Path:
    """Return the user's home directory."""
    return Path(environ["HOME"]) if environ.get("HOME") else Path.home()


def is_path(model: str) -> bool:
    """Return whether ``run.model`` is a path, not ``NAME:VERSION`` or ``entity/project/NAME:V``."""
    if model.startswith(("/", "~", ".")):
        return True
    return "/" in model and not re.fullmatch(r"(?:[\w.-]+/){0,2}[\w.-]+:[\w.-]+", model)


def _without_malformed(value: Any, path: KeyPath, problems: dict[KeyPath, str]) -> Any:
    """Return a copy without the texts whose ``${`` does not parse, which are reported."""
    if isinstance(value, dict):
        return {
            key: _without_malformed(item, (*path, key), problems) for key, item in value.items()
        }
    if isinstance(value, list):
        return [
            _without_malformed(item, (*path, str(index)), problems)
            for index, item in enumerate(value)
        ]
    if isinstance(value, str) and "${" in value:
        try:
            OmegaConf.create({"value": value})
        except GrammarParseError:
            problems[path] = (
                "its ${…} is not an interpolation; a literal dollar brace is written \\${"
            )
            return None
    return value


class _Walk:
    """Goes through the plain data and its OmegaConf twin side by side."""

    def __init__(self, root: DictConfig, resolution: Resolution) -> None:
        self._root = root
        self._resolution = resolution

    def mapping(self, values: dict[str, Any], node: DictConfig, path: KeyPath) -> dict[str, Any]:
        return {key: self._item(value, node, key, (*path, key)) for key, value in values.items()}

    def _item(self, value: Any, parent: DictConfig | ListConfig, key: Any, path: KeyPath) -> Any:
        if isinstance(value, dict):
            return self.mapping(value, parent[key], path)
        if isinstance(value, list):
            node = parent[key]
            return [
                self._item(item, node, index, (*path, str(index)))
                for index, item in enumerate(value)
            ]
        if not isinstance(value, str) or path in self._resolution.problems:
            return value
        if value != "???" and "${" not in value:
            return value
        return self._text(value, parent, key, path)

    def _text(self, value: str, parent: DictConfig | ListConfig, key: Any, path: KeyPath) -> Any:
        problems = self._resolution.problems
        try:
            found = parent[key]
            if OmegaConf.is_config(found):
                return OmegaConf.to_container(found, resolve=True)
        except OmegaConfBaseException as error:
            problems[path] = _explain(error)
            if _raised(error)[0] == UnresolvedModel.__name__:
                self._resolution.unresolved_model.add(path)
            return value
        unset = [name for name in _outer_references(value) if self._is_null(name, parent)]
        if isinstance(found, str) and unset:
            if path[: len(NULL_WHERE_UNSET)] == NULL_WHERE_UNSET:
                return None
            problems[path] = f"it refers to {unset[0]}, which has no value (null)"
            return value
        return found

    def _is_null(self, name: str, parent: DictConfig | ListConfig) -> bool:
        return OmegaConf.select(parent if name.startswith(".") else self._root, name) is None


def _outer_references(text: str) -> list[str]:
    """Return the keys that a text refers to directly, not as the argument of a resolver."""
    outer, depth = "", 0
    for part in re.split(r"((?<!\\)\$\{|\})", text):
        if part == "}":
            depth = max(depth - 1, 0)
        depth += part == "${"
        if depth <= 1:
            outer += part
    return _REFERENCE.findall(outer)


def _raised(error: OmegaConfBaseException) -> tuple[str, str]:
    """Return class and message of what a resolver raised; OmegaConf keeps them as text only."""
    first = str(error).split("\n", 1)[0]
    name, found, message = first.partition(" raised while resolving interpolation: ")
    return (name, message) if found else ("", first)


def _explain(error: OmegaConfBaseException) -> str:
    """Say in plain words why an interpolation has no value."""
    name, message = _raised(error)
    if name in (Unresolved.__name__, UnresolvedModel.__name__):
        return message
    if isinstance(error, MissingMandatoryValue):
        return "a value must be given here (???)"
    if isinstance(error, UnsupportedInterpolationType):
        unknown = message.rsplit(" ", 1)[-1]
        return f"${{{unknown}:…}} is not known; known are oc.env, art and demo"
    named = re.search(r"Interpolation key '([^']*)'", message)
    if isinstance(error, InterpolationKeyError) and named:
        return _unknown_reference(named.group(1))
    if "Recursive" in message:
        return "it refers to itself"
    return message


def _unknown_reference(name: str) -> str:
    if re.fullmatch(r"[A-Z_][A-Z0-9_]*", name):
        return (
            f"there is no key {name}; a variable of this shell is ${{oc.env:{name}}},"
            f" one of the job's shell ${name} or \\${{{name}}}"
        )
    return f"it refers to {name}, which does not exist{did_you_mean(name, map(dotted, all_keys()))}"


def _drop_consequences(values: dict[str, Any], problems: dict[KeyPath, str]) -> None:
    """Drop the problems of keys that only refer to another key with a problem."""
    failed = {dotted(path) for path in problems}
    causes: dict[str, set[str]] = {}
    for path in problems:
        node: Any = values
        for key in path:
            node = node[int(key)] if isinstance(node, list) else node[key]
        causes[dotted(path)] = failed.intersection(_REFERENCE.findall(str(node)))
    for path in list(problems):
        name = dotted(path)
        if causes[name] and name not in _behind(name, causes):  # of a circle, each key tells
            del problems[path]


def _behind(name: str, causes: dict[str, set[str]]) -> set[str]:
    """Return all keys that a key's problem may come from."""
    found: set[str] = set()
    waiting = [*causes[name]]
    while waiting:
        if (each := waiting.pop()) not in found:
            found.add(each)
            waiting += causes[each]
    return found
