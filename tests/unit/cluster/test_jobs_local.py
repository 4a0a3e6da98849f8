"""Jobs after their submission: looking, logs, ending, repeating, forgetting; on this machine."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from test_submit_local import SUMMARY

from slurmeval import record as records
from slurmeval.cli import cli
from slurmeval.cluster.access import Access
from slurmeval.cluster.host import Host
from slurmeval.cluster.local import LocalHost
from slurmeval.cluster.scheduler import JobState
from slurmeval.errors import ClusterError, ConfigError, ConnectionFailed
from slurmeval.joblogs import Chunk, LogReader, stream
from slurmeval.jobs import _copy, cancel, chosen, forget, look, resubmit
from slurmeval.record import Record
from slurmeval.submit import submit
from slurmeval.submit import test_only as ask_first
from tests.shown import Ui

SCRIPT = """\
#!/bin/bash
mkdir -p logs/0 logs/1 eval_results/arc
echo "old" > logs/0/serve.log
for name in ray-n1 ray-n2 serve arc verdict; do echo "$name says" > logs/1/$name.log; done
echo '{"phase": "evaluate", "detail": "1 of 2", "tasks": {"arc": "running"}, "progress": {"arc": [3, 9]}}' > status.json
echo "token ${#HF_TOKEN}"
cat .secrets.env 2>/dev/null | wc -l
stat -c %a .secrets.env > mode 2>/dev/null
cp summary.in eval_results/summary.json
"""  # noqa: E501
WAITS = SCRIPT + "until [ -e go ]; do sleep 0.05; done\n"

Start = Callable[..., Record]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    monkeypatch.chdir(tmp_path)
    number = iter(range(99))

    def start(script: str = SCRIPT, wait: bool = True, **keys: object) -> Record:
        job = tmp_path / f"job{next(number)}"
        (job / "eval").mkdir(parents=True)
        (job / "eval" / "arc.yaml").touch()
        (job / "job.sbatch").write_text(script)
        (job / "summary.in").write_text(json.dumps(SUMMARY))
        options: dict[str, object] = {"environ": {"HF_TOKEN": "four"}, **keys}
        name = submit(
            job, Access(executor="local"), name="demo", detach=True, results=tmp_path / "results",
            ui=Ui(), profile="local", **options,  # type: ignore[arg-type]
        ).record  # fmt: skip
        while wait and look([records.find(name)])[0].live:
            pass
        return records.find(name)

    return start


def test_how_jobs_stand(start: Start) -> None:
    done, waits = start(), start(WAITS, wait=False)
    while True:
        standings = look([done, waits])
        if standings[1].snapshot and standings[1].snapshot.status:
            break
    assert [standing.state for standing in standings] == ["COMPLETED", "RUNNING"]
    assert [standing.live for standing in standings] == [False, True]
    assert chosen([]) == [records.find(waits.name)]
    assert standings[1].words() == [
        f"{waits.name}  job {waits.job_id}  RUNNING (process)",
        "  phase evaluate: 1 of 2",
        "    arc: running  3/9",
    ]
    facts = standings[1].facts()
    assert (facts["progress"], facts["tasks"]) == ({"arc": [3, 9]}, {"arc": "running"})
    assert json.dumps(facts)
    assert records.find(done.name).state == "COMPLETED"
    Path(waits.remote_dir, "go").touch()


def test_which_model_a_job_serves_stays_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``latest`` may mean another version tomorrow; the record keeps the one of the job."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("slurmeval.render.render_script", lambda *_: SCRIPT)
    for version in ("v4", "v5"):
        (tmp_path / version / "iter_0000070").mkdir(parents=True)
        (tmp_path / version / "iter_0000070" / "run_config.yaml").touch()
    registry = tmp_path / "artifacts.yaml"
    registry.write_text(f"M-sft:\n  v4: {tmp_path}/v4\n  v5: {tmp_path}/v5\n  latest: v5\n")
    run = CliRunner()
    arguments = ["submit", "-c", "sft", "--profile", "local", "--detach", "run.model=M-sft"]
    sent = run.invoke(cli, [*arguments, "deploy.num_gpus=4", "--json"], catch_exceptions=False)
    assert sent.exit_code == 0, sent.output
    registry.write_text(f"M-sft:\n  v4: {tmp_path}/v4\n  latest: v4\n")

    checkpoint = f"{tmp_path}/v5/iter_0000070"
    shown = run.invoke(cli, ["status", "last"]).output
    assert f"  model M-sft:v5 (asked for M-sft:latest): {checkpoint}\n" in shown
    (facts,) = json.loads(run.invoke(cli, ["status", "last", "--json"]).output)
    (listed,) = json.loads(run.invoke(cli, ["list", "--json"]).output)
    assert facts["model"] == listed["model"]
    assert facts["model"] == {
        "checkpoint": checkpoint,
        "name": "M-sft",
        "version": "v5",
        "requested": "M-sft:latest",
        "source": "artifacts.yaml:3",
    }


def test_a_job_of_a_plain_path_says_the_path(start: Start) -> None:
    record = records.update(start(), model={"checkpoint": "/ckpt/iter_0000010"})
    assert look([record])[0].words()[1] == "  model /ckpt/iter_0000010"


def test_any_number_of_jobs_is_one_command_a_host(start: Start) -> None:
    commands = []

    class Counting(LocalHost):
        def run(self, command, **keys):  # type: ignore[no-untyped-def]
            commands.append(command)
            return super().run(command, **keys)

    wanted = [start(), start(), start()]
    standings = look(wanted, connect=lambda env, prompt: Counting())
    assert [standing.record.name for standing in standings] == [record.name for record in wanted]
    assert len(commands) == 1


def test_a_host_that_is_away_makes_its_own_jobs_unknown_only(start: Start) -> None:
    here, there = start(), start()
    away = records.update(there, env={**there.env, "host": "away"})

    def connect(env: Access, prompt: object) -> LocalHost:
        if env.host:
            raise ConnectionFailed("away does not answer")
        return LocalHost()

    standings = look([away, here], connect=connect)
    assert [standing.state for standing in standings] == ["UNKNOWN", "COMPLETED"]
    assert standings[0].words()[1] == "  away does not answer"
    assert standings[0].live


def test_further_looks_use_the_connections_of_the_first(start: Start) -> None:
    made: list[LocalHost] = []

    def connect(env: Access, prompt: object) -> LocalHost:
        made.append(LocalHost())
        return made[-1]

    record, hosts = start(), dict[str, Host]()
    for _ in range(3):
        assert look([record], connect=connect, hosts=hosts)[0].state == "COMPLETED"
    assert list(hosts.values()) == made
    assert len(made) == 1


def test_a_job_that_nobody_can_ask_about_is_forgotten_by_force_only(start: Start) -> None:
    record, ui = records.update(start(), env={"host": "away", "tunnel": "ssh"}, state=""), Ui()

    def away(env: Access, prompt: object) -> LocalHost:
        raise ConnectionFailed("away does not answer")

    with pytest.raises(ConfigError, match="is UNKNOWN") as caught:
        forget(record, remote=False, ui=ui, connect=away)
    assert f"slurmeval rm --force {record.name}" in str(caught.value.hint)
    with pytest.raises(ConfigError, match="has to stay"):
        forget(record, remote=True, force=True, ui=ui, connect=away)
    forget(record, remote=False, force=True, ui=ui, connect=away)
    assert not records.records()


def test_an_answer_that_was_lost_is_found_by_looking(start: Start) -> None:
    record = start()
    lost = records.update(record, job_id=None)
    assert look([lost])[0].record.job_id == record.job_id == records.find(record.name).job_id


def test_ending_a_job(start: Start) -> None:
    record, ui = start(WAITS, wait=False), Ui()
    cancel(record, ui=ui)
    assert "was told to end" in ui.text
    while look([record])[0].live:
        pass
    assert records.find(record.name).state == "CANCELLED"
    cancel(record, ui=ui)
    assert ui.lines[-1] == f"{record.name} has ended already: CANCELLED"
    never = records.update(start(), job_id=None, sent=False)
    cancel(never, ui=ui)
    assert ui.lines[-1] == f"{never.name} was never started"


def test_what_a_killed_job_leaves_is_removed(start: Start) -> None:
    uses_run = 'mkdir -p run\necho "local-$$" > run/job\n'
    first = start(uses_run + WAITS, wait=False)
    other = start("mkdir run\necho local-1 > run/job\n", wait=False)
    folder = Path(first.remote_dir)
    while not (folder / "run" / "job").exists() or look([other])[0].live:
        pass
    assert (folder / ".secrets.env").exists()
    assert look([first])[0].live
    assert (folder / ".secrets.env").exists()
    os.killpg(os.getpgid(int(first.job_id or "")), signal.SIGKILL)
    while look([first])[0].live:
        pass
    assert not (folder / ".secrets.env").exists()
    assert not (folder / "run").exists()
    assert (Path(other.remote_dir) / "run" / "job").exists()
    assert not (Path(other.remote_dir) / ".secrets.env").exists()


def test_the_same_files_again(start: Start) -> None:
    first, ui = start(), Ui()
    Path(first.remote_dir, "edited by hand").touch()
    again = resubmit(first, ui=ui, environ={"HF_TOKEN": "sixsix"})
    assert again.name != first.name
    assert (again.resubmit_of, again.config_hash) == (first.name, first.config_hash)
    while look([again])[0].live:
        pass
    folder = Path(again.remote_dir)
    assert (folder / "edited by hand").exists()
    assert (folder / "job.log").read_text() == "token 0\n1\n"
    assert (folder / "mode").read_text() == "600\n"
    assert folder.parent == Path(first.remote_dir).parent
    assert sorted(path.name for path in folder.parent.iterdir()) == sorted([first.name, again.name])


def test_results_are_taken_along_on_request(start: Start) -> None:
    first = start()
    Path(first.remote_dir, "eval_results", "arc", "done before").touch()
    fresh = resubmit(first, ui=Ui(), environ={})
    kept = resubmit(first, ui=Ui(), environ={}, keep=True)
    while any(standing.live for standing in look([fresh, kept])):
        pass
    assert not Path(fresh.remote_dir, "eval_results", "arc", "done before").exists()
    assert Path(kept.remote_dir, "eval_results", "arc", "done before").exists()


def test_what_cannot_be_started_again(start: Start) -> None:
    running, ui = start(WAITS, wait=False), Ui()
    with pytest.raises(ConfigError, match="cannot be started again"):
        resubmit(running, ui=ui)
    Path(running.remote_dir, "go").touch()
    unsent = records.update(start(), sent=False)
    with pytest.raises(ConfigError, match="were never sent"):
        resubmit(unsent, ui=ui)
    gone = start()
    resubmit(gone, ui=ui, environ={})
    (Path(gone.remote_dir) / "job.sbatch").unlink()
    count = len(records.records())
    with pytest.raises(ClusterError, match=r"cannot copy .*no job\.sbatch"):
        resubmit(gone, ui=ui, environ={})
    assert len(records.records()) == count


def test_a_copy_whose_answer_is_lost_is_one_copy(start: Start) -> None:
    first = start()

    class Dropping(LocalHost):
        drops = 1

        def run(self, command, **keys):  # type: ignore[no-untyped-def]
            done = super().run(command, **keys)
            if "cp -a" in command and self.drops:
                self.drops = 0
                raise ConnectionFailed("the connection was lost")
            return done

    again = resubmit(
        first, ui=Ui(), environ={}, connect=lambda env, prompt: Dropping(), sleep=lambda s: None
    )
    assert {path.name for path in Path(first.remote_dir).parent.iterdir()} == {
        first.name,
        again.name,
    }


def test_a_submission_whose_answer_was_lost_is_completed(start: Start) -> None:
    record = start()
    lost = records.update(record, job_id=None)
    assert resubmit(lost, ui=Ui()).job_id == record.job_id
    assert len(records.records()) == 1


def test_forgetting(start: Start, tmp_path: Path) -> None:
    done, running, ui = start(), start(WAITS, wait=False), Ui()
    with pytest.raises(ConfigError, match=r"RUNNING .* cannot be removed") as caught:
        forget(running, remote=True, ui=ui)
    assert "slurmeval cancel" in str(caught.value.hint)
    assert Path(running.remote_dir).is_dir()
    Path(running.remote_dir, "go").touch()
    forget(done, remote=False, ui=ui)
    assert Path(done.remote_dir).is_dir()
    assert [record.name for record in records.records()] == [running.name]
    while look([running])[0].live:
        pass
    forget(records.find(running.name), remote=True, ui=ui)
    assert not Path(running.remote_dir).exists()
    assert records.records() == []


def test_only_the_directory_of_the_job_is_ever_removed(start: Start, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    forged = records.update(start(), remote_dir=str(tmp_path / "mine"))
    with pytest.raises(ConfigError, match="is not the directory of"):
        forget(forged, remote=True, ui=Ui())
    assert (tmp_path / "mine").is_dir()


def test_a_job_that_nobody_can_be_asked_about_is_kept(start: Start) -> None:
    record = records.update(start(), state="")

    def away(env: Access, prompt: object) -> LocalHost:
        raise ConnectionFailed("away does not answer")

    with pytest.raises(ConfigError, match=r"UNKNOWN \(away does not answer\)"):
        forget(record, remote=False, ui=Ui(), connect=away)
    assert records.find(record.name) == record


def text_of(record: Record, **keys: object) -> dict[str, str]:
    found: dict[str, str] = {}
    for chunk in stream(record, sleep=lambda seconds: None, **keys):  # type: ignore[arg-type]
        found[chunk.name] = found.get(chunk.name, "") + chunk.text
    return found


def test_logs_of_the_script_of_phases_and_of_benchmarks(start: Start) -> None:
    record = start()
    assert text_of(record) == {"job": "token 0\n1\n"}
    assert text_of(record, lines=1) == {"job": "1\n"}
    assert text_of(record, phase="ray") == {"ray-n1": "ray-n1 says\n", "ray-n2": "ray-n2 says\n"}
    assert text_of(record, phase="serve") == {"serve": "serve says\n"}
    assert text_of(record, phase="evaluate") == {"arc": "arc says\n"}
    assert text_of(record, task="arc") == {"arc": "arc says\n"}
    with pytest.raises(ConfigError, match="has no log of mmlu") as caught:
        text_of(record, task="mmlu")
    assert "arc.log, ray-n1.log" in str(caught.value.hint)
    for keys in ({"phase": "nap"}, {"task": "../x"}, {"task": "$(id)"}):
        with pytest.raises(ConfigError):
            text_of(record, **keys)


@pytest.mark.parametrize(
    ("named", "files"),
    [
        # Asked while all elements waited; when one ran; not at all.
        ("{dir}/slurm-{id}_4294967294.out", "slurm-{id}_{n}.out"),
        ("{dir}/my logs/e-4294967294-x", "my logs/e-{n}-x"),
        ("{dir}/slurm-{id}_1.out", "slurm-{id}_{n}.out"),
        ("", "slurm-{id}_{n}.out"),
    ],
)
def test_elements_of_an_array_have_a_log_each(start: Start, named: str, files: str) -> None:
    record = start()
    record = records.update(record, env={**record.env, "executor": "slurm"})
    there = Path(record.remote_dir)
    for number in range(2):
        path = there / files.format(id=record.job_id, n=number)
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"element {number}\n")
    (there / ".log-path").write_text(named.format(dir=there, id=record.job_id))
    reader = LogReader(LocalHost(), record)
    assert reader.read() == [Chunk("job_0", "element 0\n"), Chunk("job_1", "element 1\n")]


def test_a_directory_named_like_an_element_is_none(start: Start) -> None:
    record = start()
    folder = Path(record.remote_dir, f"x{record.job_id}_1")
    folder.mkdir()
    (folder / "log").write_text("all\n")
    Path(record.remote_dir, ".log-path").write_text(f"{folder}/log\n")
    assert LogReader(LocalHost(), record).read() == [Chunk("job", "all\n")]


def test_a_log_is_followed_to_its_end_across_a_lost_connection(start: Start) -> None:
    record = start(WAITS + "echo last; printf unfinished\n", wait=False)
    told: list[str] = []

    class Dropping(LocalHost):
        calls = 0

        def run(self, command, **keys):  # type: ignore[no-untyped-def]
            self.calls += 1
            if self.calls in (3, 4):
                raise ConnectionFailed("lost")
            if self.calls == 6:
                Path(record.remote_dir, "go").touch()
            return super().run(command, **keys)

    found = text_of(record, follow=True, host=Dropping(), tell=told.append)
    assert found == {"job": "token 0\n1\nlast\nunfinished"}
    assert told == ["lost; trying again in 1 s", "lost; trying again in 2 s"]


def test_a_log_longer_than_one_answer_is_whole(start: Start) -> None:
    record = start("#!/bin/bash\nseq 100000\n")
    expected = "".join(f"{number}\n" for number in range(1, 100001))
    assert text_of(record, lines=None) == {"job": expected}
    assert text_of(record, lines=2) == {"job": "99999\n100000\n"}


def test_a_log_that_is_truncated_is_read_anew(start: Start) -> None:
    record = start()
    reader = LogReader(LocalHost(), record)
    assert [chunk.text for chunk in reader.read()] == ["token 0\n1\n"]
    Path(record.remote_dir, "job.log").write_text("new\n")
    assert [chunk.text for chunk in reader.read()] == ["new\n"]
    assert reader.read() == []


def test_asking_first_sends_nothing(tmp_path: Path) -> None:
    job = tmp_path / "job"
    job.mkdir()
    (job / "job.sbatch").write_text("#!/bin/bash\ntouch ran\n")
    env = Access(executor="local", remote_job_dir=str(tmp_path / "jobs"))
    assert "would start at once" in ask_first(job, env, name="demo")
    assert not (tmp_path / "jobs").exists()
    (job / "job.sbatch").write_text("#!/bin/bash\nif\n")
    with pytest.raises(ClusterError, match=r"cannot read it: .*syntax error"):
        ask_first(job, env, name="demo")
    assert records.records() == []


def call(*words: str) -> Result:
    return CliRunner().invoke(cli, words)


def test_the_commands(start: Start) -> None:
    assert "nothing was submitted" in call("list").output
    assert json.loads(call("list", "--json").output) == []
    assert json.loads(call("status", "--json").output) == []
    done = start()
    listing = call("list").output.splitlines()
    assert listing[0].split() == ["NAME", "JOB", "STATE", "SEEN", "SYNCED", "PROFILE"]
    assert listing[1].split()[:3] == [done.name, done.job_id, "COMPLETED"]
    (facts,) = json.loads(call("list", "--json").output)
    assert (facts["state"], "env" in facts) == ("COMPLETED", False)
    assert call("status", "demo").output.startswith(f"{done.name}  job {done.job_id}  COMPLETED")
    (facts,) = json.loads(call("status", "last", "--watch", "--json").output)
    assert facts["state"] == "COMPLETED"
    assert call("logs").output == "token 0\n1\n"
    assert call("logs", "--phase", "ray").output.splitlines()[0] == "==> ray-n1 <=="
    assert json.loads(call("logs", "-n", "1", "--json").output) == {"log": "job", "text": "1\n"}
    assert call("logs", "-n", "few").exit_code == 2
    assert call("logs", "--phase", "ray", "--task", "arc").exit_code == 2
    lines = call("pull", "--json").output.splitlines()
    assert json.loads(lines[-1])["exit_code"] == 0
    assert records.find("last").synced is not None
    assert call("cancel", "last").output == f"{done.name} has ended already: COMPLETED\n"
    again = call("resubmit", "last", "--json").output.splitlines()
    assert json.loads(again[-1])["resubmit_of"] == done.name
    while look([records.find("last")])[0].live:
        pass
    assert call("rm", done.name, "last", "--remote").exit_code == 0
    assert records.records() == []


def test_a_state_that_is_unknown_is_told_by_the_exit_status(start: Start) -> None:
    record = start()
    for path in Path(record.remote_dir).iterdir():
        path.rename(f"{record.remote_dir}.{path.name}")
    result = call("status", "last")
    assert (result.exit_code, "UNKNOWN" in result.output) == (3, True)
    assert records.find("last").state == JobState.COMPLETED


def test_a_job_that_cannot_be_asked_for_leaves_the_others_alone(start: Start) -> None:
    waits = start(WAITS, wait=False)
    lost = replace(waits, name="lost", remote_dir="/gone", job_id=None)
    far = {**waits.env, "tunnel": "ssh", "host": "far", "identity": "/gone/key"}
    found = look([lost, waits, replace(waits, name="far", env=far)])
    assert [standing.state for standing in found] == ["UNKNOWN", "RUNNING", "UNKNOWN"]
    assert "/gone/key" in found[2].problem
    Path(waits.remote_dir, "go").touch()


def test_a_status_file_of_brackets_is_none(start: Start) -> None:
    deep = "head -c 200000 /dev/zero | tr '\\0' '[' | tee status.json eval_results/summary.json\n"
    done = start("mkdir eval_results; " + deep)
    assert records.find(done.name).state == "COMPLETED"
    assert call("pull", done.name).exit_code == 4


def test_a_long_log_comes_as_it_is(start: Start) -> None:
    done = start("for i in $(seq 5000); do echo " + "é" * 40 + "x; done\n")
    assert call("logs", done.name, "-n", "all").output == ("é" * 40 + "x\n") * 5000


def test_a_copy_has_a_name_of_the_same_length(start: Start) -> None:
    old = replace(start(), name="demo-20260101T000000Z-20ab")
    assert len(resubmit(old, ui=Ui()).name) == len(old.name)


class CutOnce(LocalHost):
    """The connection breaks within the input of the first command that has one."""

    cut = False

    def run(self, command: Any, *, timeout: float, input: bytes = b"") -> Any:
        if not input or self.cut:
            return super().run(command, timeout=timeout, input=input)
        self.cut = True
        super().run(command, timeout=timeout, input=input[:-3])
        raise ConnectionFailed("cut")


def test_a_copy_has_its_secrets_whole_or_is_none(start: Start) -> None:
    secret = {"HF_TOKEN": "token of twenty-one.."}
    fresh = resubmit(
        start(SCRIPT.replace("cat .secrets.env", "cp .secrets.env kept; cat .secrets.env")),
        ui=Ui(), environ=secret, connect=lambda *_, **__: CutOnce(), sleep=lambda _: None,
    )  # fmt: skip
    while look([fresh])[0].live:
        pass
    assert secret["HF_TOKEN"] in Path(fresh.remote_dir, "kept").read_text()


def test_a_copy_that_the_try_before_made_meanwhile_is_taken(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = start()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "mv").write_text('#!/bin/sh\n/bin/cp -r "$3" "$4"; exec /bin/mv "$@"\n')
    (tmp_path / "bin" / "mv").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    host = LocalHost()
    fresh = replace(done, name="fresh", remote_dir=str(tmp_path / "fresh"))
    _copy(host, done, fresh, None, False, Ui(), lambda _: None)
    assert (tmp_path / "fresh" / "job.sbatch").is_file()
