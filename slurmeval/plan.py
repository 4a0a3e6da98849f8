"""A ``Config`` becomes a ``Plan``: sums done, benchmarks looked up, every open value decided."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from slurmeval import fidelity, parallelism
from slurmeval.config.schema import Config
from slurmeval.errors import ConfigError
from slurmeval.jobfiles import JobFiles
from slurmeval.taskplan import PlannedTask, checkpoint_tokenizer, plan_tasks
from slurmeval.taskplan import peak_requests as peak_requests

#: Ray Serve's own limit collapses under a busy client; this leaves room above its parallelism.
ONGOING_MARGIN = 2
#: pyxis separates mounts and their parts by these, or leaves them to a shell and to fstab's rules.
UNMOUNTABLE = ',: \t\n"$`\\'


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
        concurrency: Benchmarks that may run at once.
        files: Files of the user's own tasks, which travel with the job.
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
    concurrency: int
    files: JobFiles
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
    check_images(config)
    if not config.eval.tasks:
        raise ConfigError("eval.tasks is empty: there is nothing to evaluate")
    benchmarks = plan_tasks(config)
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
        tasks=benchmarks.tasks,
        concurrency=config.eval.concurrency,
        files=benchmarks.files,
        warnings=(
            *parallelism.warnings(config, layout),
            *queueing(config),
            *benchmarks.notes,
            *faults(config, benchmarks.tasks),
        ),
    )


def check_images(config: Config) -> None:
    """Check the container images of the profile and of the benchmarks.

    Raises:
        ConfigError: A relative path: pyxis takes it for the name of an image in a registry.
    """
    images = {"run.env.container_image": config.run.env.image}
    images |= {f"eval.tasks ({task.name}).container": task.container for task in config.eval.tasks}
    for key, image in images.items():
        if image and any(sign.isspace() for sign in image):
            raise ConfigError(f"{key}: {image!r} holds a space, which no image's name does")
        if image and (image.endswith(".sqsh") or image[0] in ".~") and not image.startswith("/"):
            raise ConfigError(f"{key}: {image} is a relative path", hint="give an absolute one")


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


def faults(config: Config, tasks: tuple[PlannedTask, ...]) -> list[str]:
    """Warn of scores that the endpoint will get wrong, where the tokenizer's files lie here."""
    place = config.model.tokenizer or checkpoint_tokenizer(config)
    spoilt = ", ".join(task.name for task in tasks if task.asks != "generation")
    if not place or not spoilt:
        return []
    special = fidelity.special_tokens(Path(place))
    vllm = config.deploy.use_vllm_backend
    found = fidelity.expected_faults(config.deploy.backend, special, vllm=vllm)
    return [f"{spoilt}: {fault.message}" for fault in found]


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
    """Return the container mounts: the profile's, then what the job itself reads and writes.

    Raises:
        ConfigError: A path that pyxis cannot mount, or would run as a command.
    """
    env = config.run.env
    _check_mountable(config, "run.env.node_tmp", env.node_tmp)
    _check_mountable(config, "run.env.remote_job_dir", env.remote_job_dir)
    for index, mount in enumerate(env.mounts):
        _check_mountable(config, f"run.env.mounts.{index}", mount.replace(":", ""))
    given = [m if ":" in m else f"{m}:{m}" for m in config.run.env.mounts]
    inside = [PurePosixPath(m.split(":")[1]) for m in given]
    artifact, checkpoint = config.run.artifact, config.model.checkpoint_path
    if artifact and artifact.download and checkpoint == artifact.path:
        checkpoint = str(PurePosixPath(artifact.path).parent)  # the job makes the rest
    needed = {
        "model.checkpoint_path": checkpoint,
        "model.tokenizer": config.model.tokenizer,
        "run.env.hf_home": config.run.env.hf_home,
        "eval.execution.output_dir": output_dir(config),
        **{f"include_path of {task.name}": task.include_path for task in config.eval.tasks},
    }
    for key, path in needed.items():
        if (
            path
            and path.startswith("/")
            and not any(PurePosixPath(path).is_relative_to(m) for m in inside)
        ):
            _check_mountable(config, key, path, hint="mount a directory above it: run.env.mounts")
            given.append(f"{path}:{path}")
            inside.append(PurePosixPath(path))
    return tuple(given)


def _check_mountable(config: Config, key: str, path: str | None, hint: str | None = None) -> None:
    """Refuse what pyxis takes for the end of a path, or for a command: it writes a shell script."""
    wrong = [repr(sign) for sign in dict.fromkeys(path or "") if sign in UNMOUNTABLE]
    if wrong and config.run.env.runtime == "pyxis":
        raise ConfigError(
            f"{key}: {path!r} has to be mounted, and pyxis cannot mount a path with "
            f"{' '.join(wrong)}",
            hint=hint,
        )


def environment(config: Config) -> dict[str, str]:
    """Return the variables that the script exports."""
    env = dict(config.run.env.env_vars)
    if config.run.env.hf_home:
        env.setdefault("HF_HOME", config.run.env.hf_home)
    if env.get("HF_HOME"):  # data sets and tokenizers are there: nobody waits for a hub
        env.setdefault("HF_HUB_OFFLINE", "1")
        env.setdefault("HF_DATASETS_OFFLINE", "1")
    return env


def safe_name(text: str) -> str:
    """Return text with everything that is not safe in a file name replaced by a hyphen."""
    return "".join(c if (c.isalnum() and c.isascii()) or c in "._-" else "-" for c in text)
