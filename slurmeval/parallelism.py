"""The GPU sums of a deployment.

The rules of Megatron parallelism are those of Export-Deploy's Ray deployment
(``nemo_deploy.deploy_ray``), which does not check them itself.
"""

from __future__ import annotations

import math

from slurmeval.config.schema import Config, Deploy
from slurmeval.errors import ConfigError

#: CPUs that Serve's controller and its HTTP proxy want on a node, beside the replicas.
SERVE_CPUS = 2


def check_parallelism(deploy: Deploy) -> None:
    """Check the GPU sums of one replica and of all.

    Raises:
        ConfigError: With the rule and the numbers.
    """
    gpus, replicas = deploy.num_gpus, deploy.num_replicas
    if gpus == 0 and deploy.backend == "megatron":
        raise ConfigError("deploy.num_gpus is 0: a Megatron checkpoint needs GPUs to serve")
    if gpus % replicas:
        raise ConfigError(
            f"deploy.num_gpus={gpus} is no multiple of deploy.num_replicas={replicas}: "
            f"{gpus % replicas} GPU(s) would idle",
            hint=f"deploy.num_gpus={gpus - gpus % replicas or replicas} works",
        )
    if deploy.backend != "megatron":
        return
    world = gpus // replicas
    tensor, pipeline = deploy.tensor_model_parallel_size, deploy.pipeline_model_parallel_size
    context, expert = deploy.context_parallel_size, deploy.expert_model_parallel_size
    expert_tensor = deploy.expert_tensor_parallel_size
    dense, sparse = tensor * pipeline * context, expert_tensor * expert * pipeline
    for product, words in (
        (dense, f"tensor {tensor} x pipeline {pipeline} x context {context}"),
        (sparse, f"expert-tensor {expert_tensor} x expert {expert} x pipeline {pipeline}"),
    ):
        if world % product:
            raise ConfigError(
                f"deploy: a replica has {world} GPU(s) (num_gpus {gpus} / num_replicas "
                f"{replicas}), which {words} = {product} does not divide",
                hint=f"deploy.num_gpus={math.lcm(dense, sparse) * replicas} works",
            )


def place_gpus(config: Config) -> tuple[int, list[str]]:
    """Return the GPUs of a node that Ray is told of, and warnings about idle ones.

    Raises:
        ConfigError: The deployment wants more GPUs than the nodes have.
    """
    env, wanted = config.run.env, config.deploy.num_gpus
    if env.gpus_per_node is None:
        return math.ceil(wanted / env.nodes), []
    there = env.nodes * env.gpus_per_node
    if wanted > there:
        raise ConfigError(
            f"deploy.num_gpus={wanted}, but {env.nodes} node(s) x {env.gpus_per_node} GPUs "
            f"(run.env.nodes, run.env.gpus_per_node) are {there}",
            hint=f"run.env.nodes={math.ceil(wanted / max(env.gpus_per_node, 1))} would do",
        )
    idle = there - wanted
    return env.gpus_per_node, [f"{idle} of {there} GPUs stay idle"] if idle else []


def cpus_per_node(deploy: Deploy, nodes: int) -> int:
    """Return Ray's logical CPUs of a node.

    Every Megatron rank is an actor with one CPU; all replicas may land on one node.
    """
    workers = math.ceil(deploy.num_gpus / nodes) if deploy.backend == "megatron" else 0
    return workers + math.ceil(deploy.num_replicas * deploy.num_cpus_per_replica) + SERVE_CPUS
