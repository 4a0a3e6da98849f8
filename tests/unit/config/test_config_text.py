from __future__ import annotations

import yaml
from hypothesis import given
from hypothesis import strategies as st

from slurmeval.config.emit import emit
from slurmeval.config.layers import Layer, leaves, merge
from slurmeval.config.yamltext import YamlProblem, parse_yaml

_SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=12)
)
_DATA = st.recursive(
    _SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=6), inner, max_size=4)
    ),
    max_leaves=20,
)
_MAPPINGS = st.dictionaries(st.text(max_size=6), _DATA, max_size=4)


@given(_MAPPINGS)
def test_emitted_yaml_reads_back(values):
    assert yaml.safe_load(emit(values)) == values


@given(_MAPPINGS)
def test_comments_change_nothing_and_stand_beside_each_leaf(values):
    comments = {".".join(path): "here" for path, _ in leaves(values)}
    assert yaml.safe_load(emit(values, comments)) == values


def test_emitted_yaml_is_for_people():
    values = {"a": {"b": ["x", {"c": 1, "d": [2]}, []], "e": "12:00:00"}, "f": None}
    assert emit(values, {"a.b.0": "one", "a.e": "two"}) == (
        "a:\n"
        "  b:\n"
        "    - x          # one\n"
        "    - c: 1\n"
        "      d:\n"
        "        - 2\n"
        "    - []\n"
        "  e: '12:00:00'  # two\n"
        "f: null\n"
    )


@given(st.text("{}[]:,-&*!|>'\"#%@` \n\tab1?~<", max_size=40))
def test_any_text_is_parsed_or_refused(text):
    try:
        parsed = parse_yaml(text)
    except YamlProblem as problem:
        assert problem.what
    else:
        known = {path for path, _ in leaves(parsed.value) if path}
        assert known <= parsed.lines.keys()


def test_merge_keys_and_their_lines():
    parsed = parse_yaml("base: &b {x: 1, y: 2}\nmore: &m\n  y: 3\nuse:\n  <<: [*m, *b]\n  x: 4\n")
    assert parsed.value["use"] == {"x": 4, "y": 3}
    assert parsed.lines["use", "x"] == 6
    assert parsed.lines["use", "y"] == 3


def test_scalars_follow_yaml_1_2():
    parsed = parse_yaml("[yes, 12:30:00, 010, 1_0, 2001-01-01, 1e3, -5, 0, true, Null, ~, '']")
    assert parsed.value == [
        "yes",
        "12:30:00",
        "010",
        "1_0",
        "2001-01-01",
        1000.0,
        -5,
        0,
        True,
        None,
        None,
        "",
    ]


def _layer(values, name):
    return Layer(values, {path[:n]: name for path, _ in leaves(values) for n in range(len(path))})


@given(_MAPPINGS, _MAPPINGS)
def test_merging_keeps_the_upper_layer_and_what_it_does_not_touch(low, high):
    merged = Layer()
    merge(merged, _layer(low, "low"))
    merge(merged, _layer(high, "high"))
    for path, value in leaves(high):
        if path and value != {}:
            node = merged.values
            for key in path:
                node = node[int(key)] if isinstance(node, list) else node[key]
            assert node == value or (node != node and value != value)
    assert set(low) | set(high) == set(merged.values)
    for key in set(low) - set(high):
        assert merged.values[key] == low[key]
