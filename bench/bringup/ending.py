"""How long a job takes to end once its last benchmark has ended: the demo, on two nodes."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from cluster import REPO, cluster_of, load, run_client
from slurmcluster import SlurmCluster

PROFILE = """
[bench]
executor = "slurm"
tunnel = "ssh"
host = "{cluster.host}"
port = {cluster.port}
user = "{cluster.user}"
identity = "{cluster.identity}"
remote_job_dir = "{cluster.home}/jobs"
nodes = 2
partition = "batch"
time = "00:15:00"
mem = "12000"
setup_lines = ["export PATH={prefix}/bin:$PATH"]
"""
TASKS = ("slurmeval_demo_choice", "slurmeval_demo_generate")


def make_demo(base: Path, prefix: Path) -> Path:
    """Make the demo's model and benchmarks with an environment's packages."""
    command = [str(prefix / "bin" / "python"), "-m", "slurmeval.demo", str(base / "demo")]
    subprocess.run(command, cwd=REPO, check=True, stdout=sys.stderr)
    for path in [base, *base.rglob("*")]:
        path.chmod(path.stat().st_mode | (0o755 if path.is_dir() else 0o444))
    return base / "demo"


def run_demo(cluster: SlurmCluster, prefix: Path, demo: Path) -> list[float]:
    """Run the demo; return seconds from the last benchmark's end to each step of the ending.

    The steps are the verdict (summary.json), the end of deploy.py, and the end of the script: the
    times at which their files were last written.
    """
    before = set(cluster.home.glob("jobs/*"))
    with tempfile.TemporaryDirectory() as directory:
        where = Path(directory)
        (where / "env.toml").write_text(PROFILE.format(cluster=cluster, prefix=prefix))
        env = {"HOME": directory, "XDG_STATE_HOME": directory, "SLURMEVAL_DEMO": str(demo)}
        profile = ("--profile", "bench", "--env-file", "env.toml")
        run_client(cluster, where, "submit", "-c", "demo", *profile, **env)
    (job,) = set(cluster.home.glob("jobs/*")) - before
    (out,) = job.glob("slurm-*.out")
    last = max((job / "logs" / "0" / f"{task}.log").stat().st_mtime for task in TASKS)
    steps = (job / "eval_results" / "summary.json", job / "logs" / "0" / "serve.log", out)
    return [step.stat().st_mtime - last for step in steps]


def ending(prefix: Path, demo: Path | None, repeats: int, note: Callable[[str], None]) -> list[str]:
    """Run the demo some times; return the table's lines.

    Args:
        prefix: An environment with all serving packages.
        demo: The demo's directory; none makes it.
        repeats: Number of runs.
        note: Takes a line of progress.
    """
    lines = [
        "| run | verdict, s | deploy.py ended, s | job ended, s | load |",
        "|---|---|---|---|---|",
    ]
    ends = []
    with tempfile.TemporaryDirectory(prefix="demo-", dir="/var/tmp") as directory:
        there = demo or make_demo(Path(directory), prefix)
        with cluster_of(2, [prefix, there]) as cluster:
            for k in range(1, repeats + 1):
                steps = run_demo(cluster, prefix, there)
                ends.append(steps[-1])
                lines.append(f"| {k} | {' | '.join(f'{s:.1f}' for s in steps)} | {load()} |")
                note(lines[-1])
    worst, median = max(ends), statistics.median(ends)
    return [*lines, "", f"Median {median:.1f} s, longest {worst:.1f} s (demanded: at most 10)."]
