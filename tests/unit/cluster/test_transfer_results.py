"""Results come home as the job listed them at its end, or the pull says which did not."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from slurmeval.cluster.local import LocalHost
from slurmeval.errors import ResultsIncomplete
from slurmeval.pull import pull


@pytest.fixture
def job(tmp_path: Path) -> Path:
    job = tmp_path / "job"
    (job / "eval_results" / "task").mkdir(parents=True)
    files = {"task/a.json": b"{}", "task/b.json": b"[]", "summary.json": b"{}"}
    for name, data in files.items():
        (job / "eval_results" / name).write_bytes(data)
    listed = {
        n: {"size": len(d), "sha256": hashlib.sha256(d).hexdigest()} for n, d in files.items()
    }
    (job / "eval_results" / "manifest.json").write_text(json.dumps({"files": listed}))
    return job


def test_all_is_as_the_job_left_it(job: Path, tmp_path: Path) -> None:
    assert len(pull(LocalHost(), str(job), tmp_path / "home").moved) == 4
    assert pull(LocalHost(), str(job), tmp_path / "home").moved == []


def test_what_changed_or_went_since_is_named(job: Path, tmp_path: Path) -> None:
    (job / "eval_results" / "task" / "a.json").write_text("x")
    (job / "eval_results" / "task" / "b.json").unlink()
    with pytest.raises(ResultsIncomplete) as caught:
        pull(LocalHost(), str(job), tmp_path / "home")
    assert caught.value.exit_code == 4
    assert "2 file(s)" in caught.value.message
    assert "    eval_results/task/a.json\n    eval_results/task/b.json" in caught.value.message
    assert (tmp_path / "home" / "eval_results" / "summary.json").is_file()


def test_what_the_user_changed_here_is_no_fault_of_the_cluster(job: Path, tmp_path: Path) -> None:
    mine = tmp_path / "home" / "eval_results" / "task" / "a.json"
    mine.parent.mkdir(parents=True)
    mine.write_text("my own notes")
    assert pull(LocalHost(), str(job), tmp_path / "home").kept == ["eval_results/task/a.json"]
    assert mine.read_text() == "my own notes"


def test_what_was_written_after_the_list_comes_home_too(job: Path, tmp_path: Path) -> None:
    (job / "eval_results" / "late.json").write_text("{}")
    (job / "eval_results" / "task" / "later.json").write_text("{}")
    assert len(pull(LocalHost(), str(job), tmp_path / "home").moved) == 6


def test_results_that_change_again_after_they_came_home(job: Path, tmp_path: Path) -> None:
    pull(LocalHost(), str(job), tmp_path / "home")
    (job / "eval_results" / "task" / "b.json").unlink()
    assert pull(LocalHost(), str(job), tmp_path / "home").moved == []
    (job / "eval_results" / "task" / "a.json").write_text("x")
    with pytest.raises(ResultsIncomplete, match=r"1 file\(s\).*\n    eval_results/task/a.json"):
        pull(LocalHost(), str(job), tmp_path / "home")


def test_a_list_of_an_earlier_attempt_says_nothing_of_a_running_job(
    job: Path, tmp_path: Path
) -> None:
    (job / "eval_results" / "task" / "a.json").write_text("x")
    assert len(pull(LocalHost(), str(job), tmp_path / "home", live=True).moved) == 4
    with pytest.raises(ResultsIncomplete):
        pull(LocalHost(), str(job), tmp_path / "home")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"files": []}',
        '{"files": {"task/a.json": "x"}}',
        '{"files": {"task/a.json": {"size": 2}}}',
        '{"files": {"../../../etc/passwd": {"sha256": ["x"]}}}',
    ],
)
def test_a_list_that_makes_no_sense(job: Path, tmp_path: Path, text: str) -> None:
    (job / "eval_results" / "manifest.json").write_text(text)
    try:
        pull(LocalHost(), str(job), tmp_path / "home")
    except ResultsIncomplete as error:
        assert "eval_results/../../../etc/passwd" in error.message
    assert (tmp_path / "home" / "eval_results" / "task" / "a.json").read_bytes() == b"{}"
