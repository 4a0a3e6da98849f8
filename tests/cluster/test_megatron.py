"""Megatron jobs on two nodes with logical GPUs; only the engine inside each rank is a stand-in.

DeployRay's deployable, its ModelWorkers and their process groups over the network are real, as are
Slurm, Ray Serve and the evaluator. The stand-in answers only if all ranks of a replica compute, so
the known score of the demo says that they did.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from slurmcluster import REPO, SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.serving]
SERVING = REPO / "tests" / "serving"
sys.path.insert(0, str(SERVING))

import published  # noqa: E402

PROFILE = """
[two]
executor = "slurm"
tunnel = "ssh"
host = "{host}"
port = {port}
user = "{user}"
identity = "{identity}"
remote_job_dir = "{directory}"
nodes = 2
gpus_per_node = 2
partition = "batch"
time = "00:15:00"
mem = "14000"
setup_lines = ["export PATH={python}:$PATH"]

[two.env_vars]
PYTHONPATH = "{pythonpath}"
ENGINE_RECORD = "{directory}/record"
ENGINE_GPUS_OF_A_NODE = "2"
"""


def run(
    cluster: SlurmCluster,
    user_dir: Path,
    tmp_path: Path,
    demo_dir: Path,
    env: dict[str, str],
    pythonpath: str,
    *overrides: str,
) -> Path:
    """Run the demo through Megatron's classes and return the job's directory, come home."""
    checkpoint = user_dir / "iter_0000010"
    shutil.copytree(demo_dir / "model", checkpoint)
    (checkpoint / "run_config.yaml").write_text("model: {}\n")
    cluster.give(checkpoint)
    profile = PROFILE.format(
        host=cluster.host,
        port=cluster.port,
        user=cluster.user,
        identity=cluster.identity,
        directory=user_dir,
        python=Path(sys.executable).parent,
        pythonpath=pythonpath,
    )
    (tmp_path / "env.toml").write_text(profile)
    command = [sys.executable, "-m", "slurmeval", "submit", "-c", "demo", "--profile", "two"]
    command += ["--env-file", "env.toml", "deploy.backend=megatron", "deploy.num_gpus=4"]
    command += [f"model.checkpoint_path={checkpoint}", f"model.tokenizer={demo_dir / 'model'}"]
    ended = subprocess.run(
        [*command, "deploy.tensor_model_parallel_size=2", *overrides],
        cwd=tmp_path,
        env={**env, "SLURMEVAL_KNOWN_HOSTS": str(cluster.known_hosts)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (found,) = tmp_path.glob("eval_results/*/eval_results/summary.json")
    summary = json.loads(found.read_text())
    expected = json.loads((demo_dir / "expected.json").read_text())
    assert summary["state"] == "ok" and len(summary["tasks"]) == len(expected)
    for task in summary["tasks"]:
        wanted = expected[task["name"]][task["primary"]]
        assert task["metrics"][task["primary"]]["value"] == wanted
    return found.parents[1]


def groups(user_dir: Path) -> list[list[dict[str, Any]]]:
    """Return what the ranks of each replica wrote down."""
    record = user_dir / "record"
    return [
        [json.loads(path.read_text()) for path in sorted(folder.iterdir())]
        for folder in record.iterdir()
    ]


def test_one_replica_across_both_nodes(
    slurm_cluster: SlurmCluster,
    user_dir: Path,
    tmp_path: Path,
    demo_dir: Path,
    client_env: dict[str, str],
) -> None:
    """TP2 x PP2 with the installed Export-Deploy."""
    home = run(
        slurm_cluster, user_dir, tmp_path, demo_dir, client_env, str(SERVING / "standin"),
        "deploy.pipeline_model_parallel_size=2", "deploy.num_cpus_per_replica=1",
    )  # fmt: skip
    (ranks,) = groups(user_dir)
    assert [rank["rank"] for rank in ranks] == [0, 1, 2, 3]
    assert all((rank["tensor"], rank["pipeline"]) == (2, 2) for rank in ranks)
    hosts = [rank["host"] for rank in ranks]
    assert len(set(hosts)) == 2 and all(hosts.count(host) == 2 for host in hosts)
    endpoint = json.loads((home / "endpoint.json").read_text())
    assert [proof["ranks"] for proof in endpoint["proven"].values()] == [4]


def test_two_replicas_with_batches_and_mixed_requests(
    slurm_cluster: SlurmCluster,
    user_dir: Path,
    tmp_path: Path,
    demo_dir: Path,
    client_env: dict[str, str],
) -> None:
    """The newest release, whose batches would mix loglikelihoods and generations up."""
    packages = published.fetch("0.7.1", slurm_cluster.give(slurm_cluster.fresh_dir()))
    slurm_cluster.give(packages)
    home = run(
        slurm_cluster, user_dir, tmp_path, demo_dir, client_env,
        f"{SERVING / 'standin'}:{packages}",
        "deploy.num_replicas=2", "deploy.num_cpus_per_replica=1", "eval.concurrency=2",
    )  # fmt: skip
    replicas = groups(user_dir)
    assert [len(ranks) for ranks in replicas] == [2, 2]
    endpoint = json.loads((home / "endpoint.json").read_text())
    assert endpoint["versions"]["nemo-export-deploy"] == "0.7.1"
    assert [proof["ranks"] for proof in endpoint["proven"].values()] == [2, 2]
