"""A plan in words and tables: what runs where, what stays idle, and what cannot be promised."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slurmeval.config.schema import Config
from slurmeval.parallelism import (
    SERVE_CPUS,
    Layout,
    Ranks,
    cpus_asked,
    cpus_needed,
    layout_of,
    placement,
)
from slurmeval.plan import Plan, peak_requests

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

NO_PROMISE = (
    "Which node holds which rank is where Ray puts it if it fills one node after another; "
    "Export-Deploy uses no placement group, so this is no promise. Ray draws only rank 0 of a "
    "replica to the node of the replica's own process, and takes another node if that one is full."
)


def without_open_model(config: Config) -> Config:
    """Return the configuration without a model whose registry has not been asked."""
    given = config.model.model_dump()
    still_open = [name for name in ("checkpoint_path", "tokenizer") if "${art:" in str(given[name])]
    model = config.model.model_copy(update=dict.fromkeys(still_open))
    return config.model_copy(update={"model": model})


def facts(config: Config, plan: Plan) -> dict[str, Any]:
    """Return the plan as data for ``--json``."""
    layout = layout_of(config)
    deploy, env = config.deploy, config.run.env
    return {
        "job": {"name": plan.job_name, "executor": env.executor, "time": env.time},
        "model": {
            "id": plan.model_id,
            "checkpoint": config.model.checkpoint_path,
            "backend": deploy.backend,
            "bytes_on_disk": size_on_disk(config.model.checkpoint_path),
        },
        "nodes": {
            "count": plan.nodes,
            "needed": layout.nodes_needed,
            "gpus_per_node": plan.gpus_per_node,
            "idle_gpus": layout.idle_gpus,
            "cpus_per_node": plan.cpus_per_node,
            "cpus_needed": cpus_needed(config, layout),
            "memory": env.mem,
        },
        "replicas": {
            "count": deploy.num_replicas,
            "gpus": layout.world,
            **({} if deploy.backend == "hf" else parallelism_of(layout)),
        },
        "placement": [
            [{"replica": r.replica, "ranks": [r.first, r.last]} for r in node]
            for node in placement(layout)
        ],
        "placement_is_guaranteed": False,
        "requests": {
            "evaluator": peak_requests(config),
            "per_replica": plan.max_ongoing_requests,
            "all_replicas": plan.max_ongoing_requests * deploy.num_replicas,
            "batch": deploy.max_batch_size if deploy.backend == "megatron" else None,
        },
        "tasks": [
            {
                "name": task.name,
                "type": task.type,
                "endpoint": task.endpoint,
                "image": task.image,
                "parallelism": task.params.get("parallelism"),
                "limit_samples": task.params.get("limit_samples"),
            }
            for task in plan.tasks
        ],
        "warnings": list(plan.warnings),
    }


def parallelism_of(layout: Layout) -> dict[str, int]:
    """Return the sizes of all parallel groups of a Megatron replica, the implied ones included."""
    return {
        "tensor": layout.tensor,
        "pipeline": layout.pipeline,
        "context": layout.context,
        "data": layout.world // layout.dense,
        "expert": layout.expert,
        "expert_tensor": layout.expert_tensor,
        "expert_data": layout.world // layout.sparse,
        "copies": layout.copies,
    }


def words(config: Config, plan: Plan) -> list[str]:
    """Return the plan in sentences."""
    layout = layout_of(config)
    return [
        *_where(config, plan, layout),
        *_replica(config, layout),
        *([NO_PROMISE] if layout.backend == "megatron" and layout.world > 1 else []),
        *_resources(config, plan, layout),
        *_requests(config, plan),
    ]


def tables(config: Config, plan: Plan) -> Iterator[RenderableType]:
    """Yield the tables: one line a node, one line a benchmark."""
    yield _nodes_table(config, plan)
    yield _tasks_table(config, plan)


def _where(config: Config, plan: Plan, layout: Layout) -> Iterator[str]:
    gpus = f"{layout.num_gpus} GPU(s)" if layout.num_gpus else "no GPU"
    yield (
        f"{plan.model_id} is served as {layout.num_replicas} replica(s) on {gpus}, "
        f"on {plan.nodes} node(s) of {plan.gpus_per_node} GPU(s) each."
    )
    idle = f"{layout.idle_gpus} GPU(s) stay idle" if layout.idle_gpus else "No GPU stays idle"
    spare = plan.nodes - layout.nodes_needed
    yield (
        f"{idle}{f', {spare} node(s) wholly so' if spare else ''}."
        if layout.num_gpus
        else (f"{spare} node(s) stay idle." if spare else "No node stays idle.")
    )


def _replica(config: Config, layout: Layout) -> Iterator[str]:
    if layout.backend == "hf":
        on = f"its {layout.world} GPU(s) on one node" if layout.world else "CPUs only"
        yield f"A replica is one process of the HuggingFace backend, with {on}."
        return
    yield (
        f"A replica has {layout.world} rank(s), one GPU each: tensor {layout.tensor} x pipeline "
        f"{layout.pipeline} x context {layout.context} = {layout.dense} hold the model once"
        f"{f', {layout.copies} copies' if layout.copies > 1 else ''}."
    )
    if layout.expert * layout.expert_tensor > 1:
        yield (
            f"Its experts lie on expert {layout.expert} x expert-tensor {layout.expert_tensor} x "
            f"pipeline {layout.pipeline} = {layout.sparse} of the same ranks."
        )


def _resources(config: Config, plan: Plan, layout: Layout) -> Iterator[str]:
    env, needed = config.run.env, cpus_needed(config, layout)
    replicas = f"{config.deploy.num_cpus_per_replica:g} for each replica that may land there"
    ranks = "one for each rank, " if layout.backend == "megatron" else ""
    asked = cpus_asked(env, plan.cpus_per_node)
    yield (
        f"A node needs {needed} CPUs: {ranks}{replicas}, {SERVE_CPUS} for Ray Serve; "
        f"Ray is told of {plan.cpus_per_node}. "
        + (f"Slurm is asked for {asked}." if asked else "Slurm is asked for whole nodes.")
    )
    size = size_on_disk(config.model.checkpoint_path)
    memory = f"Memory of a node: {env.mem} asked for." if env.mem else "Memory: the site's default."
    if size:
        holders = layout.unit if layout.backend == "megatron" else max(layout.world, 1)
        each = f", {size / holders / 1e9:.1f} GB for each of {holders} ranks" if holders > 1 else ""
        memory += f" The checkpoint is {size / 1e9:.1f} GB on disk{each}."
    yield memory


def _requests(config: Config, plan: Plan) -> Iterator[str]:
    replicas, peak = config.deploy.num_replicas, peak_requests(config)
    taken = plan.max_ongoing_requests * replicas
    line = (
        f"The evaluator sends up to {peak} requests at once; {replicas} replica(s) take {taken} "
        f"({plan.max_ongoing_requests} each)"
    )
    if config.deploy.backend == "megatron":
        line += f" and compute up to {config.deploy.max_batch_size} each at a time"
    yield f"{line}."
    yield "Benchmarks start in this order."


def _nodes_table(config: Config, plan: Plan) -> Table:
    table = _table("node", "GPUs used", "what lies there")
    layout = layout_of(config)
    for number, held in enumerate(placement(layout)):
        used = sum(r.last - r.first + 1 for r in held) if layout.world else 0
        if layout.share is not None:
            used = math.ceil(layout.share * len(held))
        lines = [_held(r, layout) for r in held]
        if number == 0:
            lines.append("Ray's head, Serve's proxy, the evaluator")
        table.add_row(
            f"{number + 1} of {plan.nodes}", f"{used} of {plan.gpus_per_node}", "\n".join(lines)
        )
    return table


def _held(ranks: Ranks, layout: Layout) -> str:
    name = f"replica {ranks.replica + 1}"
    if layout.backend == "hf":
        return name
    span = f"{ranks.first}" if ranks.first == ranks.last else f"{ranks.first}-{ranks.last}"
    return f"{name}: rank {span}{_stages(ranks, layout)}"


def _stages(ranks: Ranks, layout: Layout) -> str:
    """Name the pipeline stages; Megatron numbers ranks stage by stage."""
    if layout.pipeline == 1:
        return ""
    size = layout.world // layout.pipeline
    first, last = ranks.first // size, ranks.last // size
    return f", pipeline stage {first}" if first == last else f", pipeline stages {first}-{last}"


def _tasks_table(config: Config, plan: Plan) -> Table:
    table = _table("", "benchmark", "harness", "endpoint", "requests", "samples", "evaluator in")
    for number, task in enumerate(plan.tasks, 1):
        limit = task.params.get("limit_samples")
        parallel = task.params.get("parallelism")
        serving = "serving container" if config.run.env.runtime != "none" else "no container"
        harness, _, name = task.type.partition(".")
        table.add_row(
            str(number),
            task.name,
            harness if name == task.name else task.type,
            task.endpoint,
            str(parallel or config.eval.parallelism),
            "all" if limit is None else f"{limit:g}",
            task.image.rsplit("/", 1)[-1] if task.image else serving,
        )
    return table


def _table(*columns: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def size_on_disk(checkpoint: str | None) -> int | None:
    """Return the bytes of a checkpoint, where this machine sees its directory; else None."""
    if not checkpoint or not Path(checkpoint).is_dir():
        return None
    total = 0
    for folder, _, files in os.walk(checkpoint):
        total += sum(path.stat().st_size for f in files if (path := Path(folder, f)).is_file())
    return total
