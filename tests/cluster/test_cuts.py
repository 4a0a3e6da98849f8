"""A connection that is cut at each step of a submission: never two jobs, and none is lost.

The outcome of each cut is a row of the table in docs/jobs.md, which is compared with what is seen.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from slurmcluster import REPO, SlurmCluster
from test_submit import GOOD, HEAD, SUMMARY, profile_of

from slurmeval import record as records
from slurmeval.cluster.access import Access
from slurmeval.cluster.ssh import SshHost
from slurmeval.errors import ConnectionFailed, ResultsIncomplete
from slurmeval.follow import Pace
from slurmeval.jobs import look, resubmit
from slurmeval.pull import Outcome, pull_job
from slurmeval.submit import submit
from tests.shown import Ui

pytestmark = pytest.mark.slurm

STEPS = ("upload", "sbatch", "first look", "results")
HOW = ("before it", "after it", "sshd killed in it", "for good before it", "for good after it",
       "client dies before it", "client dies after it")  # fmt: skip


class Dead(BaseException):
    """The client's machine loses its power."""


class Cut(SshHost):
    """Cuts the connection at one step of a submission."""

    def __init__(self, env: Access, cluster: SlurmCluster, step: str, how: str) -> None:
        super().__init__(env)
        self.cluster, self.step, self.how = cluster, step, how
        self.done: list[str] = []
        self.armed, self.away = True, False

    def _name(self, script: str) -> str:
        if "sbatch --parsable" in script:
            return "sbatch"
        if "answer squeue" in script:
            return "first look"
        if "sbatch" not in self.done:
            return "upload"
        return "results"

    def exchange(self, script, *rest, **keys):  # type: ignore[no-untyped-def]
        if self.away:
            raise ConnectionFailed("the connection was lost")
        name = self._name(script)
        hit = self.armed and name == self.step
        if hit:
            self.armed = False
            if "before" in self.how:
                self._cut()
        if hit and "killed" in self.how:
            real = self._open

            def opened(command: str) -> object:
                pipe = real(command)
                del self._open
                user = f"sshd: {self.cluster.user}"
                self.cluster.exec("login", "pkill", "-KILL", "-f", user, check=False)
                # What may have come before that is lost too, so that each run sees the same.
                pipe.read = lambda: b""  # type: ignore[method-assign]
                return pipe

            self._open = opened  # type: ignore[assignment, method-assign]
        answer = super().exchange(script, *rest, **keys)
        self.done.append(name)
        if hit and "after" in self.how:
            self._cut()
        return answer

    def _cut(self) -> None:
        self.close()
        self.away = "for good" in self.how
        if "dies" in self.how:
            raise Dead
        raise ConnectionFailed("the connection was lost")


@pytest.fixture
def profile(
    slurm_cluster: SlurmCluster, user_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Access]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("SLURMEVAL_KNOWN_HOSTS", str(slurm_cluster.known_hosts))
    monkeypatch.setenv("SLURMEVAL_SSH_CONFIG", "/dev/null")
    yield profile_of(slurm_cluster, user_dir)
    slurm_cluster.exec("login", "scancel", "--user", slurm_cluster.user)


def jobs_named(cluster: SlurmCluster, name: str) -> list[str]:
    asked = ("squeue", "-h", "-t", "all", f"--name={name}", "-o", "%A")
    return cluster.user_exec(*asked).stdout.split()


def documented() -> dict[tuple[str, str], tuple[str, str, str]]:
    """Return (step, how) -> (what the user saw, jobs in Slurm, what finished it)."""
    rows = {}
    for line in (REPO / "docs" / "jobs.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 5 and cells[0] in STEPS:
            rows[(cells[0], cells[1])] = (cells[2], cells[3], cells[4])
    return rows


def finish(saw: str, name: str, ui: Ui, again: Callable[[], Outcome]) -> tuple[str, Outcome]:
    """Do what the message says, or where the client died, what the record suggests."""
    if "slurmeval pull" in saw:
        return "`pull`", pull_job(name, ui=ui)
    (standing,) = look([records.find(name)])
    if standing.record.job_id is not None:
        return "`status`, `pull`", _pulled_at_the_end(name, ui)
    if standing.record.sent:
        resubmit(standing.record, ui=ui)
        return "`resubmit`, `pull`", _pulled_at_the_end(name, ui)
    return "`submit` again", again()


def _pulled_at_the_end(name: str, ui: Ui) -> Outcome:
    while look([records.find(name)])[0].live:
        pass
    return pull_job(name, ui=ui)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("step", STEPS)
def test_a_cut(
    step: str, how: str, profile: Access, slurm_cluster: SlurmCluster, tmp_path: Path
) -> None:
    job, ui = tmp_path / "job", Ui()
    job.mkdir()
    script = HEAD.replace("--nodes=2", "--nodes=1") + GOOD.replace("sleep 1\n", "")
    (job / "job.sbatch").write_text(script)
    (job / "summary.in").write_text(json.dumps(SUMMARY))

    def send(host: SshHost | None) -> Outcome:
        return submit(
            job,
            profile,
            name="cut",
            detach=False,
            results=tmp_path / "results",
            ui=ui,
            environ={"HF_TOKEN": "hf_secret"},
            host=host,
            pace=Pace(first=0.1, longest=0.5, patience=2.0),
            sleep=lambda seconds: time.sleep(min(seconds, 0.1)),
        )

    host = Cut(profile, slurm_cluster, step, how)
    outcome, saw = None, ""
    try:
        outcome = send(host)
        retried = any("trying again" in f"{line}" for line in [*ui.lines, *ui.events])
        saw = "a note, then the scores" if retried else "the scores"
    except (ConnectionFailed, ResultsIncomplete) as error:
        saw = error.format_message()
        if step == "results":
            assert f"slurmeval pull {records.find('last').name}" in saw
            saw = "an error that names `slurmeval pull NAME`"
    except Dead:
        saw = "nothing"
    assert not host.armed
    name = records.find("last").name
    jobs = jobs_named(slurm_cluster, name)
    assert len(jobs) <= 1
    finished = "-"
    if outcome is None:
        finished, outcome = finish(saw, name, ui, lambda: send(None))
        assert len(jobs_named(slurm_cluster, outcome.record)) == 1
        assert len(jobs_named(slurm_cluster, name)) == (outcome.record == name)
    else:
        assert len(jobs) == 1
    assert (outcome.exit_code, outcome.summary) == (0, SUMMARY), ui.lines
    words = re.sub(name, "NAME", saw.replace("\n  ", ". ")).replace(slurm_cluster.user, "me")
    words = re.sub(r"me@127\.0\.0\.1", "me@cluster", words)
    words = re.sub(r"the job \d+", "the job 12", words)
    found = (words, str(len(jobs)), finished)
    assert found == documented().get((step, how)), f"| {step} | {how} | {' | '.join(found)} |"
