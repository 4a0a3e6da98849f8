"""The GPU sums of a deployment: what has to divide what, and which node holds which rank.

Export-Deploy's Ray deployment (``nemo_deploy.deploy_ray``) checks none of this. A sum that is wrong
there leaves actors pending for ever, idles GPUs in silence, or fails minutes later in every rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from slurmeval.config.schema import Config, Env
from slurmeval.errors import ConfigError

#: CPUs that Serve's controller and its HTTP proxy want on a node, beside the replicas.
SERVE_CPUS = 2
#: The configuration's key of each number of a layout.
KEYS = {
    "nodes": "run.env.nodes",
    "num_gpus": "deploy.num_gpus",
    "num_replicas": "deploy.num_replicas",
    "tensor": "deploy.tensor_model_parallel_size",
    "pipeline": "deploy.pipeline_model_parallel_size",
    "context": "deploy.context_parallel_size",
    "expert": "deploy.expert_model_parallel_size",
    "expert_tensor": "deploy.expert_tensor_parallel_size",
}


@dataclass(frozen=True)
class Layout:
    """The numbers that decide whether the GPUs of a deployment add up.

    Attributes:
        backend: ``megatron``: a replica is one actor for each GPU, on any nodes. ``hf``: a replica
            is one actor that has all its GPUs on one node.
        num_gpus: All GPUs of the deployment, over all nodes and replicas.
        num_replicas: Copies of the model.
        tensor: Tensor-parallel size.
        pipeline: Pipeline-parallel size.
        context: Context-parallel size.
        expert: Expert-parallel size.
        expert_tensor: Tensor-parallel size within the experts.
        nodes: Number of nodes.
        gpus_of_node: GPUs that a node has; None where the profile does not say.
        one_node: Whether there can be no second node.
        share: GPUs that a replica of ``hf`` reserves, also a fraction; None for its even share.
    """

    backend: Literal["megatron", "hf"]
    num_gpus: int
    num_replicas: int = 1
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    expert_tensor: int = 1
    nodes: int = 1
    gpus_of_node: int | None = None
    one_node: bool = False
    share: float | None = None

    @property
    def world(self) -> int:
        """GPUs of one replica; of a fraction, the GPU that it is of."""
        return self.num_gpus // self.num_replicas if self.share is None else math.ceil(self.share)

    @property
    def fit(self) -> int:
        """Replicas of the hf backend that a node holds."""
        if self.share is not None:
            return int(self.gpus_per_node / self.share + 1e-9)
        return self.gpus_per_node // self.world if self.world else self.num_replicas

    @property
    def dense(self) -> int:
        """Ranks that hold the layers outside the experts once."""
        return self.tensor * self.pipeline * self.context

    @property
    def sparse(self) -> int:
        """Ranks that hold the experts once."""
        return self.expert_tensor * self.expert * self.pipeline

    @property
    def unit(self) -> int:
        """GPUs of the smallest replica that these sizes allow."""
        if self.backend == "megatron":
            return math.lcm(self.dense, self.sparse)
        return 1 if self.share is None else self.world

    @property
    def copies(self) -> int:
        """How many times one replica holds the model."""
        return max(1, self.world // self.unit) if self.backend == "megatron" else 1

    @property
    def gpus_per_node(self) -> int:
        """GPUs of a node: the profile's, else as few as the deployment needs."""
        if self.gpus_of_node is not None:
            return self.gpus_of_node
        if self.backend == "hf":
            most = math.ceil(self.num_replicas / self.nodes)
            if self.share is None:
                return self.world * most
            return max(math.ceil(self.share * most), math.ceil(self.num_gpus / self.nodes))
        return math.ceil(self.num_gpus / self.nodes)

    @property
    def nodes_needed(self) -> int:
        """The fewest nodes that hold the deployment."""
        if not self.world:
            return min(self.nodes, self.num_replicas)
        if self.backend == "hf":
            return math.ceil(self.num_replicas / max(1, self.fit))
        return math.ceil(self.num_gpus / max(1, self.gpus_per_node))

    @property
    def idle_gpus(self) -> int:
        """GPUs of all nodes that no replica uses."""
        used = self.num_gpus if self.share is None else math.ceil(self.share * self.num_replicas)
        return self.nodes * self.gpus_per_node - used


@dataclass(frozen=True)
class Ranks:
    """Ranks of one replica that lie on one node.

    Attributes:
        replica: The replica, from 0.
        first: The first rank.
        last: The last rank.
    """

    replica: int
    first: int
    last: int


def layout_of(config: Config) -> Layout:
    """Return the numbers of a configuration."""
    deploy, env = config.deploy, config.run.env
    return Layout(
        backend=deploy.backend,
        num_gpus=deploy.num_gpus,
        num_replicas=deploy.num_replicas,
        tensor=deploy.tensor_model_parallel_size,
        pipeline=deploy.pipeline_model_parallel_size,
        context=deploy.context_parallel_size,
        expert=deploy.expert_model_parallel_size,
        expert_tensor=deploy.expert_tensor_parallel_size,
        nodes=env.nodes,
        gpus_of_node=env.gpus_per_node,
        one_node=env.executor == "local",
        share=deploy.num_gpus_per_replica if deploy.backend == "hf" else None,
    )


def check(layout: Layout) -> None:
    """Check the sums.

    Raises:
        ConfigError: With the rule, the numbers, and the nearest configuration that works.
    """
    wrong = violation(layout)
    if wrong is None:
        return
    better = nearest(layout)
    words = " or ".join(" ".join(changes(layout, other)) for other in better)
    hint = f"nearest that works: {words}" if better else "no change of these numbers would work"
    raise ConfigError(wrong, hint=hint)


def violation(layout: Layout) -> str | None:
    """Return the first rule that the numbers break, or None."""
    gpus, replicas, world = layout.num_gpus, layout.num_replicas, layout.world
    if layout.one_node and layout.nodes != 1:
        return f"run.env.nodes is {layout.nodes}: the local executor has one node"
    if layout.backend == "megatron" and not gpus:
        return "deploy.num_gpus is 0: a Megatron checkpoint needs GPUs to serve"
    if layout.share is not None and layout.share * replicas > gpus:
        return (
            f"deploy.num_gpus_per_replica={layout.share:g} x deploy.num_replicas={replicas} is "
            f"more than deploy.num_gpus={gpus}"
        )
    if layout.share is None and gpus % replicas:
        return (
            f"deploy.num_gpus={gpus} is no multiple of deploy.num_replicas={replicas}: "
            f"{gpus % replicas} GPU(s) would idle"
        )
    return (_indivisible(layout) if layout.backend == "megatron" else None) or _too_many(
        layout, world
    )


def _indivisible(layout: Layout) -> str | None:
    """A replica's ranks must form whole groups, those of the experts included."""
    for product, words in (
        (
            layout.dense,
            f"tensor {layout.tensor} x pipeline {layout.pipeline} x context {layout.context}",
        ),
        (
            layout.sparse,
            f"expert-tensor {layout.expert_tensor} x expert {layout.expert}"
            f" x pipeline {layout.pipeline}",
        ),
    ):
        if layout.world % product:
            return (
                f"deploy: a replica has {layout.world} GPU(s) (num_gpus {layout.num_gpus} / "
                f"num_replicas {layout.num_replicas}), which {words} = {product} does not divide"
            )
    return None


def _too_many(layout: Layout, world: int) -> str | None:
    """All GPUs must be there; one replica of the hf backend needs all of its own on one node."""
    nodes, of_node = layout.nodes, layout.gpus_per_node
    if layout.num_gpus > nodes * of_node:
        return (
            f"deploy.num_gpus={layout.num_gpus}, but {nodes} node(s) x {of_node} GPUs "
            f"(run.env.nodes, run.env.gpus_per_node) are {nodes * of_node}"
        )
    if layout.backend == "hf" and world > of_node:
        return (
            f"deploy: a replica has {world} GPUs (num_gpus {layout.num_gpus} / num_replicas "
            f"{layout.num_replicas}), and a node {of_node} (run.env.gpus_per_node): "
            "the hf backend holds a replica on one node"
        )
    if layout.backend == "hf" and layout.nodes_needed > nodes:
        fit = layout.fit
        return (
            f"deploy.num_replicas={layout.num_replicas}, but a node with {of_node} GPUs holds "
            f"{fit} replica(s) of {world}, and {nodes} node(s) {nodes * fit}"
        )
    return None


def nearest(layout: Layout) -> list[Layout]:
    """Return the nearest layouts that work.

    Returns:
        The nearest of all; and where that takes more nodes, the nearest on the nodes that are
        there. Sizes of parallelism are changed only where nothing else works.
    """
    found = _candidates(layout)
    if not found:
        found = [other for smaller in _smaller(layout) for other in _candidates(smaller)]
    if not found:
        return []
    best = min(found, key=lambda other: _distance(layout, other))
    here = [other for other in found if other.nodes <= layout.nodes]
    if best.nodes <= layout.nodes or not here:
        return [best]
    return [best, min(here, key=lambda other: _distance(layout, other))]


def changes(layout: Layout, other: Layout) -> list[str]:
    """Return what leads from one layout to another, as ``KEY=VALUE``."""
    return [
        f"{key}={getattr(other, name)}"
        for name, key in KEYS.items()
        if getattr(other, name) != getattr(layout, name)
    ]


def _candidates(layout: Layout) -> list[Layout]:
    """Return layouts near this one that work, with the same sizes of parallelism."""
    unit, of_node = layout.unit, layout.gpus_of_node or 0
    found = []
    for replicas in range(1, max(2 * layout.num_replicas, layout.num_replicas + 2)):
        size = unit * replicas
        gpus = {layout.num_gpus}
        for number in (layout.num_gpus, layout.nodes * of_node, replicas * of_node, size):
            gpus |= {number // size * size, -(-number // size) * size}
        for number in gpus:
            if not number and layout.num_gpus and layout.gpus_of_node != 0:
                continue  # who asks for GPUs does not mean none
            other = replace(layout, num_gpus=number, num_replicas=replicas)
            if layout.one_node:
                other = replace(other, nodes=1)
            if number and other.nodes_needed > other.nodes and not layout.one_node:
                found.append(replace(other, nodes=other.nodes_needed))
            found.append(other)
    return [other for other in found if violation(other) is None]


def _smaller(layout: Layout) -> list[Layout]:
    """Return the same layout with one size of parallelism, or all of them, divided."""

    def parts(size: int) -> list[int]:
        return [number for number in range(1, size) if size % number == 0]

    return [
        *(replace(layout, tensor=number) for number in parts(layout.tensor)),
        *(replace(layout, pipeline=number) for number in parts(layout.pipeline)),
        *(replace(layout, context=number) for number in parts(layout.context)),
        *(replace(layout, expert=number) for number in parts(layout.expert)),
        *(replace(layout, expert_tensor=number) for number in parts(layout.expert_tensor)),
        replace(layout, tensor=1, pipeline=1, context=1, expert=1, expert_tensor=1),
    ]


def _distance(layout: Layout, other: Layout) -> tuple[int, float, int]:
    """Order layouts by how many numbers change, then by how much; of equals, more GPUs win."""
    far = 0.0
    for name in KEYS:
        old, new = getattr(layout, name), getattr(other, name)
        far += abs(math.log2(max(new, 1) / max(old, 1)))
    return len(changes(layout, other)), far, -other.num_gpus


def placement(layout: Layout) -> list[list[Ranks]]:
    """Return for each node the ranks that it holds where Ray fills one node after another.

    There is no guarantee: Export-Deploy uses no placement group. Ray draws rank 0 of a Megatron
    replica to the replica's node if it can, and puts every other rank where a GPU is free.
    """
    nodes: list[list[Ranks]] = [[] for _ in range(layout.nodes)]
    of_node, world = layout.gpus_per_node, layout.world
    if not world:
        for replica in range(layout.num_replicas):
            nodes[replica % layout.nodes].append(Ranks(replica, 0, 0))
        return nodes
    if layout.share is not None:
        for replica in range(layout.num_replicas):
            nodes[replica // layout.fit].append(Ranks(replica, 0, world - 1))
        return nodes
    slot = 0
    for replica in range(layout.num_replicas):
        if layout.backend == "hf" and slot % of_node + world > of_node:
            slot += of_node - slot % of_node
        rank = 0
        while rank < world:
            taken = min(world - rank, of_node - slot % of_node)
            nodes[slot // of_node].append(Ranks(replica, rank, rank + taken - 1))
            rank, slot = rank + taken, slot + taken
    return nodes


def cpus_needed(config: Config, layout: Layout) -> int:
    """Return the logical CPUs that Ray must be told of on each node.

    Every Megatron rank is an actor with one CPU; all replicas may land on one node.
    """
    deploy = config.deploy
    if deploy.backend == "megatron":
        ranks, replicas = min(layout.num_gpus, layout.gpus_per_node), layout.num_replicas
    else:
        ranks, replicas = 0, min(layout.num_replicas, layout.fit)
    return ranks + math.ceil(replicas * deploy.num_cpus_per_replica) + SERVE_CPUS


def warnings(config: Config, layout: Layout) -> list[str]:
    """Return what works and is probably not meant, with the numbers."""
    return [
        *_idle(layout),
        *_copies(layout),
        *_across_nodes(layout),
        *_few_cpus(config, layout),
    ]


def _idle(layout: Layout) -> list[str]:
    there, spare = layout.nodes * layout.gpus_per_node, layout.nodes - layout.nodes_needed
    words = []
    if layout.idle_gpus:
        words.append(f"{layout.idle_gpus} of {there} GPUs stay idle")
    if spare:
        words.append(
            f"{layout.nodes_needed} of {layout.nodes} nodes would do"
            f" (run.env.nodes={layout.nodes_needed})"
        )
    return ["; ".join(words)] if words else []


def _copies(layout: Layout) -> list[str]:
    if layout.copies == 1:
        return []
    return [
        f"each replica of {layout.world} GPUs holds the model {layout.copies} times, and the "
        f"copies do the same work: {KEYS['num_replicas']}={layout.num_replicas * layout.copies} "
        f"would serve {layout.copies} times as many requests at once"
    ]


def _across_nodes(layout: Layout) -> list[str]:
    of_node = layout.gpus_per_node
    if layout.backend == "hf" or layout.num_gpus <= of_node or of_node % layout.tensor == 0:
        return []
    return [
        f"tensor parallel groups of {layout.tensor} GPUs do not fit nodes of {of_node}: "
        "some span two nodes, over a network that is slower than a node's own links"
    ]


def cpus_asked(env: Env, needed: int) -> int | None:
    """Return the CPUs of a node that Slurm is asked for, or None for whole nodes.

    The job has one task a node, and Slurm's own default is one CPU a task, on which Ray and the
    replicas would starve.

    Args:
        env: Where the job runs.
        needed: What the plan counts on.
    """
    if env.cpus_per_task:
        return env.cpus_per_task * (env.ntasks_per_node or 1)
    return None if env.exclusive else env.cpus_per_node or needed


def _few_cpus(config: Config, layout: Layout) -> list[str]:
    env, needed = config.run.env, cpus_needed(config, layout)
    key = "cpus_per_task" if env.cpus_per_task else "cpus_per_node"
    asked = cpus_asked(env, needed)
    if asked is None or asked >= needed:
        return []
    return [
        f"run.env.{key}={asked}, but the processes of a node count on {needed} CPUs (one a rank, "
        f"{config.deploy.num_cpus_per_replica:g} a replica, {SERVE_CPUS} for Serve): they will "
        "share"
    ]
