"""Own lm-eval tasks of this machine travel with the job."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from slurmeval.config.load import load
from slurmeval.errors import ConfigError
from slurmeval.owntasks import ship
from slurmeval.plan import make_plan
from slurmeval.render import render, render_script

EXAMPLES = Path(__file__).parents[2] / "examples"
TASK = """\
task: mine
dataset_path: json
dataset_kwargs: {data_files: {test: data/questions.jsonl}}
output_type: multiple_choice
doc_to_text: !function helpers.text
"""


@pytest.fixture
def here(tmp_path: Path) -> Path:
    for name, text in {
        "mine/mine.yaml": TASK,
        "mine/helpers.py": "def text(doc): return doc['q']",
        "mine/.hidden/secret": "x",
        "mine/__pycache__/helpers.pyc": "x",
        "data/questions.jsonl": '{"q": "?"}\n',
        "data/other.jsonl": "{}\n",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_the_directory_and_the_data_that_its_tasks_name_travel(here):
    own = ship(["mine", "mine", None, "/on/the/cluster"], here)
    assert set(own.files) == {
        "tasks/mine/mine.yaml",
        "tasks/mine/helpers.py",
        "tasks/data/questions.jsonl",
    }
    assert own.paths == {"mine": "mine"}
    assert own.output_types == {"mine": "multiple_choice"}
    assert own.files["tasks/mine/helpers.py"].text.endswith("\n")


def test_the_same_path_written_otherwise(here):
    assert ship(["./mine/"], here).paths == {"./mine/": "mine"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda here: (here / "data/questions.jsonl").unlink(), "no such file"),
        (lambda here: (here / "mine/mine.yaml").write_text("task: [mine"), "no valid YAML"),
        (lambda here: (here / "mine/weights.bin").write_bytes(b"\xff\xfe\x00"), "is no text"),
        (lambda here: (here / "mine/big.txt").write_text("x" * (33 << 20)), "too much to send"),
        (
            lambda here: (here / "mine/mine.yaml").write_text(TASK.replace("data/", "../")),
            "leads out",
        ),
    ],
)
def test_what_cannot_travel_is_refused_by_name(here, change, words):
    change(here)
    with pytest.raises(ConfigError, match=words):
        ship(["mine"], here)


@pytest.mark.parametrize(("path", "words"), [("none", "no such directory"), ("../x", "leads out")])
def test_a_path_that_is_no_directory_below_here(here, path, words):
    with pytest.raises(ConfigError, match=words):
        ship([path], here)


def test_data_of_a_hub_and_of_the_cluster_stay_where_they_are(here):
    (here / "mine/hub.yaml").write_text(
        "task: hub\ndataset_path: org/data\ndataset_kwargs: {data_files: none.csv}\n"
    )
    (here / "mine/abs.yaml").write_text(
        "task: abs\ndataset_path: json\ndataset_kwargs: {data_files: [/data/a.jsonl]}\n"
    )
    assert "tasks/mine/hub.yaml" in ship(["mine"], here).files


def test_the_documented_example_becomes_part_of_the_job(monkeypatch):
    monkeypatch.chdir(EXAMPLES)
    loaded = load(
        ["own-tasks/config.yaml"], profile="local", overrides=["model.checkpoint_path=/ckpt"]
    )
    plan = make_plan(loaded.config)
    files = render(loaded.config, plan)
    assert "tasks/own-tasks/capitals.jsonl" in files
    values = yaml.safe_load(files["eval/capitals.yaml"].text)
    assert values["config"]["params"]["extra"]["args"] == "--include_path own-tasks"
    alone = render_script(loaded.config, plan, carry=files)
    assert '"$JOB_DIR"/tasks/own-tasks' in alone and "The capital of {{country}} is" in alone
