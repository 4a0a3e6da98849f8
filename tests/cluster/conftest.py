"""A real Slurm cluster with sshd for the tests, made by scripts/slurm-cluster."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurmcluster import REPO, SlurmCluster, free_ports


def _unavailable() -> str | None:
    if sys.platform != "linux":
        return "the Slurm test cluster needs Linux"
    if os.geteuid() != 0:
        return "the Slurm test cluster needs root"
    if shutil.which("apt-get") is None:
        return "the Slurm test cluster needs Debian's packages (no apt-get here)"
    return None


def _started(nodes: int, accounting: str) -> Iterator[SlurmCluster]:
    reason = _unavailable()
    if reason is not None:
        # In CI a skipped test looks like a passed one.
        if os.environ.get("CI", "").lower() in {"1", "true"}:
            pytest.fail(reason)
        pytest.skip(reason)
    # Not below the temporary directory: the machines have a /tmp of their own, and a short path
    # keeps sockets below the home within their 107 bytes.
    state = Path(tempfile.mkdtemp(prefix="sc-", dir="/var/tmp"))
    port, jump_port = free_ports(2)
    cluster = SlurmCluster(state, nodes, accounting, port, jump_port)
    readable = [str(REPO), sys.prefix, sys.base_prefix]
    try:
        cluster.script(
            "up",
            timeout=600,
            SLURM_CLUSTER_NODES=str(nodes),
            SLURM_CLUSTER_ACCOUNTING=accounting,
            SLURM_CLUSTER_SSH_PORT=str(port),
            SLURM_CLUSTER_JUMP_PORT=str(jump_port),
            SLURM_CLUSTER_READABLE=":".join(readable),
            SLURM_CLUSTER_PYXIS="1",
        )
        yield cluster
    finally:
        cluster.script("down")
        shutil.rmtree(state)


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[SlurmCluster]:
    """A cluster of four nodes without accounting."""
    yield from _started(4, "none")


@pytest.fixture(scope="module")
def large_slurm_cluster() -> Iterator[SlurmCluster]:
    """A cluster of eight nodes without accounting."""
    yield from _started(8, "none")


@pytest.fixture(scope="session")
def slurm_cluster_dbd() -> Iterator[SlurmCluster]:
    """A cluster of two nodes with slurmdbd."""
    yield from _started(2, "slurmdbd")


@pytest.fixture
def user_dir(slurm_cluster: SlurmCluster) -> Path:
    """A fresh directory in the shared home that belongs to the user."""
    return slurm_cluster.fresh_dir()


@pytest.fixture
def user_dir_dbd(slurm_cluster_dbd: SlurmCluster) -> Path:
    """The same on the cluster with slurmdbd."""
    return slurm_cluster_dbd.fresh_dir()
