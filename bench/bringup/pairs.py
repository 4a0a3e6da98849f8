"""The jobs that the benchmark compares: ours, cut after the Ray phase, and a bare one."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from slurmeval.config.schema import Config
from slurmeval.plan import make_plan
from slurmeval.render import render

STANDIN = Path(__file__).with_name("standin")
STAMP = """printf '%s\\n' "$EPOCHREALTIME" > "$SLURM_SUBMIT_DIR/{name}"\n"""
DEADLINE = 120  # seconds for Ray to be counted

# The fewest steps that bring up Ray and count it: no search for ports, no token, no logs, no end.
# Node names and ports are written in; Ray's options are those of our job.
BARE = """\
#!/bin/bash
#SBATCH --job-name=bare
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task={cpus}
#SBATCH --mem=12000
#SBATCH --time=00:10:00
#SBATCH --output=slurm-%j.out
{start}
{setup}
cd "$SLURM_SUBMIT_DIR" || exit 1
export HEAD_IP=10.91.1.1 RAY_ADDRESS=10.91.1.1:6379
export NODE_NAMES={names} GPUS_PER_NODE=0 RAY_DEADLINE={deadline} RUN_DIR=$SLURM_SUBMIT_DIR
srun --overlap --cpu-bind=none bash -c '
    ROLE=--address=$RAY_ADDRESS
    [ "$SLURM_NODEID" != 0 ] || ROLE="--head --port=6379 --include-dashboard=false"
    IP=10.91.$((1 + SLURM_NODEID / 250)).$((1 + SLURM_NODEID % 250))
    ray start --block $ROLE --node-ip-address="$IP" \
        --node-name="$SLURMD_NODENAME" --num-cpus={cpus} --num-gpus=0 \
        --node-manager-port=6380 --object-manager-port=6381 --runtime-env-agent-port=6382 \
        --dashboard-agent-listen-port=6383 --dashboard-agent-grpc-port=6384 \
        --metrics-export-port=6385 --ray-client-server-port=6386 --dashboard-port=6387 \
        --min-worker-port=6400 --max-worker-port=6799 --disable-usage-stats
' > ray.log 2>&1 &
srun --overlap --cpu-bind=none --nodes=1 --ntasks=1 --nodelist="$(hostname)" python3 ray-ready.py
[ -s ray-ready ] && {counted}
exit 0
"""


@dataclass(frozen=True)
class Pair:
    """Two job directories to submit in turn."""

    ours: Path
    bare: Path


def config_for(nodes: int, setup: list[str]) -> Config:
    """Return the configuration of a job on some nodes, without GPUs."""
    env = {"executor": "slurm", "nodes": nodes, "time": "00:10:00", "mem": "12000"}
    return Config.model_validate(
        {
            "run": {
                "deadlines": {"ray": DEADLINE},
                "env": env | {"partition": "batch", "setup_lines": setup},
            },
            "model": {"checkpoint_path": "/never/loaded", "model_id": "none"},
            "deploy": {"backend": "hf", "num_gpus": 0, "num_cpus_per_replica": 1},
            "eval": {"tasks": [{"name": "hellaswag"}]},
        }
    )


def replaced(text: str, old: str, new: str) -> str:
    """Replace what must stand in a text exactly once."""
    if text.count(old) != 1:
        raise SystemExit(f"the job script holds {old!r} {text.count(old)} times, not once")
    return text.replace(old, new)


def make_pair(into: Path, nodes: int, setup: list[str]) -> Pair:
    """Write both job directories.

    Args:
        into: Where to write them.
        nodes: Nodes of each job.
        setup: Shell lines that put ``ray`` and ``python3`` on PATH.
    """
    config = config_for(nodes, setup)
    files = render(config, make_plan(config))
    script = files["job.sbatch"].text
    names = ("started", "launched", "counted")
    start, launched, counted = (STAMP.format(name=name) for name in names)
    cut = replaced(script, "set -uo pipefail\n", f"{start}set -uo pipefail\n")
    launch = '    start ray "${ON_ALL_NODES[@]}"'
    cut = replaced(cut, launch, f"    {launched}{launch}")
    cut = replaced(cut, "\nstart_ray\nstart_serve\n", f"\nstart_ray\n{counted}exit 0\n")
    ours, bare = into / "ours", into / "bare"
    for name, file in files.items():
        path = ours / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(cut if name == "job.sbatch" else file.text)
    bare.mkdir()
    found = re.search(r"<<'RAY_READY'\n(.*?)\nRAY_READY\n", script, re.DOTALL)
    cpus = re.search(r"^CPUS_PER_NODE=(\d+)", script, re.MULTILINE)
    if found is None or cpus is None:
        raise SystemExit("the job script holds no ray-ready.py or no CPUS_PER_NODE")
    (bare / "ray-ready.py").write_text(found[1] + "\n")
    hosts = ",".join(f"node{k}" for k in range(1, nodes + 1))
    (bare / "job.sbatch").write_text(
        BARE.format(
            nodes=nodes,
            cpus=cpus[1],
            names=hosts,
            deadline=DEADLINE,
            start=start,
            setup="\n".join(setup),
            counted=counted,
        )
    )
    return Pair(ours, bare)


def standin_setup(home: Path) -> list[str]:
    """Copy the stand-ins into the shared home; return the setup lines of a job that uses them."""
    there = home / "standin"
    if not there.exists():
        shutil.copytree(STANDIN, there)
    return [
        f"export PATH={there}/bin:/usr/bin:/bin PYTHONPATH={there}/lib",
        'export STANDIN_DIR="$SLURM_SUBMIT_DIR"/standin',
    ]
