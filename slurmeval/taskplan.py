"""The benchmarks of a configuration: looked up, their parameters checked and merged, put in order.

What the evaluator would swallow in silence is refused here: a parameter that a benchmark does not
have, and text that would break the command line of its harness.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slurmeval import tasks as catalogue
from slurmeval.config.keys import did_you_mean
from slurmeval.config.schema import Config, Task, TaskParams
from slurmeval.errors import ConfigError
from slurmeval.jobfiles import JobFiles
from slurmeval.owntasks import OwnTasks, ship

#: Names of the job's own steps; a benchmark of that name would share its log file.
STEP_NAMES = frozenset({"model", "ray", "ray-ready", "serve", "verdict", "sweep"})
LM_EVAL = "lm-evaluation-harness"
#: Benchmarks that ask for logprobs, and for generated text as well.
MIXED = frozenset({"truthfulqa", "agieval"})
#: Above this temperature the same question is meant to get different answers.
GREEDY = 1e-3
#: Benchmarks that run what the model wrote.
CODE = re.compile(r"humaneval|mbpp|livecodebench|scicode|code_x|codegen", re.IGNORECASE)
#: A path or name within the harness's ``--model_args "a=1,b=2"``.
PLAIN = re.compile(r"^[A-Za-z0-9_./:@+~%-]+$")
#: What bash and Jinja would not take as it stands: the harness's command line is a template that
#: becomes a line of shell.
SHELL_SIGNS = re.compile(r"[`$\\\"'\n;&|<>()#*?]|\{[{%]")
#: ``args`` is several words, which may be quoted.
ARGS_SIGNS = re.compile(r"[`$\\\n;&|<>()#]|\{[{%]")
#: Parameters whose absence changes what is measured, so that it has to be said.
TELLING = ("limit_samples", "temperature", "top_p", "max_new_tokens")
#: Requests of known benchmarks (questions x choices), only to start the longest first.
REQUESTS = {
    "adlr_arc_challenge_llama": 1172 * 4,
    "arc_challenge": 1172 * 4,
    "commonsense_qa": 1221 * 5,
    "hellaswag": 10042 * 4,
    "mmlu": 14042 * 4,
    "openbookqa": 500 * 4,
    "piqa": 1838 * 2,
    "social_iqa": 1954 * 3,
    "winogrande": 1267 * 2,
}


@dataclass(frozen=True)
class PlannedTask:
    """One benchmark, looked up.

    Attributes:
        name: The user's name for it; names its files.
        type: ``harness.task``, as ``nemo-evaluator run_eval`` wants it.
        endpoint: ``completions`` or ``chat``.
        image: The container image of its evaluator; None for the serving container.
        digest: That image's digest, where the catalogue knows it.
        params: The evaluator's ``config.params`` without nulls.
        group: Benchmarks of one group may run at the same time; ``-`` runs alone.
        reuse_answers: Whether the same question may be answered from the evaluator's cache.
        primary: The metric that stands for it; None for the usual one.
        asks: ``loglikelihood``: it only scores given answers. ``generation``: it reads what the
            model writes. None: both, or nobody knows.
    """

    name: str
    type: str
    endpoint: str
    image: str | None
    digest: str | None
    params: dict[str, Any]
    group: str = "-"
    reuse_answers: bool = True
    primary: str | None = None
    asks: str | None = None

    @property
    def line(self) -> str:
        """The benchmark as the script lists it: name, endpoint, image, group."""
        return f"{self.name} {self.endpoint} {self.image or '-'} {self.group}"


@dataclass(frozen=True)
class TaskPlan:
    """All benchmarks of a job.

    Attributes:
        tasks: In the order in which they start.
        files: Files of the user's own tasks that travel with the job.
        notes: What a person should know, a line each.
    """

    tasks: tuple[PlannedTask, ...]
    files: JobFiles
    notes: tuple[str, ...]


def plan_tasks(config: Config, here: Path | None = None) -> TaskPlan:
    """Look the benchmarks up, check and merge their parameters, and put them in order.

    Args:
        config: The validated configuration.
        here: What relative paths of own tasks are relative to; the current directory by default.

    Raises:
        ConfigError: An unknown benchmark or parameter, a name that is taken, a value that a harness
            cannot take.
    """
    check_names(config.eval.tasks)
    check_word("model.model_id", config.model.model_id)
    own = ship([task.include_path for task in config.eval.tasks], here or Path())
    notes: list[str] = []
    planned = [plan_task(task, config, own, notes) for task in config.eval.tasks]
    notes += unknown_everywhere(config)
    if config.eval.concurrency > 1:
        planned = longest_first(planned)
        notes += alone(planned, config)
    return TaskPlan(tuple(planned), own.files, tuple(dict.fromkeys(notes)))


def check_names(tasks: list[Task]) -> None:
    """Check that each benchmark has a name of its own.

    Raises:
        ConfigError: A name that is there twice, or is one of the job's own steps.
    """
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"eval.tasks: {name} is there twice")
        if name in STEP_NAMES:
            raise ConfigError(f"eval.tasks: {name} is the name of one of the job's own steps")


def plan_task(task: Task, config: Config, own: OwnTasks, notes: list[str]) -> PlannedTask:
    """Look one benchmark up; its own parameters win over those of ``eval``."""
    known = catalogue.find(task.name) if task.type is None else catalogue.get(task.type)
    kind = task.type or (known.type if known else task.name)
    if kind.count(".") > 1:
        raise ConfigError(
            f"eval.tasks: the type {kind!r} of {task.name} has more than one dot",
            hint="the evaluator takes HARNESS.TASK; rename the task",
        )
    own_images = config.run.env.runtime != "none"
    asks = requests_of(task, known, own)
    image = task.container or (known.container if known and own_images else None)
    params = merged_params(task, kind, config, notes)
    temperature = {**(known.defaults if known else {}), **params}.get("temperature")
    for key in catalogue.keys(known) if known else []:
        if key not in config.run.env.secrets:
            notes.append(f"{task.name} needs {key} in its environment: name it in run.env.secrets")
    if CODE.search(kind):
        notes.append(f"{task.name} runs the code that the model writes, with your rights")
    return PlannedTask(
        name=task.name,
        type=kind,
        endpoint=endpoint_of(task, known),
        image=image,
        digest=known.digest if known and image == known.container else None,
        params=with_include_path(params, task, kind, own),
        group=group_of(asks, config),
        reuse_answers=temperature is None or temperature < GREEDY,
        primary=task.primary,
        asks=asks,
    )


def endpoint_of(task: Task, known: catalogue.TaskInfo | None) -> str:
    """Return the kind of endpoint that a benchmark talks to.

    Raises:
        ConfigError: One that the benchmark does not support, or that is not served.
    """
    if known is None:
        return task.endpoint_type or "completions"
    served = [kind for kind in known.endpoint_types if kind in ("completions", "chat")]
    if not served:
        raise ConfigError(
            f"eval.tasks: {task.name} needs a model of another kind: its endpoint is "
            f"{' or '.join(known.endpoint_types)}, and this serves completions and chat"
        )
    if task.endpoint_type and task.endpoint_type not in served:
        raise ConfigError(
            f"eval.tasks: {task.name} works with {' or '.join(served)}, not {task.endpoint_type}",
            hint=f"leave endpoint_type out, or look for another one: slurmeval tasks {task.name}",
        )
    return task.endpoint_type or served[0]


def merged_params(task: Task, kind: str, config: Config, notes: list[str]) -> dict[str, Any]:
    """Return ``config.params``: those of ``eval``, and over them the benchmark's own.

    Raises:
        ConfigError: A parameter that the benchmark does not have, or a value that would break its
            harness's command line.
    """
    taken = catalogue.parameters(kind)
    allowed = taken if task.check_extra else None
    where = f"eval.tasks ({task.name}).params"
    own, shared = given(task.params), given(config.eval)
    if allowed is not None:
        for name in [*own, *(f"extra.{key}" for key in task.params.extra)]:
            if name not in allowed:
                raise unknown_parameter(f"{where}.{name}", name, allowed)
        for name in [name for name in shared if name not in allowed]:
            del shared[name]
            if name in TELLING:
                notes.append(f"{task.name} has no parameter {name}: eval.{name} does not reach it")
    common = {
        key: value
        for key, value in config.eval.extra.items()
        if allowed is None or f"extra.{key}" in allowed
    }
    extra = {**common, **task.params.extra}
    tokenizer = config.model.tokenizer or checkpoint_tokenizer(config)
    if tokenizer and taken is not None and "extra.tokenizer" in taken:
        extra.setdefault("tokenizer", tokenizer)
        if kind.startswith(f"{LM_EVAL}."):
            extra.setdefault("tokenizer_backend", "huggingface")
    for key, value in extra.items():
        check_value(f"{where}.extra.{key}", key, value)
    if "tokenizer" in extra:
        own_tokenizer = "tokenizer" in {**config.eval.extra, **task.params.extra}
        source = f"{where}.extra.tokenizer" if own_tokenizer else "the tokenizer (model.tokenizer)"
        check_word(source, str(extra["tokenizer"]))
    return {**shared, **own, **({"extra": extra} if extra else {})}


def checkpoint_tokenizer(config: Config) -> str | None:
    """Return where the checkpoint keeps its tokenizer: Megatron-Bridge in ``tokenizer/``."""
    path = config.model.checkpoint_path
    return f"{path}/tokenizer" if path and config.deploy.backend == "megatron" else path


def unknown_parameter(key: str, name: str, allowed: frozenset[str]) -> ConfigError:
    """Return the error for a parameter that a benchmark's command does not use."""
    inside = name.removeprefix("extra.")
    beside = {item.removeprefix("extra."): item for item in allowed}
    meant = did_you_mean(inside, list(beside))
    if f"extra.{inside}" in allowed:
        meant = f"; it belongs under extra: extra.{inside}"
    return ConfigError(
        f"{key}: this benchmark has no such parameter, and would ignore it{meant}",
        hint=f"it has {', '.join(sorted(allowed))}; for an image of your own that has more, set "
        "check_extra: false beside params",
    )


def unknown_everywhere(config: Config) -> Iterator[str]:
    """Say which parameters of ``eval.extra`` reach no benchmark at all.

    Raises:
        ConfigError: One that none of the benchmarks has.
    """
    kinds = {
        task.name: task.type or catalogue.find(task.name).type
        for task in config.eval.tasks
        if task.check_extra
    }
    if len(kinds) < len(config.eval.tasks):
        return
    for key in config.eval.extra:
        allowed = {name: catalogue.parameters(kind) for name, kind in kinds.items()}
        without = [n for n, a in allowed.items() if a is not None and f"extra.{key}" not in a]
        if len(without) == len(kinds):
            raise unknown_parameter(
                f"eval.extra.{key}",
                f"extra.{key}",
                frozenset().union(*filter(None, allowed.values())),
            )
        if without:
            yield f"{', '.join(without)}: no parameter {key}: eval.extra.{key} does not reach it"


def given(params: TaskParams) -> dict[str, Any]:
    """Return the evaluator's parameters that are set, without ``extra``."""
    values = {name: getattr(params, name) for name in TaskParams.model_fields if name != "extra"}
    return {name: value for name, value in values.items() if value is not None}


def check_word(key: str, text: str) -> None:
    """Check that text can stand in the harness's list of model arguments.

    Raises:
        ConfigError: With the signs that cannot.
    """
    if not PLAIN.match(text):
        odd = " ".join(sorted({repr(c) for c in text if not PLAIN.match(c)})) or "nothing"
        raise ConfigError(
            f"{key} is {text!r}: the evaluator's command line cannot hold {odd}",
            hint="use a path without such signs, or a symbolic link to it",
        )


def check_value(key: str, name: str, value: Any) -> None:
    """Check that a parameter's text means itself to a shell.

    Raises:
        ConfigError: With the signs that do not.
    """
    inside = list(enumerate(value)) if isinstance(value, list) else []
    for inner, item in value.items() if isinstance(value, dict) else inside:
        check_value(f"{key}.{inner}", str(inner), item)
    if not isinstance(value, str):
        return
    signs = sorted(set((ARGS_SIGNS if name == "args" else SHELL_SIGNS).findall(value)))
    if name == "args" and not signs:
        try:
            shlex.split(value)
        except ValueError as error:
            raise ConfigError(f"{key} is {value!r}: {error}") from error
    if signs:
        raise ConfigError(
            f"{key} is {value!r}: the evaluator puts it into a shell command, which would take "
            f"{' '.join(map(repr, signs))} for more than text"
        )


def with_include_path(
    params: dict[str, Any], task: Task, kind: str, own: OwnTasks
) -> dict[str, Any]:
    """Return the parameters with the directory of an own lm-eval task.

    Raises:
        ConfigError: A path that the harness's command line cannot hold, or a harness without one.
    """
    if task.include_path is None:
        return params
    if not kind.startswith(f"{LM_EVAL}."):
        raise ConfigError(
            f"eval.tasks: include_path of {task.name} is for tasks of {LM_EVAL}, and this is {kind}"
        )
    path = own.paths.get(task.include_path, task.include_path)
    check_word(f"include_path of {task.name}", path)
    extra = dict(params.get("extra", {}))
    words = (str(extra.get("args", "")), "--include_path", path)
    return {**params, "extra": {**extra, "args": " ".join(word for word in words if word)}}


def requests_of(task: Task, known: catalogue.TaskInfo | None, own: OwnTasks) -> str | None:
    """Return ``loglikelihood`` or ``generation``; None for both, or where nobody knows."""
    if known is None:
        kind = own.output_types.get((task.type or task.name).rpartition(".")[2])
        kinds = {"multiple_choice": "loglikelihood", "loglikelihood": "loglikelihood"}
        return {**kinds, "generate_until": "generation"}.get(str(kind))
    if known.name in MIXED:
        return None
    return "loglikelihood" if "logprobs" in known.capabilities else "generation"


def group_of(asks: str | None, config: Config) -> str:
    """Return the group of benchmarks that a benchmark may run together with.

    Export-Deploy's Megatron deployment gathers requests into batches and gives all of a batch the
    parameters of the first. Requests for logprobs all have the same parameters; each benchmark that
    generates text has its own. The HuggingFace deployment answers each request by itself.
    """
    if config.deploy.backend == "hf" or config.deploy.max_batch_size == 1:
        return "any"
    return "logprobs" if asks == "loglikelihood" else "-"


def longest_first(planned: list[PlannedTask]) -> list[PlannedTask]:
    """Return benchmarks that may share the endpoint first, of these the longest first.

    One whose size nobody knows counts as long.
    """
    return sorted(planned, key=lambda task: (task.group == "-", -expected_requests(task)))


def expected_requests(task: PlannedTask) -> float:
    """Return how many requests a benchmark will send, as far as is known."""
    known = catalogue.get(task.type)
    name = known.defaults.get("task", known.name) if known else task.type.rpartition(".")[2]
    full: float = REQUESTS.get(str(name), math.inf)
    limit: float | None = task.params.get("limit_samples")
    if limit is None:
        return full
    return full * limit if limit < 1 else min(full, limit * 4)


def alone(planned: list[PlannedTask], config: Config) -> Iterator[str]:
    """Say which benchmarks run alone although several may run at once, and why."""
    names = ", ".join(task.name for task in planned if task.group == "-")
    if names:
        yield (
            f"eval.concurrency={config.eval.concurrency}, but these run alone: {names}. "
            "They generate text (or may do so), and the serving side gathers requests into batches "
            "that take the parameters of one of them; deploy.max_batch_size=1 would allow it"
        )


def peak_requests(config: Config) -> int:
    """Return the most requests that the evaluator sends at once."""
    sizes = sorted(
        (task.params.parallelism or config.eval.parallelism for task in config.eval.tasks),
        reverse=True,
    )
    return sum(sizes[: config.eval.concurrency]) or 1
