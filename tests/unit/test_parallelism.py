"""GPU sums, against an enumeration of every rank and its groups."""

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from slurmeval import parallelism
from slurmeval.config.schema import Config
from slurmeval.errors import ConfigError
from slurmeval.parallelism import KEYS, Layout, changes, check, nearest, placement, violation

sizes = st.sampled_from([1, 2, 3, 4, 8])
RANKS = ("tensor", "pipeline", "context", "expert", "expert_tensor")
layouts = st.builds(
    Layout,
    backend=st.sampled_from(["megatron", "hf"]),
    num_gpus=st.integers(0, 64),
    num_replicas=st.integers(1, 5),
    tensor=sizes,
    pipeline=sizes,
    context=sizes,
    expert=sizes,
    expert_tensor=sizes,
    nodes=st.integers(1, 5),
    gpus_of_node=st.none() | st.integers(0, 8),
    one_node=st.booleans(),
)


@st.composite
def working(draw):
    """Layouts that work, made from the parts of one replica."""
    hf = draw(st.booleans())
    replicas, nodes = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    ranks = {} if hf else dict(zip(RANKS, draw(st.tuples(*[sizes] * 5)), strict=True))
    layout = Layout("hf" if hf else "megatron", 1, replicas, **ranks, nodes=nodes)
    world = draw(st.integers(0, 8)) if hf else layout.unit * draw(st.integers(1, 3))
    layout = replace(layout, num_gpus=world * replicas)
    spare = draw(st.none() | st.integers(0, 9))
    return layout if spare is None else replace(layout, gpus_of_node=layout.gpus_per_node + spare)


def whole_groups(ranks, *group_sizes):
    """Whether every rank gets a place of its own in a grid of these sizes and any data axis."""
    for data in range(1, len(ranks) + 1):
        places = list(product(*(range(size) for size in (*group_sizes, data))))
        if len(places) == len(ranks):
            return True
        if len(places) > len(ranks):
            return False
    return False


def works(layout):
    """Deal GPUs to replicas, ranks to groups, replicas to nodes, one by one."""
    if layout.one_node and layout.nodes != 1:
        return False
    hands = [[] for _ in range(layout.num_replicas)]
    for gpu in range(layout.num_gpus):
        hands[gpu % len(hands)].append(gpu)
    if len({len(hand) for hand in hands}) != 1:
        return False
    there = layout.nodes * (layout.gpus_of_node if layout.gpus_of_node is not None else 10**6)
    if layout.num_gpus > there:
        return False
    if layout.backend == "megatron":
        return bool(layout.num_gpus) and all(
            whole_groups(hand, layout.tensor, layout.pipeline, layout.context)
            and whole_groups(hand, layout.expert_tensor, layout.expert, layout.pipeline)
            for hand in hands
        )
    if layout.gpus_of_node is None:
        return True
    free = [layout.gpus_of_node] * layout.nodes
    for hand in hands:
        node = next((n for n, left in enumerate(free) if left >= len(hand)), None)
        if node is None:
            return False
        free[node] -= len(hand)
    return True


@settings(deadline=None)
@given(layouts)
@example(Layout("megatron", 8, tensor=4, expert=8))
@example(Layout("hf", 4, nodes=2))
@example(Layout("hf", 6, 3, nodes=2, gpus_of_node=3))
def test_a_layout_is_accepted_exactly_where_every_rank_finds_its_place(layout):
    assert (violation(layout) is None) == works(layout)


@settings(deadline=None)
@given(layouts)
def test_what_the_hint_names_works(layout):
    if violation(layout):
        better = nearest(layout)
        assert better or (layout.backend == "megatron" and layout.gpus_of_node == 0)
        assert all(works(other) for other in better)


@settings(deadline=None)
@given(layouts.filter(lambda layout: layout.backend == "megatron"), st.integers(1, 64))
def test_no_change_of_one_number_is_nearer_than_the_hint(layout, gpus):
    if violation(layout) is None:
        return
    better = nearest(layout)
    single = [replace(layout, num_gpus=gpus), replace(layout, nodes=1 + gpus % 8)]
    for other in single:
        if works(other):
            assert len(changes(layout, better[0])) == 1


@settings(deadline=None)
@given(working())
def test_what_is_made_to_work_works(layout):
    assert violation(layout) is None


@settings(deadline=None)
@given(working())
def test_every_rank_lies_on_one_node_that_has_room(layout):
    seen = set()
    for node in placement(layout):
        on_node = [(r.replica, rank) for r in node for rank in range(r.first, r.last + 1)]
        assert len(on_node) <= layout.gpus_per_node or not layout.num_gpus
        assert seen.isdisjoint(on_node)
        seen.update(on_node)
        if layout.backend == "hf":
            assert all((r.first, r.last) == (0, max(layout.world, 1) - 1) for r in node)
    assert seen == set(product(range(layout.num_replicas), range(max(layout.world, 1))))


@settings(deadline=None)
@given(working())
def test_the_nodes_that_are_needed_are_those_that_packing_fills(layout):
    assert sum(map(bool, placement(layout))) == layout.nodes_needed


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), sizes, sizes)
def test_a_replica_of_several_units_holds_copies(copies, replicas, tensor, expert):
    layout = Layout("megatron", 1, replicas, tensor=tensor, expert=expert)
    layout = replace(layout, num_gpus=copies * layout.unit * replicas)
    assert works(layout) and layout.copies == copies


@pytest.mark.parametrize(
    ("layout", "words", "hint"),
    [
        (
            Layout("megatron", 6, tensor=4),
            "a replica has 6 GPU(s) (num_gpus 6 / num_replicas 1), which tensor 4 x pipeline 1 "
            "x context 1 = 4 does not divide",
            "deploy.num_gpus=8",
        ),
        (
            Layout("megatron", 4, tensor=4, expert=8),
            "expert-tensor 1 x expert 8 x pipeline 1 = 8",
            "deploy.num_gpus=8",
        ),
        (Layout("megatron", 8, 3, tensor=2), "2 GPU(s) would idle", "deploy.num_replicas=4"),
        (
            Layout("megatron", 16, tensor=8, nodes=1, gpus_of_node=8),
            "are 8",
            "run.env.nodes=2 or deploy.num_gpus=8",
        ),
        (
            Layout("megatron", 8, tensor=8, gpus_of_node=4, one_node=True),
            "are 4",
            "deploy.num_gpus=4 deploy.tensor_model_parallel_size=4",
        ),
        (
            Layout("hf", 16, nodes=2, gpus_of_node=8),
            "holds a replica on one node",
            "deploy.num_replicas=2",
        ),
        (Layout("megatron", 0), "needs GPUs", "deploy.num_gpus=1"),
        (Layout("megatron", 8, gpus_of_node=0), "are 0", "no change of these numbers"),
    ],
)
def test_messages_carry_rule_numbers_and_the_nearest_that_works(layout, words, hint):
    with pytest.raises(ConfigError) as caught:
        check(layout)
    assert words in caught.value.message
    assert hint in caught.value.hint


def test_the_keys_of_a_layout_are_those_of_the_schema():
    config = Config()
    for name, key in KEYS.items():
        value = config
        for part in key.split("."):
            value = getattr(value, part)
        assert getattr(parallelism.layout_of(config), name) == value


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (
            Layout("megatron", 8, tensor=8, nodes=3, gpus_of_node=8),
            "16 of 24 GPUs stay idle; 1 of 3 nodes would do (run.env.nodes=1)",
        ),
        (Layout("megatron", 4, tensor=4, gpus_of_node=8), "4 of 8 GPUs stay idle"),
        (Layout("megatron", 8, tensor=4), "holds the model 2 times"),
        (Layout("megatron", 12, tensor=4, nodes=2, gpus_of_node=6), "span two nodes"),
        (Layout("hf", 0, nodes=2), "1 of 2 nodes would do"),
    ],
)
def test_what_is_probably_not_meant_is_a_warning(layout, words):
    assert any(words in line for line in parallelism.warnings(Config(), layout))


def test_a_layout_that_uses_everything_warns_of_nothing():
    full = Layout("megatron", 16, 2, tensor=8, nodes=2, gpus_of_node=8)
    assert parallelism.warnings(Config(), full) == []


@pytest.mark.parametrize("gpus_of_node", [None, 8])
def test_the_nearest_that_works_does_not_take_the_gpus_away(gpus_of_node):
    layout = Layout("hf", 1, 2, gpus_of_node=gpus_of_node)
    assert [changes(layout, other) for other in nearest(layout)] == [["deploy.num_gpus=2"]]


@pytest.mark.parametrize(
    ("nodes", "of_node", "share", "replicas", "works"),
    [(2, 2, 1.0, 4, True), (2, 1, 0.5, 4, True), (2, 3, 2.0, 3, False), (1, 4, 8.0, 1, False)],
)
def test_shares_of_nodes(nodes, of_node, share, replicas, works):
    layout = Layout("hf", nodes * of_node, replicas, nodes=nodes, gpus_of_node=of_node, share=share)
    assert (violation(layout) is None) == works
    if works:
        assert sum(map(len, placement(layout))) == replicas
    for other in nearest(layout):
        assert violation(other) is None
