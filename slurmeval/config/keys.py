"""What the schema says about a dotted key: which keys stand beside it, which it may have meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from functools import cache
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

from slurmeval.config.layers import KeyPath
from slurmeval.config.schema import Config

_SECRET = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE)


def is_secret(name: str) -> bool:
    """Return whether a name looks like that of a secret: ``HF_TOKEN``, but not ``max_tokens``."""
    return any(_SECRET.search(word) for word in re.split(r"[_.-]", name))


def closest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word that a mistyped one probably means."""
    plain = {name.lower().replace("-", "_"): name for name in known}
    found = difflib.get_close_matches(word.lower().replace("-", "_"), plain, n=1, cutoff=0.6)
    return plain[found[0]] if found else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``; did you mean "x"?``, or nothing."""
    meant = closest(word, known)
    return f'; did you mean "{meant}"?' if meant else ""


def fields_at(path: KeyPath) -> list[str]:
    """Return the keys that the schema knows below a path; none where it is not a section."""
    model = _model_at(path)
    return list(model.model_fields) if model else []


@cache
def all_keys() -> tuple[KeyPath, ...]:
    """Return every key of the schema outside lists, sections included."""
    return tuple(path for path, _ in _walk(Config, ()))


@cache
def sections() -> frozenset[KeyPath]:
    """Return the paths of the sections that are always there."""
    return frozenset(
        path
        for path, annotation in _walk(Config, ())
        if isinstance(annotation, type) and issubclass(annotation, BaseModel)
    )


def elsewhere(key: str) -> list[KeyPath]:
    """Return the keys of the schema, wherever they stand, that end in this name."""
    return [path for path in all_keys() if path[-1] == key]


def _walk(model: type[BaseModel], path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    for name, field in model.model_fields.items():
        here = (*path, name)
        yield here, field.annotation
        inner = _model_in(field.annotation)
        if inner and get_origin(field.annotation) is not list:
            yield from _walk(inner, here)


def _model_at(path: KeyPath) -> type[BaseModel] | None:
    model: type[BaseModel] | None = Config
    for key in path:
        if model is None:
            return None
        if not key.isdigit():
            field = model.model_fields.get(key)
            model = _model_in(field.annotation) if field else None
    return model


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """Return the section inside ``Section``, ``Section | None`` or ``list[Section]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Annotated, Union, UnionType, list):
        return next(filter(None, map(_model_in, get_args(annotation))), None)
    return None
