"""The time to all nodes counted of our job, against that of a bare one; real Ray on four nodes."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

from cluster import cluster_of, load, require_counted, stamp, submit, tidy
from pairs import make_pair

NODES = 4


def ratio(prefix: Path, pairs: int, note: Callable[[str], None]) -> list[str]:
    """Compare the time to all nodes counted with that of a bare srun; return the table's lines.

    Args:
        prefix: An environment with Ray.
        pairs: How often to run both, in turn.
        note: Takes a line of progress.
    """
    lines = ["| pair | this job, s | bare srun, s | load |", "|---|---|---|---|"]
    seen: dict[str, list[float]] = {"ours": [], "bare": []}
    with cluster_of(NODES, [prefix]) as cluster:
        for k in range(1, pairs + 1):
            base = Path(tempfile.mkdtemp(prefix="ratio-", dir=cluster.home))
            base.chmod(0o755)
            pair = make_pair(base, NODES, [f"export PATH={prefix}/bin:$PATH"])
            for kind, directory in (("ours", pair.ours), ("bare", pair.bare)):
                submit(cluster, directory)
                tidy(cluster, NODES)
                require_counted(directory)
                seen[kind].append(stamp(directory, "counted") - stamp(directory, "started"))
            lines.append(f"| {k} | {seen['ours'][-1]:.1f} | {seen['bare'][-1]:.1f} | {load()} |")
            note(lines[-1])
    ours, bare = (statistics.median(seen[kind]) for kind in ("ours", "bare"))
    lines.append(f"| **median** | **{ours:.1f}** | **{bare:.1f}** | |")
    return [*lines, "", f"Ratio of the medians: **{ours / bare:.2f}** (demanded: at most 1.15)."]
