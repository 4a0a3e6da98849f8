"""Slurm's answers, as its commands give them, and what they mean. The commands are stand-ins."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from slurmeval.cluster.host import Completed
from slurmeval.cluster.local import LocalHost
from slurmeval.cluster.scheduler import Refused, Started, Watched
from slurmeval.cluster.slurm import Slurm
from slurmeval.errors import ClusterError, ConnectionFailed

NO_CONTROLLER = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
NO_SACCT = "Slurm accounting storage is disabled"
INVALID = "slurm_load_jobs error: Invalid job id specified"

Commands = Callable[..., None]


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    """Puts commands on the PATH: name=script."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=":")

    def make(estimate: str = "echo sbatch: Job 1 to start at noon; exit", **scripts: str) -> None:
        for name, script in scripts.items():
            ask = f'case "$*" in *--test-only*) {estimate};; esac' if name == "sbatch" else ""
            (folder / name).write_text(
                f"#!/bin/sh\n{ask}\necho {name} >> {tmp_path}/calls\n{script}\n"
            )
            (folder / name).chmod(0o755)

    make(sbatch="exit 99", squeue="exit 99", sacct="exit 99", scontrol="exit 99")
    return make


@pytest.fixture
def folder(tmp_path: Path) -> str:
    (tmp_path / "job dir").mkdir()
    (tmp_path / "job dir" / "job.sbatch").touch()
    return str(tmp_path / "job dir")


def says(text: str, code: int = 0) -> str:
    return f"cat <<'END'\n{text}\nEND\nexit {code}"


@pytest.mark.parametrize(
    ("squeue", "sacct", "scontrol", "state", "code", "source"),
    [
        (("7|RUNNING|None", 0), ("", 99), ("", 99), "RUNNING", None, "squeue"),
        (("7|PENDING|Priority", 0), ("", 99), ("", 99), "PENDING", None, "squeue"),
        (("7|STAGE_OUT|None", 0), (NO_SACCT, 1), ("", 1), "COMPLETING", None, "squeue"),
        # An array is live while one element is, and as bad as its worst element in the end.
        (("7_0|COMPLETED|None\n7_1|RUNNING|None\n7_[2-3%1]|PENDING|Resources", 0), ("", 99),
         ("", 99), "RUNNING", None, "squeue"),
        (("7_[2-3]|PENDING|Resources\n7_0|FAILED|NonZeroExitCode", 0), ("", 99), ("", 99),
         "PENDING", None, "squeue"),
        (("7_1|FAILED|NonZeroExitCode\n7_0|COMPLETED|None", 0),
         ("7_0|COMPLETED|0:0\n7_0.batch|COMPLETED|0:0\n7_1|FAILED|3:0\n7_1.batch|FAILED|3:0", 0),
         ("", 1), "FAILED", "3:0", "sacct"),
        (("", 0), (NO_SACCT, 1), ("JobId=9 ArrayJobId=7 JobState=COMPLETED ExitCode=0:0\n"
         "JobId=7 ArrayJobId=7 JobState=TIMEOUT ExitCode=0:15", 0), "TIMEOUT", "0:15", "scontrol"),
        # Other jobs of one question, and other jobs that begin with the same digits.
        (("71|RUNNING|None\n17|RUNNING|None\n7|COMPLETED|None", 0),
         ("71|RUNNING|0:0\n7|COMPLETED|0:0", 0), ("", 1), "COMPLETED", "0:0", "sacct"),
        # A job that went back to the queue.
        (("7|PENDING|BeginTime", 0), ("7|REQUEUED|0:0", 0), ("", 1), "PENDING", None, "squeue"),
        (("", 0), ("7|REQUEUED|0:0", 0), ("JobId=7 JobState=REQUEUED ExitCode=0:0", 0), "REQUEUED",
         "0:0", "scontrol"),
        (("7|COMPLETED|None", 0), ("7|COMPLETED|0:0", 0), ("", 1), "COMPLETED", "0:0", "sacct"),
        (("", 0), ("7|FAILED|1:0\n7.batch|FAILED|1:0", 0), ("", 1), "FAILED", "1:0", "sacct"),
        (("", 0), ("7|FAILED|1:0\n7.0|OUT_OF_MEMORY|0:125", 0), ("", 1), "OUT_OF_MEMORY", "1:0",
         "sacct"),
        (("", 0), ("7|CANCELLED by 1001|0:15", 0), ("", 1), "CANCELLED", "0:15", "sacct"),
        (("", 0), ("7+0|TIMEOUT|0:0\n7+1|COMPLETED|0:0", 0), ("", 1), "TIMEOUT", "0:0", "sacct"),
        # Accounting lags: the controller has seen the end.
        (("7|FAILED|None", 0), ("7|RUNNING|0:0", 0), ("", 1), "FAILED", "0:0", "squeue"),
        (("7|FAILED|NonZeroExitCode", 0), (NO_SACCT, 1),
         ("JobId=7 JobState=FAILED ExitCode=3:0 x=y", 0), "FAILED", "3:0", "squeue"),
        (("", 0), (NO_SACCT, 1), ("JobId=7 JobState=NODE_FAIL ExitCode=0:0", 0), "NODE_FAIL", "0:0",
         "scontrol"),
        # Nobody can be asked but accounting.
        ((NO_CONTROLLER, 1), ("7|RUNNING|0:0", 0), ("", 1), "RUNNING", None, "sacct"),
        ((NO_CONTROLLER, 1), (NO_SACCT, 1), ("", 1), "UNKNOWN", None,
         f"Slurm does not answer: {NO_CONTROLLER}"),
        (("", 127), ("", 127), ("", 127), "UNKNOWN", None, "Slurm does not answer: "),
    ],
)  # fmt: skip
def test_the_state_comes_from_who_knows_it(
    commands: Commands,
    folder: str,
    squeue: tuple[str, int],
    sacct: tuple[str, int],
    scontrol: tuple[str, int],
    state: str,
    code: str | None,
    source: str,
) -> None:
    commands(squeue=says(*squeue), sacct=says(*sacct), scontrol=says(*scontrol))
    snapshot = Slurm(LocalHost()).poll("7", folder, log_offset=0)
    assert (snapshot.state, snapshot.exit_code, snapshot.source) == (state, code, source)
    assert not snapshot.gone


@pytest.mark.parametrize("squeue", [("", 0), (INVALID, 1)])
@pytest.mark.parametrize("sacct", [("", 0), (NO_SACCT, 1), ("7|RUNNING|0:0", 0)])
@pytest.mark.parametrize(
    ("phase", "state", "gone"),
    [("done", "COMPLETED", False), ("failed", "FAILED", False), ("serve", "UNKNOWN", True)],
)
def test_a_job_that_slurm_forgot_is_known_by_its_own_words(
    commands: Commands,
    folder: str,
    squeue: tuple[str, int],
    sacct: tuple[str, int],
    phase: str,
    state: str,
    gone: bool,
) -> None:
    commands(squeue=says(*squeue), sacct=says(*sacct), scontrol=says(INVALID, 1))
    Path(folder, "status.json").write_text(f'{{"phase": "{phase}"}}')
    snapshot = Slurm(LocalHost()).poll("7", folder, log_offset=0)
    assert (snapshot.state, snapshot.gone) == (state, gone)


def test_a_running_job_costs_one_question(commands: Commands, folder: str, tmp_path: Path) -> None:
    commands(squeue="echo '7|RUNNING|None'")
    Slurm(LocalHost()).poll("7", folder, log_offset=0)
    assert (tmp_path / "calls").read_text() == "squeue\n"


def test_an_answer_that_is_no_answer(folder: str) -> None:
    class Broken(LocalHost):
        def run(self, command, **keys):  # type: ignore[no-untyped-def]
            return super().run("echo '\033[31mlogin failed'", **keys)

    with pytest.raises(ClusterError, match=r"cannot read the answer .*\[31mlogin failed"):
        Slurm(Broken()).poll("7", folder, log_offset=0)


@pytest.mark.parametrize(
    "output", ["12", "12;mycluster", "Site news: 3 nodes down\n12\n", "12;c\nfair share: 99 %"]
)
def test_the_job_id_is_found(commands: Commands, folder: str, output: str) -> None:
    commands(sbatch=says(output))
    assert Slurm(LocalHost()).submit(folder, name="x").job_id == "12"


def test_sbatch_gets_its_options_as_words(commands: Commands, folder: str) -> None:
    commands(sbatch='pwd > "$PWD/called"; printf "<%s>" "$@" >> called; echo 12')
    Slurm(LocalHost()).submit(folder, name="a b", partition="p;q", extra=["--comment=$(id)"])
    assert Path(folder, "called").read_text() == (
        f"{folder}\n<--parsable><--job-name=a b><--partition=p;q><--comment=$(id)><job.sbatch>"
    )


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        ("sbatch: error: invalid partition specified: x", "run.env.partition"),
        ("sbatch: error: Invalid account or account/partition combination", "run.env.account"),
        ("sbatch: error: Batch job submission failed: Invalid qos specification", "run.env.qos"),
        ("sbatch: unrecognized option '--container-image=x'", "run.env.container_runtime"),
        ("error: Requested node configuration is not available", "gpus_per_node"),
        ("error: Requested time limit is invalid (missing or exceeds some limit)", "run.env.time"),
    ],
)
def test_a_refusal_is_told_in_sbatchs_words_with_a_remedy(
    commands: Commands, folder: str, words: str, remedy: str
) -> None:
    commands(sbatch=f"exec >&2\n{says(words, 1)}")
    with pytest.raises(Refused) as caught:
        Slurm(LocalHost()).submit(folder, name="x")
    assert words in caught.value.message
    assert remedy in str(caught.value.hint)
    assert caught.value.exit_code == 3
    assert [path.name for path in Path(folder).iterdir()] == ["job.sbatch"]


def test_no_slurm_at_all(folder: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for tool in ("sh", "cat", "rm", "mv", "head", "dd"):
        (tmp_path / "bin" / tool).symlink_to(f"/bin/{tool}")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr("slurmeval.cluster.slurm._SETUP", "")
    with pytest.raises(Refused, match=r"sbatch.*not found") as caught:
        Slurm(LocalHost()).submit(folder, name="x")
    assert "PATH" in str(caught.value.hint)


def test_no_directory(commands: Commands, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="cannot submit from"):
        Slurm(LocalHost()).submit(str(tmp_path / "gone"), name="x")


def test_asking_again_returns_the_first_answer(
    commands: Commands, folder: str, tmp_path: Path
) -> None:
    commands(sbatch="echo 12")
    assert Slurm(LocalHost()).submit(folder, name="x").job_id == "12"
    assert Slurm(LocalHost()).submit(folder, name="x").job_id == "12"
    assert (tmp_path / "calls").read_text().count("sbatch") == 1


TIMED_OUT = "echo 'sbatch: error: Socket timed out on send/recv operation' >&2; exit 1"


def test_a_lost_answer_is_looked_for_and_found(
    commands: Commands, folder: str, tmp_path: Path
) -> None:
    commands(sbatch=TIMED_OUT, squeue='[ "$4" = --name=x ] && printf "35\\n34\\n"')
    slurm = Slurm(LocalHost())
    with pytest.raises(ConnectionFailed, match="timed out"):
        slurm.submit(folder, name="x")
    assert slurm.submit(folder, name="x").job_id == "34"
    assert (tmp_path / "calls").read_text() == "sbatch\nsqueue\n"


def test_a_lost_answer_that_is_in_accounting_only(commands: Commands, folder: str) -> None:
    commands(sbatch=TIMED_OUT, squeue="exit 0", sacct="echo 34")
    slurm = Slurm(LocalHost())
    with pytest.raises(ConnectionFailed):
        slurm.submit(folder, name="x")
    assert slurm.submit(folder, name="x").job_id == "34"


def test_while_slurm_cannot_be_asked_nothing_is_submitted_again(
    commands: Commands, folder: str, tmp_path: Path
) -> None:
    commands(sbatch=TIMED_OUT, squeue="echo unable to contact >&2; exit 1")
    slurm = Slurm(LocalHost())
    for _ in range(2):
        with pytest.raises(ConnectionFailed):
            slurm.submit(folder, name="x")
    assert (tmp_path / "calls").read_text().count("sbatch") == 1


def test_a_lost_answer_to_what_never_arrived(
    commands: Commands, folder: str, tmp_path: Path
) -> None:
    commands(sbatch=TIMED_OUT, squeue="exit 0", sacct="exit 1")
    slurm = Slurm(LocalHost())
    with pytest.raises(ConnectionFailed):
        slurm.submit(folder, name="x")
    commands(sbatch="echo 56")
    assert slurm.submit(folder, name="x").job_id == "56"


def test_cancel(commands: Commands, folder: str, tmp_path: Path) -> None:
    commands(scancel=f'echo "$@" > {tmp_path}/cancelled')
    Slurm(LocalHost()).cancel("7", folder)
    assert (tmp_path / "cancelled").read_text() == "7\n"
    commands(scancel="echo Invalid job id >&2; exit 1")
    with pytest.raises(ClusterError, match="scancel 7 failed: Invalid job id"):
        Slurm(LocalHost()).cancel("7", folder)
    with pytest.raises(ClusterError, match="not a Slurm job id"):
        Slurm(LocalHost()).cancel("7; rm -rf x", folder)


def test_what_slurm_expects_and_where_the_log_goes(commands: Commands, folder: str) -> None:
    commands(sbatch="echo 12", scontrol="echo '   StdErr=/e'; echo '   StdOut=/my logs/a.out'")
    slurm = Slurm(LocalHost())
    started = slurm.submit(folder, name="x")
    assert started == Started("12", "/my logs/a.out", "sbatch: Job 1 to start at noon", False)
    assert slurm.submit(folder, name="x") == Started("12", "/my logs/a.out")


def test_a_job_that_cannot_start_is_queued_with_a_warning(commands: Commands, folder: str) -> None:
    words = "allocation failure: Requested node configuration is not available"
    commands(f"echo {words} >&2; exit 1", sbatch="echo 12", scontrol="exit 1")
    assert Slurm(LocalHost()).submit(folder, name="x") == Started("12", None, words, True)


def test_the_log_of_a_hand_edited_output_is_read(
    commands: Commands, folder: str, tmp_path: Path
) -> None:
    commands(squeue="echo '12|RUNNING|None'")
    (tmp_path / "my log").write_text("line\n")
    Path(folder, ".log-path").write_text(f"{tmp_path}/my log\n")
    assert Slurm(LocalHost()).poll("12", folder, log_offset=0).log == "line\n"


def test_asking_first(commands: Commands, folder: str) -> None:
    slurm = Slurm(LocalHost())
    commands('echo "$*: $(cat)"; exit', sbatch="")
    assert slurm.test_only(b"a script", name="x") == "--test-only --job-name=x: a script"
    commands(
        "echo allocation failure: Requested node configuration is not available >&2; exit 1",
        sbatch="",
    )
    with pytest.raises(Refused, match="would refuse the job: allocation failure") as caught:
        slurm.test_only(b"", name="x")
    assert "gpus_per_node" in str(caught.value.hint)
    commands("echo Unable to contact slurm controller >&2; exit 1", sbatch="")
    with pytest.raises(ConnectionFailed, match="does not answer"):
        slurm.test_only(b"", name="x")


def test_finding_a_job_by_its_name(commands: Commands, folder: str, tmp_path: Path) -> None:
    slurm = Slurm(LocalHost())
    assert slurm.find(folder, name="x") is None
    assert not (tmp_path / "calls").exists()
    Path(folder, ".submitting").symlink_to("elsewhere:1:0")
    commands(squeue="exit 0", sacct="exit 0")
    assert slurm.find(folder, name="x") is None
    commands(squeue="echo 34")
    assert slurm.find(folder, name="x") == "34"
    commands(squeue="exit 99")
    assert slurm.find(folder, name="x") == "34"


def test_a_job_that_everybody_forgot_is_known_by_its_log(commands: Commands, folder: str) -> None:
    Path(folder, ".submitting").symlink_to("elsewhere:1:0")
    Path(folder, "slurm-56.out").touch()
    commands(squeue="exit 0", sacct="exit 1")
    assert Slurm(LocalHost()).submit(folder, name="x").job_id == "56"


def test_where_a_job_ran_that_nobody_remembers_no_other_is_started(
    commands: Commands, folder: str, tmp_path: Path
) -> None:
    Path(folder, ".submitting").symlink_to("elsewhere:1:0")
    Path(folder, "status.json").touch()
    commands(squeue="exit 0", sacct="exit 1", sbatch="echo 12")
    with pytest.raises(ClusterError, match="a job ran here that Slurm has forgotten"):
        Slurm(LocalHost()).submit(folder, name="x")
    assert "sbatch" not in (tmp_path / "calls").read_text()


def test_an_attempt_that_is_still_under_way_is_waited_for(
    commands: Commands, folder: str, tmp_path: Path
) -> None:
    commands(sbatch=f"until [ -e {tmp_path}/go ]; do sleep 0.1; done; echo 78", squeue="exit 0")
    slurm = Slurm(LocalHost())
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(slurm.submit, folder, name="x")
        while not (tmp_path / "calls").exists():
            assert not first.done()
        second = pool.submit(slurm.submit, folder, name="x")
        with pytest.raises(ConnectionFailed, match="under way"):
            slurm.find(folder, name="x")
        (tmp_path / "go").touch()
        assert first.result().job_id == second.result().job_id == "78"
    assert (tmp_path / "calls").read_text().count("sbatch") == 1


@pytest.mark.parametrize(
    ("squeue", "kept"),
    [
        (("7|NODE_FAIL|None", 0), set()),
        (("7|PENDING|BeginTime", 0), {".secrets.env", "run"}),
        ((INVALID, 1), set()),
        # It may be in the queue again, which accounting does not know yet.
        ((NO_CONTROLLER, 1), {".secrets.env", "run"}),
    ],
)
def test_what_a_lost_job_leaves_is_removed_at_its_end(
    commands: Commands, folder: str, squeue: tuple[str, int], kept: set[str]
) -> None:
    commands(squeue=says(*squeue), sacct=says("7|NODE_FAIL|1:0"), scontrol="exit 1")
    Path(folder, ".secrets.env").touch()
    Path(folder, "run").mkdir()
    Path(folder, "run", "job").write_text("7\n")
    Slurm(LocalHost()).poll("7", folder, log_offset=-1)
    assert {path.name for path in Path(folder).iterdir()} == {"job.sbatch", *kept}


def test_many_jobs_are_one_question(commands: Commands, folder: str, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "status.json").write_text('{"phase": "done"}')
    Path(folder, "status.json").write_text('{"phase": "serve", "attempt": 2}')
    Path(folder, "slurm-7.out").write_text("out\nhalf")
    commands(
        squeue=says("7|RUNNING|None\n9|PENDING|Priority"),
        sacct=says("8|FAILED|1:0"),
        scontrol=says(INVALID, 1),
    )
    seen = Slurm(LocalHost()).poll_many(
        [
            Watched("7", folder, 0),
            Watched("8", f"{tmp_path}/gone"),
            Watched("9", f"{tmp_path}/gone", 5),
            Watched("10", f"{tmp_path}/other"),
        ]
    )
    assert [(s.state, s.source, s.reason, s.log, s.log_offset) for s in seen] == [
        ("RUNNING", "squeue", "", "out\n", 4),
        ("FAILED", "sacct", "", "", -1),
        ("PENDING", "squeue", "Priority", "", 5),
        ("COMPLETED", "status.json", "", "", -1),
    ]
    assert [s.requeues for s in seen] == [2, 0, 0, 0]
    calls = (tmp_path / "calls").read_text().split()
    assert (calls.count("squeue"), calls.count("sacct")) == (1, 1)
    assert Slurm(LocalHost()).poll_many([]) == []


def test_each_command_names_the_cluster_that_is_meant(
    commands: Commands, folder: str, tmp_path: Path
) -> None:
    told = f'echo "$(basename "$0") $*" >> {tmp_path}/told'
    commands(
        sbatch=f"{told}; echo '7;other'",
        squeue=f"{told}; {says('7|COMPLETED|None')}",
        sacct=f"{told}; {says('7|COMPLETED|0:0')}",
        scontrol=f"{told}; exit 1",
        scancel=f"{told}",
    )
    slurm = Slurm(LocalHost(), "other")
    assert slurm.submit(folder, name="job").job_id == "7"
    assert slurm.poll("7", folder, log_offset=0).state == "COMPLETED"
    slurm.cancel("7", folder)
    slurm.test_only(b"", name="job")
    asked = (tmp_path / "told").read_text().splitlines()
    assert {line.split()[0] for line in asked} == {
        "sbatch",
        "squeue",
        "sacct",
        "scontrol",
        "scancel",
    }
    assert all("--clusters=other" in line for line in asked), asked


@pytest.mark.parametrize(
    ("squeue", "sacct", "state"),
    [
        # So squeue and sacct shorten a list of elements that is too long for them.
        ("7_[1,3,5,7,9,...]|PENDING|Resources", "", "PENDING"),
        ("7_[1,3,5,7,9,...%2]|PENDING|Resources\n7_0|COMPLETED|None", "", "PENDING"),
        ("7|POWER_UP_NODE|None", "7|RUNNING|0:0", "CONFIGURING"),
        # A state of a Slurm to come.
        ("7|HIBERNATING|None", "7|RUNNING|0:0", "RUNNING"),
        ("7|HIBERNATING|None", "7|HIBERNATING|0:0", "UNKNOWN"),
    ],
)
def test_a_job_in_the_queue_is_not_gone(
    commands: Commands, folder: str, squeue: str, sacct: str, state: str
) -> None:
    commands(squeue=says(squeue), sacct=says(sacct), scontrol=says("JobState=HIBERNATING"))
    snapshot = Slurm(LocalHost()).poll("7", folder, log_offset=-1)
    assert (snapshot.state, snapshot.gone) == (state, False)


@pytest.mark.parametrize(
    "end",
    [
        "echo 'sbatch: error: Batch job submission failed: Message receive failure' >&2; exit 1",
        "echo 'sbatch: error: Zero Bytes were transmitted or received' >&2; exit 1",
        "echo 'sbatch: error: Connection reset by peer' >&2; exit 1",
        "kill -9 $$",
    ],
)
def test_a_doubtful_end_of_sbatch_is_no_refusal(commands: Commands, folder: str, end: str) -> None:
    commands(sbatch=end, squeue="echo 7")
    with pytest.raises(ConnectionFailed):
        Slurm(LocalHost()).submit(folder, name="x")
    assert Slurm(LocalHost()).submit(folder, name="x").job_id == "7"


@pytest.mark.parametrize("code", [-1, -9, 137, 1])
def test_a_submission_that_was_killed_is_no_refusal(folder: str, code: int) -> None:
    class Killed(LocalHost):
        def run(self, command, **keys):  # type: ignore[no-untyped-def]
            return Completed(code, "", "")

    with pytest.raises(ConnectionFailed, match="cut short"):
        Slurm(Killed()).submit(folder, name="x")
