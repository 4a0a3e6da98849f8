"""The demo on a real Slurm of two nodes, over a real sshd, as an unprivileged user."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from slurmcluster import SlurmCluster

from slurmeval import manifest

pytestmark = [pytest.mark.slurm, pytest.mark.serving]

PROFILE = """
[cluster]
executor = "slurm"
tunnel = "ssh"
host = "{host}"
port = {port}
user = "{user}"
identity = "{identity}"
remote_job_dir = "{directory}"
nodes = 2
partition = "batch"
time = "00:15:00"
mem = "12000"
setup_lines = ["export PATH={python}:$PATH"]

[cluster-pyxis]
extends = "cluster"
container = "registry.example/nemo:25.11"
setup_lines = []
"""


def slurmeval(
    cluster: SlurmCluster, user_dir: Path, tmp_path: Path, env: dict[str, str], *arguments: str
) -> str:
    """Run a command of the client with a profile for the cluster and return what it printed."""
    profile = tmp_path / "env.toml"
    profile.write_text(
        PROFILE.format(
            host=cluster.host,
            port=cluster.port,
            user=cluster.user,
            identity=cluster.identity,
            directory=user_dir,
            python=Path(sys.executable).parent,
        )
    )
    ended = subprocess.run(
        [sys.executable, "-m", "slurmeval", *arguments],
        cwd=tmp_path,
        env={**env, "SLURMEVAL_KNOWN_HOSTS": str(cluster.known_hosts)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def check_scores(tmp_path: Path, demo_dir: Path) -> Path:
    """Check the scores that came home, and return the directory that they lie in."""
    (found,) = tmp_path.glob("eval_results/*/eval_results/summary.json")
    summary: dict[str, Any] = json.loads(found.read_text())
    expected = json.loads((demo_dir / "expected.json").read_text())
    assert summary["state"] == "ok"
    assert len(summary["tasks"]) == len(expected)
    for task in summary["tasks"]:
        wanted = expected[task["name"]]
        assert task["samples"] == wanted["samples"]
        assert task["metrics"][task["primary"]]["value"] == wanted[task["primary"]]
    assert summary["job"]["endpoint"]["faults"] == []
    home = found.parents[1]
    written = manifest.results_manifest(home)
    assert "eval_results/summary.json" in written and len(written) > 4
    assert all(manifest.sha256(home / name) == digest for name, digest in written.items())
    return home


def check_nodes(cluster: SlurmCluster) -> None:
    """Check that the job left no process and no file on its nodes."""
    for node in ("node1", "node2"):
        left = cluster.exec(node, "sh", "-c", "ls -A /tmp; ps -eo user,comm | grep ^tester; true")
        assert [line for line in left.stdout.split("\n") if "slurmeval" in line] == []
        assert "raylet" not in left.stdout and "gcs_server" not in left.stdout


def test_scores_come_home(
    slurm_cluster: SlurmCluster,
    user_dir: Path,
    tmp_path: Path,
    demo_dir: Path,
    client_env: dict[str, str],
) -> None:
    printed = slurmeval(
        slurm_cluster,
        user_dir,
        tmp_path,
        client_env,
        *("submit", "-c", "demo", "--profile", "cluster", "--env-file", "env.toml"),
    )
    home = check_scores(tmp_path, demo_dir)
    assert "the evaluation is valid" in printed
    assert "2 of 2 nodes" in (home / "logs" / "0" / "ray-ready.log").read_text()
    check_nodes(slurm_cluster)


def test_an_edited_directory_runs_in_containers(
    slurm_cluster: SlurmCluster,
    user_dir: Path,
    tmp_path: Path,
    demo_dir: Path,
    client_env: dict[str, str],
) -> None:
    binaries = Path(sys.executable).parent
    slurm_cluster.make_image("registry.example/nemo:25.11", {"PATH": f"{binaries}:/usr/bin:/bin"})
    where = ("--profile", "cluster-pyxis", "--env-file", "env.toml")
    both = ("eval.concurrency=2", "-o", "job")
    slurmeval(slurm_cluster, user_dir, tmp_path, client_env, "render", "-c", "demo", *where, *both)
    script = tmp_path / "job" / "job.sbatch"
    edit = 'echo "by hand: in $(cat /image-name)"\n'
    text = script.read_text().replace(
        "'EVALUATE'\n#!/bin/bash\n", f"'EVALUATE'\n#!/bin/bash\n{edit}"
    )
    assert edit in text
    script.write_text(text)
    slurmeval(slurm_cluster, user_dir, tmp_path, client_env, "submit", "job", *where)
    home = check_scores(tmp_path, demo_dir)
    log = (home / "logs" / "0" / "slurmeval_demo_choice.log").read_text()
    assert "by hand: in registry.example/nemo:25.11" in log
    check_nodes(slurm_cluster)
