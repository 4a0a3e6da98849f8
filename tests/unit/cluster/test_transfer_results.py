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
    assert pull(LocalHost(), str(job), tmp_path / "home").kept == [mine]
    assert mine.read_text() == "my own notes"
