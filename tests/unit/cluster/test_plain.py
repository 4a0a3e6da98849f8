"""Plain: real processes on this machine."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from slurmeval.cluster.local import LocalHost
from slurmeval.cluster.plain import Plain
from slurmeval.cluster.scheduler import JobState, Snapshot
from slurmeval.errors import ClusterError


@pytest.fixture
def plain() -> Plain:
    return Plain(LocalHost())


@pytest.fixture
def job(tmp_path: Path) -> Callable[[str], Path]:
    def make(script: str) -> Path:
        folder = tmp_path / "it's a job"
        folder.mkdir()
        (folder / "job.sbatch").write_text(f"#!/bin/bash\n{script}\n")
        return folder

    return make


def until(plain: Plain, job_id: str, folder: Path, wanted: Callable[[Snapshot], bool]) -> Snapshot:
    deadline = time.monotonic() + 30
    while True:
        snapshot = plain.poll(job_id, str(folder), log_offset=0)
        if wanted(snapshot):
            return snapshot
        assert time.monotonic() < deadline, snapshot
        time.sleep(0.05)


def ended(snapshot: Snapshot) -> bool:
    return snapshot.state.ended


def test_a_job_runs_in_its_directory_to_its_end(plain: Plain, job: Callable[[str], Path]) -> None:
    folder = job('pwd; echo "to stderr" >&2; cat; printf "no newline"')
    job_id = plain.submit(str(folder), name="x").job_id
    snapshot = until(plain, job_id, folder, ended)
    assert (snapshot.state, snapshot.exit_code) == (JobState.COMPLETED, "0")
    assert snapshot.log == f"{folder}\nto stderr\nno newline"


def test_an_exit_code_comes_home(plain: Plain, job: Callable[[str], Path]) -> None:
    folder = job("exit 3")
    snapshot = until(plain, plain.submit(str(folder), name="x").job_id, folder, ended)
    assert (snapshot.state, snapshot.exit_code) == (JobState.FAILED, "3")


def test_asking_twice_starts_once(plain: Plain, job: Callable[[str], Path]) -> None:
    folder = job("echo started")
    first = plain.submit(str(folder), name="x").job_id
    until(plain, first, folder, ended)
    assert plain.submit(str(folder), name="x").job_id == first
    assert (folder / "job.log").read_text() == "started\n"


def test_status_and_log_are_read_as_they_grow(plain: Plain, job: Callable[[str], Path]) -> None:
    folder = job(
        'echo \'{"phase": "serve", "tasks": {}}\' > status.json\necho one\nprintf "half a line"\n'
        "until [ -e go ]; do sleep 0.05; done\necho; echo two"
    )
    job_id = plain.submit(str(folder), name="x").job_id
    snapshot = until(plain, job_id, folder, lambda s: s.log != "" and s.status is not None)
    assert (snapshot.state, snapshot.log) == (JobState.RUNNING, "one\n")
    assert snapshot.status == {"phase": "serve", "tasks": {}}
    assert plain.poll(job_id, str(folder), log_offset=-1).log == ""
    (folder / "go").touch()
    until(plain, job_id, folder, ended)
    rest = plain.poll(job_id, str(folder), log_offset=snapshot.log_offset)
    assert rest.log == "half a line\ntwo\n"


def test_a_status_file_that_is_broken_is_none(plain: Plain, job: Callable[[str], Path]) -> None:
    folder = job('echo \'{"phase": "ser\' > status.json; echo "log 0 5"')
    snapshot = until(plain, plain.submit(str(folder), name="x").job_id, folder, ended)
    assert (snapshot.status, snapshot.log) == (None, "log 0 5\n")


def test_cancel_lets_the_script_clean_up(plain: Plain, job: Callable[[str], Path]) -> None:
    folder = job('trap "echo cleaned; exit 9" TERM\necho up\nsleep 60 & wait $!')
    job_id = plain.submit(str(folder), name="x").job_id
    until(plain, job_id, folder, lambda s: "up" in s.log)
    plain.cancel(job_id, str(folder))
    snapshot = until(plain, job_id, folder, ended)
    assert (snapshot.state, snapshot.exit_code) == (JobState.CANCELLED, "9")
    assert snapshot.log == "up\ncleaned\n"
    plain.cancel(job_id, str(folder))


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Interrupts as a shell's foreground has them; a background process ignores them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_the_job_can_still_trap_interrupts(plain: Plain, job: Callable[[str], Path]) -> None:
    folder = job('trap "exit 8" INT\nkill -INT $$\nsleep 1')
    snapshot = until(plain, plain.submit(str(folder), name="x").job_id, folder, ended)
    assert snapshot.exit_code == "8"


@pytest.mark.parametrize(
    ("status", "state", "source"),
    [
        ('{"phase": "done"}', JobState.COMPLETED, "status.json"),
        ('{"phase": "failed"}', JobState.FAILED, "status.json"),
        ('{"phase": "serve"}', JobState.FAILED, "without an exit status"),
    ],
)
def test_a_process_that_is_gone_without_a_word(
    plain: Plain, job: Callable[[str], Path], status: str, state: JobState, source: str
) -> None:
    folder = job("exit 0")
    (folder / "status.json").write_text(status)
    # A start time that this process id never had: the machine was restarted, say.
    (folder / ".job-id").write_text("1 1234567890\n")
    snapshot = plain.poll("1", str(folder), log_offset=0)
    assert snapshot.state is state
    assert source in snapshot.source


def test_an_exit_status_that_comes_a_little_later_counts(
    plain: Plain, job: Callable[[str], Path]
) -> None:
    folder = job("exit 0")
    (folder / ".job-id").write_text("1 1234567890\n")
    late = threading.Timer(1.0, (folder / ".exit-code").write_text, ["0\n"])
    late.start()
    assert plain.poll("1", str(folder), log_offset=0).state is JobState.COMPLETED
    late.join()


def test_a_job_that_was_never_started_is_unknown(plain: Plain, job: Callable[[str], Path]) -> None:
    assert plain.poll("1", str(job("exit 0")), log_offset=0).state is JobState.UNKNOWN


def test_nothing_to_start(plain: Plain, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"cannot start x on this machine: .*no job\.sbatch"):
        plain.submit(str(tmp_path), name="x")
    with pytest.raises(ClusterError, match="cannot start x"):
        plain.submit(str(tmp_path / "missing"), name="x")
    seen = plain.poll("1", str(tmp_path / "missing"), log_offset=0)
    assert (seen.state, seen.log) == (JobState.UNKNOWN, "")
    assert "its directory is gone" in seen.source


def test_a_submission_that_was_cut_behind_its_process_is_completed(
    plain: Plain, job: Callable[[str], Path]
) -> None:
    folder = job("sleep 0.2; exit 3")
    job_id = plain.submit(str(folder), name="x").job_id
    (folder / ".job-id").unlink()
    assert plain.find(str(folder), name="x") == job_id
    assert plain.poll(job_id, str(folder), log_offset=-1).state is JobState.RUNNING
    assert until(plain, job_id, folder, ended).exit_code == "3"
