"""YAML text to plain data, with the line of every key; stricter and less surprising than 1.1.

Duplicate keys are errors. ``yes``, ``on`` and ``12:00:00`` are text, as in YAML 1.2: a walltime
is no number in base 60.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

#: More nodes than any configuration has; aliases of aliases reach it in a few lines.
MAX_NODES = 100_000

_TAG = "tag:yaml.org,2002:"


class YamlProblem(Exception):
    """Text that is not the YAML it should be.

    Attributes:
        what: The problem, for people; holds no text of the document.
        line: 1-based, ``None`` where unknown.
        column: 1-based, ``None`` where unknown.
    """

    def __init__(self, what: str, mark: yaml.Mark | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.line = mark.line + 1 if mark else None
        self.column = mark.column + 1 if mark else None


@dataclass
class Parsed:
    """A document.

    Attributes:
        value: Mappings, lists, text, numbers, booleans, ``None``.
        lines: For the path of each key and list entry, its 1-based line.
    """

    value: Any = None
    lines: dict[tuple[str, ...], int] = field(default_factory=dict)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


_Loader.add_implicit_resolver(_TAG + "null", re.compile(r"^(?:~|null|Null|NULL|)$"), None)
_Loader.add_implicit_resolver(
    _TAG + "bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), None
)
_Loader.add_implicit_resolver(_TAG + "int", re.compile(r"^-?(?:0|[1-9][0-9]*)$"), None)
_Loader.add_implicit_resolver(
    _TAG + "float",
    re.compile(r"^-?(?:0|[1-9][0-9]*)(?:\.[0-9]*(?:[eE][-+]?[0-9]+)?|[eE][-+]?[0-9]+)$"),
    None,
)
_Loader.add_implicit_resolver(_TAG + "merge", re.compile(r"^<<$"), None)


def parse_yaml(text: str, at: tuple[str, ...] = ()) -> Parsed:
    """Parse one YAML document; empty text gives ``None``.

    Args:
        text: The document.
        at: The key that it is the value of.

    Raises:
        YamlProblem: A syntax error, a duplicate key, a tag or nesting that is not supported.
    """
    try:
        node = yaml.compose(text, Loader=_Loader)
        builder = _Builder()
        value = None if node is None else builder.build(node, at, ())
    except yaml.MarkedYAMLError as error:
        what = error.problem or error.context or "syntax error"
        raise YamlProblem(_plain(what), error.problem_mark or error.context_mark) from None
    except yaml.reader.ReaderError as error:
        raise YamlProblem(f"a character that YAML does not allow: {error.reason}") from None
    except RecursionError:
        raise YamlProblem("it is nested too deeply") from None
    return Parsed(value, builder.lines)


def _plain(what: str) -> str:
    """Return PyYAML's wording with the token names of its parser made readable."""
    names = {"<block end>": "the end of the block", "<scalar>": "text", "<stream end>": "the end"}
    for name, words in names.items():
        what = what.replace(f"'{name}'", words)
    return re.sub(r"found undefined alias '?.*", "an alias (*name) without its anchor", what)


class _Builder:
    """Builds plain data from a composed node."""

    def __init__(self) -> None:
        self.lines: dict[tuple[str, ...], int] = {}
        self._nodes = 0

    def build(self, node: yaml.Node, path: tuple[str, ...], above: tuple[int, ...]) -> Any:
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise YamlProblem(f"it has more than {MAX_NODES} values", node.start_mark)
        if id(node) in above:
            raise YamlProblem("an alias (*name) lies inside its own anchor", node.start_mark)
        above = (*above, id(node))
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return self._mapping(node, path, above)
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            items = []
            for index, item in enumerate(node.value):
                here = (*path, str(index))
                self.lines[here] = item.start_mark.line + 1
                items.append(self.build(item, here, above))
            return items
        if isinstance(node, yaml.ScalarNode):
            return _scalar(node, as_text=path[-2:-1] == ("env_vars",))
        raise YamlProblem(f"the tag {node.tag} is not supported", node.start_mark)

    def _mapping(
        self, node: yaml.MappingNode, path: tuple[str, ...], above: tuple[int, ...]
    ) -> dict[str, Any]:
        values: dict[str, Any] = {}
        own: set[str] = set()
        for merged in _merged_mappings(node):
            values.update(self.build(merged, path, above))
        for key_node, value_node in node.value:
            if key_node.tag == _TAG + "merge":
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                raise YamlProblem("a key must be text", key_node.start_mark)
            key = key_node.value
            if key in own:
                raise YamlProblem(f'the key "{key}" stands here twice', key_node.start_mark)
            own.add(key)
            here = (*path, key)
            self.lines[here] = key_node.start_mark.line + 1
            values[key] = self.build(value_node, here, above)
        return values


def _merged_mappings(node: yaml.MappingNode) -> list[yaml.MappingNode]:
    """Return what ``<<`` merges into a mapping, the one that wins last."""
    merged: list[yaml.Node] = []
    for key_node, value_node in node.value:
        if key_node.tag == _TAG + "merge":
            several = isinstance(value_node, yaml.SequenceNode)
            merged += reversed(value_node.value) if several else [value_node]
    mappings = [item for item in merged if isinstance(item, yaml.MappingNode)]
    if len(mappings) != len(merged):
        raise YamlProblem("<< merges mappings only", node.start_mark)
    return mappings


def _scalar(node: yaml.ScalarNode, *, as_text: bool = False) -> Any:
    """Return the value of a scalar by its tag; a variable ``3.10`` is not the number 3.1."""
    text = node.value
    if as_text and node.tag.removeprefix(_TAG) in ("bool", "int", "float"):
        return text
    try:
        match node.tag.removeprefix(_TAG):
            case "str":
                return text
            case "null":
                return None
            case "bool":
                return {"true": True, "false": False}[text.lower()]
            case "int":
                return int(text)
            case "float":
                return float(text)
    except (KeyError, ValueError):
        kind = node.tag.removeprefix(_TAG)
        raise YamlProblem(f"the value is not of its tag !!{kind}", node.start_mark) from None
    raise YamlProblem(f"the tag {node.tag} is not supported", node.start_mark)
