"""The doctor on a real Slurm."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
from slurmcluster import SlurmCluster
from test_submit import profile_of

from slurmeval.cluster.ssh import SshHost
from slurmeval.config.schema import Config
from slurmeval.doctor import Finding, checks, examine

pytestmark = pytest.mark.slurm


def examined(cluster: SlurmCluster, **env: object) -> dict[str, Finding]:
    access = profile_of(cluster, cluster.fresh_dir())
    config = Config.model_validate({"run": {"env": {**asdict(access), **env}}})
    host = SshHost(access, known_hosts=cluster.known_hosts, config=Path("/dev/null"))
    try:
        findings = examine(config, host, {"HF_TOKEN": "x"}, wanted=set(checks()))
    finally:
        host.close()
    return {finding.check: finding for finding in findings}


def test_a_cluster_that_is_well(slurm_cluster: SlurmCluster) -> None:
    found = examined(slurm_cluster, partition="batch", nodes=4, container_image="/bin/x.sqsh")
    assert found["connection"].words.endswith(f"{slurm_cluster.user} on login")
    assert found["slurm"].words.startswith("slurm-wlm ")
    assert found["partition"].words.startswith("batch: 4 nodes, ")
    assert found["container"].words == "srun knows --container-image"
    assert found["disk"].state == found["python"].state == "ok"
    assert found["image"].state == "failed"


def test_what_is_wrong(slurm_cluster: SlurmCluster) -> None:
    found = examined(slurm_cluster, partition="bach", account="nobody", mounts=["/no:/x"])
    assert found["partition"].remedy == "Did you mean batch?"
    assert (found["account"].state, found["mounts"].state) == ("unknown", "unknown")


def test_accounts_of_accounting(slurm_cluster_dbd: SlurmCluster) -> None:
    add = ("sacctmgr", "-i", "add")
    slurm_cluster_dbd.exec("login", *add, "account", "lab", check=False)
    user = slurm_cluster_dbd.user
    slurm_cluster_dbd.exec("login", *add, "user", user, "account=lab", check=False)
    assert examined(slurm_cluster_dbd, account="lab", qos="normal")["account"].state == "ok"
    wrong = examined(slurm_cluster_dbd, account="lap")["account"]
    assert (wrong.state, "lab" in wrong.words) == ("failed", True)
    wrong = examined(slurm_cluster_dbd, account="lab", qos="urgent")["account"]
    assert (wrong.state, "urgent is not yours" in wrong.words) == ("failed", True)
