"""The schema: every key a configuration may hold, its type, default, unit and meaning.

``Config`` validates the merged whole. Unknown keys are errors everywhere. Shipped defaults live
in ``configs/default.yaml``, where people can read them; the defaults here are the same values, so
that a partial file is complete too (a test compares the two).
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

#: A name that is safe as a file name, a Slurm job name and a word in a shell command.
SafeName = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", min_length=1, max_length=128)
]
#: Slurm's time formats: ``minutes``, ``minutes:seconds``, ``hours:minutes:seconds`` and
#: ``days-hours[:minutes[:seconds]]`` (man sbatch, ``--time``).
SLURM_TIME = re.compile(r"^(\d+|\d+:\d{1,2}|\d+:\d{1,2}:\d{1,2}|\d+-\d{1,2}(:\d{1,2}){0,2})$")


def _as_list(value: Any) -> Any:
    """Accept one string where a list of strings is meant, as Nemotron's profiles do."""
    return [value] if isinstance(value, str) else value


#: The name of an environment variable, which a script may write unquoted.
ENV_NAME = re.compile(r"^[A-Za-z_][A-Za-z0-9_]*$")
EnvName = Annotated[str, StringConstraints(pattern=ENV_NAME.pattern)]
#: ``SRC:DST[:FLAGS]`` or one path for both; pyxis separates mounts by commas.
MOUNT = re.compile(r"^[^,\n:]+(:[^,\n:]+){0,2}$")
Mount = Annotated[str, StringConstraints(pattern=MOUNT.pattern)]
StrList = Annotated[list[str], BeforeValidator(_as_list)]


class Section(BaseModel):
    """A mapping whose unknown keys are errors."""

    model_config = ConfigDict(
        extra="forbid", validate_default=True, protected_namespaces=(), allow_inf_nan=False
    )


class Env(Section):
    """``run.env``: where and how the job runs; a profile of ``env.toml`` fills it."""

    executor: Literal["slurm", "local"] = "slurm"
    # The connection: ssh to a login node, or Slurm's commands on this machine.
    tunnel: Literal["ssh", "local"] = "local"
    host: str | None = None
    port: int = Field(22, ge=1, le=65535)
    user: str | None = None
    identity: str | None = None
    ssh: Literal["paramiko", "openssh"] = "paramiko"
    control_path: str | None = None
    host_key_policy: Literal["strict", "accept-new"] = "strict"
    remote_job_dir: str | None = None
    # Slurm's options, named as sbatch names them.
    clusters: SafeName | None = None
    account: str | None = None
    partition: str | None = None
    run_partition: str | None = None
    batch_partition: str | None = None
    qos: str | None = None
    nodes: int = Field(1, ge=1)
    ntasks_per_node: int | None = Field(None, ge=1)
    gpus_per_node: int | None = Field(None, ge=0)
    gpu_request: Literal["gpus-per-node", "gres", "none"] = "gpus-per-node"
    cpus_per_node: int | None = Field(None, ge=1)
    cpus_per_task: int | None = Field(None, ge=1)
    mem: str | None = None
    exclusive: bool = False
    time: Annotated[str, StringConstraints(pattern=SLURM_TIME.pattern)] = "04:00:00"
    constraint: str | None = None
    nodelist: str | None = None
    exclude: str | None = None
    reservation: str | None = None
    dependency: str | None = None
    mail_type: str | None = None
    mail_user: str | None = None
    requeue: bool = True
    sbatch_args: StrList = []
    # Containers.
    container_runtime: Literal["pyxis", "none"] | None = None
    container_image: str | None = None
    container: str | None = None
    mounts: Annotated[list[Mount], BeforeValidator(_as_list)] = []
    # The environment of the job.
    env_vars: dict[EnvName, str] = {}
    setup_lines: StrList = []
    secrets: Annotated[list[EnvName], BeforeValidator(_as_list)] = ["WANDB_API_KEY", "HF_TOKEN"]
    hf_home: str | None = None
    node_tmp: str = "/tmp"
    network_interface: str | None = None

    @property
    def image(self) -> str | None:
        """The serving container; ``container_image`` wins over its older name ``container``."""
        return self.container_image or self.container

    @property
    def runtime(self) -> Literal["pyxis", "none"]:
        """The container runtime: pyxis on Slurm where an image is given, else none."""
        if self.container_runtime is not None:
            return self.container_runtime
        return "pyxis" if self.image and self.executor == "slurm" else "none"


class Comms(Section):
    """``run.comms``: the files through which the phases of a job speak, in its job directory."""

    endpoint_file: SafeName = "endpoint.json"
    completion_file: SafeName = "done"


class Wandb(Section):
    """``run.wandb``: from ``[wandb]`` of ``env.toml``."""

    entity: str | None = None
    project: str | None = None
    run_name: str | None = None
    name: str | None = None
    group: str | None = None
    job_type: str | None = None
    tags: StrList = []


class Deadlines(Section):
    """``run.deadlines``: seconds after which a wait of the job gives up; each has its name."""

    model: int = Field(2 * 3600, ge=1)
    ray: int = Field(600, ge=1)
    serve: int = Field(3600, ge=1)
    task: int = Field(4 * 3600, ge=1)
    verdict: int = Field(300, ge=1)
    shutdown: int = Field(30, ge=1)
    stop: int = Field(8, ge=1)
    slurm: int = Field(5, ge=1)
    requeue: int = Field(300, ge=1)


class Requeue(Section):
    """``run.requeue``: how often and how long a job may go on after its walltime."""

    max_attempts: int = Field(3, ge=1)
    max_seconds: int = Field(24 * 3600, ge=1)
    warning_seconds: int = Field(120, ge=10, le=65535)


class ModelArtifact(Section):
    """``run.artifact``: the artifact that ``run.model`` was resolved to; filled in."""

    name: str
    version: str
    requested: str
    source: str
    path: str
    download: str | None = None
    base_url: str | None = None


class Run(Section):
    """``run``: what runs where."""

    model: str | None = None
    registry: str | None = None
    artifact: ModelArtifact | None = None
    name: SafeName | None = None
    env: Env = Field(default_factory=Env)
    comms: Comms = Field(default_factory=Comms)
    wandb: Wandb = Field(default_factory=Wandb)
    deadlines: Deadlines = Field(default_factory=Deadlines)
    requeue: Requeue = Field(default_factory=Requeue)


class Model(Section):
    """``model``: the checkpoint and how it is named."""

    checkpoint_path: str | None = None
    model_type: str = "gpt"
    model_id: str = "megatron_model"
    tokenizer: str | None = None


class Deploy(Section):
    """``deploy``: Export-Deploy's Ray deployment; upstream's names for its knobs.

    ``python deploy.py --help`` says of each where upstream defines it.
    """

    backend: Literal["megatron", "hf"] = "megatron"
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=1024, le=65535)
    num_gpus: int = Field(8, ge=0)
    num_replicas: int = Field(1, ge=1)
    num_cpus_per_replica: float = Field(8, gt=0)
    max_ongoing_requests: int | None = Field(None, ge=1)
    # Megatron.
    tensor_model_parallel_size: int = Field(4, ge=1)
    pipeline_model_parallel_size: int = Field(1, ge=1)
    expert_model_parallel_size: int = Field(1, ge=1)
    expert_tensor_parallel_size: int = Field(1, ge=1)
    context_parallel_size: int = Field(1, ge=1)
    sequence_parallel: bool = False
    num_layers_in_first_pipeline_stage: int | None = Field(None, ge=1)
    num_layers_in_last_pipeline_stage: int | None = Field(None, ge=1)
    account_for_embedding_in_pipeline_split: bool = False
    account_for_loss_in_pipeline_split: bool = False
    max_batch_size: int = Field(32, ge=1)
    batch_wait_timeout_s: float | None = Field(None, ge=0)
    inference_max_seq_length: int = Field(4096, ge=1)
    random_seed: int | None = None
    micro_batch_size: int | None = Field(None, ge=1)
    enable_cuda_graphs: bool = False
    enable_flash_decode: bool = False
    legacy_ckpt: bool = False
    legacy_model_format: bool = False
    # HuggingFace.
    task: str = "text-generation"
    trust_remote_code: bool = False
    torch_dtype: str = "auto"
    device_map: str | None = "auto"
    max_memory: str | None = None
    num_gpus_per_replica: float | None = Field(None, gt=0)
    use_vllm_backend: bool = False
    # Ray's.
    runtime_env: dict[str, Any] = {}
    cuda_visible_devices: str | None = None
    num_cpus: int | None = Field(None, ge=1)
    include_dashboard: bool = False


class TaskParams(Section):
    """The evaluator's ``config.params``; null leaves the task's own default."""

    limit_samples: int | float | None = Field(None, gt=0)
    parallelism: int | None = Field(None, ge=1)
    max_retries: int | None = Field(None, ge=0)
    request_timeout: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, ge=0, le=1)
    max_new_tokens: int | None = Field(None, ge=1)
    extra: dict[str, Any] = {}


class Task(Section):
    """One benchmark of ``eval.tasks``.

    ``name`` is one the task catalogue knows, or any name where ``type`` says which task of which
    harness it is (``lm-evaluation-harness.my_task``). A relative ``include_path`` is a directory of
    this machine, which travels with the job; an absolute one is where the job runs.
    """

    name: SafeName
    type: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]+$")] | None = None
    endpoint_type: Literal["completions", "chat"] | None = None
    container: str | None = None
    include_path: str | None = None
    primary: str | None = None
    check_extra: bool = True
    params: TaskParams = Field(default_factory=TaskParams)


class Execution(Section):
    """``eval.execution``: the seed's view of the Slurm settings; interpolated from ``run.env``."""

    hostname: str | None = None
    username: str | None = None
    account: str | None = None
    partition: str | None = None
    output_dir: str | None = None


class WandbExport(Section):
    """``eval.export.wandb``; without a project, nothing goes to Weights & Biases."""

    entity: str | None = None
    project: str | None = None


class MlflowExport(Section):
    """``eval.export.mlflow``; without a tracking_uri, nothing goes to MLflow."""

    tracking_uri: str | None = None
    experiment: str = "slurmeval"


class Export(Section):
    """``eval.export``: where results go besides their own directory, once they are at home."""

    local: list[Literal["json", "csv"]] = []
    wandb: WandbExport | None = None
    mlflow: MlflowExport | None = None


class Eval(TaskParams):
    """``eval``: the benchmarks, and parameters for all of them (a task's own ``params`` win)."""

    execution: Execution = Field(default_factory=Execution)
    export: Export = Field(default_factory=Export)
    tasks: list[Task] = []
    parallelism: int = Field(32, ge=1)
    max_retries: int = Field(5, ge=0)
    request_timeout: int = Field(360, ge=1)
    concurrency: int = Field(1, ge=1, le=32)
    max_error_share: float = Field(0.05, ge=0, le=1)
    min_samples: int = Field(1, ge=1)
    suspicious: Literal["warn", "invalid"] = "warn"


class Config(Section):
    """The merged and validated whole."""

    run: Run = Field(default_factory=Run)
    model: Model = Field(default_factory=Model)
    deploy: Deploy = Field(default_factory=Deploy)
    eval: Eval = Field(default_factory=Eval)
