"""Each benchmark in bench/ is a program that says how it is run, without what it measures."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = sorted((ROOT / "bench").glob("*/run.py"))


def test_there_are_benchmarks() -> None:
    assert {"bringup", "concurrency", "fidelity", "pull"} <= {path.parent.name for path in PROGRAMS}


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.parent.name)
def test_it_says_how_it_is_run(program: Path) -> None:
    done = subprocess.run(
        [sys.executable, program, "--help"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")
