"""One side: slurmeval's own job, as users run it: Ray, deploy.py, nemo-evaluator."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import logged
import yaml
from material import GROUP
from samples import Run, of_directory

#: Makes lm-eval's client add a BOS itself. The evaluator has no parameter for that; it writes this
#: value, comma and all, into lm-eval's list of model arguments.
CLIENT_BOS = "huggingface,add_bos_token=True"
#: Takes the place of ``deploy.py``'s functions of those names.
UNREPAIRED = (
    "repaired_hf = lambda infer, tokenizer: infer\nmend = lambda choice, request: None\n\n\n"
)
START_OF_MAIN = 'if __name__ == "__main__":'


def run_job(
    job: Path,
    model: Path,
    tasks: Path,
    clients: Mapping[str, dict[str, Any]],
    *,
    limit: int | None,
    port: int,
    repaired: bool = True,
) -> dict[str, Run]:
    """Render a job for this machine, run it to its end, and return its samples.

    Args:
        job: The job directory to make.
        model: The checkpoint.
        tasks: The directory of the tasks.
        clients: For each evaluation, its name and its ``eval/<name>.yaml``'s ``extra`` keys that
            differ; all use the same endpoint.
        limit: Questions per task; None for all.
        port: The endpoint's port.
        repaired: Whether ``deploy.py`` repairs what Export-Deploy's endpoint answers;
            without, the numbers are upstream's.

    Returns:
        The samples of each evaluation by its name.

    Raises:
        RuntimeError: The job could not be rendered, or failed.
    """
    config = {
        "run": {"name": job.name, "deadlines": {"ray": 300, "serve": 300, "task": 900}},
        "model": {"model_id": "fidelity", "checkpoint_path": str(model)},
        "deploy": {
            "backend": "hf",
            "num_gpus": 0,
            "device_map": "cpu",
            "num_cpus_per_replica": 1,
            "port": port,
        },
        "eval": {
            "parallelism": 4,
            "request_timeout": 120,
            "limit_samples": limit,
            "tasks": [
                {
                    "name": name,
                    "type": f"lm-evaluation-harness.{GROUP}",
                    "endpoint_type": "completions",
                    "include_path": str(tasks),
                    "params": {"extra": {"num_fewshot": 0}},
                }
                for name in clients
            ],
        },
    }
    source = job.with_suffix(".yaml")
    source.write_text(yaml.safe_dump(config, sort_keys=False))
    environment = {**os.environ, "HF_HOME": str(job.parent / "hf")}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    render = [sys.executable, "-m", "slurmeval", "render", "--profile", "local"]
    log = job.with_suffix(".log")
    logged.run([*render, "-c", str(source), "-o", str(job)], log, environment)
    _edit(job, clients, repaired)
    logged.run(["bash", str(job / "job.sbatch")], log, environment)
    return {name: of_directory(job / "eval_results" / name) for name in clients}


def _edit(job: Path, clients: Mapping[str, dict[str, Any]], repaired: bool) -> None:
    """Change the job's files, which are there to be edited."""
    for name, extra in clients.items():
        path = job / "eval" / f"{name}.yaml"
        settings = yaml.safe_load(path.read_text())
        settings["config"]["params"]["extra"].update(extra)
        path.write_text(yaml.safe_dump(settings, sort_keys=False))
    if not repaired:
        path = job / "deploy.py"
        head, end = path.read_text().split(START_OF_MAIN)
        path.write_text(head + UNREPAIRED + START_OF_MAIN + end)
