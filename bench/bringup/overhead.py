"""What the job script itself costs, with a stand-in for Ray that is up at once."""

from __future__ import annotations

import os
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cluster import cluster_of, load, require_counted, stamp, submit
from pairs import make_pair, standin_setup
from slurmcluster import SlurmCluster

TICK = 1 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Cost:
    """What one job took.

    Attributes:
        launched: Seconds until the script calls the srun of all nodes; 0.0 of a bare job.
        first: Seconds until the first node starts Ray.
        counted: Seconds until all nodes are counted.
        node_cpu: CPU seconds that the script uses on a node before it starts Ray (median).
        end: Seconds from the counting to the end of the batch script.
        calls: Calls of Slurm's commands.
    """

    launched: float
    first: float
    counted: float
    node_cpu: float
    end: float
    calls: Counter[str]


def measure(cluster: SlurmCluster, directory: Path) -> Cost:
    """Run a job that has the stand-ins on PATH; return what it took."""
    (directory / "standin").mkdir()
    submit(cluster, directory)
    require_counted(directory)
    nodes = [file.read_text().split() for file in (directory / "standin").glob("[!.]*")]
    started, counted = stamp(directory, "started"), stamp(directory, "counted")
    (out,) = directory.glob("slurm-*.out")
    launched = directory / "launched"
    return Cost(
        launched=stamp(directory, "launched") - started if launched.exists() else 0.0,
        first=min(float(time) for time, _ in nodes) - started,
        counted=counted - started,
        node_cpu=statistics.median(int(ticks) * TICK for _, ticks in nodes),
        end=out.stat().st_mtime - counted,
        calls=Counter((directory / "slurm-calls").read_text().split()),
    )


def overhead(sizes: list[int], repeats: int, note: Callable[[str], None]) -> list[str]:
    """Run jobs of several sizes, ours and bare ones in turn; return the table's lines.

    Args:
        sizes: Numbers of nodes.
        repeats: Pairs of jobs of each size.
        note: Takes a line of progress.
    """
    lines = [
        "| nodes | script until its srun, s | first `ray start`, s | all counted, s "
        "| bare srun, s | difference, s | ratio | CPU on a node, s | end, s | Slurm calls | load |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    with cluster_of(max(sizes), []) as cluster:
        setup = standin_setup(cluster.home)
        for nodes in sizes:
            ours, bare = [], []
            for _ in range(repeats):
                base = Path(tempfile.mkdtemp(prefix="overhead-", dir=cluster.home))
                base.chmod(0o755)
                pair = make_pair(base, nodes, setup)
                ours.append(measure(cluster, pair.ours))
                bare.append(measure(cluster, pair.bare))
            stages = ("launched", "first", "counted")
            row = [statistics.median(getattr(c, n) for c in ours) for n in stages]
            floor = statistics.median(cost.counted for cost in bare)
            cpu, end = (statistics.median(getattr(c, n) for c in ours) for n in ("node_cpu", "end"))
            calls = {", ".join(f"{n} {k}" for k, n in sorted(c.calls.items())) for c in ours}
            lines.append(
                f"| {nodes} | {row[0]:.2f} | {row[1]:.2f} | {row[2]:.2f} | {floor:.2f} "
                f"| {row[2] - floor:.2f} | {row[2] / floor:.1f} | {cpu:.2f} | {end:.2f} "
                f"| {' or '.join(sorted(calls))} | {load()} |"
            )
            note(lines[-1])
    return lines
