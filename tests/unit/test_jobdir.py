"""Job directories are written whole, and never over a person's edits."""

import pytest

from slurmeval import jobdir
from slurmeval.errors import ConfigError
from slurmeval.render import render
from tests.unit.test_render import job


def test_it_is_written_and_written_again(tmp_path):
    files = render(*job())
    target = tmp_path / "deep" / "job"
    jobdir.write(files, target)
    jobdir.write(files, target)
    assert (target / "job.sbatch").stat().st_mode & 0o111
    assert {str(p.relative_to(target)) for p in target.rglob("*") if p.is_file()} == set(files)
    assert [p.name for p in target.parent.iterdir()] == ["job"]
    assert jobdir.edited(target) == []


@pytest.mark.parametrize("name", ["job.sbatch", "notes.txt", "eval/hellaswag.yaml"])
def test_edits_are_never_lost(tmp_path, name):
    target = tmp_path / "job"
    jobdir.write(render(*job()), target)
    with (target / name).open("a") as file:
        file.write("# mine\n")
    with pytest.raises(ConfigError, match=name):
        jobdir.write(render(*job()), target)
    assert (target / name).read_text().endswith("# mine\n")
    assert jobdir.edited(target) == [name]


def test_other_directories_and_files_are_left_alone(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years")
    with pytest.raises(ConfigError, match="no job directory"):
        jobdir.write(render(*job()), tmp_path / "home")
    with pytest.raises(ConfigError, match="is a file"):
        jobdir.write(render(*job()), tmp_path / "home" / "thesis.tex")
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years"


def test_an_empty_directory_is_used(tmp_path):
    jobdir.write(render(*job()), tmp_path)
    assert (tmp_path / "job.sbatch").exists()
