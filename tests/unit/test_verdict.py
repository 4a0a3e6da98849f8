"""The verdict's rules: what is valid, what is not, and what nobody can say."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from slurmeval import manifest, verdict
from slurmeval.config.schema import Config, Eval
from tests.unit import evalfiles as files

LIMITS = dict(verdict.LIMITS)
DOCS = Path(__file__).parents[2] / "docs"


def judge(folder: Path, exit_code: int | None = 0, **limits: Any) -> dict[str, Any]:
    return verdict.judge({"name": "mine"}, folder, {**LIMITS, **limits}, exit_code, 1.0)


def test_limits_are_those_of_the_configuration():
    defaults = Eval()
    assert {name: getattr(defaults, name) for name in LIMITS} == LIMITS
    config = Config.model_validate({"eval": {"max_error_share": 0.5, "suspicious": "invalid"}})
    given = verdict.limits_of(config.model_dump())
    assert given == {**LIMITS, "max_error_share": 0.5, "suspicious": "invalid"}


def test_good_results(tmp_path):
    files.write_counts(files.good(tmp_path), 8, 8)
    files.write_cache(tmp_path, ["a", "b"], {"a": "x", "b": "y" * 200})
    found = judge(tmp_path)
    assert (found["state"], found["reason"], found["warnings"]) == ("ok", "", [])
    assert found["metrics"] == {"acc": {"value": 0.5, "stderr": 0.05}}
    assert (found["primary"], found["samples"], found["requests"]) == ("acc", 4, 8)
    assert found["answers"] == {"asked": 2, "unanswered": 0, "error_texts": 0}
    assert found["versions"]["python"]


def test_no_results():
    missing = Path("/nonexistent")
    assert judge(missing, None)["state"] == "unknown"
    assert judge(missing, 0)["state"] == "failed"
    assert "exit code 7" in judge(missing, 7)["reason"]


def test_the_log_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv("LOG_DIR", str(tmp_path))
    (tmp_path / "mine.log").write_text(
        "ValueError: not this one\r\n"
        "FileNotFoundError: Unable to find '/data/x.jsonl'\r\n"
        "RuntimeError: Evaluation failed! Please consult the logs below:\n"
    )
    assert judge(tmp_path, 1)["reason"].endswith(
        "FileNotFoundError: Unable to find '/data/x.jsonl'"
    )


def test_an_exit_code_that_is_not_0_fails_even_with_results(tmp_path):
    assert judge(files.good(tmp_path), 1)["state"] == "failed"


def test_a_marker_of_interruption_counts_whatever_the_exit_code(tmp_path):
    (files.good(tmp_path) / verdict.INTERRUPTED).write_text('{"signal": "SIGTERM"}')
    found = judge(tmp_path)
    assert found["state"] == "interrupted"
    assert "SIGTERM" in found["reason"]


def test_a_task_that_the_job_stopped_says_why(tmp_path):
    (files.good(tmp_path) / verdict.STOPPED).write_text("its deadline of 60 s\n")
    assert judge(tmp_path)["reason"] == "stopped: its deadline of 60 s"


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_a_score_that_is_no_number(tmp_path, value):
    files.write_results(tmp_path, {"mine": {"acc": files.metric(value)}})
    files.write_samples(tmp_path, [files.choice(-1.0, -2.0)])
    assert judge(tmp_path) | {"state": "invalid", "reason": "not a number: acc"} == judge(tmp_path)


def test_no_metric(tmp_path):
    files.write_results(tmp_path, {})
    assert judge(tmp_path)["reason"] == "the results hold no metric"


@pytest.mark.parametrize(
    "text", ["results: [", "results: {tasks: [1]}", "- 1", "results: {tasks: 3}"]
)
def test_results_that_cannot_be_read(tmp_path, text):
    (tmp_path / "results.yml").write_text(text)
    assert judge(tmp_path)["state"] == "invalid"


def test_no_sample(tmp_path):
    files.write_results(tmp_path, {"mine": {"acc": files.metric(0.5)}})
    files.write_samples(tmp_path, [])
    assert judge(tmp_path)["reason"] == "0 sample(s), at least 1 wanted"
    files.write_samples(tmp_path, [files.choice(-1, -2)] * 3)
    assert "3 sample(s), at least 4" in judge(tmp_path, min_samples=4)["reason"]


def test_samples_that_are_missing(tmp_path):
    files.good(tmp_path)
    files.write_samples(tmp_path, [files.choice(-1, -2)] * 3, planned=4)
    assert judge(tmp_path)["reason"] == "3 of 4 samples were evaluated"


def test_a_harness_that_counts_its_samples_itself(tmp_path):
    files.write_results(tmp_path, {"mine": {"acc": files.metric(0.5, count=30)}})
    assert judge(tmp_path)["samples"] == 30
    files.write_results(tmp_path, {"mine": {"acc": files.metric(0.5, count=0)}})
    assert judge(tmp_path)["state"] == "invalid"


def test_a_harness_that_does_not_count_is_not_called_invalid(tmp_path):
    files.write_results(tmp_path, {"mine": {"acc": files.metric(0.5)}})
    assert judge(tmp_path)["state"] == "unknown"
    files.write_cache(tmp_path, ["a"], {"a": "x"})
    found = judge(tmp_path)
    assert found["state"] == "ok"
    assert "do not say how many samples" in found["warnings"][0]


def test_questions_that_never_got_an_answer(tmp_path):
    files.good(tmp_path)
    asked = [str(i) for i in range(100)]
    files.write_cache(tmp_path, asked, dict.fromkeys(asked[:90], "x"))
    found = judge(tmp_path)
    assert found["state"] == "invalid"
    assert "10.0% of 100 requests have no answer: 10 never got one, 0 got" in found["reason"]
    assert judge(tmp_path, max_error_share=0.1)["state"] == "ok"


def test_error_texts_for_answers(tmp_path):
    files.good(tmp_path)
    text = f"{verdict.ERROR_TEXT} CUDA error, and a long story about it" * 3
    files.write_cache(tmp_path, ["a", "b"], {"a": "x", "b": text})
    assert "1 got an error text" in judge(tmp_path)["reason"]
    files.write_cache(tmp_path, ["a", "b"], {"a": "x", "b": f"It said: {verdict.ERROR_TEXT}"})
    assert judge(tmp_path)["state"] == "ok"


def test_error_texts_in_samples_count_without_a_cache(tmp_path):
    files.good(tmp_path)
    files.write_samples(tmp_path, [files.said("fine"), files.said(f"{verdict.ERROR_TEXT} x")])
    assert judge(tmp_path)["reason"] == "50.0% of the answers are error texts"


def test_requests_that_were_repeated_with_success_are_a_warning(tmp_path):
    files.write_counts(files.good(tmp_path), 10, 8)
    files.write_cache(tmp_path, ["a"], {"a": "x"})
    found = judge(tmp_path)
    assert found["state"] == "ok"
    assert found["warnings"] == ["2 of 10 requests failed; repeated, each got an answer"]


def test_a_cache_that_dropped_answers_proves_nothing(tmp_path, monkeypatch):
    files.good(tmp_path)
    files.write_cache(tmp_path, ["a", "b"], {"a": "x"})
    monkeypatch.setattr(verdict, "CACHE_FULL", 20)
    found = judge(tmp_path)
    assert (found["state"], found["answers"]) == ("ok", None)


def test_a_broken_cache_proves_nothing(tmp_path):
    files.write_cache(files.good(tmp_path), ["a"], {})
    (tmp_path / "cache/responses/cache.db").write_text("no database" * 100)
    assert judge(tmp_path)["state"] == "ok"


def test_probabilities_that_are_all_the_same_are_those_of_no_model(tmp_path):
    files.good(tmp_path, 0.25)
    files.write_samples(tmp_path, [files.choice(0.0, 0.0, 0.0, 0.0)] * 8)
    found = judge(tmp_path)
    assert found["state"] == "invalid"
    assert "all 32 answers to choose from are equally likely" in found["reason"]
    files.write_samples(tmp_path, [files.choice(0.0, 0.0)] * 7 + [files.choice(0.0, -0.1)])
    assert judge(tmp_path)["state"] == "ok"


def test_a_score_of_exactly_0_is_a_loud_warning_or_invalid(tmp_path):
    files.good(tmp_path, 0.0, samples=40)
    found = judge(tmp_path)
    assert found["state"] == "ok"
    assert found["warnings"] == [
        "the score is exactly 0, where guessing would get about 20 samples right"
    ]
    found = judge(tmp_path, suspicious="invalid")
    assert (found["state"], found["reason"][:22]) == ("invalid", "the score is exactly 0")


def test_a_group_is_counted_once_and_stands_for_its_parts(tmp_path):
    parts = {name: {"acc": files.metric(0.4)} for name in ("mmlu_art", "mmlu_law")}
    files.write_results(tmp_path, parts, {"mmlu": {"acc": files.metric(0.6)}}, task="mmlu")
    for name in parts:
        files.write_samples(tmp_path, [files.choice(-1, -2)] * 3, name=name)
    model = tmp_path / "model"
    counts = {name: {"effective": 3} for name in parts}
    (model / "results_all.json").write_text(json.dumps({"n-samples": counts}))
    found = judge(tmp_path)
    assert (found["state"], found["primary"], found["samples"]) == ("ok", "mmlu/acc", 6)
    assert set(found["metrics"]) == {"mmlu/acc", "mmlu_art/acc", "mmlu_law/acc"}
    table = verdict.table(verdict.summarise(tmp_path, [], {}, LIMITS) | {"tasks": [found]})
    assert "mmlu/acc" in table and "mmlu_art" not in table


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["perplexity", "acc_norm", "acc"], "acc"),
        (["exact_match__strict", "exact_match__flexible"], "exact_match__strict"),
        (["pass_at_1__n=1,sanitized"], "pass_at_1__n=1,sanitized"),
        (["perplexity", "bits"], "perplexity"),
        ([], None),
    ],
)
def test_the_metric_that_stands_for_a_benchmark(names, wanted):
    assert verdict.primary_metric(dict.fromkeys(names), "mine") == wanted


def test_the_metric_that_the_user_wants(tmp_path):
    files.good(tmp_path)
    facts = {"name": "mine", "primary": "acc_norm"}
    found = verdict.judge(facts, tmp_path, LIMITS, 0, 1.0)
    assert found["state"] == "invalid"
    assert found["reason"] == "the results hold no metric acc_norm; they hold acc"


@pytest.fixture
def job(tmp_path) -> Path:
    """A job directory with two benchmarks, judged as the job does it."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": {"model_id": "tiny"}}))
    facts = {
        "slurmeval": "1",
        "files": {"config.yaml": "0" * 64},
        "tasks": [{"name": "one", "type": "a.one", "image": "i", "digest": "sha256:1"}],
    }
    (tmp_path / "manifest.json").write_text(json.dumps(facts))
    files.good(tmp_path / "eval_results/one", 0.25)
    files.good(tmp_path / "eval_results/two", 0.75)
    return tmp_path


def run(job: Path, *words: str) -> int:
    return verdict.main(["--job-dir", str(job), *words])


def test_a_job_is_judged_and_summed_up(job, capsys):
    root = job / "eval_results"
    for name in ("one", "two"):
        assert run(job, "task", name, str(root / name), "--exit-code", "0", "--seconds", "2") == 0
    assert capsys.readouterr().out.splitlines()[0] == "ok  acc 0.2500  4 samples"
    assert run(job, "summary", str(root), "one", "two", "--job-id", "7") == 0
    summary = json.loads((root / "summary.json").read_text())
    assert summary["state"] == "ok"
    assert summary["aggregate"]["value"] == 0.5
    assert summary["aggregate"]["stderr"] == pytest.approx(0.05 / math.sqrt(2))
    one = summary["tasks"][0]
    assert (one["type"], one["image"], one["image_digest"]) == ("a.one", "i", "sha256:1")
    assert summary["job"]["id"] == "7"
    assert summary["job"]["model_id"] == "tiny"
    assert summary["job"]["edited"] == ["config.yaml"]
    assert "mean 0.5000, state ok" in capsys.readouterr().out


def test_a_manifest_names_every_file_with_size_and_checksum(job, tmp_path):
    root = job / "eval_results"
    (root / "manifest.json").write_text("old")
    (root / "link").symlink_to("/etc/passwd")
    run(job, "summary", str(root), "one", "two")
    found = json.loads((root / "manifest.json").read_text())["files"]
    there = {str(p.relative_to(root)): p for p in root.rglob("*") if p.is_file()}
    assert set(found) == set(there) - {"manifest.json", "link"} >= {"summary.json"}
    assert manifest.results_manifest(job) == {
        f"eval_results/{name}": manifest.sha256(there[name]) for name in found
    }
    assert all(found[name]["size"] == there[name].stat().st_size for name in found)


def test_a_job_that_failed_on_its_way_is_not_ok_whatever_its_benchmarks_are(job):
    root = job / "eval_results"
    run(job, "task", "one", str(root / "one"), "--exit-code", "0")
    assert run(job, "summary", str(root), "one", "--failure", "Ray died") == 1
    summary = json.loads((root / "summary.json").read_text())
    assert (summary["state"], summary["job"]["failure"]) == ("failed", "Ray died")
    assert summary["tasks"][0]["state"] == "ok"
    assert summary["aggregate"]["value"] is None


SHIFTED = {"name": "shifted-loglikelihood", "spoils": "loglikelihood", "message": "all shifted"}
STOPLESS = {"name": "stop-ignored", "spoils": "generation", "message": "runs on", "sure": True}


@pytest.mark.parametrize(
    ("asks", "fault", "state", "warnings"),
    [
        ("loglikelihood", {**SHIFTED, "sure": True}, "invalid", []),
        ("loglikelihood", {**SHIFTED, "sure": False}, "ok", ["all shifted"]),
        (None, {**SHIFTED, "sure": True}, "ok", ["all shifted"]),
        ("generation", {**SHIFTED, "sure": True}, "ok", []),
        ("loglikelihood", {**SHIFTED, "spoils": "is_greedy", "sure": True}, "ok", ["all shifted"]),
        ("loglikelihood", STOPLESS, "ok", []),
        ("generation", STOPLESS, "ok", ["runs on"]),
        (None, STOPLESS, "ok", ["runs on"]),
    ],
)
def test_a_fault_of_the_endpoint_counts_where_it_spoils_the_score(
    job, asks, fault, state, warnings
):
    facts = json.loads((job / "manifest.json").read_text())
    facts["tasks"][0]["asks"] = asks
    (job / "manifest.json").write_text(json.dumps(facts))
    endpoint = job / "endpoint.json"
    endpoint.write_text(json.dumps({"faults": [fault]}))
    out = job / "eval_results/one"
    words = ("task", "one", str(out), "--exit-code", "0", "--endpoint", str(endpoint))
    assert run(job, *words) == (state != "ok")
    found = json.loads((out / "verdict.json").read_text())
    assert (found["state"], found["warnings"]) == (state, warnings)
    assert found["reason"] == ("all shifted" if state == "invalid" else "")


def test_every_key_of_a_summary_is_documented(job):
    page = (DOCS / "summary-schema.md").read_text()
    root = job / "eval_results"
    run(job, "task", "one", str(root / "one"), "--exit-code", "0")
    run(job, "summary", str(root), "one")
    summary = json.loads((root / "summary.json").read_text())
    keys = {*summary, *summary["tasks"][0], *summary["aggregate"], *summary["job"]}
    named = set(re.findall(r"`([\w.\[\]]+)`", page))
    assert keys <= {name.rpartition(".")[2] for name in named}
    assert f"`schema_version` {verdict.SCHEMA_VERSION}" in page


@pytest.mark.parametrize(
    ("states", "wanted"),
    [
        (["ok", "ok"], "ok"),
        (["ok", "invalid"], "invalid"),
        (["failed", "invalid"], "failed"),
        (["interrupted", "ok"], "failed"),
        (["unknown", "ok"], "unknown"),
        (["skipped", "ok"], "unknown"),
        (["unknown", "invalid"], "invalid"),
    ],
)
def test_the_state_of_all(tmp_path, states, wanted):
    names = [f"t{i}" for i in range(len(states))]
    for name, state in zip(names, states, strict=True):
        entry = judge(files.good(tmp_path / name, 0.1 + len(name)))
        (tmp_path / name / "verdict.json").write_text(json.dumps({**entry, "state": state}))
    summary = verdict.summarise(tmp_path, names, {}, LIMITS)
    assert summary["state"] == wanted
    assert (summary["aggregate"]["value"] is None) == (wanted != "ok")


def test_benchmarks_without_a_verdict(tmp_path):
    (tmp_path / "dead").mkdir()
    (tmp_path / "late").mkdir()
    (tmp_path / "late" / verdict.STOPPED).write_text("its deadline of 5 s")
    tasks = verdict.summarise(tmp_path, ["never", "dead", "late"], {}, LIMITS)["tasks"]
    assert [task["state"] for task in tasks] == ["skipped", "unknown", "interrupted"]


def same(tmp_path: Path, value: float, samples: int, count: int, **limits: Any) -> dict[str, Any]:
    names = [f"t{i}" for i in range(count)]
    for name in names:
        entry = judge(files.good(tmp_path / name, value, samples))
        (tmp_path / name / "verdict.json").write_text(json.dumps(entry))
    return verdict.summarise(tmp_path, names, {}, {**LIMITS, **limits})


def test_the_same_score_everywhere_is_said(tmp_path):
    summary = same(tmp_path, 0.25, 4, 3)
    assert summary["warnings"] == ["all 3 benchmarks have the same score, 0.25"]
    assert summary["state"] == "ok"
    assert "WARNING: all 3 benchmarks" in verdict.table(summary)
    assert same(tmp_path, 0.25, 4, 3, suspicious="invalid")["state"] == "invalid"


def test_two_small_benchmarks_with_the_same_score_are_no_news(tmp_path):
    assert same(tmp_path, 0.25, 4, 2)["warnings"] == []
    assert same(tmp_path, 0.25, verdict.MANY, 2)["warnings"] != []
    assert same(tmp_path, 0.0, 4, 2)["warnings"] == ["all 2 benchmarks have the same score, 0"]


def leftovers(folder: Path, state: str) -> Path:
    files.good(folder)
    (folder / "lm_cache_rank0.db").mkdir()
    files.write_cache(folder, ["a"], {"a": "x"})
    (folder / "verdict.json").write_text(json.dumps({**judge(folder), "state": state}))
    (folder / verdict.INTERRUPTED).write_text("{}")
    return folder


def test_valid_results_are_kept(tmp_path, capsys):
    folder = leftovers(tmp_path, "ok")
    assert verdict.main(["resume", "mine", str(folder)]) == 0
    assert capsys.readouterr().out.startswith("ok  acc")
    assert (folder / "results.yml").exists()


@pytest.mark.parametrize(("state", "keeps"), [("interrupted", True), ("invalid", False)])
def test_a_new_run_sees_no_old_result_and_goes_on_where_the_answers_were_good(
    tmp_path, state, keeps
):
    folder = leftovers(tmp_path, state)
    assert verdict.main(["resume", "mine", str(folder)]) == 1
    assert not list(folder.glob("*/samples_*")) and not list(folder.glob("*/results_*"))
    assert not (folder / "results.yml").exists() and not (folder / verdict.INTERRUPTED).exists()
    assert (folder / "cache").exists() == keeps == (folder / "lm_cache_rank0.db").exists()


def test_error_texts_are_never_used_again(tmp_path):
    folder = leftovers(tmp_path, "failed")
    files.write_cache(folder, ["a"], {"a": f"{verdict.ERROR_TEXT} x"})
    verdict.resume(folder)
    assert not (folder / "cache").exists()


def test_the_cache_of_valid_results_goes(tmp_path):
    files.write_cache(files.good(tmp_path), ["a"], {"a": "x"})
    assert verdict.main(["task", "mine", str(tmp_path), "--exit-code", "0"]) == 0
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", ["run#3", "a%41b", "q?x", "100%", "ü ß"])
def test_unanswered_requests_are_found_whatever_the_path_looks_like(tmp_path, name):
    folder = files.good(tmp_path / name)
    files.write_cache(folder, [f"q{i}" for i in range(20)], {"q0": "x"})
    assert judge(folder)["state"] == "invalid"


def test_downsampling_leaves_out_what_it_says(tmp_path):
    files.write_results(tmp_path, {"mine": {"acc": files.metric(0.5)}})
    files.write_samples(tmp_path, [files.choice(-1.5, -2 - i) for i in range(10)], planned=105)
    place = tmp_path / "model" / "results_mine.json"
    values = json.loads(place.read_text())
    place.write_text(json.dumps(values | {"config": {"downsampling_ratio": 0.1}}))
    found = judge(tmp_path)
    assert (found["state"], found["samples"]) == ("ok", 10)
    place.write_text(json.dumps(values | {"config": {"downsampling_ratio": 0.2}}))
    assert judge(tmp_path)["reason"] == "10 of 21 samples were evaluated"


def test_a_verdict_is_json_even_where_a_score_is_not_a_number(tmp_path):
    files.write_results(tmp_path, {"mine": {"acc": files.metric(float("nan"))}})
    found = judge(tmp_path)
    assert (found["state"], found["reason"]) == ("invalid", "not a number: acc")
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("edited", ["config.yaml", "eval/mine.yaml"])
def test_results_of_another_model_or_run_configuration_are_not_kept(tmp_path, edited):
    (tmp_path / "eval").mkdir()
    (tmp_path / "config.yaml").write_text("model: {checkpoint_path: /c/iter_0000001}")
    (tmp_path / "eval" / "mine.yaml").write_text("config: {params: {limit_samples: 4}}")
    folder = tmp_path / "eval_results" / "mine"
    folder.mkdir(parents=True)
    words = ["--job-dir", str(tmp_path)]
    assert verdict.main([*words, "resume", "mine", str(folder)]) == 1
    files.write_cache(files.good(folder), ["a"], {"a": "x"})
    (folder / "verdict.json").write_text(json.dumps(judge(folder)))
    assert verdict.main([*words, "resume", "mine", str(folder)]) == 0
    (tmp_path / edited).write_text("model: {checkpoint_path: /c/iter_0000002}")
    assert verdict.main([*words, "resume", "mine", str(folder)]) == 1
    assert not (folder / "cache").exists() and not (folder / "results.yml").exists()
