"""The whole chain on this machine: the model that knows scores what it knows, its twin guesses.

Benchmarks run one by one, and both at once.
"""

from __future__ import annotations

import json
import subprocess
import sys
from math import sqrt
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.serving


def evaluate(tmp_path: Path, env: dict[str, str], *overrides: str) -> tuple[str, dict[str, Any]]:
    """Run the demo as a user does and return what was printed, and the summary."""
    command = [sys.executable, "-m", "slurmeval", "submit", "--profile", "local", "-c", "demo"]
    ended = subprocess.run(
        [*command, *overrides], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (summary,) = tmp_path.glob("eval_results/*/eval_results/summary.json")
    return ended.stdout, json.loads(summary.read_text())


def primary(summary: dict[str, Any]) -> dict[str, float]:
    return {t["name"]: t["metrics"][t["primary"]]["value"] for t in summary["tasks"]}


def left_on_this_machine(job_dir: Path) -> list[str]:
    """Return processes that still have the job's directory in their command line."""
    listing = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    return [line for line in listing.stdout.splitlines() if str(job_dir) in line]


def test_the_known_answer(tmp_path: Path, demo_dir: Path, client_env: dict[str, str]) -> None:
    printed, summary = evaluate(tmp_path, client_env)
    expected = json.loads((demo_dir / "expected.json").read_text())
    assert summary["state"] == "ok"
    for task in summary["tasks"]:
        wanted = expected[task["name"]]
        assert task["samples"] == wanted["samples"]
        assert task["metrics"][task["primary"]]["value"] == wanted[task["primary"]]
    assert "0.7500" in printed and "0.6250" in printed and "results:" in printed
    (job_dir,) = (tmp_path / "slurmeval-jobs").iterdir()
    assert left_on_this_machine(job_dir) == []
    assert not (job_dir / "run").exists()


def test_the_untrained_twin_guesses(
    tmp_path: Path, demo_dir: Path, client_env: dict[str, str]
) -> None:
    untrained = f"model.checkpoint_path={demo_dir / 'untrained'}"
    _, summary = evaluate(tmp_path, client_env, untrained, "eval.concurrency=2")
    scores = primary(summary)
    samples = summary["tasks"][0]["samples"]
    spread = 4 * sqrt(0.25 * 0.75 / samples)
    assert abs(scores["slurmeval_demo_choice"] - 0.25) < spread
    assert scores["slurmeval_demo_generate"] == 0
