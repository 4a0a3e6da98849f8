"""The merged and resolved data against the schema: a ``Config``, or all problems in plain words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from slurmeval.config.keys import did_you_mean, elsewhere, fields_at, is_secret
from slurmeval.config.layers import KeyPath, dotted, leaves
from slurmeval.config.schema import ENV_NAME, MOUNT, SLURM_TIME, Config

#: A problem and the key it is about.
Problems = dict[KeyPath, str]

#: Sections with more keys than this are not listed in a message.
MAX_LISTED = 12

_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "list": "a list",
    "dict": "a mapping (key: value)",
    "model": "a mapping (key: value)",
}
_LIMITS = {
    "greater_than_equal": ("at least", "ge"),
    "less_than_equal": ("at most", "le"),
    "greater_than": ("more than", "gt"),
    "less_than": ("less than", "lt"),
}


def validate(values: dict[str, Any]) -> tuple[Config | None, Problems]:
    """Check the whole against the schema.

    Args:
        values: The merged data; whole numbers where text is meant become text, in place.

    Returns:
        The config, or ``None`` and what is wrong with which key.
    """
    try:
        config = Config.model_validate(values)
        problems = _booleans_for_numbers(values, config)
        return (None, problems) if problems else (config, {})
    except ValidationError as error:
        details = error.errors(include_url=False)
    numbers = [item for item in details if _is_number_for_text(item)]
    for item in numbers:
        _replace(values, _path(item, values), str(item["input"]))
    if numbers:
        return validate(values)
    return None, _problems(details, values)


def cross_checks(config: Config) -> Problems:
    """Return what is wrong between keys that are right by themselves."""
    env = config.run.env
    problems: Problems = {}
    if env.executor == "slurm" and env.tunnel == "ssh" and not env.host:
        problems["run", "env", "host"] = 'tunnel "ssh" needs the name of a login node here'
    problems |= _open_secrets(config.deploy.runtime_env.get("env_vars"))
    names = [task.name for task in config.eval.tasks]
    for index, name in enumerate(names):
        if name in names[:index]:
            problems["eval", "tasks", str(index), "name"] = f'the task "{name}" is there twice'
    return problems


def _open_secrets(variables: Any) -> Problems:
    """Return the secrets that the whole configuration would show, in ``config.yaml``."""
    names = variables if isinstance(variables, dict) else {}
    return {
        ("deploy", "runtime_env", "env_vars", name): (
            "is a secret, and would stand in config.yaml for all to read; name it in"
            " run.env.secrets: Ray's workers have those variables"
        )
        for name in names
        if is_secret(name) and names[name]
    }


def _booleans_for_numbers(values: Any, config: Config) -> Problems:
    """Return where ``true`` became 1, which pydantic does silently."""
    given = dict(leaves(values))
    return {
        path: f"must be a number{_got(path, given[path])}"
        for path, value in leaves(config.model_dump(mode="json", exclude_unset=True))
        if isinstance(given.get(path), bool) and not isinstance(value, bool)
    }


def _is_number_for_text(item: ErrorDetails) -> bool:
    return item["type"] == "string_type" and type(item["input"]) is int


def _problems(details: list[ErrorDetails], values: Mapping[str, Any]) -> Problems:
    """Turn pydantic's errors into one sentence for each key."""
    by_path: dict[KeyPath, list[ErrorDetails]] = {}
    for item in details:
        by_path.setdefault(_path(item, values), []).append(item)
    return {path: _sentence(path, items) for path, items in by_path.items()}


def _path(item: ErrorDetails, values: Any) -> KeyPath:
    """Return where an error lies; pydantic adds the tried type of a union to the place."""
    path: list[str] = []
    node = values
    for part in item["loc"]:
        if isinstance(node, dict) and (part in node or item["type"] == "missing"):
            node = node.get(part)
        elif isinstance(node, list) and isinstance(part, int) and part < len(node):
            node = node[part]
        else:
            break
        path.append(str(part))
    return tuple(path)


def _replace(values: Any, path: KeyPath, value: Any) -> None:
    node = values
    for key in path[:-1]:
        node = node[int(key)] if isinstance(node, list) else node[key]
    node[int(path[-1]) if isinstance(node, list) else path[-1]] = value


def _sentence(path: KeyPath, items: list[ErrorDetails]) -> str:
    """Say what is wrong with a key; of a union's errors, the widest type speaks."""
    item = items[-1]
    kind, context = item["type"], item.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown(path)
    if kind == "missing":
        return "is required"
    return f"{_rule(path, kind, context, item['msg'])}{_got(path, item['input'])}"


def _unknown(path: KeyPath) -> str:
    key, beside = path[-1], fields_at(path[:-1])
    meant = did_you_mean(key, beside)
    others = [dotted(other) for other in elsewhere(key)]
    if not meant and others:
        meant = f"; did you mean {' or '.join(others)}?"
    if not meant and 0 < len(beside) <= MAX_LISTED:
        meant = f"; known here: {', '.join(beside)}"
    return f"unknown key{meant}"


_PATTERNS = {
    SLURM_TIME.pattern: "must be a time as Slurm writes it, such as 04:00:00 or 1-12:00:00",
    ENV_NAME.pattern: "must be the name of a variable: letters, digits and underscores",
    MOUNT.pattern: "must be SRC:DST[:FLAGS], without commas",
}


def _rule(path: KeyPath, kind: str, context: Mapping[str, Any], message: str) -> str:
    """Say what the schema asks of a value."""
    if kind in _LIMITS:
        words, name = _LIMITS[kind]
        return f"must be {words} {context[name]:g}"
    if kind == "literal_error":
        return f"must be {context['expected']}"
    if kind == "string_pattern_mismatch":
        if context["pattern"] in _PATTERNS:
            return _PATTERNS[context["pattern"]]
        return "may hold letters, digits, dots, dashes and underscores only"
    if kind == "string_too_long":
        return f"must not be longer than {context['max_length']} characters"
    if kind == "string_type":
        return 'must be text (write it in quotes: "…")'
    if kind in ("finite_number", "int_from_float"):
        return "must be a finite number" if kind == "finite_number" else "must be a whole number"
    base = kind.split("_")[0]
    return f"must be {_KINDS[base]}" if base in _KINDS else message


def _got(path: KeyPath, value: Any) -> str:
    """Return the value that is there, unless it may be a secret."""
    if any(is_secret(part) for part in path) or path[:3] == ("run", "env", "secrets"):
        return " (value not shown)"
    if value is None:
        return ", got nothing (null)"
    if isinstance(value, dict | list):
        return f", got a {'mapping' if isinstance(value, dict) else 'list'}"
    text = str(value).lower() if isinstance(value, bool) else str(value)
    shown = text if len(text) <= 60 else text[:57] + "…"
    return f', got "{shown}"' if isinstance(value, str) else f", got {shown}"
