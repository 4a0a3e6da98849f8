"""Evaluates checkpoints inside a process of the original lm-evaluation-harness.

Imports nothing of slurmeval: the packages of that process are not this environment's alone.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager


def main() -> None:
    """Do what the order says, and log each checkpoint's samples as JSON."""
    order = json.loads(sys.argv[1])
    manager = TaskManager(include_path=order["tasks"])
    for name, model in order["models"].items():
        results = simple_evaluate(
            model="hf",
            model_args={"pretrained": model},
            tasks=[order["group"]],
            task_manager=manager,
            limit=order["limit"],
            batch_size=1,
            device="cpu",
            bootstrap_iters=0,
        )
        Path(order["output"], f"{name}.json").write_text(
            json.dumps(results["samples"], default=str)
        )


if __name__ == "__main__":
    main()
