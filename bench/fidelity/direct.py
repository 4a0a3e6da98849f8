"""The other side: lm-evaluation-harness with its own HuggingFace backend, and no server.

``nvidia-lm-eval`` ships that backend's file but not what it imports, and holds the same package
name; the original is therefore installed in a directory of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import logged
from material import GROUP
from samples import Run, of_harness

VERSION = "0.4.13"


def harness() -> Path:
    """Return the directory of the original harness; install it beside this environment's packages.

    Raises:
        subprocess.CalledProcessError: pip could not install it.
    """
    folder = Path(sys.prefix, "share", "slurmeval", f"lm-eval-{VERSION}")
    if not (folder / f"lm_eval-{VERSION}.dist-info").is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--target", str(folder), f"lm_eval=={VERSION}"], check=True)
    return folder


def run(
    models: Mapping[str, Path], tasks: Path, output: Path, *, limit: int | None
) -> dict[str, Run]:
    """Evaluate checkpoints in one process of the original harness.

    Args:
        models: The checkpoints by name.
        tasks: The directory of the tasks.
        output: A directory for what is logged.
        limit: Questions per task; None for all.

    Raises:
        RuntimeError: The harness failed.
    """
    output.mkdir(exist_ok=True)
    order = {
        "models": {name: str(path) for name, path in models.items()},
        "tasks": str(tasks),
        "group": GROUP,
        "limit": limit,
        "output": str(output),
    }
    # One thread, as a Ray replica with one CPU has.
    environment = {
        **os.environ,
        "PYTHONPATH": str(harness()),
        "HF_HOME": str(output.parent / "hf"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    script = Path(__file__).with_name("harness.py")
    logged.run([sys.executable, str(script), json.dumps(order)], output / "log", environment)
    return {name: of_harness(json.loads((output / f"{name}.json").read_text())) for name in models}
