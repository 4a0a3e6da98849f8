"""Verdicts on runs of the real evaluator, against an endpoint that fails as it is told to."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from slurmeval.config.load import load
from slurmeval.config.schema import Config
from slurmeval.plan import make_plan
from slurmeval.render import render
from tests.serving.endpoint import Endpoint

pytestmark = pytest.mark.serving

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
HARNESSES = os.pathsep.join([str(EXAMPLES / "own-harness"), str(ROOT / "tests/serving/harness")])
LM = "lm-evaluation-harness"


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with Endpoint() as serving:
        yield serving


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of single bytes, which gives every text back unchanged."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>"]
    made.train_from_iterator(
        [], trainers.BpeTrainer(initial_alphabet=alphabet, special_tokens=special)
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    made.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


class Job:
    """A rendered job directory, of which only the evaluator's part runs."""

    def __init__(self, folder: Path, config: Config, endpoint: Endpoint, here: Path) -> None:
        self.folder, self.endpoint = folder, endpoint
        self.env = {
            **os.environ,
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": HARNESSES,
            "RESULTS_DIR": str(folder / "eval_results"),
            "JOB_DIR": str(folder),
            "LOG_DIR": str(folder / "logs"),
            "NODE_DIR": str(folder / "node"),
            "ENDPOINT_FILE": str(folder / "endpoint.json"),
            "HF_HOME": str(folder / "hf"),
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
        }
        before = Path.cwd()
        os.chdir(here)
        try:
            self.files = render(config, make_plan(config))
        finally:
            os.chdir(before)
        for name, file in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(file.text)
        for name in ("logs", "node"):
            (folder / name).mkdir()
        script = self.files["job.sbatch"].text
        self.script = folder / "evaluate.sh"
        self.script.write_text(script.split("<<'EVALUATE'\n")[1].split("\nEVALUATE\n")[0] + "\n")

    def start(self, task: str) -> subprocess.Popen[bytes]:
        port = str(random.randint(20000, 30000))
        with (self.folder / "logs" / f"{task}.log").open("ab") as log:
            return subprocess.Popen(
                ["bash", self.script, task, self.endpoint.url, port],
                env=self.env,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def run(self, task: str) -> dict[str, Any]:
        """Run one benchmark as the job does it, and return its verdict."""
        self.start(task).wait(timeout=300)
        return self.verdict(task)

    def run_all(self, *tasks: str) -> list[dict[str, Any]]:
        """Run benchmarks at once."""
        for process in [self.start(task) for task in tasks]:
            process.wait(timeout=300)
        return [self.verdict(task) for task in tasks]

    def verdict(self, task: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(
            (self.folder / "eval_results" / task / "verdict.json").read_text()
        )
        return found

    def summary(self, *names: str) -> dict[str, Any]:
        root = self.folder / "eval_results"
        subprocess.run(
            [sys.executable, self.folder / "verdict.py", "summary", root, *names], check=False
        )
        found: dict[str, Any] = json.loads((root / "summary.json").read_text())
        return found

    def log(self, task: str) -> str:
        return (self.folder / "logs" / f"{task}.log").read_text(errors="replace")


def config(tokenizer: Path | str, *tasks: dict[str, Any], **settings: Any) -> Config:
    return Config.model_validate(
        {
            "model": {"checkpoint_path": str(tokenizer), "tokenizer": str(tokenizer)},
            "run": {"env": {"executor": "local"}},
            "deploy": {"backend": "hf", "num_gpus": 0},
            "eval": {
                "tasks": list(tasks),
                "parallelism": 4,
                "max_retries": 2,
                "request_timeout": 20,
                **settings,
            },
        }
    )


def quiz(questions: int = 30) -> dict[str, Any]:
    return {
        "name": "sums",
        "type": "quiz.sums",
        "params": {"limit_samples": questions, "extra": {"largest": 9}},
    }


def fault(what: str, name: str = "faults") -> dict[str, Any]:
    return {"name": name, "type": "faults.faults", "params": {"extra": {"what": what}}}


def own(task: str) -> dict[str, Any]:
    return {"name": task, "type": f"{LM}.{task}", "include_path": "own-tasks"}


@pytest.fixture
def job(tmp_path: Path, endpoint: Endpoint, tokenizer: Path) -> Any:
    def make(*tasks: dict[str, Any], here: Path = EXAMPLES, **settings: Any) -> Job:
        return Job(tmp_path, config(tokenizer, *tasks, **settings), endpoint, here)

    return make


def test_the_documented_own_tasks(tmp_path, endpoint, tokenizer, monkeypatch):
    monkeypatch.chdir(EXAMPLES)
    words = [f"model.checkpoint_path={tokenizer}", f"model.tokenizer={tokenizer}"]
    words += ["eval.max_retries=2", "deploy.backend=hf", "deploy.num_gpus=0"]
    loaded = load(["own-tasks/config.yaml"], profile="local", overrides=words)
    job = Job(tmp_path, loaded.config, endpoint, EXAMPLES)
    choice, said = job.run_all("capitals", "capitals-said")
    assert (choice["state"], choice["samples"]) == ("ok", 12), job.log("capitals")[-3000:]
    assert choice["answers"] is not None and choice["answers"]["asked"] == 36
    assert choice["versions"]["nemo-evaluator"].startswith("0.2")
    assert "36/36 [" in job.log("capitals"), "its own bar shows how far it is"
    assert (said["state"], said["samples"], said["metrics"]["exact_match"]["value"]) == (
        "ok",
        6,
        pytest.approx(1 / 6),
    )


def test_the_documented_own_harness(tmp_path, endpoint, monkeypatch):
    monkeypatch.chdir(EXAMPLES)
    monkeypatch.setenv("PWD", str(EXAMPLES))
    words = ["model.checkpoint_path=/none", "deploy.backend=hf", "deploy.num_gpus=0"]
    loaded = load(["own-harness/config.yaml"], profile="local", overrides=words)
    job = Job(tmp_path, loaded.config, endpoint, EXAMPLES)
    assert loaded.config.run.env.env_vars["PYTHONPATH"] == str(EXAMPLES / "own-harness")
    found = job.run("sums")
    assert (found["state"], found["samples"], found["metrics"]["acc"]["value"]) == ("ok", 30, 1.0)
    assert not (tmp_path / "eval_results/sums/cache").exists()


def test_the_endpoint_dies_midway_and_the_harness_exits_0(job, endpoint):
    endpoint.dies_after = 20
    found = job(quiz()).run("sums")
    assert found["exit_code"] == 0
    assert found["state"] == "invalid"
    assert "33.3% of 30 requests have no answer: 10 never got one" in found["reason"]
    assert found["failed_requests"] == 0, "the evaluator itself counts no failure"


def test_the_endpoint_dies_midway_and_the_harness_gives_up(job, endpoint):
    endpoint.dies_after = 10
    found = job(own("capitals")).run("capitals")
    assert found["state"] == "failed"
    assert "exit code 1" in found["reason"] and "Error" in found["reason"]


def test_requests_that_fail_at_first_are_a_warning(job, endpoint):
    endpoint.refuses = lambda number: number in (3, 4, 5, 9)
    made = job(own("capitals"), max_retries=6)
    found = made.run("capitals")
    assert found["state"] == "ok", made.log("capitals")[-3000:]
    assert "requests failed; repeated, each got an answer" in found["warnings"][0]


def test_every_answer_is_an_error_text_with_http_200(job, endpoint):
    endpoint.error_texts = True
    made = job(own("capitals_said"))
    found = made.run("capitals_said")
    assert (found["exit_code"], found["state"]) == (0, "invalid")
    assert (
        "100.0% of 12 requests have no answer: 0 never got one, 12 got an error text"
        in (found["reason"])
    )
    endpoint.error_texts = False
    assert made.run("capitals_said")["state"] == "ok", "the error texts are not used again"


def test_a_run_that_is_cut_short_goes_on_where_it_was(job, endpoint):
    endpoint.pause = 0.3
    made = job(quiz(60))
    process = made.start("sums")
    while endpoint.asked < 12 and process.poll() is None:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(timeout=60)
    found = made.verdict("sums")
    assert found["state"] == "interrupted", made.log("sums")[-3000:]
    assert "SIGTERM" in found["reason"]
    before, endpoint.asked, endpoint.pause = endpoint.asked, 0, 0.0
    again = made.run("sums")
    assert (again["state"], again["samples"]) == ("ok", 60)
    assert endpoint.asked <= 60 - before + 4, "at most those under way are asked again"


def test_a_data_set_that_is_missing(job, tmp_path):
    tasks = tmp_path / "here" / "gone"
    shutil.copytree(EXAMPLES / "own-tasks", tasks)
    text = (tasks / "capitals.yaml").read_text()
    (tasks / "capitals.yaml").write_text(text.replace("own-tasks/capitals.jsonl", "/no/such.jsonl"))
    (tasks / "capitals_said.yaml").unlink()
    found = job({**own("capitals"), "include_path": "gone"}, here=tmp_path / "here").run("capitals")
    assert found["state"] == "failed"
    assert "FileNotFoundError" in found["reason"] and "such.jsonl" in found["reason"]


def test_probabilities_that_are_those_of_nothing(job, endpoint):
    endpoint.constant = True
    found = job(own("capitals")).run("capitals")
    assert (found["exit_code"], found["state"]) == (0, "invalid")
    assert "all 36 answers to choose from are equally likely" in found["reason"]


def test_an_endpoint_that_is_known_to_shift_answers(job):
    made = job(own("capitals"))
    fault = {"name": "x", "spoils": "loglikelihood", "message": "answers shift", "sure": True}
    (made.folder / "endpoint.json").write_text(json.dumps({"faults": [fault]}))
    found = made.run("capitals")
    assert (found["exit_code"], found["state"], found["reason"]) == (0, "invalid", "answers shift")


def test_results_that_are_no_results(job):
    made = job(
        fault("empty", "empty"),
        fault("nan", "nan"),
        fault("no-samples", "none"),
        *(fault("0.0", f"zero{i}") for i in range(2)),
    )
    names = ("empty", "nan", "none", "zero0", "zero1")
    found = dict(zip(names, made.run_all(*names), strict=True))
    states = {name: entry["state"] for name, entry in found.items()}
    assert states == {
        "empty": "invalid",
        "nan": "invalid",
        "none": "invalid",
        "zero0": "ok",
        "zero1": "ok",
    }
    assert all(entry["exit_code"] == 0 for entry in found.values())
    assert found["empty"]["reason"] == "the results hold no metric"
    assert found["nan"]["reason"] == "not a number: acc"
    assert found["none"]["reason"] == "0 sample(s), at least 1 wanted"
    assert found["zero0"]["warnings"] == ["the score is exactly 0"]
    summary = made.summary("zero0", "zero1")
    assert summary["state"] == "ok"
    assert summary["warnings"] == ["all 2 benchmarks have the same score, 0"]
    settings = yaml.safe_load((made.folder / "config.yaml").read_text())
    settings["eval"]["suspicious"] = "invalid"
    (made.folder / "config.yaml").write_text(yaml.safe_dump(settings))
    assert made.summary("zero0", "zero1")["state"] == "invalid"


def test_the_same_score_for_every_task(job):
    made = job(*(fault("0.25", f"same{i}") for i in range(3)))
    names = [f"same{i}" for i in range(3)]
    assert [found["state"] for found in made.run_all(*names)] == ["ok"] * 3
    summary = made.summary(*names)
    assert summary["warnings"] == ["all 3 benchmarks have the same score, 0.25"]
    assert summary["tasks"][0]["versions"]["nemo-evaluator"]
