"""Jobs on a real Slurm after their submission, and the ways to reach it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from slurmcluster import SlurmCluster, wait_for
from test_submit import GOOD, HEAD, SUMMARY, profile_of

from slurmeval import record as records
from slurmeval.cli import cli
from slurmeval.cluster.access import Access
from slurmeval.cluster.openssh import OpenSshHost
from slurmeval.cluster.scheduler import JobState, Watched
from slurmeval.cluster.slurm import Slurm
from slurmeval.cluster.ssh import SshHost
from slurmeval.errors import ClusterError, ConnectionFailed
from slurmeval.joblogs import stream
from slurmeval.jobs import cancel, forget, look, resubmit
from slurmeval.pull import pull_job
from slurmeval.record import Record
from slurmeval.submit import submit
from slurmeval.submit import test_only as ask_first
from tests.shown import Ui

pytestmark = pytest.mark.slurm

SMALL = "#!/bin/bash\n#SBATCH --mem=50\n"
Start = Callable[..., Record]


@pytest.fixture
def ui() -> Ui:
    return Ui()


@pytest.fixture
def profile(
    slurm_cluster: SlurmCluster, user_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Access:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("SLURMEVAL_KNOWN_HOSTS", str(slurm_cluster.known_hosts))
    monkeypatch.setenv("SLURMEVAL_SSH_CONFIG", "/dev/null")
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    return profile_of(slurm_cluster, user_dir)


@pytest.fixture
def start(profile: Access, tmp_path: Path, ui: Ui) -> Start:
    number = iter(range(99))

    def start(script: str, **keys: object) -> Record:
        job = tmp_path / f"job{next(number)}"
        job.mkdir()
        (job / "job.sbatch").write_text(script)
        (job / "summary.in").write_text(json.dumps(SUMMARY))
        env = keys.pop("env", profile)
        outcome = submit(
            job, env, name="jobs", detach=True, results=tmp_path / "results", ui=ui,
            environ={"HF_TOKEN": "hf_secret"}, **keys,  # type: ignore[arg-type]
        )  # fmt: skip
        return records.find(outcome.record)

    return start


def ended(*wanted: Record) -> list[Record]:
    wait_for("the jobs to end", lambda: not any(s.live for s in look(wanted)))
    return [records.find(record.name) for record in wanted]


@pytest.fixture(params=["controller", "accounting"])
def other(
    request: pytest.FixtureRequest, profile: Access, monkeypatch: pytest.MonkeyPatch
) -> Access:
    """A profile where the controller is asked, and one with slurmdbd that names its cluster."""
    if request.param == "controller":
        return profile
    cluster: SlurmCluster = request.getfixturevalue("slurm_cluster_dbd")
    monkeypatch.setenv("SLURMEVAL_KNOWN_HOSTS", str(cluster.known_hosts))
    return replace(profile_of(cluster, cluster.fresh_dir()), clusters="test")


def test_arrays_heterogeneous_jobs_and_ends_in_one_question(start: Start, other: Access) -> None:
    scripts = {
        "array": f"{SMALL}#SBATCH --array=0-2\n"
        "echo element $SLURM_ARRAY_TASK_ID\n[ $SLURM_ARRAY_TASK_ID != 1 ]\n",
        "het": f"{SMALL}#SBATCH hetjob\n#SBATCH --mem=60\nexit 0\n",
        "failed": f"{SMALL}exit 7\n",
        "cancelled": f"{SMALL}sleep 100\n",
        "waiting": f"{SMALL}#SBATCH --begin=now+1hour\nexit 0\n",
        "again": f"{SMALL}#SBATCH --requeue\n"
        'echo "{\\"phase\\": \\"ray\\", \\"attempt\\": ${SLURM_RESTART_COUNT:-0}}" > status.json\n'
        '[ "${SLURM_RESTART_COUNT:-0}" = 1 ] || sleep 100\n',
    }
    jobs = {name: start(script, env=other) for name, script in scripts.items()}
    host = SshHost(other)
    try:
        slurm = Slurm(host, other.clusters)
        assert all(record.job_id for record in jobs.values())
        slurm.cancel(jobs["cancelled"].job_id or "", "")
        watched = [Watched(record.job_id or "", record.remote_dir) for record in jobs.values()]

        def finished() -> bool:
            seen = dict(zip(jobs, slurm.poll_many(watched), strict=True))
            return all(seen[name].state.ended for name in jobs if name != "waiting")

        again = jobs["again"].job_id
        wait_for("its first start", lambda: Path(jobs["again"].remote_dir, "status.json").exists())
        assert host.run(f"scontrol requeue {again}", timeout=30).returncode == 0
        # Slurm lets a requeued job wait for two minutes unless it is told to begin; a node refuses
        # a job within the second in which it was killed there.
        wait_for("the requeued job", lambda: _requeued(host, again or ""))
        begin = f"scontrol update jobid={again} StartTime=now+2"
        assert host.run(begin, timeout=30).returncode == 0
        wait_for("all ends", finished)
        seen = dict(zip(jobs, slurm.poll_many(watched), strict=True))
        states = {name: snapshot.state for name, snapshot in seen.items()}
        assert states == {
            "array": JobState.FAILED,
            "het": JobState.COMPLETED,
            "failed": JobState.FAILED,
            "cancelled": JobState.CANCELLED,
            "waiting": JobState.PENDING,
            "again": JobState.COMPLETED,
        }
        assert (seen["failed"].exit_code, seen["array"].exit_code) == ("7:0", "1:0")
        assert (seen["waiting"].reason, seen["again"].requeues) == ("BeginTime", 1)
        slurm.cancel(jobs["waiting"].job_id or "", "")
        logs = {chunk.name: chunk.text for chunk in stream(jobs["array"])}
        assert logs == {f"job_{number}": f"element {number}\n" for number in range(3)}
    finally:
        host.close()


def _requeued(host: SshHost, job_id: str) -> bool:
    shown = host.run(f"scontrol show job {job_id}", timeout=30).stdout
    return "Restarts=1" in shown and "JobState=PENDING Reason=BeginTime" in shown


@pytest.mark.parametrize("inside", [True, False])
def test_a_log_of_another_name_is_followed_and_comes_home(
    start: Start, user_dir: Path, ui: Ui, inside: bool
) -> None:
    where = "my-%x.txt" if inside else f"{user_dir}/elsewhere-%j.txt"
    head = HEAD.replace("slurm-%j.out", where).replace("--nodes=2", "--nodes=1")
    record = start(head + GOOD)
    assert record.log is not None
    assert record.log == (
        f"{record.remote_dir}/my-{record.name}.txt"
        if inside
        else f"{user_dir}/elsewhere-{record.job_id}.txt"
    )
    found = "".join(chunk.text for chunk in stream(record, follow=True, pause=0.2))
    assert found.startswith("node")
    assert pull_job(record.name, ui=ui).exit_code == 0
    home = Path(record.results) / ("" if inside else "log") / Path(record.log).name
    assert home.read_text() == found


def test_asking_first_queues_nothing(
    profile: Access, tmp_path: Path, slurm_cluster: SlurmCluster, user_dir: Path
) -> None:
    job = tmp_path / "job"
    job.mkdir()
    (job / "job.sbatch").write_text(f"{SMALL}hostname\n")
    assert ask_first(job, profile, name="first").startswith("would start at 20")
    (job / "job.sbatch").write_text(f"{SMALL}#SBATCH --nodes=9\nhostname\n")
    with pytest.raises(ClusterError, match="Requested node configuration is not available"):
        ask_first(job, profile, name="first")
    assert not (user_dir / "jobs here").exists()
    listing = slurm_cluster.user_exec("squeue", "-h", "-t", "all", "-o", "%j").stdout
    assert "first" not in listing


def test_a_job_that_cannot_start_now_is_told(start: Start, ui: Ui) -> None:
    record = start(f"{SMALL}#SBATCH --nodes=9\nhostname\n")
    assert any("cannot start as things are" in line for line in ui.lines)
    secrets = Path(record.remote_dir, ".secrets.env")
    assert secrets.exists()
    cancel(record, ui=ui)
    assert not secrets.exists()
    assert ended(record)[0].state == "CANCELLED"


def test_again_and_then_forgotten(start: Start, ui: Ui) -> None:
    head = HEAD.replace("--nodes=2", "--nodes=1")
    (first,) = ended(start(head + GOOD))
    again = resubmit(first, ui=ui, environ={"HF_TOKEN": "hf_secret"})
    (again,) = ended(again)
    assert (again.state, again.resubmit_of) == ("COMPLETED", first.name)
    assert pull_job(again.name, ui=ui).exit_code == 0
    # sshd's home is the home that is seen here.
    assert Path(again.remote_dir, "eval_results", "token").read_text() == "9 characters\n"
    forget(again, remote=True, ui=ui)
    assert not Path(again.remote_dir).exists()
    assert records.records() == [records.find(first.name)]


def test_no_secret_is_told_or_kept(
    profile: Access, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slurm_cluster: SlurmCluster
) -> None:
    monkeypatch.chdir(tmp_path)
    secret = "hf_4711secret"
    monkeypatch.setenv("HF_TOKEN", secret)
    lines = [
        f'{key} = "{value}"' if isinstance(value, str) else f"{key} = {value}"
        for key, value in asdict(profile).items()
        if key in {"tunnel", "host", "port", "user", "identity", "remote_job_dir"}
    ]
    Path("env.toml").write_text("[here]\n" + "\n".join(lines) + "\n")
    Path("job").mkdir()
    head = HEAD.replace("--nodes=2", "--nodes=1")
    Path("job", "job.sbatch").write_text(head + GOOD)
    Path("job", "summary.in").write_text(json.dumps(SUMMARY))
    run = CliRunner().invoke
    result = run(cli, ["-vv", "submit", "job", "--profile", "here", "--json"])
    assert result.exit_code == 0, result.output
    assert "sbatch" in result.output or "cd -- " in result.stderr
    outcome = json.loads(result.stdout.splitlines()[-1])
    assert (outcome["event"], outcome["state"]) == ("outcome", "COMPLETED")
    kinds = [json.loads(line)["event"] for line in result.stdout.splitlines()]
    assert {"message", "state", "phase", "task", "log", "ended"} <= set(kinds)
    record = records.find("last")
    assert Path(record.remote_dir, "eval_results", "token").read_text() == "13 characters\n"
    kept = [path.read_text() for path in records.directory().glob("*.json")]
    shown = slurm_cluster.user_exec("scontrol", "show", "job", record.job_id or "").stdout
    for text in (result.output, result.stderr, *kept, shown):
        assert secret not in text


@pytest.fixture
def master(slurm_cluster: SlurmCluster, tmp_path: Path) -> Iterator[Path]:
    """A connection that was opened by hand, as its socket."""
    socket = tmp_path / "cm.sock"
    words = slurm_cluster.ssh()
    subprocess.run([*words[:1], "-M", f"-S{socket}", "-f", "-N", *words[1:]], check=True)
    try:
        yield socket
    finally:
        close = ["ssh", "-F/dev/null", f"-S{socket}", "-O", "exit", "x"]
        subprocess.run(close, check=False, capture_output=True)


def test_a_connection_opened_by_hand_is_enough(
    start: Start, profile: Access, master: Path, ui: Ui
) -> None:
    env = replace(profile, ssh="openssh", control_path=str(master), identity=None)
    head = HEAD.replace("--nodes=2", "--nodes=1")
    (record,) = ended(start(head + GOOD, env=env))
    assert pull_job(record.name, ui=ui).summary == SUMMARY
    subprocess.run(["ssh", "-F/dev/null", f"-S{master}", "-O", "exit", "x"], check=True)
    with pytest.raises(ConnectionFailed, match="no connection is open at") as caught:
        OpenSshHost(env).run("true", timeout=30)
    assert "ssh -M -f -N" in str(caught.value.hint)


def test_a_certificate_logs_in(
    profile: Access, slurm_cluster: SlurmCluster, tmp_path: Path
) -> None:
    authority, key = tmp_path / "authority", tmp_path / "key"
    for path in (authority, key):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)
    allowed = slurm_cluster.home / ".ssh" / "authorized_keys"
    before = allowed.read_text()
    public = authority.with_suffix(".pub").read_text()
    env = replace(profile, identity=str(key))
    try:
        allowed.write_text(f"{before}cert-authority {public}")
        with pytest.raises(ConnectionFailed, match="permission denied"):
            SshHost(env).run("true", timeout=30)
        sign = ["ssh-keygen", "-q", "-s", authority, "-I", "me", "-n", slurm_cluster.user]
        subprocess.run([*sign, key.with_suffix(".pub")], check=True)
        host = SshHost(env)
        assert host.run("echo in", timeout=30).stdout == "in\n"
        host.close()
    finally:
        allowed.write_text(before)
