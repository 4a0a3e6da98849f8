"""What all tests share."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

#: Tests of these folders take turns: they share a Slurm cluster, or the machine's Ray. The longest
#: group is the first.
GROUPS = ("tests/cluster/", "tests/serving/")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Let one of pytest-xdist's workers run all tests of a group, and spread the others."""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return next((group for group in GROUPS if nodeid.startswith(group)), nodeid)

    config.option.loadscopereorder = False  # groups start in the order of collection
    return Groups(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the groups first."""
    items.sort(key=lambda item: not item.nodeid.startswith(GROUPS))


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
