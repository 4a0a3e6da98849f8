#!/usr/bin/env python3
"""Serve one checkpoint on a Ray cluster behind an OpenAI-compatible endpoint, until told to stop.

Stands alone: the standard library, PyYAML, ray and nemo_deploy (NeMo Export-Deploy). The job script
runs it on Ray's head node; it runs by hand on any Ray cluster just as well::

    python deploy.py --config config.yaml --address 10.0.0.1:6379

It connects to that cluster and to no other, binds Export-Deploy's Ray deployable, proves the
endpoint with a real completion, and only then writes the endpoint file. It ends when the completion
file appears, or on SIGTERM or SIGINT, after shutting Serve down.

Exit codes: 0 told to stop; 1 the deployment failed; 2 the configuration cannot be deployed; 3 the
cluster was not there, or was lost.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import inspect
import json
import os
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import ray
import yaml
from ray import serve

APPLICATION = "slurmeval"
#: Export-Deploy's HuggingFace deployable answers an exception with HTTP 200 and this text.
ERROR_TEXT = "An error occurred:"


class DeployError(Exception):
    """A deployment that cannot work; the exit code says which kind."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def say(message: str) -> None:
    """Print one line of the log, with the time."""
    print(time.strftime("%F %T "), message, flush=True)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's values."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True, help="the job's config.yaml")
    parser.add_argument(
        "--address",
        default=os.environ.get("RAY_ADDRESS"),
        help="HOST:PORT of Ray's head (default: $RAY_ADDRESS); never 'auto'",
    )
    parser.add_argument("--host", help="address to listen on (default: deploy.host)")
    parser.add_argument("--port", type=int, help="port to listen on (default: deploy.port)")
    parser.add_argument("--endpoint-file", type=Path, default=Path("endpoint.json"))
    parser.add_argument("--completion-file", type=Path, default=Path("done"))
    arguments = parser.parse_args(argv)
    if not arguments.address or arguments.address == "auto":
        parser.error("--address HOST:PORT is needed: 'auto' may find another job's cluster")
    return arguments


def connect(address: str, *, cpu_only: bool) -> None:
    """Connect to the Ray cluster at an address, never to a fresh local one.

    Raises:
        DeployError: Nothing answers there.
    """
    hook = {"worker_process_setup_hook": allow_missing_parts} if cpu_only else None
    try:
        ray.init(address=address, runtime_env=hook, log_to_driver=True, logging_level="WARNING")
    except (ConnectionError, RuntimeError) as error:
        raise DeployError(f"no Ray cluster at {address}: {error}", 3) from error


def allow_missing_parts() -> None:
    """Let Export-Deploy's HuggingFace deployable run without a GPU; runs in each Ray worker.

    It moves every tensor with ``.cuda()`` and insists on PyTriton, which Ray Serve does not need.
    """
    import torch

    if not torch.cuda.is_available():
        torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    import nemo_deploy.llm.hf_deployable as module

    module.HAVE_TRITON = True


def check_cluster(deploy: dict[str, Any]) -> None:
    """Check that the cluster has what the deployment will ask for.

    Raises:
        DeployError: Too few GPUs or CPUs; without this check the replicas would stay pending.
    """
    resources = ray.cluster_resources()
    gpus, cpus = resources.get("GPU", 0), resources.get("CPU", 0)
    wanted = deploy["num_replicas"] * deploy["num_cpus_per_replica"]
    if gpus < deploy["num_gpus"]:
        raise DeployError(f"Ray has {gpus:g} GPUs, deploy.num_gpus wants {deploy['num_gpus']}", 3)
    if cpus < wanted:
        raise DeployError(f"Ray has {cpus:g} CPUs, the replicas want {wanted:g}", 3)


def megatron_application(config: dict[str, Any]) -> serve.Application:
    """Bind Export-Deploy's Megatron deployable: its ranks are Ray actors of their own."""
    from nemo_deploy.llm.megatronllm_deployable_ray import MegatronRayDeployable

    deploy, model = config["deploy"], config["model"]
    knobs = {
        "megatron_checkpoint_filepath": model["checkpoint_path"],
        "num_gpus": deploy["num_gpus"] // deploy["num_replicas"],
        "model_id": model["model_id"],
        "model_type": model["model_type"],
        **{
            name: deploy[name]
            for name in (
                "tensor_model_parallel_size",
                "pipeline_model_parallel_size",
                "context_parallel_size",
                "expert_model_parallel_size",
                "expert_tensor_parallel_size",
                "max_batch_size",
                "inference_max_seq_length",
            )
        },
    }
    known = set(inspect.signature(MegatronRayDeployable.func_or_class.__init__).parameters)
    for name in sorted(set(knobs) - known):
        if knobs.pop(name) != 1:
            raise DeployError(
                f"this Export-Deploy ({version('nemo-export-deploy')}) has no {name}", 2
            )
    return MegatronRayDeployable.options(
        num_replicas=deploy["num_replicas"],
        ray_actor_options={"num_cpus": deploy["num_cpus_per_replica"]},
        max_ongoing_requests=deploy["max_ongoing_requests"],
    ).bind(**knobs)


def hf_application(config: dict[str, Any]) -> serve.Application:
    """Bind Export-Deploy's HuggingFace deployable."""
    from nemo_deploy.llm.hf_deployable_ray import HFRayDeployable

    deploy, model = config["deploy"], config["model"]
    on_cpu = deploy["num_gpus"] == 0
    return HFRayDeployable.options(
        num_replicas=deploy["num_replicas"],
        ray_actor_options={
            "num_cpus": deploy["num_cpus_per_replica"],
            "num_gpus": deploy["num_gpus"] // deploy["num_replicas"],
        },
        max_ongoing_requests=deploy["max_ongoing_requests"],
    ).bind(
        hf_model_id_path=model["checkpoint_path"],
        task="text-generation",
        trust_remote_code=deploy["trust_remote_code"],
        model_id=model["model_id"],
        device_map=None if on_cpu else deploy["device_map"],
        torch_dtype=deploy["torch_dtype"],
        use_vllm_backend=deploy["use_vllm_backend"],
    )


APPLICATIONS = {"megatron": megatron_application, "hf": hf_application}


def version(distribution: str) -> str:
    """Return the installed version of a distribution, or 'unknown'."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def complete(url: str, model_id: str, *, timeout: float) -> str:
    """Ask for one completion and return its text.

    Raises:
        DeployError: No completion: an HTTP error, or an error text with HTTP 200.
    """
    body = {"model": model_id, "prompt": "The answer is", "max_tokens": 1, "temperature": 0}
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=timeout) as response:
            text = str(json.load(response)["choices"][0]["text"])
    except urllib.error.HTTPError as error:
        detail = error.read(2000).decode(errors="replace")
        raise DeployError(f"the first completion failed: HTTP {error.code} {detail}") from error
    except (OSError, ValueError, LookupError) as error:
        raise DeployError(f"the first completion failed: {error!r}") from error
    if text.startswith(ERROR_TEXT):
        raise DeployError(f"the first completion failed: {text}")
    return text


def write_atomically(path: Path, values: dict[str, Any]) -> None:
    """Write JSON under another name first, so that no reader sees a half."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(values, indent=2) + "\n")
    temporary.replace(path)


def problem() -> str | None:
    """Return what is wrong with the running application, or None."""
    application = serve.status().applications.get(APPLICATION)
    if application is None:
        return "Serve no longer knows the application"
    if application.status == "RUNNING":
        return None
    return f"application {application.status}: {application.message}".strip()


def watch(stop: threading.Event, completion_file: Path) -> None:
    """Return when told to stop; report the application's health on the way.

    Raises:
        DeployError: The application failed for good, or the cluster is lost.
    """
    reported: str | None = None
    while not stop.wait(1) and not completion_file.exists():
        try:
            wrong = problem()
        except Exception as error:
            raise DeployError(f"the Ray cluster is lost: {error!r}", 3) from error
        if wrong != reported:
            say(wrong or "the application is healthy again")
            reported = wrong
        if wrong and "DEPLOY_FAILED" in wrong:
            raise DeployError(wrong)


def shut_down(seconds: float) -> None:
    """End Serve and leave Ray; after the given seconds, end this process all the same."""
    timer = threading.Timer(seconds, lambda: os._exit(1))
    timer.daemon = True
    timer.start()
    for step in (serve.shutdown, ray.shutdown):
        try:
            step()
        except Exception as error:
            say(f"{step.__module__}.{step.__name__}: {error!r}")
    timer.cancel()


def run(arguments: argparse.Namespace, stop: threading.Event) -> None:
    """Deploy, prove, announce, watch."""
    started = time.monotonic()
    config = yaml.safe_load(arguments.config.read_text())
    deploy, model_id = config["deploy"], config["model"]["model_id"]
    host, port = arguments.host or deploy["host"], arguments.port or deploy["port"]
    seconds: dict[str, float] = {}

    def stage(name: str) -> None:
        seconds[name] = round(time.monotonic() - started - sum(seconds.values()), 1)
        say(f"{name}: {seconds[name]} s")

    connect(arguments.address, cpu_only=deploy["backend"] == "hf" and deploy["num_gpus"] == 0)
    check_cluster(deploy)
    stage("connect")
    application = APPLICATIONS[deploy["backend"]](config)
    stage("import")
    serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port})
    serve.run(application, name=APPLICATION, route_prefix="/")
    stage("deploy")
    base = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}/v1"
    complete(f"{base}/completions/", model_id, timeout=config["run"]["deadlines"]["serve"])
    stage("first completion")
    endpoint = {
        "completions": f"{base}/completions/",
        "chat": f"{base}/chat/completions/",
        "health": f"{base}/health",
        "model_id": model_id,
        "backend": deploy["backend"],
        "replicas": deploy["num_replicas"],
        "node": os.uname().nodename,
        "versions": {
            name: version(name) for name in ("ray", "nemo-export-deploy", "torch", "transformers")
        },
        "seconds": seconds,
    }
    write_atomically(arguments.endpoint_file, endpoint)
    say(f"serving {model_id} at {base}")
    watch(stop, arguments.completion_file)


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = parse_arguments(argv)
    arguments.endpoint_file.unlink(missing_ok=True)
    stop = threading.Event()

    def on_signal(number: int, frame: object) -> None:
        if not arguments.endpoint_file.exists():
            raise DeployError(f"signal {signal.Signals(number).name} before the endpoint was up")
        stop.set()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    code = 0
    try:
        run(arguments, stop)
        say("told to stop")
    except DeployError as error:
        say(f"ERROR: {error}")
        code = error.exit_code
    except Exception as error:
        say(f"ERROR: {type(error).__name__}: {error}")
        code = 1
    shut_down(20)
    return code


if __name__ == "__main__":
    sys.exit(main())
