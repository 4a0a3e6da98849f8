"""nemo-evaluator's run configuration of one benchmark: a file for people to read and to edit.

The url and the output directory are not in it: the job knows them and gives them on the command
line. Keys without a value are left out, because the evaluator lays the file over its own defaults.
"""

from __future__ import annotations

from typing import Any

import yaml

from slurmeval.taskplan import PlannedTask
from slurmeval.tasks import get

HEAD = """\
# nemo-evaluator's run configuration of {name}.
# The job adds the url and the output directory. What is left out under params has the default of
# {whose}
"""
#: More than any benchmark sends. The evaluator's own limit is 5, and a warning for each one above.
ALL = 1000000000


def run_config(task: PlannedTask, model_id: str) -> dict[str, Any]:
    """Return the run configuration as the evaluator reads it."""
    return {
        "config": {"type": task.type, "params": task.params},
        "target": {
            "api_endpoint": {
                "type": task.endpoint,
                "model_id": model_id,
                "adapter_config": {
                    "use_caching": task.reuse_answers,
                    "save_requests": True,
                    "save_responses": True,
                    "max_saved_requests": ALL,
                    "max_saved_responses": ALL,
                },
            }
        },
    }


def run_config_text(task: PlannedTask, model_id: str) -> str:
    """Return the run configuration as a commented file."""
    text = yaml.safe_dump(
        run_config(task, model_id), sort_keys=False, allow_unicode=True, width=100
    )
    reuse = str(task.reuse_answers).lower()
    why = "asked once" if task.reuse_answers else "asked as often as the benchmark wants"
    text = text.replace(f"use_caching: {reuse}\n", f"use_caching: {reuse}  # a question is {why}\n")
    text = text.replace(
        "save_requests: true\n",
        "save_requests: true  # so that the verdict finds those that never got an answer\n",
    )
    known = f"the benchmark: slurmeval tasks show {task.type}" if get(task.type) else "the harness."
    return HEAD.format(name=task.name, whose=known) + text
