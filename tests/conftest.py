"""What all tests share."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def demo_dir() -> Iterator[Path]:
    """The demo's model and benchmarks, made once, where an unprivileged job can read them."""
    from slurmeval import demo

    # Not below /tmp: the machines of the test cluster have one of their own.
    base = Path(tempfile.mkdtemp(prefix="demo-", dir="/var/tmp"))
    base.chmod(0o755)
    try:
        made = demo.make(base / "demo", progress=lambda _: None)
        for path in [made, *made.rglob("*")]:
            path.chmod(path.stat().st_mode | (0o755 if path.is_dir() else 0o444))
        yield made
    finally:
        shutil.rmtree(base)


@pytest.fixture
def client_env(demo_dir: Path, tmp_path: Path) -> dict[str, str]:
    """The environment of a user who has the demo and nothing of ours yet."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "NEMOTRON"))}
    return {
        **environment,
        "HOME": str(tmp_path),
        "XDG_STATE_HOME": str(tmp_path / "state"),
        "SLURMEVAL_DEMO": str(demo_dir),
        "HF_HOME": str(tmp_path / "hf"),
    }
