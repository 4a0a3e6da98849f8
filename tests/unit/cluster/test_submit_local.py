"""The whole way on this machine: send, start, follow, bring home, judge, remember."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from slurmeval import record as records
from slurmeval.cli import cli
from slurmeval.cluster.access import Access
from slurmeval.cluster.local import LocalHost
from slurmeval.cluster.scheduler import JobState
from slurmeval.config.schema import Env
from slurmeval.errors import ClusterError, ConfigError, ConnectionFailed, ResultsIncomplete
from slurmeval.follow import Ended, LogLine, PhaseChange, StateChange, TaskChange
from slurmeval.pull import Outcome, pull_job, status_of
from slurmeval.submit import base_directory, make_name, preview, secrets_file, submit
from tests.shown import SUMMARY, Ui

SCRIPT = """\
#!/bin/bash
status() { echo "{\\"phase\\": \\"$1\\", \\"detail\\": \\"$2\\", \\"tasks\\": {\\"arc\\": \\"$3\\"}}" > s; mv s status.json; }
set -e
mkdir -p logs eval_results
status serve loading waiting
echo "serving $HF_TOKEN"
status evaluate arc running
cp summary.in eval_results/summary.json
echo details > logs/serve.log
status done "results are valid" ok
"""  # noqa: E501


@pytest.fixture
def ui() -> Ui:
    return Ui()


@pytest.fixture
def job(tmp_path: Path) -> Path:
    job = tmp_path / "job"
    job.mkdir()
    (job / "job.sbatch").write_text(SCRIPT)
    (job / "summary.in").write_text(json.dumps(SUMMARY))
    return job


Submit = Callable[..., Outcome]


@pytest.fixture
def send(job: Path, ui: Ui, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Submit:
    monkeypatch.chdir(tmp_path)

    def send(**keys: object) -> Outcome:
        options: dict[str, object] = {
            "name": "demo",
            "detach": False,
            "results": tmp_path / "results",
            "ui": ui,
            "profile": "local",
            "environ": {},
            **keys,
        }
        env = options.pop("env", Access(executor="local"))
        return submit(job, env, **options)  # type: ignore[arg-type]

    return send


def test_scores_come_home(send: Submit, ui: Ui, tmp_path: Path) -> None:
    outcome = send()
    assert (outcome.exit_code, outcome.state) == (0, JobState.COMPLETED)
    assert outcome.results == tmp_path / "results" / outcome.record
    assert outcome.summary == SUMMARY
    assert (outcome.results / "logs" / "serve.log").read_text() == "details\n"
    assert (outcome.results / "job.log").read_text() == "serving \n"
    assert re.search(r"arc\s+acc\s+0\.75", ui.text)
    assert ui.lines[-1] == f"results: {outcome.results}"
    assert LogLine("serving ") in ui.events
    assert PhaseChange("done", "results are valid") in ui.events
    assert TaskChange("arc", "ok") in ui.events
    assert StateChange(JobState.COMPLETED, "0", "process") in ui.events
    assert ui.events[-1] == Ended()
    assert (tmp_path / "slurmeval-jobs" / outcome.record).is_dir()


def test_the_record_finds_the_job_again(send: Submit, ui: Ui, tmp_path: Path) -> None:
    env = Access.of(
        Env.model_validate(
            {"executor": "local", "env_vars": {"K": "hidden"}, "setup_lines": ["export K=hidden"]}
        )
    )
    outcome = send(env=env, detach=True, environ={"HF_TOKEN": "hidden"})
    assert outcome.exit_code == 0
    assert f"slurmeval pull {outcome.record}" in ui.lines[-1]
    path = records.directory() / f"{outcome.record}.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert "hidden" not in path.read_text()
    record = records.find("last")
    assert record.profile == "local"
    assert record.job_id == outcome.job_id
    assert record.remote_dir == str(tmp_path / "slurmeval-jobs" / outcome.record)
    assert records.find(outcome.record[:-2]) == records.find(outcome.job_id) == record
    while not status_of(record).state.ended:
        pass
    pulled = pull_job("last", ui=ui)
    assert (pulled.exit_code, pulled.summary) == (0, SUMMARY)
    assert pull_job("demo", ui=ui).exit_code == 0


def test_no_such_record(send: Submit) -> None:
    with pytest.raises(ConfigError, match="no job 'last'") as caught:
        records.find("last")
    assert caught.value.hint == "Nothing was submitted from here yet."
    first, second = send(detach=True), send(detach=True)
    with pytest.raises(ConfigError, match="'demo' is not unique"):
        records.find("demo")
    with pytest.raises(ConfigError, match="no job 'other'") as caught:
        records.find("other")
    assert first.record in str(caught.value.hint)
    assert second.record in str(caught.value.hint)
    (records.directory() / "broken.json").write_text("{")
    assert len(records.records()) == 2


def test_secrets_travel_in_one_private_file(send: Submit, job: Path, tmp_path: Path) -> None:
    hostile = "it's $(touch owned) `id` \\ \" \n é"
    (job / "job.sbatch").write_text(
        "#!/bin/bash\n. ./.secrets.env\nmkdir eval_results\n"
        'stat -c %a .secrets.env > mode\ncp .secrets.env sent\nprintf %s "$HF_TOKEN" > told\n'
        "cp summary.in eval_results/summary.json\n"
    )
    outcome = send(environ={"HF_TOKEN": hostile, "OTHER": "not asked for"})
    assert outcome.results is not None
    remote = tmp_path / "slurmeval-jobs" / outcome.record
    assert (remote / "told").read_text() == hostile
    assert (remote / "mode").read_text() == "600\n"
    assert "not asked for" not in (remote / "sent").read_text()
    assert not (remote / ".secrets.env").exists()
    assert not (outcome.results / ".secrets.env").exists()
    assert not list(tmp_path.rglob("owned"))


def test_no_secret_no_file() -> None:
    assert secrets_file(["HF_TOKEN"], {"HF_TOKEN": ""}) == {}
    with pytest.raises(ConfigError, match="'A=B' is not the name of a variable"):
        secrets_file(["A=B"], {})


@pytest.mark.parametrize(
    ("summary", "ending", "code", "reason"),
    [
        ({**SUMMARY, "state": "invalid"}, "exit 1", 1, "the job is FAILED, exit code 1"),
        ({**SUMMARY, "state": "invalid"}, "exit 0", 1, "the evaluation is invalid"),
        ({**SUMMARY, "state": "unknown"}, "exit 1", 4, "benchmarks have no verdict"),
        (SUMMARY, "exit 1", 1, "the job is FAILED, exit code 1"),
        ("not json", "exit 0", 4, "summary.json is missing"),
        ([1], "exit 0", 4, "summary.json is missing"),
        ({"state": "\x1b[2Jok"}, "exit 0", 1, "the evaluation is [2Jok"),
        ({"state": "ok", "tasks": "x"}, "exit 0", 0, "the evaluation is valid"),
    ],
)
def test_the_verdict_is_the_exit_code(
    send: Submit, job: Path, ui: Ui, summary: object, ending: str, code: int, reason: str
) -> None:
    text = summary if isinstance(summary, str) else json.dumps(summary)
    (job / "summary.in").write_text(text)
    (job / "job.sbatch").write_text(f"{SCRIPT}{ending}\n")
    outcome = send()
    assert outcome.exit_code == code
    assert reason in outcome.reason
    assert outcome.reason in ui.lines
    assert "\x1b" not in ui.text


def test_a_failed_job_says_why_and_brings_its_logs(send: Submit, job: Path) -> None:
    (job / "job.sbatch").write_text(
        "#!/bin/bash\nmkdir logs\necho died > logs/ray.log\n"
        'echo \'{"phase": "failed", "detail": "Ray did not start"}\' > status.json\nexit 1\n'
    )
    outcome = send()
    assert outcome.exit_code == 1
    assert outcome.reason == "the job is FAILED, exit code 1: Ray did not start"
    assert outcome.results is not None
    assert (outcome.results / "logs" / "ray.log").read_text() == "died\n"


def test_a_running_job_gives_partial_results(send: Submit, job: Path, ui: Ui) -> None:
    (job / "job.sbatch").write_text(
        "#!/bin/bash\nmkdir logs\necho so far > logs/x\ntouch up\n"
        "until [ -e go ]; do sleep 0.05; done\n"
    )
    outcome = send(detach=True)
    record = records.find("last")
    while not Path(record.remote_dir, "up").exists():
        pass
    partial = pull_job("last", ui=ui)
    assert (partial.exit_code, partial.state) == (4, JobState.RUNNING)
    assert partial.results is not None
    assert (partial.results / "logs" / "x").read_text() == "so far\n"
    Path(record.remote_dir, "go").touch()
    assert outcome.exit_code == 0


def test_the_list_that_the_job_wrote_at_its_end_counts(send: Submit, job: Path) -> None:
    script = (job / "job.sbatch").read_text()
    listing = '{"files": {"summary.json": {"size": 1, "sha256": "0"}, "gone": {"sha256": "1"}}}'
    (job / "job.sbatch").write_text(f"{script}echo '{listing}' > eval_results/manifest.json\n")
    with pytest.raises(ResultsIncomplete):
        send()
    shown = CliRunner().invoke(cli, ["pull", "last"])
    assert shown.exit_code == 4
    assert "2 file(s)" in shown.output
    assert re.search(r"\n +eval_results/gone\n +eval_results/summary.json\n", shown.output)


def test_results_that_vanished(send: Submit, ui: Ui) -> None:
    send()
    record = records.find("last")
    Path(record.remote_dir, "eval_results", "summary.json").chmod(0)
    for path in Path(record.remote_dir).iterdir():
        path.rename(f"{record.remote_dir}.{path.name}")
    Path(record.remote_dir).rmdir()
    with pytest.raises((ClusterError, ResultsIncomplete)):
        pull_job("last", ui=ui)
    assert Path(record.results, "eval_results", "summary.json").is_file()


def test_traces_of_an_earlier_run_stay_here(send: Submit, job: Path) -> None:
    for name in ("eval_results", "logs"):
        (job / name).mkdir()
        (job / name / "old").touch()
    (job / "eval_results" / "summary.json").write_text(json.dumps(SUMMARY))
    (job / ".job-id").write_text("1 1\n")
    (job / ".exit-code").write_text("0\n")
    script = "until [ -s .job-id ]; do sleep 0.01; done\ncat .job-id\nLC_ALL=C ls -A\n"
    (job / "job.sbatch").write_text(f"#!/bin/bash\n{script}")
    outcome = send()
    assert outcome.exit_code == 4
    assert outcome.results is not None
    assert not (outcome.results / "eval_results").exists()
    job_id, *names = (outcome.results / "job.log").read_text().splitlines()
    assert job_id != "1 1"
    assert set(names) - {".submitting"} == {
        ".job-id",
        ".pid",
        "job.log",
        "job.sbatch",
        "summary.in",
    }


def test_ctrl_c_detaches(send: Submit, job: Path, ui: Ui) -> None:
    (job / "job.sbatch").write_text("#!/bin/bash\nuntil [ -e go ]; do sleep 0.05; done\nexit 0\n")

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    outcome = send(sleep=interrupt)
    assert outcome.exit_code == 130
    record = records.find("last")
    assert f"the job {record.job_id} goes on" in ui.text
    assert f"slurmeval pull {record.name}" in ui.lines[-1]
    assert status_of(record).state is JobState.RUNNING
    Path(record.remote_dir, "go").touch()


def test_a_refused_job_leaves_nothing(
    send: Submit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.write_text("#!/bin/sh\necho sbatch: error: invalid partition specified: x >&2\nexit 1\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    env = Access(executor="slurm", remote_job_dir=str(tmp_path / "jobs"))
    with pytest.raises(ClusterError, match="invalid partition specified"):
        send(env=env, environ={"HF_TOKEN": "secret"})
    assert list((tmp_path / "jobs").iterdir()) == []
    assert records.records() == []


class Dropping(LocalHost):
    """A host whose connection drops after the job was started, before the answer came."""

    def __init__(self, drops: int) -> None:
        self.drops, self.starts = drops, 0

    def run(self, command, **keys):  # type: ignore[no-untyped-def]
        done = super().run(command, **keys)
        if "setsid" in command:
            self.starts += 1
            if self.starts <= self.drops:
                raise ConnectionFailed("the connection was lost")
        return done


def test_a_lost_answer_makes_no_second_job(send: Submit, ui: Ui, tmp_path: Path) -> None:
    host = Dropping(2)
    outcome = send(host=host, sleep=lambda seconds: None)
    assert outcome.exit_code == 0
    assert host.starts == 3
    assert (tmp_path / "results" / outcome.record / "job.log").read_text() == "serving \n"
    assert "trying again in 1 s" in ui.text


def test_an_answer_that_never_comes_names_what_to_look_for(send: Submit) -> None:
    with pytest.raises(
        ConnectionFailed, match=r"no answer whether the job demo-.* was started"
    ) as caught:
        send(host=Dropping(9), sleep=lambda seconds: None)
    record = records.find("last")
    assert record.job_id is None
    assert f"slurmeval resubmit {record.name}" in str(caught.value.hint)


def test_no_job_there(send: Submit, job: Path) -> None:
    (job / "job.sbatch").unlink()
    with pytest.raises(ConfigError, match=r"holds no job\.sbatch"):
        send()


def test_where_jobs_go() -> None:
    assert base_directory(Access(executor="local")) == "slurmeval-jobs"
    assert base_directory(Access(remote_job_dir="~/x/")) == "~/x"
    for sign in "%\\":
        with pytest.raises(ConfigError, match=r"run\.env\.remote_job_dir.*Slurm cannot write"):
            base_directory(Access(remote_job_dir=f"/lustre/me{sign}j"))
        assert (
            base_directory(Access(executor="local", remote_job_dir=f"/me{sign}j")) == f"/me{sign}j"
        )
    with pytest.raises(ConfigError, match=r"run\.env\.remote_job_dir is not set"):
        base_directory(Access(executor="slurm"))


def test_names_are_safe_and_differ() -> None:
    assert re.fullmatch(r"a-b-c-\d{8}T\d{6}Z-[0-9a-f]{4}", make_name("../a b;$(c)"))
    assert make_name("x") != make_name("x")
    assert make_name("///").startswith("job-")


def test_preview_contacts_nobody(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret value")
    (job / "logs").mkdir()
    env = Access(tunnel="ssh", host="nowhere.invalid", user="me", remote_job_dir="/far jobs")
    text = "\n".join(preview(job, env, name="demo", results=tmp_path))
    assert "send to me@nowhere.invalid: /far jobs/demo-" in text
    assert f"job.sbatch  {len(SCRIPT)} bytes" in text
    assert "HF_TOKEN" in text
    assert "secret value" not in text
    assert re.search(r"run: cd '/far jobs/demo-\S+' && sbatch --parsable --job-name=demo-", text)
    assert "logs" not in text
