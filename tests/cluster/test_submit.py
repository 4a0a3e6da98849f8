"""From here over SSH to Slurm and back, with a small job in place of an evaluation."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from slurmcluster import SlurmCluster, wait_for

from slurmeval import record as records
from slurmeval.cluster.access import Access
from slurmeval.cluster.scheduler import JobState
from slurmeval.cluster.slurm import Slurm
from slurmeval.cluster.ssh import SshHost
from slurmeval.errors import ClusterError, ConnectionFailed
from slurmeval.follow import LogLine, PhaseChange, StateChange, TaskChange
from slurmeval.pull import Outcome, pull_job, status_of
from slurmeval.submit import submit
from tests.shown import SUMMARY, Ui

pytestmark = pytest.mark.slurm

HEAD = """\
#!/bin/bash
#SBATCH --nodes=2
#SBATCH --mem=100
#SBATCH --output=slurm-%j.out
#SBATCH --open-mode=append
set -eu
status() { echo "{\\"phase\\": \\"$1\\", \\"detail\\": \\"$2\\", \\"tasks\\": {\\"arc\\": \\"$3\\"}}" > s; mv s status.json; }
mkdir -p logs eval_results
"""  # noqa: E501

GOOD = """\
status ray starting waiting
srun hostname | sort
. ./.secrets.env
rm .secrets.env
echo "${#HF_TOKEN} characters" > eval_results/token
status evaluate arc running
sleep 1
cp summary.in eval_results/summary.json
echo details > logs/serve.log
status done valid ok
"""


@pytest.fixture
def ui() -> Ui:
    return Ui()


@pytest.fixture
def profile(
    slurm_cluster: SlurmCluster,
    user_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Access:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("SLURMEVAL_KNOWN_HOSTS", str(slurm_cluster.known_hosts))
    monkeypatch.setenv("SLURMEVAL_SSH_CONFIG", "/dev/null")
    return profile_of(slurm_cluster, user_dir)


def profile_of(cluster: SlurmCluster, folder: Path) -> Access:
    return Access(
        executor="slurm",
        tunnel="ssh",
        host=cluster.host,
        port=cluster.port,
        user=cluster.user,
        identity=str(cluster.identity),
        remote_job_dir=f"~/{folder.name}/jobs here",
    )


Send = Callable[..., Outcome]


@pytest.fixture
def send(profile: Access, ui: Ui, tmp_path: Path) -> Send:
    def send(script: str, **keys: object) -> Outcome:
        job = tmp_path / f"job{time.monotonic_ns()}"
        job.mkdir()
        (job / "job.sbatch").write_text(script if script.startswith("#!") else HEAD + script)
        (job / "summary.in").write_text(json.dumps(SUMMARY))
        options: dict[str, object] = {
            "name": "test",
            "detach": False,
            "results": tmp_path / "results",
            "ui": ui,
            "environ": {"HF_TOKEN": "hf_secret'$x"},
            **keys,
        }
        return submit(job, options.pop("env", profile), **options)  # type: ignore[arg-type]

    return send


def test_scores_come_home_from_two_nodes(
    send: Send, ui: Ui, slurm_cluster: SlurmCluster, user_dir: Path
) -> None:
    outcome = send(GOOD)
    assert (outcome.exit_code, outcome.state) == (0, JobState.COMPLETED), ui.lines
    assert outcome.summary == SUMMARY
    assert outcome.results is not None
    assert (outcome.results / "logs" / "serve.log").read_text() == "details\n"
    assert (outcome.results / "eval_results" / "token").read_text() == "12 characters\n"
    log = (outcome.results / f"slurm-{outcome.job_id}.out").read_text().splitlines()
    assert len(log) == len(set(log)) == 2
    assert [event.text for event in ui.events if isinstance(event, LogLine)] == log
    assert TaskChange("arc", "ok") in ui.events
    assert PhaseChange("done", "valid") in ui.events
    states = [event.state for event in ui.events if isinstance(event, StateChange)]
    assert states[-1] is JobState.COMPLETED
    shown = slurm_cluster.user_exec("scontrol", "show", "job", outcome.job_id).stdout
    assert f"JobName={outcome.record}" in shown
    assert "hf_secret" not in shown
    assert (user_dir / "jobs here" / outcome.record / "job.sbatch").is_file()


def test_detached_then_status_then_pull(send: Send, ui: Ui) -> None:
    outcome = send(GOOD, detach=True)
    assert outcome.exit_code == 0
    assert "slurmeval pull" in ui.lines[-1]
    record = records.find("last")
    wait_for("the job to end", lambda: status_of(record).state.ended)
    pulled = pull_job(outcome.job_id, ui=ui)
    assert (pulled.exit_code, pulled.summary) == (0, SUMMARY)


def test_a_failing_job_is_red_and_brings_its_logs(send: Send) -> None:
    outcome = send('status failed "Ray died" failed\necho why > logs/ray.log\nexit 5\n')
    assert (outcome.exit_code, outcome.state) == (1, JobState.FAILED)
    assert outcome.reason == "the job is FAILED, exit code 5:0: Ray died"
    assert outcome.results is not None
    assert (outcome.results / "logs" / "ray.log").read_text() == "why\n"


def test_a_job_without_results_is_incomplete(send: Send) -> None:
    outcome = send("exit 0\n")
    assert (outcome.exit_code, outcome.state) == (4, JobState.COMPLETED)
    assert "summary.json is missing" in outcome.reason


def test_a_refused_job_leaves_nothing(send: Send, user_dir: Path) -> None:
    script = HEAD.replace("set -eu", "#SBATCH --partition=no-such\nset -eu") + GOOD
    with pytest.raises(ClusterError, match="invalid partition specified: no-such") as caught:
        send(script)
    assert "run.env.partition" in str(caught.value.hint)
    assert caught.value.exit_code == 3
    assert list((user_dir / "jobs here").iterdir()) == []
    assert records.records() == []


def test_a_job_directory_that_cannot_be_made(
    send: Send, profile: Access, slurm_cluster: SlurmCluster
) -> None:
    env = replace(profile, remote_job_dir=str(slurm_cluster.state / "jobs"))
    with pytest.raises(ClusterError, match=r"cannot create .*/jobs/test-.*Permission denied"):
        send(GOOD, env=env)
    assert records.records() == []


def test_cancelled_by_somebody(send: Send, slurm_cluster: SlurmCluster, ui: Ui) -> None:
    outcome = send("sleep 100\n", detach=True)
    slurm_cluster.wait_job(outcome.job_id, "RUNNING")
    host = SshHost(records.find("last").access)
    Slurm(host).cancel(outcome.job_id, "")
    host.close()
    record = records.find("last")
    wait_for("the job to end", lambda: status_of(record).state.ended)
    assert pull_job("last", ui=ui).state is JobState.CANCELLED
    assert pull_job("last", ui=ui).exit_code == 1


class Dropping(SshHost):
    """Cuts the connection just after sbatch was called, before its answer comes."""

    drops = 0
    calls = 0

    def run(self, command, **keys):  # type: ignore[no-untyped-def]
        done = super().run(command, **keys)
        if "sbatch --parsable" in command:
            self.calls += 1
            if self.calls <= self.drops:
                self.close()
                raise ConnectionFailed("the connection was lost")
        return done


def test_a_lost_answer_makes_no_second_job(
    send: Send, profile: Access, slurm_cluster: SlurmCluster, ui: Ui
) -> None:
    host = Dropping(profile)
    host.drops = 2
    outcome = send(GOOD, host=host)
    assert (outcome.exit_code, host.calls) == (0, 3)
    listing = slurm_cluster.user_exec(
        "squeue", "-h", "-t", "all", f"--name={outcome.record}", "-o", "%A"
    ).stdout
    assert listing.split() == [outcome.job_id]


def test_slurm_that_does_not_answer_is_unknown(
    send: Send, slurm_cluster: SlurmCluster, profile: Access
) -> None:
    outcome = send("sleep 100\n", detach=True)
    record = records.find("last")
    slurm_cluster.wait_job(outcome.job_id, "RUNNING")
    host = SshHost(profile)
    asked = Slurm(host)
    try:
        # What the commands say when nothing listens on the controller's port.
        host.run(
            "mkdir -p fake && cp /etc/slurm/slurm.conf fake && "
            "echo SlurmctldPort=9 >> fake/slurm.conf",
            timeout=30,
        )
        real = host.run
        host.run = lambda command, **keys: real(  # type: ignore[method-assign]
            f"export SLURM_CONF=$HOME/fake/slurm.conf\n{command}", **keys
        )
        snapshot = asked.poll(outcome.job_id, record.remote_dir, log_offset=0)
        assert snapshot.state is JobState.UNKNOWN
        assert not snapshot.gone
        assert "Slurm does not answer" in snapshot.source
        host.run = real  # type: ignore[method-assign]
        assert asked.poll(outcome.job_id, record.remote_dir, log_offset=0).state is JobState.RUNNING
        snapshot = asked.poll("99999", record.remote_dir, log_offset=0)
        assert (snapshot.state, snapshot.gone) == (JobState.UNKNOWN, True)
    finally:
        asked.cancel(outcome.job_id, record.remote_dir)
        host.close()


def test_states_from_accounting(
    slurm_cluster_dbd: SlurmCluster,
    send: Send,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = slurm_cluster_dbd.fresh_dir()
    monkeypatch.setenv("SLURMEVAL_KNOWN_HOSTS", str(slurm_cluster_dbd.known_hosts))
    env = profile_of(slurm_cluster_dbd, folder)
    outcome = send("exit 7\n", env=env)
    assert (outcome.exit_code, outcome.state) == (1, JobState.FAILED)
    record = records.find("last")
    wait_for("sacct to know", lambda: status_of(record).source == "sacct")
    snapshot = status_of(record)
    assert (snapshot.state, snapshot.exit_code) == (JobState.FAILED, "7:0")
    outcome = send("sleep 100\n", env=env, detach=True)
    slurm_cluster_dbd.wait_job(outcome.job_id, "RUNNING")
    slurm_cluster_dbd.user_exec("scancel", outcome.job_id)
    record = records.find("last")
    wait_for("sacct to know", lambda: status_of(record).source == "sacct")
    assert status_of(record).state is JobState.CANCELLED
