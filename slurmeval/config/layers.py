"""Layers of configuration: plain data in which every key knows where it was written.

A layer is laid over another: mappings merge, everything else (lists too) replaces.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from slurmeval.config.yamltext import YamlProblem, parse_yaml
from slurmeval.errors import ConfigError

#: A key's way from the root; positions in lists are digits.
KeyPath = tuple[str, ...]

COMMAND_LINE = "command line"


def dotted(path: KeyPath) -> str:
    """Return ``a.b.0`` for ``("a", "b", "0")``."""
    return ".".join(path)


def leaves(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Yield the path and value of every scalar and of every empty mapping or list."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    elif isinstance(value, list) and value:
        for index, item in enumerate(value):
            yield from leaves(item, (*path, str(index)))
    else:
        yield path, value


@dataclass
class Layer:
    """Values of one source, or of several merged ones.

    Attributes:
        values: Plain data as YAML or TOML gives it, interpolations unresolved.
        origins: For each path, where it was written: ``configs/sft.yaml:12``.
    """

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[KeyPath, str] = field(default_factory=dict)

    def origin(self, path: KeyPath) -> str | None:
        """Return where a path, or the nearest mapping or list above it, was written."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.origins:
                return self.origins[path[:length]]
        return None

    def get(self, path: KeyPath) -> Any:
        """Return the value at a path, ``None`` where there is none."""
        node: Any = self.values
        for key in path:
            node = node.get(key) if isinstance(node, dict) else None
        return node

    def put(self, path: KeyPath, value: Any, origin: str) -> None:
        """Replace the value at a path below mappings, made where they are missing."""
        node = self.values
        for key in path[:-1]:
            if not isinstance(node.get(key), dict):
                node[key] = {}
            node = node[key]
        self.forget(path)
        node[path[-1]] = value
        self.origins[path] = origin

    def forget(self, path: KeyPath) -> None:
        """Drop the origins of a path and of everything below it."""
        for known in [known for known in self.origins if known[: len(path)] == path]:
            del self.origins[known]


def merge(base: Layer, over: Layer, *, sections: Collection[KeyPath] = ()) -> None:
    """Lay one layer over another.

    Args:
        base: Changed in place.
        over: Wins.
        sections: Mappings that a null leaves as they are; an empty ``env:`` of a file, whose
            keys are all commented out, says nothing.
    """
    _merge_mapping(base, base.values, over, over.values, (), sections)


def _merge_mapping(
    base: Layer,
    old: dict[str, Any],
    over: Layer,
    new: dict[str, Any],
    path: KeyPath,
    sections: Collection[KeyPath],
) -> None:
    for key, value in new.items():
        here = (*path, key)
        current = old.get(key)
        if value is None and here in sections and isinstance(current, dict):
            continue
        if isinstance(current, dict) and isinstance(value, dict) and value:
            _merge_mapping(base, current, over, value, here, sections)
            base.origins[here] = over.origins.get(here, base.origins.get(here, ""))
            continue
        if isinstance(current, dict) and value == {}:
            continue
        base.forget(here)
        old[key] = _copy(value)
        base.origins.update(
            (known, origin) for known, origin in over.origins.items() if known[: len(here)] == here
        )


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_copy(item) for item in value]
    return value


def concatenate(base: Layer, over: Layer, path: KeyPath) -> None:
    """Put the list of ``base`` at a path before the one of ``over``, without repeating entries."""
    first, second = _as_list(base.get(path)), _as_list(over.get(path))
    if not first or not second:
        return
    joined: list[Any] = []
    origins: dict[KeyPath, str] = {}
    for layer, items in ((base, first), (over, second)):
        for index, item in enumerate(items):
            if item not in joined:
                origins[(*path, str(len(joined)))] = layer.origin((*path, str(index))) or ""
                joined.append(item)
    over.put(path, joined, over.origin(path) or "")
    over.origins.update(origins)


def _as_list(value: Any) -> list[Any]:
    if isinstance(value, list):
        return value
    return [] if value is None else [value]


@dataclass(frozen=True)
class Override:
    """One ``KEY=VALUE`` of the command line."""

    path: KeyPath
    value: Any


def parse_override(text: str) -> Override:
    """Parse ``KEY=VALUE``: a dotted key (``eval.tasks.0.name``, ``eval.tasks[0].name``), YAML.

    Raises:
        ConfigError: There is no ``=``, a part of the key is empty, or the value is not YAML.
    """
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(
            f'"{text}" on the command line is not KEY=VALUE',
            hint="an override looks like eval.parallelism=64; a config file is given with -c",
        )
    path = tuple(re.sub(r"\[(\w*)\]", r".\1", key.strip()).split("."))
    if not all(path):
        raise ConfigError(f'"{key}" on the command line is not a key: a part of it is empty')
    try:
        return Override(path, parse_yaml(value, path).value)
    except YamlProblem as problem:
        raise ConfigError(
            f"the value of {dotted(path)} (command line) is not valid YAML: {problem.what}",
            hint=f"quote it for the shell and for YAML: '{key}=\"…\"'",
        ) from None


def apply_override(base: Layer, override: Override) -> None:
    """Set one key of the merged layers; a mapping merges, anything else replaces.

    Raises:
        ConfigError: A position lies outside its list.
    """
    node: Any = base.values
    last = len(override.path) - 1
    for depth, key in enumerate(override.path):
        here = override.path[: depth + 1]
        slot: Any = _position(node, key, here) if isinstance(node, list) else key
        child = node[slot] if isinstance(node, list) else node.get(slot)
        if depth < last:
            if not isinstance(child, dict | list):
                child = node[slot] = {}
                base.forget(here)
            node = child
        elif isinstance(child, dict) and isinstance(override.value, dict):
            for name, value in override.value.items():
                apply_override(base, Override((*here, name), value))
        else:
            node[slot] = override.value
            base.forget(here)
            base.origins[here] = COMMAND_LINE


def _position(items: list[Any], key: str, path: KeyPath) -> int:
    """Return the index that a part of a key means in a list."""
    if key.isascii() and key.isdigit() and int(key) < len(items):
        return int(key)
    have = f"positions 0 to {len(items) - 1}" if items else "no entries"
    raise ConfigError(
        f"{dotted(path)} (command line): {dotted(path[:-1])} is a list with {have}",
        hint=f"to replace the whole list: '{dotted(path[:-1])}=[…]'",
    )
