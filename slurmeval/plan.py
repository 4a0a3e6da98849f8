"""A ``Config`` becomes a ``Plan``: sums done, benchmarks looked up, every open value decided."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from slurmeval import parallelism
from slurmeval import tasks as catalogue
from slurmeval.config.schema import Config, Task, TaskParams
from slurmeval.errors import ConfigError

#: Names of the job's own steps; a benchmark of that name would share its log file.
STEP_NAMES = frozenset({"ray", "ray-ready", "serve", "verdict"})
#: Ray Serve's own limit collapses under a busy client; this leaves room above its parallelism.
ONGOING_MARGIN = 2


@dataclass(frozen=True)
class PlannedTask:
    """One benchmark, looked up.

    Attributes:
        name: The user's name for it; names its files.
        type: ``harness.task``, as ``nemo-evaluator run_eval`` wants it.
        endpoint: ``completions`` or ``chat``.
        image: The container image of its evaluator; None for the serving container.
        params: The evaluator's ``config.params`` without nulls.
    """

    name: str
    type: str
    endpoint: str
    image: str | None
    params: dict[str, Any]

    @property
    def line(self) -> str:
        """The benchmark as the script lists it: name, endpoint, image."""
        return f"{self.name} {self.endpoint} {self.image or '-'}"


@dataclass(frozen=True)
class Plan:
    """All that the job needs to know, decided.

    Attributes:
        job_name: The job's name for Slurm and people.
        model_id: The name under which the endpoint serves the model.
        slurm: Whether Slurm runs the job; else plain bash on one machine.
        nodes: Number of nodes.
        gpus_per_node: GPUs of a node that Ray is told of.
        cpus_per_node: Logical CPUs of a node that Ray is told of.
        gpus_per_replica: GPUs of one model replica (its world size).
        max_ongoing_requests: Requests one replica takes at a time.
        output_dir: Where results go; relative to the job directory, or absolute.
        mounts: Container mounts, ``SRC:DST`` each.
        environment: Exported variables of the job; never secrets.
        tasks: The benchmarks in order.
        warnings: What a person should know, a line each.
    """

    job_name: str
    model_id: str
    slurm: bool
    nodes: int
    gpus_per_node: int
    cpus_per_node: int
    gpus_per_replica: int
    max_ongoing_requests: int
    output_dir: str
    mounts: tuple[str, ...]
    environment: dict[str, str]
    tasks: tuple[PlannedTask, ...]
    warnings: tuple[str, ...]


def make_plan(config: Config) -> Plan:
    """Decide everything that the configuration leaves open.

    Raises:
        ConfigError: A sum that cannot work, an unknown benchmark, a value that contradicts another.
    """
    env, layout = config.run.env, parallelism.layout_of(config)
    parallelism.check(layout)
    if env.runtime == "pyxis" and not env.image:
        raise ConfigError(
            "run.env.container_runtime is pyxis, and no image is given",
            hint="set container_image in the profile, or container_runtime=none",
        )
    if not config.eval.tasks:
        raise ConfigError("eval.tasks is empty: there is nothing to evaluate")
    return Plan(
        job_name=config.run.name or "slurmeval-" + safe_name(config.model.model_id),
        model_id=config.model.model_id,
        slurm=env.executor == "slurm",
        nodes=env.nodes,
        gpus_per_node=layout.gpus_per_node,
        cpus_per_node=max(env.cpus_per_node or 0, parallelism.cpus_needed(config, layout)),
        gpus_per_replica=layout.world,
        max_ongoing_requests=config.deploy.max_ongoing_requests
        or max(32, ONGOING_MARGIN * peak_requests(config)),
        output_dir=output_dir(config),
        mounts=mounts(config),
        environment=environment(config),
        tasks=plan_tasks(config),
        warnings=(*parallelism.warnings(config, layout), *queueing(config)),
    )


def peak_requests(config: Config) -> int:
    """Return the most requests that the evaluator sends at once; benchmarks run one by one."""
    own = [task.params.parallelism for task in config.eval.tasks]
    return max((number or config.eval.parallelism for number in own), default=1)


def queueing(config: Config) -> list[str]:
    """Warn where the replicas take fewer requests than the evaluator sends."""
    taken, peak = config.deploy.max_ongoing_requests, peak_requests(config)
    replicas = config.deploy.num_replicas
    if taken is None or taken * replicas >= peak:
        return []
    return [
        f"the evaluator sends {peak} requests at once, and {replicas} replica(s) take "
        f"{taken * replicas} (deploy.max_ongoing_requests={taken}): the rest queues in Ray Serve, "
        "which is several times slower; leave max_ongoing_requests out"
    ]


def output_dir(config: Config) -> str:
    """Return where results go.

    ``remote_job_dir`` holds all jobs and each job has a directory of its own there, so a path below
    ``remote_job_dir`` means the same path below the job's own directory.
    """
    wanted = config.eval.execution.output_dir
    if not wanted or wanted.startswith(("None/", "/None/")):
        return "eval_results"
    base = config.run.env.remote_job_dir
    path = PurePosixPath(wanted)
    if base and path.is_relative_to(base):
        relative = str(path.relative_to(base))
        return "eval_results" if relative == "." else relative
    return wanted


def mounts(config: Config) -> tuple[str, ...]:
    """Return the container mounts: the profile's, then what the job itself reads."""
    given = [m if ":" in m else f"{m}:{m}" for m in config.run.env.mounts]
    inside = [PurePosixPath(m.split(":")[1]) for m in given]
    artifact, checkpoint = config.run.artifact, config.model.checkpoint_path
    if artifact and artifact.download and checkpoint == artifact.path:
        checkpoint = str(PurePosixPath(artifact.path).parent)  # the job makes the rest
    needed = [checkpoint, config.model.tokenizer, config.run.env.hf_home]
    needed += [task.include_path for task in config.eval.tasks]
    for path in needed:
        if (
            path
            and path.startswith("/")
            and not any(PurePosixPath(path).is_relative_to(m) for m in inside)
        ):
            given.append(f"{path}:{path}")
            inside.append(PurePosixPath(path))
    return tuple(given)


def environment(config: Config) -> dict[str, str]:
    """Return the variables that the script exports."""
    env = dict(config.run.env.env_vars)
    if config.run.env.hf_home:
        env.setdefault("HF_HOME", config.run.env.hf_home)
    return env


def plan_tasks(config: Config) -> tuple[PlannedTask, ...]:
    """Look the benchmarks up and merge their parameters.

    Raises:
        ConfigError: An unknown benchmark, or a name that is taken.
    """
    planned = [plan_task(task, config) for task in config.eval.tasks]
    names = [task.name for task in planned]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"eval.tasks: {name} is there twice")
        if name in STEP_NAMES:
            raise ConfigError(f"eval.tasks: {name} is the name of one of the job's own steps")
    return tuple(planned)


def plan_task(task: Task, config: Config) -> PlannedTask:
    """Look one benchmark up; its own parameters win over those of ``eval``."""
    known = None if task.type else catalogue.find(task.name)
    endpoint = task.endpoint_type or (known.endpoint_types[0] if known else "completions")
    own_images = config.run.env.runtime != "none"
    image = task.container or (known.container if known and own_images else None)
    params = {**given(config.eval), **given(task.params)}
    extra = {**config.eval.extra, **task.params.extra}
    tokenizer = config.model.tokenizer or config.model.checkpoint_path
    task_type = task.type or (known.type if known else task.name)
    if task_type.startswith("lm-evaluation-harness."):
        if tokenizer:
            extra.setdefault("tokenizer", tokenizer)
            extra.setdefault("tokenizer_backend", "huggingface")
        if task.include_path:
            words = (str(extra.get("args", "")), "--include_path", task.include_path)
            extra["args"] = " ".join(word for word in words if word)
    if extra:
        params["extra"] = extra
    return PlannedTask(task.name, task_type, endpoint, image, params)


def given(params: TaskParams) -> dict[str, Any]:
    """Return the evaluator's parameters that are set, without ``extra``."""
    values = {name: getattr(params, name) for name in TaskParams.model_fields if name != "extra"}
    return {name: value for name, value in values.items() if value is not None}


def safe_name(text: str) -> str:
    """Return text with everything that is not safe in a file name replaced by a hyphen."""
    return "".join(c if (c.isalnum() and c.isascii()) or c in "._-" else "-" for c in text)
