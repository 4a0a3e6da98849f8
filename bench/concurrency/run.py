#!/usr/bin/env python3
"""What ``eval.concurrency`` brings: the demo's two benchmarks one by one, and both at once.

    python bench/concurrency/run.py > table.md

Whole jobs on this machine in turn, one and two benchmarks at a time. Needs an environment with
Ray, Export-Deploy and the evaluator: the one that runs this, unless --prefix names another. Prints
a table in Markdown; progress goes to standard error.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]


def run(command: list[str], where: Path, env: dict[str, str]) -> None:
    """Run a command that must succeed; what it prints goes to standard error.

    Raises:
        CalledProcessError: It failed.
    """
    subprocess.run(command, cwd=where, env=env, check=True, stdout=sys.stderr)


def seconds_of(job: Path) -> list[float]:
    """Return seconds from the endpoint's proof to the end of each benchmark, the last one last."""
    proven = (job / "endpoint.json").stat().st_mtime
    logs = (job / "logs" / "0").glob("slurmeval_demo_*.log")
    return sorted(log.stat().st_mtime - proven for log in logs)


def measure(job: Path, concurrency: int, python: Path, env: dict[str, str]) -> float:
    """Run the demo as one job; return the seconds that its benchmarks took together."""
    command = [str(python), "-m", "slurmeval", "render", "--profile", "local", "-c", "demo"]
    run([*command, "-o", str(job), f"eval.concurrency={concurrency}"], job.parent, env)
    run(["bash", str(job / "job.sbatch")], job, env)
    return seconds_of(job)[-1]


def main() -> None:
    """Run the pairs and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prefix", type=Path, default=Path(sys.prefix), help="environment to use")
    parser.add_argument("--pairs", type=int, default=3, help="jobs of each kind (3)")
    parser.add_argument("--demo", type=Path, help="the demo's directory (made anew unless given)")
    arguments = parser.parse_args()
    python = arguments.prefix / "bin" / "python"
    print("| pair | one by one, s | both at once, s | load |", "|---|---|---|---|", sep="\n")
    seen: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory(prefix="concurrency-") as directory:
        base = Path(directory)
        demo = arguments.demo or base / "demo"
        env = {
            **os.environ,
            "PATH": f"{arguments.prefix / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": str(REPO),
            "HF_HOME": str(base / "hf"),
            "SLURMEVAL_DEMO": str(demo),
        }
        if arguments.demo is None:
            run([str(python), "-m", "slurmeval.demo", str(demo)], base, env)
        for pair in range(1, arguments.pairs + 1):
            for concurrency, seconds in seen.items():
                job = base / f"job-{pair}-{concurrency}"
                seconds.append(measure(job, concurrency, python, env))
            load = f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs"
            print(f"| {pair} | {seen[1][-1]:.1f} | {seen[2][-1]:.1f} | {load} |", flush=True)
    alone, together = (statistics.median(seconds) for seconds in seen.values())
    print(f"| **median** | **{alone:.1f}** | **{together:.1f}** | |")
    print(f"\nRatio of the medians: **{together / alone:.2f}**.")


if __name__ == "__main__":
    main()
