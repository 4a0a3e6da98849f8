"""Plain data as YAML for people: block style, keys in their order, a comment beside each leaf."""

from __future__ import annotations

from typing import Any

import yaml

from slurmeval.config.layers import KeyPath, dotted

#: Comments align here at the latest; longer lines carry theirs two blanks after the value.
MAX_COLUMN = 72


def emit(values: dict[str, Any], comments: dict[str, str] | None = None) -> str:
    """Return YAML text.

    Args:
        values: Plain data.
        comments: For dotted keys of leaves, the text of an aligned trailing comment.
    """
    lines = _mapping(values, (), "") if values else [("{}", ())]
    if comments is None:
        return "".join(f"{text}\n" for text, _ in lines)
    width = max((len(text) for text, _ in lines if len(text) <= MAX_COLUMN), default=0)
    shown = []
    for text, path in lines:
        comment = comments.get(dotted(path)) if path else None
        shown.append(f"{text:<{width}}  # {comment}\n" if comment else f"{text}\n")
    return "".join(shown)


#: A line and the path of the leaf on it.
_Line = tuple[str, KeyPath]


def _mapping(values: dict[str, Any], path: KeyPath, indent: str) -> list[_Line]:
    lines: list[_Line] = []
    for key, value in values.items():
        here = (*path, key)
        head = f"{indent}{_scalar(key)}:"
        if isinstance(value, dict | list) and value:
            lines.append((head, ()))
            lines += _block(value, here, indent + "  ")
        else:
            lines.append((f"{head} {_scalar(value)}", here))
    return lines


def _block(value: dict[str, Any] | list[Any], path: KeyPath, indent: str) -> list[_Line]:
    if isinstance(value, dict):
        return _mapping(value, path, indent)
    lines: list[_Line] = []
    for index, item in enumerate(value):
        here = (*path, str(index))
        if isinstance(item, dict | list) and item:
            inner = _block(item, here, indent + "  ")
            first, first_path = inner[0]
            lines += [(f"{indent}- {first[len(indent) + 2 :]}", first_path), *inner[1:]]
        else:
            lines.append((f"{indent}- {_scalar(item)}", here))
    return lines


def _scalar(value: Any) -> str:
    """Return a value on one line, quoted where YAML needs it."""
    style = '"' if isinstance(value, str) and not value.isprintable() else None
    text: str = yaml.safe_dump(
        value, default_style=style, default_flow_style=True, width=1 << 30, allow_unicode=True
    )
    return text.removesuffix("\n").removesuffix("\n...").removesuffix("\n")
