"""The task catalogue: its facts, finding, searching, and agreement with the launcher."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from slurmeval import tasks
from slurmeval.cli import cli
from slurmeval.errors import ConfigError

REFRESH = Path(__file__).parents[2] / "scripts" / "refresh-tasks"
SEED = (
    "adlr_arc_challenge_llama_25_shot",
    "adlr_winogrande_5_shot",
    "hellaswag",
    "piqa",
    "adlr_mmlu_pro_5_shot_base",
    "adlr_humaneval_greedy",
)


def test_the_catalogue_holds_every_task_of_the_launcher_once() -> None:
    assert tasks.launcher_version() == "0.2.6"
    assert len(tasks.catalogue()) == 421
    assert len({task.harness for task in tasks.catalogue().values()}) == 23


def test_each_task_has_an_image_a_digest_and_an_endpoint() -> None:
    for kind, task in tasks.catalogue().items():
        assert kind == task.type
        assert kind.count(".") == 1, "the evaluator refuses a type with more dots"
        assert task.container.startswith("nvcr.io/") and ":" in task.container
        assert task.digest.startswith("sha256:") and len(task.digest) == 71
        assert len(task.endpoint_types) == 1
        assert task.endpoint_types[0] in {"completions", "chat", "vlm", "embedding"}
        assert set(task.capabilities) <= {"logprobs"}
        assert "parallelism" in task.parameters or task.defaults


@pytest.mark.parametrize("name", SEED)
def test_the_six_benchmarks_of_the_shipped_configs(name: str) -> None:
    task = tasks.find(name)
    assert task.harness == "lm-evaluation-harness"
    assert task.type == f"lm-evaluation-harness.{name}"
    assert task.container == "nvcr.io/nvidia/eval-factory/lm-evaluation-harness:26.03"
    assert task.endpoint_types == ("completions",)
    assert task.defaults["request_timeout"] == 30
    assert task.defaults["parallelism"] == 10
    scored_by_logprobs = name not in {"adlr_mmlu_pro_5_shot_base", "adlr_humaneval_greedy"}
    assert task.capabilities == (("logprobs",) if scored_by_logprobs else ())


def test_defaults_of_a_task_and_of_its_harness_come_together() -> None:
    winogrande = tasks.find("adlr_winogrande_5_shot")
    assert winogrande.defaults["task"] == "winogrande"
    assert winogrande.defaults["extra"]["num_fewshot"] == 5
    assert winogrande.defaults["extra"]["tokenized_requests"] is False
    assert tasks.find("adlr_arc_challenge_llama_25_shot").defaults["task"] == (
        "adlr_arc_challenge_llama"
    )
    assert {"temperature", "extra.tokenizer", "extra.args"} <= winogrande.parameters
    assert "extra.judge" not in winogrande.parameters


def test_a_qualified_name_finds_the_same_task() -> None:
    assert tasks.find("lm-evaluation-harness.hellaswag") is tasks.find("hellaswag")


def test_an_ambiguous_name_says_so_and_names_the_candidates() -> None:
    with pytest.raises(ConfigError) as caught:
        tasks.find("mmlu_pro")
    assert "several harnesses" in caught.value.message
    assert caught.value.hint == "name one: lm-evaluation-harness.mmlu_pro, simple_evals.mmlu_pro"


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("helaswag", "hellaswag"),
        ("adlr_winogrande_5shot", "adlr_winogrande_5_shot"),
        ("lm-evaluation-harnes.piqa", "lm-evaluation-harness.piqa"),
    ],
)
def test_an_unknown_name_gets_a_suggestion(wrong: str, right: str) -> None:
    with pytest.raises(ConfigError, match="unknown task") as caught:
        tasks.find(wrong)
    assert caught.value.hint is not None
    assert right in caught.value.hint


def test_a_name_like_no_other_gets_told_how_to_bring_an_own_task() -> None:
    with pytest.raises(ConfigError) as caught:
        tasks.find("zzqqxx")
    assert caught.value.hint is not None
    assert "did you mean" not in caught.value.hint
    assert "type: lm-evaluation-harness.my_task" in caught.value.hint


def test_search_takes_a_part_or_a_pattern_in_any_case() -> None:
    assert tasks.find("hellaswag") in tasks.search("HellaS")
    shots = tasks.search("adlr_*_5_shot")
    assert tasks.find("adlr_winogrande_5_shot") in shots
    assert all(task.name.startswith("adlr_") and task.name.endswith("_5_shot") for task in shots)
    assert {task.harness for task in tasks.search("simple_evals.*")} == {"simple_evals"}
    assert tasks.search("zzqqxx") == []


def test_images_by_harness() -> None:
    assert tasks.harness_container("simple_evals") == (
        "nvcr.io/nvidia/eval-factory/simple-evals:26.03"
    )
    assert tasks.harness_container("no-such-harness") is None


def test_parameters_of_a_task_and_of_a_harness() -> None:
    known = tasks.parameters("lm-evaluation-harness.hellaswag")
    assert known == tasks.find("hellaswag").parameters
    assert tasks.parameters("lm-evaluation-harness.mine") == known
    assert tasks.parameters("quiz.sums") is None
    assert tasks.get("lm-evaluation-harness.mine") is None


def test_what_a_task_needs() -> None:
    lines = " / ".join(tasks.needs(tasks.find("hellaswag")))
    assert "logprobs" in lines and "tokenizer" in lines and "data set" in lines
    assert tasks.keys(tasks.find("hellaswag")) == []
    judged = tasks.find("aa_lcr")
    assert tasks.keys(judged) == ["JUDGE_API_KEY"]
    lines = " / ".join(tasks.needs(judged))
    assert "a judge model: nvdev/qwen/qwen-235b at https://" in lines
    assert "JUDGE_API_KEY: name it in run.env.secrets" in lines
    assert "tokenizer" not in lines


def run(*words: str) -> Result:
    return CliRunner().invoke(cli, ["tasks", *words], standalone_mode=False)


def test_the_command_lists_and_filters() -> None:
    assert len(run().output.splitlines()) == 421
    assert len(json.loads(run("--json").output)) == 421
    (line,) = run("hellaswag_multi").output.splitlines()
    assert line.split() == [
        *("hellaswag_multilingual", "lm-evaluation-harness", "completions", "needs", "logprobs")
    ]
    nothing = run("zzqqxx").exception
    assert isinstance(nothing, ConfigError) and "no known benchmark" in nothing.message


def test_the_command_explains_one() -> None:
    text = run("show", "adlr_winogrande_5_shot").output
    for words in (
        "lm-evaluation-harness.adlr_winogrande_5_shot",
        "sha256:",
        "it needs",
        "logprobs",
    ):
        assert words in text
    assert re.search(r"extra\.num_fewshot +5$", text, re.MULTILINE)
    facts = json.loads(run("show", "hellaswag", "--json").output)
    assert facts["type"] == "lm-evaluation-harness.hellaswag"
    assert "extra.tokenizer" in facts["parameters"]
    wrong = run("show", "helaswag").exception
    assert isinstance(wrong, ConfigError) and wrong.hint is not None and "hellaswag" in wrong.hint


@pytest.mark.serving
@pytest.mark.skipif(
    importlib.util.find_spec("nemo_evaluator_launcher") is None,
    reason="nemo-evaluator-launcher is not installed",
)
def test_the_snapshot_agrees_with_the_installed_launcher() -> None:
    done = subprocess.run(
        [sys.executable, REFRESH, "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
