"""The test cluster is what the other tests take it for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from slurmcluster import SlurmCluster, free_ports, wait_for

pytestmark = pytest.mark.slurm


def test_a_step_runs_on_two_nodes_as_the_user(slurm_cluster: SlurmCluster) -> None:
    out = slurm_cluster.user_exec("srun", "-N2", "bash", "-c", "hostname; id -un").stdout
    words = out.split()
    assert words.count(slurm_cluster.user) == 2
    assert len(set(words) - {slurm_cluster.user}) == 2


def test_granted_gpus_show_in_the_environment(slurm_cluster: SlurmCluster) -> None:
    out = slurm_cluster.user_exec(
        "srun", "--gpus-per-node=h100:3", "bash", "-c", "echo $CUDA_VISIBLE_DEVICES"
    ).stdout
    assert out == "0,1,2\n"
    refused = slurm_cluster.user_exec("srun", "--gpus-per-node=9", "true", check=False)
    assert refused.returncode != 0


@pytest.mark.parametrize("directory", ["/tmp", "/dev/shm"])
def test_temporary_files_are_local_to_a_node(slurm_cluster: SlurmCluster, directory: str) -> None:
    slurm_cluster.user_exec("srun", "-wnode1", "touch", f"{directory}/mark")
    assert "mark" in slurm_cluster.exec("node1", "ls", directory).stdout
    assert "mark" not in slurm_cluster.exec("node2", "ls", directory).stdout
    assert not Path(directory, "mark").exists()
    slurm_cluster.exec("node1", "rm", f"{directory}/mark")


def test_the_home_is_shared_and_seen_from_here(slurm_cluster: SlurmCluster, user_dir: Path) -> None:
    slurm_cluster.user_exec(
        "srun", "-N2", "bash", "-c", 'echo "from $(hostname)" >"$0/$(hostname)"', user_dir
    )
    texts = {path.read_text() for path in user_dir.iterdir()}
    assert len(texts) == 2
    assert all(text.startswith("from node") for text in texts)


def test_the_user_can_run_the_python_of_the_tests(slurm_cluster: SlurmCluster) -> None:
    out = slurm_cluster.user_exec(
        "srun", sys.executable, "-c", "import pytest, slurmeval; print(slurmeval.__name__)"
    ).stdout
    assert out == "slurmeval\n"


def test_a_crashed_node_fails_its_job_and_comes_back(
    slurm_cluster: SlurmCluster, user_dir: Path
) -> None:
    job = slurm_cluster.sbatch(
        "#!/bin/bash\nsrun sleep 600\n", user_dir, "-N2", "--nodelist=node1,node2", "--no-requeue"
    )
    slurm_cluster.wait_job(job, "RUNNING")
    slurm_cluster.crash("node2")
    try:
        assert slurm_cluster.wait_job(job) == "NODE_FAIL"
    finally:
        slurm_cluster.boot("node2")
    slurm_cluster.wait_idle()
    out = slurm_cluster.user_exec("srun", "--nodelist=node2", "hostname").stdout
    assert out == "node2\n"


def test_a_requeued_job_starts_again(slurm_cluster: SlurmCluster, user_dir: Path) -> None:
    job = slurm_cluster.sbatch(
        '#!/bin/bash\necho "start ${SLURM_RESTART_COUNT:-0}" >>starts\nsleep "$((600 * '
        '(SLURM_RESTART_COUNT == 0)))"\n',
        user_dir,
        "--requeue",
    )
    starts = user_dir / "starts"
    slurm_cluster.wait_job(job, "RUNNING")
    slurm_cluster.exec("login", "scontrol", "requeue", job)
    assert slurm_cluster.wait_job(job) == "COMPLETED"
    assert starts.read_text() == "start 0\nstart 1\n"


def test_ssh_login_needs_the_key(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    command = slurm_cluster.ssh("hostname; sinfo -h -o %P")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["login", "batch*", "short"]
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    other = [f"-i{key}" if word.startswith("-i") else word for word in command]
    refused = subprocess.run(
        [*other[:1], "-oIdentitiesOnly=yes", *other[1:]], capture_output=True, text=True, timeout=60
    )
    assert refused.returncode == 255
    assert "Permission denied (publickey)" in refused.stderr


def test_a_jump_host_leads_to_the_login_machine(slurm_cluster: SlurmCluster) -> None:
    jump = [
        f"-p{slurm_cluster.jump_port}" if word.startswith("-p") else word
        for word in slurm_cluster.ssh()
    ]
    proxy = " ".join([*jump[:-1], "-W", "login:22", jump[-1]])
    command = [word for word in slurm_cluster.ssh("hostname") if not word.startswith("-p")]
    command[command.index(f"{slurm_cluster.user}@{slurm_cluster.host}")] = (
        f"{slurm_cluster.user}@login"
    )
    done = subprocess.run(
        [command[0], f"-oProxyCommand={proxy}", *command[1:]],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "login\n", done.stderr


def test_accounting_answers_only_where_it_is_on(
    slurm_cluster: SlurmCluster, slurm_cluster_dbd: SlurmCluster, user_dir_dbd: Path
) -> None:
    assert slurm_cluster.user_exec("sacct", check=False).returncode == 1
    job = slurm_cluster_dbd.sbatch("#!/bin/bash\nexit 3\n", user_dir_dbd)
    assert slurm_cluster_dbd.wait_job(job) == "FAILED"

    def recorded() -> str:
        return slurm_cluster_dbd.user_exec(
            "sacct", "-n", "-X", "-P", "-j", job, "-o", "State,ExitCode"
        ).stdout

    wait_for("the job's end in the accounting", lambda: recorded() == "FAILED|3:0\n")


def test_a_login_machine_that_lost_power_comes_back(slurm_cluster_dbd: SlurmCluster) -> None:
    cluster = slurm_cluster_dbd
    cluster.crash("login")
    try:
        refused = subprocess.run(cluster.ssh("true"), capture_output=True, timeout=60)
        assert refused.returncode == 255
    finally:
        cluster.boot("login")
    cluster.wait_idle()
    assert cluster.user_exec("srun", "-N2", "true").returncode == 0


@pytest.mark.usefixtures("slurm_cluster")
def test_down_leaves_only_logs(tmp_path: Path) -> None:
    state = tmp_path / "state"
    port, jump_port = free_ports(2)
    cluster = SlurmCluster(state, 1, "none", port, jump_port)

    def processes() -> list[str]:
        lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline")]
        return [line.decode() for line in lines if str(state).encode() in line]

    mounts = Path("/proc/self/mounts").read_text()
    cluster.script(
        "up",
        SLURM_CLUSTER_NODES="1",
        SLURM_CLUSTER_SSH_PORT=str(port),
        SLURM_CLUSTER_JUMP_PORT=str(jump_port),
    )
    assert processes()
    assert cluster.user_exec("srun", "hostname").stdout == "node1\n"
    assert cluster.script("up").stdout == cluster.script("status").stdout
    cluster.script("down")
    assert not processes()
    assert Path("/proc/self/mounts").read_text() == mounts
    assert [path.name for path in state.iterdir()] == ["log"]
    assert cluster.script("status", check=False).returncode == 3
    cluster.script("down")
