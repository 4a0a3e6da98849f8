"""A test cluster of the benchmark's own, and jobs on it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "tests" / "cluster"))

from slurmcluster import SlurmCluster, free_ports  # noqa: E402


@contextmanager
def cluster_of(nodes: int, readable: list[Path]) -> Iterator[SlurmCluster]:
    """Start a cluster, and end it at the end.

    Args:
        nodes: Compute nodes.
        readable: Paths that the job user reads.

    Raises:
        SystemExit: There is one in that directory already.
    """
    state = Path(os.environ.get("SLURM_CLUSTER_DIR", "/var/tmp/slurmeval-bench"))
    state.mkdir(exist_ok=True)
    port, jump_port = (
        int(os.environ.get(f"SLURM_CLUSTER_{name}_PORT", free))
        for name, free in zip(("SSH", "JUMP"), free_ports(2), strict=True)
    )
    cluster = SlurmCluster(state, nodes, "none", port, jump_port)
    if cluster.script("status", check=False).returncode == 0:
        raise SystemExit(f"the cluster in {state} is up already: end its user, or it, first")
    try:
        cluster.script(
            "up",
            timeout=900,
            SLURM_CLUSTER_NODES=str(nodes),
            SLURM_CLUSTER_ACCOUNTING="none",
            SLURM_CLUSTER_SSH_PORT=str(port),
            SLURM_CLUSTER_JUMP_PORT=str(jump_port),
            SLURM_CLUSTER_READABLE=":".join(map(str, readable)),
        )
        yield cluster
    finally:
        cluster.script("down", timeout=900)
        shutil.rmtree(state, ignore_errors=True)


def submit(cluster: SlurmCluster, directory: Path) -> str:
    """Submit the job of a directory and return its id once it has ended.

    The queue is asked once a second: more often, the asking would slow the job down.
    """
    cluster.give(directory)
    command = ["sbatch", "--parsable", f"--chdir={directory}", str(directory / "job.sbatch")]
    job = cluster.user_exec("env", "-C", directory, *command).stdout.strip()
    while cluster.exec("login", "squeue", "-h", "-j", job).stdout.strip():
        time.sleep(1)
    return job


def tidy(cluster: SlurmCluster, nodes: int) -> None:
    """End what a bare job leaves on its nodes; ours leaves nothing."""
    for k in range(1, nodes + 1):
        cluster.exec(f"node{k}", "sh", "-c", f"pkill -KILL -U {cluster.uid}; rm -rf /tmp/ray")


def require_counted(directory: Path) -> None:
    """Check that a job counted all its nodes.

    Raises:
        SystemExit: It did not; with what its logs say.
    """
    if (directory / "counted").exists():
        return
    for log in (*directory.glob("slurm-*.out"), *directory.glob("ray.log")):
        print(f"{log}:\n{log.read_text()}", file=sys.stderr)
    raise SystemExit(f"{directory.name}: not all nodes were counted, see above")


def stamp(directory: Path, name: str) -> float:
    """Return a time that a job wrote down, in seconds."""
    return float((directory / name).read_text())


def load() -> str:
    """Return the machine's load average over the last minute, and its CPUs."""
    return f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs"


def run_client(cluster: SlurmCluster, where: Path, *arguments: str, **env: str) -> str:
    """Run a command of slurmeval's client, and return what it printed.

    Raises:
        SystemExit: It failed.
    """
    ended = subprocess.run(
        [sys.executable, "-m", "slurmeval", *arguments],
        cwd=where,
        env={
            **os.environ,
            **env,
            "PYTHONPATH": str(REPO),
            "SLURMEVAL_KNOWN_HOSTS": str(cluster.known_hosts),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.returncode != 0:
        raise SystemExit(ended.stdout + ended.stderr)
    return ended.stdout
