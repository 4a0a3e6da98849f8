#!/usr/bin/env python3
"""Serve one checkpoint on a Ray cluster behind an OpenAI-compatible endpoint, until told to stop.

Stands alone: the standard library, PyYAML, ray and nemo_deploy (NeMo Export-Deploy 0.3 to 0.7). The
job script runs it on Ray's head node; by hand it runs on that node of any Ray cluster::

    python deploy.py --config config.yaml --address 10.0.0.1:6379
    python deploy.py --address 10.0.0.1:6379 --checkpoint_path /ckpt/iter_0010000 --num_gpus 8

It connects to that cluster and to no other, checks that the deployment fits its nodes, binds
Export-Deploy's Ray deployable, waits until every replica has answered a real completion, and only
then writes the endpoint file. From then on it reports replicas and ranks that die, and ends when
the completion file appears, or on SIGTERM or SIGINT, after shutting Serve down.

Exit codes: 0 told to stop; 1 the deployment failed, or was unhealthy for good; 2 the configuration
cannot be deployed; 3 the cluster was not there, does not fit, or was lost; 128 + N signal N before
the endpoint was up.
"""

from __future__ import annotations

import argparse
import asyncio
import difflib
import importlib.metadata
import inspect
import json
import logging
import math
import os
import re
import signal
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import namedtuple
from pathlib import Path
from typing import Any

import yaml

APPLICATION = NAMESPACE = "slurmeval"
BOARD = "slurmeval-board"
#: Export-Deploy's HuggingFace deployable answers an exception with HTTP 200 and this text.
ERROR_TEXT = "An error occurred:"
PROOF = {"prompt": "The answer is", "max_tokens": 1, "temperature": 0}
#: Serve and Ray get this long to end before this process ends without them.
SHUTDOWN_SECONDS = 8.0
POLL_SECONDS = 0.25
OPTIONS = {
    # A replica fails three checks before Serve replaces it. The timeout is long: where a deployable
    # blocks its event loop, a check waits behind all queued requests.
    "health_check_period_s": 2.0,
    "health_check_timeout_s": 1800.0,
    # Nothing is in flight when the job is done.
    "graceful_shutdown_wait_loop_s": 0.05,
    "graceful_shutdown_timeout_s": 2.0,
}
#: Ray Serve's router backs off where all replicas are full; with room to spare it never does.
ONGOING_MARGIN, ONGOING_LEAST = 2, 32


class DeployError(Exception):
    """A deployment that cannot work; the exit code says which kind."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Signalled(BaseException):
    """A signal before the endpoint was up; no ``except Exception`` on the way may swallow it."""


def say(message: str) -> None:
    """Print one line of the log, with the time."""
    print(time.strftime("%F %T "), message, flush=True)


# ------------------------------------------------------------------------------------------- knobs

#: deploy.NAME or model.NAME of the configuration, --NAME by hand. A heading says who has the knobs
#: below it (a backend, both, or Ray itself), where upstream defines them, and, if so, since which
#: release of Export-Deploy they do nothing, and why. Scores depend on a knob whose type has a '!'.
TABLE = """
[both] slurmeval
backend                      str   megatron         megatron or hf: which deployable of upstream
tokenizer                    str   null             the evaluator's; serving takes the model's own
[both] MegatronRayDeployable, HFRayDeployable
checkpoint_path              str   null             iter_XXXXXXX or its parent; hf: path or hub name
model_id                     str   megatron_model   the name that clients use
[both] DeployRay
host                         str   127.0.0.1        where the head node listens; 0.0.0.0: all
port                         int   8000             port to listen on
num_gpus                     int   8                all GPUs, over all nodes and replicas
[both] DeployRay, as an option of Ray Serve
num_replicas                 int   1                copies of the model that share the requests
num_cpus_per_replica         float 8                reserved; each Megatron rank takes one more
max_ongoing_requests         int   null             of a replica; null: twice eval.parallelism
[megatron] MegatronRayDeployable
model_type                   str!  gpt              gpt or mamba
tensor_model_parallel_size   int!  4                GPUs that share each layer
pipeline_model_parallel_size int!  1                groups of layers, each on GPUs of its own
expert_model_parallel_size   int!  1                GPUs that share the experts of a layer
expert_tensor_parallel_size  int!  1                GPUs that share each expert
context_parallel_size        int!  1                GPUs that share a long sequence
sequence_parallel            bool  false            spread norms over the tensor-parallel GPUs
max_batch_size               int   32               lowered to the clients that a replica has
batch_wait_timeout_s         float null             seconds that a batch waits; null: 0.1
inference_max_seq_length     int!  4096             tokens of prompt and answer
micro_batch_size             int   null             of the model's set-up
[megatron] MegatronRayDeployable | 0.3 | it only fills batches with copies of a prompt
enable_cuda_graphs           bool  false            fill each batch up to max_batch_size
[megatron] MegatronRayDeployable | 0.3 | it never reaches the model
enable_flash_decode          bool  false            FlashAttention while decoding
legacy_ckpt                  bool  false            the older checkpoint format
[megatron] MegatronRayDeployable | 0.7 | there is no static engine any more
legacy_model_format          bool! false            the static inference engine
[megatron] MegatronRayDeployable | 0.7 | it is not passed on to the engine
random_seed                  int!  null             seed of sampling
[megatron] deploy_ray_inframework.py, as model config | 0.3 | the checkpoint's layout stays
num_layers_in_first_pipeline_stage      int  null   null: an even share
num_layers_in_last_pipeline_stage       int  null   null: an even share
account_for_embedding_in_pipeline_split bool false  count the embedding as a layer
account_for_loss_in_pipeline_split      bool false  count the loss as a layer
[hf] HFRayDeployable
task                         str   text-generation  the model's task
trust_remote_code            bool  false            run code of the checkpoint; upstream: true
torch_dtype                  str!  auto             such as bfloat16; auto: the checkpoint's
device_map                   str   auto             such as balanced; null: none, as without GPUs
use_vllm_backend             bool  false            serve with vLLM
[hf] HFRayDeployable | 0.3 | it takes 75GiB of each GPU
max_memory                   str   null             must be set with device_map=balanced
[hf] DeployRay, as an option of Ray Serve
num_gpus_per_replica         float null             also 0.5; null: num_gpus / num_replicas
[ray] DeployRay
runtime_env                  dict  {}               Ray's runtime environment of all workers
[ray] deploy_ray_*.py, into runtime_env | 0.0 | Ray chooses the GPUs of each worker
cuda_visible_devices         str   null             GPUs that the workers may use
[ray] DeployRay | 0.0 | deploy.py starts no Ray
num_cpus                     int   null             CPUs of a Ray that upstream would start
include_dashboard            bool  false            dashboard of a Ray that upstream would start
"""
GROUPS = {
    "both": "both backends",
    "megatron": "backend megatron",
    "hf": "backend hf",
    "ray": "Ray; deploy.py connects to a cluster and starts none",
}
Knob = namedtuple("Knob", "name kind scores default text group upstream unused")


def read_table(table: str) -> list[Knob]:
    """Return the knobs of a table."""
    knobs, heading = [], ("", "", ("99.0", ""))
    for line in table.strip().splitlines():
        if line.startswith("["):
            group, upstream, *unused = re.split(r"\] | \| ", line[1:])
            heading = (group, upstream, tuple(unused) or ("99.0", ""))
            continue
        name, word, default, text = line.split(None, 3)
        kind = {"str": str, "int": int, "float": float, "bool": bool, "dict": dict}[word.strip("!")]
        knobs.append(Knob(name, kind, "!" in word, yaml.safe_load(default), text, *heading))
    return knobs


KNOBS = read_table(TABLE)
UNUSED_BY_VLLM = {"torch_dtype", "trust_remote_code", "device_map", "max_memory", "task"}


# ------------------------------------------------------------------- command line and configuration


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's values."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s --address HOST:PORT [--config FILE] [--KNOB VALUE ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="A knob given here wins over the configuration; 'of X' says where upstream has it.",
    )
    add = parser.add_argument
    add("--config", type=Path, help="the job's config.yaml")
    add("--address", default=os.environ.get("RAY_ADDRESS"), help="of Ray's head ($RAY_ADDRESS)")
    add("--endpoint-file", type=Path, default=Path("endpoint.json"))
    add("--completion-file", type=Path, default=Path("done"))
    sections = {group: parser.add_argument_group(title) for group, title in GROUPS.items()}
    for knob in KNOBS:
        default = "null" if knob.default is None else knob.default
        since, why = knob.unused
        never = f"; no effect{f' since {since}' if since != '0.0' else ''}: {why}" if why else ""
        sections[knob.group].add_argument(
            f"--{knob.name}",
            type=yaml.safe_load if knob.kind in (bool, dict) else knob.kind,
            default=argparse.SUPPRESS,
            metavar=knob.kind.__name__,
            help=f"{knob.text} (default {default}; of {knob.upstream}{never})",
            **({"nargs": "?", "const": True} if knob.kind is bool else {}),
        )
    arguments = parser.parse_args(argv)
    if not arguments.address or arguments.address == "auto":
        parser.error("--address HOST:PORT is needed: 'auto' may find another job's cluster")
    return arguments


def read_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the value of each knob, and ``clients``, from defaults, file and command line.

    Raises:
        DeployError: An unreadable file, an unknown knob, or values that cannot be.
    """
    values = {knob.name: knob.default for knob in KNOBS} | {"clients": None}
    try:
        text = arguments.config.read_text() if arguments.config else "{}"
        config = {key: value or {} for key, value in yaml.safe_load(text).items()}
    except (OSError, yaml.YAMLError, AttributeError) as error:
        raise DeployError(f"{arguments.config}: {error}", 2) from error
    given = {**config.get("model", {}), **config.get("deploy", {})}
    for name in given.keys() - values.keys():
        near = "".join(f"; did you mean {n}?" for n in difflib.get_close_matches(name, values, 1))
        raise DeployError(f"{arguments.config}: there is no knob {name}{near}", 2)
    load = config.get("eval", {})
    if load.get("parallelism"):
        own = [(task.get("params") or {}).get("parallelism") for task in load.get("tasks") or ()]
        most = max(load["parallelism"], *(clients or 0 for clients in own), 0)
        given["clients"] = most * (load.get("concurrency") or 1)
    values |= given
    values |= {name: value for name, value in vars(arguments).items() if name in values}
    if values["backend"] not in ("megatron", "hf"):
        raise DeployError(f"backend is {values['backend']}: megatron or hf", 2)
    if not values["checkpoint_path"]:
        raise DeployError("checkpoint_path is not set: there is nothing to serve", 2)
    gpus_of_replica(values)
    return values


def gpus_of_replica(values: dict[str, Any]) -> float:
    """Return how many GPUs one replica has.

    Raises:
        DeployError: The replicas have more GPUs than there are, or some would idle.
    """
    gpus, replicas, own = values["num_gpus"], values["num_replicas"], values["num_gpus_per_replica"]
    if values["backend"] == "hf" and own is not None:
        if own * replicas > gpus:
            what = f"num_gpus_per_replica {own:g} x num_replicas {replicas}"
            raise DeployError(f"{what} is more than num_gpus {gpus}", 2)
        return float(own)
    if gpus % replicas:
        raise DeployError(f"num_gpus {gpus} is no multiple of num_replicas {replicas}", 2)
    return gpus // replicas


def latest_iteration(path: Path) -> Path:
    """Return the iteration that a directory of Megatron's iterations means, else the path itself.

    Raises:
        DeployError: The latest iteration, as training has noted it, is not complete.
    """
    complete = {found.parent.name: found.parent for found in path.glob("*/run_config.yaml")}
    if not complete or (path / "run_config.yaml").exists():
        return path
    tracker = path / "latest_checkpointed_iteration.txt"
    if not tracker.is_file():
        numbered = [name for name in complete if re.fullmatch(r"iter_\d+", name)]
        return complete[max(numbered or complete, key=lambda name: (len(name), name))]
    name = tracker.read_text().strip()
    name = f"iter_{int(name):07d}" if name.isdigit() else name
    if name not in complete:
        there = ", ".join(sorted(complete))
        raise DeployError(f"{tracker} names {name}, which is not complete; there is: {there}", 2)
    return complete[name]


def fit_load(values: dict[str, Any]) -> list[str]:
    """Make ``max_ongoing_requests`` and ``max_batch_size`` fit the clients; return notes.

    Of all clients, a replica has its share. A larger batch would wait for requests that nobody
    sends.
    """
    ongoing, batch = values["max_ongoing_requests"], values["max_batch_size"]
    clients, notes = values["clients"] or batch, []
    share = math.ceil(clients / values["num_replicas"])
    if ongoing is None:
        values["max_ongoing_requests"] = max(ONGOING_LEAST, ONGOING_MARGIN * clients)
    elif ongoing < share:
        told = f"{clients} clients send {share} requests at a time to a replica"
        notes.append(f"{told}; max_ongoing_requests={ongoing} is less: Ray Serve will back off")
    if values["backend"] == "megatron" and share < batch:
        values["max_batch_size"] = share
        notes.append(f"max_batch_size {batch} is lowered to the {share} clients of a replica")
    return notes


# ---------------------------------------------------------------------- the installed Export-Deploy


def version(distribution: str) -> str:
    """Return the installed version of a distribution, or 'unknown'."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def release(text: str) -> tuple[int, ...]:
    """Return major and minor of a version; one that cannot be read counts as the newest."""
    numbers = re.match(r"(\d+)\.(\d+)", text)
    return tuple(map(int, numbers.groups())) if numbers else (98, 0)


def why_unused(knob: Knob, values: dict[str, Any], known: set[str], installed: str) -> str:
    """Return why a knob would do nothing with the installed Export-Deploy, or an empty text."""
    if knob.group not in ("both", "ray", values["backend"]):
        return f"is for backend {knob.group}"
    if release(installed) >= release(knob.unused[0]):
        by = "" if knob.group == "ray" else f" by Export-Deploy {installed}"
        return f"is not used{by}: {knob.unused[1]}"
    if knob.group != values["backend"] or knob.name == "num_gpus_per_replica":
        return ""
    if knob.name not in known:
        return f"is not a knob of Export-Deploy {installed}"
    if values["use_vllm_backend"] and knob.name in UNUSED_BY_VLLM:
        return f"is not used by Export-Deploy {installed} with vLLM"
    return ""


def fit_knobs(
    values: dict[str, Any], known: set[str], installed: str
) -> tuple[dict[str, Any], list[str]]:
    """Return what the deployable is given, and warnings about knobs that do nothing.

    Args:
        values: The value of each knob.
        known: Parameters that the installed deployable has, or passes on to the model's own class.
        installed: Export-Deploy's version.

    Raises:
        DeployError: A knob that scores depend on and that this version lacks or does not use.
    """
    given, warnings = {}, []
    for knob in KNOBS:
        value, why = values[knob.name], why_unused(knob, values, known, installed)
        bound = knob.group == values["backend"] and knob.name in known
        if bound and (value is not None or knob.name == "device_map"):
            given[knob.name] = value
        if why and not is_off(knob, value):
            if knob.scores and knob.group == values["backend"]:
                raise DeployError(f"{knob.name}={value} {why}; scores depend on it", 2)
            warnings.append(f"{knob.name}={value} {why}")
    return given, warnings


def is_off(knob: Knob, value: Any) -> bool:
    """Say whether a value asks for nothing; 0 does not mean False: it is a seed."""
    off = (knob.default, None, False, *((1,) if knob.name.endswith("parallel_size") else ()))
    return any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in off)


def known_parameters(deployable: Any) -> set[str]:
    """Return the parameters of a deployable and those that it passes on by ``**kwargs``.

    Raises:
        DeployError: It does not look like a deployable of Export-Deploy.
    """
    for cls in deployable.func_or_class.__mro__:  # Ray Serve's wrapper hides the signature
        parameters = inspect.signature(cls.__init__).parameters
        if "model_id" in parameters:
            break
    else:
        raise DeployError(f"{deployable.name}: this Export-Deploy is unknown to deploy.py", 2)
    known = set(parameters)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        for name in ("MegatronLLMDeployable", "MegatronLLMDeployableNemo2"):
            inner = getattr(sys.modules[cls.__module__], name, None)
            known |= set(inspect.signature(inner.__init__).parameters) if inner else set()
    return known


def bind(values: dict[str, Any]) -> tuple[Any, list[str]]:
    """Bind Export-Deploy's deployable; return the Serve application, and warnings.

    The ranks of the Megatron deployable are Ray actors of their own, with a GPU each; a replica of
    the HuggingFace one has its GPUs itself.
    """
    gpus, installed = gpus_of_replica(values), version("nemo-export-deploy")
    resources = {"num_cpus": values["num_cpus_per_replica"]}
    if values["backend"] == "megatron":
        from nemo_deploy.llm.megatronllm_deployable_ray import MegatronRayDeployable as deployable

        known = known_parameters(deployable)
        given, warnings = fit_knobs(values, known, installed)
        given |= {"megatron_checkpoint_filepath": values["checkpoint_path"], "num_gpus": int(gpus)}
        if "nemo_checkpoint_filepath" in known:  # 0.3 takes two formats
            given |= {"nemo_checkpoint_filepath": None, "model_format": "megatron"}
        if "batch_wait_timeout_s" not in known:
            warnings.append(
                f"Export-Deploy {installed} misplaces the top_logprobs of a prompt: metrics that "
                "ask whether an answer is greedy (such as acc of lambada) are wrong"
            )
        elif not hasattr(deployable.func_or_class, "_batched_infer_impl"):
            given["max_batch_size"] = 1
            warnings.append(f"Export-Deploy {installed} has unknown batches: they are switched off")
    else:
        from nemo_deploy.llm.hf_deployable_ray import HFRayDeployable as deployable

        given, warnings = fit_knobs(values, known_parameters(deployable), installed)
        given["hf_model_id_path"] = values["checkpoint_path"]
        resources["num_gpus"] = gpus
        if gpus == 0:
            given["device_map"] = None
    options = deployable.options(
        func_or_class=proven(deployable.func_or_class),
        num_replicas=values["num_replicas"],
        ray_actor_options=resources,
        max_ongoing_requests=values["max_ongoing_requests"],
        **OPTIONS,
    )
    return options.bind(model_id=values["model_id"], **given), warnings


# ---------------------------------------------------------------------------------------- a replica


class Board:
    """Where replicas say that they have proven themselves, or what is wrong with them."""

    def __init__(self) -> None:
        self.reports: list[dict[str, Any]] = []

    def report(self, **values: Any) -> None:
        """Add a report."""
        self.reports.append(values)

    def since(self, count: int) -> list[dict[str, Any]]:
        """Return the reports after the first ``count``."""
        return self.reports[count:]


def proven(base: type) -> type:
    """Return a deployable's class with a health check that is worth its name.

    Serve runs ``check_health`` in each replica before it calls the replica running, and every few
    seconds from then on: that addresses every replica, in every version of Ray, and again each one
    that Serve starts in the place of a dead one.
    """

    class Proven(base):  # type: ignore[misc,valid-type]
        async def __init__(self, *args: Any, **kwargs: Any) -> None:
            allow_missing_parts()
            self._proven = False
            self._pulses: dict[int, Any] = {}
            try:
                made = super().__init__(*args, **kwargs)
                if inspect.isawaitable(made):
                    await made
            except Exception as error:
                await report(problem=str(error) or repr(error))
                raise
            model = getattr(self, "model", None)
            if hasattr(model, "tokenizer"):
                model._compute_logprobs = whole_prompt_logprobs(model)
                model.ray_infer_fn = repaired_hf(model.ray_infer_fn, model.tokenizer)

        async def check_health(self) -> None:
            workers = getattr(self, "workers", ())
            try:
                for rank, worker in enumerate(workers):
                    await self._feel_pulse(rank, worker)
                if not self._proven:
                    started = time.monotonic()
                    check_text(await self.completions({**PROOF, "model": self.model_id}))
                    seconds = round(time.monotonic() - started, 2)
                    await report(node=os.uname().nodename, ranks=len(workers), seconds=seconds)
                    self._proven = True
            except Exception as error:
                await report(problem=str(error) or repr(error))
                raise

        async def _feel_pulse(self, rank: int, worker: Any) -> None:
            """Raise where a rank's process is dead; a busy rank answers later and is alive."""
            pulse = self._pulses.get(rank)
            if pulse is None or pulse.done():
                if pulse is not None and pulse.exception() is not None:
                    raise RuntimeError(f"rank {rank} is dead")
                self._pulses[rank] = asyncio.ensure_future(ready(worker))

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await super().__call__(scope, *mended_channels(receive, send))

        async def _batched_infer_impl(self, requests: list[dict[str, Any]]) -> list[Any]:
            return await in_compatible_groups(
                super()._batched_infer_impl, [greedy(request) for request in requests]
            )

    Proven.__name__ = Proven.__qualname__ = base.__name__
    return Proven


async def report(**values: Any) -> None:
    """Tell the board something about the replica that this is."""
    import ray

    board = ray.get_actor(BOARD, namespace=NAMESPACE)
    await board.report.remote(name=ray.get_runtime_context().get_actor_name(), **values)


async def ready(worker: Any) -> None:
    """Return when an actor answers; raise when it is dead."""
    await worker.__ray_ready__.remote()


def check_text(answer: dict[str, Any]) -> None:
    """Raise where an answer holds no completion, but an error with HTTP 200."""
    text = str(answer["choices"][0]["text"])
    if text.startswith(ERROR_TEXT):
        raise ValueError(text)


def allow_missing_parts() -> None:
    """Let Export-Deploy's HuggingFace deployable run without a GPU and without PyTriton.

    It moves every tensor with ``.cuda()`` and insists on PyTriton, which Ray Serve does not need.
    """
    import torch

    if not torch.cuda.is_available():
        torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
        # Ray's CPUs are logical; threads beyond the real ones only wait for each other.
        spare = max(1, len(os.sched_getaffinity(0)) // 2)
        torch.set_num_threads(min(torch.get_num_threads(), spare))
    import nemo_deploy.llm.hf_deployable as module

    module.HAVE_TRITON = True
    # It logs every prompt and answer as a warning.
    logging.getLogger("NeMo").setLevel(logging.ERROR)


def whole_prompt_logprobs(model: Any) -> Any:
    """Return the HuggingFace model's ``_compute_logprobs``, for all tokens of a prompt at once.

    Upstream asks the device for each token alone, three times, while all other requests wait. The
    values are the same; those of a prompt are float32 whatever the model's type is.
    """
    import torch

    upstream = model._compute_logprobs

    def rows(logits: Any, chosen: Any, count: int) -> tuple[list[float], list[dict[str, float]]]:
        found: list[float] = []
        best: list[dict[str, float]] = []
        for part, ids in zip(logits.split(256), chosen.split(256), strict=True):  # bounds memory
            logprobs = part.float().log_softmax(-1)
            ids = ids.to(logprobs.device).unsqueeze(1)
            found += logprobs.gather(1, ids).squeeze(1).tolist()
            values, places = logprobs.topk(min(count, logprobs.shape[-1]))
            for row, at in zip(values.tolist(), places.tolist(), strict=True):
                words = [model.tokenizer.decode([each]) for each in at]
                best.append(dict(zip(words, row, strict=True)))
        return found, best

    def compute(
        prompts: list[str],
        output_infer: dict[str, Any],
        compute_logprob: bool,
        n_top_logprobs: int,
        echo: bool,
    ) -> tuple[Any, Any]:
        if len(prompts) != 1:
            return upstream(prompts, output_infer, compute_logprob, n_top_logprobs, echo)
        sequence, length = output_infer["sequences"][0], output_infer["input_lengths"][0]
        scores = torch.stack([score[0] for score in output_infer["scores"]])
        logits, chosen = scores[: len(sequence) - length], sequence[length:]
        found, best = rows(logits, chosen, n_top_logprobs)
        if echo:
            with torch.no_grad():
                prompt = sequence[:length].unsqueeze(0)
                logits = model.model(prompt, attention_mask=torch.ones_like(prompt)).logits[0]
            echoed = rows(logits[:-1], prompt[0, 1:], n_top_logprobs)
            found, best = echoed[0] + found, echoed[1] + best
        return [found] if compute_logprob else None, [best] if n_top_logprobs else None

    return compute


def repaired_hf(infer: Any, tokenizer: Any) -> Any:
    """Return the HuggingFace model's inference function without two of its faults.

    Errors become exceptions, hence HTTP 500 and not an answer. And logprobs of an echoed prompt
    get the place that clients count from: upstream leaves the first token's out, which is right
    only where the tokenizer adds a BOS; elsewhere the first token of each answer would not count.
    """

    def ray_infer_fn(inputs: dict[str, Any]) -> dict[str, Any]:
        prompts = list(inputs.get("prompts", ()))
        echoed = inputs.get("echo") and inputs.get("compute_logprob")
        result = infer(inputs)
        check_text({"choices": [{"text": (result.get("sentences") or [""])[0]}]})
        if echoed and result.get("log_probs"):
            for row, prompt in enumerate(prompts):
                plain = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
                missing = plain + 1 - len(tokenizer(prompt)["input_ids"])
                if missing < 0:
                    raise ValueError(f"the tokenizer adds {1 - missing} tokens to a prompt")
                result["log_probs"][row] = [None] * missing + result["log_probs"][row]
                if missing and result.get("top_logprobs"):
                    tops = json.loads(result["top_logprobs"][row])
                    result["top_logprobs"][row] = json.dumps([None] * missing + tops)
        return result

    return ray_infer_fn


def greedy(request: dict[str, Any]) -> dict[str, Any]:
    """Return a request whose temperature of 0 means greedy decoding, as it does everywhere.

    Upstream takes it so only beside a top_p of 0, and else divides by it: nan, and a dead rank.
    """
    at_zero = request.get("temperature") == 0
    return {**request, "top_k": 1, "top_p": 0.0} if at_zero else request


class Failed:
    """The answer to a request that failed: whoever opens it gets the exception, nobody else."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def get(self, *_: Any) -> Any:
        """Raise the exception."""
        raise self.error

    __getitem__ = get


async def in_compatible_groups(run: Any, requests: list[dict[str, Any]]) -> list[Any]:
    """Answer a batch as upstream does, but never let incompatible requests meet.

    Upstream (0.5 and later) runs a whole batch with the parameters of its first request. Here a
    batch is split into groups whose parameters are all equal, so that the first request's are
    everybody's. Where a group fails, or its answers cannot be told apart, each is run alone.
    """
    groups: dict[str, list[int]] = {}
    for position, request in enumerate(requests):
        shared = {name: value for name, value in request.items() if name != "prompts"}
        if request.get("compute_logprob") and not request.get("n_top_logprobs"):
            shared["alone"] = position
        groups.setdefault(json.dumps(shared, sort_keys=True, default=str), []).append(position)

    async def answers_of(positions: list[int]) -> list[Any]:
        members = [requests[position] for position in positions]
        try:
            if (answers := unpadded(await run(members))) is not None:
                return answers
        except Exception as error:
            if len(members) == 1:
                return [Failed(error)]
        return [answer for position in positions for answer in await answers_of([position])]

    answers: list[Any] = [None] * len(requests)
    for positions in groups.values():
        for position, answer in zip(positions, await answers_of(positions), strict=True):
            answers[position] = answer
    return answers


def unpadded(group: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """Return a group's answers without padding; None where they cannot be told apart.

    Upstream fills the logprobs of shorter requests up with zeros, which a client would take for
    tokens. The top_logprobs keep their true length: the longest must be as long as the rows are,
    and beyond it there must be nothing but zeros.
    """
    if len(group) < 2 or not any("log_probs" in answer for answer in group):
        return group
    try:
        rows = [[float(value) for value in answer["log_probs"][0]] for answer in group]
        lengths = [len(json.loads(answer["top_logprobs"][0])) for answer in group]
    except (KeyError, IndexError, TypeError, ValueError):
        return None
    if max(lengths) != max(map(len, rows)):
        return None
    if any(any(row[length:]) for row, length in zip(rows, lengths, strict=True)):
        return None
    true = zip(group, lengths, strict=True)
    return [answer | {"log_probs": answer["log_probs"][:, :length]} for answer, length in true]


# ---------------------------------------------------------------------------- answers on their way


def mended_channels(receive: Any, send: Any) -> tuple[Any, Any]:
    """Return ASGI's two channels of one request, with the answer mended on its way out."""
    asked = bytearray()
    answer: list[dict[str, Any]] = []

    async def hear() -> dict[str, Any]:
        message: dict[str, Any] = await receive()
        asked.extend(message.get("body", b""))
        return message

    async def tell(message: dict[str, Any]) -> None:
        answer.append(message)
        if message["type"] == "http.response.body" and not message.get("more_body"):
            for part in mended_messages(bytes(asked), answer):
                await send(part)

    return hear, tell


def mended_messages(asked: bytes, answer: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages of an HTTP answer; of a completion, mended."""
    start, *bodies = answer
    try:
        request = json.loads(asked)
        if start["status"] != 200 or not (request.get("stop") or request.get("echo")):
            return answer
        result = json.loads(b"".join(message.get("body", b"") for message in bodies))
        for choice in result["choices"]:
            mend(choice, request)
        body = json.dumps(result).encode()
    except (ValueError, LookupError, TypeError, AttributeError):
        return answer
    headers = [
        header for header in start["headers"] if bytes(header[0]).lower() != b"content-length"
    ]
    headers.append((b"content-length", str(len(body)).encode()))
    return [{**start, "headers": headers}, {"type": "http.response.body", "body": body}]


def mend(choice: dict[str, Any], request: dict[str, Any]) -> None:
    """Make a choice what OpenAI's API promises, where Export-Deploy does not.

    Upstream ignores ``stop`` (the HuggingFace endpoint; Megatron's before 0.5), and gives the first
    token of an echoed prompt its empty place among the logprobs, but none among the top_logprobs
    (Megatron's), so that a client compares each token with the likeliest next one.
    """
    if request.get("echo"):
        logprobs = choice.get("logprobs") or {}
        tokens, tops = logprobs.get("token_logprobs") or [], logprobs.get("top_logprobs") or []
        if tops and len(tops) == len(tokens) - 1 and tokens[0] is None:
            logprobs["top_logprobs"] = [None, *tops]
        return
    given = request.get("stop") or []
    stops = [stop for stop in ([given] if isinstance(given, str) else given) if stop]
    holder, key = (choice["message"], "content") if "message" in choice else (choice, "text")
    places = [holder[key].find(stop) for stop in stops]
    if found := [place for place in places if place >= 0]:
        holder[key] = holder[key][: min(found)]
        choice["finish_reason"] = "stop"


# ------------------------------------------------------------------------------------- the cluster


def connect(address: str, values: dict[str, Any]) -> Any:
    """Connect to the Ray cluster at an address, never to a fresh local one; return the board.

    Raises:
        DeployError: Nothing answers there, this is not its head node, or Serve runs there already.
    """
    import ray
    from ray import serve
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    try:
        host, _, port = address.rpartition(":")  # Ray itself would try for minutes
        socket.create_connection((host, int(port)), timeout=10).close()
        environment = values["runtime_env"]
        ray.init(address, namespace=NAMESPACE, runtime_env=environment, logging_level="WARNING")
    except (OSError, ValueError, RuntimeError) as error:
        raise DeployError(f"no Ray cluster at {address}: {error}", 3) from error
    here = ray.get_runtime_context().get_node_id()
    head = next(n for n in ray.nodes() if "node:__internal_head__" in n["Resources"])
    if head["NodeID"] != here:
        raise DeployError(f"run this on {head['NodeManagerHostname']}, the head of {address}", 3)
    if serve.status().applications:
        raise DeployError(f"Serve runs at {address} already; ending it is not ours to do", 3)
    on_head = NodeAffinitySchedulingStrategy(here, soft=False)
    return ray.remote(Board).options(name=BOARD, num_cpus=0, scheduling_strategy=on_head).remote()


def alive_nodes() -> list[tuple[str, float, float]]:
    """Return name, GPUs and CPUs of each node, as Ray was told."""
    import ray

    alive = [(n["NodeManagerHostname"], n["Resources"]) for n in ray.nodes() if n["Alive"]]
    return [(name, has.get("GPU", 0), has.get("CPU", 0)) for name, has in alive]


def shortage(nodes: list[tuple[str, float, float]], values: dict[str, Any]) -> str:
    """Return what the nodes lack for the deployment; Ray would wait for it for ever."""
    replicas, cpus = values["num_replicas"], values["num_cpus_per_replica"]
    gpus = gpus_of_replica(values)
    there = "; Ray has " + ", ".join(f"{n}: {g:g} GPUs, {c:g} CPUs" for n, g, c in sorted(nodes))
    if values["backend"] == "hf":
        fits = [min(c / cpus, g / gpus if gpus else math.inf) for _, g, c in nodes]
        room = sum(int(fit + 1e-9) for fit in fits)
        each = f"{gpus:g} GPUs and {cpus:g} CPUs on one node"
        return f"room for {room} of {replicas} replicas ({each} each){there}" * (room < replicas)
    left = [(g, c) for _, g, c in nodes]
    for placed in range(replicas):  # where it costs the fewest ranks, each of a GPU and a CPU
        costs = [min(g, c) - min(g, c - cpus) if c >= cpus else math.inf for g, c in left]
        best = costs.index(min(costs))
        if costs[best] == math.inf:
            return f"room for {placed} of {replicas} replicas ({cpus:g} CPUs each){there}"
        left[best] = (left[best][0], left[best][1] - cpus)
    room, ranks = int(sum(min(g, c) for g, c in left)), values["num_gpus"]
    beside = f"a GPU and a CPU each, beside {replicas} replica(s) of {cpus:g} CPUs"
    return f"room for {room} of {ranks} ranks ({beside}){there}" * (room < ranks)


# --------------------------------------------------------------------------- readiness and watching


def ask(url: str, model_id: str, body: dict[str, Any], *, timeout: float) -> dict[str, Any]:
    """Ask for a completion over HTTP and return its first choice.

    Raises:
        OSError: An HTTP error, or no answer within so many seconds.
        ValueError, LookupError: No completion, but an error text with HTTP 200.
    """
    data = json.dumps({**body, "model": model_id}).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=timeout) as response:
        answer: dict[str, Any] = json.load(response)
    check_text(answer)
    choice: dict[str, Any] = answer["choices"][0]
    return choice


def complete(url: str, model_id: str, *, timeout: float) -> None:
    """Ask for one completion over HTTP.

    Raises:
        DeployError: No completion: an HTTP error, or an error text with HTTP 200.
    """
    try:
        ask(url, model_id, PROOF, timeout=timeout)
    except (OSError, ValueError, LookupError) as error:
        http = isinstance(error, urllib.error.HTTPError)
        detail = error.read(2000).decode(errors="replace") if http else ""
        raise DeployError(f"the first completion failed: {error!r} {detail}") from error


def known_faults(
    url: str, values: dict[str, Any], *, timeout: float
) -> list[dict[str, Any]] | None:
    """Return the endpoint's faults that change scores, as fidelity.py sees them.

    None means that nobody knows: fidelity.py is not beside this file, or there was no answer.
    """

    def choice(body: dict[str, Any]) -> dict[str, Any]:
        try:
            return ask(url, values["model_id"], body, timeout=timeout)
        except urllib.error.HTTPError:
            return {}

    try:
        import fidelity

        count = fidelity.token_counter(values["checkpoint_path"], values["tokenizer"])
        return [vars(fault) for fault in fidelity.probe(choice, count)]
    except (ImportError, OSError, ValueError, LookupError) as error:
        say(f"nobody knows whether this endpoint shifts tokens: {error!r}")
        return None


class Replicas:
    """The replicas that have answered a completion and live."""

    def __init__(self, board: Any, wanted: int) -> None:
        self.board, self.wanted, self.seen = board, wanted, 0
        self.proven: dict[str, dict[str, Any]] = {}

    def update(self) -> None:
        """Read what replicas have reported, and notice those that are gone."""
        import ray

        for report in ray.get(self.board.since.remote(self.seen), timeout=30):
            self.seen += 1
            name = report["name"].rsplit("#", 1)[-1]
            if "problem" in report:
                say(f"replica {name}: {report['problem']}")
                continue
            self.proven[name] = report
            ranks = f" with {report['ranks']} ranks" if report["ranks"] else ""
            say(f"replica {name} on {report['node']}{ranks} answered in {report['seconds']} s")
        alive = {actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)}
        for name, report in list(self.proven.items()):
            if report["name"] not in alive:
                del self.proven[name]
                say(f"replica {name} on {report['node']} is gone; {len(self.proven)} left")

    def problem(self) -> str:
        """Return what is wrong with the application, or an empty text."""
        from ray import serve

        application = serve.status().applications.get(APPLICATION)
        if application is None:
            return "Serve no longer knows the application"
        if application.status != "RUNNING":
            return f"application {application.status.value}: {application.message}".strip()
        if len(self.proven) < self.wanted:
            return f"{len(self.proven)} of {self.wanted} replicas have answered a completion"
        return ""


def watch(stop: Any, replicas: Replicas, patience: float) -> None:
    """Return when told to stop; report the deployment's health on the way.

    Args:
        stop: Waits a moment and returns whether to stop.
        replicas: The replicas of the deployment.
        patience: Seconds that a deployment may be unhealthy.

    Raises:
        DeployError: The deployment is unhealthy for good, or the cluster is lost.
    """
    reported, healthy = "", time.monotonic()
    while not stop():
        try:
            replicas.update()
            wrong = replicas.problem()
        except Exception as error:
            raise DeployError(f"the Ray cluster is lost: {error!r}", 3) from error
        if wrong != reported:
            say(wrong or "all replicas are well again")
            reported = wrong
        if not wrong:
            healthy = time.monotonic()
        elif "DEPLOY_FAILED" in wrong or time.monotonic() - healthy > patience:
            raise DeployError(f"unhealthy for {time.monotonic() - healthy:.0f} s: {wrong}")


# ------------------------------------------------------------------------------------------ the run


def end_within(seconds: float, code: int) -> None:
    """End this process after some seconds, whatever it is doing then."""

    def end() -> None:
        say(f"not ended after {seconds:g} s; the rest is left to the end of Ray")
        os._exit(code)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


def shut_down(code: int) -> None:
    """End Serve and leave Ray, within a deadline."""
    if "ray" not in sys.modules:
        return
    import ray
    from ray import serve

    end_within(SHUTDOWN_SECONDS, code)
    for step in (serve.shutdown, ray.shutdown) if ray.is_initialized() else ():
        try:
            step()
        except Exception as error:
            say(f"{step.__module__}.{step.__name__}: {error!r}")


class Run:
    """One run, from the configuration to the word to stop."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.started = time.monotonic()
        self.seconds: dict[str, float] = {}
        self.serving = False
        self.told = threading.Event()

    def listen(self) -> None:
        """Take the signals that end a run."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.on_signal)

    def on_signal(self, number: int, _frame: object) -> None:
        """Stop serving, or give up on it."""
        if self.serving:
            self.told.set()
        else:
            end_within(SHUTDOWN_SECONDS, 128 + number)
            raise Signalled(number)

    def stop(self) -> bool:
        """Wait a moment and return whether to stop."""
        return self.told.wait(POLL_SECONDS) or self.arguments.completion_file.exists()

    def stage(self, name: str) -> None:
        """Note how long a stage took."""
        passed = time.monotonic() - self.started - sum(self.seconds.values())
        self.seconds[name] = round(max(passed, 0), 1)
        say(f"{name}: {self.seconds[name]} s")

    def deploy(self) -> None:
        """Deploy, prove, announce, watch."""
        values = read_settings(self.arguments)
        warnings = fit_load(values)
        if values["backend"] == "megatron":
            values["checkpoint_path"] = str(latest_iteration(Path(values["checkpoint_path"])))
            say(f"checkpoint: {values['checkpoint_path']}")
        board = connect(self.arguments.address, values)
        self.listen()  # again: ray.init has set a handler that ends the process at once
        from ray import serve

        if lacking := shortage(alive_nodes(), values):
            raise DeployError(lacking, 3)
        self.stage("connect")
        application, more = bind(values)
        for line in (warnings := warnings + more):
            say(f"WARNING: {line}")
        self.stage("import")
        quiet = {"enable_access_log": False}
        http = {"host": values["host"], "port": values["port"]}
        serve.start(proxy_location="HeadOnly", http_options=http, logging_config=quiet)
        replicas = Replicas(board, values["num_replicas"])
        try:
            serve.run(application, name=APPLICATION, route_prefix="/", logging_config=quiet)
        except Exception:
            replicas.update()  # says what the replicas said
            raise
        self.stage("deploy")
        replicas.update()
        while len(replicas.proven) < replicas.wanted:
            if "DEPLOY_FAILED" in (problem := replicas.problem()):
                raise DeployError(problem)
            time.sleep(POLL_SECONDS)
            replicas.update()
        host = "127.0.0.1" if values["host"] == "0.0.0.0" else values["host"]
        base = f"http://{host}:{values['port']}/v1"
        complete(f"{base}/completions/", values["model_id"], timeout=300)
        self.stage("first completion")
        faults = known_faults(f"{base}/completions/", values, timeout=300)
        for fault in faults or ():
            say(f"WARNING: {fault['message']}")
        self.announce(base, values, replicas.proven, {"warnings": warnings, "faults": faults})
        watch(self.stop, replicas, patience=max(60.0, 2 * sum(self.seconds.values())))

    def announce(
        self, base: str, values: dict[str, Any], proven: dict[str, Any], more: dict[str, Any]
    ) -> None:
        """Write the endpoint file, under another name first, so that no reader sees a half."""
        packages = ("ray", "nemo-export-deploy", "torch", "transformers", "megatron-core")
        endpoint = {
            "completions": f"{base}/completions/",
            "chat": f"{base}/chat/completions/",
            "health": f"{base}/health",
            "model_id": values["model_id"],
            "backend": values["backend"],
            "replicas": values["num_replicas"],
            "proven": {
                name: {key: report[key] for key in ("node", "ranks", "seconds")}
                for name, report in sorted(proven.items())
            },
            "max_ongoing_requests": values["max_ongoing_requests"],
            "node": os.uname().nodename,
            "versions": {name: version(name) for name in packages},
            **more,
            "seconds": self.seconds,
        }
        path = self.arguments.endpoint_file
        temporary = path.with_name(path.name + ".part")
        temporary.write_text(json.dumps(endpoint, indent=2) + "\n")
        self.serving = True  # from here on a signal is an orderly end
        temporary.replace(path)
        say(f"serving {values['model_id']} at {base}")


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = parse_arguments(argv)
    arguments.endpoint_file.unlink(missing_ok=True)
    run, code = Run(arguments), 0
    run.listen()
    try:
        run.deploy()
        say("told to stop")
    except Signalled as reason:
        say(f"ERROR: {signal.Signals(reason.args[0]).name} before the endpoint was up")
        code = 128 + reason.args[0]
    except Exception as error:
        own = isinstance(error, DeployError)
        say(f"ERROR: {error}" if own else f"ERROR: {type(error).__name__}: {error}")
        code = error.exit_code if own else 1
    shut_down(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
